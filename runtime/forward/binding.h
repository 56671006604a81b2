// A model's weights as one device sees them.
#pragma once

#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/base/status.h"
#include "runtime/model/weights.h"

namespace dsv3 {

struct BoundLayer {
  kernels::Dev<const float> input_norm, post_norm, q_a_norm, kv_a_norm;
  kernels::Matrix q_a;  // empty without q-LoRA
  kernels::Matrix q_b, kv_a, o;
  std::vector<kernels::Matrix> w_uk, w_uv;  // by head
  bool moe = false;
  kernels::FfnWeights dense;                 // dense layers
  kernels::Matrix router;                    // MoE layers
  kernels::Dev<const float> router_bias;     // may be null
  std::vector<kernels::FfnWeights> experts;  // by index
  kernels::FfnWeights shared;
  bool has_shared = false;
};

struct BoundMtp {
  kernels::Dev<const float> enorm, hnorm, head_norm;
  kernels::Matrix eh_proj;
  BoundLayer layer;
};

// Owns the bindings; the model and the device must outlive it.
class BoundWeights {
 public:
  explicit BoundWeights(kernels::Device* device) : device_(device) {}
  ~BoundWeights();
  BoundWeights(const BoundWeights&) = delete;

  Status bind(const ModelWeights& weights);

  kernels::Matrix embed, head;
  kernels::Dev<const float> final_norm;
  std::vector<BoundLayer> layers;
  std::vector<BoundMtp> mtp;

 private:
  Status bind_bytes(const void* host, size_t bytes, kernels::Dev<const std::byte>* out);
  Status bind_matrix(const MatrixView& view, kernels::Matrix* out);
  Status bind_vector(const VectorView& view, kernels::Dev<const float>* out);
  Status bind_ffn(const FfnView& view, kernels::FfnWeights* out);
  Status bind_experts(const ExpertsView& view, std::vector<kernels::FfnWeights>* out);
  Status bind_layer(const LayerWeights& weights, BoundLayer* out);

  kernels::Device* device_;
  std::vector<kernels::Dev<const std::byte>> bindings_;
};

}  // namespace dsv3
