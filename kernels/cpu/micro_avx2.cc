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
  static constexpr int kTiles = 2;
  static V fma(V a, V b, V c) { return (V)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c); }
  static V bf16(const uint8_t* p) {
    const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (V)_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16);
  }
  static V f16(const uint8_t* p) {
    return (V)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  // E4M3 read as binary16 is 2^-8 of its value, subnormals included: sign-extended to 16 bits and
  // shifted left by seven, everything is in place but a copy of the sign in bit 14.
  static constexpr float kF8Unit = 256.0f;
  static void f8(const uint8_t* p, V* w) {
    for (int i = 0; i < 2; ++i) {
      const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i));
      const __m256i half = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7),
                                            _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
      w[2 * i] = (V)_mm256_cvtph_ps(_mm256_castsi256_si128(half));
      w[2 * i + 1] = (V)_mm256_cvtph_ps(_mm256_extracti128_si256(half, 1));
    }
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
