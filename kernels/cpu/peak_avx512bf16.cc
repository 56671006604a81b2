#include <immintrin.h>

#include "kernels/cpu/peak.h"

namespace dsv3::kernels {

double dot_peak_avx512bf16(int64_t rounds) {
  constexpr int kChains = 12;
  volatile float source = 0.5f;
  const __m512 value = _mm512_set1_ps(source);
  const __m512bh a = _mm512_cvtne2ps_pbh(value, value), b = _mm512_cvtne2ps_pbh(value, value);
  __m512 sums[kChains];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (int64_t i = 0; i < rounds; ++i) {
#pragma GCC unroll 12
    for (int chain = 0; chain < kChains; ++chain) {
      sums[chain] = _mm512_dpbf16_ps(sums[chain], a, b);
      asm volatile("" : "+v"(sums[chain]));  // the compiler must not fold rounds together
    }
  }
  for (const __m512& sum : sums) source = _mm512_cvtss_f32(sum);
  return 4.0 * 16 * kChains * static_cast<double>(rounds);
}

}  // namespace dsv3::kernels
