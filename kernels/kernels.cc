#include "kernels/kernels.h"

#include "kernels/cpu/cpu_device.h"
#include "kernels/ref/ref_device.h"
#include "runtime/base/checked.h"
#include "runtime/base/os.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

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
    case DType::kMXFP4:
      return "MXFP4";
  }
  return "unknown";
}

namespace {

// A group of up to four blocks begins with a line of scales.
constexpr int64_t kMxGroupBlocks = 4;
constexpr int64_t kMxScaleBytes = kMxGroupBlocks * kTileN;
constexpr int64_t kMxBlockBytes = kTileN * kMxBlock / 2;
constexpr int64_t kMxGroupBytes = kMxScaleBytes + kMxGroupBlocks * kMxBlockBytes;

int64_t mx_tile_bytes(int64_t k) {
  const int64_t blocks = ceil_div<int64_t>(k, kMxBlock);
  return ceil_div(blocks, kMxGroupBlocks) * kMxScaleBytes + blocks * kMxBlockBytes;
}

}  // namespace

MxPlace mx_place(int64_t row, int64_t column, int64_t k) {
  const int64_t block = column / kMxBlock;
  const int64_t in_group = block % kMxGroupBlocks;
  const int64_t in_block = column % kMxBlock;
  const int64_t lane = row % kTileN;
  const int64_t group = row / kTileN * mx_tile_bytes(k) + block / kMxGroupBlocks * kMxGroupBytes;
  MxPlace place;
  place.byte = static_cast<size_t>(group + kMxScaleBytes + in_group * kMxBlockBytes +
                                   in_block / 8 * 64 + lane * 4 + in_block % 4);
  place.shift = in_block % 8 < 4 ? 0 : 4;
  place.scale = static_cast<size_t>(group + in_group * kTileN + lane);
  return place;
}

size_t matrix_bytes(DType dtype, Layout layout, int64_t n, int64_t k) {
  if (layout == Layout::kTileMx) {
    return static_cast<size_t>(ceil_div<int64_t>(n, kTileN)) *
           static_cast<size_t>(mx_tile_bytes(k));
  }
  if (layout == Layout::kTile16x2) {
    n = round_up<int64_t>(n, kTileN);
    k = round_up<int64_t>(k, kTileK);
  }
  return static_cast<size_t>(n) * static_cast<size_t>(k) * dtype_size(dtype);
}

namespace {

#if defined(__x86_64__)
// Clang 14's __builtin_cpu_supports does not know this one.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) != 0 && (c & bit_F16C) != 0;
}
#endif

#if defined(__x86_64__)
// "avx2i16" multiplies up to 1.4 times as fast as "avx2" and widens weights at 0.8 to 0.9 of its
// speed: out of L2 at 20 GB/s a CPU for one row (26), 15.7 for two (17.8). Memory does not deliver
// that to so many at once.
constexpr int kManyCpus = 4;
#endif

// The CPU sets that this machine can run, best first.
std::vector<const Micro*> runnable() {
  std::vector<const Micro*> sets;
#if defined(__x86_64__)
  // These also ask whether the operating system saves the registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi") &&
        __builtin_cpu_supports("avx512vnni")) {
      sets.push_back(micro_avx512bf16(l1_data_bytes()));
    }
    sets.push_back(micro_avx512());
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c()) {
    const bool many = available_cpus() >= kManyCpus;
    sets.push_back(many ? micro_avx2i16() : micro_avx2());
    sets.push_back(many ? micro_avx2() : micro_avx2i16());
  }
#elif defined(__aarch64__)
  const ArmFeatures features = arm_features();
  if (features.bf16 && features.dot) sets.push_back(micro_neonbf16());
  sets.push_back(micro_neon());  // Advanced SIMD is part of the architecture
#endif
  sets.push_back(micro_portable());
  return sets;
}

}  // namespace

std::vector<std::string> kernel_sets() {
  std::vector<std::string> names;
  for (const Micro* micro : runnable()) names.emplace_back(micro->name);
  names.emplace_back("ref");
  return names;
}

Result<std::unique_ptr<Device>> make_device(const DeviceOptions& options) {
  if (options.kernels == "ref") return make_ref_device();
  const int threads = options.threads > 0 ? options.threads : available_cpus();
  for (const Micro* micro : runnable()) {
    if (options.kernels.empty() || options.kernels == micro->name) {
      return CpuDevice::create(micro, threads, options.pin_threads);
    }
  }
  std::string known;
  for (const std::string& set : kernel_sets()) known += (known.empty() ? "" : ", ") + set;
  return make_field_error(
      Code::kUnsupported, "kernels",
      "kernels is \"%s\", which this build or machine cannot run; it can run %s",
      options.kernels.c_str(), known.c_str());
}

}  // namespace dsv3::kernels
