// The logits of a step's rows, made when they are asked for. Most steps need one row of each task;
// a task that verifies a draft may need many, or stop at the second. They stay on the device until
// they are asked for: a task that runs the head for itself must have a step of its own.
//
// The engine's thread only.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "runtime/base/status.h"
#include "runtime/forward/model.h"

namespace dsv3 {

class StepLogits {
 public:
  StepLogits(ForwardModel* forward, int64_t vocab_size, int32_t max_rows);

  // A new step: forgets the rows of the last.
  void clear();
  // Rows [begin, end) of the step may be asked for; returns the first one's index.
  int32_t add(int32_t begin, int32_t end);
  // Of the index-th row that was added: what is known of its logits, and the logits [vocab], valid
  // until the next call and the caller's to change. In ascending order. An error (kNumeric) is that
  // row's own.
  Status row(int32_t index, kernels::RowStats* out);
  Status get(int32_t index, std::span<float>* out);

 private:
  Status load(int32_t index);
  Status compute(int32_t index, int32_t count);

  ForwardModel* const forward_;
  std::vector<int32_t> rows_;      // of the step, by index
  int32_t first_ = 0, count_ = 0;  // indices whose logits the device has
  std::vector<float> logits_;      // [vocab]
};

}  // namespace dsv3
