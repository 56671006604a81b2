// What the tests of dsv3.h share: tiny-coder converted once per program, handles that free
// themselves, and the common ways of running a request to its end.
#pragma once

#include <chrono>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "include/dsv3.h"
#include "tests/support/support.h"

namespace dsv3::test {

// Path of tiny-coder as a .dsv3 file; converted on first use, removed when the program ends.
const std::string& tiny_coder();
// A folder that lives as long as the program.
const TemporaryFolder& scratch_folder();

// Receives an error and frees it.
class Error {
 public:
  Error() = default;
  ~Error() { dsv3_error_free(error_); }
  Error(const Error&) = delete;
  dsv3_error** out() {
    dsv3_error_free(error_);
    error_ = nullptr;
    return &error_;
  }
  dsv3_status status() const { return dsv3_error_status(error_); }
  std::string message() const { return dsv3_error_message(error_); }
  std::string field() const { return dsv3_error_field(error_); }
  bool retryable() const { return dsv3_error_retryable(error_) == 1; }
  bool empty() const { return error_ == nullptr; }

 private:
  dsv3_error* error_ = nullptr;
};

template <class T, void (*kFree)(T*)>
struct Freer {
  void operator()(T* p) const { kFree(p); }
};
using ModelHandle = std::unique_ptr<dsv3_model, Freer<dsv3_model, dsv3_model_free>>;
using ContextHandle = std::unique_ptr<dsv3_context, Freer<dsv3_context, dsv3_context_free>>;
using SessionHandle = std::unique_ptr<dsv3_session, Freer<dsv3_session, dsv3_session_free>>;
using RequestHandle = std::unique_ptr<dsv3_request, Freer<dsv3_request, dsv3_request_free>>;
using CancelHandle = std::unique_ptr<dsv3_cancel, Freer<dsv3_cancel, dsv3_cancel_free>>;

// These throw std::runtime_error with the library's message when a call fails.
ModelHandle open_model(const std::string& path = tiny_coder());
struct ContextConfig {
  const char* kernels = nullptr;
  int32_t threads = 1;
  int32_t prefill_chunk = 0;
  uint64_t cache_bytes = 0;
  int32_t prefix_cache = 1;
  const char* disk_cache_dir = nullptr;
  uint64_t disk_cache_bytes = 0;
  int32_t prompt_attention = DSV3_PROMPT_LATENT;
};
ContextHandle make_context(dsv3_model* model, const ContextConfig& config);
inline ContextHandle make_context(dsv3_model* model) {
  const ContextConfig config;  // with a name: GCC 12 takes a default argument for a dangling one
  return make_context(model, config);
}
SessionHandle make_session(dsv3_context* context);
SessionHandle fork_session(const dsv3_session* session);
CancelHandle make_cancel();
void append(dsv3_session* session, const std::vector<int32_t>& tokens);
void append_text(dsv3_session* session, const std::string& text);
std::vector<int32_t> tokenize(const dsv3_model* model, const std::string& text);
std::vector<int32_t> tokens_of(const dsv3_session* session);
dsv3_request_options request_options();
RequestHandle start(dsv3_session* session, const dsv3_request_options& options);

// Everything a request reported.
struct Outcome {
  std::string text, reasoning;
  std::vector<int32_t> tokens;
  std::vector<float> logprobs;
  std::vector<std::vector<dsv3_top_token>> top;
  int32_t reason = 0;
  dsv3_status status = 0;
  int32_t stop_token = -1;
  std::string stop_string, error_message, error_field;
  bool error_retryable = false;
  dsv3_request_statistics statistics = {};
  int events = 0;
  uint64_t progress_done = 0, progress_total = 0;
};
// Takes events until FINISHED, after a pause each; checks that nothing follows it.
Outcome finish(dsv3_request* request, std::chrono::milliseconds pause = {});
Outcome generate(dsv3_session* session, const dsv3_request_options& options);

// Real Python of the repository, to have prompts of any length.
std::string python_text();

}  // namespace dsv3::test
