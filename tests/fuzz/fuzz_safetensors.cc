// A safetensors file's header: what is accepted must cover the data without overlap.
#include <cstdlib>
#include <span>

#include "runtime/model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsv3;
  // The bytes are the start of a file that has them all, or of a larger one.
  for (const uint64_t file_bytes : {uint64_t{size}, uint64_t{1} << 40}) {
    const auto entries = parse_safetensors({data, size}, file_bytes, "model.safetensors");
    if (!entries.ok()) continue;
    uint64_t sum = 0;
    for (const TensorEntry& entry : entries.value()) {
      if (entry.begin > entry.end || entry.end > file_bytes) abort();
      sum += entry.end - entry.begin;
    }
    if (sum > file_bytes) abort();
  }
  return 0;
}
