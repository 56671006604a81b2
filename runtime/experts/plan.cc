#include "runtime/experts/plan.h"

#include <algorithm>
#include <cassert>

namespace dsv3 {

void RoutingPlan::reserve(int32_t rows, int32_t top_k, int32_t experts) {
  const auto choices = static_cast<size_t>(rows) * static_cast<size_t>(top_k);
  const auto slots = static_cast<size_t>(rows) * static_cast<size_t>(top_k + 1);
  ids_.resize(std::max(ids_.size(), choices));
  weights_.resize(std::max(weights_.size(), choices));
  offsets_.resize(std::max(offsets_.size(), static_cast<size_t>(experts) + 1));
  tokens_.resize(std::max(tokens_.size(), slots));
  token_slots_.resize(std::max(token_slots_.size(), slots));
  slot_weights_.resize(std::max(slot_weights_.size(), slots));
  groups_.reserve(static_cast<size_t>(experts) + 1);
}

void RoutingPlan::build(int32_t rows, int32_t top_k, std::span<const kernels::FfnWeights> experts,
                        const kernels::FfnWeights* shared) {
  slots_ = top_k + (shared != nullptr ? 1 : 0);
  groups_.clear();
  // A counting sort by expert; rows of one expert stay in the batch's order.
  std::fill(offsets_.begin(), offsets_.end(), 0);
  const int32_t choices = rows * top_k;
  for (int32_t i = 0; i < choices; ++i) ++offsets_[static_cast<size_t>(ids_[i]) + 1];
  for (size_t e = 1; e < offsets_.size(); ++e) offsets_[e] += offsets_[e - 1];
  for (size_t e = 0; e < experts.size(); ++e) {
    const int32_t begin = offsets_[e], count = offsets_[e + 1] - begin;
    if (count > 0) groups_.push_back({&experts[e], &tokens_[begin], &token_slots_[begin], count});
  }
  for (int32_t t = 0; t < rows; ++t) {
    for (int32_t rank = 0; rank < top_k; ++rank) {
      const int32_t at = offsets_[static_cast<size_t>(ids_[t * top_k + rank])]++;
      tokens_[at] = t;
      token_slots_[at] = rank;
      slot_weights_[t * slots_ + rank] = weights_[t * top_k + rank];
    }
  }
  if (shared == nullptr) return;
  for (int32_t t = 0; t < rows; ++t) {
    tokens_[choices + t] = t;
    token_slots_[choices + t] = top_k;
    slot_weights_[t * slots_ + top_k] = 1;
  }
  groups_.push_back({shared, &tokens_[choices], &token_slots_[choices], rows});
}

void RoutingPlan::build_dense(int32_t rows, const kernels::FfnWeights* weights) {
  slots_ = 1;
  groups_.clear();
  for (int32_t t = 0; t < rows; ++t) {
    tokens_[t] = t;
    token_slots_[t] = 0;
    slot_weights_[t] = 1;
  }
  groups_.push_back({weights, tokens_.data(), token_slots_.data(), rows});
}

}  // namespace dsv3
