// The multiplying loop of the x86 peak_*.cc files, a template over a type local to each of them
// (see micro.h for why).
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsv3::kernels::peak {

// S::V: a vector of sums; S::In: of what is multiplied; S::kOperations: of one S::add(sum, in, in).
// Twelve chains as twelve variables: of an array the compiler keeps every sum in memory.
template <class S>
double chains(int64_t rounds) {
  using V = typename S::V;
  const typename S::In a = S::in();
  V s0{}, s1{}, s2{}, s3{}, s4{}, s5{}, s6{}, s7{}, s8{}, s9{}, s10{}, s11{};
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
                 : "+x"(s0), "+x"(s1), "+x"(s2), "+x"(s3), "+x"(s4), "+x"(s5), "+x"(s6), "+x"(s7),
                   "+x"(s8), "+x"(s9), "+x"(s10), "+x"(s11));
  }
  return 12.0 * S::kOperations * static_cast<double>(rounds);
}

}  // namespace dsv3::kernels::peak
