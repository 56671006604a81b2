#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "kernels/numeric.h"
#include "runtime/model/repack.h"
#include "tests/unit/model_support.h"

using namespace dsv3;
using namespace dsv3::test;
using kernels::DType;

TEST_CASE("first_non_finite finds the one bad value, wherever it stands") {
  for (const size_t count : {1u, 2u, 15u, 4095u, 4096u, 4097u, 9000u}) {
    for (const size_t at : {size_t{0}, count / 2, count - 1}) {
      std::vector<float> f32(count, 1.5f);
      CHECK(first_non_finite(reinterpret_cast<uint8_t*>(f32.data()), DType::kF32, count) == -1);
      f32[at] = at % 2 == 0 ? std::numeric_limits<float>::infinity() : NAN;
      CHECK(first_non_finite(reinterpret_cast<uint8_t*>(f32.data()), DType::kF32, count) ==
            static_cast<int64_t>(at));
      std::vector<uint16_t> half(count, 0x3c00);
      half[at] = 0xfc00;
      CHECK(first_non_finite(reinterpret_cast<uint8_t*>(half.data()), DType::kF16, count) ==
            static_cast<int64_t>(at));
      half[at] = 0x7f80;
      CHECK(first_non_finite(reinterpret_cast<uint8_t*>(half.data()), DType::kBF16, count) ==
            static_cast<int64_t>(at));
      std::vector<uint8_t> fp8(count, 0x7e);
      CHECK(first_non_finite(fp8.data(), DType::kF8E4M3, count) == -1);
      fp8[at] = at % 2 == 0 ? 0x7f : 0xff;
      CHECK(first_non_finite(fp8.data(), DType::kF8E4M3, count) == static_cast<int64_t>(at));
    }
  }
}

TEST_CASE("tile_rows puts every element where the layout says, ragged sizes included") {
  for (const size_t element : {1u, 2u, 4u}) {
    for (const auto& [n, k] : {std::pair(16, 2), std::pair(1, 1), std::pair(17, 5),
                               std::pair(31, 64), std::pair(48, 33), std::pair(5, 128)}) {
      std::vector<uint8_t> rows(static_cast<size_t>(n * k) * element);
      for (size_t i = 0; i < rows.size(); ++i) rows[i] = static_cast<uint8_t>(i * 7 + 1);
      const int panels = (n + 15) / 16, pairs = (k + 1) / 2;
      std::vector<uint8_t> out(static_cast<size_t>(panels * pairs * 32) * element, 0xaa);
      tile_rows(rows.data(), element, n, k, out.data());
      int wrong = 0;
      for (int i = 0; i < panels * 16; ++i) {
        for (int j = 0; j < pairs * 2; ++j) {
          for (size_t b = 0; b < element; ++b) {
            const auto at =
                static_cast<size_t>(((i / 16 * pairs + j / 2) * 16 + i % 16) * 2 + j % 2);
            const uint8_t expected =
                i < n && j < k ? rows[static_cast<size_t>(i * k + j) * element + b] : 0;
            wrong += out[at * element + b] != expected ? 1 : 0;
          }
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE("quantise_rows: every value takes the nearest code of its block") {
  Random random;
  for (const auto& [n, k] : {std::pair(1, 1), std::pair(128, 128), std::pair(130, 257)}) {
    std::vector<float> x(static_cast<size_t>(n * k));
    for (float& v : x)
      v = random.uniform() * std::ldexp(1.0f, static_cast<int>(random.next() % 12));
    const int64_t columns = (k + 127) / 128;
    std::vector<uint8_t> codes(x.size());
    std::vector<float> scales(static_cast<size_t>((n + 127) / 128 * columns));
    quantise_rows(x.data(), n, k, codes.data(), scales.data());
    int wrong = 0;
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < k; ++j) {
        const auto at = static_cast<size_t>(i * k + j);
        const float scaled = x[at] / scales[static_cast<size_t>(i / 128 * columns + j / 128)];
        const double error = std::fabs(e4m3_value(codes[at]) - static_cast<double>(scaled));
        for (int code = 0; code < 256; ++code) {
          const double other = e4m3_value(static_cast<uint8_t>(code));
          if (std::fabs(other - static_cast<double>(scaled)) < error) ++wrong;
        }
      }
    }
    CHECK(wrong == 0);
  }
}
