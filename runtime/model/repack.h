// The converter's work on bytes: checking, converting, quantising and tiling rows of a matrix. Pure
// functions over memory; who reads and writes files is convert_pipeline.cc.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace dsv3 {

// Index of the first NaN or infinity (E4M3: NaN) among `count` values, or -1. Not for MXFP4.
int64_t first_non_finite(const uint8_t* data, kernels::DType dtype, size_t count);

// Converts BF16, F16 or F32 values exactly.
void convert_to_f32(const uint8_t* data, kernels::DType dtype, size_t count, float* out);

// Rows [n][k] of elements of `element` bytes into panels of 16 rows,
// [ceil(n/16)][ceil(k/2)][16][2]; what the panels have beyond n and k becomes zero.
void tile_rows(const uint8_t* rows, size_t element, int64_t n, int64_t k, uint8_t* out);

// [n][k] -> [k][n]
void transpose(const uint8_t* rows, size_t element, int64_t n, int64_t k, uint8_t* out);

inline constexpr int64_t kQuantBlock = 128;
// Rows [n][k] into E4M3 with one scale per 128 x 128 block (scale = largest magnitude / 448, 1 for
// a block of zeros): fp8 [n][k], scales [ceil(n/128)][ceil(k/128)].
void quantise_rows(const float* rows, int64_t n, int64_t k, uint8_t* fp8, float* scales);

// Rows [n][k] into MXFP4 in tiles (kernels::Layout::kTileMx). Of each 32 values the scale is the
// one of three neighbouring powers of two with the least sum of squared errors: the format's own
// rule (the exponent of the largest value, less two) cuts off up to a quarter of the largest value.
void quantise_mx(const float* rows, int64_t n, int64_t k, uint8_t* out);

// MXFP4 rows as checkpoints store them (packed [n][k/2], the even column in the low half; E8M0
// codes [n][k/32]) into tiles.
void tile_mx(const uint8_t* packed, const uint8_t* scales, int64_t n, int64_t k, uint8_t* out);

// out[i][j] = fp8[i][j] * scales[(row0 + i) / block_n - row0 / block_n][j / block_k]: n rows whose
// first stands at row0 of the matrix; scales begin with that row's block.
void dequantise_rows(const uint8_t* fp8, int64_t row0, int64_t n, int64_t k, const float* scales,
                     int64_t block_n, int64_t block_k, float* out);

}  // namespace dsv3
