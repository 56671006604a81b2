#include <immintrin.h>

#include "kernels/cpu/peak.h"
#include "kernels/cpu/peak_chains.h"
#include "kernels/cpu/peak_read.h"

namespace dsv3::kernels {
namespace {

struct Products {
  using V = __m512;
  using In = __m512bh;
  static constexpr double kOperations = 4 * 16;
  static In in() {
    volatile float source = 0.5f;
    return _mm512_cvtne2ps_pbh(_mm512_set1_ps(source), _mm512_set1_ps(source));
  }
  static V add(V sum, In a) { return _mm512_dpbf16_ps(sum, a, a); }
};

struct ByteProducts {
  using V = __m512i;
  using In = __m512i;
  static constexpr double kOperations = 8 * 16;
  static In in() {
    volatile int source = 1;
    return _mm512_set1_epi8(static_cast<char>(source));
  }
  static V add(V sum, In a) { return _mm512_dpbusd_epi32(sum, a, a); }
};

struct Words {
  using V __attribute__((vector_size(64))) = uint64_t;
};

constexpr Peak kPeak = {"bf16", peak::chains<Products>, peak::chains<ByteProducts>,
                        peak::read<Words>};

}  // namespace

const Peak* peak_avx512bf16() { return &kPeak; }

}  // namespace dsv3::kernels
