// The insides of ForwardModel, shared by model.cc and mtp.cc.
#pragma once

#include <memory>
#include <vector>

#include "runtime/experts/plan.h"
#include "runtime/forward/activations.h"
#include "runtime/forward/binding.h"
#include "runtime/forward/lanes.h"
#include "runtime/forward/layer.h"
#include "runtime/forward/model.h"
#include "runtime/forward/rope.h"

namespace dsv3 {

struct ForwardModel::Impl {
  Impl(std::shared_ptr<const Model> m, kernels::Device* d)
      : model(std::move(m)), device(d), rope(model->config()), weights(d) {}

  const ModelConfig& config() const { return model->config(); }
  // Bytes from a page's start to a layer's part of it; MTP module m is layer num_hidden_layers + m.
  size_t page_offset(int64_t layer) const { return static_cast<size_t>(layer) * layer_page_bytes; }
  size_t load_offset(int64_t layer) const {
    return static_cast<size_t>(layer * config().n_routed_experts);
  }
  LayerContext layer_context(int32_t rows, std::span<const kernels::SequenceRows> sequences);
  // kCancelled when the step should stop before this layer.
  Status stop_before(const Step& step, int64_t layer);
  // x of the context's rows through one layer; counts experts in all_load, a list as `load`.
  void run_layer(const LayerContext& c, int64_t layer, uint64_t* all_load);
  // x of the context's rows -> hidden.
  void final_norm(const LayerContext& c);
  // All layers and the final norm, with every thread in each operation or in lanes that were cut.
  Status run_layers(const Step& step);
  Status run_lanes(const Step& step);
  // cos and sin of the sequences' positions, to the device.
  void upload_rope(int32_t rows, std::span<const kernels::SequenceRows> sequences);
  // logits of some rows of `hidden` ([.., hidden_size], after a norm), to the host.
  Status head(const DeviceFloats& hidden, std::span<const int32_t> rows, float* out);
  // The same up to the logits on the device, and their `stats`.
  Status compute_logits(const DeviceFloats& hidden, std::span<const int32_t> rows);
  // MTP module 0 over rows whose hidden states stand in a.previous [rows, hidden].
  Status mtp_module(std::span<const int32_t> tokens,
                    std::span<const kernels::SequenceRows> sequences,
                    std::span<const int64_t> first_keys);

  std::shared_ptr<const Model> model;
  kernels::Device* device;
  Rope rope;
  BoundWeights weights;
  Activations a;
  RoutingPlan plan;
  Lanes lanes;
  kernels::MlaShape shape;
  size_t layer_page_bytes = 0;
  int32_t max_rows = 0, max_head_rows = 0;
  std::vector<float> cos, sin;  // [max_rows, pairs]
  std::vector<kernels::RowStats> stats;
  std::vector<uint64_t> load;  // [layers, n_routed_experts]
  std::vector<int32_t> mtp_rows;
  int last_lanes = 0;
  int64_t stopped_before = 0;  // layer, of the last run that did not come to its end
  int32_t mtp_skipped = 0;     // 1 when the last run_mtp left its first row out
};

}  // namespace dsv3
