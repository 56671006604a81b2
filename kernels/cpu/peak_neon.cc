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

struct Words {
  using V __attribute__((vector_size(16))) = uint64_t;
};

constexpr Peak kPeak = {"f32", peak::chains<Products>, peak::read<Words>};

}  // namespace

const Peak* peak_neon() { return &kPeak; }

}  // namespace dsv3::kernels
