// The promise of batch invariance for linear layers and the router: a row's bits are the same alone
// and among any number of others, wherever it stands, and however many threads work.
#include <doctest/doctest.h>

#include <cmath>

#include "tests/kernels/kernel_test.h"

namespace dsv3::test {
namespace {

constexpr k::DType kTypes[] = {k::DType::kF32, k::DType::kBF16, k::DType::kF16, k::DType::kF8E4M3,
                               k::DType::kMXFP4};

std::vector<float> multiply(k::Device& d, const k::Matrix& w, const float* x, int32_t rows) {
  std::vector<float> y(static_cast<size_t>(rows) * static_cast<size_t>(w.n));
  k::LinearArgs a;
  a.w = w;
  a.x = k::Dev<const float>(x);
  a.x_stride = w.k;
  a.y = mdev(y);
  a.y_stride = w.n;
  a.rows = rows;
  d.linear({&a, 1});
  return y;
}

}  // namespace

TEST_CASE("linear: a row alone and in batches of 1 to 67 rows") {
  Random random(30);
  const int32_t most = 67;
  for (const k::DType dtype : kTypes) {
    for (const int32_t inner : {2, 130, 514, 1154}) {
      const TestMatrix w = random_matrix(random, {dtype, 83, inner, 32, 64});
      const auto x = random.vector(static_cast<size_t>(most * inner));
      for (const std::string& set : k::kernel_sets()) {
        auto d = device(set, 2);
        REQUIRE(d->reserve(small_limits(most, inner, 83)).ok());
        std::vector<std::vector<float>> alone;
        for (int32_t r = 0; r < most; ++r)
          alone.push_back(multiply(*d, w.m, &x[static_cast<size_t>(r * inner)], 1));
        for (int32_t rows = 1; rows <= most; ++rows) {
          const int32_t first = (rows * 29) % (most - rows + 1);
          const auto y = multiply(*d, w.m, &x[static_cast<size_t>(first * inner)], rows);
          bool same = true;
          for (int32_t r = 0; r < rows; ++r) {
            same = same && same_bits(&y[static_cast<size_t>(r) * 83],
                                     alone[static_cast<size_t>(first + r)].data(), 83);
          }
          CHECK_MESSAGE(same, set, " ", std::string(k::dtype_name(dtype)), " k=", inner,
                        " rows=", rows);
        }
      }
    }
  }
}

// Far from 1, where a set that moves weights and activations to other powers of two might lose bits
// in one of its loops and not in another.
TEST_CASE("linear: activations of every size, alone and among others") {
  Random random(32);
  const int32_t rows = 40, inner = 386, n = 48;
  for (const k::DType dtype : kTypes) {
    const TestMatrix w = random_matrix(random, {dtype, n, inner, 32, 64});
    auto x = random.vector(static_cast<size_t>(rows * inner));
    for (size_t i = 0; i < x.size(); ++i) {
      // A row's values lie between 2^-100 and 2^-40, 2^-70 and 2^-10, 2^-40 and 2^20, 2^-10 and
      // 2^50 or, all of them tiny, 2^-95 and 2^-75.
      const int row_kind = static_cast<int>(i / static_cast<size_t>(inner) % 5);
      const int least = row_kind == 4 ? -95 : -100 + 30 * row_kind;
      const int span = row_kind == 4 ? 21 : 61;
      x[i] = std::ldexp(x[i], least + static_cast<int>(i * 37 % 61) % span);
    }
    for (const std::string& set : k::kernel_sets()) {
      auto d = device(set, 2);
      REQUIRE(d->reserve(small_limits(rows, inner, n)).ok());
      std::vector<float> alone;
      for (int32_t r = 0; r < rows; ++r) {
        const auto y = multiply(*d, w.m, &x[static_cast<size_t>(r * inner)], 1);
        alone.insert(alone.end(), y.begin(), y.end());
      }
      for (const int32_t count : {3, 10, 11, 40}) {
        const auto y = multiply(*d, w.m, x.data(), count);
        CHECK_MESSAGE(same_bits(y.data(), alone.data(), y.size()), set, " ",
                      std::string(k::dtype_name(dtype)), " rows=", count);
      }
    }
  }
}

TEST_CASE("linear: 1, 2 and 5 threads, layers large enough to be shared out") {
  Random random(31);
  for (const k::DType dtype : kTypes) {
    const TestMatrix w = random_matrix(random, {dtype, 1000, 1026, 128, 128});
    for (const int32_t rows : {1, 3, 67, 250}) {
      if (kEmulated && rows == 250) continue;
      const auto x = random.vector(static_cast<size_t>(rows) * 1026);
      for (const std::string& set : fast_sets()) {
        std::vector<float> want;
        for (const int threads : {1, 2, 5}) {
          auto d = device(set, threads);
          REQUIRE(d->reserve(small_limits(rows, 1026, 1000)).ok());
          const auto y = multiply(*d, w.m, x.data(), rows);
          if (want.empty()) want = y;
          CHECK_MESSAGE(same_bits(y.data(), want.data(), y.size()), set, " ",
                        std::string(k::dtype_name(dtype)), " rows=", rows, " threads=", threads);
        }
      }
    }
  }
}

TEST_CASE("route: the same choice and weights alone and in a batch") {
  Random random(32);
  const int32_t rows = 230, hidden = 257, experts = 72;
  for (const k::DType dtype : {k::DType::kBF16, k::DType::kF32}) {
    const TestMatrix gate = random_matrix(random, {dtype, experts, hidden});
    const auto bias = random.vector(static_cast<size_t>(experts), 0.1f);
    const auto x = random.vector(static_cast<size_t>(rows * hidden), 0.2f);
    for (const std::string& set : k::kernel_sets()) {
      auto d = device(set, 2);
      REQUIRE(d->reserve(small_limits(rows, hidden, 0, experts)).ok());
      const auto route = [&](int32_t first, int32_t count, std::vector<int32_t>* ids,
                             std::vector<float>* weights) {
        ids->resize(static_cast<size_t>(count) * 6);
        weights->resize(static_cast<size_t>(count) * 6);
        k::RouteArgs a;
        a.gate = gate.m;
        a.bias = cdev(bias);
        a.group_score = k::GroupScore::kTop2Sum;
        a.groups = 8;
        a.topk_group = 4;
        a.top_k = 6;
        a.normalise = true;
        a.scaling = 2.5f;
        a.x = cdev(x, static_cast<size_t>(first * hidden));
        a.rows = count;
        a.expert_ids = ids->data();
        a.expert_weights = weights->data();
        d->route(a);
      };
      std::vector<int32_t> ids, one_id;
      std::vector<float> weights, one_weight;
      route(0, rows, &ids, &weights);
      for (int32_t r = 0; r < rows; ++r) {
        route(r, 1, &one_id, &one_weight);
        const auto at = static_cast<size_t>(r) * 6;
        CHECK(std::equal(one_id.begin(), one_id.end(), ids.begin() + r * 6));
        CHECK(same_bits(one_weight.data(), &weights[at], 6));
      }
    }
  }
}

}  // namespace dsv3::test
