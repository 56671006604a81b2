// Linear layers with FP8 weights in fixed point on 256-bit vectors.
//
// AVX2 multiplies sixteen pairs of 16-bit integers with one instruction and adds them with another,
// on twice as many units together as it has for eight float32 multiply-adds. So a weight becomes
// round(16 w), at most 7168; activations become integers up to 4096 with a scale for each 64 inputs
// (I16Block, micro.h), which leaves at most half of BF16's error. A block's 64 products are summed
// exactly, in whatever order, and for every two blocks total = fma(sum * activations' scale + sum *
// activations' scale, weights' scale, total): the same bits for a row alone and among others.
//
// 16 w is exact from a magnitude of 1/2 on and 1/32 off at most below, where E4M3 ends at 448 and a
// block's scale is chosen so that its largest weight is there. The 128 inputs of a tile whose
// largest is less than 32 are multiplied by a power of two first (odd_group): they are then as
// exact.
//
// A weight is (8 + m) * 2^e0 * 4^E / 1024 with m the code's three lowest bits, e0 the fourth, E the
// next three: what its lower half says times what its upper half says, sign included, each looked
// up among sixteen. Subnormal numbers and zero come out wrong that way, but below 1/32: as zero.
//
// Everything is a template over S, a type local to the file that includes this (see micro.h).
#pragma once

#include <immintrin.h>

#include "kernels/cpu/micro_columns256.h"

namespace dsv3::kernels::fixed {

inline constexpr int kPairs = kFixedBlock / 2;
inline constexpr int kGroup = 2 * kFixedBlock;  // inputs that share a scale of the weights
inline constexpr int kGroupPairs = kGroup / 2;
inline constexpr int64_t kPairBytes = 32;  // of a tile
inline constexpr float kWeightUnit = 1.0f / 16;
inline constexpr float kLargest = 4096;  // of an activation's integers
static_assert(kFixedBlock * 448.0 / kWeightUnit * kLargest < 2147483648.0);

// What the halves of a code mean.
struct Halves {
  // By its lower half: (8 + m) * 2^e0, times two, for the upper byte of 16 bits.
  alignas(32) uint8_t low[32];
  // The same for subnormal numbers: 2 m.
  alignas(32) uint8_t low_subnormal[32];
  // By the number of powers of two more and its upper half: the bytes of 4^E with the sign.
  static constexpr int kShifts = 15;
  alignas(32) uint8_t high0[kShifts][32], high1[kShifts][32];
  constexpr Halves() : low(), low_subnormal(), high0(), high1() {
    for (int i = 0; i < 32; ++i) {
      low[i] = static_cast<uint8_t>((8 + (i & 7)) << (i >> 3 & 1) << 1);
      low_subnormal[i] = static_cast<uint8_t>((i & 7) << 2);
      for (int shift = 0; shift < kShifts; ++shift) {
        const int exponent = 2 * (i & 7) + shift;
        const int power = 1 << (exponent < 14 ? exponent : 14);  // beyond: does not occur
        const auto bits = static_cast<uint16_t>((i & 8) != 0 ? -power : power);
        high0[shift][i] = static_cast<uint8_t>(bits & 0xff);
        high1[shift][i] = static_cast<uint8_t>(bits >> 8);
      }
    }
  }
};
template <class S>
inline constexpr Halves kHalves;

template <class S>
inline __m256i load_table(const uint8_t* t) {
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(t));
}

// A tile's columns in two vectors of pairs of inputs, [0] with 0..3 and 8..11, [1] with the others:
// products of what is in `low` and what is in both `high`, shifted by 15 and rounded.
template <class S>
[[gnu::always_inline]] inline void multiply_halves(__m256i low, __m256i high0, __m256i high1,
                                                   __m256i* w) {
  const __m256i zero = _mm256_setzero_si256();
  w[0] = _mm256_mulhrs_epi16(_mm256_unpacklo_epi8(zero, low), _mm256_unpacklo_epi8(high0, high1));
  w[1] = _mm256_mulhrs_epi16(_mm256_unpackhi_epi8(zero, low), _mm256_unpackhi_epi8(high0, high1));
}

// Codes to 16 times their value.
template <class S>
[[gnu::always_inline]] inline void widen(const uint8_t* p, __m256i* w) {
  const Halves& halves = kHalves<S>;
  const __m256i codes = columns::load_line<S>(p);
  const __m256i half = _mm256_set1_epi8(15);
  const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(codes, 4), half);
  multiply_halves<S>(_mm256_shuffle_epi8(load_table<S>(halves.low), _mm256_and_si256(codes, half)),
                     _mm256_shuffle_epi8(load_table<S>(halves.high0[0]), upper),
                     _mm256_shuffle_epi8(load_table<S>(halves.high1[0]), upper), w);
}

// Twice the greatest magnitudes among the codes of every `step` of `pairs` pairs, byte by byte.
template <class S>
inline __m256i largest_of(const uint8_t* p, int32_t pairs, int32_t step) {
  __m256i top = _mm256_setzero_si256();
  for (int32_t i = 0; i < pairs; i += step) {
    const __m256i codes = columns::load_line<S>(p + i * kPairBytes);
    top = _mm256_max_epu8(top, _mm256_add_epi8(codes, codes));
  }
  return top;
}
// Has a group magnitudes of 32 or more, so that widen() is good for it? A sample answers: as an odd
// group it would be computed as well, only more slowly.
template <class S>
inline bool is_large(const uint8_t* p, int32_t pairs) {
  const __m256i top = largest_of<S>(p, pairs, 8);
  const __m256i least = _mm256_set1_epi8(static_cast<char>(2 * 0x60));
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(_mm256_max_epu8(top, least), top)) != 0;
}

// Any codes to 16 * 2^d times their value, d the returned: as large as they can become.
template <class S>
inline int widen_odd(const uint8_t* p, int32_t pairs, __m256i* w) {
  const Halves& halves = kHalves<S>;
  alignas(32) uint8_t bytes[32];
  _mm256_store_si256(reinterpret_cast<__m256i*>(bytes), largest_of<S>(p, pairs, 1));
  int largest = 0;
  for (const uint8_t byte : bytes) largest = byte > largest ? byte : largest;
  const int exponent = largest >> 4;
  const int shift = exponent < 14 ? 14 - exponent : 0;
  const __m256i half = _mm256_set1_epi8(15);
  const __m256i exponents = _mm256_set1_epi8(0x78);
  for (int32_t i = 0; i < pairs; ++i) {
    const __m256i codes = columns::load_line<S>(p + i * kPairBytes);
    const __m256i lower = _mm256_and_si256(codes, half);
    const __m256i upper = _mm256_and_si256(_mm256_srli_epi16(codes, 4), half);
    const __m256i subnormal =
        _mm256_cmpeq_epi8(_mm256_and_si256(codes, exponents), _mm256_setzero_si256());
    const __m256i low = _mm256_blendv_epi8(
        _mm256_shuffle_epi8(load_table<S>(halves.low), lower),
        _mm256_shuffle_epi8(load_table<S>(halves.low_subnormal), lower), subnormal);
    multiply_halves<S>(low, _mm256_shuffle_epi8(load_table<S>(halves.high0[shift]), upper),
                       _mm256_shuffle_epi8(load_table<S>(halves.high1[shift]), upper), w + 2 * i);
  }
  return shift;
}

// acc += both products of a pair. In one piece: GCC 12 gives every product a register of its own,
// and then has none left for sums.
template <class S>
[[gnu::always_inline]] inline void add_products(__m256i a, __m256i b, __m256i* acc) {
  __m256i products;
  asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(*acc), "=&x"(products) : "x"(a), "x"(b));
}

template <class S, int kR>
[[gnu::always_inline]] inline void add_pair(const __m256i* w, const int16_t* const* x, int32_t pair,
                                            __m256i (*acc)[2]) {
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
    int32_t both;
    __builtin_memcpy(&both, x[r] + 2 * pair, sizeof both);
    const __m256i v = _mm256_set1_epi32(both);
    add_products<S>(w[0], v, &acc[r][0]);
    add_products<S>(w[1], v, &acc[r][1]);
  }
}

// Sums over the two blocks of a group of 128 inputs. A function of its own makes them, as in
// micro_columns256.h: with anything else around the loop, GCC 12 keeps sums in memory.
template <int kR, int kT>
struct Sums {
  __m256i of[2][kT][kR][2];
};
inline constexpr int64_t kNextBlock = sizeof(I16Block) / sizeof(int16_t);

template <int kR, int kT>
[[gnu::always_inline]] inline void clear(__m256i (*acc)[kR][2]) {
#pragma GCC unroll 4
  for (int t = 0; t < kT; ++t) {
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) acc[t][r][0] = acc[t][r][1] = _mm256_setzero_si256();
  }
}
template <int kR, int kT>
[[gnu::always_inline]] inline void keep(const __m256i (*acc)[kR][2], __m256i (*sums)[kR][2]) {
#pragma GCC unroll 4
  for (int t = 0; t < kT; ++t) {
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      sums[t][r][0] = acc[t][r][0];
      sums[t][r][1] = acc[t][r][1];
    }
  }
}

// Of kT tiles, tile_bytes apart, and each row; `pairs` of the group there are. What will be needed
// next lies `ahead` bytes further on.
template <class S, int kR, int kT>
[[gnu::noinline]] void sum_pairs(const uint8_t* w, int64_t tile_bytes, int32_t pairs, int64_t ahead,
                                 const int16_t* const* rows, Sums<kR, kT>* sums) {
  const int16_t* x[kR];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) x[r] = rows[r];
  for (int b = 0; b < 2; ++b) {
    __m256i acc[kT][kR][2];
    clear<kR, kT>(acc);
    const int32_t count = pairs < kPairs ? pairs : kPairs;
    for (int32_t i = 0; i < count; ++i) {
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t) {
        const uint8_t* p = w + t * tile_bytes + i * kPairBytes;
        _mm_prefetch(p + ahead, _MM_HINT_T0);
        __m256i v[2];
        widen<S>(p, v);
        add_pair<S, kR>(v, x, i, acc[t]);
      }
    }
    keep<kR, kT>(acc, sums->of[b]);
    w += kPairs * kPairBytes;
    pairs -= count;
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) x[r] += kNextBlock;
  }
}

// The same of one tile that is widened already.
template <class S, int kR>
[[gnu::noinline]] void sum_widened(const __m256i* w, int32_t pairs, const int16_t* const* rows,
                                   Sums<kR, 1>* sums) {
  const int16_t* x[kR];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) x[r] = rows[r];
  for (int b = 0; b < 2; ++b) {
    __m256i acc[1][kR][2];
    clear<kR, 1>(acc);
    const int32_t count = pairs < kPairs ? pairs : kPairs;
    int32_t i = 0;
    for (; i + 4 <= count; i += 4) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const __m256i v[2] = {_mm256_load_si256(w + 2 * (i + j)),
                              _mm256_load_si256(w + 2 * (i + j) + 1)};
        add_pair<S, kR>(v, x, i + j, acc[0]);
      }
    }
    for (; i < count; ++i) {
      const __m256i v[2] = {_mm256_load_si256(w + 2 * i), _mm256_load_si256(w + 2 * i + 1)};
      add_pair<S, kR>(v, x, i, acc[0]);
    }
    keep<kR, 1>(acc, sums->of[b]);
    w += 2 * kPairs;
    pairs -= count;
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) x[r] += kNextBlock;
  }
}

// A tile's columns as widen() orders them, and back.
template <class S>
inline void reorder(float* out) {
  const __m256 a = _mm256_loadu_ps(out), b = _mm256_loadu_ps(out + 8);
  _mm256_storeu_ps(out, _mm256_permute2f128_ps(a, b, 0x20));
  _mm256_storeu_ps(out + 8, _mm256_permute2f128_ps(a, b, 0x31));
}

// The scales of a tile's columns for the inputs that begin at k, in widen()'s order, for sums of
// integers that are `unit` times as large as weights.
template <class S>
inline void load_scales(const TiledWeights& w, int32_t tile, int32_t k, float unit, __m256* scale) {
  float all[16];
  simd::tile_scales<S>(w, tile, k, all);
  reorder<S>(all);
  for (int j = 0; j < 2; ++j) {
    scale[j] = _mm256_mul_ps(_mm256_loadu_ps(all + 8 * j), _mm256_set1_ps(unit));
  }
}

// The same for group after group of a call's tiles. Divisions are done once: a group of one row is
// over in the time that eight take.
template <class S>
class Scales {
 public:
  explicit Scales(const GemmArgs& a)
      : w_(a.w),
        tile_(a.tile),
        one_(a.w.scale_n % 16 == 0),
        groups_((a.w.scale_k + kGroup - 1) / kGroup) {
    for (int32_t t = 0; t < a.tiles; ++t) {
      row_[t] = a.w.scales + int64_t{(a.tile + t) * 16 / a.w.scale_n} * a.w.scale_columns;
    }
  }
  // Goes on to the next group of inputs.
  void next() {
    k_ += kGroup;
    if (++in_column_ < groups_) return;
    in_column_ = 0;
    ++column_;
  }
  // Those of tile `t` of the call for the current group.
  void load(int32_t t, __m256* scale) const {
    if (!one_) return load_scales<S>(w_, tile_ + t, k_, kWeightUnit, scale);
    scale[0] = scale[1] = _mm256_set1_ps(row_[t][column_] * kWeightUnit);
  }

 private:
  const TiledWeights& w_;
  const float* row_[kGroupTiles];
  int32_t tile_, k_ = 0, column_ = 0, in_column_ = 0;
  bool one_;
  int32_t groups_;  // that share a scale
};

// The blocks of some rows from the group at `pair` on, and where their integers begin.
template <int kR>
struct Rows {
  const I16Block* blocks[kR];
  const int16_t* values[kR];
  Rows(const void* const* x, int32_t pair) {
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      blocks[r] = static_cast<const I16Block*>(x[r]) + pair / kPairs;
      values[r] = blocks[r]->q;
    }
  }
};

// out = fma(sums * activations' scales, scale, out), where `first` says that nothing is in out yet
// and `both` that the group has two blocks.
template <class S, int kR>
[[gnu::always_inline]] inline void add_group(const __m256i (*first_sums)[2],
                                             const __m256i (*second_sums)[2], const __m256* scale,
                                             const I16Block* const* x, bool both, bool first,
                                             float* out, int64_t out_stride) {
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
    const __m256 size0 = _mm256_set1_ps(x[r]->scale);
    const __m256 size1 = both ? _mm256_set1_ps(x[r][1].scale) : _mm256_setzero_ps();
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      float* o = out + r * out_stride + 8 * j;
      const __m256 before = first ? _mm256_setzero_ps() : _mm256_loadu_ps(o);
      __m256 sum = _mm256_mul_ps(_mm256_cvtepi32_ps(first_sums[r][j]), size0);
      sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(second_sums[r][j]), size1, sum);
      _mm256_storeu_ps(o, _mm256_fmadd_ps(sum, scale[j], before));
    }
  }
}

inline constexpr int kRowsAtOnce = 6;
// Of the scratch: widened weights of an odd group's stretch.
inline constexpr int kOddVectors = 2 * kPairs;
static_assert((kOddVectors + kGroupTiles * 2 * kGroupPairs) * sizeof(__m256i) <= kGemmScratch);

// --- a group with small weights, or with more than one scale

// Pairs [begin, begin + pairs) of tile `tile` of the call, at most a group, for rows [row, row +
// rows): stretches of one block and one scale, each with a power of two of its own.
template <class S>
[[gnu::noinline]] void odd_group(const GemmArgs& a, int32_t tile, int32_t begin, int32_t pairs,
                                 int32_t row, int32_t rows) {
  const int64_t tile_bytes = int64_t{(a.w.k + 1) / 2} * kPairBytes;
  const uint8_t* w = a.w.data + (a.tile + tile) * tile_bytes;
  auto* block = static_cast<__m256i*>(a.scratch);
  const int32_t scale_pairs = a.w.scale_k / 2;
  for (int32_t p = begin; p < begin + pairs;) {
    const int32_t end_of_block = (p / kPairs + 1) * kPairs;
    const int64_t end_of_scale = (int64_t{p / scale_pairs} + 1) * scale_pairs;
    int32_t end = begin + pairs;
    if (end > end_of_block) end = end_of_block;
    if (end > end_of_scale) end = static_cast<int32_t>(end_of_scale);
    const int shift = widen_odd<S>(w + p * kPairBytes, end - p, block);
    __m256 scale[2];
    load_scales<S>(a.w, a.tile + tile, 2 * p, kWeightUnit / static_cast<float>(1 << shift), scale);
    columns::for_groups<kRowsAtOnce>(rows, [&](int32_t first, auto count) {
      constexpr int kR = count.kValue;
      Rows<kR> x(a.x + row + first, p);
      for (int r = 0; r < kR; ++r) x.values[r] += p % kPairs * 2;
      Sums<kR, 1> sums;
      sum_widened<S, kR>(block, end - p, x.values, &sums);
      add_group<S, kR>(sums.of[0][0], sums.of[1][0], scale, x.blocks, false, p == 0,
                       a.out + (row + first) * a.out_stride + 16 * tile, a.out_stride);
    });
    p = end;
  }
}

// --- a few rows: weights are widened in registers and used at once

// kT tiles for rows [row, row + kR).
template <class S, int kR, int kT>
[[gnu::noinline]] void few_rows(const GemmArgs& a, int32_t tile, int32_t row) {
  const int32_t all_pairs = (a.w.k + 1) / 2;
  const int64_t tile_bytes = all_pairs * kPairBytes;
  const uint8_t* w = a.w.data + (a.tile + tile) * tile_bytes;
  const int64_t after =
      tile + kT < a.tiles ? kT * tile_bytes : (a.next != nullptr ? a.next - w : 0);
  float* out = a.out + row * a.out_stride + 16 * tile;
  Scales<S> scales(a);
  for (int32_t begin = 0; begin < all_pairs; begin += kGroupPairs, scales.next()) {
    const int32_t left = all_pairs - begin;
    const int32_t pairs = left < kGroupPairs ? left : kGroupPairs;
    const Rows<kR> x(a.x + row, begin);
    const int64_t at = begin * kPairBytes;
    // The next group of these tiles, or the first of the next ones.
    const int64_t ahead = left > pairs ? pairs * kPairBytes : after - at;
    Sums<kR, kT> sums;
    sum_pairs<S, kR, kT>(w + at, tile_bytes, pairs, ahead, x.values, &sums);
#pragma GCC unroll 4
    for (int t = 0; t < kT; ++t) {
      if (!is_large<S>(w + at + t * tile_bytes, pairs)) [[unlikely]] {
        odd_group<S>(a, tile + t, begin, pairs, row, kR);
        continue;
      }
      __m256 scale[2];
      scales.load(tile + t, scale);
      add_group<S, kR>(sums.of[0][t], sums.of[1][t], scale, x.blocks, pairs > kPairs, begin == 0,
                       out + 16 * t, a.out_stride);
    }
  }
}

// All tiles for rows [row, row + kR), kT at a time.
template <class S, int kR, int kT>
inline void few_tiles(const GemmArgs& a, int32_t row) {
  int32_t t = 0;
  for (; t + kT <= a.tiles; t += kT) few_rows<S, kR, kT>(a, t, row);
  if constexpr (kT > 1) {
    for (; t < a.tiles; ++t) few_rows<S, kR, 1>(a, t, row);
  }
}

// --- many rows: a group of a tile is widened once

// block[pairs][2] = weights; what lies `ahead` bytes further on is fetched.
template <class S>
inline void widen_group(const uint8_t* w, int32_t pairs, int64_t ahead, __m256i* block) {
  for (int32_t i = 0; i < pairs; ++i) {
    const uint8_t* p = w + i * kPairBytes;
    _mm_prefetch(p + ahead, _MM_HINT_T0);
    widen<S>(p, block + 2 * i);
  }
}

// A group of up to kGroupTiles tiles, widened.
struct Widened {
  static constexpr int64_t kTile = 2 * kGroupPairs;  // vectors
  const __m256i* tiles;
  int32_t begin, pairs;
  bool large[kGroupTiles];  // the others are odd groups, and done already
  __m256 scale[kGroupTiles][2];
};

template <class S, int kR>
inline void group_rows(const GemmArgs& a, const Widened& w, int32_t row) {
  const Rows<kR> x(a.x + row, w.begin);
  for (int32_t t = 0; t < a.tiles; ++t) {
    if (!w.large[t]) continue;
    Sums<kR, 1> sums;
    sum_widened<S, kR>(w.tiles + t * Widened::kTile, w.pairs, x.values, &sums);
    add_group<S, kR>(sums.of[0][0], sums.of[1][0], w.scale[t], x.blocks, w.pairs > kPairs,
                     w.begin == 0, a.out + row * a.out_stride + 16 * t, a.out_stride);
  }
}

// The widened group stays in L1, and every row's part of it is read once.
template <class S>
inline void many(const GemmArgs& a) {
  auto* tiles = static_cast<__m256i*>(a.scratch) + kOddVectors;
  const int32_t all_pairs = (a.w.k + 1) / 2;
  const int64_t tile_bytes = all_pairs * kPairBytes;
  Scales<S> scales(a);
  Widened group;
  group.tiles = tiles;
  for (int32_t begin = 0; begin < all_pairs; begin += kGroupPairs, scales.next()) {
    const int32_t left = all_pairs - begin;
    group.begin = begin;
    group.pairs = left < kGroupPairs ? left : kGroupPairs;
    for (int32_t t = 0; t < a.tiles; ++t) {
      const uint8_t* w = a.w.data + (a.tile + t) * tile_bytes + begin * kPairBytes;
      // The next tile's group, or the first tile's next one.
      const uint8_t* next = t + 1 < a.tiles      ? w + tile_bytes
                            : left > group.pairs ? w - t * tile_bytes + group.pairs * kPairBytes
                                                 : a.next;
      widen_group<S>(w, group.pairs, next != nullptr ? next - w : 0, tiles + t * Widened::kTile);
      scales.load(t, group.scale[t]);
      group.large[t] = is_large<S>(w, group.pairs);
      if (!group.large[t]) odd_group<S>(a, t, begin, group.pairs, 0, a.rows);
    }
    columns::for_groups<kRowsAtOnce>(
        a.rows, [&](int32_t row, auto rows) { group_rows<S, rows.kValue>(a, group, row); });
  }
}

// Matrices whose groups have more than one scale: heads that were cut out of larger ones.
template <class S>
inline void odd_scales(const GemmArgs& a) {
  const int32_t all_pairs = (a.w.k + 1) / 2;
  for (int32_t t = 0; t < a.tiles; ++t) {
    for (int32_t begin = 0; begin < all_pairs; begin += kGroupPairs) {
      const int32_t left = all_pairs - begin;
      odd_group<S>(a, t, begin, left < kGroupPairs ? left : kGroupPairs, 0, a.rows);
    }
  }
}

template <class S>
void gemm(const GemmArgs& a) {
  if (a.w.scale_k % kGroup != 0 && a.w.k > a.w.scale_k) {
    odd_scales<S>(a);
  } else if (a.rows == 1) {
    few_tiles<S, 1, 2>(a, 0);
  } else if (a.rows == 2) {
    few_tiles<S, 2, 1>(a, 0);
  } else if (a.rows == 3) {
    few_tiles<S, 3, 1>(a, 0);
  } else if (a.rows == 4) {
    few_tiles<S, 4, 1>(a, 0);
  } else {
    many<S>(a);
  }
  for (int32_t r = 0; r < a.rows; ++r) {
    for (int32_t t = 0; t < a.tiles; ++t) reorder<S>(a.out + r * a.out_stride + 16 * t);
  }
}

// Activations to I16Blocks. `padded` is a multiple of 64.
template <class S>
void pack(const float* x, int32_t k, int32_t padded, void* out) {
  auto* block = static_cast<I16Block*>(out);
  const __m256 sign = _mm256_set1_ps(-0.0f);
  for (int32_t i = 0; i < padded; i += kFixedBlock, ++block) {
    float values[kFixedBlock];
    const float* p = x + i;
    if (k - i < kFixedBlock) {
      for (int32_t j = 0; j < kFixedBlock; ++j) values[j] = i + j < k ? x[i + j] : 0.0f;
      p = values;
    }
    __m256 top = _mm256_setzero_ps();
    __m256 spoiled = _mm256_setzero_ps();  // NaN where a value is not finite
    for (int j = 0; j < kFixedBlock; j += 8) {
      const __m256 v = _mm256_loadu_ps(p + j);
      top = _mm256_max_ps(_mm256_andnot_ps(sign, v), top);
      spoiled = _mm256_add_ps(spoiled, _mm256_sub_ps(v, v));
    }
    const float amax = simd::max_lanes<S>((typename S::V)top);
    const bool finite = _mm256_movemask_ps(_mm256_cmp_ps(spoiled, spoiled, _CMP_UNORD_Q)) == 0;
    // The inverse of what lies below would overflow; against any other block it is nothing.
    const bool used = finite && amax > 0x1p-100f;
    const __m256 inverse = _mm256_set1_ps(used ? kLargest / amax : 0.0f);
    for (int j = 0; j < kFixedBlock; j += 16) {
      __m256i q[2];
      for (int h = 0; h < 2; ++h) {
        const __m256 v = used ? _mm256_loadu_ps(p + j + 8 * h) : _mm256_setzero_ps();
        q[h] = _mm256_cvtps_epi32(_mm256_mul_ps(v, inverse));  // to nearest even
      }
      const __m256i both = _mm256_permute4x64_epi64(_mm256_packs_epi32(q[0], q[1]), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(block->q + j), both);
    }
    block->scale = !finite ? __builtin_nanf("") : used ? amax / kLargest : 0.0f;
  }
}

}  // namespace dsv3::kernels::fixed
