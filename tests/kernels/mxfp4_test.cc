// MXFP4 weights: where elements and scales stand, every code with every scale, and what rounding
// activations to INT8 costs. Ragged shapes and invariance are tested with the other types.
#include <doctest/doctest.h>

#include <cmath>
#include <set>

#include "kernels/numeric.h"
#include "tests/kernels/kernel_test.h"

namespace dsv3::test {
namespace {

std::vector<float> multiply(k::Device& d, const k::Matrix& w, const std::vector<float>& x,
                            int32_t rows) {
  std::vector<float> y(static_cast<size_t>(rows) * static_cast<size_t>(w.n));
  REQUIRE(d.reserve(small_limits(rows, w.k, w.n)).ok());
  k::LinearArgs a;
  a.w = w;
  a.x = cdev(x);
  a.x_stride = w.k;
  a.y = mdev(y);
  a.y_stride = w.n;
  a.rows = rows;
  d.linear({&a, 1});
  return y;
}

}  // namespace

TEST_CASE("MXFP4: every element has a place of its own, and tiles are whole cache lines") {
  for (const auto& [n, inner] : {std::pair(1, 1), {16, 32}, {17, 33}, {48, 128}, {33, 300}}) {
    const size_t bytes = k::matrix_bytes(k::DType::kMXFP4, k::Layout::kTileMx, n, inner);
    CHECK(bytes % 64 == 0);
    std::set<std::pair<size_t, int>> taken;
    for (int32_t r = 0; r < n; ++r) {
      for (int32_t c = 0; c < inner; ++c) {
        const k::MxPlace place = k::mx_place(r, c, inner);
        CHECK(place.byte < bytes);
        CHECK(place.scale < bytes);
        CHECK(taken.emplace(place.byte, place.shift).second);
        CHECK(k::mx_place(r, c / 32 * 32, inner).scale == place.scale);
      }
      for (int32_t c = 0; c < inner; c += 32) {  // a byte of scale is no byte of elements
        CHECK(taken.emplace(k::mx_place(r, c, inner).scale, 0).second);
        CHECK(taken.emplace(k::mx_place(r, c, inner).scale, 4).second);
      }
    }
  }
  // The layout as kernels.h describes it: 4 bits and a scale for 32 of them, plus the unused
  // scales.
  CHECK(k::matrix_bytes(k::DType::kMXFP4, k::Layout::kTileMx, 16, 128) == 64 + 4 * 256);
  CHECK(k::matrix_bytes(k::DType::kMXFP4, k::Layout::kTileMx, 16, 160) == 64 + 4 * 256 + 64 + 256);
  const k::MxPlace place = k::mx_place(16 + 3, 128 + 32 + 8 + 6, 256);
  CHECK(place.scale == 2 * 1088 + 1088 + 16 + 3);
  CHECK(place.byte == 2 * 1088 + 1088 + 64 + 256 + 64 + 3 * 4 + 2);
  CHECK(place.shift == 4);
}

TEST_CASE("MXFP4: every code with every scale, alone and in a panel") {
  // Row (scale, code): one element with the code, in a block with the scale; the other blocks have
  // zeros and another scale. Elements wander through the places of a block and of a group.
  const int32_t inner = 160;
  const int32_t blocks = 5;
  for (const int32_t rows : {1, 3, 6, 20}) {
    for (int first = 0; first < 255; first += 51) {  // products must fit into float32
      MatrixSpec spec;
      spec.dtype = k::DType::kMXFP4;
      spec.n = 51 * 16;
      spec.k = inner;
      std::vector<uint32_t> codes;
      std::vector<float> scales;
      std::vector<double> want;
      const float x_value = std::ldexp(1.0f, 110 - first);  // brings the results around 2^9
      for (int32_t r = 0; r < spec.n; ++r) {
        const int scale = first + r / 16;
        const auto code = static_cast<uint32_t>(r % 16);
        const int32_t column = (r * 37 + r / 16) % inner;
        for (int32_t c = 0; c < inner; ++c) codes.push_back(c == column ? code : 0);
        for (int32_t b = 0; b < blocks; ++b) {
          scales.push_back(static_cast<float>(b == column / 32 ? scale : 120));
        }
        want.push_back(static_cast<double>(k::e2m1_to_float(static_cast<uint8_t>(code))) *
                       std::ldexp(1.0, scale - 127) * static_cast<double>(x_value));
      }
      const TestMatrix w = matrix_from_codes(spec, codes, scales);
      const std::vector<float> x(static_cast<size_t>(rows * inner), x_value);
      for (const std::string& set : k::kernel_sets()) {
        const auto y = multiply(*device(set), w.m, x, rows);
        for (size_t i = 0; i < y.size(); ++i) {
          // The scale of the activations is rounded, and the product of both scales.
          const double expected = want[i % want.size()];
          CHECK_MESSAGE(std::abs(static_cast<double>(y[i]) - expected) <= std::abs(expected) * 3e-7,
                        set, " rows ", rows, " row ", i % want.size(), " first scale ", first);
        }
      }
    }
  }
}

TEST_CASE("MXFP4: padding of the data is never read as weights") {
  // Rows beyond n and inputs beyond k hold garbage that the layout's zeros would hide.
  Random random(60);
  MatrixSpec spec;
  spec.dtype = k::DType::kMXFP4;
  spec.n = 21;
  spec.k = 70;
  TestMatrix w = random_matrix(random, spec);
  const auto x = random.i8_rows(3, 70, 70);
  for (const std::string& set : k::kernel_sets()) {
    auto d = device(set);
    const auto want = multiply(*d, w.m, x, 3);
    for (int32_t r = 21; r < 32; ++r) {
      for (int32_t c = 0; c < 70; ++c) {
        w.bytes.data()[k::mx_place(r, c, 70).byte] = std::byte{0x77};
        w.bytes.data()[k::mx_place(r, c, 70).scale] = std::byte{254};
      }
    }
    const auto got = multiply(*d, w.m, x, 3);
    CHECK_MESSAGE(same_bits(got.data(), want.data(), got.size()), set);
  }
}

TEST_CASE("MXFP4: what rounding activations to INT8 costs") {
  // An activation's error is at most largest / 254 of its 32, uniformly distributed: relative mean
  // square error m^2 / (3 * 254^2), m: the block's largest over its root mean square. Of 32 normal
  // values m is about 2.3; for values of which one is all of a block it is sqrt(32).
  Random random(61);
  MatrixSpec spec;
  spec.dtype = k::DType::kMXFP4;
  spec.n = 640;
  spec.k = 512;
  const TestMatrix w = random_matrix(random, spec);
  const int32_t rows = 24;
  auto x = random.vector(static_cast<size_t>(rows) * 512);
  for (int32_t r = 8; r < 16; ++r) {  // normal, as a sum of uniform values
    for (size_t i = 0; i < 512; ++i) {
      float sum = 0;
      for (int j = 0; j < 12; ++j) sum += random.uniform();
      x[static_cast<size_t>(r) * 512 + i] = sum;
    }
  }
  for (int32_t r = 16; r < rows; ++r) {  // an outlier in every block
    for (size_t i = 0; i < 512; i += 32) x[static_cast<size_t>(r) * 512 + i + 5] *= 50;
  }
  const auto want = multiply(*device("ref"), w.m, x, rows);
  for (const std::string& set : fast_sets()) {
    const auto got = multiply(*device(set), w.m, x, rows);
    for (int kind = 0; kind < 3; ++kind) {
      double error = 0, square = 0;
      for (size_t i = static_cast<size_t>(kind) * 8 * 640;
           i < (static_cast<size_t>(kind) + 1) * 8 * 640; ++i) {
        error += std::pow(static_cast<double>(got[i]) - static_cast<double>(want[i]), 2);
        square += std::pow(static_cast<double>(want[i]), 2);
      }
      const double m_square = kind == 0 ? 3 : kind == 1 ? 2.3 * 2.3 : 32;
      const double expected = m_square / (3 * 254.0 * 254.0);
      MESSAGE(set, " kind ", kind, ": relative error ", std::sqrt(error / square), ", theory ",
              std::sqrt(expected));
      CHECK_MESSAGE(error / square < 1.3 * expected, set, " kind ", kind);
    }
  }
}

TEST_CASE("MXFP4: all fast sets but portable agree to the bit") {
  // Sums of blocks are exact and blocks are added by fused multiply-adds in order.
  Random random(62);
  MatrixSpec spec;
  spec.dtype = k::DType::kMXFP4;
  spec.n = 70;
  spec.k = 1000;
  const TestMatrix w = random_matrix(random, spec);
  const auto x = random.vector(size_t{11} * 1000);
  std::vector<float> want;
  for (const std::string& set : fast_sets()) {
    if (set == "portable") continue;
    const auto y = multiply(*device(set), w.m, x, 11);
    if (want.empty()) want = y;
    CHECK_MESSAGE(same_bits(y.data(), want.data(), y.size()), set);
  }
}

}  // namespace dsv3::test
