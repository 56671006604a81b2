// Running out of memory at every allocation of a whole life: one clear error, nothing leaks,
// nothing hangs, and the library goes on. The program's operator new is the one that fails, on
// every thread.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdlib>
#include <functional>
#include <new>

#include "tests/api/api_support.h"
#include "tests/support/replaced_new.h"

namespace {

std::atomic<int64_t> countdown{-1};  // allocations until the first failure; negative: none fails
std::atomic<bool> keeps_failing{false};
std::atomic<bool> failed{false};
std::atomic<int64_t> live{0};  // allocated and not freed
std::atomic<int64_t> made{0};

bool may_allocate() {
  if (countdown.load(std::memory_order_relaxed) < 0) return true;
  if (countdown.fetch_sub(1) > 0) return true;
  // The one that fails has come (or passed, on another thread at the same time).
  countdown.store(keeps_failing ? 0 : -1);
  failed = true;
  return false;
}

}  // namespace

void* dsv3::test::replaced_new(size_t size, size_t align) {
  if (!may_allocate()) throw std::bad_alloc();
  void* p = plain_new(size, align);
  ++live;
  ++made;
  return p;
}

void dsv3::test::replaced_delete(void* p) noexcept {
  if (p == nullptr) return;
  --live;
  std::free(p);
}

namespace {

using namespace dsv3::test;  // NOLINT

constexpr char kPrompt[] = "import os\n\ndef main(path):\n    ";

// What a life ended with: the first status that is not OK (a request's final status included).
struct Life {
  dsv3_status status = DSV3_OK;
  bool wrong = false;  // an error object that does not fit its status
  void note(dsv3_status s, dsv3_error* error) {
    wrong = wrong || dsv3_error_status(error) != s;
    if (status == DSV3_OK) status = s;
    dsv3_error_free(error);
  }
};

// open, create, append, generate with everything on, evaluate, fork, complete, free. No step begins
// after a failed one. Nothing here allocates by itself.
Life live_once(const char* path, bool with_open, dsv3_model* opened) {
  Life life;
  dsv3_error* error = nullptr;
  dsv3_model* model = nullptr;
  dsv3_context* context = nullptr;
  dsv3_session *session = nullptr, *copy = nullptr;
  dsv3_request* request = nullptr;
  char* text = nullptr;
  const auto step = [&](dsv3_status status) {
    life.note(status, error);
    error = nullptr;
    return life.status == DSV3_OK;
  };
  const auto run = [&] {
    if (with_open) {
      if (!step(dsv3_model_open(path, nullptr, &model, &error))) return;
      opened = model;
    }
    dsv3_context_options context_options;
    dsv3_context_options_init(&context_options, sizeof context_options);
    context_options.threads = 1;
    if (!step(dsv3_context_create(opened, &context_options, &context, &error))) return;
    if (!step(dsv3_session_create(context, &session, &error))) return;
    if (!step(dsv3_session_append_text(session, kPrompt, DSV3_NUL_TERMINATED, 0, nullptr, nullptr,
                                       &error))) {
      return;
    }
    dsv3_request_options options;
    dsv3_request_options_init(&options, sizeof options);
    const char* const stops[] = {"never to be found"};
    const dsv3_logit_bias bias = {7, -1};
    options.max_tokens = 6;
    options.ignore_eos = 1;
    options.temperature = 1;
    options.top_p = 0.9F;
    options.logprobs = 5;
    options.stop_strings = stops;
    options.stop_string_count = 1;
    options.logit_bias = &bias;
    options.logit_bias_count = 1;
    if (!step(dsv3_request_start(session, &options, &request, &error))) return;
    dsv3_event event;
    do {
      event.struct_size = sizeof event;
      if (!step(dsv3_request_next(request, DSV3_WAIT_FOREVER, &event, &error))) return;
    } while (event.kind != DSV3_EVENT_FINISHED);
    if (event.finish_reason == DSV3_FINISH_ERROR && life.status == DSV3_OK)
      life.status = event.status;
    if (life.status != DSV3_OK) return;
    if (!step(dsv3_session_fork(session, &copy, &error))) return;
    const int32_t tokens[3] = {1, 2, 3};
    float logprobs[2];
    dsv3_evaluation evaluation;
    dsv3_evaluation_init(&evaluation, sizeof evaluation);
    evaluation.logprobs = logprobs;
    if (!step(dsv3_session_evaluate(copy, tokens, 3, &evaluation, &error))) return;
    options.max_tokens = 3;
    step(dsv3_complete(context, kPrompt, DSV3_NUL_TERMINATED, "\n", 1, &options, &text, nullptr,
                       &error));
  };
  run();
  dsv3_string_free(text);
  dsv3_request_free(request);
  dsv3_session_free(copy);
  dsv3_session_free(session);
  dsv3_context_free(context);
  dsv3_model_free(model);
  return life;
}

void check_all(bool with_open, bool keeps, int runs) {
  const std::string path = tiny_coder();
  const ModelHandle model = open_model(path);
  const auto life = [&] { return live_once(path.c_str(), with_open, model.get()); };
  REQUIRE(life().status == DSV3_OK);  // fills what is made once per process
  const int64_t before = made;
  REQUIRE(life().status == DSV3_OK);
  const int64_t allocations = made - before;
  const int64_t stride = std::max<int64_t>(1, allocations / runs);
  INFO("allocations in a life: " << allocations);
  int failures = 0;
  keeps_failing = keeps;
  for (int64_t n = 0; n < allocations; n += n < runs / 2 ? 1 : stride) {
    const int64_t live_before = live;
    failed = false;
    countdown = n;
    const Life result = life();
    countdown = -1;
    const int64_t leaked = live - live_before;
    const bool hit = failed;
    INFO("allocation " << n);
    CHECK(leaked == 0);
    CHECK_FALSE(result.wrong);
    if (hit) {
      ++failures;
      const bool reported = result.status == DSV3_E_OUT_OF_MEMORY;
      // A failure that the library can do without (a hint, a log line) may be invisible.
      if (!reported) CHECK(result.status == DSV3_OK);
      if (keeps) CHECK(reported);
    } else {
      CHECK(result.status == DSV3_OK);
    }
  }
  keeps_failing = false;
  CHECK(failures > std::min<int64_t>(runs, allocations) / 2);
  CHECK(life().status == DSV3_OK);
}

}  // namespace

TEST_CASE("a context with a disk cache finds no memory") {
  const TemporaryFolder folder;
  const std::string path = folder.file("cache");
  const ModelHandle model = open_model(tiny_coder());
  dsv3_context_options options;
  dsv3_context_options_init(&options, sizeof options);
  options.threads = 1;
  options.disk_cache_dir = path.c_str();
  const auto life = [&] {
    dsv3_context* context = nullptr;
    const dsv3_status status = dsv3_context_create(model.get(), &options, &context, nullptr);
    dsv3_context_free(context);
    return status;
  };
  REQUIRE(life() == DSV3_OK);
  const int64_t before = made;
  REQUIRE(life() == DSV3_OK);
  const int64_t allocations = made - before;
  for (int64_t n = 0; n < allocations; ++n) {
    const int64_t live_before = live;
    failed = false;
    countdown = n;
    const dsv3_status status = life();
    countdown = -1;
    const int64_t leaked = live - live_before;
    INFO("allocation " << n);
    CHECK((status == DSV3_OK || (failed && status == DSV3_E_OUT_OF_MEMORY)));
    CHECK(leaked == 0);
  }
}

TEST_CASE("what reads and writes JSON, and a conversion, find no memory") {
  const std::string path = tiny_coder();
  const std::string checkpoint = source_path("examples/models/tiny-coder");
  const std::string output = scratch_folder().file("again.dsv3");
  const ModelHandle model = open_model(path);
  const ContextHandle context = make_context(model.get());
  std::vector<char> buffer(1 << 20);
  // The first allocations, the last ones, and some of those in between.
  const auto sweep = [](int runs, int last, const std::function<dsv3_status()>& call) {
    REQUIRE(call() == DSV3_OK);
    const int64_t before = made;
    REQUIRE(call() == DSV3_OK);
    const int64_t allocations = made - before;
    for (const bool keeps : {false, true}) {
      keeps_failing = keeps;
      const int64_t stride = std::max<int64_t>(1, allocations / runs);
      const auto step = [&](int64_t n) {
        if (n < runs / 2 || n >= allocations - last) return int64_t{1};
        return std::min(stride, allocations - last - n);
      };
      for (int64_t n = 0; n < allocations; n += step(n)) {
        const int64_t live_before = live;
        failed = false;
        countdown = n;
        const dsv3_status status = call();
        countdown = -1;
        const int64_t leaked = live - live_before;
        INFO("allocation " << n << " of " << allocations);
        CHECK((status == DSV3_OK || (failed && status == DSV3_E_OUT_OF_MEMORY)));
        CHECK(leaked == 0);
      }
    }
    keeps_failing = false;
  };
  sweep(200, 0, [&] {
    char* json = nullptr;
    const dsv3_status status = dsv3_context_get_statistics_json(context.get(), &json, nullptr);
    dsv3_string_free(json);
    return status;
  });
  sweep(200, 0, [&] {
    uint64_t needed = 0;
    return dsv3_model_get_json(model.get(), buffer.data(), buffer.size(), &needed, nullptr);
  });
  dsv3_convert_options options;
  dsv3_convert_options_init(&options, sizeof options);
  options.overwrite = 1;
  // Its threads begin with the last few hundred.
  sweep(60, 250,
        [&] { return dsv3_convert(checkpoint.c_str(), output.c_str(), &options, nullptr); });
}

// Builds for debugging and with sanitizers check their pages after each step, which takes memory.
#if defined(NDEBUG) && !defined(DSV3_SANITIZED)
constexpr bool kChecksPages = false;
#else
constexpr bool kChecksPages = true;
#endif

TEST_CASE("one allocation fails, after opening") { check_all(false, false, 300); }
TEST_CASE("all allocations fail from one on, after opening" * doctest::skip(kChecksPages)) {
  check_all(false, true, 150);
}
TEST_CASE("one allocation fails, opening included") { check_all(true, false, 150); }
TEST_CASE("all allocations fail from one on, opening included" * doctest::skip(kChecksPages)) {
  check_all(true, true, 100);
}
