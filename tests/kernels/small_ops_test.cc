// embed, rms_norm, route, add, gather_rows, reduce_logits and the making of devices.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

#include "tests/kernels/kernel_test.h"

namespace dsv3::test {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The published routing, written from the formulas: sorts instead of searching.
void route_by_formula(const k::RouteArgs& a, const std::vector<float>& gate,
                      const std::vector<float>& bias, const float* x, std::vector<int32_t>* ids,
                      std::vector<double>* weights) {
  const auto experts = static_cast<size_t>(a.gate.n);
  const auto hidden = static_cast<size_t>(a.gate.k);
  std::vector<double> score(experts), choice(experts);
  for (size_t e = 0; e < experts; ++e) {
    for (size_t i = 0; i < hidden; ++i) {
      score[e] += static_cast<double>(gate[e * hidden + i]) * static_cast<double>(x[i]);
    }
  }
  if (a.scoring == k::Scoring::kSigmoid) {
    for (double& s : score) s = 1 / (1 + std::exp(-s));
  } else {
    const double max = *std::max_element(score.begin(), score.end());
    double sum = 0;
    for (double& s : score) sum += s = std::exp(s - max);
    for (double& s : score) s /= sum;
  }
  for (size_t e = 0; e < experts; ++e)
    choice[e] = score[e] + (bias.empty() ? 0 : static_cast<double>(bias[e]));
  if (a.group_score != k::GroupScore::kNone) {
    const size_t size = experts / static_cast<size_t>(a.groups);
    std::vector<double> group;
    for (size_t g = 0; g < static_cast<size_t>(a.groups); ++g) {
      std::vector<double> members(choice.begin() + static_cast<int64_t>(g * size),
                                  choice.begin() + static_cast<int64_t>((g + 1) * size));
      std::sort(members.rbegin(), members.rend());
      group.push_back(a.group_score == k::GroupScore::kMax ? members[0] : members[0] + members[1]);
    }
    std::vector<size_t> order(group.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t l, size_t r) { return group[l] > group[r]; });
    for (size_t i = static_cast<size_t>(a.topk_group); i < order.size(); ++i) {
      for (size_t e = order[i] * size; e < (order[i] + 1) * size; ++e) choice[e] = -1e30;
    }
  }
  std::vector<int32_t> order(experts);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int32_t l, int32_t r) {
    return choice[static_cast<size_t>(l)] > choice[static_cast<size_t>(r)];
  });
  double sum = 0;
  for (int32_t i = 0; i < a.top_k; ++i) {
    ids->push_back(order[static_cast<size_t>(i)]);
    weights->push_back(score[static_cast<size_t>(ids->back())]);
    sum += weights->back();
  }
  for (double& w : *weights)
    w = (a.normalise ? w / (sum + 1e-20) : w) * static_cast<double>(a.scaling);
}

}  // namespace

TEST_CASE("embed: every type in both layouts, exactly") {
  Random random(40);
  for (const k::DType dtype :
       {k::DType::kF32, k::DType::kBF16, k::DType::kF16, k::DType::kF8E4M3}) {
    for (const k::Layout layout : {k::Layout::kRowMajor, k::Layout::kTile16x2}) {
      MatrixSpec spec{dtype, 37, 51, 16, 8, 1, layout};
      const TestMatrix table = random_matrix(random, spec);
      const std::vector<int32_t> ids = {0, 36, 17, 17, 5};
      for (const std::string& set : k::kernel_sets()) {
        auto d = device(set, 2);
        REQUIRE(d->reserve(small_limits(5, 51)).ok());
        std::vector<float> out(5 * 60, 9.0f);
        d->embed(table.m, ids, mdev(out), 60);
        for (size_t r = 0; r < ids.size(); ++r) {
          CHECK(same_bits(&out[r * 60], &table.dense[static_cast<size_t>(ids[r]) * 51], 51));
          CHECK(out[r * 60 + 51] == 9.0f);
        }
      }
    }
  }
}

TEST_CASE("rms_norm: against double precision, in place, non-finite rows stay apart") {
  Random random(41);
  for (const int32_t dim : {1, 3, 16, 100, 256, 1543}) {
    const auto n = static_cast<size_t>(dim);
    const auto gamma = random.vector(n);
    auto x = random.vector(6 * (n + 2), 3);
    x[2 * (n + 2)] = kNan;
    x[4 * (n + 2)] = kInfinity;
    for (const std::string& set : k::kernel_sets()) {
      auto d = device(set, 2);
      REQUIRE(d->reserve(small_limits(6, dim)).ok());
      std::vector<float> out(6 * (n + 2));
      d->rms_norm(cdev(x), dim + 2, cdev(gamma), 1e-6f, 6, dim, mdev(out), dim + 2);
      for (size_t r = 0; r < 6; ++r) {
        if (r == 2 || r == 4) continue;
        double square = 0;
        for (size_t i = 0; i < n; ++i)
          square += std::pow(static_cast<double>(x[r * (n + 2) + i]), 2);
        const double scale = 1 / std::sqrt(square / dim + 1e-6);
        for (size_t i = 0; i < n; ++i) {
          const double want =
              static_cast<double>(x[r * (n + 2) + i]) * scale * static_cast<double>(gamma[i]);
          CHECK(std::abs(static_cast<double>(out[r * (n + 2) + i]) - want) <=
                1e-6 * (1 + std::abs(want)));
        }
      }
      CHECK(std::isnan(out[2 * (n + 2)]));
      auto in_place = x;
      d->rms_norm(mdev(in_place), dim + 2, cdev(gamma), 1e-6f, 6, dim, mdev(in_place), dim + 2);
      for (const size_t r : {0u, 1u, 3u, 5u}) {
        CHECK(same_bits(&in_place[r * (n + 2)], &out[r * (n + 2)], n));
      }
    }
  }
}

TEST_CASE("route: every variant against the formulas") {
  Random random(42);
  const int32_t experts = 24, hidden = 65, rows = 100;
  const TestMatrix gate = random_matrix(random, {k::DType::kBF16, experts, hidden});
  const auto bias = random.vector(experts, 0.3f);
  const auto x = random.vector(static_cast<size_t>(rows * hidden), 0.3f);
  for (const auto scoring : {k::Scoring::kSigmoid, k::Scoring::kSoftmax}) {
    for (const auto group_score :
         {k::GroupScore::kNone, k::GroupScore::kMax, k::GroupScore::kTop2Sum}) {
      for (const bool normalise : {false, true}) {
        for (const std::string& set : k::kernel_sets()) {
          auto d = device(set, 3);
          REQUIRE(d->reserve(small_limits(rows, hidden, 0, experts)).ok());
          std::vector<int32_t> ids(rows * 5);
          std::vector<float> weights(rows * 5);
          k::RouteArgs a;
          a.gate = gate.m;
          a.bias = normalise ? cdev(bias) : k::Dev<const float>();
          a.scoring = scoring;
          a.group_score = group_score;
          a.groups = 6;
          a.topk_group = 3;
          a.top_k = 5;
          a.normalise = normalise;
          a.scaling = 1.7f;
          a.x = cdev(x);
          a.rows = rows;
          a.expert_ids = ids.data();
          a.expert_weights = weights.data();
          d->route(a);
          for (size_t r = 0; r < static_cast<size_t>(rows); ++r) {
            std::vector<int32_t> want_ids;
            std::vector<double> want;
            route_by_formula(a, gate.dense, normalise ? bias : std::vector<float>{}, &x[r * hidden],
                             &want_ids, &want);
            for (size_t i = 0; i < 5; ++i) {
              CHECK(ids[r * 5 + i] == want_ids[i]);
              CHECK(std::abs(static_cast<double>(weights[r * 5 + i]) - want[i]) < 1e-5);
            }
          }
        }
      }
    }
  }
}

TEST_CASE("route: ties take the lower index; NaN chooses experts that exist") {
  const int32_t experts = 8, hidden = 2;
  const std::vector<uint32_t> zeros(experts * hidden);
  const TestMatrix gate = matrix_from_codes({k::DType::kF32, experts, hidden}, zeros, {});
  for (const std::string& set : k::kernel_sets()) {
    for (const auto group_score :
         {k::GroupScore::kNone, k::GroupScore::kMax, k::GroupScore::kTop2Sum}) {
      auto d = device(set);
      REQUIRE(d->reserve(small_limits(2, hidden, 0, experts)).ok());
      const std::vector<float> x = {1, 1, kNan, kInfinity};
      std::vector<int32_t> ids(6, -1);
      std::vector<float> weights(6);
      k::RouteArgs a;
      a.gate = gate.m;
      a.group_score = group_score;
      a.groups = 4;
      a.topk_group = 2;
      a.top_k = 3;
      a.x = cdev(x);
      a.rows = 2;
      a.expert_ids = ids.data();
      a.expert_weights = weights.data();
      d->route(a);
      CHECK(ids[0] == 0);
      CHECK(ids[1] == 1);
      CHECK(ids[2] == 2);
      for (size_t i = 3; i < 6; ++i) CHECK((ids[i] >= 0 && ids[i] < experts));
      CHECK((ids[3] != ids[4] && ids[4] != ids[5] && ids[3] != ids[5]));
      CHECK(std::isnan(weights[3]));
    }
  }
}

TEST_CASE("add and gather_rows") {
  Random random(43);
  const auto x = random.vector(1003);
  const auto y0 = random.vector(1003);
  for (const std::string& set : k::kernel_sets()) {
    auto d = device(set, 2);
    REQUIRE(d->reserve(small_limits(4, 100)).ok());
    auto y = y0;
    d->add(mdev(y), cdev(x), 1003);
    for (size_t i = 0; i < y.size(); ++i) CHECK(y[i] == y0[i] + x[i]);
    std::vector<float> out(3 * 20);
    const std::vector<int32_t> rows = {9, 0, 9};
    d->gather_rows(cdev(x), 100, rows, 17, mdev(out), 20);
    CHECK(same_bits(&out[0], &x[900], 17));
    CHECK(same_bits(&out[20], &x[0], 17));
    CHECK(same_bits(&out[40], &x[900], 17));
    CHECK(out[17] == 0);
  }
}

TEST_CASE("reduce_logits: maximum, the lowest index of equals, sum of exponentials, finiteness") {
  Random random(44);
  for (const int32_t vocab : {1, 7, 16, 333, 4096, 10007}) {
    const auto n = static_cast<size_t>(vocab);
    auto logits = random.vector(4 * n, 20);
    const size_t at = n / 2;
    logits[at] = 30;  // row 0: twice the greatest value
    logits[n - 1] = 30;
    logits[n + n / 3] = kNan;            // row 1
    logits[2 * n + n - 1] = -kInfinity;  // row 2
    for (const std::string& set : k::kernel_sets()) {
      auto d = device(set, 2);
      REQUIRE(d->reserve(small_limits(4, 1, vocab)).ok());
      k::RowStats stats[4];
      d->reduce_logits(cdev(logits), vocab, 4, vocab, stats);
      CHECK(stats[0].argmax == static_cast<int32_t>(at));
      CHECK(stats[0].max == 30);
      for (const size_t r : {0u, 3u}) {
        CHECK(stats[r].finite);
        double sum = 0;
        for (size_t i = 0; i < n; ++i) {
          sum +=
              std::exp(static_cast<double>(logits[r * n + i]) - static_cast<double>(stats[r].max));
        }
        CHECK_MESSAGE(std::abs(stats[r].sum_exp / sum - 1) < 1e-6, set, " vocab ", vocab);
      }
      CHECK(!stats[1].finite);
      CHECK(!stats[2].finite);
    }
  }
}

TEST_CASE("weigh: exponentials of every token and their sums by blocks") {
  Random random(45);
  for (const int32_t vocab : {1, 7, 63, 64, 65, 333, 4096, 10007}) {
    const auto n = static_cast<size_t>(vocab);
    auto logits = random.vector(n, 20);
    logits[n / 2] = 30;
    if (n > 1) logits[n - 1] = -kInfinity;
    for (const float scale : {1.0F, 0.01F, 1.7F, 1e30F}) {
      for (const std::string& set : k::kernel_sets()) {
        auto d = device(set, 1);
        std::vector<float> weights(n + 1, -7);
        std::vector<double> sums((n + 63) / 64 + 1, -7);
        d->weigh(logits, 30, scale, weights.data(), sums.data());
        double sum = 0;
        for (size_t i = 0; i < n; ++i) {
          const double exponent =
              (static_cast<double>(logits[i]) - 30) * static_cast<double>(scale);
          const double expected = exponent < -87 ? 0 : std::exp(exponent);
          // An exponent's own rounding is up to 87 * 2^-24.
          REQUIRE_MESSAGE(std::abs(static_cast<double>(weights[i]) - expected) <= 1.2e-5 * expected,
                          set, " token ", i, " of ", vocab, " scale ", scale);
          sum = (i % 64 == 0 ? 0 : sum) + static_cast<double>(weights[i]);
          if (i % 64 == 63 || i + 1 == n) {
            REQUIRE_MESSAGE(std::abs(sums[i / 64] - sum) <= 1e-6 * sum, set, " block ", i / 64);
          }
        }
        CHECK(weights[n] == -7);
        CHECK(sums.back() == -7);
      }
    }
  }
}

TEST_CASE("devices: names, memory, an unknown set is refused with the known ones") {
  const auto sets = k::kernel_sets();
  REQUIRE(sets.size() >= 2);
  CHECK(sets.back() == "ref");
  CHECK(sets[sets.size() - 2] == "portable");
  CHECK(device("")->name() == sets.front());
  for (const std::string& set : sets) {
    auto d = device(set, 3);
    CHECK(d->name() == set);
    CHECK(d->threads() == (set == "ref" ? 1 : 3));
    auto p = d->alloc(10000);
    REQUIRE(p);
    CHECK(reinterpret_cast<uintptr_t>(p.get()) % 4096 == 0);
    CHECK(std::all_of(p.get(), p.get() + 10000, [](std::byte b) { return b == std::byte{0}; }));
    const char text[] = "latents";
    d->upload(p + 5, text, sizeof text);
    d->copy(p + 100, p + 5, sizeof text);
    d->zero(p + 5, sizeof text);
    char back[sizeof text];
    d->download(back, p + 100, sizeof text);
    CHECK(std::string(back) == text);
    CHECK(p.get()[5] == std::byte{0});
    CHECK(d->synchronize().ok());
    d->free(p);
    CHECK(!d->alloc(~size_t{0} / 2));
  }
  k::DeviceOptions options;
  options.kernels = "mmx";
  const auto refused = k::make_device(options);
  REQUIRE(!refused.ok());
  CHECK(refused.status().code() == Code::kUnsupported);
  CHECK(refused.status().field() == "kernels");
  CHECK(refused.status().message().find("\"mmx\"") != std::string::npos);
  CHECK(refused.status().message().find("portable, ref") != std::string::npos);
}

}  // namespace dsv3::test
