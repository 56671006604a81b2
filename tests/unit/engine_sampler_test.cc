#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <numeric>
#include <random>
#include <utility>

#include "runtime/engine/random.h"
#include "runtime/engine/sampler.h"

using namespace dsv3;  // NOLINT

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();

kernels::Device* device() {
  static const std::unique_ptr<kernels::Device> device = [] {
    kernels::DeviceOptions options;
    options.threads = 1;
    return std::move(*kernels::make_device(options));
  }();
  return device.get();
}

// What the head says of a row.
kernels::RowStats row_of(const std::vector<float>& logits) {
  kernels::RowStats row;
  const auto vocab = static_cast<int32_t>(logits.size());
  device()->reduce_logits(kernels::Dev<const float>(logits.data()), vocab, 1, vocab, &row);
  return row;
}

std::vector<float> random_logits(size_t vocab, uint32_t seed, float scale = 2) {
  std::mt19937 engine(seed);
  std::vector<float> logits(vocab);
  for (float& x : logits) {
    x = scale * (static_cast<float>(engine()) / 2147483648.0F - 1);  // [-scale, scale)
  }
  return logits;
}

// The obvious way, with sorting and plain sums: the distribution a request asked for, by token.
std::vector<double> reference(const SamplingOptions& o, const std::vector<int32_t>& tokens,
                              std::vector<float> logits) {
  for (const LogitBias& b : o.logit_bias) logits[static_cast<size_t>(b.token)] += b.bias;
  std::vector<int> counts(logits.size());
  const size_t window =
      o.penalty_window < 0 ? tokens.size() : static_cast<size_t>(o.penalty_window);
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i + window >= tokens.size()) ++counts[static_cast<size_t>(tokens[i])];
  }
  for (size_t t = 0; t < logits.size(); ++t) {
    if (counts[t] == 0) continue;
    if (logits[t] > 0) {
      logits[t] /= o.repetition_penalty;
    } else {
      logits[t] *= o.repetition_penalty;
    }
    logits[t] -= o.presence_penalty + o.frequency_penalty * static_cast<float>(counts[t]);
  }
  std::vector<size_t> order(logits.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return logits[a] > logits[b]; });
  std::vector<double> p(logits.size());
  if (o.temperature == 0) {
    p[order[0]] = 1;
    return p;
  }
  const double best = logits[order[0]];
  double total = 0;
  for (const size_t t : order) {
    total += p[t] =
        std::exp((static_cast<double>(logits[t]) - best) / static_cast<double>(o.temperature));
  }
  const auto keep = [&](size_t count) {
    total = 0;
    for (size_t i = 0; i < order.size(); ++i) {
      if (i >= count) p[order[i]] = 0;
      total += p[order[i]];
    }
  };
  if (o.top_k > 0) keep(static_cast<size_t>(o.top_k));
  if (o.top_p < 1) {
    double reached = 0;
    size_t count = 0;
    while (count < order.size() && reached < static_cast<double>(o.top_p) * total) {
      reached += p[order[count++]];
    }
    keep(count);
  }
  if (o.min_p > 0) {
    size_t count = 0;
    while (count < order.size() && p[order[count]] >= static_cast<double>(o.min_p)) ++count;
    keep(count);
  }
  for (double& x : p) x /= total;
  return p;
}

int32_t sample(Sampler* sampler, const SamplingOptions& o, const std::vector<int32_t>& tokens,
               std::vector<float> logits) {
  SampledToken out;
  const Status status = sampler->sample(o, tokens, logits, row_of(logits), {}, &out);
  REQUIRE(status.ok());
  return out.id;
}

// Draws many positions' tokens and compares their frequencies with the reference. The bound is the
// 99.99 % quantile of chi-square (Wilson-Hilferty), and nothing impossible may come.
void check_distribution(const SamplingOptions& base, const std::vector<float>& logits,
                        const std::vector<int32_t>& tokens = {3, 5, 3, 7}) {
  constexpr int kDraws = 20000;
  Sampler sampler(device(), static_cast<int64_t>(logits.size()));
  const std::vector<double> p = reference(base, tokens, logits);
  std::vector<int> counts(logits.size());
  SamplingOptions o = base;
  for (int i = 0; i < kDraws; ++i) {
    o.seed = static_cast<uint64_t>(i);
    ++counts[static_cast<size_t>(sample(&sampler, o, tokens, logits))];
  }
  double chi = 0, rest_expected = 0, rest_seen = 0;
  int cells = 0;
  for (size_t t = 0; t < p.size(); ++t) {
    if (p[t] == 0) {
      CHECK_MESSAGE(counts[t] == 0, "token ", t, " is impossible and came ", counts[t], " times");
      continue;
    }
    const double expected = p[t] * kDraws;
    if (expected < 5) {  // too rare for a cell of its own
      rest_expected += expected;
      rest_seen += counts[t];
      continue;
    }
    chi += (counts[t] - expected) * (counts[t] - expected) / expected;
    ++cells;
  }
  if (rest_expected >= 5) {
    chi += (rest_seen - rest_expected) * (rest_seen - rest_expected) / rest_expected;
    ++cells;
  }
  if (cells < 2) return;
  const double k = cells - 1, z = 3.72;
  const double bound = k * std::pow(1 - 2 / (9 * k) + z * std::sqrt(2 / (9 * k)), 3);
  CAPTURE(cells);
  CHECK(chi < bound);
}

}  // namespace

TEST_CASE("philox4x32-10: the known answers of its authors") {
  using A = std::array<uint32_t, 4>;
  CHECK(philox4x32({0, 0, 0, 0}, {0, 0}) == A{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  constexpr uint32_t kOnes = 0xffffffff;
  CHECK(philox4x32({kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}) ==
        A{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        A{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("uniform numbers depend on seed and position alone") {
  CHECK(position_uniform(1, 2) == position_uniform(1, 2));
  CHECK(position_uniform(1, 2) != position_uniform(2, 1));
  CHECK(position_uniform(0, 1) != position_uniform(1, 0));
  CHECK(position_uniform(uint64_t{1} << 32, 0) != position_uniform(0, 0));
  CHECK(position_uniform(0, uint64_t{1} << 32) != position_uniform(0, 0));
  double sum = 0, low = 1, high = 0;
  for (uint64_t i = 0; i < 10000; ++i) {
    const double u = position_uniform(42, i);
    sum += u;
    low = std::min(low, u);
    high = std::max(high, u);
  }
  CHECK(sum / 10000 == doctest::Approx(0.5).epsilon(0.02));
  CHECK(low >= 0);
  CHECK(low < 0.001);
  CHECK(high < 1);
  CHECK(high > 0.999);
}

TEST_CASE("greedy takes the best, the lower id among equals") {
  Sampler sampler(device(), 5);
  CHECK(sample(&sampler, {}, {}, {1, 3, 2, 3, 0}) == 1);
  CHECK(sample(&sampler, {}, {}, {-1, -1, -1, -1, -1}) == 0);
  SamplingOptions o;
  o.logit_bias = {{4, 10}, {1, -kInf}};
  CHECK(sample(&sampler, o, {}, {1, 3, 2, 3, 0}) == 4);
  o.logit_bias = {{1, -kInf}};
  CHECK(sample(&sampler, o, {}, {1, 3, 2, 3, 0}) == 3);
}

TEST_CASE("ties at the edge of top_k and top_p keep the lower ids") {
  Sampler sampler(device(), 6);
  const std::vector<float> logits = {1, 2, 2, 2, 2, 0};
  SamplingOptions o;
  o.temperature = 1;
  bool seen[6] = {};
  SUBCASE("top_k") { o.top_k = 2; }
  SUBCASE("top_p") { o.top_p = 0.4F; }  // two of the four equal ones reach it
  for (uint64_t i = 0; i < 500; ++i) {
    o.seed = i;
    seen[sample(&sampler, o, {}, logits)] = true;
  }
  CHECK(seen[1]);
  CHECK(seen[2]);
  CHECK_FALSE((seen[0] || seen[3] || seen[4] || seen[5]));
}

TEST_CASE("every filter and their combinations draw the reference's distribution") {
  SamplingOptions o;
  o.temperature = 1;
  SUBCASE("temperature 1") {}
  SUBCASE("temperature 0.3") { o.temperature = 0.3F; }
  SUBCASE("temperature 3") { o.temperature = 3; }
  SUBCASE("top_k") { o.top_k = 7; }
  SUBCASE("top_k 1") { o.top_k = 1; }
  SUBCASE("top_k above the vocabulary") { o.top_k = 1000; }
  SUBCASE("top_p") { o.top_p = 0.6F; }
  SUBCASE("tiny top_p") { o.top_p = 1e-6F; }
  SUBCASE("top_p just below 1") { o.top_p = 0.9999F; }
  SUBCASE("min_p") { o.min_p = 0.3F; }
  SUBCASE("repetition penalty") { o.repetition_penalty = 1.7F; }
  SUBCASE("presence penalty") { o.presence_penalty = 1.5F; }
  SUBCASE("frequency penalty") { o.frequency_penalty = 0.9F; }
  SUBCASE("negative penalties") {
    o.frequency_penalty = -1;
    o.presence_penalty = -0.5F;
    o.repetition_penalty = 0.5F;
  }
  SUBCASE("penalty window 1") {
    o.presence_penalty = 3;
    o.penalty_window = 1;
  }
  SUBCASE("penalty window 0") {
    o.presence_penalty = 3;
    o.penalty_window = 0;
  }
  SUBCASE("all of the sequence") {
    o.presence_penalty = 3;
    o.penalty_window = -1;
  }
  SUBCASE("bias") { o.logit_bias = {{3, 2.5F}, {9, -kInf}, {11, -1}}; }
  SUBCASE("top_k, then top_p") {
    o.top_k = 10;
    o.top_p = 0.7F;
  }
  SUBCASE("everything") {
    o.temperature = 0.8F;
    o.top_k = 30;
    o.top_p = 0.9F;
    o.min_p = 0.1F;
    o.repetition_penalty = 1.3F;
    o.frequency_penalty = 0.3F;
    o.presence_penalty = 0.2F;
    o.logit_bias = {{8, 1}, {12, -kInf}};
  }
  check_distribution(o, random_logits(60, 1));
  check_distribution(o,
                     random_logits(300, 1));  // several of weigh()'s blocks, the last a short one
}

TEST_CASE("a token far from the others is found in whatever block it stands") {
  Sampler sampler(device(), 1000);
  for (size_t at = 0; at < 1000; at += 37) {
    std::vector<float> logits = random_logits(1000, 5);
    logits[at] = 40;
    SamplingOptions o;
    o.temperature = 0.5F;
    for (const int filter : {0, 1, 2, 3}) {
      o.top_k = filter == 1 ? 5 : 0;
      o.top_p = filter == 2 ? 0.9F : 1.0F;
      o.min_p = filter == 3 ? 0.05F : 0.0F;
      CHECK(sample(&sampler, o, {}, logits) == static_cast<int32_t>(at));
    }
  }
}

TEST_CASE("filters keep a token that stands alone among impossible ones") {
  Sampler sampler(device(), 500);
  std::vector<float> logits(500, -1000);
  logits[20] = 0;
  logits[499] = -1;  // e^-1 of the best one's weight
  SamplingOptions o;
  o.temperature = 1;
  SUBCASE("min_p") { o.min_p = 0.35F; }
  SUBCASE("top_p") { o.top_p = 0.8F; }
  SUBCASE("top_k") { o.top_k = 2; }
  int last = 0;
  for (uint64_t i = 0; i < 1000; ++i) {
    o.seed = i;
    const int32_t token = sample(&sampler, o, {}, logits);
    CHECK((token == 20 || token == 499));
    last += token == 499 ? 1 : 0;
  }
  CHECK(last > 200);
  CHECK(last < 340);
}

TEST_CASE("temperatures near zero take the best, very high ones draw evenly") {
  Sampler sampler(device(), 200);
  std::vector<float> logits = random_logits(200, 6);
  const auto best =
      static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  SamplingOptions o;
  for (const float temperature : {1e-45F, 1e-38F, 1e-20F, 1e-6F}) {
    o.temperature = temperature;
    CHECK(sample(&sampler, o, {}, logits) == best);
    o.top_p = 0.5F;
    CHECK(sample(&sampler, o, {}, logits) == best);
    o.top_p = 1;
  }
  o.temperature = 1e30F;
  std::vector<bool> seen(200);
  for (uint64_t i = 0; i < 4000; ++i) {
    o.seed = i;
    seen[static_cast<size_t>(sample(&sampler, o, {}, logits))] = true;
  }
  CHECK(std::count(seen.begin(), seen.end(), true) == 200);
}

TEST_CASE("one position of many, and the draws of positions are independent") {
  // The same check along positions instead of seeds.
  const std::vector<float> logits = random_logits(8, 2);
  SamplingOptions o;
  o.temperature = 1;
  o.seed = 99;
  o.penalty_window = 0;
  Sampler sampler(device(), 8);
  const std::vector<double> p = reference(o, {}, logits);
  std::vector<int32_t> tokens;
  std::vector<double> pairs(64);
  int32_t before = 0;
  constexpr int kDraws = 30000;
  for (int i = 0; i < kDraws; ++i) {
    const int32_t t = sample(&sampler, o, tokens, logits);
    if (i > 0) ++pairs[static_cast<size_t>(before * 8 + t)];
    before = t;
    tokens.push_back(t);
  }
  double chi = 0;
  for (size_t i = 0; i < 64; ++i) {
    const double expected = p[i / 8] * p[i % 8] * (kDraws - 1);
    chi += (pairs[i] - expected) * (pairs[i] - expected) / expected;
  }
  CHECK(chi < 112);  // 99.99 % of chi-square with 63 degrees of freedom
}

TEST_CASE("log-probabilities are of the unmodified logits") {
  const std::vector<float> original = random_logits(100, 3, 10);
  Sampler sampler(device(), 100);
  SamplingOptions o;
  o.logprobs = 64;
  o.temperature = 0.7F;
  o.logit_bias = {{5, 40}};
  o.frequency_penalty = 1;
  std::vector<float> logits = original;
  SampledToken out;
  const std::vector<int32_t> tokens = {1, 2, 3};
  REQUIRE(sampler.sample(o, tokens, logits, row_of(logits), {}, &out).ok());
  long double sum = 0;
  for (const float x : original) sum += std::exp(static_cast<long double>(x));
  const auto logprob = [&](int32_t t) {
    return static_cast<double>(static_cast<long double>(original[static_cast<size_t>(t)]) -
                               std::log(sum));
  };
  CHECK(out.id == 5);
  CHECK(out.logprob == doctest::Approx(logprob(5)).epsilon(1e-6));
  REQUIRE(out.top.size() == 64);
  std::vector<int32_t> order(100);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    return original[static_cast<size_t>(a)] > original[static_cast<size_t>(b)];
  });
  for (size_t i = 0; i < 64; ++i) {
    CHECK(out.top[i].id == order[i]);
    CHECK(out.top[i].logprob == doctest::Approx(logprob(order[i])).epsilon(1e-6));
  }
  // None asked for: NaN, not a number that looks like one.
  o.logprobs = -1;
  logits = original;
  REQUIRE(sampler.sample(o, tokens, logits, row_of(logits), {}, &out).ok());
  CHECK(std::isnan(out.logprob));
  CHECK(out.top.empty());
  // More than the vocabulary has, and very large logits.
  Sampler small(device(), 3);
  o = {};
  o.logprobs = 10;
  std::vector<float> large = {3e38F, 3e38F, -3e38F};
  REQUIRE(small.sample(o, {}, large, row_of(large), {}, &out).ok());
  CHECK(out.top.size() == 3);
  CHECK(out.top[0].id == 0);
  CHECK(out.logprob == doctest::Approx(-std::log(2.0)));
}

TEST_CASE("NaN and infinity are errors, also when a hook makes them") {
  Sampler sampler(device(), 4);
  SampledToken out;
  for (const float bad : {std::nanf(""), kInf, -kInf}) {
    for (size_t at = 0; at < 4; ++at) {
      std::vector<float> logits = {1, 2, 3, 4};
      logits[at] = bad;
      const Status status = sampler.sample({}, {}, logits, row_of(logits), {}, &out);
      CHECK(status.code() == Code::kNumeric);
      CHECK(status.message().find("token " + std::to_string(at)) != std::string::npos);
    }
  }
  LogitsHook hook;
  std::vector<float> logits = {1, 2, 3, 4};
  hook.fn = [](void*, std::span<float> l, std::span<const int32_t>) -> Status {
    l[2] = std::nanf("");
    return {};
  };
  Status status = sampler.sample({}, {}, logits, row_of(logits), hook, &out);
  CHECK(status.code() == Code::kNumeric);
  CHECK(status.field() == "logits_hook");
  hook.fn = [](void*, std::span<float> l, std::span<const int32_t>) -> Status {
    std::fill(l.begin(), l.end(), -kInf);
    return {};
  };
  logits = {1, 2, 3, 4};
  status = sampler.sample({}, {}, logits, row_of(logits), hook, &out);
  CHECK(status.code() == Code::kInvalidArgument);
  CHECK(status.field() == "logits_hook");
  // A mask that leaves one token, with every filter on: that one.
  hook.fn = [](void*, std::span<float> l, std::span<const int32_t>) -> Status {
    for (size_t i = 0; i < l.size(); ++i) l[i] = i == 1 ? l[i] : -kInf;
    return {};
  };
  SamplingOptions o;
  o.temperature = 1;
  o.top_k = 3;
  o.top_p = 0.5F;
  o.min_p = 0.1F;
  logits = {1, 2, 3, 4};
  REQUIRE(sampler.sample(o, {}, logits, row_of(logits), hook, &out).ok());
  CHECK(out.id == 1);
}

TEST_CASE("options are checked, NaN included, and the field is named") {
  const auto field = [](auto change) {
    SamplingOptions o;
    change(o);
    const Status status = o.validate(10);
    CHECK(status.code() == Code::kInvalidArgument);
    CHECK(status.message().find(status.field()) != std::string::npos);
    return status.field();
  };
  const float nan = std::nanf("");
  for (const float bad : {nan, -1.0F, kInf}) {
    CHECK(field([&](auto& o) { o.temperature = bad; }) == "temperature");
  }
  for (const float bad : {nan, 0.0F, -0.1F, 1.1F}) {
    CHECK(field([&](auto& o) { o.top_p = bad; }) == "top_p");
  }
  for (const float bad : {nan, -0.1F, 1.0F}) {
    CHECK(field([&](auto& o) { o.min_p = bad; }) == "min_p");
  }
  for (const float bad : {nan, 0.0F, -1.0F, kInf}) {
    CHECK(field([&](auto& o) { o.repetition_penalty = bad; }) == "repetition_penalty");
  }
  CHECK(field([&](auto& o) { o.presence_penalty = nan; }) == "presence_penalty");
  CHECK(field([&](auto& o) { o.frequency_penalty = kInf; }) == "frequency_penalty");
  CHECK(field([](auto& o) { o.top_k = -1; }) == "top_k");
  CHECK(field([](auto& o) { o.penalty_window = -2; }) == "penalty_window");
  CHECK(field([](auto& o) { o.logprobs = 65; }) == "logprobs");
  CHECK(field([](auto& o) { o.logprobs = -2; }) == "logprobs");
  CHECK(field([](auto& o) { o.logit_bias = {{10, 0}}; }) == "logit_bias");
  CHECK(field([](auto& o) { o.logit_bias = {{-1, 0}}; }) == "logit_bias");
  CHECK(field([&](auto& o) { o.logit_bias = {{1, nan}}; }) == "logit_bias");
  CHECK(field([&](auto& o) { o.logit_bias = {{1, kInf}}; }) == "logit_bias");
  CHECK(SamplingOptions().validate(10).ok());
}
