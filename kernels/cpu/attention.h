// Scratch of mla_attention, which cpu_device.cc sizes.
#pragma once

#include "kernels/cpu/micro.h"
#include "kernels/kernels.h"

namespace dsv3::kernels {

// Keys are split at multiples of this; each split has a softmax of its own, joined in order.
inline constexpr int64_t kKeySplit = 1024;
// (row, head) pairs that one task takes through the keys together: they share every page it loads.
inline constexpr int32_t kMaxQueries = 128;
// Rows of one sequence in one task at most.
inline constexpr int32_t kQueryRows = 32;

// Sequences of at most so many rows share their use of W_UK and W_UV, up to so many rows in all.
inline constexpr int32_t kFewRows = 8;
inline constexpr int32_t kSharedRows = 64;

// Bytes of one query as the keys want it, and of one input of W_UK or W_UV in any type.
size_t attention_query_bytes(const MlaShape& shape, Activation native);
size_t attention_input_bytes(const MlaShape& shape);
// Bytes of one worker's scratch.
size_t attention_scratch_bytes(const MlaShape& shape, Activation native);
// The same where keys and values are expanded, for up to so many rows of a sequence.
size_t expanded_scratch_bytes(const MlaShape& shape, Activation native, int32_t rows);

// Any NaN or infinity among the BF16 values of keys [begin, end) of a page?
bool any_not_finite(const uint8_t* page, int32_t pairs, int64_t begin, int64_t end);

}  // namespace dsv3::kernels
