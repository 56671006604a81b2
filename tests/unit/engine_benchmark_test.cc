// Which lines a benchmark has: what fits into the model's context.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "runtime/engine/benchmark.h"
#include "runtime/model/synthetic.h"

using namespace dsv3;

TEST_CASE("a model whose context is shorter than some prompts: the longest that fits is scaled") {
  Result<ModelConfig> config = synthetic_config("tiny", 2);
  REQUIRE(config.ok());
  config->max_position_embeddings = 100;
  Result<std::shared_ptr<const Model>> model = Model::synthesise(*config, {});
  REQUIRE(model.ok());
  BenchmarkOptions options;
  options.threads = 2;
  options.repeats = 1;
  options.batches = {1};
  options.contexts = {64, 100};
  options.prefills = {32, 64, 128};
  options.scaling = true;
  const Result<BenchmarkResult> result = run_benchmark(*model, options);
  REQUIRE(result.ok());
  std::vector<std::string> lines;
  for (const BenchmarkLine& line : result.value().lines) {
    lines.push_back(line.name + " of " + std::to_string(line.tokens) + " after " +
                    std::to_string(line.context) + ", threads " + std::to_string(line.threads));
  }
  CHECK(lines == std::vector<std::string>{
                     "first token of 1 after 0, threads 2", "decode of 1 after 0, threads 2",
                     "decode of 1 after 0, threads 1", "decode of 1 after 64, threads 2",
                     "prefill of 32 after 0, threads 2", "prefill of 64 after 0, threads 2",
                     "prefill of 64 after 0, threads 1"});
}
