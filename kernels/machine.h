// What the machine itself can do, measured: the limits that every figure of a benchmark stands
// beside.
#pragma once

#include "kernels/kernels.h"

namespace dsv3::kernels {

struct MachineLimits {
  double read_bytes_per_second = 0;   // streaming reads of memory far larger than the caches
  double cache_bytes_per_second = 0;  // the same out of each core's L2
  // Multiply-adds (two operations each) of the instruction that the device's linear layers use:
  // BF16 dot products where there are some, float32 FMA elsewhere.
  double dot_flops_per_second = 0;
  const char* dot = "";            // "bf16" or "f32"
  double int8_ops_per_second = 0;  // the same of INT8 dot products; 0 where there are none
};

// Uses as many threads as the device. Takes about a second and 512 MiB (in huge pages where the
// system gives them, as the weights are) for that time, less where that is not to be had. The best
// of several tries and of several numbers of parallel streams: what the machine can do, not what
// its other users left over.
MachineLimits measure_machine(const Device* device);

// The larger of two measurements, figure by figure: of one before and one after a benchmark.
MachineLimits greater(const MachineLimits& a, const MachineLimits& b);

}  // namespace dsv3::kernels
