#include "runtime/engine/logits.h"

#include <algorithm>

namespace dsv3 {

StepLogits::StepLogits(ForwardModel* forward, int64_t vocab_size, int32_t max_rows)
    : forward_(forward), logits_(static_cast<size_t>(vocab_size)) {
  rows_.reserve(static_cast<size_t>(max_rows));
}

void StepLogits::clear() {
  rows_.clear();
  first_ = count_ = 0;
}

int32_t StepLogits::add(int32_t begin, int32_t end) {
  const auto index = static_cast<int32_t>(rows_.size());
  for (int32_t row = begin; row < end; ++row) rows_.push_back(row);
  return index;
}

Status StepLogits::compute(int32_t index, int32_t count) {
  count_ = 0;
  DSV3_TRY(forward_->compute_head(
      std::span(rows_).subspan(static_cast<size_t>(index), static_cast<size_t>(count))));
  first_ = index;
  count_ = count;
  return {};
}

Status StepLogits::load(int32_t index) {
  if (index >= first_ && index < first_ + count_) return {};
  const int32_t count =
      std::min(forward_->max_head_rows(), static_cast<int32_t>(rows_.size()) - index);
  // One bad row fails the call for all: whose it is shows when each is made alone.
  if (compute(index, count).ok()) return {};
  return compute(index, 1);
}

Status StepLogits::get(int32_t index, std::span<float>* out) {
  DSV3_TRY(load(index));
  forward_->copy_logits(index - first_, logits_.data());
  *out = logits_;
  return {};
}

Status StepLogits::row(int32_t index, kernels::RowStats* out) {
  DSV3_TRY(load(index));
  *out = forward_->logits_row(index - first_);
  return {};
}

}  // namespace dsv3
