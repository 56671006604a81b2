// Which lines a benchmark has: what fits into the model's context and into memory; and what a
// line's limits count.
#include <doctest/doctest.h>

#include <string>
#include <vector>

#include "runtime/engine/benchmark.h"
#include "runtime/engine/benchmark_plan.h"
#include "runtime/model/synthetic.h"
#include "tests/support/emulated.h"

using namespace dsv3;

namespace {

std::shared_ptr<const Model> tiny_model(int64_t positions, bool all_experts = false) {
  Result<ModelConfig> config = synthetic_config("tiny", 2);
  REQUIRE(config.ok());
  config->max_position_embeddings = positions;
  if (all_experts) {
    config->num_experts_per_tok = config->n_routed_experts;
    config->topk_group = config->n_group;
  }
  Result<std::shared_ptr<const Model>> model = Model::synthesise(*config, {});
  REQUIRE(model.ok());
  return *model;
}

BenchmarkOptions short_options() {
  BenchmarkOptions options;
  options.threads = 2;
  options.repeats = 1;
  options.batches = {1};
  options.contexts = {};
  options.prefills = {};
  return options;
}

BenchmarkResult run(const std::shared_ptr<const Model>& model, const BenchmarkOptions& options) {
  Result<BenchmarkResult> result = run_benchmark(model, options);
  REQUIRE(result.ok());
  return std::move(*result);
}

std::string text_of(const LeftOutLine& line) {
  return line.name + " of " + std::to_string(line.tokens) + ", batch " +
         std::to_string(line.batch) + ", after " + std::to_string(line.context) + ": " +
         line.reason;
}

}  // namespace

TEST_CASE("a model whose context is shorter than some prompts: the longest that fits is scaled") {
  BenchmarkOptions options = short_options();
  options.contexts = {64, 100};
  options.context_batches = {1, 2};
  options.prefills = {32, 64, 128};
  options.scaling = true;
  std::vector<int> totals;
  options.progress = [&](int done, int total) {
    CHECK(done == static_cast<int>(totals.size()));
    totals.push_back(total);
    return true;
  };
  const BenchmarkResult result = run(tiny_model(100), options);
  std::vector<std::string> lines, left_out;
  for (const BenchmarkLine& line : result.lines) {
    lines.push_back(line.name + " of " + std::to_string(line.tokens) + " after " +
                    std::to_string(line.context) + ", threads " + std::to_string(line.threads));
  }
  CHECK(lines == std::vector<std::string>{
                     "first token of 1 after 0, threads 2", "decode of 1 after 0, threads 2",
                     "decode of 1 after 0, threads 1", "decode of 1 after 64, threads 2",
                     "decode of 2 after 64, threads 2", "prefill of 32 after 0, threads 2",
                     "prefill of 64 after 0, threads 2", "prefill of 64 after 0, threads 1"});
  CHECK(totals == std::vector<int>(lines.size(), static_cast<int>(lines.size())));
  for (const LeftOutLine& line : result.left_out) left_out.push_back(text_of(line));
  CHECK(left_out ==
        std::vector<std::string>{
            "decode of 1, batch 1, after 100: the model has 100 positions, 101 are needed",
            "decode of 2, batch 2, after 100: the model has 100 positions, 101 are needed",
            "prefill of 128, batch 1, after 0: the model has 100 positions, 128 are needed"});
}

TEST_CASE("prompts in turns with keys and values expanded, each with what it has to do") {
  if (test::kEmulated) return;  // counts what is the same everywhere, and takes minutes
  BenchmarkOptions options = short_options();
  options.prefills = {32, 100};
  options.invariance = true;
  options.prefill_context = 700;
  options.scaling = true;
  const std::shared_ptr<const Model> model = tiny_model(2000, /*all_experts=*/true);
  const BenchmarkResult result = run(model, options);
  std::vector<std::string> lines;
  for (const BenchmarkLine& line : result.lines) {
    if (line.name != "prefill") continue;
    lines.push_back(std::to_string(line.tokens) + " after " + std::to_string(line.context) +
                    ", threads " + std::to_string(line.threads) +
                    (line.expanded ? ", expanded" : ""));
    CHECK((line.times_as_fast > 0) == line.expanded);
  }
  CHECK(lines ==
        std::vector<std::string>{"32 after 0, threads 2", "32 after 0, threads 2, expanded",
                                 "100 after 0, threads 2", "100 after 0, threads 2, expanded",
                                 "100 after 0, threads 1", "512 after 700, threads 2",
                                 "512 after 700, threads 2, expanded"});
  // 700 earlier positions are expanded once more; a pair of row and key costs each head its own
  // key's and value's width instead of the latent's, twice.
  const BenchmarkLine &latent = result.lines[result.lines.size() - 2],
                      &expanded = result.lines.back();
  const ModelConfig& c = model->config();
  const auto heads = static_cast<double>(c.num_attention_heads);
  const auto rank = static_cast<double>(c.kv_lora_rank);
  const auto width = static_cast<double>(c.qk_nope_head_dim + c.v_head_dim);
  const auto rope = static_cast<double>(c.qk_rope_head_dim);
  const double pairs = 512 * (700 + 513 / 2.0);
  CHECK(latent.attention_flops == doctest::Approx(2 * 2 * heads * pairs * (2 * rank + rope)));
  CHECK(expanded.attention_flops ==
        doctest::Approx(2 * 2 * heads * (pairs * (width + rope) + 700 * rank * width)));
  CHECK(expanded.weight_flops == latent.weight_flops);
  CHECK(expanded.bytes == latent.bytes);
  // No model has room for what is asked: said for both, once.
  const BenchmarkResult none = run(tiny_model(700), options);
  REQUIRE(none.left_out.size() == 1);
  CHECK(text_of(none.left_out[0]) ==
        "prefill of 512, batch 1, after 700: the model has 700 positions, 1212 are needed");
}

TEST_CASE("only some lines: those that are named, the first token, and of them what is scaled") {
  BenchmarkOptions options = short_options();
  options.batches = {1, 2, 16};
  options.contexts = {64, 100};
  options.context_batches = {1, 2};
  options.prefills = {32, 64, 128};
  const auto labels = [&](const char* only) {
    options.only = only;
    std::vector<LeftOutLine> left_out;
    Result<std::vector<PlannedLine>> lines =
        plan_benchmark(options, 100, /*scaling=*/true, &left_out);
    REQUIRE(lines.ok());
    std::string text;
    for (const PlannedLine& line : *lines) {
      text += line.label() + (line.one_thread ? " (one thread); " : "; ");
    }
    for (const LeftOutLine& line : left_out) text += "not " + text_of(line) + "; ";
    return text;
  };
  CHECK(labels("prefill 64") == "first token; prefill 64; prefill 64 (one thread); ");
  CHECK(labels("batch 2") ==
        "first token; decode, batch 2; decode, batch 2 (one thread); decode, batch 2, context 64; "
        "not decode of 2, batch 2, after 100: the model has 100 positions, 101 are needed; ");
  CHECK(labels("batch 2, context 64") == "first token; decode, batch 2, context 64; ");
  CHECK(labels("first") == "first token; ");
  CHECK(labels("prefill 128") ==
        "first token; "
        "not prefill of 128, batch 1, after 0: the model has 100 positions, 128 are needed; ");
  options.only = "batch 3";
  std::vector<LeftOutLine> left_out;
  const Status none = plan_benchmark(options, 100, true, &left_out).status();
  CHECK(none.code() == Code::kInvalidArgument);
  CHECK(none.message().find("only is \"batch 3\", expected a part of the name of a line: first "
                            "token; decode, batch 1; decode, batch 2; decode, batch 16; decode, "
                            "batch 1, context 64;") != std::string::npos);
}

TEST_CASE("latents that find no room in memory: the line is left out, and says so") {
  const std::shared_ptr<const Model> model = tiny_model(1000);
  const ModelConfig& c = model->config();
  BenchmarkOptions options = short_options();
  options.contexts = {127, 128};
  options.context_batches = {1, 4};
  // Eight pages: four sequences of 128 tokens, and not one token more.
  options.latent_room = static_cast<uint64_t>(8 * 64 * c.cache_layers() * c.latent_dim() * 2);
  const BenchmarkResult result = run(model, options);
  std::vector<int64_t> contexts, tokens;
  for (const BenchmarkLine& line : result.lines) {
    contexts.push_back(line.context);
    tokens.push_back(line.tokens);
  }
  CHECK(contexts == std::vector<int64_t>{0, 0, 127, 127, 128});
  CHECK(tokens == std::vector<int64_t>{1, 1, 1, 4, 1});
  REQUIRE(result.left_out.size() == 1);
  const std::string text = text_of(result.left_out[0]);
  CAPTURE(text);
  CHECK(text.find("decode of 4, batch 4, after 128: latents of 4 x 129 tokens take ") == 0);
}

TEST_CASE("four sequences after 200 tokens each: what the line's limits count, by hand") {
  // Every row takes every expert: otherwise chance would decide how many are read.
  const std::shared_ptr<const Model> model = tiny_model(1000, /*all_experts=*/true);
  const ModelConfig& c = model->config();
  BenchmarkOptions options = short_options();
  options.contexts = {200};
  options.context_batches = {1, 4};
  const BenchmarkResult result = run(model, options);
  REQUIRE(result.lines.size() == 4);
  const BenchmarkLine &one = result.lines[2], &four = result.lines[3];
  REQUIRE(four.batch == 4);
  // Two layers; each head multiplies its query with 201 latents and ropes, and sums 201 latents.
  const auto rank = static_cast<double>(c.kv_lora_rank);
  const auto rope = static_cast<double>(c.qk_rope_head_dim);
  const auto heads = static_cast<double>(c.num_attention_heads);
  CHECK(four.attention_flops == 4 * 2 * heads * 201 * 2 * (rank + rope + rank));
  CHECK(one.attention_flops == four.attention_flops / 4);
  CHECK(four.weight_flops == 4 * one.weight_flops);
  // Nobody shares latents: 4 x 201 of them in BF16. Beside them the weights of every row, the head,
  // and the experts of the second layer, once each.
  const StepBytes weights = step_bytes(*model);
  const auto experts = [&](const BenchmarkLine& line) {
    const double latents = line.batch * 2 * 201 * (rank + rope) * 2;
    return (line.bytes - latents - weights.every_row - weights.head) / weights.expert;
  };
  const auto chosen = static_cast<double>(c.num_experts_per_tok);
  CHECK(experts(one) == doctest::Approx(chosen));
  CHECK(experts(four) == doctest::Approx(chosen));
}
