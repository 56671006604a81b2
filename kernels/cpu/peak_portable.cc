#include "kernels/cpu/peak.h"
#include "kernels/cpu/peak_read.h"

namespace dsv3::kernels {
namespace {

struct Words {
  using V __attribute__((vector_size(16))) = uint64_t;
};

double dot(int64_t rounds) {
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

constexpr Peak kPeak = {"f32", dot, peak::read<Words>};

}  // namespace

const Peak* peak_portable() { return &kPeak; }

}  // namespace dsv3::kernels
