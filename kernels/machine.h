// What the machine itself can do, measured: the limits that every figure of a benchmark stands
// beside.
#pragma once

#include <memory>
#include <span>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/base/status.h"

namespace dsv3::kernels {

struct MachineLimits {
  double read_bytes_per_second = 0;   // streaming reads of memory far larger than the caches
  double cache_bytes_per_second = 0;  // the same out of each core's L2
  // Multiply-adds (two operations each) of the instruction that the device's linear layers use:
  // BF16 dot products where there are some, INT16's of "avx2i16", float32 FMA elsewhere.
  double dot_flops_per_second = 0;
  const char* dot = "";  // "bf16", "int16" or "f32"
  // The same of the INT8 products that it multiplies MXFP4 weights with.
  double int8_ops_per_second = 0;
};

// Measures the limits with the threads of a device, which must outlive the probe and be used by one
// thread at a time, the probe's passes among its operations: with threads of the probe's own each
// side would delay the other's, which look out for work for a while after they had some.
class MachineProbe {
 public:
  // Reads are measured on `memory` where it is 512 MiB or more, each pass on pieces from all over
  // it: on a machine with several memory nodes what one stretch delivers says little of another.
  // Otherwise on 512 MiB of its own, in huge pages where the system gives them, or less: 64 MiB at
  // the least, or it is kOutOfMemory.
  static Result<std::unique_ptr<MachineProbe>> create(Device* device,
                                                      std::span<const uint8_t> memory = {});
  ~MachineProbe();

  // Everything, in about a second: medians of several passes. Of several numbers of parallel
  // streams the fastest counts, and is what read_pass() uses from then on.
  MachineLimits measure();
  // One pass each, some 20 ms. A machine that others use delivers now more, now less, within
  // seconds: passes between the repeats of a measurement say what it could have had.
  double read_pass();  // bytes per second
  double dot_pass();   // operations per second

 private:
  struct Impl;
  explicit MachineProbe(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

double median(std::vector<double> values);  // of at least one

}  // namespace dsv3::kernels
