#include "kernels/cpu/peak.h"

namespace dsv3::kernels {

double dot_peak_portable(int64_t rounds) {
  constexpr int kLanes = 64;
  float sums[kLanes] = {};
  volatile float source = 0.5f;
  const float a = source, b = source;
  for (int64_t i = 0; i < rounds; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = sums[lane] * a + b;
  }
  for (int lane = 0; lane < kLanes; ++lane) source = sums[lane];
  return 2.0 * kLanes * static_cast<double>(rounds);
}

}  // namespace dsv3::kernels
