// What both AVX-512 sets have in common: the vector type of micro_simd.h and the widening of
// weights. A template over a type local to the file that includes this (see micro.h for why).
#pragma once

#include <immintrin.h>

#include "kernels/cpu/micro_mx.h"

namespace dsv3::kernels::simd {

template <class Tag>
struct Simd512 {
  using V __attribute__((vector_size(64))) = float;
  using I __attribute__((vector_size(64))) = int32_t;
  static constexpr int kLanes = 16;
  static V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  static V bf16(const uint8_t* p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
  }
  static V f16(const uint8_t* p) {
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // E4M3 read as binary16 is 2^-8 of its value, subnormals included: sign-extended to 16 bits and
  // shifted left by seven, everything is in place but a copy of the sign in bit 14.
  static constexpr float kF8Unit = 256.0f;
  static void f8(const uint8_t* p, V* w) {
    const __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m512i half = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(codes), 7),
                                          _mm512_set1_epi16(static_cast<int16_t>(0xbfff)));
    w[0] = (V)_mm512_cvtph_ps(_mm512_castsi512_si256(half));
    w[1] = (V)_mm512_cvtph_ps(_mm512_extracti64x4_epi64(half, 1));
  }

  // MXFP4
  using B = __m512i;
  static constexpr bool kMxUnsigned = true;
  static V mx_scales(const uint8_t* p) {
    const __m512i codes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    // Code 0 is 2^-127, a subnormal number.
    return (V)_mm512_max_epi32(_mm512_slli_epi32(codes, 23), _mm512_set1_epi32(0x00400000));
  }
};

}  // namespace dsv3::kernels::simd
