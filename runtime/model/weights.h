// Typed views of a model's weights in host memory. The shapes were checked when the file was
// opened: who gets a ModelWeights may trust every dimension against the config.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/kernels.h"

namespace dsv3 {

// A matrix in the file (or in memory), in the layout kernels read. See kernels::Matrix.
struct MatrixView {
  kernels::DType dtype = kernels::DType::kF32;
  kernels::Layout layout = kernels::Layout::kTile16x2;
  int32_t n = 0, k = 0;
  const uint8_t* data = nullptr;
  size_t bytes = 0;
  const float* scales = nullptr;  // FP8 only; [ceil(n/scale_n), ceil(k/scale_k)]
  int32_t scale_n = 128, scale_k = 128;
  bool empty() const { return n == 0; }
  size_t scale_count() const {
    return scales == nullptr ? 0
                             : static_cast<size_t>((n + scale_n - 1) / scale_n) *
                                   static_cast<size_t>((k + scale_k - 1) / scale_k);
  }
};

struct VectorView {  // norms and biases, always F32 (exact for BF16 and F16 checkpoints)
  const float* data = nullptr;
  int32_t size = 0;
  bool empty() const { return size == 0; }
};

struct FfnView {
  MatrixView gate, up, down;
};

// The routed experts of one layer. Expert e's gate, up and down with their scales are one
// contiguous extent at `base + e * stride`, aligned to 4 KiB: one sequential read.
struct ExpertsView {
  const uint8_t* base = nullptr;
  size_t stride = 0;
  std::vector<FfnView> experts;
};

struct LayerWeights {
  VectorView input_norm;  // [hidden]
  VectorView post_norm;   // [hidden]
  MatrixView q_a;         // [q_lora_rank, hidden]; empty without q-LoRA
  VectorView q_a_norm;    // [q_lora_rank]
  MatrixView q_b;         // [heads * qk_head_dim, q_lora_rank or hidden] (q_proj without q-LoRA)
  MatrixView kv_a;        // [kv_lora_rank + qk_rope_head_dim, hidden]
  VectorView kv_a_norm;   // [kv_lora_rank]
  std::vector<MatrixView>
      w_uk;  // per head [kv_lora_rank, qk_nope_head_dim]: kv_b's part, transposed
  std::vector<MatrixView> w_uv;  // per head [v_head_dim, kv_lora_rank]
  MatrixView o;                  // [hidden, heads * v_head_dim]
  FfnView dense;                 // dense layers: width intermediate_size
  MatrixView router;             // MoE layers: [n_routed_experts, hidden], BF16 or F32
  VectorView router_bias;        // noaux_tc only: [n_routed_experts]
  FfnView shared;                // width n_shared_experts * moe_intermediate_size; may be empty
  ExpertsView experts;
  bool moe = false;
};

struct MtpWeights {
  VectorView enorm, hnorm;  // [hidden]
  MatrixView eh_proj;       // [hidden, 2 * hidden], embedding's half first
  LayerWeights layer;
  VectorView head_norm;  // [hidden]
};

struct ModelWeights {
  MatrixView embed;  // [vocab, hidden]; row-major, or tiled when it is the head too (tied)
  std::vector<LayerWeights> layers;
  VectorView final_norm;
  MatrixView head;  // [vocab, hidden]; the same bytes as embed when tied
  std::vector<MtpWeights> mtp;
};

}  // namespace dsv3
