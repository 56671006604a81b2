// AVX-512 with BF16, VBMI and VNNI: BF16 dot products (vdpbf16ps) on BF16 and on widened FP8
// weights; INT8 dot products (vpdpbusd) on MXFP4; F16 and F32 weights through float32.
#include "kernels/cpu/micro_few512.h"
#include "kernels/cpu/micro_simd512.h"

namespace dsv3::kernels {
namespace {

struct Avx512 : simd::Simd512<Avx512> {
  static constexpr int kRows = 8;
  static constexpr int kTiles = 4;
  static void store_native(void* p, int index, V v) {
    const __m256bh b = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(static_cast<uint8_t*>(p) + 2 * index, &b, sizeof b);
  }

  // MXFP4: vpermb looks at six bits of a byte, so with the table four times over the other half of
  // a packed byte needs no masking.
  static constexpr int kMxRows = 3;
  static constexpr int kMxTiles = 4;
  static constexpr int kMxOneRowTiles = 1;
  static constexpr int kMxDirect = 8;
  static constexpr int kMxAhead = 6 * mx::kGroupBytes;
  struct Sum {
    __m512i sum;
    void begin(int32_t offset) { sum = _mm512_set1_epi32(offset); }
    void dot(B w, const int8_t* x) {
      int32_t four;
      __builtin_memcpy(&four, x, sizeof four);
      sum = _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(four));
    }
    void half() {}
    I total() const { return (I)sum; }
  };
  static void mx_widen(const uint8_t* p, B* lo, B* hi);
};

constexpr mx::Table<Avx512> kMxTable;
inline void Avx512::mx_widen(const uint8_t* p, B* lo, B* hi) {
  const __m512i table = _mm512_load_si512(kMxTable.values);
  const __m512i packed = _mm512_loadu_si512(p);
  *lo = _mm512_permutexvar_epi8(packed, table);
  *hi = _mm512_permutexvar_epi8(_mm512_srli_epi16(packed, 4), table);
}

using Decoder = simd::Fp8Decoder<Avx512>;
using Scales = few::Scales<Avx512>;
using Fetch = few::Fetch;
inline __m512i load64(const uint8_t* p) { return few::load64<Avx512>(p); }
inline __m512i load32(const uint8_t* p) { return few::load32<Avx512>(p); }
inline __m512 dot(__m512 acc, __m512i w, uint32_t x) { return few::dot<Avx512>(acc, w, x); }

// --- many rows: a block of weights lies widened in L1 and serves six rows at a time

constexpr int kPanelRows = 6;  // 6 rows x 4 tiles = 24 of the 32 registers

constexpr int64_t kLine = 64;  // bytes of a cache line

// What to fetch while the block before it is multiplied: `times` times, for every `every` pairs, a
// cache line of each tile. Each pass over the rows fetches a part, so that memory is asked evenly.
struct Ahead {
  const uint8_t* w = nullptr;
  int64_t tile_stride = 0;  // from one tile's line to the next one's
  int64_t step = kLine;     // from one line of a tile to its next
  int32_t every = 1;
  int32_t times = 0;
};

template <int kR, int kT>
inline void panel_dot(const uint8_t* w, int64_t tile_stride, int64_t pair_stride, int32_t pairs,
                      const uint32_t* const* x, __m512 (*acc)[kT], const Ahead& ahead = {}) {
  for (int r = 0; r < kR; ++r) {
    for (int t = 0; t < kT; ++t) acc[r][t] = _mm512_setzero_ps();
  }
  const uint8_t* line = ahead.w;
  int32_t left = line == nullptr ? 0 : ahead.times;
  int32_t due = left > 0 ? 0 : -1;
  for (int32_t i = 0; i < pairs; ++i) {
    __m512i v[kT];
#pragma GCC unroll 4
    for (int t = 0; t < kT; ++t) v[t] = load64(w + t * tile_stride + i * pair_stride);
    if (i == due) {
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t) _mm_prefetch(line + t * ahead.tile_stride, _MM_HINT_T0);
      line += ahead.step;
      due = --left > 0 ? due + ahead.every : -1;
    }
#pragma GCC unroll 6
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t) acc[r][t] = dot(acc[r][t], v[t], x[r][i]);
    }
  }
}

// The inputs of some later rows, into L1: those of a prompt come from L3 or memory, for what one
// block needs of a panel's rows alone fills L1. Inlined by force: GCC 12 drops calls of a function
// that does nothing but fetch.
constexpr int32_t kRowsAhead = 2 * kPanelRows;
constexpr int32_t kFetchedRows = 32;  // of so many rows the inputs stay in L1
[[gnu::always_inline]] inline void fetch_inputs(const GemmArgs& a, int32_t begin, int32_t pairs,
                                                int32_t row, int32_t rows) {
  const int32_t end = row + rows < a.rows ? row + rows : a.rows;
  for (; row < end; ++row) {
    const auto* x = static_cast<const uint32_t*>(a.x[row]) + begin;
    for (int32_t i = 0; i < pairs; i += 16) _mm_prefetch(x + i, _MM_HINT_T0);
  }
}

template <Fetch kFetch, int kR, int kT>
inline void gemm_rows(const GemmArgs& a, const uint8_t* w, int64_t tile_stride, int32_t begin,
                      int32_t pairs, int32_t row, const __m512* scale, const Ahead& ahead) {
  const uint32_t* x[kR];
  for (int r = 0; r < kR; ++r) x[r] = static_cast<const uint32_t*>(a.x[row + r]) + begin;
  __m512 acc[kR][kT];
  if (kFetch == Fetch::kNextIntoL1 && a.rows > kFetchedRows) {
    fetch_inputs(a, begin, pairs, row + kRowsAhead, kR);
  }
  panel_dot<kR, kT>(w, tile_stride, 64, pairs, x, acc, ahead);
  for (int r = 0; r < kR; ++r) {
    float* out = a.out + (row + r) * a.out_stride;
    for (int t = 0; t < kT; ++t) {
      const __m512 before = begin == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(out + 16 * t);
      _mm512_storeu_ps(out + 16 * t, _mm512_fmadd_ps(acc[r][t], scale[t], before));
    }
  }
}

template <Fetch kFetch, int kT>
void gemm_block(const GemmArgs& a, const Scales& scales, const uint8_t* w, int64_t tile_stride,
                int32_t begin, int32_t pairs, Ahead ahead) {
  __m512 scale[kT];
  for (int t = 0; t < kT; ++t) scale[t] = scales.get(t, begin / (a.w.block_k / 2));
  int32_t row = 0;
  ahead.every *= (a.rows + kPanelRows - 1) / kPanelRows;
  ahead.times = (pairs + ahead.every - 1) / ahead.every;
  const int64_t part = ahead.step * ahead.times;
  for (; row + kPanelRows <= a.rows; row += kPanelRows) {
    gemm_rows<kFetch, kPanelRows, kT>(a, w, tile_stride, begin, pairs, row, scale, ahead);
    if (ahead.w != nullptr) ahead.w += part;
  }
  switch (a.rows - row) {
    case 1:
      gemm_rows<kFetch, 1, kT>(a, w, tile_stride, begin, pairs, row, scale, ahead);
      break;
    case 2:
      gemm_rows<kFetch, 2, kT>(a, w, tile_stride, begin, pairs, row, scale, ahead);
      break;
    case 3:
      gemm_rows<kFetch, 3, kT>(a, w, tile_stride, begin, pairs, row, scale, ahead);
      break;
    case 4:
      gemm_rows<kFetch, 4, kT>(a, w, tile_stride, begin, pairs, row, scale, ahead);
      break;
    case 5:
      gemm_rows<kFetch, 5, kT>(a, w, tile_stride, begin, pairs, row, scale, ahead);
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

template <Fetch kFetch>
void gemm_many(const GemmArgs& a) {
  const Decoder decoder;
  const Scales scales(a);
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
    int64_t tile_stride = all_pairs * pair_bytes * a.tile_step;
    // The next block of these tiles, or the first of the next ones.
    Ahead ahead{.w = left > pairs ? w + pairs * pair_bytes : a.next,
                .tile_stride = tile_stride,
                .every = f8 ? 2 : 1};
    if (f8) {
      for (int32_t t = 0; t < a.tiles; ++t) {
        decode_tile(decoder, w + t * tile_stride, pairs, scratch + int64_t{t} * pairs * 64);
      }
      w = scratch;
      tile_stride = int64_t{pairs} * 64;
    }
    switch (a.tiles) {
      case 1:
        gemm_block<kFetch, 1>(a, scales, w, tile_stride, begin, pairs, ahead);
        break;
      case 2:
        gemm_block<kFetch, 2>(a, scales, w, tile_stride, begin, pairs, ahead);
        break;
      case 3:
        gemm_block<kFetch, 3>(a, scales, w, tile_stride, begin, pairs, ahead);
        break;
      default:
        gemm_block<kFetch, 4>(a, scales, w, tile_stride, begin, pairs, ahead);
        break;
    }
  }
}

template <Fetch kFetch>
void gemm(const GemmArgs& a) {
  // Up to here widening FP8 in registers wins; BF16, which has nothing to widen, is read straight
  // from memory, five to eight rows 1.1 to 1.2 times as fast as by panels.
  constexpr bool kFar = kFetch == Fetch::kFarIntoL2;
  const bool f8 = a.w.type == WeightType::kF8E4M3;
  // On Zen 5 more rows where a tile, 16 bytes for each input, is long.
  const int32_t f8_rows = kFar || int64_t{a.w.k} * 16 >= few::kLongTile ? 32 : 16;
  const int32_t few_rows = f8 ? f8_rows : kFar ? 1 : few::kDirectRows;
  if (a.w.type == WeightType::kMXFP4) {
    mx::gemm<Avx512>(a);
  } else if (a.w.type == WeightType::kF32 || a.w.type == WeightType::kF16) {
    simd::gemm<Avx512>(a);
  } else if (a.rows > few_rows) {
    gemm_many<kFetch>(a);
  } else if (f8) {
    few::direct<Avx512, true, kFetch>(a);
  } else {
    few::direct<Avx512, false, kFetch>(a);
  }
}

// --- attention

template <int kR, int kT>
inline void panel_rows(const PanelArgs& a, int32_t row) {
  const uint32_t* x[kR];
  for (int r = 0; r < kR; ++r) x[r] = static_cast<const uint32_t*>(a.x[row + r]);
  __m512 acc[kR][kT];
  Ahead ahead;
  if (a.next != nullptr) {
    // Every pass fetches its part. All in the first one is more at once than memory brings: sixteen
    // queries took 1.3 times as long.
    const int32_t passes = (a.rows + kPanelRows - 1) / kPanelRows;
    ahead.times = (a.next_lines + kT * passes - 1) / (kT * passes);
    ahead.tile_stride = kLine;
    ahead.step = kT * kLine;
    ahead.every = ahead.times > 0 && ahead.times < a.pairs ? a.pairs / ahead.times : 1;
    ahead.w = a.next + row / kPanelRows * ahead.times * ahead.step;
  }
  panel_dot<kR, kT>(a.w, 64, 256, a.pairs, x, acc, ahead);
  for (int r = 0; r < kR; ++r) {
    float* out = a.out + (row + r) * a.out_stride;
    if (a.keep == nullptr) {
      for (int t = 0; t < kT; ++t) _mm512_storeu_ps(out + 16 * t, acc[r][t]);
      continue;
    }
    const __m512 keep = _mm512_set1_ps(a.keep[row + r]);
    for (int t = 0; t < kT; ++t) {
      const __m512 before = _mm512_loadu_ps(out + 16 * t);
      _mm512_storeu_ps(out + 16 * t, _mm512_fmadd_ps(before, keep, acc[r][t]));
    }
  }
}

// Rows from `row` on: all but fewer than kR of them kR at a time.
template <int kR, int kT>
inline void panel_tiles(const PanelArgs& a, int32_t row) {
  for (; row + kR <= a.rows; row += kR) panel_rows<kR, kT>(a, row);
  if constexpr (kR > 1) panel_tiles<kR - 1, kT>(a, row);
}

void panel(const PanelArgs& a) {
  switch ((a.columns + 15) / 16) {
    case 1:
      return panel_tiles<kPanelRows, 1>(a, 0);
    case 2:
      return panel_tiles<kPanelRows, 2>(a, 0);
    case 3:
      return panel_tiles<kPanelRows, 3>(a, 0);
    default:
      return panel_tiles<kPanelRows, 4>(a, 0);
  }
}

void pack(Activation type, const float* x, int32_t k, int32_t padded, void* out) {
  if (type == Activation::kF32) {
    simd::pack_f32<Avx512>(x, k, padded, static_cast<float*>(out));
    return;
  }
  if (type == Activation::kI8) return mx::pack_i8<Avx512>(x, k, padded, out);
  auto* p = static_cast<uint8_t*>(out);
  int32_t i = 0;
  for (const int32_t whole = (k < padded ? k : padded) & ~31; i < whole; i += 32) {
    _mm512_storeu_si512(p + 2 * i, (__m512i)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(x + i + 16),
                                                                _mm512_loadu_ps(x + i)));
  }
  for (; i < padded; i += 16) {
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
template <Fetch kFetch>
constexpr Micro kMicro = {
    "avx512bf16",
    kBF16,
    {kF32, kBF16, kF32, kBF16, Activation::kI8},
    pack,
    gemm<kFetch>,
    simd::gemm<Avx512>,
    panel,
    simd::page_values<Avx512, kFetch == Fetch::kNextIntoL1>,
    simd::softmax<Avx512>,
    simd::merge<Avx512>,
    simd::rms_norm<Avx512>,
    simd::silu_mul<Avx512>,
    simd::add<Avx512>,
    simd::add_weighted<Avx512>,
    simd::reduce<Avx512>,
    simd::weigh<Avx512>,
    kFetch == Fetch::kNextIntoL1,
};

}  // namespace

const Micro* micro_avx512bf16(size_t l1_bytes) {
  return l1_bytes > 32 * 1024 ? &kMicro<Fetch::kNextIntoL1> : &kMicro<Fetch::kFarIntoL2>;
}

}  // namespace dsv3::kernels
