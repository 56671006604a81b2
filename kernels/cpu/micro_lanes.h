// Loads, stores, sums and maxima over the small vector type of micro_simd.h, which says what S is.
#pragma once

#include "kernels/cpu/micro.h"

namespace dsv3::kernels::simd {

template <class S>
inline typename S::V load(const float* p) {
  typename S::V v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
template <class S>
inline void store(float* p, typename S::V v) {
  __builtin_memcpy(p, &v, sizeof v);
}
template <class S>
inline typename S::V splat(float f) {
  return typename S::V{} + f;
}
// p[0], p[1], p[0], p[1], ...
template <class S>
inline typename S::V load_pair(const float* p) {
  using D __attribute__((vector_size(sizeof(typename S::V)))) = double;
  double both;
  __builtin_memcpy(&both, p, sizeof both);
  union {
    D d;
    typename S::V v;
  } u;
  for (int i = 0; i < S::kLanes / 2; ++i) u.d[i] = both;
  return u.v;
}
// The first `count` < kLanes values, zeros after them.
template <class S>
inline typename S::V load_part(const float* p, int64_t count) {
  float buffer[S::kLanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
  return load<S>(buffer);
}
template <class S>
inline void store_part(float* p, typename S::V v, int64_t count) {
  float buffer[S::kLanes];
  store<S>(buffer, v);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}
// Of 16 lanes, each `half` of them swapped with the next.
template <class S>
inline typename S::V upper_lanes(typename S::V v, int half) {
  switch (half) {
    case 8:
      return __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
    case 4:
      return __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
    case 2:
      return __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    default:
      return __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
  }
}
// The sum of all lanes: always the same tree.
template <class S>
inline float sum_lanes(typename S::V v) {
  if constexpr (S::kLanes == 16) {
#pragma GCC unroll 4
    for (int half = 8; half > 0; half /= 2) v += upper_lanes<S>(v, half);
    return v[0];
  }
  float buffer[S::kLanes];
  store<S>(buffer, v);
  for (int half = S::kLanes / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) buffer[i] += buffer[i + half];
  }
  return buffer[0];
}
template <class S>
inline float max_lanes(typename S::V v) {
  if constexpr (S::kLanes == 16) {
#pragma GCC unroll 4
    for (int half = 8; half > 0; half /= 2) {
      const typename S::V upper = upper_lanes<S>(v, half);
      v = upper > v ? upper : v;
    }
    return v[0];
  }
  float buffer[S::kLanes];
  store<S>(buffer, v);
  float max = buffer[0];
  for (int i = 1; i < S::kLanes; ++i) max = buffer[i] > max ? buffer[i] : max;
  return max;
}

}  // namespace dsv3::kernels::simd
