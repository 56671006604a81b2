#include <immintrin.h>

#include "kernels/cpu/peak.h"
#include "kernels/cpu/peak_chains.h"

namespace dsv3::kernels {
namespace {

struct Products {
  using V = __m512i;
  using In = __m512i;
  static constexpr double kOperations = 8 * 16;
  static In in() {
    volatile int source = 1;
    return _mm512_set1_epi8(static_cast<char>(source));
  }
  static V add(V sum, In a) { return _mm512_dpbusd_epi32(sum, a, a); }
};

}  // namespace

double int8_peak_avx512vnni(int64_t rounds) { return peak::chains<Products>(rounds); }

}  // namespace dsv3::kernels
