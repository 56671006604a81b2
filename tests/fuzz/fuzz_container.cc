// Preamble and header of a .dsv3 file. The checksum is set right and the file's size taken from the
// preamble, so that what lies behind them is reached; what is accepted must lie inside the file.
#include <xxhash.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "runtime/model/container.h"

namespace {

void check(const dsv3::ContainerHeader& header, const dsv3::Preamble& preamble) {
  const uint64_t data_bytes = preamble.file_bytes - preamble.data_offset;
  uint64_t end = 0;
  for (const dsv3::Record& record : header.records) {
    if (record.offset < end || record.hashes.size() != record.count) abort();
    end = record.offset + record.stride * record.count;
    for (const dsv3::Part& part : record.parts) {
      if (part.data + part.data_bytes() > record.bytes) abort();
      if (part.scales + part.scale_count() * 4 > record.bytes) abort();
    }
    if (record.bytes > record.stride || end > data_bytes) abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsv3;
  std::vector<uint8_t> bytes(data, data + size);
  uint64_t file_bytes = size;
  if (size >= kPreambleBytes) {
    std::memcpy(&file_bytes, &bytes[32], 8);
    const uint64_t header_bytes = size - kPreambleBytes;
    const uint64_t data_offset = (size + 4095) / 4096 * 4096;
    std::memcpy(&bytes[16], &header_bytes, 8);
    std::memcpy(&bytes[24], &data_offset, 8);
    XXH128_canonical_t hash;
    XXH128_canonicalFromHash(&hash, XXH3_128bits(bytes.data() + kPreambleBytes, header_bytes));
    std::memcpy(&bytes[40], hash.digest, 16);
  }
  const auto preamble =
      decode_preamble({bytes.data(), std::min(size, kPreambleBytes)}, file_bytes, "m.dsv3");
  if (!preamble.ok()) return 0;
  const size_t header_bytes = size - kPreambleBytes;
  const auto copy = std::make_unique<uint8_t[]>(header_bytes);
  std::memcpy(copy.get(), bytes.data() + kPreambleBytes, header_bytes);
  ModelWeights weights;
  const auto header =
      decode_header(preamble.value(), {copy.get(), header_bytes}, "m.dsv3", &weights);
  if (header.ok()) check(header.value(), preamble.value());
  return 0;
}
