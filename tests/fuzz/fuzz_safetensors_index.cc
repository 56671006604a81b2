// model.safetensors.index.json: no accepted name of a shard may lead out of the folder.
#include <cstdlib>
#include <string_view>

#include "runtime/model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsv3;
  const auto map = parse_safetensors_index({reinterpret_cast<const char*>(data), size}, "index");
  if (!map.ok()) return 0;
  for (const auto& [name, shard] : map.value()) {
    if (shard.empty() || shard[0] == '.' || shard.find('/') != std::string::npos) abort();
  }
  return 0;
}
