// aarch64 with Advanced SIMD, which every such processor has: float32 arithmetic on widened
// weights; INT8 products on MXFP4.
#include <arm_neon.h>

#include "kernels/cpu/micro_mx.h"

namespace dsv3::kernels {
namespace {

struct Neon {
  using V __attribute__((vector_size(16))) = float;
  using I __attribute__((vector_size(16))) = int32_t;
  static constexpr int kLanes = 4;
  static constexpr int kRows = 2;
  static constexpr int kTiles = 2;
  static V fma(V a, V b, V c) {
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  }
  static V bf16(const uint8_t* p) {
    const uint16x4_t v = vreinterpret_u16_u8(vld1_u8(p));
    return (V)vshll_n_u16(v, 16);
  }
  static V f16(const uint8_t* p) { return (V)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
  // E4M3 read as binary16 is 2^-8 of its value, subnormals included: sign-extended to 16 bits and
  // shifted left by seven, everything is in place but a copy of the sign in bit 14.
  static constexpr float kF8Unit = 256.0f;
  static void f8(const uint8_t* p, V* w) {
    const uint16x8_t mask = vdupq_n_u16(0xbfff);
    for (int i = 0; i < 4; ++i) {
      const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p + 8 * i)));
      const uint16x8_t half = vandq_u16(vreinterpretq_u16_s16(vshlq_n_s16(wide, 7)), mask);
      w[2 * i] = (V)vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(half)));
      w[2 * i + 1] = (V)vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(half)));
    }
  }
  static void store_native(void* p, int index, V v) {
    simd::store<Neon>(static_cast<float*>(p) + index, v);
  }

  // MXFP4: a block's eight products of at most 12 * 127 fit into 16 bits.
  using B = int8x16_t;
  static constexpr bool kMxUnsigned = false;
  static constexpr int kMxRows = 2;
  static constexpr int kMxTiles = 1;
  static constexpr int kMxDirect = 2;
  struct Sum {
    int16x8_t low, high;  // rows 0 and 1, rows 2 and 3: four inputs each
    void begin(int32_t) { low = high = vdupq_n_s16(0); }
    void dot(B w, const int8_t* x) {
      int32_t four;
      __builtin_memcpy(&four, x, sizeof four);
      const int8x8_t both = vreinterpret_s8_s32(vdup_n_s32(four));
      low = vmlal_s8(low, vget_low_s8(w), both);
      high = vmlal_s8(high, vget_high_s8(w), both);
    }
    void half() {}
    I total() const { return (I)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)); }
  };
  static void mx_widen(const uint8_t* p, B* lo, B* hi);
  static V mx_scales(const uint8_t* p) {
    uint32_t codes;
    __builtin_memcpy(&codes, p, sizeof codes);
    const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(codes)));
    const uint32x4_t bits = vshlq_n_u32(vmovl_u16(vget_low_u16(wide)), 23);
    return (V)vmaxq_u32(bits, vdupq_n_u32(0x00400000));  // code 0 is 2^-127, a subnormal number
  }
};

constexpr mx::Table<Neon> kMxTable;
inline void Neon::mx_widen(const uint8_t* p, B* lo, B* hi) {
  const int8x16_t table = vld1q_s8(kMxTable.values);
  const uint8x16_t packed = vld1q_u8(p);
  *lo = vqtbl1q_s8(table, vandq_u8(packed, vdupq_n_u8(15)));
  *hi = vqtbl1q_s8(table, vshrq_n_u8(packed, 4));
}

void gemm(const GemmArgs& a) {
  if (a.w.type == WeightType::kMXFP4) return mx::gemm<Neon>(a);
  simd::gemm<Neon>(a);
}

void pack(Activation type, const float* x, int32_t k, int32_t padded, void* out) {
  if (type == Activation::kI8) return mx::pack_i8<Neon>(x, k, padded, out);
  simd::pack_f32<Neon>(x, k, padded, static_cast<float*>(out));
}

constexpr Activation kF32 = Activation::kF32;
constexpr Micro kMicro = {
    "neon",
    kF32,
    {kF32, kF32, kF32, kF32, Activation::kI8},
    pack,
    gemm,
    simd::gemm<Neon>,
    simd::panel<Neon>,
    simd::values<Neon>,
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

const Micro* micro_neon() { return &kMicro; }

}  // namespace dsv3::kernels
