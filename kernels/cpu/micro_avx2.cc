// AVX2 with FMA and F16C: float32 arithmetic on widened weights, INT8 dot products on MXFP4; and
// the same with INT16 dot products on FP8.
#include <immintrin.h>

#include "kernels/cpu/micro_columns256.h"
#include "kernels/cpu/micro_fixed256.h"
#include "kernels/cpu/micro_mx.h"

namespace dsv3::kernels {
namespace {

struct Avx2 {
  using V __attribute__((vector_size(32))) = float;
  using I __attribute__((vector_size(32))) = int32_t;
  static constexpr int kLanes = 8;
  static V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  static void store_native(void* p, int index, V v) {
    simd::store<Avx2>(static_cast<float*>(p) + index, v);
  }

  // MXFP4: four pairs of products of at most 24 * 127 each fit into 16 bits.
  using B = __m256i;
  static constexpr bool kMxUnsigned = true;
  static constexpr int kMxRows = 6;
  static constexpr int kMxTiles = 1;
  static constexpr int kMxOneRowTiles = 2;
  static constexpr int kMxDirect = 6;
  static constexpr int kMxAhead = 2176;  // two groups of blocks
  struct Sum {
    __m256i sum, part;
    void begin(int32_t offset) {
      sum = _mm256_set1_epi32(offset);
      part = _mm256_setzero_si256();
    }
    void dot(B w, const int8_t* x) {
      int32_t four;
      __builtin_memcpy(&four, x, sizeof four);
      part = _mm256_add_epi16(part, _mm256_maddubs_epi16(w, _mm256_set1_epi32(four)));
    }
    // The same in one piece, for as many sums as there are registers: GCC 12 adds products to each
    // other first, and then keeps most of them in memory.
    void dot_in_place(B w, const int8_t* x) {
      int32_t four;
      __builtin_memcpy(&four, x, sizeof four);
      __m256i products;
      asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0"
          : "+x"(part), "=&x"(products)
          : "x"(w), "x"(_mm256_set1_epi32(four)));
    }
    void half() {
      sum = _mm256_add_epi32(sum, _mm256_madd_epi16(part, _mm256_set1_epi16(1)));
      part = _mm256_setzero_si256();
    }
    I total() const { return (I)sum; }
  };
  static void mx_widen(const uint8_t* p, B* lo, B* hi);
  static V mx_scales(const uint8_t* p) {
    const __m256i codes =
        _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    // Code 0 is 2^-127, a subnormal number.
    return (V)_mm256_max_epi32(_mm256_slli_epi32(codes, 23), _mm256_set1_epi32(0x00400000));
  }
};

constexpr mx::Table<Avx2> kMxTable;
inline void Avx2::mx_widen(const uint8_t* p, B* lo, B* hi) {
  const __m256i table = _mm256_load_si256(reinterpret_cast<const __m256i*>(kMxTable.values));
  const __m256i packed = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i mask = _mm256_set1_epi8(15);
  *lo = _mm256_shuffle_epi8(table, _mm256_and_si256(packed, mask));
  *hi = _mm256_shuffle_epi8(table, _mm256_and_si256(_mm256_srli_epi16(packed, 4), mask));
}

void gemm(const GemmArgs& a) {
  if (a.w.type == WeightType::kMXFP4) return mx::gemm<Avx2>(a);
  columns::gemm<Avx2, true>(a);
}

void fixed_gemm(const GemmArgs& a) {
  if (a.w.type == WeightType::kF8E4M3) return fixed::gemm<Avx2>(a);
  gemm(a);
}

void pack(Activation type, const float* x, int32_t k, int32_t padded, void* out) {
  if (type == Activation::kI8) return mx::pack_i8<Avx2>(x, k, padded, out);
  if (type == Activation::kI16) return fixed::pack<Avx2>(x, k, padded, out);
  auto* values = static_cast<float*>(out);
  if (type == Activation::kRaisedF32) return columns::pack_raised<Avx2>(x, k, padded, values);
  simd::pack_f32<Avx2>(x, k, padded, values);
}

constexpr Activation kF32 = Activation::kF32;
constexpr Micro make(const char* name, Activation fp8, void (*multiply)(const GemmArgs&)) {
  return {
      name,
      kF32,
      {kF32, kF32, kF32, fp8, Activation::kI8},
      pack,
      multiply,
      columns::gemm<Avx2, false>,
      columns::panel<Avx2>,
      columns::values<Avx2>,
      simd::softmax<Avx2>,
      simd::merge<Avx2>,
      simd::rms_norm<Avx2>,
      simd::silu_mul<Avx2>,
      simd::add<Avx2>,
      simd::add_weighted<Avx2>,
      simd::reduce<Avx2>,
      simd::weigh<Avx2>,
  };
}
constexpr Micro kMicro = make("avx2", Activation::kRaisedF32, gemm);
constexpr Micro kFixed = make("avx2i16", Activation::kI16, fixed_gemm);

}  // namespace

const Micro* micro_avx2() { return &kMicro; }
const Micro* micro_avx2i16() { return &kFixed; }

}  // namespace dsv3::kernels
