// AVX-512 with BF16 and VBMI: BF16 dot products (vdpbf16ps) on BF16 and on widened FP8 weights;
// F16 and F32 weights through float32.
//
// FP8 is widened by two look-ups of 128 bytes, one for each byte of the BF16 value; the sign is
// or-ed in. Subnormal codes come out exact, which arithmetic on the bits would not give:
// vdpbf16ps takes BF16 subnormals for zero.
#include <immintrin.h>

#include "kernels/cpu/micro_simd.h"

namespace dsv3::kernels {
namespace {

struct Avx512 {
  using V __attribute__((vector_size(64))) = float;
  using I __attribute__((vector_size(64))) = int32_t;
  static constexpr int kLanes = 16;
  static constexpr int kRows = 4;
  static V fma(V a, V b, V c) { return (V)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c); }
  static V bf16(const uint8_t* p) {
    const __m256i v = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (V)_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
  }
  static V f16(const uint8_t* p) {
    return (V)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  // E4M3 read as binary16 is 2^-8 of its value, subnormals included.
  static V f8(const uint8_t* p) {
    const __m256i v = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi16(v, 8), _mm256_set1_epi16(-0x8000));
    const __m256i rest = _mm256_and_si256(_mm256_slli_epi16(v, 7), _mm256_set1_epi16(0x3f80));
    return (V)_mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)), _mm512_set1_ps(256.0f));
  }
  static void store_native(void* p, int index, V v) {
    const __m256bh b = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(static_cast<uint8_t*>(p) + 2 * index, &b, sizeof b);
  }
};

// --- FP8 to BF16

struct ByteTables {
  uint8_t low[128];
  uint8_t high[128];
};
// The bytes of the BF16 values of the non-negative codes.
constexpr ByteTables make_byte_tables() {
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
alignas(64) constexpr ByteTables kTables = make_byte_tables();

struct Decoder {
  __m512i low0 = _mm512_load_si512(kTables.low);
  __m512i low1 = _mm512_load_si512(kTables.low + 64);
  __m512i high0 = _mm512_load_si512(kTables.high);
  __m512i high1 = _mm512_load_si512(kTables.high + 64);
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

inline __m512i load64(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline __m512i load32(const uint8_t* p) {
  return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512 dot(__m512 acc, __m512i w, uint32_t x) {
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)));
}

inline __m512 scale_vector(const TiledWeights& w, int32_t tile, int32_t k) {
  if (w.type != WeightType::kF8E4M3) return _mm512_set1_ps(1.0f);
  if (w.scale_n % 16 == 0) {
    return _mm512_set1_ps(
        w.scales[int64_t{tile * 16 / w.scale_n} * w.scale_columns + k / w.scale_k]);
  }
  float scale[16];
  simd::tile_scales<Avx512>(w, tile, k, scale);
  return _mm512_loadu_ps(scale);
}

// --- a few rows: weights are widened in registers and used at once

// Sums of kBlocks blocks of inputs (`pairs` pairs each) of one tile for kR rows. Several blocks go
// side by side so that one row has enough independent sums to hide the latency.
template <int kR, int kBlocks, bool kF8>
inline void direct_blocks(const Decoder& decoder, const uint8_t* w, int32_t pairs,
                          const uint32_t* const* x, __m512 (*acc)[kBlocks]) {
  constexpr int64_t kPairBytes = kF8 ? 32 : 64;
  const int64_t block_bytes = pairs * kPairBytes;
  for (int r = 0; r < kR; ++r) {
    for (int b = 0; b < kBlocks; ++b) acc[r][b] = _mm512_setzero_ps();
  }
  int32_t i = 0;
  for (; i + 2 <= pairs; i += 2) {
#pragma GCC unroll 4
    for (int b = 0; b < kBlocks; ++b) {
      const uint8_t* p = w + b * block_bytes + i * kPairBytes;
      __m512i w0, w1;
      if constexpr (kF8) {
        _mm_prefetch(p + kBlocks * 2048, _MM_HINT_T0);
        decoder.both(load64(p), &w0, &w1);
      } else {
        w0 = load64(p);
        w1 = load64(p + 64);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) {
        const uint32_t* xr = x[r] + b * pairs + i;
        acc[r][b] = dot(dot(acc[r][b], w0, xr[0]), w1, xr[1]);
      }
    }
  }
  if (i == pairs) return;
  for (int b = 0; b < kBlocks; ++b) {
    const uint8_t* p = w + b * block_bytes + i * kPairBytes;
    __m512i w0, w1;
    if constexpr (kF8) {
      decoder.both(load32(p), &w0, &w1);
    } else {
      w0 = load64(p);
    }
    for (int r = 0; r < kR; ++r) acc[r][b] = dot(acc[r][b], w0, x[r][b * pairs + i]);
  }
}

template <int kR, int kBlocks, bool kF8>
void direct_tile(const GemmArgs& a, const Decoder& decoder, int32_t t, int32_t first_row) {
  constexpr int64_t kPairBytes = kF8 ? 32 : 64;
  const int32_t all_pairs = (a.w.k + 1) / 2;
  const int32_t block_pairs = a.w.block_k / 2;
  const int32_t tile = a.tile + t;
  const uint8_t* w = a.w.data + int64_t{tile} * all_pairs * kPairBytes;
  const uint32_t* x[kR];
  __m512 out[kR];
  for (int r = 0; r < kR; ++r) {
    x[r] = static_cast<const uint32_t*>(a.x[first_row + r]);
    out[r] = _mm512_setzero_ps();
  }
  const auto add = [&](int32_t begin, const __m512* acc, int stride) {
    const __m512 scale = scale_vector(a.w, tile, 2 * begin);
    for (int r = 0; r < kR; ++r) out[r] = _mm512_fmadd_ps(acc[r * stride], scale, out[r]);
  };
  int32_t begin = 0;
  for (; begin + kBlocks * block_pairs <= all_pairs; begin += kBlocks * block_pairs) {
    __m512 acc[kR][kBlocks];
    const uint32_t* xb[kR];
    for (int r = 0; r < kR; ++r) xb[r] = x[r] + begin;
    direct_blocks<kR, kBlocks, kF8>(decoder, w + begin * kPairBytes, block_pairs, xb, acc);
    for (int b = 0; b < kBlocks; ++b) add(begin + b * block_pairs, &acc[0][b], kBlocks);
  }
  for (; begin < all_pairs; begin += block_pairs) {
    const int32_t left = all_pairs - begin;
    __m512 acc[kR][1];
    const uint32_t* xb[kR];
    for (int r = 0; r < kR; ++r) xb[r] = x[r] + begin;
    direct_blocks<kR, 1, kF8>(decoder, w + begin * kPairBytes,
                              left < block_pairs ? left : block_pairs, xb, acc);
    add(begin, &acc[0][0], 1);
  }
  for (int r = 0; r < kR; ++r) {
    _mm512_storeu_ps(a.out + (first_row + r) * a.out_stride + 16 * t, out[r]);
  }
}

template <bool kF8>
void direct(const GemmArgs& a) {
  const Decoder decoder;
  for (int32_t t = 0; t < a.tiles; ++t) {
    switch (a.rows) {
      case 1:
        direct_tile<1, 4, kF8>(a, decoder, t, 0);
        break;
      case 2:
        direct_tile<2, 4, kF8>(a, decoder, t, 0);
        break;
      case 3:
        direct_tile<3, 2, kF8>(a, decoder, t, 0);
        break;
      case 4:
        direct_tile<4, 2, kF8>(a, decoder, t, 0);
        break;
      case 5:
        direct_tile<5, 1, kF8>(a, decoder, t, 0);
        break;
      case 6:
        direct_tile<6, 1, kF8>(a, decoder, t, 0);
        break;
      case 7:
        direct_tile<7, 1, kF8>(a, decoder, t, 0);
        break;
      default:
        direct_tile<8, 1, kF8>(a, decoder, t, 0);
        break;
    }
  }
}
constexpr int32_t kDirectRows = 8;

// --- many rows: a block of weights lies widened in L1 and serves six rows at a time

constexpr int kPanelRows = 6;  // 6 rows x 4 tiles = 24 of the 32 registers

// acc[r][t] = sum over pairs of w[t][pair] * x[r][pair]
template <int kR, int kT>
inline void panel_dot(const uint8_t* w, int64_t tile_stride, int64_t pair_stride, int32_t pairs,
                      const uint32_t* const* x, __m512 (*acc)[kT]) {
  for (int r = 0; r < kR; ++r) {
    for (int t = 0; t < kT; ++t) acc[r][t] = _mm512_setzero_ps();
  }
  for (int32_t i = 0; i < pairs; ++i) {
    __m512i v[kT];
#pragma GCC unroll 4
    for (int t = 0; t < kT; ++t) v[t] = load64(w + t * tile_stride + i * pair_stride);
#pragma GCC unroll 6
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t) acc[r][t] = dot(acc[r][t], v[t], x[r][i]);
    }
  }
}

template <int kR, int kT>
inline void gemm_rows(const GemmArgs& a, const uint8_t* w, int64_t tile_stride, int32_t begin,
                      int32_t pairs, int32_t row, const __m512* scale) {
  const uint32_t* x[kR];
  for (int r = 0; r < kR; ++r) x[r] = static_cast<const uint32_t*>(a.x[row + r]) + begin;
  __m512 acc[kR][kT];
  panel_dot<kR, kT>(w, tile_stride, 64, pairs, x, acc);
  for (int r = 0; r < kR; ++r) {
    float* out = a.out + (row + r) * a.out_stride;
    for (int t = 0; t < kT; ++t) {
      const __m512 before = begin == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(out + 16 * t);
      _mm512_storeu_ps(out + 16 * t, _mm512_fmadd_ps(acc[r][t], scale[t], before));
    }
  }
}

template <int kT>
void gemm_block(const GemmArgs& a, const uint8_t* w, int64_t tile_stride, int32_t begin,
                int32_t pairs) {
  __m512 scale[kT];
  for (int t = 0; t < kT; ++t) scale[t] = scale_vector(a.w, a.tile + t, 2 * begin);
  int32_t row = 0;
  for (; row + kPanelRows <= a.rows; row += kPanelRows) {
    gemm_rows<kPanelRows, kT>(a, w, tile_stride, begin, pairs, row, scale);
  }
  switch (a.rows - row) {
    case 1:
      gemm_rows<1, kT>(a, w, tile_stride, begin, pairs, row, scale);
      break;
    case 2:
      gemm_rows<2, kT>(a, w, tile_stride, begin, pairs, row, scale);
      break;
    case 3:
      gemm_rows<3, kT>(a, w, tile_stride, begin, pairs, row, scale);
      break;
    case 4:
      gemm_rows<4, kT>(a, w, tile_stride, begin, pairs, row, scale);
      break;
    case 5:
      gemm_rows<5, kT>(a, w, tile_stride, begin, pairs, row, scale);
      break;
    default:
      break;
  }
}

// Widens `pairs` pairs of one tile to BF16.
inline void decode_tile(const Decoder& decoder, const uint8_t* w, int32_t pairs, uint8_t* out) {
  int32_t i = 0;
  __m512i w0, w1;
  for (; i + 2 <= pairs; i += 2) {
    decoder.both(load64(w + 32 * i), &w0, &w1);
    _mm512_store_si512(out + 64 * i, w0);
    _mm512_store_si512(out + 64 * i + 64, w1);
  }
  if (i == pairs) return;
  decoder.both(load32(w + 32 * i), &w0, &w1);
  _mm512_store_si512(out + 64 * i, w0);
}

void gemm_many(const GemmArgs& a) {
  const Decoder decoder;
  const bool f8 = a.w.type == WeightType::kF8E4M3;
  auto* scratch = static_cast<uint8_t*>(a.scratch);
  const int64_t pair_bytes = f8 ? 32 : 64;
  const int32_t all_pairs = (a.w.k + 1) / 2;
  const int32_t block_pairs = a.w.block_k / 2;
  const uint8_t* first = a.w.data + int64_t{a.tile} * all_pairs * pair_bytes;
  for (int32_t begin = 0; begin < all_pairs; begin += block_pairs) {
    const int32_t left = all_pairs - begin;
    const int32_t pairs = left < block_pairs ? left : block_pairs;
    const uint8_t* w = first + begin * pair_bytes;
    int64_t tile_stride = all_pairs * pair_bytes;
    if (f8) {
      for (int32_t t = 0; t < a.tiles; ++t) {
        decode_tile(decoder, w + t * tile_stride, pairs, scratch + int64_t{t} * pairs * 64);
      }
      w = scratch;
      tile_stride = int64_t{pairs} * 64;
    }
    switch (a.tiles) {
      case 1:
        gemm_block<1>(a, w, tile_stride, begin, pairs);
        break;
      case 2:
        gemm_block<2>(a, w, tile_stride, begin, pairs);
        break;
      case 3:
        gemm_block<3>(a, w, tile_stride, begin, pairs);
        break;
      default:
        gemm_block<4>(a, w, tile_stride, begin, pairs);
        break;
    }
  }
}

void gemm(const GemmArgs& a) {
  if (a.w.type == WeightType::kF32 || a.w.type == WeightType::kF16) {
    simd::gemm<Avx512>(a);
  } else if (a.rows > kDirectRows) {
    gemm_many(a);
  } else if (a.w.type == WeightType::kF8E4M3) {
    direct<true>(a);
  } else {
    direct<false>(a);
  }
}

// --- attention

template <int kR>
inline void panel_rows(const PanelArgs& a, int32_t row) {
  const uint32_t* x[kR];
  for (int r = 0; r < kR; ++r) x[r] = static_cast<const uint32_t*>(a.x[row + r]);
  __m512 acc[kR][4];
  panel_dot<kR, 4>(a.w, 64, 256, a.pairs, x, acc);
  for (int r = 0; r < kR; ++r) {
    float* out = a.out + (row + r) * a.out_stride;
    if (a.keep == nullptr) {
      for (int t = 0; t < 4; ++t) _mm512_storeu_ps(out + 16 * t, acc[r][t]);
      continue;
    }
    const __m512 keep = _mm512_set1_ps(a.keep[row + r]);
    for (int t = 0; t < 4; ++t) {
      const __m512 before = _mm512_loadu_ps(out + 16 * t);
      _mm512_storeu_ps(out + 16 * t, _mm512_fmadd_ps(before, keep, acc[r][t]));
    }
  }
}

void panel(const PanelArgs& a) {
  int32_t row = 0;
  for (; row + kPanelRows <= a.rows; row += kPanelRows) panel_rows<kPanelRows>(a, row);
  switch (a.rows - row) {
    case 1:
      panel_rows<1>(a, row);
      break;
    case 2:
      panel_rows<2>(a, row);
      break;
    case 3:
      panel_rows<3>(a, row);
      break;
    case 4:
      panel_rows<4>(a, row);
      break;
    case 5:
      panel_rows<5>(a, row);
      break;
    default:
      break;
  }
}

void pack(Activation type, const float* x, int32_t k, int32_t padded, void* out) {
  if (type == Activation::kF32) {
    simd::pack_f32<Avx512>(x, k, padded, static_cast<float*>(out));
    return;
  }
  auto* p = static_cast<uint8_t*>(out);
  for (int32_t i = 0; i < padded; i += 16) {
    const int32_t have = k - i < 16 ? (k - i > 0 ? k - i : 0) : 16;
    const int32_t want = padded - i < 16 ? padded - i : 16;
    const auto in_mask = static_cast<__mmask16>((1u << have) - 1);
    const auto out_mask = static_cast<__mmask16>((1u << want) - 1);
    const __m512 v = _mm512_maskz_loadu_ps(in_mask, x + i);
    _mm256_mask_storeu_epi16(p + 2 * i, out_mask, (__m256i)_mm512_cvtneps_pbh(v));
  }
}

constexpr Activation kF32 = Activation::kF32;
constexpr Activation kBF16 = Activation::kBF16;
constexpr Micro kMicro = {
    "avx512bf16",
    kBF16,
    {kF32, kBF16, kF32, kBF16},
    pack,
    gemm,
    simd::gemm<Avx512>,
    panel,
    simd::values<Avx512>,
    simd::softmax<Avx512>,
    simd::merge<Avx512>,
    simd::rms_norm<Avx512>,
    simd::silu_mul<Avx512>,
    simd::add<Avx512>,
    simd::add_weighted<Avx512>,
    simd::reduce<Avx512>,
};

}  // namespace

const Micro* micro_avx512bf16() { return &kMicro; }

}  // namespace dsv3::kernels
