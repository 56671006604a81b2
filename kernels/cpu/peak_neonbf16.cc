#include <arm_neon.h>

#include "kernels/cpu/peak.h"
#include "kernels/cpu/peak_chains.h"
#include "kernels/cpu/peak_read.h"

namespace dsv3::kernels {
namespace {

struct Products {
  using V = float32x4_t;
  using In = bfloat16x8_t;
  static constexpr double kOperations = 4 * 4;
  static In in() {
    volatile float source = 0.5f;
    return vcvtq_low_bf16_f32(vdupq_n_f32(source));
  }
  static V add(V sum, In a) { return vbfdotq_f32(sum, a, a); }
};

struct ByteProducts {
  using V = int32x4_t;
  using In = int8x16_t;
  static constexpr double kOperations = 8 * 4;
  static In in() {
    volatile int8_t source = 1;
    return vdupq_n_s8(source);
  }
  static V add(V sum, In a) { return vdotq_s32(sum, a, a); }
};

struct Words {
  using V __attribute__((vector_size(16))) = uint64_t;
};

constexpr Peak kPeak = {"bf16", peak::chains<Products>, peak::chains<ByteProducts>,
                        peak::read<Words>};

}  // namespace

const Peak* peak_neonbf16() { return &kPeak; }

}  // namespace dsv3::kernels
