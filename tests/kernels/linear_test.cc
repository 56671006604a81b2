// linear() of every kernel set against ref/: shapes, weight types, scales, strides, non-finite
// rows.
#include <doctest/doctest.h>

#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/cpu_device.h"
#include "kernels/numeric.h"
#include "tests/kernels/kernel_test.h"

namespace dsv3::test {
namespace {

struct Case {
  MatrixSpec spec;
  int32_t rows = 1;
  bool accumulate = false;
  int32_t x_extra = 0, y_extra = 0;  // stride beyond k and n
};

k::Limits limits_for(const Case& c) {
  k::Limits l;
  l.rows = c.rows;
  l.hidden = c.spec.n;
  l.linear_k = c.spec.k;
  l.linear_n = c.spec.n;
  return l;
}

std::vector<float> run(k::Device& d, const Case& c, const TestMatrix& w,
                       const std::vector<float>& x, const std::vector<float>& y0) {
  std::vector<float> y = y0;
  REQUIRE(d.reserve(limits_for(c)).ok());
  k::LinearArgs a;
  a.w = w.m;
  a.x = cdev(x);
  a.x_stride = c.spec.k + c.x_extra;
  a.y = mdev(y);
  a.y_stride = c.spec.n + c.y_extra;
  a.rows = c.rows;
  a.accumulate = c.accumulate;
  d.linear({&a, 1});
  return y;
}

std::string describe(const std::string& set, const Case& c) {
  return set + " " + k::dtype_name(c.spec.dtype) + " n=" + std::to_string(c.spec.n) +
         " k=" + std::to_string(c.spec.k) + " rows=" + std::to_string(c.rows) +
         " scale block=" + std::to_string(c.spec.scale_n) + "x" + std::to_string(c.spec.scale_k);
}

void compare(Random& random, const Case& c) {
  const TestMatrix w = random_matrix(random, c.spec);
  const auto rows = static_cast<size_t>(c.rows);
  // What the kernel sets hold exactly: the limits are for sums, not for rounded activations.
  const auto stride = static_cast<size_t>(c.spec.k + c.x_extra);
  const auto x = random.exact_rows(c.spec.dtype, rows, static_cast<size_t>(c.spec.k), stride);
  const auto y0 = random.vector(rows * static_cast<size_t>(c.spec.n + c.y_extra));
  const auto want = run(*device("ref"), c, w, x, y0);
  // One rounding of a float32 sum of this size, times a few.
  const double limit = 4e-7 * std::sqrt(static_cast<double>(c.spec.k)) * c.spec.scale * 4 + 4e-7;
  for (const std::string& set : fast_sets()) {
    const auto got = run(*device(set), c, w, x, y0);
    check_close(got.data(), want.data(), want.size(), limit, describe(set, c));
    for (size_t r = 0; r < rows; ++r) {  // nothing beyond the row's n was written
      const size_t begin = r * static_cast<size_t>(c.spec.n + c.y_extra);
      const size_t n = static_cast<size_t>(c.spec.n);
      CHECK(same_bits(&got[begin + n], &y0[begin + n], static_cast<size_t>(c.y_extra)));
    }
  }
}

constexpr k::DType kTypes[] = {k::DType::kF32, k::DType::kBF16, k::DType::kF16, k::DType::kF8E4M3,
                               k::DType::kMXFP4};

}  // namespace

TEST_CASE("linear: ragged shapes, every weight type") {
  Random random(1);
  const int32_t sizes[][2] = {{1, 1},    {1, 2},     {16, 2},    {15, 3},   {17, 127},
                              {33, 128}, {64, 64},   {65, 129},  {80, 256}, {130, 258},
                              {48, 386}, {96, 1022}, {49, 1026}, {35, 1409}};
  for (const k::DType dtype : kTypes) {
    for (const auto& size : sizes) {
      for (const int32_t rows : {1, 2, 3, 5, 8, 9, 14, 31}) {
        Case c;
        c.spec.dtype = dtype;
        c.spec.n = size[0];
        c.spec.k = size[1];
        c.rows = rows;
        compare(random, c);
      }
    }
  }
}

TEST_CASE("linear: more rows than one panel, strides, accumulate") {
  Random random(2);
  for (const k::DType dtype : kTypes) {
    Case c;
    c.spec.dtype = dtype;
    c.spec.n = 72;
    c.spec.k = 200;
    c.rows = 403;
    c.x_extra = 3;
    c.y_extra = 5;
    compare(random, c);
    c.accumulate = true;
    compare(random, c);
    c.rows = 1;
    compare(random, c);
  }
}

TEST_CASE("linear: scale blocks of every size") {
  Random random(3);
  const int32_t blocks[][2] = {{128, 128}, {64, 64}, {32, 32}, {8, 8},     {128, 8},  {8, 128},
                               {24, 40},   {1, 2},   {16, 6},  {128, 256}, {48, 192}, {128, 130}};
  for (const auto& block : blocks) {
    for (const int32_t rows : {1, 4, 20}) {
      Case c;
      // Short tiles and long ones; and few inputs, of which not all may have the second scale.
      for (const int32_t inner : {130, 160, 530, 1130}) {
        c.spec = {k::DType::kF8E4M3, 100, inner, block[0], block[1]};
        c.rows = rows;
        compare(random, c);
      }
    }
  }
}

// Results divided by `unit`, where scales or (times x_factor) activations are far from 1.
void compare_in_units(Random& random, const Case& c, float x_factor, float unit) {
  const TestMatrix w = random_matrix(random, c.spec);
  const auto k = static_cast<size_t>(c.spec.k);
  auto x = random.exact_rows(c.spec.dtype, static_cast<size_t>(c.rows), k, k);
  for (float& v : x) v *= x_factor;
  const std::vector<float> y0(static_cast<size_t>(c.rows * c.spec.n));
  auto want = run(*device("ref"), c, w, x, y0);
  for (float& v : want) v /= unit;
  for (const std::string& set : fast_sets()) {
    auto got = run(*device(set), c, w, x, y0);
    for (float& v : got) v /= unit;
    check_close(got.data(), want.data(), got.size(), 3e-5, describe(set, c));
  }
}

TEST_CASE("linear: tiny and huge scales") {
  Random random(4);
  for (const float scale : {1e-30f, 1e-10f, 1e10f, 1e30f}) {
    for (const int32_t rows : {1, 20}) {
      Case c;
      c.spec = {k::DType::kF8E4M3, 40, 300, 128, 128, scale};
      c.rows = rows;
      compare_in_units(random, c, 1, scale);
    }
  }
}

TEST_CASE("linear: small and large activations") {
  Random random(7);
  for (const k::DType dtype : {k::DType::kBF16, k::DType::kF8E4M3}) {
    for (const float factor : {0x1p-40f, 0x1p-20f, 0x1p20f, 0x1p60f}) {
      for (const int32_t rows : {1, 20}) {
        Case c;
        c.spec.dtype = dtype;
        c.spec.n = 40;
        c.spec.k = 300;
        c.rows = rows;
        compare_in_units(random, c, factor, factor);
      }
    }
  }
}

TEST_CASE("linear: every E4M3 code is exact, alone and in a panel") {
  // Row r of the weights holds code r everywhere on the diagonal positions: y = value of the code.
  std::vector<uint32_t> codes;
  const int32_t k = 4;
  for (uint32_t code = 0; code < 256; ++code) {
    const bool nan = (code & 0x7f) == 0x7f;
    for (int32_t c = 0; c < k; ++c)
      codes.push_back(nan || c != static_cast<int32_t>(code % 4) ? 0 : code);
  }
  const TestMatrix w = matrix_from_codes({k::DType::kF8E4M3, 256, k}, codes, {1.0f, 1.0f});
  for (const std::string& set : k::kernel_sets()) {
    for (const int32_t rows : {1, 3, 12}) {
      Case c;
      c.spec = {k::DType::kF8E4M3, 256, k};
      c.rows = rows;
      const std::vector<float> x(static_cast<size_t>(rows * k), 1.0f);
      const auto y =
          run(*device(set), c, w, x, std::vector<float>(static_cast<size_t>(rows) * 256));
      for (size_t i = 0; i < y.size(); ++i) {
        const size_t code = i % 256;
        if ((code & 0x7f) == 0x7f) continue;
        CHECK_MESSAGE(y[i] == k::kF8E4M3Table[code], set, " code ", code, " rows ", rows);
      }
    }
  }
}

TEST_CASE(
    "linear: E4M3 codes beside the largest are exact from 1/2 on, and 1/32 off at most below") {
  // One input for each code; inputs of the last block have small weights alone.
  constexpr int32_t kCodes = 254, kN = 16;
  const int32_t k = 3 * 128;
  std::vector<uint32_t> codes(static_cast<size_t>(kN * k));
  const auto code_of = [](int32_t i) {
    return static_cast<uint32_t>(i < 127 ? i : i + 1);  // without NaN
  };
  for (int32_t c = 0; c < kCodes; ++c) codes[static_cast<size_t>(c)] = code_of(c);
  for (int32_t c = 256; c < k; ++c) codes[static_cast<size_t>(c)] = code_of(c % 64);
  codes[254] = codes[255] = 0;
  const TestMatrix w = matrix_from_codes({k::DType::kF8E4M3, kN, k}, codes, {1.0f, 1.0f, 1.0f});
  std::vector<float> x(static_cast<size_t>(k * k));
  for (int32_t i = 0; i < k; ++i) x[static_cast<size_t>(i * k + i)] = 1;
  for (const std::string& set : k::kernel_sets()) {
    for (const int32_t rows : {1, k}) {
      Case c;
      c.spec = {k::DType::kF8E4M3, kN, k};
      c.rows = rows;
      for (int32_t first = 0; first < k; first += rows) {
        const auto begin = x.begin() + int64_t{first} * k;
        const std::vector<float> some(begin, begin + int64_t{rows} * k);
        const auto y =
            run(*device(set), c, w, some, std::vector<float>(static_cast<size_t>(rows * kN)));
        for (int32_t r = 0; r < rows; ++r) {
          const float want = w.dense[static_cast<size_t>(first + r)];
          const float off = std::abs(y[static_cast<size_t>(r * kN)] - want);
          const bool rounds = set == "avx2i16" && first + r < 256 && std::abs(want) < 0.5f;
          CHECK_MESSAGE(off <= (rounds ? 1.0f / 32 : 0.0f), set, " input ", first + r, " of ",
                        want);
        }
      }
    }
  }
}

TEST_CASE("linear: the largest weights times the largest activations") {
  constexpr int32_t kN = 32, kK = 320;
  for (const uint32_t code : {0x7eu, 0xfeu}) {  // 448 and -448
    const TestMatrix w = matrix_from_codes({k::DType::kF8E4M3, kN, kK},
                                           std::vector<uint32_t>(size_t{kN} * kK, code), {1, 1, 1});
    for (const std::string& set : k::kernel_sets()) {
      for (const int32_t rows : {1, 2, 7}) {
        Case c;
        c.spec = {k::DType::kF8E4M3, kN, kK};
        c.rows = rows;
        const std::vector<float> x(static_cast<size_t>(rows) * kK, 1);
        const auto y =
            run(*device(set), c, w, x, std::vector<float>(static_cast<size_t>(rows) * kN));
        for (const float v : y) CHECK_MESSAGE(v == w.dense[0] * kK, set, " rows ", rows);
      }
    }
  }
}

TEST_CASE("linear: NaN and infinity stay in their rows") {
  Random random(5);
  for (const k::DType dtype : kTypes) {
    for (const int32_t rows : {5, 8, 40}) {
      Case c;
      c.spec.dtype = dtype;
      c.spec.n = 50;
      c.spec.k = 137;
      c.rows = rows;
      const TestMatrix w = random_matrix(random, c.spec);
      auto x = random.vector(static_cast<size_t>(rows) * 137);
      const std::vector<float> y0(static_cast<size_t>(rows) * 50);
      for (const std::string& set : k::kernel_sets()) {
        const auto clean = run(*device(set), c, w, x, y0);
        auto spoiled = x;
        spoiled[2 * 137 + 5] = std::numeric_limits<float>::quiet_NaN();
        spoiled[4 * 137 + 136] = std::numeric_limits<float>::infinity();
        const auto got = run(*device(set), c, w, spoiled, y0);
        for (size_t r = 0; r < static_cast<size_t>(rows); ++r) {
          if (r == 2 || r == 4) {
            CHECK_MESSAGE(!std::isfinite(got[r * 50]), describe(set, c));
          } else {
            CHECK_MESSAGE(same_bits(&got[r * 50], &clean[r * 50], 50), describe(set, c));
          }
        }
      }
    }
  }
}

TEST_CASE("linear: several layers in one call, with shared and with different inputs") {
  Random random(6);
  const auto signs = [&](size_t count) {  // whatever a set rounds to, it holds these exactly
    std::vector<float> v(count);
    for (float& f : v) f = static_cast<float>(random.below(3) - 1);
    return v;
  };
  const auto x = signs(7 * 96);
  const auto z = signs(7 * 33);
  std::vector<TestMatrix> w;
  for (int i = 0; i < 20; ++i) {
    MatrixSpec spec;
    spec.dtype = kTypes[i % 5];
    spec.n = 16 + 7 * i;
    spec.k = i % 3 == 0 ? 33 : 96;
    w.push_back(random_matrix(random, spec));
  }
  k::Limits limits;
  limits.rows = 7;
  limits.hidden = limits.linear_k = 96;
  limits.linear_n = 200;
  std::vector<std::vector<float>> want;
  std::vector<std::string> sets = fast_sets();
  sets.insert(sets.begin(), "ref");
  for (const std::string& set : sets) {
    auto d = device(set, 2);
    REQUIRE(d->reserve(limits).ok());
    std::vector<std::vector<float>> y;
    std::vector<k::LinearArgs> args;
    for (const TestMatrix& m : w) y.emplace_back(7 * static_cast<size_t>(m.m.n));
    for (size_t i = 0; i < w.size(); ++i) {
      k::LinearArgs a;
      a.w = w[i].m;
      a.x = w[i].m.k == 33 ? cdev(z) : cdev(x);
      a.x_stride = w[i].m.k;
      a.y = mdev(y[i]);
      a.y_stride = w[i].m.n;
      a.rows = 7;
      args.push_back(a);
    }
    d->linear(args);
    if (want.empty()) {
      want = y;
      continue;
    }
    for (size_t i = 0; i < y.size(); ++i) {
      check_close(y[i].data(), want[i].data(), y[i].size(), 2e-5,
                  set + " layer " + std::to_string(i));
    }
  }
}

#if defined(__x86_64__)
// Where it is large, few rows of FP8 are read as several streams: of 650 outputs a task takes eight
// tiles, two for each.
TEST_CASE("avx512bf16: the size of L1 changes how weights are read, and no bit") {
  const auto sets = k::kernel_sets();
  if (std::find(sets.begin(), sets.end(), "avx512bf16") == sets.end()) return;
  Random random(12);
  for (const k::DType dtype : {k::DType::kBF16, k::DType::kF8E4M3}) {
    for (const auto& [n, inner] : {std::pair(64, 128), {200, 1000}, {650, 600}, {16, 64}}) {
      const TestMatrix w = random_matrix(random, {dtype, n, inner, 32, 128});
      for (const int32_t rows : {1, 2, 3, 4, 5, 16, 17, 24, 33, 200}) {
        const Case c{{dtype, n, inner, 32, 128}, rows};
        const auto x = random.vector(static_cast<size_t>(rows) * static_cast<size_t>(inner));
        const std::vector<float> y(static_cast<size_t>(rows) * static_cast<size_t>(n));
        std::vector<std::vector<float>> got;
        for (const size_t l1_kib : {0, 32, 48}) {
          auto d = k::CpuDevice::create(k::micro_avx512bf16(l1_kib * 1024), 1, false);
          REQUIRE(d.ok());
          got.push_back(run(**d, c, w, x, y));
        }
        CAPTURE(describe("avx512bf16", c));
        CHECK(same_bits(got[1].data(), got[0].data(), y.size()));
        CHECK(same_bits(got[2].data(), got[0].data(), y.size()));
      }
    }
  }
}
#endif

}  // namespace dsv3::test
