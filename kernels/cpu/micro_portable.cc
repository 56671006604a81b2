// Plain C++ for any machine: vectors of four floats, which every machine has or imitates.
#include "kernels/cpu/micro_mx.h"
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

  // MXFP4: products in 16 bits, four rows of four inputs.
  using B __attribute__((vector_size(32))) = int16_t;
  static constexpr bool kMxUnsigned = false;
  static constexpr int kMxRows = 2;
  static constexpr int kMxTiles = 1;
  static constexpr int kMxOneRowTiles = 1;
  static constexpr int kMxDirect = 1;
  static constexpr int kMxAhead = 0;
  struct Sum {
    B part{};
    I sum{};
    void begin(int32_t) { part = B{}, sum = I{}; }
    void dot(const B& w, const int8_t* x) {
      const auto a = static_cast<int16_t>(x[0]), b = static_cast<int16_t>(x[1]),
                 c = static_cast<int16_t>(x[2]), d = static_cast<int16_t>(x[3]);
      part += w * B{a, b, c, d, a, b, c, d, a, b, c, d, a, b, c, d};
    }
    void half() {  // four products of at most 12 * 127 are in every lane
      I four{};
      for (int i = 0; i < kLanes; ++i) {
        four[i] = (part[4 * i] + part[4 * i + 1]) + (part[4 * i + 2] + part[4 * i + 3]);
      }
      sum += four;
      part = B{};
    }
    I total() const { return sum; }
  };
  static void mx_widen(const uint8_t* p, B* lo, B* hi);
  static V mx_scales(const uint8_t* p) {
    V scales;
    for (int i = 0; i < kLanes; ++i) scales[i] = e8m0_to_float(p[i]);
    return scales;
  }
};

constexpr mx::Table<Portable> kMxTable;
inline void Portable::mx_widen(const uint8_t* p, B* lo, B* hi) {
  for (int i = 0; i < 4 * kLanes; ++i) {
    (*lo)[i] = kMxTable.values[p[i] & 15];
    (*hi)[i] = kMxTable.values[p[i] >> 4];
  }
}

void gemm(const GemmArgs& a) {
  if (a.w.type == WeightType::kMXFP4) return mx::gemm<Portable>(a);
  simd::gemm<Portable>(a);
}

void pack(Activation type, const float* x, int32_t k, int32_t padded, void* out) {
  if (type == Activation::kI8) return mx::pack_i8<Portable>(x, k, padded, out);
  simd::pack_f32<Portable>(x, k, padded, static_cast<float*>(out));
}

constexpr Activation kF32 = Activation::kF32;
constexpr Micro kMicro = {
    "portable",
    kF32,
    {kF32, kF32, kF32, kF32, Activation::kI8},
    pack,
    gemm,
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
    simd::weigh<Portable>,
};

}  // namespace

const Micro* micro_portable() { return &kMicro; }

}  // namespace dsv3::kernels
