// Loops that do nothing but multiply-adds of one kind, out of registers, in as many independent
// chains as hide their latency. Each returns the number of operations done (a multiply-add is two).
#pragma once

#include <cstdint>

namespace dsv3::kernels {

double dot_peak_portable(int64_t rounds);
double dot_peak_avx2(int64_t rounds);
double dot_peak_avx512bf16(int64_t rounds);

}  // namespace dsv3::kernels
