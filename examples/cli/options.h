// The options that several subcommands have, and what they turn into: an opened model, a context,
// a request's options.
#pragma once

#include <CLI/CLI.hpp>
#include <string>
#include <vector>

#include "common.h"

namespace cli {

struct ModelOptions {
  std::string file;
  std::string residency = "map";

  void add_to(CLI::App& app);
  Model open(Interrupt& interrupt) const;
};

struct ContextOptions {
  int32_t threads = 0;
  std::string kernels;
  uint64_t cache_mb = 0;
  std::string disk_cache;
  uint64_t disk_cache_mb = 0;
  std::string trace;
  std::string prompt_attention = "latent";
  int32_t prefill_chunk = 0;
  bool pin = false;
  bool verbose = false;

  void add_to(CLI::App& app);
  void add_compute_to(CLI::App& app);  // threads and kernels, for what has no engine
  dsv3_context_options make() const;   // points into *this
  Context create(dsv3_model* model) const;
  // At the end of a command: freeing the context ends the trace too, but cannot say what went
  // wrong.
  void end_trace(dsv3_context* context) const;
};

// Smaller types for some of the weights.
struct WeightOptions {
  std::string weights = "keep", ffn = "keep", experts = "keep", head = "keep";

  void add_to(CLI::App& app);                     // all but `weights`
  static int32_t value(const std::string& name);  // DSV3_WEIGHTS_...
};

struct SamplingOptions {
  uint64_t max_tokens = 256;
  float temperature = 0, top_p = 1, min_p = 0;
  int32_t top_k = 0;
  float repetition_penalty = 1, presence_penalty = 0, frequency_penalty = 0;
  uint64_t seed = 0;
  std::vector<std::string> stop;
  std::vector<int32_t> stop_tokens;
  std::vector<std::string> logit_bias;  // "ID=BIAS"
  bool ignore_eos = false;
  int32_t logprobs = -1;
  uint64_t deadline_ms = 0;
  std::string speculate = "auto";
  std::vector<std::string> drafters;
  int32_t max_draft = 0;
  std::string reference;  // a file

  void add_to(CLI::App& app);
  // Points into *this, which has to outlive the request's start.
  dsv3_request_options make(const Interrupt& interrupt);

 private:
  void make_speculation(dsv3_request_options* options);

  std::string reference_text_;
  std::vector<const char*> stop_pointers_;
  std::vector<dsv3_logit_bias> biases_;
};

// How a generation is shown.
struct OutputOptions {
  bool json = false;
  bool json_events = false;
  bool stats = false;
  bool quiet = false;

  void add_to(CLI::App& app);
  bool machine() const { return json || json_events; }
};

Session create_session(dsv3_context* context);

}  // namespace cli
