#include <arm_neon.h>

#include "kernels/cpu/peak.h"
#include "kernels/cpu/peak_chains.h"
#include "kernels/cpu/peak_read.h"

namespace dsv3::kernels {
namespace {

struct Products {
  using V = float32x4_t;
  using In = float32x4_t;
  static constexpr double kOperations = 2 * 4;
  static In in() {
    volatile float source = 0.5f;
    return vdupq_n_f32(source);
  }
  static V add(V sum, In a) { return vfmaq_f32(sum, a, a); }
};

// Eight products of 16 bytes, summed in 16 bits, and their sum in 32.
struct ByteProducts {
  using V = int32x4_t;
  using In = int8x16_t;
  static constexpr double kOperations = 8 * 2 * 16;
  static In in() {
    volatile int8_t source = 1;
    return vdupq_n_s8(source);
  }
  static V add(V sum, In a) {
    int16x8_t low = vdupq_n_s16(0), high = low;
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      asm volatile("" : "+w"(a));  // it is the same product each time
      low = vmlal_s8(low, vget_low_s8(a), vget_low_s8(a));
      high = vmlal_s8(high, vget_high_s8(a), vget_low_s8(a));
    }
    return vaddq_s32(sum, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
  }
};

struct Words {
  using V __attribute__((vector_size(16))) = uint64_t;
};

constexpr Peak kPeak = {"f32", peak::chains<Products>, peak::chains<ByteProducts>,
                        peak::read<Words>};

}  // namespace

const Peak* peak_neon() { return &kPeak; }

}  // namespace dsv3::kernels
