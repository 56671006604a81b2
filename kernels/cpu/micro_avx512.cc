// AVX-512 (F, BW, VL, DQ) without BF16: float32 arithmetic on widened weights; INT8 dot products
// on MXFP4.
#include "kernels/cpu/micro_simd512.h"

namespace dsv3::kernels {
namespace {

struct Avx512F : simd::Simd512<Avx512F> {
  static constexpr int kRows = 6;
  static constexpr int kTiles = 4;
  static void store_native(void* p, int index, V v) {
    simd::store<Avx512F>(static_cast<float*>(p) + index, v);
  }

  // MXFP4: four pairs of products of at most 24 * 127 each fit into 16 bits.
  static constexpr int kMxRows = 3;
  static constexpr int kMxTiles = 3;
  static constexpr int kMxOneRowTiles = 1;
  static constexpr int kMxDirect = 3;
  static constexpr int kMxAhead = 0;
  struct Sum {
    __m512i sum, part;
    void begin(int32_t offset) {
      sum = _mm512_set1_epi32(offset);
      part = _mm512_setzero_si512();
    }
    void dot(B w, const int8_t* x) {
      int32_t four;
      __builtin_memcpy(&four, x, sizeof four);
      part = _mm512_add_epi16(part, _mm512_maddubs_epi16(w, _mm512_set1_epi32(four)));
    }
    void half() {
      sum = _mm512_add_epi32(sum, _mm512_madd_epi16(part, _mm512_set1_epi16(1)));
      part = _mm512_setzero_si512();
    }
    I total() const { return (I)sum; }
  };
  static void mx_widen(const uint8_t* p, B* lo, B* hi);
};

constexpr mx::Table<Avx512F> kMxTable;
inline void Avx512F::mx_widen(const uint8_t* p, B* lo, B* hi) {
  const __m512i table = _mm512_load_si512(kMxTable.values);
  const __m512i packed = _mm512_loadu_si512(p);
  const __m512i mask = _mm512_set1_epi8(15);
  *lo = _mm512_shuffle_epi8(table, _mm512_and_si512(packed, mask));
  *hi = _mm512_shuffle_epi8(table, _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask));
}

void gemm(const GemmArgs& a) {
  if (a.w.type == WeightType::kMXFP4) return mx::gemm<Avx512F>(a);
  simd::gemm<Avx512F>(a);
}

void pack(Activation type, const float* x, int32_t k, int32_t padded, void* out) {
  if (type == Activation::kI8) return mx::pack_i8<Avx512F>(x, k, padded, out);
  simd::pack_f32<Avx512F>(x, k, padded, static_cast<float*>(out));
}

constexpr Activation kF32 = Activation::kF32;
constexpr Micro kMicro = {
    "avx512",
    kF32,
    {kF32, kF32, kF32, kF32, Activation::kI8},
    pack,
    gemm,
    simd::gemm<Avx512F>,
    simd::panel<Avx512F>,
    simd::values<Avx512F>,
    simd::softmax<Avx512F>,
    simd::merge<Avx512F>,
    simd::rms_norm<Avx512F>,
    simd::silu_mul<Avx512F>,
    simd::add<Avx512F>,
    simd::add_weighted<Avx512F>,
    simd::reduce<Avx512F>,
    simd::weigh<Avx512F>,
};

}  // namespace

const Micro* micro_avx512() { return &kMicro; }

}  // namespace dsv3::kernels
