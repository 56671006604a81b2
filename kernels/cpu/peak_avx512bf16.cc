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
  const __m512 value = _mm512_set1_ps(source);
  const __m512bh a = _mm512_cvtne2ps_pbh(value, value), b = _mm512_cvtne2ps_pbh(value, value);
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
    s0 = _mm512_dpbf16_ps(s0, a, b);
    s1 = _mm512_dpbf16_ps(s1, a, b);
    s2 = _mm512_dpbf16_ps(s2, a, b);
    s3 = _mm512_dpbf16_ps(s3, a, b);
    s4 = _mm512_dpbf16_ps(s4, a, b);
    s5 = _mm512_dpbf16_ps(s5, a, b);
    s6 = _mm512_dpbf16_ps(s6, a, b);
    s7 = _mm512_dpbf16_ps(s7, a, b);
    s8 = _mm512_dpbf16_ps(s8, a, b);
    s9 = _mm512_dpbf16_ps(s9, a, b);
    s10 = _mm512_dpbf16_ps(s10, a, b);
    s11 = _mm512_dpbf16_ps(s11, a, b);
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
  return 4.0 * 16 * 12 * static_cast<double>(rounds);
}

constexpr Peak kPeak = {"bf16", dot, peak::read<Words>};

}  // namespace

const Peak* peak_avx512bf16() { return &kPeak; }

}  // namespace dsv3::kernels
