// A few rows of FP8 or BF16 weights in tile layout, for the sets that have vdpbf16ps: the weights
// are widened in registers and used at once. Everything is a template over S, a type local to the
// file that includes this (see micro.h).
#pragma once

#include "kernels/cpu/micro_simd512.h"

namespace dsv3::kernels::few {

template <class S>
inline __m512i load64(const uint8_t* p) {
  return _mm512_loadu_si512(p);
}
template <class S>
inline __m512i load32(const uint8_t* p) {
  return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
template <class S>
inline __m512 dot(__m512 acc, __m512i w, uint32_t x) {
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)));
}

// The scales of one call's tiles, looked up block by block.
template <class S>
class Scales {
 public:
  explicit Scales(const GemmArgs& a) : w_(a.w), tile_(a.tile), step_(a.tile_step) {
    if (w_.type != WeightType::kF8E4M3) return;
    blocks_per_column_ = w_.scale_k / w_.block_k;
    uniform_ = w_.scale_n % 16 == 0;
    if (!uniform_) return;
    for (int32_t t = 0; t < a.tiles; ++t) {
      row_[t] = w_.scales + int64_t{(a.tile + t * step_) * 16 / w_.scale_n} * w_.scale_columns;
    }
  }
  // Of tile `t` of the call and block `block`.
  inline __m512 get(int32_t t, int32_t block) const {
    if (w_.type != WeightType::kF8E4M3) return _mm512_set1_ps(1.0f);
    if (uniform_) {
      const int32_t column = blocks_per_column_ == 1 ? block : block / blocks_per_column_;
      return _mm512_set1_ps(row_[t][column]);
    }
    float scale[16];
    simd::tile_scales<S>(w_, tile_ + t * step_, block * w_.block_k, scale);
    return _mm512_loadu_ps(scale);
  }

 private:
  const TiledWeights& w_;
  int32_t tile_, step_;
  int32_t blocks_per_column_ = 1;
  bool uniform_ = false;
  const float* row_[kGroupTiles] = {};
};

// acc[r][s] += pair i of row r times the weights w[s]. Inlined by force: the sums must stay in
// registers.
template <class S, int kR, int kS>
[[gnu::always_inline]] inline void add_pair(const __m512i* w, const uint32_t* const* x, int32_t i,
                                            __m512 (*acc)[kS]) {
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) acc[r][s] = dot<S>(acc[r][s], w[s], x[r][i]);
  }
}

// Do rows take turns, and at what? Then each of two turns fetches half of what comes after both.
enum class Turn { kNone, kAtBlock, kAtTiles };
// What to fetch meanwhile: what lies so many bytes further on; in a turn lines of each tile, from
// `half` on, half as many as are read.
struct Later {
  int64_t ahead;
  const uint8_t* half;
};

// acc[r][s] = sum over `pairs` pairs of tile s (stride bytes apart, from w) times row r (from
// x[r]). All tiles are widened before any is used, and all sums take the first pair before any
// takes the second: with each stream's work by itself, and inputs addressed per stream, two rows
// took 1.24 times as long, four 1.19, sixteen 1.10.
template <class S, int kR, int kS, bool kF8, Turn kTurn>
[[gnu::always_inline]] inline void direct_dot(const simd::Fp8Decoder<S>& decoder, const uint8_t* w,
                                              int64_t stride, int32_t pairs, const Later& later,
                                              const uint32_t* const* x, __m512 (*acc)[kS]) {
  constexpr int64_t kPairBytes = kF8 ? 32 : 64;
  constexpr int64_t kNear = 512;
  __m512i w0[kS], w1[kS];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) acc[r][s] = _mm512_setzero_ps();
  }
  const uint8_t* half = later.half;
  int32_t i = 0;
  for (; i + 2 <= pairs; i += 2, half += kPairBytes) {
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) {
      const uint8_t* p = w + s * stride + i * kPairBytes;
      if constexpr (kTurn != Turn::kAtBlock && kR > 1) {
        // One row is as fast as memory and does better without; two do better with what is near.
        const uint8_t* line = p + (kR == 2 ? kNear : later.ahead);
        _mm_prefetch(line, _MM_HINT_T0);
        if constexpr (!kF8) _mm_prefetch(line + 64, _MM_HINT_T0);
      }
      if constexpr (kTurn != Turn::kNone) {
        static_assert(kF8);
        // The next block, or all of the next tiles, which L1 does not hold.
        constexpr auto kHint = kTurn == Turn::kAtBlock ? _MM_HINT_T0 : _MM_HINT_T1;
        if (i % 4 == 0) _mm_prefetch(half + s * stride, kHint);
      }
      if constexpr (kF8) {
        decoder.both(load64<S>(p), &w0[s], &w1[s]);
      } else {
        w0[s] = load64<S>(p);
        w1[s] = load64<S>(p + 64);
      }
    }
    add_pair<S, kR, kS>(w0, x, i, acc);
    add_pair<S, kR, kS>(w1, x, i + 1, acc);
  }
  if (i == pairs) return;
#pragma GCC unroll 4
  for (int s = 0; s < kS; ++s) {
    const uint8_t* p = w + s * stride + i * kPairBytes;
    if constexpr (kF8) {
      decoder.both(load32<S>(p), &w0[s], &w1[s]);
    } else {
      w0[s] = load64<S>(p);
    }
  }
  add_pair<S, kR, kS>(w0, x, i, acc);
}

// What is fetched ahead. Zen 4 (32 KiB of L1) is fastest with a single stream fetched far ahead,
// into L2, as its L1 has too few places for lines on their way: FP8 alone, and no short tiles. Zen
// 5 (48 KiB) with four streams, of each what lies 2 KiB further on (FP8: the next block), into L1:
// FP8 1.04 to 1.28 times as fast as the other way, BF16 1.0 to 1.08 times as fast as direct_rows
// with one row, 1.08 to 1.16 as panels with more.
enum class Fetch { kFarIntoL2, kNextIntoL1 };

// Where a call's weights lie.
template <class S>
struct Streams {
  const uint8_t* data;         // of the call's first tile
  int64_t tile_bytes, stride;  // of a tile, and from one of the call's to the next
  int32_t all_pairs, block_pairs;
  simd::Fp8Decoder<S> decoder;
  Scales<S> scales;

  Streams(const GemmArgs& a, int64_t pair_bytes)
      : tile_bytes((a.w.k + 1) / 2 * pair_bytes),
        stride(tile_bytes * a.tile_step),
        all_pairs((a.w.k + 1) / 2),
        block_pairs(a.w.block_k / 2),
        scales(a) {
    data = a.w.data + a.tile * tile_bytes;
  }
};

// Block `block`, `pairs` pairs from w on, of kS tiles for the kR rows whose inputs x points at and
// whose results `out`.
template <class S, int kR, int kS, bool kF8, Turn kTurn>
[[gnu::always_inline]] inline void direct_block(const GemmArgs& a, const Streams<S>& in,
                                                const uint8_t* w, int32_t tile, int32_t block,
                                                int32_t pairs, const Later& later,
                                                const uint32_t* const* x, float* out) {
  __m512 acc[kR][kS];
  direct_dot<S, kR, kS, kF8, kTurn>(in.decoder, w, in.stride, pairs, later, x, acc);
#pragma GCC unroll 4
  for (int s = 0; s < kS; ++s) {
    const __m512 scale = in.scales.get(tile + s, block);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      float* y = out + r * a.out_stride + 16 * s;
      const __m512 before = block == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(y);
      _mm512_storeu_ps(y, _mm512_fmadd_ps(acc[r][s], scale, before));
    }
  }
}

// kS tiles for rows [row, row + kR). second: of Turn::kAtTiles, the one that fetches the later
// half.
template <class S, int kR, int kS, bool kF8, Turn kTurn>
[[gnu::noinline]] void direct_rows(const GemmArgs& a, const Streams<S>& in, int32_t tile,
                                   int32_t row, bool second) {
  constexpr int64_t kPairBytes = kF8 ? 32 : 64;
  const uint8_t* w = in.data + tile * in.stride;
  const uint32_t* x[kR];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) x[r] = static_cast<const uint32_t*>(a.x[row + r]);
  float* out = a.out + row * a.out_stride + 16 * tile;
  const int64_t after = tile + kS < a.tiles ? kS * in.stride : (a.next != nullptr ? a.next - w : 0);
  const uint8_t* half = w + after + (second ? in.tile_bytes / 2 : 0);
  for (int32_t begin = 0, block = 0; begin < in.all_pairs; begin += in.block_pairs, ++block) {
    const int32_t left = in.all_pairs - begin;
    const int32_t pairs = left < in.block_pairs ? left : in.block_pairs;
    // The next block of these tiles, or the first of the next ones.
    const int64_t ahead = left > pairs ? pairs * kPairBytes : after - begin * kPairBytes;
    direct_block<S, kR, kS, kF8, kTurn>(a, in, w + begin * kPairBytes, tile, block, pairs,
                                        {ahead, half + begin / 2 * kPairBytes}, x, out);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) x[r] += pairs;
  }
}

// The call's four tiles of FP8 for kR rows, which take turns at each block.
template <class S, int kR>
[[gnu::noinline]] void direct_turns(const GemmArgs& a, const Streams<S>& in) {
  constexpr int kFirst = (kR + 1) / 2;
  constexpr int64_t kPairBytes = 32;
  const uint32_t* x[kR];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) x[r] = static_cast<const uint32_t*>(a.x[r]);
  float* second = a.out + kFirst * a.out_stride;
  const int64_t after = a.next != nullptr ? a.next - in.data : 0;
  for (int32_t begin = 0, block = 0; begin < in.all_pairs; begin += in.block_pairs, ++block) {
    const int32_t left = in.all_pairs - begin;
    const int32_t pairs = left < in.block_pairs ? left : in.block_pairs;
    const int64_t ahead = left > pairs ? pairs * kPairBytes : after - begin * kPairBytes;
    const uint8_t* w = in.data + begin * kPairBytes;
    const uint8_t* half = w + ahead;
    direct_block<S, kFirst, 4, true, Turn::kAtBlock>(a, in, w, 0, block, pairs, {0, half}, x,
                                                     a.out);
    half += pairs / 2 * kPairBytes;
    direct_block<S, kR - kFirst, 4, true, Turn::kAtBlock>(a, in, w, 0, block, pairs, {0, half},
                                                          x + kFirst, second);
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) x[r] += pairs;
  }
}

constexpr int32_t kDirectRows = 8;  // of one direct_rows at most
// One row needs four tiles for enough independent sums; beyond four rows two are all that fits.
constexpr int32_t kFourTileRows = 4;
// Tiles shorter than this leave each other too few sums of their own: more of them go together.
// They also tell a small model, whose weights lie in caches, from one that is read from memory.
constexpr int64_t kLongTile = 16 << 10;

template <class S, int kS, bool kF8, Turn kTurn, int kR = 1>
inline void direct_some(const GemmArgs& a, const Streams<S>& in, int32_t tile, int32_t row,
                        int32_t rows, bool second = false) {
  if (rows == kR) return direct_rows<S, kR, kS, kF8, kTurn>(a, in, tile, row, second);
  if constexpr (kR < (kS == 4 ? kFourTileRows : kDirectRows)) {
    direct_some<S, kS, kF8, kTurn, kR + 1>(a, in, tile, row, rows, second);
  }
}

// Tiles [tile, ...) of the call kS at a time, as long as there are as many. Streams are the same
// block of different tiles: far apart, so that the memory system takes them for what they are. Left
// to the hardware, four such streams read 22 GB/s on a Zen 4 core with 4 KiB pages; one stream 16,
// four of 2 KiB that lie side by side (blocks of one tile) 11. More rows than fit into the
// registers take turns; widening again for each costs less than going through scratch. On Zen 5
// each of the first two turns fetches half of the next long tiles: left to the first, while memory
// idled in the second, 9 rows were 0.87 times as fast, 12 rows 0.9, 16 rows 0.93.
template <class S, int kS, bool kF8, Fetch kFetch>
int32_t direct_tiles(const GemmArgs& a, const Streams<S>& in, int32_t tile) {
  const int32_t turns = (a.rows + kDirectRows - 1) / kDirectRows;
  for (; tile + kS <= a.tiles; tile += kS) {
    for (int32_t turn = 0, row = 0; turn < turns; ++turn) {
      const int32_t rows = (a.rows - row) / (turns - turn);  // as even as they can be
      bool fetches = false;
      if constexpr (kF8 && kS == 2 && kFetch == Fetch::kNextIntoL1) {
        fetches = turns > 1 && turn < 2 && in.tile_bytes >= kLongTile;
        // A turn of several has four rows at the least.
        if (fetches) direct_some<S, kS, kF8, Turn::kAtTiles, 4>(a, in, tile, row, rows, turn == 1);
      }
      if (!fetches) direct_some<S, kS, kF8, Turn::kNone>(a, in, tile, row, rows);
      row += rows;
    }
  }
  return tile;
}

// --- very few rows: memory, or a far cache, is what they wait for

// Nearer or farther is slower. 4 KiB on, which is where a stream's lines lie in L1 themselves, BF16
// was 1.03 to 1.12 times as slow.
constexpr int64_t kNextBytes = 2048;

template <int kN>
struct Count {};

// acc[r][s][b] = sum over `pairs` pairs of block b (block_pairs pairs apart) of tile s (stride
// apart, from w) times row r. ahead[j]: where the jth of kB pieces of what is fetched meanwhile
// begins, of each tile.
template <class S, int kR, int kS, int kB, bool kF8, Fetch kFetch>
[[gnu::always_inline]] inline void blocks_dot(const simd::Fp8Decoder<S>& decoder, const uint8_t* w,
                                              int64_t stride, int32_t block_pairs, int32_t pairs,
                                              const uint8_t* const* ahead, const uint32_t* const* x,
                                              __m512 (*acc)[kS][kB]) {
  constexpr int64_t kPairBytes = kF8 ? 32 : 64;
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) {
#pragma GCC unroll 2
      for (int b = 0; b < kB; ++b) acc[r][s][b] = _mm512_setzero_ps();
    }
  }
  const auto add = [&](const __m512i* v, int b, int32_t i) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int s = 0; s < kS; ++s) {
        acc[r][s][b] = dot<S>(acc[r][s][b], v[s], x[r][b * block_pairs + i]);
      }
    }
  };
  __m512i w0[kS], w1[kS];
  int32_t i = 0;
  for (int32_t piece = 0; piece < kB; ++piece) {
    const uint8_t* line = ahead[piece];
    for (const int32_t end = pairs * (piece + 1) / kB; i + 2 <= end; i += 2) {
#pragma GCC unroll 2
      for (int b = 0; b < kB; ++b, line += 2 * kPairBytes) {
#pragma GCC unroll 4
        for (int s = 0; s < kS; ++s) {
          constexpr auto kHint = kFetch == Fetch::kFarIntoL2 ? _MM_HINT_T1 : _MM_HINT_T0;
          _mm_prefetch(line + s * stride, kHint);
          const uint8_t* p = w + s * stride + (int64_t{b} * block_pairs + i) * kPairBytes;
          if constexpr (kF8) {
            decoder.both(load64<S>(p), &w0[s], &w1[s]);
          } else {
            _mm_prefetch(line + s * stride + 64, kHint);
            w0[s] = load64<S>(p);
            w1[s] = load64<S>(p + 64);
          }
        }
        add(w0, b, i);
        add(w1, b, i + 1);
      }
    }
  }
  if (i == pairs) return;
#pragma GCC unroll 2
  for (int b = 0; b < kB; ++b) {
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) {
      const uint8_t* p = w + s * stride + (int64_t{b} * block_pairs + i) * kPairBytes;
      if constexpr (kF8) {
        decoder.both(load32<S>(p), &w0[s], &w1[s]);
      } else {
        w0[s] = load64<S>(p);
      }
    }
    add(w0, b, i);
  }
}

// Tiles [tile, tile + kS) kB blocks at a time, side by side for enough independent sums; block by
// block they are added in direct_rows' order. What is fetched ahead goes on at `next` when the
// tiles end.
template <class S, int kR, int kS, int kB, bool kF8, Fetch kFetch>
[[gnu::noinline]] void stream_rows(const GemmArgs& a, const Streams<S>& in, int32_t tile,
                                   const uint8_t* next) {
  const int64_t block_bytes = int64_t{in.block_pairs} * (kF8 ? 32 : 64);
  const int64_t near = kB == 1 && block_bytes > kNextBytes ? kNextBytes : kB * block_bytes;
  const int64_t fetched = kFetch == Fetch::kFarIntoL2 ? 8192 / kS : near;
  const uint8_t* w = in.data + tile * in.stride;
  const uint8_t* const end = w + in.tile_bytes;
  const uint32_t* x[kR];
  __m512 total[kR][kS];
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) {
    x[r] = static_cast<const uint32_t*>(a.x[r]);
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) total[r][s] = _mm512_setzero_ps();
  }
  int32_t block = 0;
  const auto add_blocks = [&]<int kN>(Count<kN>, int32_t pairs) __attribute__((always_inline)) {
    const uint8_t* ahead[kN];
#pragma GCC unroll 2
    for (int b = 0; b < kN; ++b) {
      const uint8_t* p = w + b * block_bytes + fetched;
      ahead[b] = p < end ? p : next + (p - end);
    }
    __m512 acc[kR][kS][kN];
    blocks_dot<S, kR, kS, kN, kF8, kFetch>(in.decoder, w, in.stride, in.block_pairs, pairs, ahead,
                                           x, acc);
#pragma GCC unroll 2
    for (int b = 0; b < kN; ++b, ++block) {
#pragma GCC unroll 4
      for (int s = 0; s < kS; ++s) {
        const __m512 scale = in.scales.get(tile + s, block);
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) {
          total[r][s] = _mm512_fmadd_ps(acc[r][s][b], scale, total[r][s]);
        }
      }
    }
    w += kN * block_bytes;
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) x[r] += kN * in.block_pairs;
  };
  int32_t left = in.all_pairs;
  for (; left >= kB * in.block_pairs; left -= kB * in.block_pairs) {
    add_blocks(Count<kB>(), in.block_pairs);
  }
  for (; left > 0; left -= in.block_pairs) {
    add_blocks(Count<1>(), left < in.block_pairs ? left : in.block_pairs);
  }
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) {
      _mm512_storeu_ps(a.out + r * a.out_stride + 16 * (tile + s), total[r][s]);
    }
  }
}

template <class S, int kR, int kS, int kB, bool kF8, Fetch kFetch>
int32_t stream_tiles(const GemmArgs& a, const Streams<S>& in, int32_t tile) {
  for (; tile + kS <= a.tiles; tile += kS) {
    const uint8_t* w = in.data + tile * in.stride;
    const uint8_t* next = w + kS * in.stride;
    if (tile + kS >= a.tiles) next = a.next != nullptr ? a.next : w;  // which is there already
    stream_rows<S, kR, kS, kB, kF8, kFetch>(a, in, tile, next);
  }
  return tile;
}

template <class S, bool kF8, Fetch kFetch, int kR = 1>
void stream(const GemmArgs& a, const Streams<S>& in) {
  if (a.rows == kR) {
    int32_t tile = 0;
    constexpr int kShortTiles = kR <= 2 ? 4 : 2;
    if constexpr (kFetch == Fetch::kNextIntoL1) {
      tile = stream_tiles<S, kR, 4, 1, kF8, kFetch>(a, in, tile);
    } else if (in.tile_bytes < kLongTile) {
      tile = stream_tiles<S, kR, kShortTiles, 2, kF8, kFetch>(a, in, tile);
    } else if (kR == 4) {  // bound by loading their inputs, which two tiles share
      tile = stream_tiles<S, kR, 2, 2, kF8, kFetch>(a, in, tile);
    }
    stream_tiles<S, kR, 1, 2, kF8, kFetch>(a, in, tile);
    return;
  }
  if constexpr (kR < kFourTileRows) stream<S, kF8, kFetch, kR + 1>(a, in);
}

// Five to eight rows of weights that lie in memory: two turns of four streams, though each widens
// the weights, are 1.08 to 1.10 times as fast as all rows with two streams (one thread of Zen 5).
// Out of a cache, where the weights of small models lie, 0.92 to 0.98 times.
template <class S, int kR = kFourTileRows + 1>
bool take_turns(const GemmArgs& a, const Streams<S>& in) {
  if (a.tiles < 4 || in.tile_bytes < kLongTile) return false;
  if (a.rows == kR) {
    direct_turns<S, kR>(a, in);
    return true;
  }
  if constexpr (kR < kDirectRows) return take_turns<S, kR + 1>(a, in);
  return false;
}

template <class S, bool kF8, Fetch kFetch>
void direct(const GemmArgs& a) {
  const Streams<S> in(a, kF8 ? 32 : 64);
  if constexpr (kF8 || kFetch == Fetch::kNextIntoL1) {
    constexpr int64_t kLeastTile = kFetch == Fetch::kNextIntoL1 ? 0 : 8 << 10;
    if (a.rows <= kFourTileRows && in.tile_bytes >= kLeastTile) {
      return stream<S, kF8, kFetch>(a, in);
    }
  }
  if constexpr (kF8 && kFetch == Fetch::kNextIntoL1) {
    if (take_turns<S>(a, in)) return;
  }
  int32_t tile = 0;
  if (a.rows <= kFourTileRows) tile = direct_tiles<S, 4, kF8, kFetch>(a, in, tile);
  tile = direct_tiles<S, 2, kF8, kFetch>(a, in, tile);
  direct_tiles<S, 1, kF8, kFetch>(a, in, tile);
}

}  // namespace dsv3::kernels::few
