// aarch64 with Advanced SIMD, which every such processor has: float32 arithmetic on widened
// weights; INT8 products on MXFP4. Never run on hardware, only under emulation.
#include "kernels/cpu/micro_simdneon.h"

namespace dsv3::kernels {
namespace {

struct Neon : simd::SimdNeon<Neon> {
  static void store_native(void* p, int index, V v) {
    simd::store<Neon>(static_cast<float*>(p) + index, v);
  }

  // MXFP4: a block's eight products of at most 12 * 127 fit into 16 bits.
  static constexpr int kMxRows = 2;
  static constexpr int kMxOneRowTiles = 1;
  static constexpr int kMxDirect = 2;
  static constexpr int kMxAhead = 0;
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
};

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

const Micro* micro_neon() { return &kMicro; }

}  // namespace dsv3::kernels
