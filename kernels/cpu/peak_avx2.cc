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

// Two products of 16 bits each, and their sum.
struct PairProducts {
  using V = __m256i;
  using In = __m256i;
  static constexpr double kOperations = 2 * 16;
  static In in() {
    volatile int16_t source = 1;
    return _mm256_set1_epi16(source);
  }
  // In one piece, as the kernels do it: GCC 12 adds a copy to every product otherwise.
  static V add(V sum, In a) {
    V products;
    asm("vpmaddwd %2, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(products) : "x"(a));
    return sum;
  }
};

// Four products of 32 bytes, summed in 16 bits, and their sum in 32.
struct ByteProducts {
  using V = __m256i;
  using In = __m256i;
  static constexpr double kOperations = 4 * 2 * 32;
  static In in() {
    volatile int source = 1;
    return _mm256_set1_epi8(static_cast<char>(source));
  }
  static V add(V sum, In a) {
    __m256i part = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      asm volatile("" : "+x"(a));  // it is the same product each time
      part = _mm256_add_epi16(part, _mm256_maddubs_epi16(a, a));
    }
    return _mm256_add_epi32(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
  }
};

struct Words {
  using V __attribute__((vector_size(32))) = uint64_t;
};

constexpr Peak kPeak = {"f32", peak::chains<Products>, peak::chains<ByteProducts>,
                        peak::read<Words>};
constexpr Peak kPairPeak = {"int16", peak::chains<PairProducts>, peak::chains<ByteProducts>,
                            peak::read<Words>};

}  // namespace

const Peak* peak_avx2() { return &kPeak; }
const Peak* peak_avx2i16() { return &kPairPeak; }

}  // namespace dsv3::kernels
