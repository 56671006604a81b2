// From logits to a token: what a request asked for, applied in the order that dsv3.h documents
// (bias, penalties, hook, temperature, top_k, top_p, min_p). A pure function of the logits, the
// options and the tokens before: the engine may sample a position twice and gets the same token.
//
// Used by the engine's thread; holds scratch of the vocabulary's size, so sampling allocates
// nothing.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/base/status.h"

namespace dsv3 {

inline constexpr int32_t kMaxLogprobs = 64;

struct LogitBias {
  int32_t token = 0;
  float bias = 0;  // finite, or -infinity: the token is forbidden
};

struct SamplingOptions {
  float temperature = 0;  // 0: greedy
  float top_p = 1;        // 1: off
  float min_p = 0;        // 0: off
  int32_t top_k = 0;      // 0: off
  float repetition_penalty = 1;
  float presence_penalty = 0;
  float frequency_penalty = 0;
  int32_t penalty_window = 256;  // last tokens that penalties look at; -1: all
  uint64_t seed = 0;
  std::vector<LogitBias> logit_bias;
  int32_t logprobs = -1;  // -1: none; 0: of the chosen token; n: of the n best as well

  // Names the field, its value and what was expected.
  Status validate(int64_t vocab_size) const;
  // Does something change the logits before a token is chosen?
  bool changes_logits() const { return !logit_bias.empty() || penalises(); }
  bool penalises() const {
    return repetition_penalty != 1 || presence_penalty != 0 || frequency_penalty != 0;
  }
  // Is the token that of the greatest logit, and nothing else asked for? Then nobody needs to look
  // at the others.
  bool takes_best() const { return temperature == 0 && logprobs < 0 && !changes_logits(); }
};

struct TopToken {
  int32_t id = 0;
  float logprob = 0;
};

struct SampledToken {
  int32_t id = -1;
  float logprob = std::numeric_limits<float>::quiet_NaN();  // of the unmodified logits
  std::vector<TopToken> top;                                // best first; ties: the lower id first
};

// A caller's look at the logits of a step. May change them; an error ends the request.
struct LogitsHook {
  Status (*fn)(void* self, std::span<float> logits, std::span<const int32_t> tokens) = nullptr;
  void* self = nullptr;
};

// The log-softmax of one row of logits, by what the head found out about it.
class LogSoftmax {
 public:
  LogSoftmax() = default;
  explicit LogSoftmax(const kernels::RowStats& row);
  float operator()(float logit) const {
    // The greatest logit is subtracted first: beside 1e38 a logarithm would vanish.
    return static_cast<float>((static_cast<double>(logit) - max_) - log_sum_);
  }

 private:
  double max_ = 0, log_sum_ = 0;
};

class Sampler {
 public:
  // The device does the arithmetic over the vocabulary; it must outlive the sampler.
  Sampler(kernels::Device* device, int64_t vocab_size);

  // Chooses the token that follows `tokens` (the whole sequence; its length is the position that is
  // drawn). logits: [vocab_size], changed in place; row: what reduce_logits() says of them.
  // kNumeric when one is NaN or infinite.
  Status sample(const SamplingOptions& options, std::span<const int32_t> tokens,
                std::span<float> logits, const kernels::RowStats& row, const LogitsHook& hook,
                SampledToken* out);

 private:
  struct Best {
    size_t id = 0;
    float logit = 0;
  };
  void best_tokens(int32_t count, std::span<const float> logits, SampledToken* out);
  void penalise(const SamplingOptions& options, std::span<const int32_t> tokens,
                std::span<float> logits);
  // The greatest logit after changes, the lowest id of several.
  static Status best_changed(std::span<const float> logits, size_t position, const LogitsHook& hook,
                             Best* out);
  int32_t draw(const SamplingOptions& options, uint64_t position, std::span<const float> logits,
               float max);
  // Of all tokens, by their weights.
  int32_t draw_any(double uniform, double total) const;
  // Of the first `count` of ids_.
  int32_t draw_kept(double uniform, size_t count) const;
  // Those of the tokens that filters can keep; a superset costs time, nothing else. Into ids_, in
  // ascending order; returns how many.
  size_t at_least(float weight);
  size_t may_be_top(size_t count, std::span<const float> logits);
  size_t keep_top_k(size_t count, size_t top_k, std::span<const float> logits);
  size_t keep_top_p(size_t count, double wanted, bool sorted, std::span<const float> logits);
  double weight(int32_t id) const { return static_cast<double>(weights_[static_cast<size_t>(id)]); }

  kernels::Device* const device_;
  std::vector<int32_t> counts_;  // [vocab], zero between calls
  std::vector<int32_t> ids_;     // [vocab], scratch
  std::vector<float> weights_;   // [vocab], relative to the best token's 1
  std::vector<double> sums_;     // of weights, see Device::weigh
  std::vector<float> greatest_;  // [blocks], scratch
  std::vector<float> original_;  // [vocab], the logits before any change
};

}  // namespace dsv3
