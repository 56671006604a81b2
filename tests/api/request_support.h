// What the tests of requests share: a context with short prompt chunks, prompts of any length.
#pragma once

#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "tests/api/api_support.h"

namespace dsv3::test::requests {

struct Fixture {
  ModelHandle model = open_model();
  ContextHandle context = make_context(model.get(), {.prefill_chunk = 64, .prefix_cache = 0});
};
inline Fixture& shared() {
  static Fixture fixture;
  return fixture;
}

inline std::vector<int32_t> prompt_tokens(size_t count) {
  const std::vector<int32_t> text = tokenize(shared().model.get(), python_text());
  std::vector<int32_t> tokens(count);
  for (size_t i = 0; i < count; ++i) tokens[i] = text[i % text.size()];
  return tokens;
}

inline SessionHandle session_with(size_t count, dsv3_context* context = shared().context.get()) {
  SessionHandle session = make_session(context);
  append(session.get(), prompt_tokens(count));
  return session;
}

inline dsv3_request_options long_request() {
  dsv3_request_options options = request_options();
  options.max_tokens = 1900;
  options.ignore_eos = 1;
  options.max_queued_events = 4096;
  return options;
}

inline dsv3_session_io io_for(const std::string& path) {
  dsv3_session_io io;
  dsv3_session_io_init(&io, sizeof io);
  io.path = path.c_str();
  return io;
}

inline dsv3_event next_event(dsv3_request* request) {
  dsv3_event event;
  event.struct_size = sizeof event;
  REQUIRE(dsv3_request_next(request, DSV3_WAIT_FOREVER, &event, nullptr) == DSV3_OK);
  return event;
}

// Whether a step has taken it along: until then it has waited all the time.
inline bool has_begun(const dsv3_request* request) {
  dsv3_request_statistics s;
  s.struct_size = sizeof s;
  REQUIRE(dsv3_request_get_statistics(request, &s, nullptr) == DSV3_OK);
  return s.queue_ns < s.total_ns;
}

// Holds the engine's thread inside a logits hook until it is opened, for some seconds at most.
struct Gate {
  std::atomic<bool> inside{false}, open{false}, gave_up{false};
  static void hook(void* user, float*, uint64_t, const int32_t*, uint64_t) {
    auto* self = static_cast<Gate*>(user);
    self->inside = true;
    for (int i = 0; i < 5000 && !self->open; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    if (!self->open) self->gave_up = true;
  }
};

// A completion in one call, of which only the status counts.
inline dsv3_status complete(dsv3_context* context, const dsv3_request_options& options,
                            Error* error) {
  char* text = nullptr;
  const dsv3_status status = dsv3_complete(context, "def f", DSV3_NUL_TERMINATED, nullptr, 0,
                                           &options, &text, nullptr, error->out());
  dsv3_string_free(text);
  return status;
}

}  // namespace dsv3::test::requests
