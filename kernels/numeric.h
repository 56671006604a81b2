// Conversions between float32 and the storage types of weights and latents, exact or rounded to
// nearest even, without any instruction set. Used by ref/ and portable kernels and by the converter
// in runtime/model.
#pragma once

#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>

namespace dsv3::kernels {

// BF16: the upper half of a float32.
constexpr float bf16_to_float(uint16_t v) {
  return std::bit_cast<float>(static_cast<uint32_t>(v) << 16);
}
// Round to nearest even; NaN stays a (quiet) NaN, overflow becomes infinity, subnormals are kept.
constexpr uint16_t bf16_from_float(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

// IEEE binary16.
constexpr float f16_to_float(uint16_t v) {
  const uint32_t sign = static_cast<uint32_t>(v & 0x8000u) << 16;
  const uint32_t exponent = (v >> 10) & 0x1fu;
  const uint32_t mantissa = v & 0x3ffu;
  if (exponent == 0) {  // zero and subnormals: mantissa * 2^-24, exact in float32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}
constexpr uint16_t f16_from_float(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 65520
  if (magnitude < 0x38800000u) {  // below 2^-14: subnormal, in units of 2^-24
    if (magnitude < 0x33000000u) return static_cast<uint16_t>(sign);  // below 2^-25
    const uint32_t shift = 126u - (magnitude >> 23);                  // 14 .. 24
    const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    uint32_t result = mantissa >> shift;
    const uint32_t rest = mantissa & ((1u << shift) - 1);
    const uint32_t half = 1u << (shift - 1);
    if (rest > half || (rest == half && (result & 1u) != 0)) ++result;
    return static_cast<uint16_t>(sign | result);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

// FP8 E4M3 (the "FN" variant): bias 7, largest finite value 448, no infinities, S.1111.111 is NaN.
constexpr float f8e4m3_to_float(uint8_t v) {
  const uint32_t sign = static_cast<uint32_t>(v & 0x80u) << 24;
  const uint32_t exponent = (v >> 3) & 0xfu;
  const uint32_t mantissa = v & 7u;
  if ((v & 0x7fu) == 0x7fu) return std::bit_cast<float>(sign | 0x7fc00000u);
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-9f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  return std::bit_cast<float>(sign | ((exponent + 120) << 23) | (mantissa << 20));
}
// Round to nearest even, saturating at +-448 (infinities too); NaN gives 0x7F.
constexpr uint8_t f8e4m3_from_float(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return 0x7fu;
  if (magnitude >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7eu);  // >= 448
  if (magnitude < 0x3c800000u) {  // below 2^-6: subnormal, in units of 2^-9
    if (magnitude < 0x3a800000u) return static_cast<uint8_t>(sign);  // below 2^-10
    const uint32_t shift = 141u - (magnitude >> 23);                 // 21 .. 24
    const uint32_t mantissa = (magnitude & 0x7fffffu) | 0x800000u;
    uint32_t result = mantissa >> shift;
    const uint32_t rest = mantissa & ((1u << shift) - 1);
    const uint32_t half = 1u << (shift - 1);
    if (rest > half || (rest == half && (result & 1u) != 0)) ++result;
    return static_cast<uint8_t>(sign | result);
  }
  const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1u);
  const uint32_t code = (rounded - 0x3c000000u) >> 20;
  return static_cast<uint8_t>(sign | (code > 0x7eu ? 0x7eu : code));
}

// E2M1, the elements of MXFP4 (OCP Microscaling Formats v1.0, 5.3.3): a sign bit, then 0, 0.5, 1,
// 1.5, 2, 3, 4, 6. No infinities, no NaN.
constexpr float e2m1_to_float(uint8_t v) {
  constexpr float kValues[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  const float magnitude = kValues[v & 7u];
  return (v & 8u) != 0 ? -magnitude : magnitude;
}
// Round to nearest even, saturating at +-6 (infinities too); NaN gives 6. No branches, so that
// loops over it become vectors.
constexpr uint8_t e2m1_from_float(float f) {
  const uint32_t bits = std::bit_cast<uint32_t>(f);
  const float a = std::bit_cast<float>(bits & 0x7fffffffu);
  const int code = int{!(a <= 0.25f)} + int{!(a < 0.75f)} + int{!(a <= 1.25f)} + int{!(a < 1.75f)} +
                   int{!(a <= 2.5f)} + int{!(a < 3.5f)} + int{!(a <= 5.0f)};
  return static_cast<uint8_t>(static_cast<uint32_t>(code) | (bits >> 31 << 3));
}
// E8M0, the scales of MXFP4: 2^(v - 127); 255 is NaN.
constexpr float e8m0_to_float(uint8_t v) {
  if (v == 255) return std::bit_cast<float>(0x7fc00000u);
  return std::bit_cast<float>(v == 0 ? 0x00400000u : static_cast<uint32_t>(v) << 23);
}

// All 256 values of E4M3.
inline constexpr std::array<float, 256> kF8E4M3Table = [] {
  std::array<float, 256> table{};
  for (int i = 0; i < 256; ++i) {
    table[static_cast<std::size_t>(i)] = f8e4m3_to_float(static_cast<uint8_t>(i));
  }
  return table;
}();

}  // namespace dsv3::kernels
