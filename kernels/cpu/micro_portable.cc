// Plain C++ for any machine: vectors of four floats, which every machine has or imitates.
#include "kernels/cpu/micro_simd.h"
#include "kernels/numeric.h"

namespace dsv3::kernels {
namespace {

struct Portable {
  using V __attribute__((vector_size(16))) = float;
  using I __attribute__((vector_size(16))) = int32_t;
  static constexpr int kLanes = 4;
  static constexpr int kRows = 1;
  static constexpr int kTiles = 1;
  static V fma(V a, V b, V c) { return a * b + c; }
  static V bf16(const uint8_t* p) {
    using U16 __attribute__((vector_size(8))) = uint16_t;
    using U32 __attribute__((vector_size(16))) = uint32_t;
    U16 v;
    __builtin_memcpy(&v, p, sizeof v);
    return (V)(__builtin_convertvector(v, U32) << 16);
  }
  static V f16(const uint8_t* p) {
    V out;
    for (int i = 0; i < kLanes; ++i) {
      uint16_t v;
      __builtin_memcpy(&v, p + 2 * i, 2);
      out[i] = f16_to_float(v);
    }
    return out;
  }
  static constexpr float kF8Unit = 1.0f;
  static void f8(const uint8_t* p, V* w) {
    float values[32];
    for (int j = 0; j < 32; ++j) values[j] = kF8E4M3Table[p[j]];
    for (int j = 0; j < 32 / kLanes; ++j) w[j] = simd::load<Portable>(values + j * kLanes);
  }
  static void store_native(void* p, int index, V v) {
    simd::store<Portable>(static_cast<float*>(p) + index, v);
  }
};

void pack(Activation, const float* x, int32_t k, int32_t padded, void* out) {
  simd::pack_f32<Portable>(x, k, padded, static_cast<float*>(out));
}

constexpr Activation kF32 = Activation::kF32;
constexpr Micro kMicro = {
    "portable",
    kF32,
    {kF32, kF32, kF32, kF32},
    pack,
    simd::gemm<Portable>,
    simd::gemm<Portable>,
    simd::panel<Portable>,
    simd::values<Portable>,
    simd::softmax<Portable>,
    simd::merge<Portable>,
    simd::rms_norm<Portable>,
    simd::silu_mul<Portable>,
    simd::add<Portable>,
    simd::add_weighted<Portable>,
    simd::reduce<Portable>,
};

}  // namespace

const Micro* micro_portable() { return &kMicro; }

}  // namespace dsv3::kernels
