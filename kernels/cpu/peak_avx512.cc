#include <immintrin.h>

#include "kernels/cpu/peak.h"
#include "kernels/cpu/peak_read.h"

namespace dsv3::kernels {
namespace {

struct Words {
  using V __attribute__((vector_size(64))) = uint64_t;
};

// Twelve chains as twelve variables: of an array the compiler keeps every sum in memory.
double dot(int64_t rounds) {
  volatile float source = 0.5f;
  const __m512 a = _mm512_set1_ps(source), b = _mm512_set1_ps(source);
  __m512 s0 = _mm512_setzero_ps();
  __m512 s1 = _mm512_setzero_ps();
  __m512 s2 = _mm512_setzero_ps();
  __m512 s3 = _mm512_setzero_ps();
  __m512 s4 = _mm512_setzero_ps();
  __m512 s5 = _mm512_setzero_ps();
  __m512 s6 = _mm512_setzero_ps();
  __m512 s7 = _mm512_setzero_ps();
  __m512 s8 = _mm512_setzero_ps();
  __m512 s9 = _mm512_setzero_ps();
  __m512 s10 = _mm512_setzero_ps();
  __m512 s11 = _mm512_setzero_ps();
  for (int64_t i = 0; i < rounds; ++i) {
    s0 = _mm512_fmadd_ps(a, b, s0);
    s1 = _mm512_fmadd_ps(a, b, s1);
    s2 = _mm512_fmadd_ps(a, b, s2);
    s3 = _mm512_fmadd_ps(a, b, s3);
    s4 = _mm512_fmadd_ps(a, b, s4);
    s5 = _mm512_fmadd_ps(a, b, s5);
    s6 = _mm512_fmadd_ps(a, b, s6);
    s7 = _mm512_fmadd_ps(a, b, s7);
    s8 = _mm512_fmadd_ps(a, b, s8);
    s9 = _mm512_fmadd_ps(a, b, s9);
    s10 = _mm512_fmadd_ps(a, b, s10);
    s11 = _mm512_fmadd_ps(a, b, s11);
    // The compiler must not fold rounds together.
    asm volatile(""
                 : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7),
                   "+v"(s8), "+v"(s9), "+v"(s10), "+v"(s11));
  }
  source = _mm512_cvtss_f32(s0);
  source = _mm512_cvtss_f32(s1);
  source = _mm512_cvtss_f32(s2);
  source = _mm512_cvtss_f32(s3);
  source = _mm512_cvtss_f32(s4);
  source = _mm512_cvtss_f32(s5);
  source = _mm512_cvtss_f32(s6);
  source = _mm512_cvtss_f32(s7);
  source = _mm512_cvtss_f32(s8);
  source = _mm512_cvtss_f32(s9);
  source = _mm512_cvtss_f32(s10);
  source = _mm512_cvtss_f32(s11);
  return 2.0 * 16 * 12 * static_cast<double>(rounds);
}

constexpr Peak kPeak = {"f32", dot, peak::read<Words>};

}  // namespace

const Peak* peak_avx512() { return &kPeak; }

}  // namespace dsv3::kernels
