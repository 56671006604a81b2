#include <immintrin.h>

#include "kernels/cpu/peak.h"

namespace dsv3::kernels {

// Twelve chains as twelve variables: of an array the compiler keeps every sum in memory.
double int8_peak_avx512vnni(int64_t rounds) {
  volatile int sink = 1;
  const __m512i a = _mm512_set1_epi8(static_cast<char>(sink)), b = a;
  __m512i s0 = _mm512_setzero_si512();
  __m512i s1 = _mm512_setzero_si512();
  __m512i s2 = _mm512_setzero_si512();
  __m512i s3 = _mm512_setzero_si512();
  __m512i s4 = _mm512_setzero_si512();
  __m512i s5 = _mm512_setzero_si512();
  __m512i s6 = _mm512_setzero_si512();
  __m512i s7 = _mm512_setzero_si512();
  __m512i s8 = _mm512_setzero_si512();
  __m512i s9 = _mm512_setzero_si512();
  __m512i s10 = _mm512_setzero_si512();
  __m512i s11 = _mm512_setzero_si512();
  for (int64_t i = 0; i < rounds; ++i) {
    s0 = _mm512_dpbusd_epi32(s0, a, b);
    s1 = _mm512_dpbusd_epi32(s1, a, b);
    s2 = _mm512_dpbusd_epi32(s2, a, b);
    s3 = _mm512_dpbusd_epi32(s3, a, b);
    s4 = _mm512_dpbusd_epi32(s4, a, b);
    s5 = _mm512_dpbusd_epi32(s5, a, b);
    s6 = _mm512_dpbusd_epi32(s6, a, b);
    s7 = _mm512_dpbusd_epi32(s7, a, b);
    s8 = _mm512_dpbusd_epi32(s8, a, b);
    s9 = _mm512_dpbusd_epi32(s9, a, b);
    s10 = _mm512_dpbusd_epi32(s10, a, b);
    s11 = _mm512_dpbusd_epi32(s11, a, b);
    // The compiler must not fold rounds together.
    asm volatile(""
                 : "+v"(s0), "+v"(s1), "+v"(s2), "+v"(s3), "+v"(s4), "+v"(s5), "+v"(s6), "+v"(s7),
                   "+v"(s8), "+v"(s9), "+v"(s10), "+v"(s11));
  }
  sink = _mm512_cvtsi512_si32(s0);
  sink = _mm512_cvtsi512_si32(s1);
  sink = _mm512_cvtsi512_si32(s2);
  sink = _mm512_cvtsi512_si32(s3);
  sink = _mm512_cvtsi512_si32(s4);
  sink = _mm512_cvtsi512_si32(s5);
  sink = _mm512_cvtsi512_si32(s6);
  sink = _mm512_cvtsi512_si32(s7);
  sink = _mm512_cvtsi512_si32(s8);
  sink = _mm512_cvtsi512_si32(s9);
  sink = _mm512_cvtsi512_si32(s10);
  sink = _mm512_cvtsi512_si32(s11);
  return 8.0 * 16 * 12 * static_cast<double>(rounds);
}

}  // namespace dsv3::kernels
