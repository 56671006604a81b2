#include "kernels/kernels.h"

#include "kernels/ref/ref_device.h"
#include "runtime/base/checked.h"
#include "runtime/base/os.h"

namespace dsv3::kernels {

const char* dtype_name(DType t) {
  switch (t) {
    case DType::kF32:
      return "F32";
    case DType::kBF16:
      return "BF16";
    case DType::kF16:
      return "F16";
    case DType::kF8E4M3:
      return "F8_E4M3";
  }
  return "unknown";
}

size_t matrix_bytes(DType dtype, Layout layout, int64_t n, int64_t k) {
  if (layout == Layout::kTile16x2) {
    n = round_up<int64_t>(n, kTileN);
    k = round_up<int64_t>(k, kTileK);
  }
  return static_cast<size_t>(n) * static_cast<size_t>(k) * dtype_size(dtype);
}

std::vector<std::string> kernel_sets() { return {"ref"}; }

Result<std::unique_ptr<Device>> make_device(const DeviceOptions& options) {
  const std::vector<std::string> sets = kernel_sets();
  const std::string& name = options.kernels.empty() ? sets.front() : options.kernels;
  if (name == "ref") return make_ref_device();
  std::string known;
  for (const std::string& set : sets) known += (known.empty() ? "" : ", ") + set;
  return make_field_error(Code::kUnsupported, "kernels",
                          "kernels is \"%s\", which this machine cannot run; it can run %s",
                          name.c_str(), known.c_str());
}

}  // namespace dsv3::kernels
