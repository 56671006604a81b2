// Reading weights of every type and layout as float32.
#pragma once

#include <cstdint>

#include "kernels/kernels.h"

namespace dsv3::kernels::ref {

// W[row][column], its block scale applied.
float weight_at(const Matrix& w, int64_t row, int64_t column);

// Inputs [k_begin, k_begin + count) of the 16 output rows of `tile`, unscaled: out[count][16].
// Rows beyond n are zero. k_begin is even.
void load_tile(const Matrix& w, int64_t tile, int64_t k_begin, int64_t count, float* out);

// y[row][0..n) = W x[row][0..k), or += with accumulate: sums of at most 128 inputs that share their
// scales, each block in order, then the blocks in order.
void matmul(const Matrix& w, const float* x, int64_t x_stride, int64_t rows, float* y,
            int64_t y_stride, bool accumulate);

}  // namespace dsv3::kernels::ref
