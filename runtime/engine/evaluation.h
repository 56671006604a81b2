// Appending tokens and running the model over them, with logits, hidden states and
// log-probabilities of every one: what tools and tests ask for. The caller blocks; the engine's
// thread does the work in steps, between those of other tasks.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>

#include "runtime/base/status.h"
#include "runtime/engine/callback.h"
#include "runtime/engine/session.h"

namespace dsv3 {

struct EvaluateOptions {
  float* logits = nullptr;      // [count, vocab_size]
  float* hidden = nullptr;      // [count, hidden_size], after the final norm
  float* mtp_logits = nullptr;  // [count - 1, vocab_size]: row i predicts token i + 2
  float* logprobs = nullptr;    // [count - 1]: of token i + 1 after token i
  std::function<void(uint64_t done, uint64_t total)> progress;  // on the calling thread, in tokens
  std::shared_ptr<CancelToken> cancel;
};

// On failure the session keeps the length it had before.
Status evaluate(std::shared_ptr<Session> session, std::span<const int32_t> tokens,
                const EvaluateOptions& options);

}  // namespace dsv3
