#include "runtime/engine/interrupted.h"

#include <algorithm>
#include <new>

namespace dsv3 {

void InterruptedStep::keep(std::span<const PlanRows> parts, std::span<const int32_t> tokens,
                           int64_t layer, int64_t hidden_size, ForwardModel* forward) noexcept {
  clear();
  try {
    residual_.resize(tokens.size() * static_cast<size_t>(hidden_size));
    tokens_.assign(tokens.begin(), tokens.end());
    parts_.reserve(parts.size());
  } catch (const std::bad_alloc&) {
    return;
  }
  for (const PlanRows& p : parts) {
    parts_.push_back({p.task->order, p.task->preemptions, p.begin, p.end, p.draft_begin});
  }
  layer_ = layer;
  width_ = static_cast<size_t>(hidden_size);
  forward->copy_residual(static_cast<int32_t>(tokens.size()), residual_.data());
}

bool InterruptedStep::holds(uint64_t order) const {
  return std::any_of(parts_.begin(), parts_.end(),
                     [&](const Part& part) { return part.order == order; });
}

bool InterruptedStep::stands(const Part& part, const Task& task) {
  const Session::State& s = task.session().state();
  const auto length = static_cast<int64_t>(s.tokens.size());
  return task.preemptions == part.preemptions && s.computed == part.begin &&
         length == part.draft_begin &&
         part.end <= length + static_cast<int64_t>(task.draft().size());
}

void InterruptedStep::move_rows(size_t from, size_t to, size_t count) noexcept {
  if (from == to) return;
  std::copy_n(tokens_.begin() + static_cast<std::ptrdiff_t>(from), count,
              tokens_.begin() + static_cast<std::ptrdiff_t>(to));
  std::copy_n(residual_.begin() + static_cast<std::ptrdiff_t>(from * width_), count * width_,
              residual_.begin() + static_cast<std::ptrdiff_t>(to * width_));
}

void InterruptedStep::go_on(Step* step) const {
  if (!std::equal(tokens_.begin(), tokens_.end(), step->tokens.begin(), step->tokens.end())) return;
  step->first_layer = layer_;
  step->residual = residual_.data();
}

}  // namespace dsv3
