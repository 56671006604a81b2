#include <immintrin.h>

#include "kernels/cpu/peak.h"
#include "kernels/cpu/peak_chains.h"
#include "kernels/cpu/peak_read.h"

namespace dsv3::kernels {
namespace {

struct Products {
  using V = __m256;
  using In = __m256;
  static constexpr double kOperations = 2 * 8;
  static In in() {
    volatile float source = 0.5f;
    return _mm256_set1_ps(source);
  }
  static V add(V sum, In a) { return _mm256_fmadd_ps(a, a, sum); }
};

struct Words {
  using V __attribute__((vector_size(32))) = uint64_t;
};

constexpr Peak kPeak = {"f32", peak::chains<Products>, peak::read<Words>};

}  // namespace

const Peak* peak_avx2() { return &kPeak; }

}  // namespace dsv3::kernels
