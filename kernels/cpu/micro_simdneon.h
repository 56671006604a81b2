// The vector type of micro_simd.h for both aarch64 sets, and a latent page rearranged for sums over
// keys. Templates over a type local to the file that includes this (see micro.h for why).
#pragma once

#include <arm_neon.h>

#include "kernels/cpu/micro_mx.h"

namespace dsv3::kernels::simd {

template <class Tag>
struct SimdNeon {
  using V __attribute__((vector_size(16))) = float;
  using I __attribute__((vector_size(16))) = int32_t;
  static constexpr int kLanes = 4;
  static constexpr int kRows = 2;
  static constexpr int kTiles = 2;
  static V fma(V a, V b, V c) {
    return (V)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  }
  static V bf16(const uint8_t* p) {
    const uint16x4_t v = vreinterpret_u16_u8(vld1_u8(p));
    return (V)vshll_n_u16(v, 16);
  }
  static V f16(const uint8_t* p) { return (V)vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p))); }
  // E4M3 read as binary16 is 2^-8 of its value, subnormals included: sign-extended to 16 bits and
  // shifted left by seven, everything is in place but a copy of the sign in bit 14.
  static constexpr float kF8Unit = 256.0f;
  static void f8(const uint8_t* p, V* w) {
    const uint16x8_t mask = vdupq_n_u16(0xbfff);
    for (int i = 0; i < 4; ++i) {
      const int16x8_t wide = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p + 8 * i)));
      const uint16x8_t half = vandq_u16(vreinterpretq_u16_s16(vshlq_n_s16(wide, 7)), mask);
      w[2 * i] = (V)vcvt_f32_f16(vreinterpret_f16_u16(vget_low_u16(half)));
      w[2 * i + 1] = (V)vcvt_f32_f16(vreinterpret_f16_u16(vget_high_u16(half)));
    }
  }

  // MXFP4
  using B = int8x16_t;
  static constexpr bool kMxUnsigned = false;
  static constexpr int kMxTiles = 1;
  static void mx_widen(const uint8_t* p, B* lo, B* hi);
  static V mx_scales(const uint8_t* p) {
    uint32_t codes;
    __builtin_memcpy(&codes, p, sizeof codes);
    const uint16x8_t wide = vmovl_u8(vreinterpret_u8_u32(vdup_n_u32(codes)));
    const uint32x4_t bits = vshlq_n_u32(vmovl_u16(vget_low_u16(wide)), 23);
    return (V)vmaxq_u32(bits, vdupq_n_u32(0x00400000));  // code 0 is 2^-127, a subnormal number
  }
};

template <class Tag>
inline constexpr mx::Table<SimdNeon<Tag>> kMxTable;
template <class Tag>
inline void SimdNeon<Tag>::mx_widen(const uint8_t* p, B* lo, B* hi) {
  const int8x16_t table = vld1q_s8(kMxTable<Tag>.values);
  const uint8x16_t packed = vld1q_u8(p);
  *lo = vqtbl1q_s8(table, vandq_u8(packed, vdupq_n_u8(15)));
  *hi = vqtbl1q_s8(table, vshrq_n_u8(packed, 4));
}

// What values() of micro_simd.h does to two keys and two dims, here to four keys and four dims at a
// time. Dims beyond the last pair come out as zeros, up to a multiple of four.
template <class Tag>
void page_values(const uint8_t* page, int32_t dims, int32_t begin, int32_t end, int32_t pair_begin,
                 int32_t pairs_total, uint8_t* out) {
  constexpr uint8_t kOrder[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
  constexpr int32_t kLane[4] = {0, 1, 2, 3};
  constexpr int64_t kRow = int64_t{kPageKeys} * 4;  // bytes of a pair of dims
  const uint8x16_t order = vld1q_u8(kOrder);
  const int32_t pairs = (dims + 1) / 2;
  for (int32_t key = 0; key < kPageKeys; key += 4) {
    const int32x4_t index = vaddq_s32(vld1q_s32(kLane), vdupq_n_s32(key));
    const uint8x16_t inside = vreinterpretq_u8_u32(
        vandq_u32(vcgeq_s32(index, vdupq_n_s32(begin)), vcltq_s32(index, vdupq_n_s32(end))));
    // Two keys' values of a pair of dims: the middle two of four trade places.
    const auto piece = [&](int32_t pair) {
      const uint8x16_t v = vandq_u8(vld1q_u8(page + pair * kRow + key * 4), inside);
      return vreinterpretq_u64_u8(vqtbl1q_u8(v, order));
    };
    for (int32_t pair = 0; pair < pairs; pair += 2) {
      const uint64x2_t first = piece(pair);
      const uint64x2_t second = pair + 1 < pairs ? piece(pair + 1) : vdupq_n_u64(0);
      uint8_t* to = out + (int64_t{pair / 32} * pairs_total + pair_begin + key / 2) * 256 +
                    int64_t{pair % 32} * 8;
      vst1q_u8(to, vreinterpretq_u8_u64(vzip1q_u64(first, second)));
      vst1q_u8(to + 256, vreinterpretq_u8_u64(vzip2q_u64(first, second)));
    }
  }
}

}  // namespace dsv3::kernels::simd
