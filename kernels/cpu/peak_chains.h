// The multiplying loop of the peak_*.cc files that have vector instructions, a template over a type
// local to each of them (see micro.h for why).
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsv3::kernels::peak {

#if defined(__aarch64__)
#define DSV3_SUM(s) "+w"(s)
inline constexpr int kChains = 16;  // four units, four cycles: Apple's cores
#else
#define DSV3_SUM(s) "+x"(s)
inline constexpr int kChains = 12;
#endif

// S::V: a vector of sums; S::In: of what is multiplied; S::kOperations: of one S::add(sum, in, in).
// The chains are as many variables: of an array the compiler keeps every sum in memory.
template <class S>
double chains(int64_t rounds) {
  using V = typename S::V;
  const typename S::In a = S::in();
  V s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{};
  [[maybe_unused]] V s12{}, s13{}, s14{}, s15{};
  for (int64_t i = 0; i < rounds; ++i) {
    s0 = S::add(s0, a);
    s1 = S::add(s1, a);
    s2 = S::add(s2, a);
    s3 = S::add(s3, a);
    s4 = S::add(s4, a);
    s5 = S::add(s5, a);
    s6 = S::add(s6, a);
    s7 = S::add(s7, a);
    s8 = S::add(s8, a);
    s9 = S::add(s9, a);
    s10 = S::add(s10, a);
    s11 = S::add(s11, a);
    // The compiler must neither fold rounds together nor leave any out.
    asm volatile(""
                 : DSV3_SUM(s0), DSV3_SUM(s1), DSV3_SUM(s2), DSV3_SUM(s3), DSV3_SUM(s4),
                   DSV3_SUM(s5), DSV3_SUM(s6), DSV3_SUM(s7), DSV3_SUM(s8), DSV3_SUM(s9),
                   DSV3_SUM(s10), DSV3_SUM(s11));
    if constexpr (kChains == 16) {
      s12 = S::add(s12, a);
      s13 = S::add(s13, a);
      s14 = S::add(s14, a);
      s15 = S::add(s15, a);
      asm volatile("" : DSV3_SUM(s12), DSV3_SUM(s13), DSV3_SUM(s14), DSV3_SUM(s15));
    }
  }
  return double{kChains} * S::kOperations * static_cast<double>(rounds);
}

#undef DSV3_SUM

}  // namespace dsv3::kernels::peak
