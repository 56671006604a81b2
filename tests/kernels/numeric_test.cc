// Conversions of weights and latents against the definitions of the formats.
#include "kernels/numeric.h"

#include <doctest/doctest.h>

#include <cmath>
#include <limits>

#include "tests/kernels/kernel_test.h"

namespace dsv3::test {
namespace {

// The nearest of all values of a format, ties to the even code: the definition, by search.
template <class ToFloat>
uint32_t nearest(float f, uint32_t codes, uint32_t sign_bit, ToFloat to_float) {
  const double magnitude = std::abs(static_cast<double>(f));
  uint32_t best = 0;
  double best_distance = std::numeric_limits<double>::infinity();
  for (uint32_t code = 0; code < codes; ++code) {
    const double distance = std::abs(static_cast<double>(to_float(code)) - magnitude);
    if (distance < best_distance || (distance == best_distance && code % 2 == 0)) {
      best = code;
      best_distance = distance;
    }
  }
  return std::signbit(f) ? best | sign_bit : best;
}

}  // namespace

TEST_CASE("E4M3: all codes by definition, and back") {
  for (uint32_t code = 0; code < 256; ++code) {
    const float v = k::f8e4m3_to_float(static_cast<uint8_t>(code));
    const uint32_t exponent = code >> 3 & 15, mantissa = code & 7;
    if (exponent == 15 && mantissa == 7) {
      CHECK(std::isnan(v));
      continue;
    }
    double want = exponent == 0 ? std::ldexp(mantissa, -9)
                                : std::ldexp(8 + mantissa, static_cast<int>(exponent) - 10);
    if (code & 128) want = -want;
    CHECK(static_cast<double>(v) == want);
    CHECK(std::signbit(v) == (code >= 128));
    CHECK(k::f8e4m3_from_float(v) == code);
    // Every E4M3 value is a BF16 value: that is what the fast kernels widen to.
    CHECK(k::bf16_to_float(k::bf16_from_float(v)) == v);
  }
}

TEST_CASE("E4M3: rounding to nearest even, saturation, NaN") {
  Random random(50);
  const auto to_float = [](uint32_t code) {
    return k::f8e4m3_to_float(static_cast<uint8_t>(code));
  };
  for (int i = 0; i < 20000; ++i) {
    const float f = std::ldexp(random.uniform(), random.below(24) - 13);
    CHECK(k::f8e4m3_from_float(f) == nearest(f, 127, 128, to_float));
  }
  for (uint32_t code = 0; code < 126; ++code) {  // ties between neighbours
    const float middle = (to_float(code) + to_float(code + 1)) / 2;
    CHECK(k::f8e4m3_from_float(middle) == (code % 2 == 0 ? code : code + 1));
    CHECK(k::f8e4m3_from_float(std::nextafter(middle, 0.0f)) == code);
    CHECK(k::f8e4m3_from_float(std::nextafter(middle, 1e9f)) == code + 1);
  }
  CHECK(k::f8e4m3_from_float(1e30f) == 0x7e);
  CHECK(k::f8e4m3_from_float(-std::numeric_limits<float>::infinity()) == 0xfe);
  CHECK(k::f8e4m3_from_float(std::numeric_limits<float>::quiet_NaN()) == 0x7f);
  CHECK(k::f8e4m3_from_float(-0.0f) == 0x80);
  CHECK(k::f8e4m3_from_float(std::numeric_limits<float>::denorm_min()) == 0);
}

TEST_CASE("E2M1: all codes by definition, and back; rounding to nearest even, saturation") {
  const auto to_float = [](uint32_t code) { return k::e2m1_to_float(static_cast<uint8_t>(code)); };
  for (uint32_t code = 0; code < 16; ++code) {
    const uint32_t exponent = code >> 1 & 3, mantissa = code & 1;
    double want =
        exponent == 0 ? mantissa * 0.5 : std::ldexp(2 + mantissa, static_cast<int>(exponent) - 2);
    if (code & 8) want = -want;
    CHECK(static_cast<double>(to_float(code)) == want);
    CHECK(std::signbit(to_float(code)) == (code >= 8));
    CHECK(k::e2m1_from_float(to_float(code)) == code);
  }
  Random random(52);
  for (int i = 0; i < 2000; ++i) {
    const float f = random.uniform() * 7;
    CHECK(k::e2m1_from_float(f) == nearest(f, 8, 8, to_float));
  }
  for (uint32_t code = 0; code < 7; ++code) {  // ties between neighbours
    const float middle = (to_float(code) + to_float(code + 1)) / 2;
    CHECK(k::e2m1_from_float(middle) == (code % 2 == 0 ? code : code + 1));
    CHECK(k::e2m1_from_float(-std::nextafter(middle, 0.0f)) == (code | 8));
    CHECK(k::e2m1_from_float(std::nextafter(middle, 9.0f)) == code + 1);
  }
  CHECK(k::e2m1_from_float(1e30f) == 7);
  CHECK(k::e2m1_from_float(-std::numeric_limits<float>::infinity()) == 15);
  CHECK(k::e2m1_from_float(std::numeric_limits<float>::quiet_NaN()) % 8 == 7);
}

TEST_CASE("E8M0: all codes by definition") {
  for (int code = 0; code < 255; ++code) {
    CHECK(k::e8m0_to_float(static_cast<uint8_t>(code)) == std::ldexp(1.0f, code - 127));
  }
  CHECK(std::isnan(k::e8m0_to_float(255)));
}

TEST_CASE("F16: all codes and back, rounding") {
  for (uint32_t code = 0; code < 65536; ++code) {
    const float v = k::f16_to_float(static_cast<uint16_t>(code));
    if (std::isnan(v)) {
      CHECK((code & 0x7c00) == 0x7c00);
      continue;
    }
    CHECK(k::f16_from_float(v) == code);
  }
  CHECK(k::f16_to_float(0x3555) == 0.333251953125f);
  CHECK(k::f16_to_float(1) == 0x1p-24f);
  const auto to_float = [](uint32_t code) { return k::f16_to_float(static_cast<uint16_t>(code)); };
  Random random(51);
  for (int i = 0; i < 200; ++i) {
    const float f = std::ldexp(random.uniform(), random.below(42) - 26);
    CHECK(k::f16_from_float(f) == nearest(f, 0x7c00, 0x8000, to_float));
  }
  CHECK(k::f16_from_float(65519.0f) == 0x7bff);
  CHECK(k::f16_from_float(65520.0f) == 0x7c00);
  CHECK(std::isnan(k::f16_to_float(k::f16_from_float(std::numeric_limits<float>::quiet_NaN()))));
}

TEST_CASE("BF16: rounding to nearest even, specials") {
  CHECK(k::bf16_from_float(1.0f) == 0x3f80);
  CHECK(k::bf16_from_float(1.00390625f) == 0x3f80);   // a tie: even is below
  CHECK(k::bf16_from_float(1.01171875f) == 0x3f82);   // a tie: even is above
  CHECK(k::bf16_from_float(1.003906369f) == 0x3f81);  // just above the tie
  CHECK(k::bf16_from_float(std::numeric_limits<float>::max()) == 0x7f80);
  CHECK(k::bf16_from_float(-std::numeric_limits<float>::infinity()) == 0xff80);
  CHECK(std::isnan(k::bf16_to_float(k::bf16_from_float(std::numeric_limits<float>::quiet_NaN()))));
  for (uint32_t code = 0; code < 65536; ++code) {
    const float v = k::bf16_to_float(static_cast<uint16_t>(code));
    if (!std::isnan(v)) CHECK(k::bf16_from_float(v) == code);
  }
}

}  // namespace dsv3::test
