#include <immintrin.h>

#include "kernels/cpu/peak.h"
#include "kernels/cpu/peak_chains.h"
#include "kernels/cpu/peak_read.h"

namespace dsv3::kernels {
namespace {

struct Products {
  using V = __m512;
  using In = __m512;
  static constexpr double kOperations = 2 * 16;
  static In in() {
    volatile float source = 0.5f;
    return _mm512_set1_ps(source);
  }
  static V add(V sum, In a) { return _mm512_fmadd_ps(a, a, sum); }
};

// Four products of 64 bytes, summed in 16 bits, and their sum in 32.
struct ByteProducts {
  using V = __m512i;
  using In = __m512i;
  static constexpr double kOperations = 4 * 2 * 64;
  static In in() {
    volatile int source = 1;
    return _mm512_set1_epi8(static_cast<char>(source));
  }
  static V add(V sum, In a) {
    __m512i part = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      asm volatile("" : "+v"(a));  // it is the same product each time
      part = _mm512_add_epi16(part, _mm512_maddubs_epi16(a, a));
    }
    return _mm512_add_epi32(sum, _mm512_madd_epi16(part, _mm512_set1_epi16(1)));
  }
};

struct Words {
  using V __attribute__((vector_size(64))) = uint64_t;
};

constexpr Peak kPeak = {"f32", peak::chains<Products>, peak::chains<ByteProducts>,
                        peak::read<Words>};

}  // namespace

const Peak* peak_avx512() { return &kPeak; }

}  // namespace dsv3::kernels
