// A load on one context: interactive clients that ask, read and think, beside background jobs that
// never stop. What an editor with a refactoring behind it does to the engine.
#pragma once

#include <dsv3.h>

#include <atomic>
#include <cstdint>
#include <vector>

#include "common.h"

namespace cli {

struct LoadOptions {
  int32_t clients = 4, background = 1;
  double seconds = 10;
  double think_ms = 100;         // between a client's answer and its next question, on average
  int32_t prefix_tokens = 1024;  // that all clients share
  int32_t tail_tokens = 32;      // that each question adds
  int32_t answer_tokens = 24;
  int32_t cancel_percent =
      10;                    // of questions that are dropped on the way, as when somebody types on
  int32_t job_tokens = 512;  // a job's prompt, and its answer
  uint64_t seed = 1;
  uint64_t first_stream = 0;  // of random numbers; a load with others asks other questions
};

// Milliseconds, one entry for each thing that happened.
struct Load {
  std::vector<double> first_token_ms, between_tokens_ms, cancel_ms;
  uint64_t questions = 0, cancelled = 0, jobs = 0;
  uint64_t client_tokens = 0, background_tokens = 0;
  uint64_t prompt_tokens = 0, cached_tokens = 0;  // of clients' questions that were answered
  uint64_t refused = 0;                           // retryable errors, tried again
  uint64_t pages_high_water = 0, pages = 0;
  double seconds = 0;

  void add(const Load& other);
};

// The value that `percent` of them do not exceed; 0 of none.
double percentile(std::vector<double> values, double percent);

// Runs the load; `stop` (Ctrl-C) ends it early. The clients' first questions, which find a cold
// cache, do not count: the time begins after them. Throws Failure when a request fails.
Load run_load(dsv3_context* context, const dsv3_model_info& model, const LoadOptions& options,
              const Interrupt& stop);

}  // namespace cli
