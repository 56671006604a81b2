// aarch64 with BF16 and INT8 dot products (Armv8.6-A has both): BFDOT on BF16 and on widened FP8
// weights; SDOT on MXFP4; F16 and F32 weights through float32. Never run on hardware, only under
// emulation.
//
// BFDOT adds both products to each other and then to the sum, rounding to odd and taking subnormal
// numbers for zero, whatever FPCR's rounding and flushing say: so it is on every processor, one
// with FEAT_EBF16 included as long as FPCR.EBF is zero, which it is where no program sets it (Arm
// Architecture Reference Manual, BFDOT). BFMMLA would do twice the work for many rows, but it adds
// four products at a time, in another order than one row alone would at this speed.
#include "kernels/cpu/fp8_tables.h"
#include "kernels/cpu/micro_simdneon.h"

namespace dsv3::kernels {
namespace {

struct Neon : simd::SimdNeon<Neon> {
  static void store_native(void* p, int index, V v) {
    const bfloat16x4_t b = vcvt_bf16_f32((float32x4_t)v);
    __builtin_memcpy(static_cast<uint8_t*>(p) + 2 * index, &b, sizeof b);
  }

  // MXFP4
  static constexpr int kMxRows = 3;
  static constexpr int kMxOneRowTiles = 1;
  static constexpr int kMxDirect = 4;
  static constexpr int kMxAhead = 0;
  struct Sum {
    int32x4_t sum;
    void begin(int32_t) { sum = vdupq_n_s32(0); }
    void dot(B w, const int8_t* x) {
      int32_t four;
      __builtin_memcpy(&four, x, sizeof four);
      sum = vdotq_s32(sum, w, vreinterpretq_s8_s32(vdupq_n_s32(four)));
    }
    void half() {}
    I total() const { return (I)sum; }
  };
};

inline bfloat16x8_t load8(const uint8_t* p) { return vreinterpretq_bf16_u8(vld1q_u8(p)); }

// FP8 to BF16, byte by byte: the high byte of a normal number is 0x3c more than its upper three
// bits, the low byte its lower four shifted up. Codes below 16, which hold all subnormal numbers,
// come from tables instead: BFDOT would take BF16 subnormals for zero, so that shifting into place
// alone (half the instructions) is not enough. Nine instructions for 16 weights. NaN codes, which
// no file has, come out as 480.
class Fp8Decoder {
 public:
  Fp8Decoder() {  // no member initialisers: Clang 14's intrinsics are not allowed in them
    low_ = vld1q_u8(simd::kByteTables.low);
    high_ = vld1q_u8(simd::kByteTables.high);
  }
  // 16 codes to two vectors of BF16.
  inline void widen(uint8x16_t codes, bfloat16x8_t* w) const {
    const uint8x16_t magnitude = vandq_u8(codes, vdupq_n_u8(0x7f));
    const uint8x16_t low = vqtbx1q_u8(vshlq_n_u8(codes, 4), low_, magnitude);
    uint8x16_t high = vsraq_n_u8(vdupq_n_u8(0x3c), magnitude, 4);
    high = vqtbx1q_u8(high, high_, magnitude);
    high = vbslq_u8(vdupq_n_u8(0x80), codes, high);
    w[0] = vreinterpretq_bf16_u8(vzip1q_u8(low, high));
    w[1] = vreinterpretq_bf16_u8(vzip2q_u8(low, high));
  }

 private:
  uint8x16_t low_, high_;  // the bytes of codes 0 to 15
};

// Where a call's weights lie: of a tile, pair after pair of inputs, 16 outputs each.
struct Weights {
  const uint8_t* data;
  int64_t tile_stride, pair_stride;  // bytes
  Fp8Decoder decoder;
};

constexpr int kVectors = 4;     // of a tile's 16 outputs
constexpr int kDirectRows = 4;  // as many rows take weights straight from memory

// The compiler must not load weights further ahead than this: it would move sums to memory for
// them. The processor does so by itself.
inline void fence() { asm volatile("" ::: "memory"); }

// acc[r][s] += a pair of inputs (lane kLane of x[r]) times the weights at w of tile s. Inlined by
// force: the sums must stay in registers.
template <int kLane, int kR, int kS, bool kF8>
[[gnu::always_inline]] inline void add_pair(const Weights& in, const uint8_t* w,
                                            const bfloat16x8_t* x,
                                            float32x4_t (*acc)[kS][kVectors]) {
  constexpr int kStep = kF8 ? 2 : 1;  // vectors loaded at a time
#pragma GCC unroll 4
  for (int s = 0; s < kS; ++s) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; j += kStep) {
      bfloat16x8_t v[kStep];
      if constexpr (kF8) {
        in.decoder.widen(vld1q_u8(w + s * in.tile_stride + 8 * j), v);
      } else {
        v[0] = load8(w + s * in.tile_stride + 16 * j);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 2
        for (int i = 0; i < kStep; ++i) {
          acc[r][s][j + i] = vbfdotq_laneq_f32(acc[r][s][j + i], v[i], x[r], kLane);
        }
      }
      if (kF8 || kR > kDirectRows || j == kVectors - 1) fence();
    }
  }
}

// acc[r][s] = sum over `pairs` pairs of row r (from x[r]) times tile s (from w), in their order.
template <int kR, int kS, bool kF8>
[[gnu::always_inline]] inline void dot(const Weights& weights, const uint8_t* w, int32_t pairs,
                                       const uint8_t* const* x, float32x4_t (*acc)[kS][kVectors]) {
  const Weights in = weights;  // in registers, whatever fence() says of memory
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) acc[r][s][j] = vdupq_n_f32(0);
    }
  }
  bfloat16x8_t v[kR];
  int32_t i = 0;
  for (; i + 4 <= pairs; i += 4, w += 4 * in.pair_stride) {
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) v[r] = load8(x[r] + 4 * i);
    add_pair<0, kR, kS, kF8>(in, w, v, acc);
    add_pair<1, kR, kS, kF8>(in, w + in.pair_stride, v, acc);
    add_pair<2, kR, kS, kF8>(in, w + 2 * in.pair_stride, v, acc);
    add_pair<3, kR, kS, kF8>(in, w + 3 * in.pair_stride, v, acc);
  }
  for (; i < pairs; ++i, w += in.pair_stride) {
#pragma GCC unroll 8
    for (int r = 0; r < kR; ++r) {
      uint32_t pair;
      __builtin_memcpy(&pair, x[r] + 4 * i, sizeof pair);
      v[r] = vreinterpretq_bf16_u32(vdupq_n_u32(pair));
    }
    add_pair<0, kR, kS, kF8>(in, w, v, acc);
  }
}

// Rows [row, row + kR) and kS tiles (from w) over one block of inputs, which begins at pair
// `begin`: out = fma(sums, scale, out).
template <int kR, int kS, bool kF8>
[[gnu::noinline]] void gemm_block(const GemmArgs& a, const Weights& in, const uint8_t* w,
                                  int32_t begin, int32_t pairs, const float* scale, int32_t row,
                                  int32_t tile) {
  const uint8_t* x[kR];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) x[r] = static_cast<const uint8_t*>(a.x[row + r]) + 4 * begin;
  float32x4_t acc[kR][kS][kVectors];
  dot<kR, kS, kF8>(in, w, pairs, x, acc);
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
    float* out = a.out + (row + r) * a.out_stride + 16 * tile;
#pragma GCC unroll 4
    for (int s = 0; s < kS; ++s) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const int at = 16 * s + 4 * j;
        const float32x4_t before = begin == 0 ? vdupq_n_f32(0) : vld1q_f32(out + at);
        vst1q_f32(out + at, vfmaq_f32(before, acc[r][s][j], vld1q_f32(scale + at)));
      }
    }
  }
}

// Calls use(begin, pairs) for every block of inputs.
template <class Use>
inline void each_block(const GemmArgs& a, Use use) {
  const int32_t all_pairs = (a.w.k + 1) / 2;
  const int32_t block_pairs = a.w.block_k / 2;
  for (int32_t begin = 0; begin < all_pairs; begin += block_pairs) {
    const int32_t left = all_pairs - begin;
    use(begin, left < block_pairs ? left : block_pairs);
  }
}

// --- a few rows: weights go from memory through registers into the sums

// Tiles [tile, ...) kS at a time, as long as there are as many. Enough sums at a time to keep four
// units busy for the four cycles that one takes.
template <int kR, int kS, bool kF8>
int32_t direct_tiles(const GemmArgs& a, const Weights& in, int32_t tile) {
  for (; tile + kS <= a.tiles; tile += kS) {
    each_block(a, [&](int32_t begin, int32_t pairs) {
      float scale[16 * kS];
      for (int s = 0; s < kS; ++s) {
        simd::tile_scales<Neon>(a.w, a.tile + tile + s, 2 * begin, scale + 16 * s);
      }
      gemm_block<kR, kS, kF8>(a, in, in.data + tile * in.tile_stride + begin * in.pair_stride,
                              begin, pairs, scale, 0, tile);
    });
  }
  return tile;
}

template <bool kF8, int kR = 1>
void direct(const GemmArgs& a, const Weights& in) {
  if (a.rows == kR) {
    int32_t tile = 0;
    if constexpr (kR == 1) tile = direct_tiles<kR, 4, kF8>(a, in, tile);
    if constexpr (kR <= 2) tile = direct_tiles<kR, 2, kF8>(a, in, tile);
    direct_tiles<kR, 1, kF8>(a, in, tile);
  } else if constexpr (kR < kDirectRows) {
    direct<kF8, kR + 1>(a, in);
  }
}

// --- many rows: a block of a tile lies widened in L1 and serves six rows at a time

constexpr int kPanelRows = 6;  // 6 rows x 4 vectors = 24 of the 32 registers

// Calls use.operator()<kR>(row) for all rows, kPanelRows at a time, then once for what is left.
template <int kR = kPanelRows, class Use>
inline void each_rows(int32_t rows, int32_t row, Use use) {
  for (; row + kR <= rows; row += kR) use.template operator()<kR>(row);
  if constexpr (kR > 1) each_rows<kR - 1>(rows, row, use);
}

template <bool kF8>
void gemm_many(const GemmArgs& a, const Weights& in) {
  auto* scratch = static_cast<uint8_t*>(a.scratch);
  const Weights wide{nullptr, 0, 64, in.decoder};
  each_block(a, [&](int32_t begin, int32_t pairs) {
    for (int32_t tile = 0; tile < a.tiles; ++tile) {
      float scale[16];
      simd::tile_scales<Neon>(a.w, a.tile + tile, 2 * begin, scale);
      const uint8_t* w = in.data + tile * in.tile_stride + begin * in.pair_stride;
      if constexpr (kF8) {
        for (int32_t i = 0; i < 2 * pairs; ++i) {
          bfloat16x8_t v[2];
          in.decoder.widen(vld1q_u8(w + 16 * i), v);
          vst1q_u8(scratch + 32 * i, vreinterpretq_u8_bf16(v[0]));
          vst1q_u8(scratch + 32 * i + 16, vreinterpretq_u8_bf16(v[1]));
        }
        w = scratch;
      }
      each_rows(a.rows, 0, [&]<int kR>(int32_t row) {
        gemm_block<kR, 1, false>(a, wide, w, begin, pairs, scale, row, tile);
      });
    }
  });
}

template <bool kF8>
void gemm_bf16(const GemmArgs& a) {
  Weights in;
  in.pair_stride = kF8 ? 32 : 64;
  in.tile_stride = (a.w.k + 1) / 2 * in.pair_stride;
  in.data = a.w.data + a.tile * in.tile_stride;
  if (a.rows <= kDirectRows) return direct<kF8>(a, in);
  gemm_many<kF8>(a, in);
}

void gemm(const GemmArgs& a) {
  switch (a.w.type) {
    case WeightType::kBF16:
      return gemm_bf16<false>(a);
    case WeightType::kF8E4M3:
      return gemm_bf16<true>(a);
    case WeightType::kMXFP4:
      return mx::gemm<Neon>(a);
    default:
      return simd::gemm<Neon>(a);
  }
}

// --- attention

template <int kR>
[[gnu::noinline]] void panel_rows(const PanelArgs& a, const Weights& in, int32_t row,
                                  int32_t tile) {
  const uint8_t* x[kR];
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) x[r] = static_cast<const uint8_t*>(a.x[row + r]);
  float32x4_t acc[kR][1][kVectors];
  dot<kR, 1, false>(in, in.data + tile * in.tile_stride, a.pairs, x, acc);
#pragma GCC unroll 8
  for (int r = 0; r < kR; ++r) {
    float* out = a.out + (row + r) * a.out_stride + 16 * tile;
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float32x4_t sum = acc[r][0][j];
      if (a.keep != nullptr) sum = vfmaq_n_f32(sum, vld1q_f32(out + 4 * j), a.keep[row + r]);
      vst1q_f32(out + 4 * j, sum);
    }
  }
}

void panel(const PanelArgs& a) {
  const Weights in{a.w, 64, 256, {}};
  for (int32_t tile = 0; tile < 4; ++tile) {
    each_rows(a.rows, 0, [&]<int kR>(int32_t row) { panel_rows<kR>(a, in, row, tile); });
  }
}

void pack(Activation type, const float* x, int32_t k, int32_t padded, void* out) {
  if (type == Activation::kF32) {
    return simd::pack_f32<Neon>(x, k, padded, static_cast<float*>(out));
  }
  if (type == Activation::kI8) return mx::pack_i8<Neon>(x, k, padded, out);
  int32_t i = 0;
  for (; i + 4 <= k; i += 4) Neon::store_native(out, i, simd::load<Neon>(x + i));
  for (; i < padded; ++i) {
    const bfloat16_t b = vcvth_bf16_f32(i < k ? x[i] : 0.0f);
    __builtin_memcpy(static_cast<uint8_t*>(out) + 2 * i, &b, sizeof b);
  }
}

constexpr Activation kF32 = Activation::kF32;
constexpr Activation kBF16 = Activation::kBF16;
constexpr Micro kMicro = {
    "neonbf16",
    kBF16,
    {kF32, kBF16, kF32, kBF16, Activation::kI8},
    pack,
    gemm,
    simd::gemm<Neon>,
    panel,
    simd::page_values<Neon>,
    simd::softmax<Neon>,
    simd::merge<Neon>,
    simd::rms_norm<Neon>,
    simd::silu_mul<Neon>,
    simd::add<Neon>,
    simd::add_weighted<Neon>,
    simd::reduce<Neon>,
    simd::weigh<Neon>,
};

}  // namespace

const Micro* micro_neonbf16() { return &kMicro; }

}  // namespace dsv3::kernels
