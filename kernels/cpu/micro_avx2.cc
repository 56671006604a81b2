// AVX2 with FMA and F16C: float32 arithmetic on widened weights.
#include <immintrin.h>

#include "kernels/cpu/micro_simd.h"

namespace dsv3::kernels {
namespace {

struct Avx2 {
  using V __attribute__((vector_size(32))) = float;
  using I __attribute__((vector_size(32))) = int32_t;
  static constexpr int kLanes = 8;
  static constexpr int kRows = 3;
  static V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  static V bf16(const uint8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16);
  }
  static V f16(const uint8_t* p) {
    return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // E4M3 read as binary16 is 2^-8 of its value, subnormals included.
  static V f8(const uint8_t* p) {
    const __m128i v = _mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i sign = _mm_and_si128(_mm_slli_epi16(v, 8), _mm_set1_epi16(-0x8000));
    const __m128i rest = _mm_and_si128(_mm_slli_epi16(v, 7), _mm_set1_epi16(0x3f80));
    return (V)_mm256_mul_ps(_mm256_cvtph_ps(_mm_or_si128(sign, rest)), _mm256_set1_ps(256.0f));
  }
  static void store_native(void* p, int index, V v) {
    simd::store<Avx2>(static_cast<float*>(p) + index, v);
  }
};

void pack(Activation, const float* x, int32_t k, int32_t padded, void* out) {
  simd::pack_f32<Avx2>(x, k, padded, static_cast<float*>(out));
}

constexpr Activation kF32 = Activation::kF32;
constexpr Micro kMicro = {
    "avx2",
    kF32,
    {kF32, kF32, kF32, kF32},
    pack,
    simd::gemm<Avx2>,
    simd::gemm<Avx2>,
    simd::panel<Avx2>,
    simd::values<Avx2>,
    simd::softmax<Avx2>,
    simd::merge<Avx2>,
    simd::rms_norm<Avx2>,
    simd::silu_mul<Avx2>,
    simd::add<Avx2>,
    simd::add_weighted<Avx2>,
    simd::reduce<Avx2>,
};

}  // namespace

const Micro* micro_avx2() { return &kMicro; }

}  // namespace dsv3::kernels
