#include "kernels/cpu/peak.h"
#include "kernels/cpu/peak_read.h"

namespace dsv3::kernels {
namespace {

struct Words {
  using V __attribute__((vector_size(16))) = uint64_t;
};

// T: float, or uint16_t, in which products of bytes are summed.
template <class T, int kLanes>
double multiply_adds(int64_t rounds) {
  T sums[kLanes] = {};
  volatile T source = 1;
  const T a = source, b = source;
  for (int64_t i = 0; i < rounds; ++i) {
    for (int lane = 0; lane < kLanes; ++lane) sums[lane] = static_cast<T>(sums[lane] * a + b);
  }
  for (int lane = 0; lane < kLanes; ++lane) source = sums[lane];
  return 2.0 * kLanes * static_cast<double>(rounds);
}

constexpr Peak kPeak = {"f32", multiply_adds<float, 64>, multiply_adds<uint16_t, 128>,
                        peak::read<Words>};

}  // namespace

const Peak* peak_portable() { return &kPeak; }

}  // namespace dsv3::kernels
