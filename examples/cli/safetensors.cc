#include "safetensors.h"

#include <unistd.h>

#include <bit>
#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>

#include "common.h"

namespace cli {

static_assert(std::endian::native == std::endian::little, "safetensors files are little-endian");

void write_safetensors(const std::string& path, const std::vector<NamedTensor>& tensors) {
  Json header = Json::object();
  size_t offset = 0;
  for (const NamedTensor& tensor : tensors) {
    const size_t bytes = tensor.values->size() * sizeof(float);
    header[tensor.name] = {
        {"dtype", "F32"}, {"shape", tensor.shape}, {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // the data begins at a multiple of 8
  const uint64_t header_size = text.size();

  // A file appears whole or not at all; what is none (a device, a pipe) is written to as it is.
  std::error_code unknown;
  const std::filesystem::file_status there = std::filesystem::status(path, unknown);
  const bool direct = std::filesystem::exists(there) && !std::filesystem::is_regular_file(there);
  const std::string name = direct ? path : path + ".tmp-" + std::to_string(getpid());
  std::FILE* file = std::fopen(name.c_str(), "wb");
  if (file == nullptr) throw Failure(path + ": cannot create: " + std::strerror(errno));
  bool ok = std::fwrite(&header_size, sizeof header_size, 1, file) == 1 &&
            std::fwrite(text.data(), 1, text.size(), file) == text.size();
  for (const NamedTensor& tensor : tensors) {
    if (tensor.values->empty()) continue;
    ok = ok && std::fwrite(tensor.values->data(), sizeof(float), tensor.values->size(), file) ==
                   tensor.values->size();
  }
  int failed = ok ? 0 : errno;
  if (std::fclose(file) != 0 && ok) failed = errno;
  if (failed == 0 && !direct && std::rename(name.c_str(), path.c_str()) != 0) failed = errno;
  if (failed != 0) {
    if (!direct) std::remove(name.c_str());
    throw Failure(path + ": cannot write: " + std::strerror(failed));
  }
}

}  // namespace cli
