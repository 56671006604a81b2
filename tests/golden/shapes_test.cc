// Models of random small shapes, which nobody publishes and validate() takes: no dimension is a
// multiple of what kernels work in, and every choice of the config occurs. Each kernel set must
// come as near to ref as its roundings let it, and give the same bits however a sequence is cut
// into chunks, on however many threads, and whatever other sequences are in its steps.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "tests/golden/runner.h"

namespace dsv3 {
namespace {

using kernels::DType;
using test::device_of;
using test::Runner;

class Shapes {
 public:
  explicit Shapes(uint32_t seed) : random_(seed) {}

  int64_t number(int64_t low, int64_t high) {  // the same on every machine, unlike distributions
    return low + static_cast<int64_t>(random_() % static_cast<uint32_t>(high - low + 1));
  }
  bool coin() { return number(0, 1) == 1; }

  ModelConfig config() {
    ModelConfig c;
    c.model_type = "deepseek_v3";
    c.vocab_size = number(2, 90);
    c.hidden_size = number(8, 90);
    c.intermediate_size = number(1, 90);
    c.moe_intermediate_size = number(1, 50);
    c.num_hidden_layers = number(1, 3);
    c.num_nextn_predict_layers = number(0, 1);
    c.num_attention_heads = number(1, 9);
    c.q_lora_rank = coin() ? number(1, 70) : 0;
    c.kv_lora_rank = number(1, 100);
    c.qk_nope_head_dim = number(1, 70);
    c.qk_rope_head_dim = 2 * number(1, 35);
    c.v_head_dim = number(1, 70);
    c.first_k_dense_replace = number(0, c.num_hidden_layers);
    c.moe_layer_freq = number(1, 2);
    c.n_shared_experts = number(0, 2);
    c.max_position_embeddings = 256;
    c.tie_word_embeddings = coin();
    if (coin()) {
      c.yarn.enabled = true;
      c.yarn.factor = static_cast<float>(number(1, 40));
      c.yarn.original_max_position_embeddings = number(1, 4096);
      c.yarn.mscale_all_dim = static_cast<float>(number(0, 1));
    }
    experts(&c);
    return c;
  }

  SyntheticOptions types() {
    constexpr DType kTypes[] = {DType::kF32, DType::kBF16, DType::kF16, DType::kF8E4M3,
                                DType::kMXFP4};
    SyntheticOptions options;
    options.seed = random_();
    options.linear = kTypes[number(0, 3)];
    options.ffn = kTypes[number(0, 4)];
    options.experts = kTypes[number(0, 4)];
    options.head = kTypes[number(0, 3)];
    return options;
  }

  std::vector<int32_t> tokens(const ModelConfig& c) {
    std::vector<int32_t> out(static_cast<size_t>(number(20, 100)));
    for (int32_t& t : out) t = static_cast<int32_t>(number(0, c.vocab_size - 1));
    return out;
  }

 private:
  void experts(ModelConfig* c) {
    c->n_group = number(1, 5);
    c->topk_group = number(1, c->n_group);
    const int64_t group = number(2, 7);
    c->n_routed_experts = c->n_group * group;
    c->num_experts_per_tok = number(1, std::min<int64_t>(6, c->topk_group * group));
    c->topk_method = static_cast<TopkMethod>(number(0, 2));
    c->scoring_func = coin() ? ScoringFunc::kSigmoid : ScoringFunc::kSoftmax;
    c->norm_topk_prob = coin();
    c->routed_scaling_factor = coin() ? 2.5f : 1;
  }

  std::mt19937 random_;
};

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

double median_row_error(const std::vector<float>& rows, const std::vector<float>& expected,
                        int64_t width) {
  REQUIRE(rows.size() == expected.size());
  const auto size = static_cast<size_t>(width);
  std::vector<double> errors;
  for (size_t at = 0; at < rows.size(); at += size) {
    errors.push_back(test::relative_error(rows.data() + at, expected.data() + at, size));
  }
  return test::median(errors);
}

// The last rows of some beginnings of the tokens, all in one step: their logits.
std::vector<float> side_by_side(Runner* runner, const std::vector<int32_t>& tokens,
                                const std::vector<int64_t>& lengths) {
  std::vector<std::unique_ptr<PageTable>> tables;
  std::vector<int32_t> batch, rows;
  std::vector<kernels::SequenceRows> sequences;
  for (const int64_t length : lengths) {
    const int64_t count = std::min<int64_t>(length, static_cast<int64_t>(rows.size()) % 3 + 1);
    tables.push_back(std::make_unique<PageTable>(runner->pool.get()));
    const auto end = tokens.begin() + length;
    runner->run(tables.back().get(), {tokens.begin(), end - count}, 0, 40);
    REQUIRE(tables.back()->make_writable(length - count, length).ok());
    sequences.push_back({static_cast<int32_t>(batch.size()), static_cast<int32_t>(count),
                         length - count, tables.back()->data()});
    batch.insert(batch.end(), end - count, end);
    rows.push_back(static_cast<int32_t>(batch.size()) - 1);
  }
  Step step;
  step.tokens = batch;
  step.sequences = sequences;
  REQUIRE(runner->forward->run(step).ok());
  std::vector<float> logits(rows.size() * static_cast<size_t>(runner->config.vocab_size));
  REQUIRE(runner->forward->head(rows, logits.data()).ok());
  return logits;
}

TEST_CASE("models of random shapes: as ref computes them, and to the same bits") {
  constexpr uint32_t kShapes = test::kEmulated ? 3 : 20;
  for (uint32_t seed = 0; seed < kShapes; ++seed) {
    CAPTURE(seed);
    Shapes shapes(seed);
    const ModelConfig config = shapes.config();
    const Status valid = config.validate("shape");
    REQUIRE_MESSAGE(valid.ok(), valid.message());
    auto model = Model::synthesise(config, shapes.types());
    REQUIRE_MESSAGE(model.ok(), model.status().message());
    const std::vector<int32_t> tokens = shapes.tokens(config);
    const bool mtp = config.num_nextn_predict_layers > 0;
    const auto run = [&](kernels::Device* device, size_t chunk) {
      Runner runner(*model, device, 128);
      PageTable table(runner.pool.get());
      return runner.run(&table, tokens, 0, chunk, mtp);
    };
    const Runner::Rows expected = run(device_of("ref").get(), tokens.size());
    for (const std::string& kernel_set : kernels::kernel_sets()) {
      CAPTURE(kernel_set);
      const auto device = device_of(kernel_set, 2);
      const Runner::Rows whole = run(device.get(), tokens.size());
      // Rounded latents and activations move a median row by 5 % at most, and some to other
      // experts; what is left out or read from beyond an edge moves all rows.
      CHECK(median_row_error(whole.hidden, expected.hidden, config.hidden_size) < 0.1);
      CHECK(median_row_error(whole.logits, expected.logits, config.vocab_size) < 0.1);

      const auto chunk = static_cast<size_t>(shapes.number(1, 30));
      CAPTURE(chunk);
      for (const int threads : {1, 3}) {
        CAPTURE(threads);
        const Runner::Rows rows = run(device_of(kernel_set, threads).get(), chunk);
        CHECK(same_bits(rows.hidden, whole.hidden));
        CHECK(same_bits(rows.logits, whole.logits));
        CHECK(same_bits(rows.mtp_logits, whole.mtp_logits));
      }

      std::vector<int64_t> lengths;
      std::vector<float> rows;
      for (int i = 0; i < 5; ++i) {
        lengths.push_back(shapes.number(4, static_cast<int64_t>(tokens.size())));
        const auto end = whole.logits.begin() + lengths.back() * config.vocab_size;
        rows.insert(rows.end(), end - config.vocab_size, end);
      }
      Runner runner(*model, device.get(), 128);
      CHECK(same_bits(side_by_side(&runner, tokens, lengths), rows));
    }
  }
}

}  // namespace
}  // namespace dsv3
