// config.json: any text is refused, or gives a config whose model can be laid out.
#include <cstdlib>
#include <string_view>

#include "runtime/base/json.h"
#include "runtime/model/config.h"
#include "runtime/model/schema.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace dsv3;
  const auto json = parse_json({reinterpret_cast<const char*>(data), size}, "config.json");
  if (!json.ok()) return 0;
  ModelConfig generation;
  (void)generation.add_generation_config(json.value(), "generation_config.json");
  auto config = ModelConfig::from_json(json.value(), "config.json");
  if (!config.ok() || !config.value().validate("config.json").ok()) return 0;
  ModelWeights weights;
  std::vector<Record> records = model_records(config.value(), &weights);
  const uint64_t bytes = place_records(&records);
  if (bytes == 0 || bytes > uint64_t{1} << 50) abort();
  return 0;
}
