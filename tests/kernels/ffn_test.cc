// moe_ffn() of every kernel set against ref/.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/cpu_device.h"
#include "tests/kernels/kernel_test.h"

namespace dsv3::test {
namespace {

struct Expert {
  TestMatrix gate, up, down;
  k::FfnWeights weights;
};

Expert random_expert(Random& random, k::DType dtype, int32_t hidden, int32_t width, int32_t block) {
  const float scale = 1.5f / std::sqrt(static_cast<float>(hidden));
  Expert e;
  e.gate = random_matrix(random, {dtype, width, hidden, block, block, scale});
  e.up = random_matrix(random, {dtype, width, hidden, block, block, scale});
  e.down = random_matrix(random, {dtype, hidden, width, block, block, scale});
  e.weights = {e.gate.m, e.up.m, e.down.m};
  return e;
}

// A plan: which rows each expert works on.
struct Plan {
  int32_t rows = 0, hidden = 0, slots = 0;
  std::vector<std::vector<int32_t>> tokens, used_slots;  // by group
  std::vector<float> slot_weights;
};

// Every token takes `top_k` different experts of `experts` and then expert `experts` (shared).
Plan random_plan(Random& random, int32_t rows, int32_t hidden, int32_t experts, int32_t top_k) {
  Plan p{rows, hidden, top_k + 1, {}, {}, {}};
  p.tokens.resize(static_cast<size_t>(experts) + 1);
  p.used_slots.resize(static_cast<size_t>(experts) + 1);
  for (int32_t t = 0; t < rows; ++t) {
    const int32_t first = random.below(experts);
    for (int32_t s = 0; s <= top_k; ++s) {
      const int32_t e = s == top_k ? experts : (first + s) % experts;
      p.tokens[static_cast<size_t>(e)].push_back(t);
      p.used_slots[static_cast<size_t>(e)].push_back(s);
      p.slot_weights.push_back(s == top_k ? 1.0f : std::abs(random.uniform()) + 0.1f);
    }
  }
  return p;
}

std::vector<float> run(k::Device& d, const Plan& p, const std::vector<Expert>& experts,
                       const std::vector<float>& x, const std::vector<float>& y0,
                       size_t first_group = 0, size_t end_group = ~size_t{0}) {
  k::Limits l;
  l.rows = p.rows;
  l.hidden = p.hidden;
  l.linear_k = p.hidden;
  l.ffn_slots = p.slots;
  l.experts = static_cast<int32_t>(experts.size());
  for (const Expert& e : experts) {
    l.ffn_width = std::max(l.ffn_width, e.gate.m.n);
  }
  l.ffn_slot_width = int64_t{l.ffn_width} * p.slots;
  REQUIRE(d.reserve(l).ok());
  std::vector<k::FfnGroup> groups;
  for (size_t e = first_group; e < std::min(end_group, experts.size()); ++e) {
    if (p.tokens[e].empty()) continue;
    groups.push_back({&experts[e].weights, p.tokens[e].data(), p.used_slots[e].data(),
                      static_cast<int32_t>(p.tokens[e].size())});
  }
  std::vector<float> y = y0;
  k::FfnArgs a;
  a.rows = p.rows;
  a.hidden = p.hidden;
  a.slots = p.slots;
  a.groups = groups;
  a.slot_weights = p.slot_weights.data();
  a.x = cdev(x);
  a.y = mdev(y);
  d.moe_ffn(a);
  return y;
}

// What the rounding of what stands between the two halves may cost: a row's dissimilarity, and its
// worst element's error as a part of the row's root mean square. The sets named after BF16 round to
// it, which leaves about (2^-9)^2 / 12 of it. For MXFP4 all round to INT8 with a scale per 32: an
// activation's error is uniform within half of (largest / 127), so its mean square is at most 32 /
// (3 * 254^2) = 1.7e-4 of the block's, when one value is all of the block. For FP8 "avx2i16" rounds
// to INT16 up to 4096 with a scale per 64: 64 / (3 * 8192^2) = 3.2e-7.
struct Limit {
  double dissimilarity, worst;
};
Limit limit_of(const std::string& set, k::DType dtype) {
  if (dtype == k::DType::kMXFP4) return {1.7e-4, 8e-2};
  if (set == "avx2i16" && dtype == k::DType::kF8E4M3) return {3.2e-7, 4e-3};
  return set.ends_with("bf16") ? Limit{3e-5, 3e-2} : Limit{1e-9, 1e-5};
}

void check_rows(const std::string& set, const std::vector<float>& got,
                const std::vector<float>& want, size_t hidden, const std::string& what,
                k::DType dtype = k::DType::kF8E4M3) {
  const Limit limits = limit_of(set, dtype);
  for (size_t r = 0; r < got.size() / hidden; ++r) {
    double xy = 0, xx = 0, yy = 0, worst = 0;
    for (size_t i = r * hidden; i < (r + 1) * hidden; ++i) {
      xy += static_cast<double>(got[i]) * static_cast<double>(want[i]);
      xx += static_cast<double>(got[i]) * static_cast<double>(got[i]);
      yy += static_cast<double>(want[i]) * static_cast<double>(want[i]);
      worst = std::max(worst, static_cast<double>(std::abs(got[i] - want[i])));
    }
    const double dissimilarity = 1 - 2 * xy / (xx + yy);
    CHECK_MESSAGE(dissimilarity < limits.dissimilarity, set, " ", what, " row ", r);
    const double limit = limits.worst * std::sqrt(yy / static_cast<double>(hidden));
    CHECK_MESSAGE(worst < limit, set, " ", what, " row ", r);
  }
}

void compare(k::DType dtype, int32_t rows, int32_t hidden, int32_t width, int32_t experts,
             int32_t top_k, int32_t block, int threads) {
  Random random(static_cast<uint64_t>(rows * 1000 + hidden));
  std::vector<Expert> all;
  for (int32_t e = 0; e < experts; ++e) {
    all.push_back(random_expert(random, dtype, hidden, width, block));
  }
  all.push_back(random_expert(random, dtype, hidden, 2 * width + 2, block));  // shared
  const Plan plan = random_plan(random, rows, hidden, experts, top_k);
  const auto h = static_cast<size_t>(hidden);
  const auto x = random.exact_rows(dtype, static_cast<size_t>(rows), h, h);
  const auto y0 = random.vector(x.size());
  const auto want = run(*device("ref"), plan, all, x, y0);
  for (const std::string& set : fast_sets()) {
    const auto got = run(*device(set, threads), plan, all, x, y0);
    check_rows(set, got, want, h,
               std::string(k::dtype_name(dtype)) + " rows=" + std::to_string(rows) +
                   " hidden=" + std::to_string(hidden) + " width=" + std::to_string(width),
               dtype);
  }
}

constexpr k::DType kTypes[] = {k::DType::kF32, k::DType::kBF16, k::DType::kF16, k::DType::kF8E4M3,
                               k::DType::kMXFP4};

}  // namespace

TEST_CASE("moe_ffn: ragged shapes, every weight type") {
  for (const k::DType dtype : kTypes) {
    compare(dtype, 1, 64, 32, 4, 2, 128, 1);
    compare(dtype, 1, 256, 128, 16, 4, 128, 2);
    compare(dtype, 5, 70, 33, 5, 3, 32, 2);
    compare(dtype, 37, 160, 50, 12, 3, 64, 3);
    compare(dtype, 9, 131, 17, 3, 1, 8, 2);
  }
}

TEST_CASE("moe_ffn: more rows of one expert than a panel") {
  compare(k::DType::kF8E4M3, 450, 64, 48, 3, 2, 32, 2);
  compare(k::DType::kMXFP4, 450, 64, 48, 3, 2, 32, 2);
}

TEST_CASE("moe_ffn: a dense layer is one group") {
  Random random(8);
  const int32_t hidden = 96, width = 200, rows = 11;
  const std::vector<Expert> one = {random_expert(random, k::DType::kF8E4M3, hidden, width, 128)};
  Plan plan{rows, hidden, 1, {{}}, {{}}, std::vector<float>(rows, 1.0f)};
  for (int32_t t = 0; t < rows; ++t) {
    plan.tokens[0].push_back(t);
    plan.used_slots[0].push_back(0);
  }
  const auto x = random.i16_rows(rows, hidden, hidden);
  const auto y0 = random.vector(x.size());
  const auto want = run(*device("ref"), plan, one, x, y0);
  for (const std::string& set : fast_sets()) {
    check_rows(set, run(*device(set, 2), plan, one, x, y0), want, hidden, "dense");
  }
}

TEST_CASE("moe_ffn: groups of different weight types in one call") {
  Random random(9);
  std::vector<Expert> experts;
  for (const k::DType dtype : kTypes) experts.push_back(random_expert(random, dtype, 64, 40, 32));
  Expert mixed = random_expert(random, k::DType::kBF16, 64, 40, 32);
  mixed.up = random_matrix(random, {k::DType::kF32, 40, 64});
  mixed.weights.up = mixed.up.m;
  experts.push_back(std::move(mixed));
  const Plan plan = random_plan(random, 6, 64, 5, 2);
  const auto x = random.i8_rows(6, 64, 64);
  const auto y0 = random.vector(x.size());
  const auto want = run(*device("ref"), plan, experts, x, y0);
  for (const std::string& set : fast_sets()) {
    const auto got = run(*device(set, 2), plan, experts, x, y0);
    check_rows(set, got, want, 64, "mixed types", k::DType::kMXFP4);
  }
}

TEST_CASE("moe_ffn: bits do not depend on the other rows, the threads, or the groups' order") {
  Random random(10);
  const int32_t hidden = 136, width = 72, experts = 6, top_k = 3, rows = 67;
  std::vector<Expert> all;
  for (int32_t e = 0; e <= experts; ++e) {
    const k::DType types[] = {k::DType::kF8E4M3, k::DType::kBF16, k::DType::kMXFP4};
    all.push_back(random_expert(random, types[e % 3], hidden, width, 64));
  }
  const Plan plan = random_plan(random, rows, hidden, experts, top_k);
  const auto x = random.vector(static_cast<size_t>(rows * hidden));
  const auto y0 = random.vector(x.size());
  const size_t h = static_cast<size_t>(hidden);
  for (const std::string& set : k::kernel_sets()) {
    const auto together = run(*device(set, 1), plan, all, x, y0);
    for (const int threads : {2, 5}) {
      const auto again = run(*device(set, threads), plan, all, x, y0);
      CHECK_MESSAGE(same_bits(again.data(), together.data(), x.size()), set, " threads ", threads);
    }
    for (const int32_t t : {0, 1, 33, 66}) {  // each of these rows alone
      Plan alone{1, hidden, plan.slots, {}, {}, {}};
      alone.tokens.resize(all.size());
      alone.used_slots.resize(all.size());
      for (size_t e = 0; e < all.size(); ++e) {
        for (size_t i = 0; i < plan.tokens[e].size(); ++i) {
          if (plan.tokens[e][i] != t) continue;
          alone.tokens[e].push_back(0);
          alone.used_slots[e].push_back(plan.used_slots[e][i]);
        }
      }
      const auto* weights = &plan.slot_weights[static_cast<size_t>(t * plan.slots)];
      alone.slot_weights.assign(weights, weights + plan.slots);
      const auto begin = x.begin() + t * hidden;
      const auto y_begin = y0.begin() + t * hidden;
      const auto got = run(*device(set, 1), alone, all, std::vector<float>(begin, begin + hidden),
                           std::vector<float>(y_begin, y_begin + hidden));
      CHECK_MESSAGE(same_bits(got.data(), &together[static_cast<size_t>(t) * h], h), set, " row ",
                    t);
    }
  }
}

TEST_CASE("moe_ffn: a subset of the groups adds its share, rows without a group stay as they are") {
  Random random(11);
  const int32_t hidden = 64, experts = 5, rows = 20;
  std::vector<Expert> all;
  for (int32_t e = 0; e <= experts; ++e) {
    all.push_back(random_expert(random, k::DType::kF8E4M3, hidden, 32, 32));
  }
  const Plan plan = random_plan(random, rows, hidden, experts, 2);
  const auto x = random.bf16_vector(static_cast<size_t>(rows * hidden));
  const auto y0 = random.vector(x.size());
  for (const std::string& set : k::kernel_sets()) {
    auto d = device(set, 2);
    const auto first = run(*d, plan, all, x, y0, 0, 1);
    std::vector<bool> touched(static_cast<size_t>(rows));
    for (const int32_t t : plan.tokens[0]) touched[static_cast<size_t>(t)] = true;
    for (size_t t = 0; t < touched.size(); ++t) {
      const bool same = same_bits(&first[t * 64], &y0[t * 64], 64);
      CHECK(same != touched[t]);
    }
    const auto both = run(*d, plan, all, x, first, 1);
    const auto whole = run(*d, plan, all, x, y0);
    for (size_t i = 0; i < whole.size(); ++i) CHECK(std::abs(both[i] - whole[i]) < 2e-6f);
  }
}

TEST_CASE("moe_ffn: NaN stays in its row") {
  Random random(12);
  std::vector<Expert> all;
  for (int e = 0; e < 4; ++e) all.push_back(random_expert(random, k::DType::kF8E4M3, 64, 32, 32));
  const Plan plan = random_plan(random, 12, 64, 3, 2);
  const auto x = random.vector(12 * 64);
  const std::vector<float> y0(x.size());
  auto spoiled = x;
  spoiled[3 * 64 + 1] = std::numeric_limits<float>::quiet_NaN();
  for (const std::string& set : k::kernel_sets()) {
    const auto clean = run(*device(set), plan, all, x, y0);
    const auto got = run(*device(set), plan, all, spoiled, y0);
    for (size_t r = 0; r < 12; ++r) {
      CHECK(same_bits(&got[r * 64], &clean[r * 64], 64) == (r != 3));
    }
    CHECK(std::isnan(got[3 * 64]));
  }
}

#if defined(__x86_64__)
// Where it is large, few rows of FP8 take gate and up in tasks of eight tiles, read as four
// streams.
TEST_CASE("avx512bf16: the size of L1 changes how weights are read, and no bit") {
  const auto sets = k::kernel_sets();
  if (std::find(sets.begin(), sets.end(), "avx512bf16") == sets.end()) return;
  Random random(61);
  constexpr int32_t kHidden = 640, kWidth = 600, kExperts = 6;
  std::vector<Expert> all;
  for (int32_t e = 0; e < kExperts; ++e) {
    all.push_back(random_expert(random, k::DType::kF8E4M3, kHidden, kWidth, 128));
  }
  all.push_back(random_expert(random, k::DType::kF8E4M3, kHidden, 2 * kWidth, 128));
  for (const int32_t rows : {1, 2, 3, 5, 9, 40, 70}) {
    const Plan plan = random_plan(random, rows, kHidden, kExperts, 3);
    const auto x = random.vector(static_cast<size_t>(rows) * kHidden);
    const auto y0 = random.vector(x.size());
    std::vector<std::vector<float>> got;
    for (const size_t l1_kib : {32, 48}) {
      auto d = k::CpuDevice::create(k::micro_avx512bf16(l1_kib * 1024), 2, false);
      REQUIRE(d.ok());
      got.push_back(run(**d, plan, all, x, y0));
    }
    CAPTURE(rows);
    CHECK(same_bits(got[1].data(), got[0].data(), x.size()));
    check_rows("avx512bf16", got[1], run(*device("ref"), plan, all, x, y0), kHidden,
               "L1 of 48 KiB");
  }
}
#endif

}  // namespace dsv3::test
