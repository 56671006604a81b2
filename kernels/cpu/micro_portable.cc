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
  static V fma(V a, V b, V c) { return a * b + c; }
  static V bf16(const uint8_t* p) {
    I bits;
    for (int i = 0; i < kLanes; ++i) {
      uint16_t v;
      __builtin_memcpy(&v, p + 2 * i, 2);
      bits[i] = static_cast<int32_t>(static_cast<uint32_t>(v) << 16);
    }
    return (V)bits;
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
  static V f8(const uint8_t* p) {
    V out;
    for (int i = 0; i < kLanes; ++i) out[i] = kF8E4M3Table[p[i]];
    return out;
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
