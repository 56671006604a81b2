// Linear layers with MXFP4 weights, written once for every instruction set over its INT8 dot
// product. Everything is a template over S, as in micro_simd.h, and for the same reason.
//
// An E2M1 value times two is one of 0, 1, 2, 3, 4, 6, 8, 12 and their negatives: with activations
// as INT8 (I8Block, micro.h) the sum of a block of 32 products is an exact integer, in whatever
// order. total = fma(sum, weights' scale * activations' scale, total), block by block: the same
// bits for a row alone and among others. Widening to BF16 instead would keep 8 bits of an
// activation's own and not 7 of its block's largest, but the error of four-bit weights is twenty
// times either, and a BF16 dot product takes two instructions where INT8 takes one.
//
// S offers, beside what micro_simd.h asks for: B (4 * kLanes bytes of weights, for kLanes rows),
// kMxUnsigned (weights are stored as 0..24: twelve too much), kMxRows and kMxTiles (of a register
// block), kMxOneRowTiles (tiles that one row takes side by side), kMxDirect (as many rows widen the
// weights in registers), kMxAhead (bytes; see fetch), Sum with
//   begin(offset) / dot(b, x) (adds four products for each row; x: four activations), perhaps
//   dot_in_place(b, x) for many rows / half() after four of a block's eight dots / total() (vector
//   I),
// mx_widen(p, lo, hi): 4 * kLanes packed bytes to weights, mx_scales(p): kLanes E8M0 codes to V.
#pragma once

#include "kernels/cpu/micro_simd.h"

namespace dsv3::kernels::mx {

inline constexpr int kBlock = 32;        // inputs that share a scale
inline constexpr int kBlockBytes = 256;  // of 16 rows
inline constexpr int kGroup = 4;         // blocks behind one line of scales
inline constexpr int kScaleBytes = 64;   // that line
inline constexpr int kGroupBytes = kScaleBytes + kGroup * kBlockBytes;
inline constexpr int kSteps = kBlock / 4;  // dot products of a block
inline constexpr int64_t kPrefetch = 2 * kGroupBytes;

// The twice E2M1 values, twelve more where weights are unsigned.
template <class S>
struct Table {
  alignas(64) int8_t values[64];  // four times the same sixteen
  constexpr Table() : values() {
    constexpr int kMagnitude[8] = {0, 1, 2, 3, 4, 6, 8, 12};
    for (int i = 0; i < 64; ++i) {
      const int v = (i & 8) != 0 ? -kMagnitude[i & 7] : kMagnitude[i & 7];
      values[i] = static_cast<int8_t>(S::kMxUnsigned ? v + 12 : v);
    }
  }
};

// Activations to I8Blocks. `padded` is a multiple of 32.
template <class S>
void pack_i8(const float* x, int32_t k, int32_t padded, void* out) {
  using V = typename S::V;
  using I = typename S::I;
  constexpr int kVectors = kBlock / S::kLanes;
  auto* block = static_cast<I8Block*>(out);
  for (int32_t i = 0; i < padded; i += kBlock, ++block) {
    float values[kBlock];
    const float* p = x + i;
    if (k - i < kBlock) {
      const int32_t have = k - i > 0 ? k - i : 0;
      for (int32_t j = 0; j < kBlock; ++j) values[j] = j < have ? x[i + j] : 0.0f;
      p = values;
    }
    V v[kVectors];
    V top = {};
    I finite = (I)(V{}) == (I)(V{});
    for (int j = 0; j < kVectors; ++j) {
      v[j] = simd::load<S>(p + j * S::kLanes);
      const V a = v[j] < 0.0f ? -v[j] : v[j];
      top = a > top ? a : top;
      finite &= (v[j] - v[j]) == V{};
    }
    bool all = true;
    for (int j = 0; j < S::kLanes; ++j) all = all && finite[j] != 0;
    float amax = simd::max_lanes<S>(top);
    // The inverse of what lies below would overflow; against any other block it is nothing.
    if (!(amax > 0x1p-118f) || !all) amax = 0;
    const float inverse = amax > 0 ? 127.0f / amax : 0.0f;
    I total = {};
    for (int j = 0; j < kVectors; ++j) {
      // Adding 1.5 * 2^23 rounds to an integer (to nearest even) in the low bits.
      const V product = all ? v[j] * inverse : V{};
      const I q = (I)(product + 0x1.8p23f) - (I)(simd::splat<S>(0x1.8p23f));
      total += q;
      for (int l = 0; l < S::kLanes; ++l) {
        block->q[j * S::kLanes + l] = static_cast<int8_t>(q[l]);
      }
    }
    int32_t sum = 0;
    for (int l = 0; l < S::kLanes; ++l) sum += total[l];
    block->offset = -12 * sum;
    block->scale = all ? amax / 254.0f : __builtin_nanf("");
  }
}

// One call's matrix, from its first tile on.
struct Tiles {
  const uint8_t* data;
  int64_t stride;  // of a tile
  int32_t blocks;
};
template <class S>
inline Tiles tiles_of(const GemmArgs& a) {
  Tiles t;
  t.blocks = (a.w.k + kBlock - 1) / kBlock;
  t.stride =
      int64_t{t.blocks} * kBlockBytes + int64_t{(t.blocks + kGroup - 1) / kGroup} * kScaleBytes;
  t.data = a.w.data + a.tile * t.stride;
  return t;
}

template <class S>
inline void add_block(typename S::V scale, const I8Block* x, const typename S::Sum& sum,
                      float* out) {
  using V = typename S::V;
  const V value = __builtin_convertvector(sum.total(), V);
  simd::store<S>(out, S::fma(value, scale * x->scale, simd::load<S>(out)));
}

// --- a few rows: weights are widened in registers and used at once

// One row's weights come from memory, so they are fetched far ahead, into L2 (or not at all where
// S::kMxAhead is 0); more rows take their time.
template <class S, int kR>
inline void fetch(const uint8_t* p) {
  if constexpr (kR > 1) {
    __builtin_prefetch(p);
  } else if constexpr (S::kMxAhead > 0) {
    __builtin_prefetch(p, 0, 2);
  }
}

// Block `block` of kT tiles. w: where the block's weights begin, scales: its scales, ahead: what to
// fetch meanwhile of the first tile.
template <class S, int kR, int kT>
inline void direct_block(const uint8_t* w, const uint8_t* scales, int64_t stride,
                         const uint8_t* ahead, const I8Block* const* x, float* out,
                         int64_t out_stride) {
  constexpr int kVectors = 16 / S::kLanes;
  // Of two vectors a few rows take both at once, which share the activations.
  constexpr int kV = kVectors == 2 && kR <= 3 ? 2 : 1;
  for (int first = 0; first < kVectors; first += kV) {
    typename S::Sum sum[kR][kT][kV];
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t) {
#pragma GCC unroll 2
        for (int v = 0; v < kV; ++v) sum[r][t][v].begin(x[r]->offset);
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kSteps / 2; ++i) {
      if constexpr (kVectors == 1 && kR > 5) {
        // Many rows are short of loads: with all tiles widened before any is used they share the
        // activations, and eight are 1.2 to 1.3 times as fast on Zen 5. Two to five are not.
        typename S::B lo[kT], hi[kT];
#pragma GCC unroll 4
        for (int t = 0; t < kT; ++t) {
          fetch<S, kR>(ahead + t * stride + i * 64);
          S::mx_widen(w + t * stride + i * 64, &lo[t], &hi[t]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
          for (int t = 0; t < kT; ++t) sum[r][t][0].dot(lo[t], x[r]->q + 8 * i);
#pragma GCC unroll 4
          for (int t = 0; t < kT; ++t) {
            sum[r][t][0].dot(hi[t], x[r]->q + 8 * i + 4);
            if (i == 1 || i == 3) sum[r][t][0].half();
          }
        }
        continue;
      }
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t) {
        if (first == 0) fetch<S, kR>(ahead + t * stride + i * 64);
#pragma GCC unroll 2
        for (int v = 0; v < kV; ++v) {
          typename S::B lo, hi;
          S::mx_widen(w + t * stride + i * 64 + (first + v) * 4 * S::kLanes, &lo, &hi);
#pragma GCC unroll 8
          for (int r = 0; r < kR; ++r) {
            sum[r][t][v].dot(lo, x[r]->q + 8 * i);
            sum[r][t][v].dot(hi, x[r]->q + 8 * i + 4);
            if (i == 1 || i == 3) sum[r][t][v].half();
          }
        }
      }
    }
#pragma GCC unroll 4
    for (int t = 0; t < kT; ++t) {
#pragma GCC unroll 2
      for (int v = 0; v < kV; ++v) {
        const int column = (first + v) * S::kLanes;
        const typename S::V scale = S::mx_scales(scales + t * stride + column);
#pragma GCC unroll 8
        for (int r = 0; r < kR; ++r) {
          add_block<S>(scale, x[r], sum[r][t][v], out + r * out_stride + 16 * t + column);
        }
      }
    }
  }
}

template <class S, int kR, int kT>
inline void direct_tiles(const GemmArgs& a, const Tiles& w, int32_t row, int32_t tile) {
  const I8Block* x[kR];
  for (int r = 0; r < kR; ++r) x[r] = static_cast<const I8Block*>(a.x[row + r]);
  float* out = a.out + row * a.out_stride + 16 * tile;
  const uint8_t* p = w.data + tile * w.stride;
  const uint8_t* const end = p + w.stride;
  const uint8_t* after = p + kT * w.stride;
  if (tile + kT >= a.tiles) after = a.next != nullptr ? a.next : p;  // which is there already
  for (int32_t b = 0; b < w.blocks; b += kGroup, p += kGroupBytes) {
    const int32_t count = w.blocks - b < kGroup ? w.blocks - b : kGroup;
    const uint8_t* ahead = p + (kR == 1 ? S::kMxAhead : kPrefetch);
    if (ahead >= end) ahead = after + (ahead - end);
    for (int t = 0; t < kT; ++t) fetch<S, kR>(ahead + t * w.stride);
    for (int32_t i = 0; i < count; ++i) {
      direct_block<S, kR, kT>(p + kScaleBytes + i * kBlockBytes, p + 16 * i, w.stride,
                              ahead + kScaleBytes + i * kBlockBytes, x, out, a.out_stride);
      for (int r = 0; r < kR; ++r) ++x[r];
    }
  }
}

template <class S, int kR>
inline void direct_rows(const GemmArgs& a, const Tiles& w, int32_t row) {
  // One row is as fast as memory: tile after tile it is a single stream, which a Zen 4 core reads
  // with AVX-512 at 79 % of what it reads without work, and four tiles side by side at 59 %. More
  // rows keep the core busy, and share a tile's activations among tiles. AVX2 on Zen 3, which
  // fetches ahead, is 1.07 times as fast with two.
  constexpr int kT = kR == 1                  ? S::kMxOneRowTiles
                     : kR <= S::kMxDirect / 2 ? S::kMxTiles
                                              : (S::kMxTiles + 1) / 2;
  int32_t t = 0;
  for (; t + kT <= a.tiles; t += kT) direct_tiles<S, kR, kT>(a, w, row, t);
  for (; t < a.tiles; ++t) direct_tiles<S, kR, 1>(a, w, row, t);
}

template <class S, int kR>
inline void direct(const GemmArgs& a, const Tiles& w) {
  if constexpr (kR == 1) {
    direct_rows<S, 1>(a, w, 0);
  } else {
    if (a.rows == kR) return direct_rows<S, kR>(a, w, 0);
    direct<S, kR - 1>(a, w);
  }
}

// More rows than kMxDirect take turns.
template <class S>
[[gnu::noinline]] void direct_turns(const GemmArgs& a, const Tiles& w) {
  const int32_t turns = (a.rows + S::kMxDirect - 1) / S::kMxDirect;
  GemmArgs part = a;
  for (int32_t turn = 0, row = 0; turn < turns; ++turn, row += part.rows) {
    part.rows = (a.rows - row) / (turns - turn);  // as even as they can be
    part.x = a.x + row;
    part.out = a.out + row * a.out_stride;
    direct<S, S::kMxDirect>(part, w);
  }
}

// --- many rows: a group of blocks lies widened in L1 and serves some rows at a time

// Widened weights of `tiles` tiles: [block][step][tile][vector] B, then scales [block][tile][16].
template <class S>
struct Widened {
  typename S::B* weights;
  float* scales;
  int32_t tiles;
};

template <class S>
inline void widen(const uint8_t* p, int64_t stride, int32_t tiles, int32_t blocks,
                  const Widened<S>& out) {
  constexpr int kVectors = 16 / S::kLanes;
  for (int32_t b = 0; b < blocks; ++b) {
    for (int32_t t = 0; t < tiles; ++t) {
      const uint8_t* from = p + t * stride + kScaleBytes + b * kBlockBytes;
      typename S::B* to = out.weights + (b * kSteps * tiles + t) * kVectors;
      for (int i = 0; i < kSteps / 2; ++i) {
        __builtin_prefetch(from + i * 64 + kGroupBytes);
        for (int v = 0; v < kVectors; ++v) {
          S::mx_widen(from + i * 64 + v * 4 * S::kLanes, to + v, to + tiles * kVectors + v);
        }
        to += 2 * tiles * kVectors;
      }
      for (int v = 0; v < kVectors; ++v) {
        simd::store<S>(out.scales + (b * tiles + t) * 16 + v * S::kLanes,
                       S::mx_scales(p + t * stride + 16 * b + v * S::kLanes));
      }
    }
  }
}

template <class S>
inline void add_widened(const typename S::B& w, const int8_t* x, typename S::Sum* sum) {
  if constexpr (requires { sum->dot_in_place(w, x); }) {
    sum->dot_in_place(w, x);
  } else {
    sum->dot(w, x);
  }
}

// kR rows and kC vectors of columns from `column` on, all blocks of a group. Everything unrolled:
// GCC 12 keeps sums in memory otherwise.
template <class S, int kR, int kC>
inline void block_rows(const GemmArgs& a, const Widened<S>& w, int32_t first_block, int32_t blocks,
                       int32_t row, int32_t column) {
  using V = typename S::V;
  constexpr int kVectors = 16 / S::kLanes;
  const int32_t columns = w.tiles * kVectors;
  const I8Block* x[kR];
  for (int r = 0; r < kR; ++r) x[r] = static_cast<const I8Block*>(a.x[row + r]) + first_block;
  float* out = a.out + row * a.out_stride + column * S::kLanes;
  const typename S::B* b = w.weights + column;
  const float* scales = w.scales + column * S::kLanes;
  V total[kR][kC];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) {
      total[r][c] = simd::load<S>(out + r * a.out_stride + c * S::kLanes);
    }
  }
  for (int32_t i = 0; i < blocks; ++i, scales += columns * S::kLanes) {
    typename S::Sum sum[kR][kC];
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < kC; ++c) sum[r][c].begin(x[r][i].offset);
    }
#pragma GCC unroll 8
    for (int s = 0; s < kSteps; ++s, b += columns) {
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
        for (int c = 0; c < kC; ++c) {
          add_widened<S>(b[c], x[r][i].q + 4 * s, &sum[r][c]);
          if (s % 4 == 3) sum[r][c].half();
        }
      }
    }
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) {
      const V scale = simd::load<S>(scales + c * S::kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) {
        total[r][c] = S::fma(__builtin_convertvector(sum[r][c].total(), V), scale * x[r][i].scale,
                             total[r][c]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kC; ++c) {
      simd::store<S>(out + r * a.out_stride + c * S::kLanes, total[r][c]);
    }
  }
}

template <class S, int kR>
inline void block_columns(const GemmArgs& a, const Widened<S>& w, int32_t first_block,
                          int32_t blocks, int32_t row) {
  constexpr int kC = S::kMxTiles * 16 / S::kLanes < 4 ? S::kMxTiles * 16 / S::kLanes : 4;
  const int32_t columns = w.tiles * (16 / S::kLanes);
  int32_t c = 0;
  for (; c + kC <= columns; c += kC) block_rows<S, kR, kC>(a, w, first_block, blocks, row, c);
  for (; c < columns; ++c) block_rows<S, kR, 1>(a, w, first_block, blocks, row, c);
}

template <class S, int kR>
inline void last_rows(const GemmArgs& a, const Widened<S>& w, int32_t first_block, int32_t blocks,
                      int32_t row) {
  if constexpr (kR > 0) {
    if (a.rows - row == kR) return block_columns<S, kR>(a, w, first_block, blocks, row);
    last_rows<S, kR - 1>(a, w, first_block, blocks, row);
  }
}

template <class S>
void gemm(const GemmArgs& a) {
  for (int32_t r = 0; r < a.rows; ++r) {
    for (int32_t c = 0; c < 16 * a.tiles; ++c) a.out[r * a.out_stride + c] = 0;
  }
  const Tiles tiles = tiles_of<S>(a);
  if (a.rows <= S::kMxDirect) return direct<S, S::kMxDirect>(a, tiles);
  // With AVX-512 turns, each of which widens the weights again, are faster than going through
  // scratch: 9 to 16 rows 1.2 times on Zen 5, 24 rows 1.1, 32 rows 1.07.
  constexpr int32_t kMostTurns = S::kLanes == 16 ? 4 : 1;
  if (a.rows <= kMostTurns * S::kMxDirect) return direct_turns<S>(a, tiles);
  static_assert((sizeof(typename S::B) * 16 / S::kLanes * kSteps + 16 * sizeof(float)) * kGroup *
                    kGroupTiles <=
                kGemmScratch);
  Widened<S> w;
  w.tiles = a.tiles;
  w.weights = static_cast<typename S::B*>(a.scratch);
  w.scales = reinterpret_cast<float*>(w.weights + kGroup * kSteps * a.tiles * (16 / S::kLanes));
  const uint8_t* p = tiles.data;
  for (int32_t b = 0; b < tiles.blocks; b += kGroup, p += kGroupBytes) {
    const int32_t blocks = tiles.blocks - b < kGroup ? tiles.blocks - b : kGroup;
    widen<S>(p, tiles.stride, a.tiles, blocks, w);
    int32_t row = 0;
    for (; row + S::kMxRows <= a.rows; row += S::kMxRows) {
      block_columns<S, S::kMxRows>(a, w, b, blocks, row);
    }
    last_rows<S, S::kMxRows - 1>(a, w, b, blocks, row);
  }
}

}  // namespace dsv3::kernels::mx
