// Arithmetic on sizes that come from outside: every product and sum that a file or a caller can
// influence goes through these, where it enters.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsv3 {

// *out = a op b; false when the result does not fit.
template <class T>
[[nodiscard]] inline bool checked_mul(T a, T b, T* out) {
  return !__builtin_mul_overflow(a, b, out);
}
template <class T>
[[nodiscard]] inline bool checked_add(T a, T b, T* out) {
  return !__builtin_add_overflow(a, b, out);
}

template <class T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}
template <class T>
constexpr T round_up(T a, T multiple) {
  return ceil_div(a, multiple) * multiple;
}

}  // namespace dsv3
