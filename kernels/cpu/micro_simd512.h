// The vector type of micro_simd.h for both AVX-512 sets, the widening of FP8, and a latent page
// rearranged for sums over keys. Templates over a type local to the file that includes this (see
// micro.h for why).
#pragma once

#include <immintrin.h>

#include "kernels/cpu/fp8_tables.h"
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

// FP8 to BF16, by two look-ups of 128 bytes, one for each byte of the result; the sign is or-ed in.
// Subnormal codes come out exact, which arithmetic on the bits would not give: vdpbf16ps takes BF16
// subnormals for zero. Needs VBMI.
template <class Tag>
struct Fp8Decoder {
  __m512i low0 = _mm512_load_si512(kByteTables.low);
  __m512i low1 = _mm512_load_si512(kByteTables.low + 64);
  __m512i high0 = _mm512_load_si512(kByteTables.high);
  __m512i high1 = _mm512_load_si512(kByteTables.high + 64);
  __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  __m512i sign = _mm512_set1_epi8(-0x80);

  // 64 codes, two pairs of inputs of 16 rows, to two vectors of BF16. The eight-byte groups of the
  // pairs are interleaved first, so that unpacking within 16-byte lanes ends in order.
  inline void both(__m512i codes, __m512i* w0, __m512i* w1) const {
    const __m512i c = _mm512_permutexvar_epi64(order, codes);
    const __m512i low = _mm512_permutex2var_epi8(low0, c, low1);
    __m512i high = _mm512_permutex2var_epi8(high0, c, high1);
    high = _mm512_ternarylogic_epi64(high, c, sign, 0xf8);  // high | (c & sign)
    *w0 = _mm512_unpacklo_epi8(low, high);
    *w1 = _mm512_unpackhi_epi8(low, high);
  }
};

// The middle two of every four values trade places: two keys of two dims, transposed.
template <class Tag>
inline __m512i swap_middle(__m512i v) {
  return _mm512_shuffle_epi8(v, _mm512_set4_epi32(0x0f0e0b0a, 0x0d0c0908, 0x07060302, 0x05040100));
}

// 16 keys of 16 dims: eight rows (dim pairs) of eight key pairs (four values each) are transposed
// to eight rows of eight dim pairs. Loads put the 16-byte pieces in place, which leaves one
// unpacking for the shuffle units: transposing whole vectors by shuffles alone takes a CPU with
// narrow ones (Zen 4) twice as long.
template <class Tag>
inline __m512i gather_pieces(const uint8_t* page, int32_t pairs) {
  // Rows 0, 2, 4 and 6 from `page` on; those beyond `pairs` are zero.
  constexpr int64_t kTwoRows = int64_t{2} * kPageKeys * 4;
  const auto piece = [&](int i) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(page + i * kTwoRows));
  };
  __m512i v = _mm512_zextsi128_si512(pairs > 0 ? piece(0) : _mm_setzero_si128());
  if (pairs > 2) v = _mm512_mask_broadcast_i32x4(v, 0x00f0, piece(1));
  if (pairs > 4) v = _mm512_mask_broadcast_i32x4(v, 0x0f00, piece(2));
  if (pairs > 6) v = _mm512_mask_broadcast_i32x4(v, 0xf000, piece(3));
  return v;
}

// Of up to eight rows, keys of `keys` only; the others become zero.
template <class Tag>
inline void transpose_some(const uint8_t* page, int32_t pairs, __mmask16 keys, uint8_t* out) {
  for (int i = 0; i < 4; ++i) {  // key pairs 2i and 2i + 1
    __m512i even = gather_pieces<Tag>(page + 16 * i, pairs);
    __m512i odd = gather_pieces<Tag>(page + 16 * i + kPageKeys * 4, pairs - 1);
    const auto mask = static_cast<__mmask16>(((keys >> (4 * i)) & 0xf) * 0x1111);
    even = swap_middle<Tag>(_mm512_maskz_mov_epi32(mask, even));
    odd = swap_middle<Tag>(_mm512_maskz_mov_epi32(mask, odd));
    _mm512_storeu_si512(out + int64_t{2} * i * 256, _mm512_unpacklo_epi64(even, odd));
    _mm512_storeu_si512(out + (int64_t{2} * i + 1) * 256, _mm512_unpackhi_epi64(even, odd));
  }
}

// Of all eight rows, all keys. Without the questions of transpose_some() it takes two thirds of its
// time.
template <class Tag>
[[gnu::always_inline]] inline void transpose_pieces(const uint8_t* page, uint8_t* out) {
  for (int i = 0; i < 4; ++i) {
    const __m512i even = swap_middle<Tag>(gather_pieces<Tag>(page + 16 * i, 8));
    const __m512i odd = swap_middle<Tag>(gather_pieces<Tag>(page + 16 * i + kPageKeys * 4, 8));
    _mm512_storeu_si512(out + int64_t{2} * i * 256, _mm512_unpacklo_epi64(even, odd));
    _mm512_storeu_si512(out + (int64_t{2} * i + 1) * 256, _mm512_unpackhi_epi64(even, odd));
  }
}

// The same from 32-byte pieces: half the loads, and two more steps for each vector in the shuffle
// units. Where those are wide (Zen 5) it takes two thirds of the other's time.
template <class Tag>
[[gnu::always_inline]] inline void transpose_halves(const uint8_t* page, uint8_t* out) {
  constexpr int64_t kRow = int64_t{kPageKeys} * 4;
  const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 4, 5, 12, 13);
  const __m512i second = _mm512_setr_epi64(2, 3, 10, 11, 6, 7, 14, 15);
  for (int half = 0; half < 2; ++half) {  // key pairs 4 half ... 4 half + 3
    // Rows r and r + 4.
    const auto rows = [&](int r) {
      const auto* p = reinterpret_cast<const __m256i*>(page + 32 * half + r * kRow);
      const auto* q = reinterpret_cast<const __m256i*>(page + 32 * half + (r + 4) * kRow);
      return _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256(p)),
                                _mm256_loadu_si256(q), 1);
    };
    // Of rows 0, 1, 4, 5 and of 2, 3, 6, 7: key pairs 0 and 2, and 1 and 3, of this half.
    const __m512i r0 = rows(0), r1 = rows(1), r2 = rows(2), r3 = rows(3);
    const __m512i even0 = _mm512_unpacklo_epi64(r0, r1), odd0 = _mm512_unpackhi_epi64(r0, r1);
    const __m512i even2 = _mm512_unpacklo_epi64(r2, r3), odd2 = _mm512_unpackhi_epi64(r2, r3);
    const __m512i pairs[4] = {_mm512_permutex2var_epi64(even0, first, even2),
                              _mm512_permutex2var_epi64(odd0, first, odd2),
                              _mm512_permutex2var_epi64(even0, second, even2),
                              _mm512_permutex2var_epi64(odd0, second, odd2)};
    for (int i = 0; i < 4; ++i) {
      _mm512_storeu_si512(out + (int64_t{4} * half + i) * 256, swap_middle<Tag>(pairs[i]));
    }
  }
}

// kHalves: is transpose_halves() the faster one here?
template <class Tag, bool kHalves>
void page_values(const uint8_t* page, int32_t dims, int32_t begin, int32_t end, int32_t pair_begin,
                 int32_t pairs_total, uint8_t* out) {
  const uint64_t below_end = end >= 64 ? ~uint64_t{0} : (uint64_t{1} << end) - 1;
  const uint64_t wanted = begin >= 64 ? 0 : below_end & ~uint64_t{0} << begin;
  for (int32_t d = 0; d < dims; d += 16) {
    const int32_t pairs = (dims - d + 1) / 2;
    uint8_t* columns = out + (int64_t{d / 64} * pairs_total + pair_begin) * 256 + d % 64 * 4;
    for (int32_t key = 0; key < kPageKeys; key += 16) {
      const uint8_t* from = page + (int64_t{d / 2} * kPageKeys + key) * 4;
      uint8_t* to = columns + int64_t{key / 2} * 256;
      const auto keys = static_cast<__mmask16>(wanted >> key);
      if (keys == 0) {
        for (int i = 0; i < 8; ++i) _mm512_storeu_si512(to + int64_t{i} * 256, __m512i{});
      } else if (keys != 0xffff || pairs < 8) {
        transpose_some<Tag>(from, pairs, keys, to);
      } else if (kHalves) {
        transpose_halves<Tag>(from, to);
      } else {
        transpose_pieces<Tag>(from, to);
      }
    }
  }
}

}  // namespace dsv3::kernels::simd
