// Linear layers and attention's panels in float32 arithmetic on 256-bit vectors: a lane is an
// output column, an input is broadcast, and a column's sum takes one input after the other. So no
// pairs of lanes are joined at the end, two registers hold a row's sums over a tile, and the same
// loops serve one row and a thousand. Everything is a template over S, a type local to the file
// that includes this (see micro.h).
//
// FP8 weights are widened by eight instructions for 32 of them. Sign-extended and shifted to where
// float32 has exponent and mantissa they are 2^-120 of their value, subnormal numbers where E4M3
// has subnormals. Multiplying them into the normal range would cost as much as using them for a
// row, so the activations are raised by 2^64 instead (Activation::kRaisedF32): products are then
// 2^-56 of their value, and the block's sum is multiplied by 2^56. Some processors are slow on
// subnormal numbers; one in some ten thousand trained weights is one. Reading E4M3 as binary16 and
// converting that takes twice the instructions: one row ran at 0.6 of this speed out of L2.
#pragma once

#include <immintrin.h>

#include "kernels/cpu/micro_simd.h"

namespace dsv3::kernels::columns {

// Activations for FP8 weights are multiplied by 2^64. What is below 2^-61 counts as zero, for its
// products would be rounded off, and differently where weights are not raised too.
inline constexpr float kRaise = 0x1p64f;
inline constexpr float kLeastRaised = 0x1p-61f;

template <class S>
inline __m256i load_line(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}

// How a tile's 16 columns stand in two vectors.
enum class Order { kNatural, kEvenOdd };

// The weights of a tile for one pair of inputs, kBytes of them. input<i>(p, w): those of input i.
template <class S, WeightType kType>
struct Pair;

template <class S>
struct Pair<S, WeightType::kF8E4M3> {
  static constexpr int64_t kBytes = 32;
  static constexpr Order kOrder = Order::kEvenOdd;
  // Divided by 2^120.
  template <int kInput>
  static void input(const uint8_t* p, __m256* w) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(0x87f00000u));
    // 16 bits hold a column's two inputs: the first one, the lower byte, times 16 with its sign.
    const __m256i code = kInput == 0 ? _mm256_maddubs_epi16(_mm256_set1_epi16(16), load_line<S>(p))
                                     : _mm256_srai_epi16(load_line<S>(p), 4);
    w[0] = _mm256_castsi256_ps(_mm256_and_si256(_mm256_slli_epi32(code, 16), mask));
    w[1] = _mm256_castsi256_ps(_mm256_and_si256(code, mask));
  }
};

template <class S>
struct Pair<S, WeightType::kBF16> {
  static constexpr int64_t kBytes = 64;
  static constexpr Order kOrder = Order::kNatural;
  template <int kInput>
  static void input(const uint8_t* p, __m256* w) {
    const __m256i mask = _mm256_set1_epi32(static_cast<int32_t>(0xffff0000u));
    for (int j = 0; j < 2; ++j) {
      w[j] = _mm256_castsi256_ps(kInput == 0 ? _mm256_slli_epi32(load_line<S>(p + 32 * j), 16)
                                             : _mm256_and_si256(load_line<S>(p + 32 * j), mask));
    }
  }
};

template <class S>
struct Pair<S, WeightType::kF16> {
  static constexpr int64_t kBytes = 64;
  static constexpr Order kOrder = Order::kNatural;
  template <int kInput>
  static void input(const uint8_t* p, __m256* w) {
    __m256i v[2] = {load_line<S>(p), load_line<S>(p + 32)};
    for (__m256i& half : v) {
      half = kInput == 0 ? _mm256_and_si256(half, _mm256_set1_epi32(0xffff))
                         : _mm256_srli_epi32(half, 16);
    }
    const __m256i all = _mm256_permute4x64_epi64(_mm256_packus_epi32(v[0], v[1]), 0xd8);
    w[0] = _mm256_cvtph_ps(_mm256_castsi256_si128(all));
    w[1] = _mm256_cvtph_ps(_mm256_extracti128_si256(all, 1));
  }
};

template <class S>
struct Pair<S, WeightType::kF32> {
  static constexpr int64_t kBytes = 128;
  static constexpr Order kOrder = Order::kNatural;
  template <int kInput>
  static void input(const uint8_t* p, __m256* w) {
    const auto* v = reinterpret_cast<const float*>(p);
    for (int j = 0; j < 2; ++j) {
      const __m256 mixed = _mm256_shuffle_ps(
          _mm256_loadu_ps(v + 16 * j), _mm256_loadu_ps(v + 16 * j + 8), kInput == 0 ? 0x88 : 0xdd);
      w[j] = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(mixed), 0xd8));
    }
  }
};

// acc += a * b in place. As an intrinsic GCC 12 puts half of the results where `b` was, and then
// has no registers left: six rows ran at three quarters of this speed.
template <class S>
[[gnu::always_inline]] inline void add_product(__m256 a, __m256 b, __m256* acc) {
  asm("vfmadd231ps %2, %1, %0" : "+x"(*acc) : "x"(a), "x"(b));
}

// acc[r] += x[r][input] times a tile's weights for that input. Inlined by force, as everything
// below that has sums: they must stay in registers.
template <class S, int kR>
[[gnu::always_inline]] inline void add_input(const __m256* w, const float* const* x, int32_t input,
                                             __m256 (*acc)[2]) {
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
    const __m256 v = _mm256_broadcast_ss(x[r] + input);
    add_product<S>(w[0], v, &acc[r][0]);
    add_product<S>(w[1], v, &acc[r][1]);
  }
}

enum class Fetch { kNone, kToL1, kToL2 };

// sums[t][r] = sums over `pairs` pairs of tile t (tile_bytes apart, its pairs `stride` bytes) and
// row x[r]. What will be needed next lies `ahead` bytes further on. A function of its own: with
// anything else around the loop, GCC 12 keeps that in registers and sums in memory.
template <class S, WeightType kType, int kR, int kT, Fetch kFetch>
[[gnu::noinline]] void sum_pairs(const uint8_t* w, int64_t tile_bytes, int64_t stride,
                                 int32_t pairs, int64_t ahead, const float* const* rows,
                                 __m256 (*sums)[kR][2]) {
  using Weights = Pair<S, kType>;
  const float* x[kR];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) x[r] = rows[r];
  __m256 acc[kT][kR][2];
#pragma GCC unroll 4
  for (int t = 0; t < kT; ++t) {
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) acc[t][r][0] = acc[t][r][1] = _mm256_setzero_ps();
  }
  for (int32_t i = 0; i < pairs; ++i) {
#pragma GCC unroll 4
    for (int t = 0; t < kT; ++t) {
      const uint8_t* p = w + t * tile_bytes + i * stride;
      if constexpr (kFetch == Fetch::kToL1) _mm_prefetch(p + ahead, _MM_HINT_T0);
      if constexpr (kFetch == Fetch::kToL2) _mm_prefetch(p + ahead, _MM_HINT_T1);
      __m256 v[2];
      Weights::template input<0>(p, v);
      add_input<S, kR>(v, x, 2 * i, acc[t]);
      // What was loaded is loaded again: sums need the register.
      if constexpr (kR > 2) asm volatile("" ::: "memory");
      Weights::template input<1>(p, v);
      add_input<S, kR>(v, x, 2 * i + 1, acc[t]);
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < kT; ++t) {
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      sums[t][r][0] = acc[t][r][0];
      sums[t][r][1] = acc[t][r][1];
    }
  }
}

// The scales of a tile's columns for the block of inputs that begins at k, in `order`.
template <class S>
inline void load_scales(const TiledWeights& w, int32_t tile, int32_t k, __m256* scale) {
  if (w.type != WeightType::kF8E4M3) {
    scale[0] = scale[1] = _mm256_set1_ps(1.0f);
  } else if (w.scale_n % 16 == 0) {
    const int64_t row = tile * 16 / w.scale_n;
    scale[0] = scale[1] = _mm256_set1_ps(w.scales[row * w.scale_columns + k / w.scale_k]);
  } else {
    float natural[16], even_odd[16];
    simd::tile_scales<S>(w, tile, k, natural);
    for (int c = 0; c < 16; ++c) even_odd[c % 2 * 8 + c / 2] = natural[c];
    scale[0] = _mm256_loadu_ps(even_odd);
    scale[1] = _mm256_loadu_ps(even_odd + 8);
  }
}

// out = fma(sums * unit, scale, out), where `first` says that nothing is in out yet.
template <class S, int kR>
[[gnu::always_inline]] inline void add_block(const __m256 (*acc)[2], float unit,
                                             const __m256* scale, bool first, float* out,
                                             int64_t out_stride) {
  const __m256 units = _mm256_set1_ps(unit);
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      float* o = out + r * out_stride + 8 * j;
      const __m256 before = first ? _mm256_setzero_ps() : _mm256_loadu_ps(o);
      _mm256_storeu_ps(o, _mm256_fmadd_ps(_mm256_mul_ps(acc[r][j], units), scale[j], before));
    }
  }
}

// A tile's finished columns from even, odd to natural order.
template <class S>
inline void interleave(float* out) {
  const __m256 even = _mm256_loadu_ps(out), odd = _mm256_loadu_ps(out + 8);
  const __m256 low = _mm256_unpacklo_ps(even, odd), high = _mm256_unpackhi_ps(even, odd);
  _mm256_storeu_ps(out, _mm256_permute2f128_ps(low, high, 0x20));
  _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(low, high, 0x31));
}
template <class S, WeightType kType>
inline void finish(const GemmArgs& a, int32_t tile, int32_t row, int32_t rows) {
  if constexpr (Pair<S, kType>::kOrder == Order::kEvenOdd) {
    for (int32_t r = row; r < row + rows; ++r) interleave<S>(a.out + r * a.out_stride + 16 * tile);
  }
}

// --- a few rows: weights are widened in registers and used at once

// kT tiles for rows [row, row + kR).
template <class S, WeightType kType, int kR, int kT>
[[gnu::noinline]] void few_rows(const GemmArgs& a, int32_t tile, int32_t row) {
  constexpr int64_t kBytes = Pair<S, kType>::kBytes;
  constexpr float kUnit = kType == WeightType::kF8E4M3 ? 0x1p120f / kRaise : 1.0f;
  // One row of wider weights is as fast as memory: 1.07 times as fast without.
  constexpr Fetch kFetch = kR > 1 || kType == WeightType::kF8E4M3 ? Fetch::kToL1 : Fetch::kNone;
  const int32_t all_pairs = (a.w.k + 1) / 2;
  const int32_t block_pairs = a.w.block_k / 2;
  const int64_t tile_bytes = all_pairs * kBytes;
  const uint8_t* w = a.w.data + (a.tile + tile) * tile_bytes;
  const int64_t after =
      tile + kT < a.tiles ? kT * tile_bytes : (a.next != nullptr ? a.next - w : 0);
  float* out = a.out + row * a.out_stride + 16 * tile;
  for (int32_t begin = 0; begin < all_pairs; begin += block_pairs) {
    const int32_t left = all_pairs - begin;
    const int32_t pairs = left < block_pairs ? left : block_pairs;
    const float* x[kR];
    for (int r = 0; r < kR; ++r) x[r] = static_cast<const float*>(a.x[row + r]) + 2 * begin;
    __m256 acc[kT][kR][2];
    // The next block of these tiles, or the first of the next ones.
    const int64_t ahead = left > pairs ? pairs * kBytes : after - begin * kBytes;
    sum_pairs<S, kType, kR, kT, kFetch>(w + begin * kBytes, tile_bytes, kBytes, pairs, ahead, x,
                                        acc);
#pragma GCC unroll 4
    for (int t = 0; t < kT; ++t) {
      __m256 scale[2];
      load_scales<S>(a.w, a.tile + tile + t, 2 * begin, scale);
      add_block<S, kR>(acc[t], kUnit, scale, begin == 0, out + 16 * t, a.out_stride);
    }
  }
  for (int t = 0; t < kT; ++t) finish<S, kType>(a, tile + t, row, kR);
}

// All tiles for rows [row, row + kR), kT at a time.
template <class S, WeightType kType, int kR, int kT>
inline void few_tiles(const GemmArgs& a, int32_t row) {
  int32_t t = 0;
  for (; t + kT <= a.tiles; t += kT) few_rows<S, kType, kR, kT>(a, t, row);
  if constexpr (kT > 2) {
    for (; t + 2 <= a.tiles; t += 2) few_rows<S, kType, kR, 2>(a, t, row);
  }
  if constexpr (kT > 1) {
    for (; t < a.tiles; ++t) few_rows<S, kType, kR, 1>(a, t, row);
  }
}

template <int kCount>
struct Count {
  static constexpr int kValue = kCount;
};
// Calls use(first row, Count of rows) for groups of at most kMost rows that differ by one at most.
template <int kMost, class Use>
inline void use_count(int32_t row, int32_t count, Use use) {
  if constexpr (kMost > 1) {
    if (count < kMost) return use_count<kMost - 1>(row, count, use);
  }
  use(row, Count<kMost>{});
}
template <int kMost, class Use>
inline void for_groups(int32_t rows, Use use) {
  const int32_t groups = (rows + kMost - 1) / kMost;
  for (int32_t g = 0, row = 0; g < groups; ++g) {
    const int32_t count = (rows - row + groups - g - 1) / (groups - g);
    use_count<kMost>(row, count, use);
    row += count;
  }
}
// Tiles that so many rows take side by side: eight sums are wanted, for an addition takes four
// cycles and two of them are begun in each, but with more no registers are left for weights.
constexpr int tiles_at_once(int rows) { return rows == 1 ? 4 : rows == 2 ? 2 : 1; }

// Rows that take their weights from one pass: of FP8's, which are widened meanwhile, and others.
inline constexpr int kFp8RowsAtOnce = 5;
inline constexpr int kRowsAtOnce = 6;

template <class S, WeightType kType>
inline void few(const GemmArgs& a) {
  constexpr int kMost = kType == WeightType::kF8E4M3 ? kFp8RowsAtOnce : kRowsAtOnce;
  for_groups<kMost>(a.rows, [&](int32_t row, auto rows) {
    few_tiles<S, kType, rows.kValue, tiles_at_once(rows.kValue)>(a, row);
  });
}

// --- many rows of FP8: a block of a tile is widened once

// block[pairs][2][16] = weights times `unit`; what lies `ahead` bytes further on is fetched.
template <class S>
inline void widen_block(const uint8_t* w, int32_t pairs, float unit, int64_t ahead, float* block) {
  using Weights = Pair<S, WeightType::kF8E4M3>;
  const __m256 units = _mm256_set1_ps(unit);
  for (int32_t i = 0; i < pairs; ++i) {
    const uint8_t* p = w + i * Weights::kBytes;
    _mm_prefetch(p + ahead, _MM_HINT_T0);
    __m256 v[4];
    Weights::template input<0>(p, v);
    Weights::template input<1>(p, v + 2);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm256_store_ps(block + 32 * i + 8 * j, _mm256_mul_ps(v[j], units));
  }
}

template <class S, int kR>
[[gnu::always_inline]] inline void add_widened(const float* block, const float* const* x,
                                               int32_t input, __m256 (*acc)[2]) {
  const __m256 w[2] = {_mm256_load_ps(block + 16 * input), _mm256_load_ps(block + 16 * input + 8)};
  add_input<S, kR>(w, x, input, acc);
}

// sums[r] = sums over `inputs` inputs of a widened block and row x[r].
template <class S, int kR>
[[gnu::noinline]] void sum_block(const float* block, int32_t inputs, const float* const* rows,
                                 __m256 (*sums)[2]) {
  const float* x[kR];
  __m256 acc[kR][2];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
    x[r] = rows[r];
    acc[r][0] = acc[r][1] = _mm256_setzero_ps();
  }
  int32_t i = 0;
  for (; i + 4 <= inputs; i += 4) {
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) add_widened<S, kR>(block, x, i + j, acc);
  }
  for (; i < inputs; ++i) add_widened<S, kR>(block, x, i, acc);
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
    sums[r][0] = acc[r][0];
    sums[r][1] = acc[r][1];
  }
}

template <class S, int kR>
inline void block_rows(const GemmArgs& a, const float* block, int32_t inputs, int32_t offset,
                       float unit, const __m256* scale, int32_t tile, int32_t row) {
  const float* x[kR];
  for (int r = 0; r < kR; ++r) x[r] = static_cast<const float*>(a.x[row + r]) + offset;
  __m256 sums[kR][2];
  sum_block<S, kR>(block, inputs, x, sums);
  add_block<S, kR>(sums, unit, scale, offset == 0, a.out + row * a.out_stride + 16 * tile,
                   a.out_stride);
}

// kRaised: activations are.
template <class S, bool kRaised>
inline void many(const GemmArgs& a) {
  constexpr int64_t kBytes = Pair<S, WeightType::kF8E4M3>::kBytes;
  // Normal numbers, so that no processor is slow on them.
  constexpr float kWeightUnit = kRaised ? 0x1p64f : 0x1p120f;
  constexpr float kSumUnit = kRaised ? 0x1p120f / kRaise / kWeightUnit : 1.0f;
  auto* block = static_cast<float*>(a.scratch);
  const int32_t all_pairs = (a.w.k + 1) / 2;
  const int32_t block_pairs = a.w.block_k / 2;
  const int64_t tile_bytes = all_pairs * kBytes;
  // All tiles of a block in turn: its activations stay in L2 meanwhile.
  for (int32_t begin = 0; begin < all_pairs; begin += block_pairs) {
    const int32_t left = all_pairs - begin;
    const int32_t pairs = left < block_pairs ? left : block_pairs;
    for (int32_t t = 0; t < a.tiles; ++t) {
      const uint8_t* w = a.w.data + (a.tile + t) * tile_bytes + begin * kBytes;
      // The next tile's block, or the first tile's next one.
      const uint8_t* next = t + 1 < a.tiles ? w + tile_bytes
                            : left > pairs  ? w - t * tile_bytes + pairs * kBytes
                                            : a.next;
      widen_block<S>(w, pairs, kWeightUnit, next != nullptr ? next - w : 0, block);
      __m256 scale[2];
      load_scales<S>(a.w, a.tile + t, 2 * begin, scale);
      for_groups<kRowsAtOnce>(a.rows, [&](int32_t row, auto rows) {
        block_rows<S, rows.kValue>(a, block, 2 * pairs, 2 * begin, kSumUnit, scale, t, row);
      });
    }
  }
  for (int32_t t = 0; t < a.tiles; ++t) finish<S, WeightType::kF8E4M3>(a, t, 0, a.rows);
}

// As many rows take FP8 weights straight from memory: beyond, widening them only once pays.
inline constexpr int32_t kFewRows = 10;

// kRaised: activations for FP8 weights are.
template <class S, bool kRaised>
void gemm(const GemmArgs& a) {
  switch (a.w.type) {
    case WeightType::kF32:
      return few<S, WeightType::kF32>(a);
    case WeightType::kBF16:
      return few<S, WeightType::kBF16>(a);
    case WeightType::kF16:
      return few<S, WeightType::kF16>(a);
    default:
      if constexpr (kRaised) {
        if (a.rows <= kFewRows) return few<S, WeightType::kF8E4M3>(a);
      }
      return many<S, kRaised>(a);
  }
}

template <class S>
void pack_raised(const float* x, int32_t k, int32_t padded, float* out) {
  const auto raise = [](typename S::V v) {
    const typename S::V size = v < 0.0f ? -v : v;
    return size < kLeastRaised ? typename S::V{} : v * kRaise;  // NaN stays
  };
  int32_t i = 0;
  for (; i + S::kLanes <= k; i += S::kLanes) {
    simd::store<S>(out + i, raise(simd::load<S>(x + i)));
  }
  if (i < k) simd::store_part<S>(out + i, raise(simd::load_part<S>(x + i, k - i)), k - i);
  for (i = k; i < padded; ++i) out[i] = 0;
}

// --- attention

// As simd::values: eight bytes hold two keys of two dims, and four by four of those are transposed
// in registers.
template <class S>
void values(const uint8_t* page, int32_t dims, int32_t begin, int32_t end, int32_t pair_begin,
            int32_t pairs_total, uint8_t* out) {
  constexpr int32_t kDims = 8, kKeys = 8;
  constexpr int64_t kRowBytes = kPageKeys * 4;  // a pair of dims; also a pair of keys' 64 columns
  const __m256i middle = _mm256_setr_epi8(0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15,  //
                                          0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15);
  const __m256i first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const int32_t whole = dims / kDims * kDims;
  for (int32_t d = 0; d < whole; d += kDims) {
    uint8_t* columns = out + (int64_t{d / 64} * pairs_total + pair_begin) * kRowBytes + d % 64 * 4;
    for (int32_t key = 0; key < kPageKeys; key += kKeys) {
      const __m256i index = _mm256_add_epi32(first, _mm256_set1_epi32(key));
      const __m256i inside =
          _mm256_and_si256(_mm256_cmpgt_epi32(index, _mm256_set1_epi32(begin - 1)),
                           _mm256_cmpgt_epi32(_mm256_set1_epi32(end), index));
      __m256i v[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        const uint8_t* from = page + (d / 2 + i) * kRowBytes + key * 4;
        v[i] = _mm256_shuffle_epi8(_mm256_and_si256(load_line<S>(from), inside), middle);
      }
      const __m256i low0 = _mm256_unpacklo_epi64(v[0], v[1]);
      const __m256i high0 = _mm256_unpackhi_epi64(v[0], v[1]);
      const __m256i low1 = _mm256_unpacklo_epi64(v[2], v[3]);
      const __m256i high1 = _mm256_unpackhi_epi64(v[2], v[3]);
      const __m256i rows[4] = {_mm256_permute2x128_si256(low0, low1, 0x20),
                               _mm256_permute2x128_si256(high0, high1, 0x20),
                               _mm256_permute2x128_si256(low0, low1, 0x31),
                               _mm256_permute2x128_si256(high0, high1, 0x31)};
      uint8_t* to = columns + int64_t{key / 2} * kRowBytes;
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i * kRowBytes), rows[i]);
      }
    }
  }
  if (whole < dims) {
    simd::values<S>(page + whole / 2 * kRowBytes, dims - whole, begin, end, pair_begin, pairs_total,
                    out + int64_t{whole / 64} * pairs_total * kRowBytes + whole % 64 * 4);
  }
}

// kT times 16 columns at a time.
template <class S, int kR, int kT>
inline void panel_rows(const PanelArgs& a, int32_t row) {
  constexpr int64_t kStride = 64 * 2 * sizeof(uint16_t);
  constexpr int64_t kTileBytes = 16 * 2 * sizeof(uint16_t);
  constexpr int64_t kAhead = 4 * kStride;  // 1.02 times as fast as without
  const float* x[kR];
  for (int r = 0; r < kR; ++r) x[r] = static_cast<const float*>(a.x[row + r]);
  for (int32_t first = 0; first < 4; first += kT) {
    __m256 sums[kT][kR][2];
    const uint8_t* w = a.w + first * kTileBytes;
    if (a.next != nullptr && row == 0) {
      sum_pairs<S, WeightType::kBF16, kR, kT, Fetch::kToL2>(w, kTileBytes, kStride, a.pairs,
                                                            a.next - a.w, x, sums);
    } else {
      sum_pairs<S, WeightType::kBF16, kR, kT, Fetch::kToL1>(w, kTileBytes, kStride, a.pairs, kAhead,
                                                            x, sums);
    }
    for (int t = 0; t < kT; ++t) {
      for (int r = 0; r < kR; ++r) {
        float* out = a.out + (row + r) * a.out_stride + 16 * (first + t);
        for (int j = 0; j < 2; ++j) {
          __m256 sum = sums[t][r][j];
          if (a.keep != nullptr) {
            const __m256 keep = _mm256_set1_ps(a.keep[row + r]);
            sum = _mm256_fmadd_ps(_mm256_loadu_ps(out + 8 * j), keep, sum);
          }
          _mm256_storeu_ps(out + 8 * j, sum);
        }
      }
    }
  }
}

template <class S>
void panel(const PanelArgs& a) {
  for_groups<kRowsAtOnce>(a.rows, [&](int32_t row, auto rows) {
    panel_rows<S, rows.kValue, tiles_at_once(rows.kValue)>(a, row);
  });
}

}  // namespace dsv3::kernels::columns
