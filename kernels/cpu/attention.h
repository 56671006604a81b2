// What the parts of mla_attention share, and its scratch, which cpu_device.cc sizes.
#pragma once

#include <algorithm>

#include "kernels/cpu/micro.h"
#include "kernels/kernels.h"
#include "runtime/base/alloc.h"

namespace dsv3::kernels {

// Keys are split at fixed positions; each split has a softmax of its own, joined in order. The
// first are short, so that a few thousand keys are work enough for many threads; where there are
// more, long ones are, and cost less to join.
inline constexpr int64_t kShortSplit = 256;
inline constexpr int64_t kShortSplits = 16;
inline constexpr int64_t kLongSplit = 1024;
// The first key of a split, and the split that a key is in.
constexpr int64_t split_begin(int64_t split) {
  return std::min(split, kShortSplits) * kShortSplit +
         std::max<int64_t>(0, split - kShortSplits) * kLongSplit;
}
constexpr int64_t split_of(int64_t key) {
  const int64_t after_short = key - kShortSplits * kShortSplit;
  return after_short < 0 ? key / kShortSplit : kShortSplits + after_short / kLongSplit;
}
static_assert(split_of(split_begin(kShortSplits)) == kShortSplits);
static_assert(split_of(split_begin(kShortSplits + 1) - 1) == kShortSplits);
// (row, head) pairs that one task takes through the keys together: they share every page it loads.
inline constexpr int32_t kMaxQueries = 128;
// Rows of one sequence in one task at most.
inline constexpr int32_t kQueryRows = 32;

// Sequences of at most so many rows share their use of W_UK and W_UV, up to so many rows in all.
inline constexpr int32_t kFewRows = 8;
inline constexpr int32_t kSharedRows = 64;

// Parts of heads' results from splits that there is room for, (row, head, split) each; and when
// there are too few tasks, so many heads stay together all the same, for with fewer queries a
// page's values are rearranged for little.
inline constexpr int64_t kSplitParts = 8192;
inline constexpr int32_t kFewHeads = 8;

constexpr int32_t round64(int32_t n) { return (n + 63) / 64 * 64; }
constexpr size_t native_bytes(Activation native) {
  return native == Activation::kF32 ? sizeof(float) : sizeof(uint16_t);
}
// Cuts a worker's scratch into arrays that begin at cache lines; without a base it only measures.
struct ScratchCutter {
  std::byte* base;
  size_t* bytes;  // so many are taken
  template <class T>
  void operator()(T** p, size_t count) const {
    *p = base == nullptr ? nullptr : reinterpret_cast<T*>(base + *bytes);
    *bytes += (count * sizeof(T) + kCacheLine - 1) / kCacheLine * kCacheLine;
  }
};
// Floats of one such part.
size_t attention_part_floats(const MlaShape& shape);
// Bytes of one query as the keys want it, and of one input of W_UK or W_UV in any type.
size_t attention_query_bytes(const MlaShape& shape, Activation native);
size_t attention_input_bytes(const MlaShape& shape);
// Bytes of one worker's scratch.
size_t attention_scratch_bytes(const MlaShape& shape, Activation native);
// The same where keys and values are expanded, for chunks of up to so many rows.
size_t expanded_scratch_bytes(const MlaShape& shape, Activation native, int32_t rows);

// Rows of one such task at most: its queries and sums stay near, and scratch small.
inline constexpr int32_t kMostExpandedRows = 2048;

// Any NaN or infinity among the BF16 values of keys [begin, end) of a page?
bool any_not_finite(const uint8_t* page, int32_t pairs, int64_t begin, int64_t end);

}  // namespace dsv3::kernels
