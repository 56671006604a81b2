#include "runtime/forward/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace dsv3 {
namespace {

double yarn_mscale(double factor, double mscale) {
  return factor <= 1 ? 1.0 : 0.1 * mscale * std::log(factor) + 1.0;
}

// The (fractional) index of the pair that makes `rotations` turns over the original context.
double correction_index(double rotations, double dim, double base, double context) {
  return dim * std::log(context / (rotations * 2 * std::numbers::pi)) / (2 * std::log(base));
}

}  // namespace

Rope::Rope(const ModelConfig& config) {
  const auto dim = static_cast<int32_t>(config.qk_rope_head_dim);
  const double base = config.rope_theta;
  softmax_scale_ = static_cast<float>(1.0 / std::sqrt(static_cast<double>(config.qk_head_dim())));
  const YarnConfig& yarn = config.yarn;
  double low = 0, high = 0;
  if (yarn.enabled) {
    const auto context = static_cast<double>(yarn.original_max_position_embeddings);
    low = std::max(std::floor(correction_index(yarn.beta_fast, dim, base, context)), 0.0);
    high = std::min(std::ceil(correction_index(yarn.beta_slow, dim, base, context)), dim - 1.0);
    if (low == high) high += 0.001;
    magnitude_ = static_cast<float>(yarn_mscale(yarn.factor, yarn.mscale) /
                                    yarn_mscale(yarn.factor, yarn.mscale_all_dim));
    const double m = yarn_mscale(yarn.factor, yarn.mscale_all_dim);
    softmax_scale_ = static_cast<float>(softmax_scale_ * m * m);
  }
  for (int32_t i = 0; i < dim / 2; ++i) {
    const double extrapolated = std::pow(base, -2.0 * i / dim);
    double frequency = extrapolated;
    if (yarn.enabled) {
      // Fast pairs keep their frequency, slow ones are interpolated, between them a ramp.
      const double ramp = std::clamp((i - low) / (high - low), 0.0, 1.0);
      frequency = extrapolated / yarn.factor * ramp + extrapolated * (1 - ramp);
    }
    inverse_frequency_.push_back(static_cast<float>(frequency));
  }
}

void Rope::fill(std::span<const kernels::SequenceRows> sequences, float* cos, float* sin) const {
  const size_t pairs = inverse_frequency_.size();
  for (const kernels::SequenceRows& sequence : sequences) {
    for (int32_t r = 0; r < sequence.rows; ++r) {
      // The angle is rounded to float32 as in the published code, or long contexts would differ.
      const auto position = static_cast<float>(sequence.first_position + r);
      const size_t row = static_cast<size_t>(sequence.row_begin + r) * pairs;
      for (size_t i = 0; i < pairs; ++i) {
        const float angle = position * inverse_frequency_[i];
        cos[row + i] = static_cast<float>(std::cos(static_cast<double>(angle))) * magnitude_;
        sin[row + i] = static_cast<float>(std::sin(static_cast<double>(angle))) * magnitude_;
      }
    }
  }
}

}  // namespace dsv3
