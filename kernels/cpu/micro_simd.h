// Micro-kernels written once over a small vector type, for every instruction set: all of portable,
// and what avx2 (micro_columns256.h) and the BF16 sets do not do in their own way. Everything is a
// template over S, a struct in an anonymous namespace of the file that includes this, so that
// nothing compiled here for one instruction set can be linked into another's code path (see
// micro.h).
//
// S offers: V (a vector of kLanes floats, GCC/Clang vector extension), I (the same of int32_t),
// kLanes, fma(a, b, c), store_native(p, index, v). For gemm and panel also: kRows (rows of a dot
// product that fit into the registers), kTiles (tiles one row is multiplied with at a time),
// bf16(p)/f16(p) (kLanes weights widened), f8(p, w) (32 weights widened and divided by kF8Unit).
#pragma once

#include "kernels/cpu/micro_lanes.h"

namespace dsv3::kernels::simd {

// e^x, relative error below 2e-7 for x in [-87, 88]; 0 below, e^88 above, NaN for NaN. x = n ln 2 +
// r with |r| <= ln(2)/2, Taylor series of degree 7 (its remainder is r^8/40320 < 6e-9).
template <class S>
inline typename S::V exp(typename S::V x) {
  using V = typename S::V;
  using I = typename S::I;
  const V magic = splat<S>(0x1.8p23f);  // adding it rounds to an integer in the low bits
  x = x > 88.0f ? splat<S>(88.0f) : x;
  const V shifted = S::fma(x, splat<S>(1.44269504f), magic);
  const V n = shifted - magic;
  V r = S::fma(n, splat<S>(-0x1.63p-1f), x);  // the head of ln 2 has 9 bits: n times it is exact
  r = S::fma(n, splat<S>(0x1.bd0106p-13f), r);
  V p = splat<S>(1.0f / 5040);
  p = S::fma(p, r, splat<S>(1.0f / 720));
  p = S::fma(p, r, splat<S>(1.0f / 120));
  p = S::fma(p, r, splat<S>(1.0f / 24));
  p = S::fma(p, r, splat<S>(1.0f / 6));
  p = S::fma(p, r, splat<S>(0.5f));
  p = S::fma(p, r, splat<S>(1.0f));
  p = S::fma(p, r, splat<S>(1.0f));
  const I exponent = ((I)shifted - (I)magic + 127) << 23;
  const V result = p * (V)exponent;
  return x < -87.0f ? V{} : result;
}

// --- linear layers

// The 32 weights of one pair of inputs, as they stand; FP8 divided by S::kF8Unit.
template <class S, WeightType kType>
inline void widen(const uint8_t* p, typename S::V* w) {
  constexpr int kLanes = S::kLanes;
  if constexpr (kType == WeightType::kF8E4M3) {
    S::f8(p, w);
  } else {
    for (int j = 0; j < 32 / kLanes; ++j) {
      if constexpr (kType == WeightType::kF32) {
        w[j] = load<S>(reinterpret_cast<const float*>(p) + j * kLanes);
      } else if constexpr (kType == WeightType::kBF16) {
        w[j] = S::bf16(p + 2 * j * kLanes);
      } else {
        w[j] = S::f16(p + 2 * j * kLanes);
      }
    }
  }
}

constexpr int64_t size_of(WeightType type) {
  return type == WeightType::kF32 ? 4 : type == WeightType::kF8E4M3 ? 1 : 2;
}

template <class S, WeightType kType>
inline void decode_as(const uint8_t* p, int32_t pairs, int64_t pair_stride, float* out,
                      int64_t ahead) {
  for (int32_t i = 0; i < pairs; ++i) {
    typename S::V w[32 / S::kLanes];
    const uint8_t* from = p + i * pair_stride * size_of(kType);
    __builtin_prefetch(from + ahead);
    widen<S, kType>(from, w);
    for (int j = 0; j < 32 / S::kLanes; ++j) store<S>(out + 32 * i + j * S::kLanes, w[j]);
  }
}

// out[pairs][16][2] float32 from weights of any type; pair_stride in elements. What lies `ahead`
// bytes further on is fetched meanwhile: memory would idle while the rows are multiplied.
template <class S>
inline void decode(WeightType type, const uint8_t* p, int32_t pairs, int64_t pair_stride,
                   float* out, int64_t ahead = 0) {
  switch (type) {
    case WeightType::kF32:
      return decode_as<S, WeightType::kF32>(p, pairs, pair_stride, out, ahead);
    case WeightType::kBF16:
      return decode_as<S, WeightType::kBF16>(p, pairs, pair_stride, out, ahead);
    case WeightType::kF16:
      return decode_as<S, WeightType::kF16>(p, pairs, pair_stride, out, ahead);
    default:
      return decode_as<S, WeightType::kF8E4M3>(p, pairs, pair_stride, out, ahead);
  }
}

// sums[16] of one row: even and odd inputs were summed apart.
template <class S>
inline void join_pairs(const typename S::V* acc, float unit, float* sums) {
  if constexpr (S::kLanes == 16) {
    const auto even = __builtin_shufflevector(acc[0], acc[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20,
                                              22, 24, 26, 28, 30);
    const auto odd = __builtin_shufflevector(acc[0], acc[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21,
                                             23, 25, 27, 29, 31);
    store<S>(sums, (even + odd) * unit);
    return;
  }
  float lanes[32];
  for (int j = 0; j < 32 / S::kLanes; ++j) store<S>(lanes + j * S::kLanes, acc[j]);
  for (int c = 0; c < 16; ++c) sums[c] = (lanes[2 * c] + lanes[2 * c + 1]) * unit;
}

// sums[r][16] over the pairs of one block, times unit (a power of two).
template <class S, int R>
inline void dot_rows(const float* block, int32_t pairs, const float* const* x, int64_t offset,
                     float unit, float* sums) {
  using V = typename S::V;
  constexpr int kVectors = 32 / S::kLanes;
  V acc[R][kVectors] = {};
  const float* row[R];
  for (int r = 0; r < R; ++r) row[r] = x[r] + offset;
  for (int32_t i = 0; i < pairs; ++i) {
    V w[kVectors];
    for (int j = 0; j < kVectors; ++j) w[j] = load<S>(block + 32 * i + j * S::kLanes);
    for (int r = 0; r < R; ++r) {
      const V pair = load_pair<S>(row[r] + 2 * i);
      for (int j = 0; j < kVectors; ++j) acc[r][j] = S::fma(w[j], pair, acc[r][j]);
    }
  }
  for (int r = 0; r < R; ++r) join_pairs<S>(acc[r], unit, sums + 16 * r);
}

// Calls use(first_row, count, sums) for all rows of a block in turn.
template <class S, class Use>
inline void dot_all(const float* block, int32_t pairs, const float* const* x, int32_t rows,
                    int64_t offset, float unit, Use use) {
  float sums[S::kRows * 16];
  int32_t r = 0;
  for (; r + S::kRows <= rows; r += S::kRows) {
    dot_rows<S, S::kRows>(block, pairs, x + r, offset, unit, sums);
    for (int i = 0; i < S::kRows; ++i) use(r + i, sums + 16 * i);
  }
  for (; r < rows; ++r) {
    dot_rows<S, 1>(block, pairs, x + r, offset, unit, sums);
    use(r, sums);
  }
}

// The 16 scales of a tile for the block of inputs that begins at k.
template <class S>
inline void tile_scales(const TiledWeights& w, int32_t tile, int32_t k, float* scale) {
  const auto of_row = [&](int32_t row) {
    return w.scales[int64_t{row / w.scale_n} * w.scale_columns + k / w.scale_k];
  };
  if (w.type != WeightType::kF8E4M3 || w.scale_n % 16 == 0) {  // one for all: no 16 divisions
    const float same = w.type == WeightType::kF8E4M3 ? of_row(tile * 16) : 1.0f;
    for (int i = 0; i < 16; ++i) scale[i] = same;
    return;
  }
  for (int i = 0; i < 16; ++i) {
    const int32_t row = tile * 16 + i;
    scale[i] = of_row(row < w.n ? row : w.n - 1);
  }
}

// out[16] = fma(sums, scale, out)
template <class S>
inline void add_scaled(const float* sums, const float* scale, float* out) {
  for (int c = 0; c < 16; c += S::kLanes) {
    store<S>(out + c, S::fma(load<S>(sums + c), load<S>(scale + c), load<S>(out + c)));
  }
}

template <class S>
constexpr float unit_of(WeightType type) {
  return type == WeightType::kF8E4M3 ? S::kF8Unit : 1.0f;
}

// One row and kT tiles: weights go from memory into the sums, without a stop in scratch.
template <class S, WeightType kType, int kT>
inline void gemm_row(const GemmArgs& a, int32_t tile) {
  using V = typename S::V;
  constexpr int kVectors = 32 / S::kLanes;
  constexpr int64_t kPairBytes = 32 * size_of(kType);
  const auto* x = static_cast<const float*>(a.x[0]);
  const int32_t all_pairs = (a.w.k + 1) / 2;
  const int32_t block_pairs = a.w.block_k / 2;
  const int64_t tile_bytes = all_pairs * kPairBytes;
  const uint8_t* w = a.w.data + (a.tile + tile) * tile_bytes;
  for (int32_t begin = 0; begin < all_pairs; begin += block_pairs) {
    const int32_t left = all_pairs - begin;
    const int32_t end = begin + (left < block_pairs ? left : block_pairs);
    V acc[kT][kVectors] = {};
    for (int32_t i = begin; i < end; ++i) {
      const V pair = load_pair<S>(x + 2 * i);
      for (int t = 0; t < kT; ++t) {
        V v[kVectors];
        widen<S, kType>(w + t * tile_bytes + i * kPairBytes, v);
        for (int j = 0; j < kVectors; ++j) acc[t][j] = S::fma(v[j], pair, acc[t][j]);
      }
    }
    for (int t = 0; t < kT; ++t) {
      float sums[16];
      float scale[16];
      tile_scales<S>(a.w, a.tile + tile + t, 2 * begin, scale);
      join_pairs<S>(acc[t], unit_of<S>(kType), sums);
      add_scaled<S>(sums, scale, a.out + 16 * (tile + t));
    }
  }
}

template <class S, WeightType kType>
inline void gemm_one(const GemmArgs& a) {
  int32_t t = 0;
  for (; t + S::kTiles <= a.tiles; t += S::kTiles) gemm_row<S, kType, S::kTiles>(a, t);
  for (; t < a.tiles; ++t) gemm_row<S, kType, 1>(a, t);
}

template <class S>
void gemm(const GemmArgs& a) {
  for (int32_t r = 0; r < a.rows; ++r) {
    for (int32_t c = 0; c < 16 * a.tiles; ++c) a.out[r * a.out_stride + c] = 0;
  }
  if (a.rows == 1) {
    switch (a.w.type) {
      case WeightType::kF32:
        return gemm_one<S, WeightType::kF32>(a);
      case WeightType::kBF16:
        return gemm_one<S, WeightType::kBF16>(a);
      case WeightType::kF16:
        return gemm_one<S, WeightType::kF16>(a);
      default:
        return gemm_one<S, WeightType::kF8E4M3>(a);
    }
  }
  const auto* const* x = reinterpret_cast<const float* const*>(a.x);
  auto* block = static_cast<float*>(a.scratch);
  const int32_t all_pairs = (a.w.k + 1) / 2;
  const int32_t block_pairs = a.w.block_k / 2;
  const int64_t size = size_of(a.w.type);
  const float unit = unit_of<S>(a.w.type);
  for (int32_t t = 0; t < a.tiles; ++t) {
    const uint8_t* tile = a.w.data + int64_t{a.tile + t} * all_pairs * 32 * size;
    for (int32_t begin = 0; begin < all_pairs; begin += block_pairs) {
      const int32_t left = all_pairs - begin;
      const int32_t pairs = left < block_pairs ? left : block_pairs;
      float scale[16];
      tile_scales<S>(a.w, a.tile + t, 2 * begin, scale);
      // The tile's next block, or the next tile's first.
      const uint8_t* w = tile + begin * 32 * size;
      const uint8_t* next = left > pairs || t + 1 < a.tiles ? w + pairs * 32 * size : a.next;
      decode<S>(a.w.type, w, pairs, 32, block, next != nullptr ? next - w : 0);
      dot_all<S>(block, pairs, x, a.rows, int64_t{2} * begin, unit,
                 [&](int32_t r, const float* sums) {
                   add_scaled<S>(sums, scale, a.out + r * a.out_stride + 16 * t);
                 });
    }
  }
}

template <class S>
void panel(const PanelArgs& a) {
  const auto* const* x = reinterpret_cast<const float* const*>(a.x);
  auto* block = static_cast<float*>(a.scratch);
  for (int32_t r = 0; r < a.rows; ++r) {
    float* out = a.out + r * a.out_stride;
    for (int32_t c = 0; c < 64; ++c) out[c] = a.keep != nullptr ? out[c] * a.keep[r] : 0.0f;
  }
  constexpr int32_t kPairs = kBlockK / 2;
  for (int32_t t = 0; t < 4; ++t) {
    for (int32_t begin = 0; begin < a.pairs; begin += kPairs) {
      const int32_t pairs = a.pairs - begin < kPairs ? a.pairs - begin : kPairs;
      decode<S>(WeightType::kBF16, a.w + (int64_t{begin} * 128 + t * 32) * 2, pairs, 128, block);
      dot_all<S>(block, pairs, x, a.rows, int64_t{2} * begin, 1.0f,
                 [&](int32_t r, const float* sums) {
                   float* out = a.out + r * a.out_stride + 16 * t;
                   for (int c = 0; c < 16; ++c) out[c] += sums[c];
                 });
    }
  }
}

// --- attention

// A page holds [dim pair][64 keys][2 dims]; the four values of two keys and two dims are eight
// bytes, in which only the middle two values trade places.
template <class S>
void values(const uint8_t* page, int32_t dims, int32_t begin, int32_t end, int32_t pair_begin,
            int32_t pairs_total, uint8_t* out) {
  constexpr uint64_t kOuter = 0xffff00000000ffffu;
  for (int32_t group = 0; group < dims; group += 16) {  // the rows it fills stay in L1
    const int32_t group_end = group + 16 < dims ? group + 16 : dims;
    uint8_t* columns =
        out + (int64_t{group / 64} * pairs_total + pair_begin) * 256 + group % 64 * 4;
    for (int32_t d = group; d < group_end; d += 2) {
      for (int32_t key = 0; key < kPageKeys; key += 2) {
        const uint64_t first = key >= begin && key < end ? 0x0000ffff0000ffffu : 0;
        const uint64_t second = key + 1 >= begin && key + 1 < end ? 0xffff0000ffff0000u : 0;
        uint64_t v;
        __builtin_memcpy(&v, page + (int64_t{d / 2} * kPageKeys + key) * 4, 8);
        v = ((v & kOuter) | ((v >> 16) & 0xffff0000u) | ((v << 16) & 0x0000ffff00000000u)) &
            (first | second);
        __builtin_memcpy(columns + int64_t{key / 2} * 256 + (d - group) * 4, &v, 8);
      }
    }
  }
}

template <class S>
float softmax(const float* s, int32_t begin, int32_t end, float scale, float* max, float* sum,
              void* p) {
  using V = typename S::V;
  using I = typename S::I;
  constexpr int kVectors = kKeyBlock / S::kLanes;
  if (begin >= end) {
    for (int j = 0; j < kVectors; ++j) S::store_native(p, j * S::kLanes, V{});
    return 1;
  }
  I lane;
  for (int i = 0; i < S::kLanes; ++i) lane[i] = i;
  V score[kVectors];
  V top = splat<S>(-__builtin_inff());
  for (int j = 0; j < kVectors; ++j) {
    const I index = lane + j * S::kLanes;
    const I inside = (index >= begin) & (index < end);
    score[j] = inside ? load<S>(s + j * S::kLanes) * scale : splat<S>(-__builtin_inff());
    top = score[j] > top ? score[j] : top;
  }
  const float block_max = max_lanes<S>(top);
  const float new_max = block_max > *max ? block_max : *max;
  V total = {};
  for (int j = 0; j < kVectors; ++j) {
    const I index = lane + j * S::kLanes;
    const I inside = (index >= begin) & (index < end);
    const V weight = inside ? exp<S>(score[j] - new_max) : V{};
    total += weight;
    S::store_native(p, j * S::kLanes, weight);
  }
  const V keep = exp<S>(splat<S>(*max - new_max));
  *max = new_max;
  *sum = *sum * keep[0] + sum_lanes<S>(total);
  return keep[0];
}

template <class S>
void merge(float* total, float a, const float* part, float b, int32_t count) {
  int32_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) {
    store<S>(total + i, S::fma(load<S>(part + i), splat<S>(b), load<S>(total + i) * a));
  }
  if (i < count) {
    const auto t = load_part<S>(total + i, count - i) * a;
    store_part<S>(total + i, S::fma(load_part<S>(part + i, count - i), splat<S>(b), t), count - i);
  }
}

// --- elementwise

template <class S>
void rms_norm(const float* x, const float* gamma, float eps, int32_t dim, float* out) {
  using V = typename S::V;
  V sum[4] = {};
  int32_t i = 0;
  for (; i + 4 * S::kLanes <= dim; i += 4 * S::kLanes) {
    for (int j = 0; j < 4; ++j) {
      const V v = load<S>(x + i + j * S::kLanes);
      sum[j] = S::fma(v, v, sum[j]);
    }
  }
  for (; i < dim; i += S::kLanes) {
    const V v = i + S::kLanes <= dim ? load<S>(x + i) : load_part<S>(x + i, dim - i);
    sum[0] = S::fma(v, v, sum[0]);
  }
  const float square = sum_lanes<S>((sum[0] + sum[1]) + (sum[2] + sum[3]));
  const float scale = 1.0f / __builtin_sqrtf(square / static_cast<float>(dim) + eps);
  i = 0;
  for (; i + S::kLanes <= dim; i += S::kLanes) {
    store<S>(out + i, load<S>(x + i) * scale * load<S>(gamma + i));
  }
  for (; i < dim; ++i) out[i] = x[i] * scale * gamma[i];
}

template <class S>
void silu_mul(float* gate, const float* up, int32_t count) {
  using V = typename S::V;
  const auto silu = [](V g, V u) { return g / (exp<S>(-g) + 1.0f) * u; };
  int32_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) {
    store<S>(gate + i, silu(load<S>(gate + i), load<S>(up + i)));
  }
  if (i < count) {
    const V g = load_part<S>(gate + i, count - i);
    store_part<S>(gate + i, silu(g, load_part<S>(up + i, count - i)), count - i);
  }
}

template <class S>
void add(float* y, const float* x, int64_t count) {
  int64_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) store<S>(y + i, load<S>(y + i) + load<S>(x + i));
  for (; i < count; ++i) y[i] += x[i];
}

template <class S>
void add_weighted(float* y, const float* const* parts, const float* weights, int32_t parts_count,
                  int32_t count) {
  using V = typename S::V;
  int32_t i = 0;
  for (; i + S::kLanes <= count; i += S::kLanes) {
    V sum = {};
    for (int32_t j = 0; j < parts_count; ++j) {
      sum = S::fma(load<S>(parts[j] + i), splat<S>(weights[j]), sum);
    }
    store<S>(y + i, load<S>(y + i) + sum);
  }
  if (i < count) {
    V sum = {};
    for (int32_t j = 0; j < parts_count; ++j) {
      sum = S::fma(load_part<S>(parts[j] + i, count - i), splat<S>(weights[j]), sum);
    }
    store_part<S>(y + i, load_part<S>(y + i, count - i) + sum, count - i);
  }
}

// The lowest index of `value`, which is among x.
template <class S>
inline int32_t find_first(const float* x, int32_t count, float value) {
  using I = typename S::I;
  constexpr int32_t kStep = 8 * S::kLanes;
  int32_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    I same = {};
    for (int j = 0; j < 8; ++j) same |= load<S>(x + i + j * S::kLanes) == splat<S>(value);
    int32_t any = 0;
    for (int j = 0; j < S::kLanes; ++j) any |= same[j];
    if (any != 0) break;
  }
  while (x[i] != value) ++i;
  return i;
}

template <class S>
void reduce(const float* x, int32_t count, int32_t* argmax, float* max, double* sum_exp,
            bool* finite) {
  using V = typename S::V;
  using I = typename S::I;
  V top[4];
  for (V& t : top) t = splat<S>(-__builtin_inff());
  I good = (I)(V{}) == (I)(V{});
  int32_t i = 0;
  for (; i + 4 * S::kLanes <= count; i += 4 * S::kLanes) {
    for (int j = 0; j < 4; ++j) {
      const V v = load<S>(x + i + j * S::kLanes);
      top[j] = v > top[j] ? v : top[j];
      good &= (v - v) == V{};
    }
  }
  bool all = true;
  for (int j = 0; j < S::kLanes; ++j) all = all && good[j] != 0;
  float best = -__builtin_inff();
  for (const V& t : top) {
    const float m = max_lanes<S>(t);
    best = m > best ? m : best;
  }
  for (; i < count; ++i) {
    best = x[i] > best ? x[i] : best;
    all = all && x[i] - x[i] == 0;
  }
  *finite = all;
  int32_t at = 0;
  if (all) {
    at = find_first<S>(x, count, best);
  } else {
    for (int32_t j = 1; j < count; ++j) at = x[j] > x[at] ? j : at;
  }
  *argmax = at;
  *max = x[at];
  double total = 0;
  for (i = 0; i < count;) {  // short float32 sums, joined in double
    V part = {};
    int j = 0;
    for (; j < 16 && i + S::kLanes <= count; ++j, i += S::kLanes) {
      part += exp<S>(load<S>(x + i) - *max);
    }
    if (j < 16 && i < count) {
      V e = exp<S>(load_part<S>(x + i, count - i) - *max);
      for (int64_t l = count - i; l < S::kLanes; ++l) e[l] = 0;
      part += e;
      i = count;
    }
    total += static_cast<double>(sum_lanes<S>(part));
  }
  *sum_exp = total;
}

template <class S>
void weigh(const float* x, int32_t count, float max, float scale, float* weights, double* sums) {
  using V = typename S::V;
  for (int32_t begin = 0; begin < count; begin += kWeighed) {
    const int32_t end = begin + kWeighed < count ? begin + kWeighed : count;
    V sum = {};
    int32_t i = begin;
    for (; i + S::kLanes <= end; i += S::kLanes) {
      const V w = exp<S>((load<S>(x + i) - max) * scale);
      store<S>(weights + i, w);
      sum += w;
    }
    if (i < end) {
      const V w = exp<S>((load_part<S>(x + i, end - i) - max) * scale);
      store_part<S>(weights + i, w, end - i);
      // Lanes beyond the end weigh nothing.
      sum += load_part<S>(weights + i, end - i);
    }
    sums[begin / kWeighed] = static_cast<double>(sum_lanes<S>(sum));
  }
}

// Packing to float32: a copy with padding.
template <class S>
void pack_f32(const float* x, int32_t k, int32_t padded, float* out) {
  __builtin_memcpy(out, x, static_cast<size_t>(k) * sizeof(float));
  for (int32_t i = k; i < padded; ++i) out[i] = 0;
}

}  // namespace dsv3::kernels::simd
