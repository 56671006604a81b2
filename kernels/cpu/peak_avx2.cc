#include <immintrin.h>

#include "kernels/cpu/peak.h"
#include "kernels/cpu/peak_read.h"

namespace dsv3::kernels {
namespace {

struct Words {
  using V __attribute__((vector_size(32))) = uint64_t;
};

// Twelve chains as twelve variables: of an array the compiler keeps every sum in memory.
double dot(int64_t rounds) {
  volatile float source = 0.5f;
  const __m256 a = _mm256_set1_ps(source), b = _mm256_set1_ps(source);
  __m256 s0 = _mm256_setzero_ps();
  __m256 s1 = _mm256_setzero_ps();
  __m256 s2 = _mm256_setzero_ps();
  __m256 s3 = _mm256_setzero_ps();
  __m256 s4 = _mm256_setzero_ps();
  __m256 s5 = _mm256_setzero_ps();
  __m256 s6 = _mm256_setzero_ps();
  __m256 s7 = _mm256_setzero_ps();
  __m256 s8 = _mm256_setzero_ps();
  __m256 s9 = _mm256_setzero_ps();
  __m256 s10 = _mm256_setzero_ps();
  __m256 s11 = _mm256_setzero_ps();
  for (int64_t i = 0; i < rounds; ++i) {
    s0 = _mm256_fmadd_ps(a, b, s0);
    s1 = _mm256_fmadd_ps(a, b, s1);
    s2 = _mm256_fmadd_ps(a, b, s2);
    s3 = _mm256_fmadd_ps(a, b, s3);
    s4 = _mm256_fmadd_ps(a, b, s4);
    s5 = _mm256_fmadd_ps(a, b, s5);
    s6 = _mm256_fmadd_ps(a, b, s6);
    s7 = _mm256_fmadd_ps(a, b, s7);
    s8 = _mm256_fmadd_ps(a, b, s8);
    s9 = _mm256_fmadd_ps(a, b, s9);
    s10 = _mm256_fmadd_ps(a, b, s10);
    s11 = _mm256_fmadd_ps(a, b, s11);
    // The compiler must not fold rounds together.
    asm volatile(""
                 : "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5), "+x"(s6), "+x"(s7),
                   "+x"(s8), "+x"(s9), "+x"(s10), "+x"(s11));
  }
  source = _mm256_cvtss_f32(s0);
  source = _mm256_cvtss_f32(s1);
  source = _mm256_cvtss_f32(s2);
  source = _mm256_cvtss_f32(s3);
  source = _mm256_cvtss_f32(s4);
  source = _mm256_cvtss_f32(s5);
  source = _mm256_cvtss_f32(s6);
  source = _mm256_cvtss_f32(s7);
  source = _mm256_cvtss_f32(s8);
  source = _mm256_cvtss_f32(s9);
  source = _mm256_cvtss_f32(s10);
  source = _mm256_cvtss_f32(s11);
  return 2.0 * 8 * 12 * static_cast<double>(rounds);
}

constexpr Peak kPeak = {"f32", dot, peak::read<Words>};

}  // namespace

const Peak* peak_avx2() { return &kPeak; }

}  // namespace dsv3::kernels
