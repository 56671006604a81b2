#include "tests/api/api_support.h"

#include <filesystem>
#include <stdexcept>
#include <thread>

namespace dsv3::test {
namespace {

void must(dsv3_status status, const Error& error) {
  if (status == DSV3_OK) return;
  throw std::runtime_error(std::string(dsv3_status_name(status)) + ": " + error.message());
}

}  // namespace

const TemporaryFolder& scratch_folder() {
  static const TemporaryFolder folder;
  return folder;
}

const std::string& tiny_coder() {
  static const std::string path = [] {
    const std::string out = scratch_folder().file("tiny-coder.dsv3");
    Error error;
    must(dsv3_convert(source_path("examples/models/tiny-coder").c_str(), out.c_str(), nullptr,
                      error.out()),
         error);
    return out;
  }();
  return path;
}

ModelHandle open_model(const std::string& path) {
  Error error;
  dsv3_model* model = nullptr;
  must(dsv3_model_open(path.c_str(), nullptr, &model, error.out()), error);
  return ModelHandle(model);
}

ContextHandle make_context(dsv3_model* model, const ContextConfig& config) {
  dsv3_context_options options;
  dsv3_context_options_init(&options, sizeof options);
  options.kernels = config.kernels;
  options.threads = config.threads;
  options.prefill_chunk = config.prefill_chunk;
  options.cache_bytes = config.cache_bytes;
  options.prefix_cache = config.prefix_cache;
  options.disk_cache_dir = config.disk_cache_dir;
  options.disk_cache_bytes = config.disk_cache_bytes;
  options.prompt_attention = config.prompt_attention;
  Error error;
  dsv3_context* context = nullptr;
  must(dsv3_context_create(model, &options, &context, error.out()), error);
  return ContextHandle(context);
}

SessionHandle make_session(dsv3_context* context) {
  Error error;
  dsv3_session* session = nullptr;
  must(dsv3_session_create(context, &session, error.out()), error);
  return SessionHandle(session);
}

SessionHandle fork_session(const dsv3_session* session) {
  Error error;
  dsv3_session* copy = nullptr;
  must(dsv3_session_fork(session, &copy, error.out()), error);
  return SessionHandle(copy);
}

CancelHandle make_cancel() {
  Error error;
  dsv3_cancel* cancel = nullptr;
  must(dsv3_cancel_create(&cancel, error.out()), error);
  return CancelHandle(cancel);
}

void append(dsv3_session* session, const std::vector<int32_t>& tokens) {
  Error error;
  must(dsv3_session_append_tokens(session, tokens.data(), tokens.size(), 0, nullptr, nullptr,
                                  error.out()),
       error);
}

void append_text(dsv3_session* session, const std::string& text) {
  Error error;
  must(
      dsv3_session_append_text(session, text.data(), text.size(), 0, nullptr, nullptr, error.out()),
      error);
}

std::vector<int32_t> tokenize(const dsv3_model* model, const std::string& text) {
  Error error;
  uint64_t needed = 0;
  must(dsv3_model_tokenize(model, text.data(), text.size(), 0, nullptr, 0, &needed, error.out()),
       error);
  std::vector<int32_t> tokens(needed);
  must(dsv3_model_tokenize(model, text.data(), text.size(), 0, tokens.data(), tokens.size(),
                           &needed, error.out()),
       error);
  return tokens;
}

std::vector<int32_t> tokens_of(const dsv3_session* session) {
  Error error;
  std::vector<int32_t> tokens(dsv3_session_length(session));
  uint64_t needed = 0;
  must(dsv3_session_get_tokens(session, 0, tokens.data(), tokens.size(), &needed, error.out()),
       error);
  tokens.resize(needed);
  return tokens;
}

dsv3_request_options request_options() {
  dsv3_request_options options;
  dsv3_request_options_init(&options, sizeof options);
  return options;
}

RequestHandle start(dsv3_session* session, const dsv3_request_options& options) {
  Error error;
  dsv3_request* request = nullptr;
  must(dsv3_request_start(session, &options, &request, error.out()), error);
  return RequestHandle(request);
}

Outcome finish(dsv3_request* request, std::chrono::milliseconds pause) {
  Outcome out;
  Error error;
  for (;;) {
    if (pause.count() > 0) std::this_thread::sleep_for(pause);
    dsv3_event event;
    event.struct_size = sizeof event;
    must(dsv3_request_next(request, DSV3_WAIT_FOREVER, &event, error.out()), error);
    ++out.events;
    if (event.kind == DSV3_EVENT_PROGRESS) {
      out.progress_done = event.prompt_done;
      out.progress_total = event.prompt_total;
      continue;
    }
    if (event.kind == DSV3_EVENT_FINISHED) {
      out.reason = event.finish_reason;
      out.status = event.status;
      out.stop_token = event.stop_token;
      out.stop_string = event.stop_string;
      out.error_message = event.error_message;
      out.error_field = event.error_field;
      out.error_retryable = event.error_retryable == 1;
      out.statistics = *event.statistics;
      break;
    }
    (event.kind == DSV3_EVENT_TEXT ? out.text : out.reasoning)
        .append(event.text, static_cast<size_t>(event.text_length));
    for (uint64_t i = 0; i < event.token_count; ++i) {
      const auto* token = reinterpret_cast<const dsv3_token*>(
          reinterpret_cast<const char*>(event.tokens) + i * event.token_stride);
      out.tokens.push_back(token->id);
      out.logprobs.push_back(token->logprob);
      out.top.emplace_back(token->top, token->top + token->top_count);
    }
  }
  dsv3_event event;
  event.struct_size = sizeof event;
  if (dsv3_request_next(request, 0, &event, error.out()) != DSV3_E_NOT_FOUND) {
    throw std::runtime_error("an event after FINISHED");
  }
  return out;
}

Outcome generate(dsv3_session* session, const dsv3_request_options& options) {
  const RequestHandle request = start(session, options);
  return finish(request.get());
}

std::string python_text() {
  return read_bytes(source_path("tests/data/python/inventory.py")) +
         read_bytes(source_path("tests/data/python/graphs.py"));
}

}  // namespace dsv3::test
