// What four-bit weights cost on real text: the shipped model's predictions of held-out Python with
// MXFP4 experts, feed-forward layers, and an FP8 head, beside those of the FP8 checkpoint itself.
#include <doctest/doctest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/ref/ref_weights.h"
#include "tests/golden/runner.h"

namespace dsv3 {
namespace {

using test::device_of;
using test::Runner;

std::shared_ptr<const Model> converted(const std::string& name, const WeightModes& modes) {
  static test::TemporaryFolder folder;
  ConvertOptions options;
  static_cast<WeightModes&>(options) = modes;
  const std::string file = folder.file(name + ".dsv3");
  const Status status = convert_checkpoint(test::checkpoint_dir("tiny-coder"), file, options);
  REQUIRE_MESSAGE(status.ok(), status.message());
  auto model = Model::open(file, {});
  REQUIRE_MESSAGE(model.ok(), model.status().message());
  return *model;
}

// Log-probabilities of every next token along the beginnings of the held-out files, and the loss.
struct Predictions {
  std::vector<std::vector<float>> rows;  // [position][vocab]
  std::vector<int32_t> next;
  double variance = 0;  // of the logits over the vocabulary, mean over positions

  double loss() const {
    double sum = 0;
    for (size_t i = 0; i < rows.size(); ++i) {
      sum -= static_cast<double>(rows[i][static_cast<size_t>(next[i])]);
    }
    return sum / static_cast<double>(rows.size());
  }
};

void add_row(const float* logits, size_t vocab, int32_t next, Predictions* out) {
  const double max = *std::max_element(logits, logits + vocab);
  double sum = 0, mean = 0, square = 0;
  for (size_t i = 0; i < vocab; ++i) {
    const double v = logits[i];
    sum += std::exp(v - max);
    mean += v;
    square += v * v;
  }
  mean /= static_cast<double>(vocab);
  out->variance += square / static_cast<double>(vocab) - mean * mean;
  std::vector<float>& row = out->rows.emplace_back(vocab);
  const double shift = max + std::log(sum);
  for (size_t i = 0; i < vocab; ++i) row[i] = static_cast<float>(logits[i] - shift);
  out->next.push_back(next);
}

Predictions predict(const std::shared_ptr<const Model>& model, const std::string& kernel_set,
                    size_t tokens_per_file) {
  const auto device = device_of(kernel_set, 2);
  Runner runner(model, device.get());
  const auto vocab = static_cast<size_t>(model->config().vocab_size);
  Predictions out;
  for (const char* file : {"graphs.py", "inventory.py", "logs.py"}) {
    std::vector<int32_t> tokens = {model->config().bos_token_id};
    const std::string text =
        test::read_bytes(test::source_path(std::string("tests/data/python/") + file));
    REQUIRE(model->tokenizer().encode(text, {}, &tokens).ok());
    tokens.resize(std::min(tokens.size(), tokens_per_file));
    PageTable table(runner.pool.get());
    const auto logits = runner.run(&table, tokens, 0, 256).logits;
    for (size_t i = 0; i + 1 < tokens.size(); ++i) {
      add_row(logits.data() + i * vocab, vocab, tokens[i + 1], &out);
    }
  }
  out.variance /= static_cast<double>(out.rows.size());
  return out;
}

double mean_divergence(const Predictions& p, const Predictions& q) {
  double sum = 0;
  for (size_t i = 0; i < p.rows.size(); ++i) {
    for (size_t t = 0; t < p.rows[i].size(); ++t) {
      const double a = p.rows[i][t], b = q.rows[i][t];
      sum += std::exp(a) * (a - b);
    }
  }
  return sum / static_cast<double>(p.rows.size());
}

kernels::Matrix matrix_of(const MatrixView& v) {
  kernels::Matrix m;
  m.dtype = v.dtype;
  m.layout = v.layout;
  m.n = v.n;
  m.k = v.k;
  m.data = kernels::Dev<const std::byte>(reinterpret_cast<const std::byte*>(v.data));
  m.scales = kernels::Dev<const float>(v.scales);
  m.scale_n = v.scale_n;
  m.scale_k = v.scale_k;
  return m;
}

// The squared error of a layer's experts as a part of their square.
double relative_error(const Model& model, const Model& base) {
  double error = 0, square = 0;
  const auto add = [&](const MatrixView& a, const MatrixView& b) {
    const kernels::Matrix ma = matrix_of(a), mb = matrix_of(b);
    for (int64_t i = 0; i < a.n; ++i) {
      for (int64_t j = 0; j < a.k; ++j) {
        const auto want = static_cast<double>(kernels::ref::weight_at(mb, i, j));
        error += std::pow(static_cast<double>(kernels::ref::weight_at(ma, i, j)) - want, 2);
        square += want * want;
      }
    }
  };
  const auto& experts = model.weights().layers[3].experts.experts;
  const auto& originals = base.weights().layers[3].experts.experts;
  for (size_t e = 0; e < 4; ++e) {
    add(experts[e].gate, originals[e].gate);
    add(experts[e].up, originals[e].up);
    add(experts[e].down, originals[e].down);
  }
  return error / square;
}

// How far predictions may move. A layer whose weights are off by a part e of their size (root mean
// square, independent errors) gives an output that is off by the part e. Were all of the logits
// such outputs, with a variance v over the vocabulary, they would be off by the variance e^2 v, and
// the divergence of two softmaxes whose logits differ by independent errors of the variance d is at
// most d / 2. Errors of gate, up and down add up: three times e^2. What attention and the embedding
// contribute is not off at all, which makes up for what later layers do to earlier layers' errors.
double divergence_limit(double relative_square, double variance) {
  return 3 * relative_square * variance / 2;
}

TEST_CASE("tiny-coder in four bits: loss and divergence on held-out Python") {
  const size_t tokens = test::kEmulated ? 48 : 400;
  const auto base_model = converted("base", {});
  const Predictions base = predict(base_model, "", tokens);
  // E2M1 steps are a third to a half of a value; the rounding of normally distributed weights with
  // a scale for each 32 leaves 1.2 to 1.4 % of their square (an error of 11 to 12 %).
  struct Case {
    std::string name;
    WeightModes modes;
  };
  Case cases[3] = {{"experts", {}}, {"ffn", {}}, {"ffn and head", {}}};
  cases[0].modes.experts = WeightsMode::kMxfp4;
  cases[1].modes.ffn = cases[2].modes.ffn = WeightsMode::kMxfp4;
  cases[2].modes.head = WeightsMode::kFp8;
  MESSAGE("base: loss ", base.loss(), ", perplexity ", std::exp(base.loss()));
  for (const Case& c : cases) {
    CAPTURE(c.name);
    const auto model = converted(c.name, c.modes);
    const double square = relative_error(*model, *base_model);
    CHECK(square > 0.009);
    CHECK(square < 0.016);
    const Predictions found = predict(model, "", tokens);
    const double divergence = mean_divergence(base, found);
    const double limit = divergence_limit(square, base.variance);
    MESSAGE(c.name, ": weights' error ", std::sqrt(square), ", loss ", found.loss(),
            ", perplexity ", std::exp(found.loss()), ", mean KL ", divergence, ", limit ", limit,
            ", ", model->weight_bytes(), " of ", base_model->weight_bytes(), " bytes");
    CHECK(divergence < limit);
    CHECK(divergence > limit / 1000);  // it is another model
    CHECK(found.loss() - base.loss() < limit);
  }
}

TEST_CASE("tiny-coder in four bits: what INT8 activations cost beside ref") {
  WeightModes modes;
  modes.ffn = WeightsMode::kMxfp4;
  const auto model = converted("activations", modes);
  const size_t tokens = test::kEmulated ? 48 : 100;
  const Predictions ref = predict(model, "ref", tokens);
  for (const std::string& kernel_set : kernels::kernel_sets()) {
    if (kernel_set == "ref") continue;
    CAPTURE(kernel_set);
    const double divergence = mean_divergence(ref, predict(model, kernel_set, tokens));
    // An activation's error is within 1/254 of its block's largest: at most 32 / (3 * 254^2) of the
    // square, if one value is all of a block.
    const double limit = divergence_limit(32 / (3 * 254.0 * 254.0), ref.variance);
    MESSAGE(kernel_set, ": mean KL ", divergence, ", limit ", limit);
    CHECK(divergence < limit);
    CHECK(divergence >= 0);
  }
}

}  // namespace
}  // namespace dsv3
