// The forward pass against DeepSeek's published model code (values computed in float32 on the
// dequantised weights), and against itself: chunked, batched, forked and truncated prompts must
// give the same bits.
#include <doctest/doctest.h>

#include <cmath>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "runtime/model/synthetic.h"
#include "tests/golden/runner.h"
#include "tests/support/forwarding_device.h"
#include "tests/support/guard_device.h"

namespace dsv3 {
namespace {

using kernels::Device;
using test::device_of;
using test::golden_of;
using test::GoldenTensor;
using test::kModels;
using test::open_model;
using test::Runner;

// Relative errors of the golden rows of every prompt of a model.
struct Errors {
  std::vector<double> logits, hidden, mtp, bf16;
};

Errors golden_errors(const std::string& name, Device* device, size_t chunk,
                     WeightsMode weights = WeightsMode::kKeep, bool expand = false) {
  const auto golden = golden_of(name);
  Runner runner(open_model(name, weights), device, 1024, expand);
  const auto hidden = static_cast<size_t>(runner.config.hidden_size);
  const auto vocab = static_cast<size_t>(runner.config.vocab_size);
  Errors errors;
  for (int prompt = 0; golden.count(std::to_string(prompt) + ".tokens") > 0; ++prompt) {
    const auto get = [&](const char* key) -> const GoldenTensor& {
      return golden.at(std::to_string(prompt) + "." + key);
    };
    if (test::kEmulated && name == "tiny-coder" && get("tokens").i32.size() > 250) continue;
    const bool mtp = golden.count(std::to_string(prompt) + ".mtp_logits") > 0;
    PageTable table(runner.pool.get());
    const Runner::Rows rows = runner.run(&table, get("tokens").i32, 0, chunk, mtp);
    const auto& positions = get("positions").i32;
    size_t mtp_row = 0;
    for (size_t i = 0; i < positions.size(); ++i) {
      const auto p = static_cast<size_t>(positions[i]);
      errors.logits.push_back(test::relative_error(rows.logits.data() + p * vocab,
                                                   get("logits").f32.data() + i * vocab, vocab));
      errors.hidden.push_back(test::relative_error(rows.hidden.data() + p * hidden,
                                                   get("hidden").f32.data() + i * hidden, hidden));
      if (mtp && p + 1 < get("tokens").i32.size()) {
        errors.mtp.push_back(test::relative_error(rows.mtp_logits.data() + p * vocab,
                                                  get("mtp_logits").f32.data() + mtp_row++ * vocab,
                                                  vocab));
      }
    }
    const auto bf16 = golden.find(std::to_string(prompt) + ".bf16_row_error");
    if (bf16 != golden.end()) {
      errors.bf16.insert(errors.bf16.end(), bf16->second.f32.begin(), bf16->second.f32.end());
    }
  }
  return errors;
}

double worst(const std::vector<double>& errors) {
  double w = 0;
  for (const double e : errors) w = std::max(w, e);
  return w;
}

TEST_CASE("ref agrees with the published code within 1e-4 in every row") {
  for (const std::string name : kModels) {
    CAPTURE(name);
    const auto device = device_of("ref");
    const Errors errors = golden_errors(name, device.get(), 1024);
    REQUIRE(errors.logits.size() > 10);
    if (name != "v2-lite-micro") REQUIRE(errors.mtp.size() > 10);
    MESSAGE(name << ": worst row: logits " << worst(errors.logits) << ", hidden "
                 << worst(errors.hidden) << ", MTP " << worst(errors.mtp));
    CHECK(worst(errors.logits) < 1e-4);
    CHECK(worst(errors.hidden) < 1e-4);
    CHECK(worst(errors.mtp) < 1e-4);
  }
}

void check_fast(const std::string& kernel_set, Device* device, bool expand) {
  const std::string what = kernel_set + (expand ? ", expanded," : "");
  const auto errors_of = [&](const std::string& name) {
    return golden_errors(name, device, 1024, WeightsMode::kKeep, expand);
  };
  for (const std::string name : {"v3-micro", "v2-lite-micro"}) {
    Errors errors = errors_of(name);
    const double bound = 1.5 * test::median(errors.bf16);
    MESSAGE(what << " on " << name << ": median row error " << test::median(errors.logits)
                 << ", bound " << bound << ", MTP " << test::median(errors.mtp));
    CHECK(test::median(errors.logits) <= bound);
    if (errors.mtp.empty()) continue;
    // The MTP module of a network with random weights routes more than half of its rows otherwise
    // when its input is off by 2 % (the errors lie either below 0.03 or between 0.1 and 1). The
    // rows that keep their experts must keep the bound.
    std::sort(errors.mtp.begin(), errors.mtp.end());
    CHECK(errors.mtp[errors.mtp.size() / 4] <= bound);
  }
  if (test::kEmulated && expand) return;
  // Trained weights do not lie on such edges: a few roundings to BF16 (2^-9 each) are all there
  // is.
  const Errors trained = errors_of("tiny-coder");
  MESSAGE(what << " on tiny-coder: median row error " << test::median(trained.logits) << ", MTP "
               << test::median(trained.mtp));
  CHECK(test::median(trained.logits) < 0.005);
  CHECK(test::median(trained.mtp) < 0.005);
}

TEST_CASE("fast kernels cost at most 1.5 times what BF16 activations cost the published code") {
  for (const std::string& kernel_set : kernels::kernel_sets()) {
    if (kernel_set == "ref") continue;
    CAPTURE(kernel_set);
    check_fast(kernel_set, device_of(kernel_set).get(), /*expand=*/false);
  }
}

TEST_CASE("so do they where keys and values of prompts are expanded") {
  for (const std::string& kernel_set : kernels::kernel_sets()) {
    if (kernel_set == "ref") continue;
    if (test::kEmulated && kernel_set != kernels::kernel_sets().front()) continue;
    CAPTURE(kernel_set);
    const auto device = device_of(kernel_set);
    check_fast(kernel_set, device.get(), /*expand=*/true);
    const auto worst_logits = [&](bool expand) {
      return worst(
          golden_errors("v2-lite-micro", device.get(), 1024, WeightsMode::kKeep, expand).logits);
    };
    CHECK(worst_logits(true) != worst_logits(false));  // something was
  }
}

TEST_CASE("the forward pass never touches device memory itself") {
  for (const std::string& kernel_set : {kernels::kernel_sets().front(), std::string("ref")}) {
    CAPTURE(kernel_set);
    const auto guarded = test::make_guard_device(device_of(kernel_set));
    const auto plain = device_of(kernel_set);
    const Errors with = golden_errors("v3-micro", guarded.get(), 64);
    const Errors without = golden_errors("v3-micro", plain.get(), 64);
    CHECK(with.logits == without.logits);
    CHECK(with.mtp == without.mtp);
    if (kernel_set == "ref") CHECK(worst(with.logits) < 1e-4);
  }
}

bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

TEST_CASE("chunks, forks, truncation and threads leave every bit as it is") {
  for (const std::string& kernel_set : kernels::kernel_sets()) {
    for (const std::string name : kModels) {
      if (test::kEmulated && name == "tiny-coder") continue;
      CAPTURE(kernel_set);
      CAPTURE(name);
      const auto model = open_model(name);
      const auto golden = golden_of(name);
      std::vector<int32_t> tokens = golden.at("2.tokens").i32;
      const size_t most = test::kEmulated ? 110 : kernel_set == "ref" ? 150 : 280;
      tokens.resize(std::min(tokens.size(), most));
      const bool mtp = model->config().num_nextn_predict_layers > 0;
      const auto device = device_of(kernel_set);
      Runner runner(model, device.get());
      PageTable whole_table(runner.pool.get());
      const Runner::Rows whole = runner.run(&whole_table, tokens, 0, tokens.size(), mtp);
      for (const size_t chunk : {size_t{1}, size_t{7}, size_t{64}}) {
        if (test::kEmulated && chunk == 7) continue;
        CAPTURE(chunk);
        PageTable table(runner.pool.get());
        const Runner::Rows rows = runner.run(&table, tokens, 0, chunk, mtp);
        CHECK(same_bits(rows.logits, whole.logits));
        CHECK(same_bits(rows.hidden, whole.hidden));
        CHECK(same_bits(rows.mtp_logits, whole.mtp_logits));
      }
      {
        // A fork that goes another way must not disturb the original, nor the other way round.
        const size_t cut = 101;
        const std::vector<int32_t> head(tokens.begin(), tokens.begin() + cut);
        const std::vector<int32_t> tail(tokens.begin() + cut, tokens.end());
        std::vector<int32_t> other = tail;
        for (int32_t& t : other) t = (t + 13) % static_cast<int32_t>(runner.config.vocab_size);
        PageTable table(runner.pool.get());
        runner.run(&table, head, 0, head.size());
        PageTable fork(table);
        runner.run(&fork, other, static_cast<int64_t>(cut), 7);
        const Runner::Rows rows = runner.run(&table, tail, static_cast<int64_t>(cut), 64);
        const auto vocab = static_cast<size_t>(runner.config.vocab_size);
        const std::vector<float> expected(
            whole.logits.begin() + static_cast<std::ptrdiff_t>(cut * vocab), whole.logits.end());
        CHECK(same_bits(rows.logits, expected));
        // The fork, cut back and sent the same way, gives the same again.
        fork.truncate(static_cast<int64_t>(cut));
        CHECK(same_bits(runner.run(&fork, tail, static_cast<int64_t>(cut), 5).logits, expected));
        CHECK(runner.pool->is_valid());
      }
      for (const int threads : {1, 3}) {
        CAPTURE(threads);
        const auto another = device_of(kernel_set, threads);
        Runner other(model, another.get());
        PageTable table(other.pool.get());
        CHECK(same_bits(other.run(&table, tokens, 0, 50, mtp).logits, whole.logits));
      }
    }
  }
}

// Notes which norms got which eps.
struct NormListener : test::ForwardingDevice {
  using ForwardingDevice::ForwardingDevice;
  void rms_norm(Dev<const float> x, int64_t x_stride, Dev<const float> gamma, float eps,
                int32_t rows, int32_t dim, Dev<float> out, int64_t out_stride) override {
    by_dim[dim] = eps;
    inner_->rms_norm(x, x_stride, gamma, eps, rows, dim, out, out_stride);
  }
  void rope_append(const kernels::RopeAppendArgs& args) override {
    of_latents = args.eps;
    inner_->rope_append(args);
  }
  std::map<int32_t, float> by_dim;
  float of_latents = 0;
};

TEST_CASE("rms_norm_eps is not for the norms inside the bottlenecks") {
  // So it is in the published code, whose class has 1e-6 for a default.
  Result<ModelConfig> config = synthetic_config("tiny", 2);
  REQUIRE(config.ok());
  config->rms_norm_eps = 1e-5f;
  const auto model = Model::synthesise(*config, {});
  REQUIRE(model.ok());
  NormListener device(device_of("ref"));
  Runner runner(model.value(), &device);
  PageTable table(runner.pool.get());
  (void)runner.run(&table, {1, 2, 3}, 0, 64);
  const auto hidden = static_cast<int32_t>(config->hidden_size);
  const auto rank = static_cast<int32_t>(config->q_lora_rank);
  REQUIRE(rank > 0);
  REQUIRE(rank != hidden);
  CHECK(device.by_dim == std::map<int32_t, float>{{rank, 1e-6f}, {hidden, 1e-5f}});
  CHECK(device.of_latents == 1e-6f);
}

// On a machine that is as busy with other programs as the test says.
struct BusyDevice : test::ForwardingDevice {
  using ForwardingDevice::ForwardingDevice;
  int threads_in_use() const override { return in_use; }
  int in_use = threads();
};

TEST_CASE("several sequences in one step give each the bits it has alone") {
  for (const std::string& kernel_set : kernels::kernel_sets()) {
    CAPTURE(kernel_set);
    const auto model = open_model("tiny-coder");
    const auto golden = golden_of("tiny-coder");
    BusyDevice device(device_of(kernel_set));
    Runner runner(model, &device);
    const auto vocab = static_cast<size_t>(runner.config.vocab_size);
    std::vector<std::vector<int32_t>> prompts;
    std::vector<std::unique_ptr<PageTable>> tables;
    std::vector<std::vector<float>> expected;
    std::vector<int32_t> batch, last_rows;
    std::vector<kernels::SequenceRows> sequences;
    for (size_t i = 0; i < 3; ++i) {
      prompts.push_back(golden.at(std::to_string(i) + ".tokens").i32);
      prompts.back().resize(20 + 23 * i);
      PageTable alone(runner.pool.get());
      const auto logits = runner.run(&alone, prompts.back(), 0, 1024).logits;
      expected.emplace_back(logits.end() - static_cast<std::ptrdiff_t>(vocab), logits.end());
    }
    for (size_t i = 0; i < prompts.size(); ++i) {
      // The last 4 + 3 i tokens of each prompt go into the common step.
      const size_t rest = 4 + 3 * i, before = prompts[i].size() - rest;
      tables.push_back(std::make_unique<PageTable>(runner.pool.get()));
      runner.run(tables[i].get(), {prompts[i].begin(), prompts[i].end() - rest}, 0, 16);
      REQUIRE(tables[i]->make_writable(before, prompts[i].size()).ok());
      sequences.push_back({static_cast<int32_t>(batch.size()), static_cast<int32_t>(rest),
                           static_cast<int64_t>(before), tables[i]->data()});
      batch.insert(batch.end(), prompts[i].end() - rest, prompts[i].end());
      last_rows.push_back(static_cast<int32_t>(batch.size()) - 1);
    }
    Step step;
    step.tokens = batch;
    step.sequences = sequences;
    // A small model's first such step goes in lanes where the device has them and all its threads,
    // the second does not.
    Runner fresh(model, &device);
    const int64_t moe_layers =
        runner.config.num_hidden_layers - runner.config.first_k_dense_replace;
    uint64_t choices = 0;
    const int all = device.threads();
    const int lanes_of_all = kernel_set == "ref" ? 0 : 2;
    for (const auto& [threads, lanes] : {std::pair(1, 0), {all, lanes_of_all}, {all, 0}}) {
      device.in_use = threads;
      REQUIRE(fresh.forward->run(step).ok());
      CHECK(fresh.forward->lanes() == lanes);
      std::vector<float> logits(last_rows.size() * vocab);
      REQUIRE(fresh.forward->head(last_rows, logits.data()).ok());
      for (size_t i = 0; i < prompts.size(); ++i) {
        CHECK(std::memcmp(logits.data() + i * vocab, expected[i].data(), vocab * sizeof(float)) ==
              0);
      }
      const auto& load = fresh.forward->expert_load();
      choices +=
          static_cast<uint64_t>(moe_layers * runner.config.num_experts_per_tok) * batch.size();
      CHECK(std::accumulate(load.begin(), load.end(), uint64_t{0}) == choices);
    }
    // Where steps are small, lanes of these rows would be longer than one layer of the largest.
    Runner small(model, &device, 64);
    REQUIRE(small.forward->run(step).ok());
    CHECK(small.forward->lanes() == 0);
  }
}

TEST_CASE("weights quantised by the converter stay close to the originals") {
  // V2-Lite and Coder-V2 are published in BF16; E4M3 with 128x128 scales keeps about 2^-4 per
  // weight, which over the whole micro network (random weights: the worst case) ends below 10 %.
  const auto device = device_of("ref");
  const Errors errors = golden_errors("v2-lite-micro", device.get(), 1024, WeightsMode::kFp8);
  MESSAGE("median row error of quantised weights: " << test::median(errors.logits));
  CHECK(test::median(errors.logits) < 0.22);
  CHECK(test::median(errors.logits) > 1e-4);
}

TEST_CASE("a step is cancelled between layers and leaves the sequence usable") {
  const auto device = device_of("ref");
  const auto model = open_model("v3-micro");
  Runner runner(model, device.get());
  const auto tokens = golden_of("v3-micro").at("1.tokens").i32;
  PageTable table(runner.pool.get());
  REQUIRE(table.make_writable(0, static_cast<int64_t>(tokens.size())).ok());
  kernels::SequenceRows sequence{0, static_cast<int32_t>(tokens.size()), 0, table.data()};
  struct Counter {
    int calls = 0;
  } counter;
  Step step;
  step.tokens = tokens;
  step.sequences = std::span(&sequence, 1);
  step.should_stop = [](void* c) { return ++static_cast<Counter*>(c)->calls == 3; };
  step.should_stop_user = &counter;
  const Status status = runner.forward->run(step);
  CHECK(status.code() == Code::kCancelled);
  CHECK(counter.calls == 3);
  PageTable fresh(runner.pool.get());
  CHECK(same_bits(runner.run(&table, tokens, 0, 1024).logits,
                  runner.run(&fresh, tokens, 0, 1024).logits));
}

}  // namespace
}  // namespace dsv3
