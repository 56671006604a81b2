#include <arm_neon.h>

#include "kernels/cpu/peak.h"
#include "kernels/cpu/peak_chains.h"

namespace dsv3::kernels {
namespace {

struct Products {
  using V = int32x4_t;
  using In = int8x16_t;
  static constexpr double kOperations = 8 * 4;
  static In in() {
    volatile int8_t source = 1;
    return vdupq_n_s8(source);
  }
  static V add(V sum, In a) { return vdotq_s32(sum, a, a); }
};

}  // namespace

double int8_peak_neondot(int64_t rounds) { return peak::chains<Products>(rounds); }

}  // namespace dsv3::kernels
