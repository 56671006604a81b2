// Which rows each expert works on in one step: the routing decisions of a batch, sorted by expert,
// in the form the table's moe_ffn takes. Buffers are reserved once; making a plan allocates
// nothing.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/base/status.h"

namespace dsv3 {

class RoutingPlan {
 public:
  // Room for `rows` rows of `top_k` choices among `experts`, and a shared expert beside them.
  void reserve(int32_t rows, int32_t top_k, int32_t experts);

  // Where Device::route stores its decisions: [rows, top_k].
  int32_t* expert_ids() { return ids_.data(); }
  float* expert_weights() { return weights_.data(); }

  // Sorts the decisions. `experts` are the layer's networks by index; `shared` (may be null) works
  // on every row with weight 1 in the last slot.
  void build(int32_t rows, int32_t top_k, std::span<const kernels::FfnWeights> experts,
             const kernels::FfnWeights* shared);

  std::span<const kernels::FfnGroup> groups() const { return groups_; }
  int32_t slots() const { return slots_; }
  const float* slot_weights() const { return slot_weights_.data(); }

  // A plan of one network for every row, weight 1: a dense layer.
  void build_dense(int32_t rows, const kernels::FfnWeights* weights);

 private:
  std::vector<int32_t> ids_;
  std::vector<float> weights_;
  std::vector<int32_t> offsets_;  // by expert: where its rows begin
  std::vector<int32_t> tokens_, token_slots_;
  std::vector<float> slot_weights_;
  std::vector<kernels::FfnGroup> groups_;
  int32_t slots_ = 0;
};

}  // namespace dsv3
