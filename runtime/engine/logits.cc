#include "runtime/engine/logits.h"

#include <algorithm>

namespace dsv3 {

StepLogits::StepLogits(ForwardModel* forward, int64_t vocab_size, int32_t max_rows)
    : forward_(forward),
      vocab_(static_cast<size_t>(vocab_size)),
      logits_(static_cast<size_t>(forward->max_head_rows()) * vocab_) {
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

Status StepLogits::load(int32_t index, int32_t count) {
  count_ = 0;
  DSV3_TRY(forward_->head(
      std::span(rows_).subspan(static_cast<size_t>(index), static_cast<size_t>(count)),
      logits_.data()));
  first_ = index;
  count_ = count;
  return {};
}

Status StepLogits::get(int32_t index, std::span<float>* out) {
  if (index < first_ || index >= first_ + count_) {
    const int32_t count =
        std::min(forward_->max_head_rows(), static_cast<int32_t>(rows_.size()) - index);
    // One bad row fails the call for all: whose it is shows when each is made alone.
    if (!load(index, count).ok()) DSV3_TRY(load(index, 1));
  }
  *out = std::span(logits_).subspan(static_cast<size_t>(index - first_) * vocab_, vocab_);
  return {};
}

}  // namespace dsv3
