// Loops that do nothing but what a limit of the machine is made of. Each instruction set has its
// own, compiled for it alone; machine.cc chooses and measures them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsv3::kernels {

struct Peak {
  const char* dot_name;  // "f32", "bf16", "int16"
  // Multiply-adds out of registers, in as many independent chains as hide their latency. Returns
  // the number of operations done (a multiply-add is two).
  double (*dot)(int64_t rounds);
  // The same of the INT8 products that the set multiplies MXFP4 weights with.
  double (*int8)(int64_t rounds);
  // Reads bytes (a multiple of 4096) as 1, 2, 4 or 8 streams side by side. Which number is fastest
  // differs from machine to machine. The result is there so that nothing is left out.
  uint64_t (*read)(const uint8_t* data, size_t bytes, int streams);
};

const Peak* peak_portable();
const Peak* peak_avx2();
const Peak* peak_avx2i16();
const Peak* peak_avx512();
const Peak* peak_avx512bf16();
const Peak* peak_neon();
const Peak* peak_neonbf16();

}  // namespace dsv3::kernels
