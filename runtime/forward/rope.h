// Rotary position embedding with YaRN, as the published code computes it (modeling_deepseek.py,
// DeepseekV3YarnRotaryEmbedding; YaRN: arXiv 2309.00071).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/model/config.h"

namespace dsv3 {

class Rope {
 public:
  explicit Rope(const ModelConfig& config);

  int32_t pairs() const { return static_cast<int32_t>(inverse_frequency_.size()); }
  // 1 / sqrt(qk_head_dim), times mscale(factor, mscale_all_dim) squared under YaRN.
  float softmax_scale() const { return softmax_scale_; }
  // cos and sin [rows, pairs] of every row's position.
  void fill(std::span<const kernels::SequenceRows> sequences, float* cos, float* sin) const;

 private:
  std::vector<float> inverse_frequency_;  // [qk_rope_head_dim / 2]
  float magnitude_ = 1;  // multiplies cos and sin: mscale(mscale) / mscale(mscale_all_dim)
  float softmax_scale_ = 1;
};

}  // namespace dsv3
