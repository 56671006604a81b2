#include <immintrin.h>

#include "kernels/cpu/peak.h"

namespace dsv3::kernels {

double dot_peak_avx2(int64_t rounds) {
  constexpr int kChains = 12;
  volatile float source = 0.5f;
  const __m256 a = _mm256_set1_ps(source), b = _mm256_set1_ps(source);
  __m256 sums[kChains];
  for (__m256& sum : sums) sum = _mm256_setzero_ps();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) {
      sums[chain] = _mm256_fmadd_ps(a, b, sums[chain]);
      asm volatile("" : "+x"(sums[chain]));  // the compiler must not fold rounds together
    }
  }
  for (const __m256& sum : sums) source = _mm256_cvtss_f32(sum);
  return 2.0 * 8 * kChains * static_cast<double>(rounds);
}

}  // namespace dsv3::kernels
