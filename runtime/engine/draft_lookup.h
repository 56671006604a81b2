// Prompt lookup: code repeats itself, so what came after the same last tokens before is a good
// guess of what comes now. The longest match in the session's own text wins, of equally long ones
// the most recent.
//
// O(1) amortised per token, memory bounded by the window. Used by the engine's thread.
#pragma once

#include <algorithm>

#include "runtime/engine/draft.h"
#include "runtime/engine/ngram_index.h"

namespace dsv3 {

class PromptLookup {
 public:
  static constexpr int64_t kMaxWindow = 32768;  // tokens back that are looked at

  // For a sequence of about `expected` tokens. Allocates all it will need.
  explicit PromptLookup(int64_t expected)
      : long_(kLong, std::min(expected, kMaxWindow)),
        short_(kShort, std::min(expected, kMaxWindow)) {}

  // A draft of up to `most` tokens that follow `tokens`, which has grown since the last call (what
  // it was then is its beginning still); empty where nothing matches. Confidence: the match's
  // length.
  void propose(std::span<const int32_t> tokens, int32_t most, Draft* out);

 private:
  static constexpr int32_t kLong = 4, kShort = 2;
  NgramIndex long_, short_;
};

}  // namespace dsv3
