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

// Bytes of one worker's scratch.
size_t attention_scratch_bytes(const MlaShape& shape, Activation native);

}  // namespace dsv3::kernels
