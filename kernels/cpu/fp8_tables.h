// E4M3 codes as BF16, for the sets that widen FP8 by looking up bytes: numbers, made while
// compiling, and no function that could be linked elsewhere (see micro.h).
#pragma once

#include <cstdint>

namespace dsv3::kernels::simd {

struct ByteTables {
  uint8_t low[128];
  uint8_t high[128];
};
// The bytes of the BF16 values of the non-negative codes.
consteval ByteTables make_byte_tables() {
  ByteTables t{};
  for (uint32_t code = 0; code < 128; ++code) {
    const uint32_t exponent = code >> 3;
    const uint32_t mantissa = code & 7;
    uint32_t bits = 0;
    if (code == 0x7f) {
      bits = 0x7fc0;
    } else if (exponent != 0) {
      bits = ((exponent + 120) << 7) | (mantissa << 4);
    } else if (mantissa != 0) {  // mantissa * 2^-9, normalised
      const uint32_t top = mantissa >= 4 ? 2 : mantissa >= 2 ? 1 : 0;
      bits = ((127 - 9 + top) << 7) | (((mantissa << (7 - top)) & 0x7f));
    }
    t.low[code] = static_cast<uint8_t>(bits & 0xff);
    t.high[code] = static_cast<uint8_t>(bits >> 8);
  }
  return t;
}
alignas(64) inline constexpr ByteTables kByteTables = make_byte_tables();

}  // namespace dsv3::kernels::simd
