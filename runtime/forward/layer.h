// One decoder layer: x += attention(norm(x)), x += feed-forward(norm(x)).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/experts/plan.h"
#include "runtime/forward/activations.h"
#include "runtime/forward/binding.h"
#include "runtime/model/config.h"

namespace dsv3 {

// What every layer of a step shares.
struct LayerContext {
  kernels::Device* device;
  const ModelConfig* config;
  kernels::MlaShape shape;
  float softmax_scale = 1;
  Activations* a;
  RoutingPlan* plan;
  int32_t rows = 0;
  std::span<const kernels::SequenceRows> sequences;
};

// mla.cc: a->x += W_o attention(rms_norm(a->x)); appends the rows' latents to the layer's part of
// the pages. first_keys [sequences]: the first position each of them attends to; empty: 0 for all.
void mla_block(const LayerContext& c, const BoundLayer& layer, size_t page_offset,
               std::span<const int64_t> first_keys);

// moe.cc: a->x += feed-forward(rms_norm(a->x)), dense or routed. `load`, if given, counts how often
// each expert was chosen.
void ffn_block(const LayerContext& c, const BoundLayer& layer, uint64_t* load);

}  // namespace dsv3
