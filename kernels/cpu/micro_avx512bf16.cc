// AVX-512 with BF16, VBMI and VNNI: BF16 dot products (vdpbf16ps) on BF16 and on widened FP8
// weights; INT8 dot products (vpdpbusd) on MXFP4; F16 and F32 weights through float32.
#include "kernels/cpu/micro_simd512.h"

namespace dsv3::kernels {
namespace {

struct Avx512 : simd::Simd512<Avx512> {
  static constexpr int kRows = 4;
  static constexpr int kTiles = 4;
  static void store_native(void* p, int index, V v) {
    const __m256bh b = _mm512_cvtneps_pbh((__m512)v);
    __builtin_memcpy(static_cast<uint8_t*>(p) + 2 * index, &b, sizeof b);
  }

  // MXFP4: vpermb looks at six bits of a byte, so with the table four times over the other half of
  // a packed byte needs no masking.
  static constexpr int kMxRows = 3;
  static constexpr int kMxTiles = 4;
  static constexpr int kMxDirect = 8;
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

inline __m512i load64(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline __m512i load32(const uint8_t* p) {
  return _mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline __m512 dot(__m512 acc, __m512i w, uint32_t x) {
  return _mm512_dpbf16_ps(acc, (__m512bh)w, (__m512bh)_mm512_set1_epi32(static_cast<int>(x)));
}

// The scales of one call's tiles, looked up block by block.
class Scales {
 public:
  explicit Scales(const GemmArgs& a) : w_(a.w), tile_(a.tile) {
    if (w_.type != WeightType::kF8E4M3) return;
    blocks_per_column_ = w_.scale_k / w_.block_k;
    uniform_ = w_.scale_n % 16 == 0;
    if (!uniform_) return;
    for (int32_t t = 0; t < a.tiles; ++t) {
      row_[t] = w_.scales + int64_t{(a.tile + t) * 16 / w_.scale_n} * w_.scale_columns;
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
    simd::tile_scales<Avx512>(w_, tile_ + t, block * w_.block_k, scale);
    return _mm512_loadu_ps(scale);
  }

 private:
  const TiledWeights& w_;
  int32_t tile_;
  int32_t blocks_per_column_ = 1;
  bool uniform_ = false;
  const float* row_[kGroupTiles] = {};
};

// --- a few rows: weights are widened in registers and used at once

// acc[r][s] += pair i of row r times the weights w[s]. Inlined by force: the sums must stay in
// registers.
template <int kR, int kS>
[[gnu::always_inline]] inline void add_pair(const __m512i* w, const uint32_t* const* x, int32_t i,
                                            __m512 (*acc)[kS]) {
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) acc[r][s] = dot(acc[r][s], w[s], x[r][i]);
  }
}

// acc[r][s] = sum over `pairs` pairs of tile s (stride bytes apart, from w) times row r (from
// x[r]). All tiles are widened before any is used, and all sums take the first pair before any
// takes the second: with each stream's work by itself, and inputs addressed per stream, two rows
// took 1.24 times as long, four 1.19, sixteen 1.10. `ahead` bytes further on is what will be needed
// next.
template <int kR, int kS, bool kF8>
[[gnu::always_inline]] inline void direct_dot(const Decoder& decoder, const uint8_t* w,
                                              int64_t stride, int32_t pairs, int64_t ahead,
                                              const uint32_t* const* x, __m512 (*acc)[kS]) {
  constexpr int64_t kPairBytes = kF8 ? 32 : 64;
  constexpr int64_t kNear = 512;
  __m512i w0[kS], w1[kS];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) acc[r][s] = _mm512_setzero_ps();
  }
  int32_t i = 0;
  for (; i + 2 <= pairs; i += 2) {
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) {
      const uint8_t* p = w + s * stride + i * kPairBytes;
      // One row is as fast as memory and does better without; two do better with what is near.
      if constexpr (kR > 1) _mm_prefetch(p + (kR == 2 ? kNear : ahead), _MM_HINT_T0);
      if constexpr (kF8) {
        decoder.both(load64(p), &w0[s], &w1[s]);
      } else {
        w0[s] = load64(p);
        w1[s] = load64(p + 64);
      }
    }
    add_pair<kR, kS>(w0, x, i, acc);
    add_pair<kR, kS>(w1, x, i + 1, acc);
  }
  if (i == pairs) return;
#pragma GCC unroll 4
  for (int s = 0; s < kS; ++s) {
    const uint8_t* p = w + s * stride + i * kPairBytes;
    if constexpr (kF8) {
      decoder.both(load32(p), &w0[s], &w1[s]);
    } else {
      w0[s] = load64(p);
    }
  }
  add_pair<kR, kS>(w0, x, i, acc);
}

// Where a call's weights lie.
struct Streams {
  const uint8_t* data;  // of the call's first tile
  int64_t tile_bytes;
  int32_t all_pairs, block_pairs;
  Decoder decoder;
  Scales scales;

  Streams(const GemmArgs& a, int64_t pair_bytes)
      : tile_bytes((a.w.k + 1) / 2 * pair_bytes),
        all_pairs((a.w.k + 1) / 2),
        block_pairs(a.w.block_k / 2),
        scales(a) {
    data = a.w.data + a.tile * tile_bytes;
  }
};

// kS tiles for rows [row, row + kR).
template <int kR, int kS, bool kF8>
[[gnu::noinline]] void direct_rows(const GemmArgs& a, const Streams& in, int32_t tile,
                                   int32_t row) {
  constexpr int64_t kPairBytes = kF8 ? 32 : 64;
  const uint8_t* w = in.data + tile * in.tile_bytes;
  const uint32_t* x[kR];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) x[r] = static_cast<const uint32_t*>(a.x[row + r]);
  float* out = a.out + row * a.out_stride + 16 * tile;
  for (int32_t begin = 0, block = 0; begin < in.all_pairs; begin += in.block_pairs, ++block) {
    const int32_t left = in.all_pairs - begin;
    const int32_t pairs = left < in.block_pairs ? left : in.block_pairs;
    // The next block of these tiles, or the first of the next ones.
    const int64_t ahead =
        left > pairs ? pairs * kPairBytes : kS * in.tile_bytes - begin * kPairBytes;
    __m512 acc[kR][kS];
    direct_dot<kR, kS, kF8>(in.decoder, w + begin * kPairBytes, in.tile_bytes, pairs, ahead, x,
                            acc);
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) {
      const __m512 scale = in.scales.get(tile + s, block);
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) {
        float* y = out + r * a.out_stride + 16 * s;
        const __m512 before = begin == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(y);
        _mm512_storeu_ps(y, _mm512_fmadd_ps(acc[r][s], scale, before));
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) x[r] += pairs;
  }
}

constexpr int32_t kDirectRows = 8;  // of one direct_rows at most
// One row needs four tiles for enough independent sums; beyond four rows two are all that fits.
constexpr int32_t kFourTileRows = 4;

template <int kS, bool kF8, int kR = 1>
inline void direct_some(const GemmArgs& a, const Streams& in, int32_t tile, int32_t row,
                        int32_t rows) {
  if (rows == kR) return direct_rows<kR, kS, kF8>(a, in, tile, row);
  if constexpr (kR < (kS == 4 ? kFourTileRows : kDirectRows)) {
    direct_some<kS, kF8, kR + 1>(a, in, tile, row, rows);
  }
}

// Tiles [tile, ...) of the call kS at a time, as long as there are as many. Streams are the same
// block of different tiles: far apart, so that the memory system takes them for what they are. Left
// to the hardware, four such streams read 22 GB/s on a Zen 4 core with 4 KiB pages; one stream 16,
// four of 2 KiB that lie side by side (blocks of one tile) 11. More rows than fit into the
// registers take turns; widening again for each costs less than going through scratch.
template <int kS, bool kF8>
int32_t direct_tiles(const GemmArgs& a, const Streams& in, int32_t tile) {
  const int32_t turns = (a.rows + kDirectRows - 1) / kDirectRows;
  for (; tile + kS <= a.tiles; tile += kS) {
    for (int32_t turn = 0, row = 0; turn < turns; ++turn) {
      const int32_t rows = (a.rows - row) / (turns - turn);  // as even as they can be
      direct_some<kS, kF8>(a, in, tile, row, rows);
      row += rows;
    }
  }
  return tile;
}

// --- very few rows of large FP8 matrices: memory is what they wait for

// acc[r][b] = sum over `pairs` pairs of block b (block_pairs pairs apart, from w) times row r.
template <int kR, int kB>
[[gnu::always_inline]] inline void blocks_dot(const Decoder& decoder, const uint8_t* w,
                                              int32_t block_pairs, int32_t pairs,
                                              const uint32_t* const* x, __m512 (*acc)[kB]) {
  // Far enough ahead for memory, into L2: L1 has too few places for lines on their way.
  constexpr int64_t kAhead = 8192;
  const uint8_t* ahead = w + kAhead;
#pragma GCC unroll 4
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 2
    for (int b = 0; b < kB; ++b) acc[r][b] = _mm512_setzero_ps();
  }
  __m512i w0[kB], w1[kB];
  const auto add = [&](const __m512i* v, int32_t i) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 2
      for (int b = 0; b < kB; ++b) acc[r][b] = dot(acc[r][b], v[b], x[r][b * block_pairs + i]);
    }
  };
  int32_t i = 0;
  for (; i + 2 <= pairs; i += 2) {
#pragma GCC unroll 2
    for (int b = 0; b < kB; ++b) {
      _mm_prefetch(ahead, _MM_HINT_T1);
      ahead += 64;
      decoder.both(load64(w + (int64_t{b} * block_pairs + i) * 32), &w0[b], &w1[b]);
    }
    add(w0, i);
    add(w1, i + 1);
  }
  if (i == pairs) return;
#pragma GCC unroll 2
  for (int b = 0; b < kB; ++b) {
    decoder.both(load32(w + (int64_t{b} * block_pairs + i) * 32), &w0[b], &w1[b]);
  }
  add(w0, i);
}

// Tile after tile, as they lie in memory, so that there is one stream, which is fetched ahead here:
// that beats four left to the hardware. Two blocks of a tile side by side, for enough independent
// sums; block by block they are added in direct_rows' order.
template <int kR>
[[gnu::noinline]] void stream_rows(const GemmArgs& a, const Streams& in) {
  for (int32_t tile = 0; tile < a.tiles; ++tile) {
    const uint8_t* w = in.data + tile * in.tile_bytes;
    const uint32_t* x[kR];
    __m512 total[kR];
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) {
      x[r] = static_cast<const uint32_t*>(a.x[r]);
      total[r] = _mm512_setzero_ps();
    }
    const auto add_blocks = [&]<int kB>(int32_t begin, const __m512(&acc)[kR][kB])
        __attribute__((always_inline)) {
#pragma GCC unroll 2
      for (int b = 0; b < kB; ++b) {
        const __m512 scale = in.scales.get(tile, begin / in.block_pairs + b);
#pragma GCC unroll 4
        for (int r = 0; r < kR; ++r) total[r] = _mm512_fmadd_ps(acc[r][b], scale, total[r]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kR; ++r) x[r] += kB * in.block_pairs;
    };
    int32_t begin = 0;
    for (; begin + 2 * in.block_pairs <= in.all_pairs; begin += 2 * in.block_pairs) {
      __m512 acc[kR][2];
      blocks_dot<kR, 2>(in.decoder, w + int64_t{begin} * 32, in.block_pairs, in.block_pairs, x,
                        acc);
      add_blocks(begin, acc);
    }
    for (; begin < in.all_pairs; begin += in.block_pairs) {
      const int32_t left = in.all_pairs - begin;
      __m512 acc[kR][1];
      blocks_dot<kR, 1>(in.decoder, w + int64_t{begin} * 32, in.block_pairs,
                        left < in.block_pairs ? left : in.block_pairs, x, acc);
      add_blocks(begin, acc);
    }
#pragma GCC unroll 4
    for (int r = 0; r < kR; ++r) _mm512_storeu_ps(a.out + r * a.out_stride + 16 * tile, total[r]);
  }
}

template <int kR = 1>
void stream(const GemmArgs& a, const Streams& in) {
  if (a.rows == kR) return stream_rows<kR>(a, in);
  if constexpr (kR < kFourTileRows) stream<kR + 1>(a, in);
}

// Tiles shorter than this end before a stream of one has begun.
constexpr int64_t kStreamBytes = 16 << 10;

template <bool kF8>
void direct(const GemmArgs& a) {
  const Streams in(a, kF8 ? 32 : 64);
  if (kF8 && a.rows <= kFourTileRows && in.tile_bytes >= kStreamBytes) return stream(a, in);
  int32_t tile = 0;
  if (a.rows <= kFourTileRows) tile = direct_tiles<4, kF8>(a, in, tile);
  tile = direct_tiles<2, kF8>(a, in, tile);
  direct_tiles<1, kF8>(a, in, tile);
}

// --- many rows: a block of weights lies widened in L1 and serves six rows at a time

constexpr int kPanelRows = 6;  // 6 rows x 4 tiles = 24 of the 32 registers

// Weights to fetch while the block before them is multiplied: 64 bytes of each tile for every
// `every` pairs. Each pass over the rows fetches a part, so that memory is asked evenly.
struct Ahead {
  const uint8_t* w = nullptr;
  int64_t tile_stride = 0;
  int32_t every = 1;
};

template <int kR, int kT>
inline void panel_dot(const uint8_t* w, int64_t tile_stride, int64_t pair_stride, int32_t pairs,
                      const uint32_t* const* x, __m512 (*acc)[kT], const Ahead& ahead = {}) {
  for (int r = 0; r < kR; ++r) {
    for (int t = 0; t < kT; ++t) acc[r][t] = _mm512_setzero_ps();
  }
  const uint8_t* line = ahead.w;
  int32_t due = line == nullptr ? -1 : 0;
  for (int32_t i = 0; i < pairs; ++i) {
    __m512i v[kT];
#pragma GCC unroll 4
    for (int t = 0; t < kT; ++t) v[t] = load64(w + t * tile_stride + i * pair_stride);
    if (i == due) {
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t) _mm_prefetch(line + t * ahead.tile_stride, _MM_HINT_T0);
      line += 64;
      due += ahead.every;
    }
#pragma GCC unroll 6
    for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
      for (int t = 0; t < kT; ++t) acc[r][t] = dot(acc[r][t], v[t], x[r][i]);
    }
  }
}

template <int kR, int kT>
inline void gemm_rows(const GemmArgs& a, const uint8_t* w, int64_t tile_stride, int32_t begin,
                      int32_t pairs, int32_t row, const __m512* scale, const Ahead& ahead) {
  const uint32_t* x[kR];
  for (int r = 0; r < kR; ++r) x[r] = static_cast<const uint32_t*>(a.x[row + r]) + begin;
  __m512 acc[kR][kT];
  panel_dot<kR, kT>(w, tile_stride, 64, pairs, x, acc, ahead);
  for (int r = 0; r < kR; ++r) {
    float* out = a.out + (row + r) * a.out_stride;
    for (int t = 0; t < kT; ++t) {
      const __m512 before = begin == 0 ? _mm512_setzero_ps() : _mm512_loadu_ps(out + 16 * t);
      _mm512_storeu_ps(out + 16 * t, _mm512_fmadd_ps(acc[r][t], scale[t], before));
    }
  }
}

template <int kT>
void gemm_block(const GemmArgs& a, const Scales& scales, const uint8_t* w, int64_t tile_stride,
                int32_t begin, int32_t pairs, Ahead ahead) {
  __m512 scale[kT];
  for (int t = 0; t < kT; ++t) scale[t] = scales.get(t, begin / (a.w.block_k / 2));
  int32_t row = 0;
  ahead.every *= (a.rows + kPanelRows - 1) / kPanelRows;
  const int64_t part = int64_t{64} * ((pairs + ahead.every - 1) / ahead.every);
  for (; row + kPanelRows <= a.rows; row += kPanelRows) {
    gemm_rows<kPanelRows, kT>(a, w, tile_stride, begin, pairs, row, scale, ahead);
    ahead.w += part;
  }
  switch (a.rows - row) {
    case 1:
      gemm_rows<1, kT>(a, w, tile_stride, begin, pairs, row, scale, ahead);
      break;
    case 2:
      gemm_rows<2, kT>(a, w, tile_stride, begin, pairs, row, scale, ahead);
      break;
    case 3:
      gemm_rows<3, kT>(a, w, tile_stride, begin, pairs, row, scale, ahead);
      break;
    case 4:
      gemm_rows<4, kT>(a, w, tile_stride, begin, pairs, row, scale, ahead);
      break;
    case 5:
      gemm_rows<5, kT>(a, w, tile_stride, begin, pairs, row, scale, ahead);
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
    int64_t tile_stride = all_pairs * pair_bytes;
    // The next block of these tiles, or the first of the next ones.
    Ahead ahead{left > pairs ? w + pairs * pair_bytes : first + a.tiles * tile_stride, tile_stride,
                f8 ? 2 : 1};
    if (f8) {
      for (int32_t t = 0; t < a.tiles; ++t) {
        decode_tile(decoder, w + t * tile_stride, pairs, scratch + int64_t{t} * pairs * 64);
      }
      w = scratch;
      tile_stride = int64_t{pairs} * 64;
    }
    switch (a.tiles) {
      case 1:
        gemm_block<1>(a, scales, w, tile_stride, begin, pairs, ahead);
        break;
      case 2:
        gemm_block<2>(a, scales, w, tile_stride, begin, pairs, ahead);
        break;
      case 3:
        gemm_block<3>(a, scales, w, tile_stride, begin, pairs, ahead);
        break;
      default:
        gemm_block<4>(a, scales, w, tile_stride, begin, pairs, ahead);
        break;
    }
  }
}

void gemm(const GemmArgs& a) {
  // Up to here widening FP8 in registers wins; BF16 has nothing to widen.
  constexpr int32_t kFewRows[] = {1, 32};
  const bool f8 = a.w.type == WeightType::kF8E4M3;
  if (a.w.type == WeightType::kMXFP4) {
    mx::gemm<Avx512>(a);
  } else if (a.w.type == WeightType::kF32 || a.w.type == WeightType::kF16) {
    simd::gemm<Avx512>(a);
  } else if (a.rows > kFewRows[f8 ? 1 : 0]) {
    gemm_many(a);
  } else if (f8) {
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
  if (type == Activation::kI8) return mx::pack_i8<Avx512>(x, k, padded, out);
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
    {kF32, kBF16, kF32, kBF16, Activation::kI8},
    pack,
    gemm,
    simd::gemm<Avx512>,
    panel,
    simd::page_values<Avx512>,
    simd::softmax<Avx512>,
    simd::merge<Avx512>,
    simd::rms_norm<Avx512>,
    simd::silu_mul<Avx512>,
    simd::add<Avx512>,
    simd::add_weighted<Avx512>,
    simd::reduce<Avx512>,
    simd::weigh<Avx512>,
};

}  // namespace

const Micro* micro_avx512bf16() { return &kMicro; }

}  // namespace dsv3::kernels
