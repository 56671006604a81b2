// The life of a request beside its tokens: cancel, deadline, back-pressure, waiting, callbacks.
#include <doctest/doctest.h>
#include <poll.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <nlohmann/json.hpp>
#include <thread>

#include "tests/api/request_support.h"

using namespace dsv3::test;            // NOLINT
using namespace dsv3::test::requests;  // NOLINT
using Clock = std::chrono::steady_clock;

namespace {

bool readable(intptr_t descriptor) {
  pollfd p = {static_cast<int>(descriptor), POLLIN, 0};
  return poll(&p, 1, 0) == 1 && (p.revents & POLLIN) != 0;
}

}  // namespace

TEST_CASE("cancel from another thread ends a generation at a valid length") {
  const SessionHandle session = session_with(50);
  const RequestHandle request = start(session.get(), long_request());
  std::thread canceller([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    dsv3_request_cancel(request.get());
  });
  const Outcome outcome = finish(request.get());
  canceller.join();
  CHECK(outcome.reason == DSV3_FINISH_CANCELLED);
  CHECK(outcome.status == DSV3_E_CANCELLED);
  CHECK(outcome.error_message.empty());
  CHECK(dsv3_session_length(session.get()) == 50 + outcome.tokens.size());
  CHECK(dsv3_session_computed(session.get()) <= dsv3_session_length(session.get()));
  // What is there is right: going on gives what an undisturbed session gives.
  std::vector<int32_t> so_far = tokens_of(session.get());
  dsv3_request_options more = request_options();
  more.max_tokens = 8;
  more.ignore_eos = 1;
  const SessionHandle fresh = make_session(shared().context.get());
  append(fresh.get(), so_far);
  CHECK(generate(session.get(), more).tokens == generate(fresh.get(), more).tokens);
}

TEST_CASE("a cancel token ends prefill, decoding and evaluation, and outlives its handle") {
  const SessionHandle session = session_with(2000);
  CancelHandle cancel = make_cancel();
  dsv3_request_options options = long_request();
  options.cancel = cancel.get();
  const RequestHandle request = start(session.get(), options);
  next_event(request.get());  // the first chunk of many is done
  dsv3_cancel_set(cancel.get());
  CHECK(dsv3_cancel_is_set(cancel.get()) == 1);
  cancel.reset();
  const Outcome outcome = finish(request.get());
  CHECK(outcome.reason == DSV3_FINISH_CANCELLED);
  CHECK(outcome.tokens.empty());
  CHECK(dsv3_session_length(session.get()) == 2000);
  CHECK(dsv3_session_computed(session.get()) % 64 == 0);  // whole chunks only
  CHECK(dsv3_session_computed(session.get()) < 2000);

  cancel = make_cancel();
  dsv3_evaluation e;
  dsv3_evaluation_init(&e, sizeof e);
  e.cancel = cancel.get();
  e.progress_user = cancel.get();
  e.progress = [](void* user, uint64_t, uint64_t) {
    dsv3_cancel_set(static_cast<dsv3_cancel*>(user));
  };
  const SessionHandle other = session_with(10);
  const std::vector<int32_t> many = prompt_tokens(1500);
  Error error;
  CHECK(dsv3_session_evaluate(other.get(), many.data(), many.size(), &e, error.out()) ==
        DSV3_E_CANCELLED);
  CHECK(dsv3_session_length(other.get()) == 10);
  CHECK(dsv3_session_computed(other.get()) <= 10);
  // A token that was set before.
  CHECK(dsv3_session_evaluate(other.get(), many.data(), many.size(), &e, error.out()) ==
        DSV3_E_CANCELLED);
}

TEST_CASE("cancel in the middle of a step ends it before its last layer") {
  dsv3_request_options options = request_options();
  options.max_tokens = 1;
  bool amid = false;
  // On a busy machine the step may be over before the cancel.
  for (int i = 0; i < 20 && !amid; ++i) {
    const ContextHandle context = make_context(
        shared().model.get(), {.threads = 1, .prefill_chunk = 2048, .prefix_cache = 0});
    const SessionHandle session = session_with(1900, context.get());
    const RequestHandle request = start(session.get(), options);
    while (!has_begun(request.get())) std::this_thread::yield();
    std::this_thread::sleep_for(std::chrono::milliseconds(5));  // a layer takes some twenty
    dsv3_request_cancel(request.get());
    const Outcome outcome = finish(request.get());
    dsv3_context_statistics all;
    all.struct_size = sizeof all;
    REQUIRE(dsv3_context_get_statistics(context.get(), &all, nullptr) == DSV3_OK);
    amid = outcome.reason == DSV3_FINISH_CANCELLED && all.steps_abandoned == 1;
    if (!amid) continue;
    CHECK(all.steps == 1);
    CHECK(dsv3_session_computed(session.get()) == 0);
    CHECK(all.pages_used == 0);
  }
  CHECK(amid);
}

TEST_CASE("a request that waits for another's step ends before that step does") {
  dsv3_request_options options = request_options();
  options.max_tokens = 1;
  const auto no_event = [](dsv3_request* request) {
    dsv3_event event;
    event.struct_size = sizeof event;
    return dsv3_request_next(request, 0, &event, nullptr) == DSV3_E_TIMEOUT;
  };
  const CancelHandle token = make_cancel();
  dsv3_cancel_set(token.get());
  for (const char* how : {"cancel", "token", "deadline", "free", "session"}) {
    bool before = false;
    int32_t reason = 0;
    // On a busy machine the step may be over before the other request came.
    for (int i = 0; i < 20 && !before; ++i) {
      // New, so that nothing that was freed before makes the engine look. One step computes the
      // whole prompt, for some hundred milliseconds.
      const ContextHandle context = make_context(
          shared().model.get(), {.threads = 1, .prefill_chunk = 2048, .prefix_cache = 0});
      SessionHandle waiting = session_with(200, context.get());
      const SessionHandle session = session_with(1900, context.get());
      const RequestHandle running = start(session.get(), options);
      while (!has_begun(running.get())) std::this_thread::yield();
      dsv3_request_options other = options;
      if (how == std::string("token")) other.cancel = token.get();
      if (how == std::string("deadline")) other.deadline_ms = 1;
      RequestHandle request = start(waiting.get(), other);
      if (how == std::string("free")) {
        request.reset();
        append(waiting.get(), {1});  // waits for its end
      } else {
        if (how == std::string("cancel")) dsv3_request_cancel(request.get());
        if (how == std::string("session")) waiting.reset();
        reason = finish(request.get()).reason;
      }
      before = no_event(running.get());
      const Outcome outcome = finish(running.get());
      CHECK(outcome.reason == DSV3_FINISH_MAX_TOKENS);
    }
    CHECK_MESSAGE(before, std::string(how));
    if (how == std::string("free")) continue;
    CHECK(reason ==
          (how == std::string("deadline") ? DSV3_FINISH_DEADLINE : DSV3_FINISH_CANCELLED));
  }
}

TEST_CASE("a deadline ends prefill and decoding") {
  for (const size_t prompt : {size_t{20}, size_t{2000}}) {
    const SessionHandle session = session_with(prompt);
    dsv3_request_options options = long_request();
    options.deadline_ms = 30;
    const auto begin = Clock::now();
    const Outcome outcome = generate(session.get(), options);
    CHECK(outcome.reason == DSV3_FINISH_DEADLINE);
    CHECK(outcome.status == DSV3_E_DEADLINE);
    CHECK(Clock::now() - begin >= std::chrono::milliseconds(30));
    CHECK(dsv3_session_length(session.get()) == prompt + outcome.tokens.size());
  }
  dsv3_request_options options = request_options();
  options.max_tokens = 1900;
  options.ignore_eos = 1;
  options.deadline_ms = 20;
  char* text = nullptr;
  Error error;
  CHECK(dsv3_complete(shared().context.get(), "def f", DSV3_NUL_TERMINATED, nullptr, 0, &options,
                      &text, nullptr, error.out()) == DSV3_E_DEADLINE);
  CHECK(text == nullptr);
  CHECK(error.field() == "deadline_ms");
}

TEST_CASE("changing a session while a request runs is BUSY; forking it is not") {
  const SessionHandle session = session_with(50);
  const RequestHandle request = start(session.get(), long_request());
  next_event(request.get());
  Error error;
  const int32_t token = 5;
  CHECK(dsv3_session_append_tokens(session.get(), &token, 1, 0, nullptr, nullptr, error.out()) ==
        DSV3_E_BUSY);
  CHECK(error.retryable());
  CHECK(dsv3_session_truncate(session.get(), 1, error.out()) == DSV3_E_BUSY);
  CHECK(dsv3_session_evaluate(session.get(), &token, 1, nullptr, error.out()) == DSV3_E_BUSY);
  dsv3_request* second = nullptr;
  CHECK(dsv3_request_start(session.get(), nullptr, &second, error.out()) == DSV3_E_BUSY);
  CHECK(second == nullptr);
  const SessionHandle copy = fork_session(session.get());
  CHECK(dsv3_session_length(copy.get()) >= 50);
  dsv3_request_cancel(request.get());
  finish(request.get());
  CHECK(dsv3_session_append_tokens(session.get(), &token, 1, 0, nullptr, nullptr, error.out()) ==
        DSV3_OK);
  // The copy was taken in the middle of steps, and is as good as any.
  const SessionHandle fresh = make_session(shared().context.get());
  append(fresh.get(), tokens_of(copy.get()));
  dsv3_request_options more = request_options();
  more.max_tokens = 8;
  CHECK(generate(copy.get(), more).tokens == generate(fresh.get(), more).tokens);
}

TEST_CASE("freeing a request frees its session for the next call") {
  const SessionHandle session = session_with(1500);
  for (int i = 0; i < 5; ++i) {
    RequestHandle request = start(session.get(), long_request());
    request.reset();
    Error error;
    const int32_t token = 7;
    CHECK(dsv3_session_append_tokens(session.get(), &token, 1, 0, nullptr, nullptr, error.out()) ==
          DSV3_OK);
  }
}

TEST_CASE("after a free the session's length stays, also when a step was too far to be stopped") {
  for (int i = 0; i < 10; ++i) {
    std::atomic<int> calls{0};
    const SessionHandle session = session_with(20);
    dsv3_request_options options = long_request();
    options.logits_hook_user = &calls;
    // The free comes while the hook runs: after the last look between layers, before the token.
    options.logits_hook = [](void* user, float*, uint64_t, const int32_t*, uint64_t) {
      ++*static_cast<std::atomic<int>*>(user);
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    };
    RequestHandle request = start(session.get(), options);
    while (calls < 2) std::this_thread::yield();
    request.reset();
    const uint64_t length = dsv3_session_length(session.get());
    CHECK(length == 21);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
    CHECK(dsv3_session_length(session.get()) == length);
  }
}

TEST_CASE("a slow consumer pauses its own request, not the engine") {
  const SessionHandle slow = session_with(30);
  dsv3_request_options options = long_request();
  options.max_queued_events = 4;
  options.max_tokens = 40;
  const RequestHandle request = start(slow.get(), options);
  const SessionHandle other = session_with(30);
  dsv3_request_options quick = request_options();
  quick.max_tokens = 100;
  quick.ignore_eos = 1;
  CHECK(generate(other.get(), quick).tokens.size() == 100);
  const uint64_t paused_at = dsv3_session_length(slow.get());
  CHECK(paused_at <= 30 + 6);
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  CHECK(dsv3_session_length(slow.get()) == paused_at);
  SUBCASE("it goes on when events are taken") {
    const Outcome outcome = finish(request.get());
    CHECK(outcome.tokens.size() == 40);
    const std::vector<int32_t> all = tokens_of(slow.get());
    CHECK(std::vector<int32_t>(all.begin() + 30, all.end()) == outcome.tokens);
  }
  SUBCASE("it can be cancelled while paused") {
    dsv3_request_cancel(request.get());
    CHECK(finish(request.get()).reason == DSV3_FINISH_CANCELLED);
  }
}

TEST_CASE("a paused request notices its cancel token and its deadline") {
  for (const bool by_deadline : {false, true}) {
    const SessionHandle session = session_with(30);
    const CancelHandle cancel = make_cancel();
    dsv3_request_options options = long_request();
    options.max_queued_events = 2;
    // One of the two alone: the look at a cancel token would hide a missed deadline.
    if (by_deadline) {
      options.deadline_ms = 40;
    } else {
      options.cancel = cancel.get();
    }
    const RequestHandle request = start(session.get(), options);
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    if (!by_deadline) dsv3_cancel_set(cancel.get());
    std::this_thread::sleep_for(std::chrono::milliseconds(60));
    // Nothing was taken from the queue: the engine came to it by itself.
    dsv3_context_info info;
    info.struct_size = sizeof info;
    REQUIRE(dsv3_context_get_info(shared().context.get(), &info, nullptr) == DSV3_OK);
    CHECK(info.requests_running == 0);
    CHECK(finish(request.get()).reason ==
          (by_deadline ? DSV3_FINISH_DEADLINE : DSV3_FINISH_CANCELLED));
  }
}

TEST_CASE("the wait descriptor is readable exactly while events wait") {
  const SessionHandle session = session_with(40);
  dsv3_request_options options = request_options();
  options.max_tokens = 10;
  options.ignore_eos = 1;
  const RequestHandle request = start(session.get(), options);
  const intptr_t descriptor = dsv3_request_wait_descriptor(request.get());
  REQUIRE(descriptor >= 0);
  CHECK(dsv3_request_wait_descriptor(request.get()) == descriptor);
  bool finished = false;
  int events = 0;
  while (!finished) {
    pollfd p = {static_cast<int>(descriptor), POLLIN, 0};
    REQUIRE(poll(&p, 1, 10000) == 1);
    dsv3_event event;
    event.struct_size = sizeof event;
    REQUIRE(dsv3_request_next(request.get(), 0, &event, nullptr) == DSV3_OK);
    ++events;
    finished = event.kind == DSV3_EVENT_FINISHED;
  }
  CHECK(events >= 12);
  CHECK_FALSE(readable(descriptor));
  // Asked for late: it is readable at once.
  const RequestHandle late = start(session.get(), options);
  while (dsv3_session_length(session.get()) < 60) std::this_thread::yield();
  CHECK(readable(dsv3_request_wait_descriptor(late.get())));
}

TEST_CASE("next with a timeout") {
  const SessionHandle session = session_with(20);
  Gate gate;
  dsv3_request_options options = request_options();
  options.max_tokens = 1;
  options.logits_hook = Gate::hook;
  options.logits_hook_user = &gate;
  const RequestHandle request = start(session.get(), options);
  CHECK(next_event(request.get()).kind == DSV3_EVENT_PROGRESS);
  dsv3_event event;
  event.struct_size = sizeof event;
  for (const uint64_t timeout_ms : {0, 3}) {
    const auto begin = Clock::now();
    Error error;
    CHECK(dsv3_request_next(request.get(), timeout_ms, &event, error.out()) == DSV3_E_TIMEOUT);
    CHECK(error.status() == DSV3_E_TIMEOUT);
    CHECK(error.retryable());
    CHECK(Clock::now() - begin >= std::chrono::milliseconds(timeout_ms));
  }
  gate.open = true;
  CHECK(next_event(request.get()).kind == DSV3_EVENT_TEXT);
  CHECK(next_event(request.get()).kind == DSV3_EVENT_FINISHED);
}

TEST_CASE("a completion that waits for another one can be cancelled, and has its deadline") {
  const ContextHandle context = make_context(shared().model.get());
  Gate gate;
  dsv3_request_options options = request_options();
  options.max_tokens = 1;
  dsv3_request_options held = options;
  held.logits_hook = Gate::hook;
  held.logits_hook_user = &gate;
  dsv3_status first = DSV3_E_INTERNAL;
  std::thread thread([&] {
    Error error;
    first = complete(context.get(), held, &error);
  });
  while (!gate.inside) std::this_thread::yield();
  Error error;
  options.deadline_ms = 10;
  CHECK(complete(context.get(), options, &error) == DSV3_E_DEADLINE);
  CHECK(error.field() == "deadline_ms");
  options.deadline_ms = 0;
  const CancelHandle cancel = make_cancel();
  options.cancel = cancel.get();
  std::thread canceller([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    dsv3_cancel_set(cancel.get());
  });
  CHECK(complete(context.get(), options, &error) == DSV3_E_CANCELLED);
  canceller.join();
  CHECK_FALSE(gate.gave_up);  // neither waited until it was its turn
  gate.open = true;
  thread.join();
  CHECK(first == DSV3_OK);
  options.cancel = nullptr;
  CHECK(complete(context.get(), options, &error) == DSV3_OK);  // nobody has the turn any more
}

TEST_CASE("notify comes from the engine's thread, and frees inside it are put off") {
  struct State {
    std::atomic<int> calls{0};
    std::atomic<bool> freed{false};
    std::atomic<int> late{0};
    dsv3_request* request = nullptr;
    dsv3_session* session = nullptr;
    dsv3_status refused = DSV3_OK;
  } state;
  SUBCASE("counting") {
    const SessionHandle session = session_with(20);
    dsv3_request_options options = request_options();
    options.max_tokens = 10;
    options.ignore_eos = 1;
    options.speculation = DSV3_SPECULATION_OFF;  // a token a step
    options.notify_user = &state;
    options.notify = [](void* user) { ++static_cast<State*>(user)->calls; };
    const RequestHandle request = start(session.get(), options);
    const Outcome outcome = finish(request.get());
    for (int i = 0; i < 1000 && state.calls < 10; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(state.calls >= 10);  // one per token; the last one's and the end's may be the same
    CHECK(outcome.tokens.size() == 10);
  }
  SUBCASE("freeing its own request and session") {
    state.session = session_with(20).release();
    // The handle must be known to the callback before it is called.
    static std::atomic<bool> ready{false};
    ready = false;
    dsv3_request_options options = long_request();
    options.notify_user = &state;
    options.notify = [](void* user) {
      auto* s = static_cast<State*>(user);
      if (s->freed) ++s->late;
      if (!ready || s->freed) return;
      Error error;
      uint64_t length = 0;
      s->refused =
          dsv3_session_append_tokens(s->session, nullptr, 0, 0, &length, nullptr, error.out());
      dsv3_request_free(s->request);
      dsv3_session_free(s->session);
      s->freed = true;
    };
    state.request = start(state.session, options).release();
    ready = true;
    while (!state.freed) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    CHECK(state.refused == DSV3_E_INVALID_ARGUMENT);  // no other call inside a callback
    dsv3_context_info info;
    info.struct_size = sizeof info;
    info.requests_running = 1;
    for (int i = 0; i < 2000 && info.requests_running > 0; ++i) {
      REQUIRE(dsv3_context_get_info(shared().context.get(), &info, nullptr) == DSV3_OK);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    CHECK(info.requests_running == 0);
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    CHECK(state.late == 0);  // none after the free
  }
  SUBCASE("freeing the context") {
    ModelHandle model = open_model();
    static std::atomic<dsv3_context*> context;
    context = make_context(model.get()).release();
    const SessionHandle session = make_session(context);
    append(session.get(), {1, 2, 3});
    dsv3_request_options options = long_request();
    options.notify_user = &state;
    options.notify = [](void* user) {
      dsv3_context_free(context.exchange(nullptr));
      ++static_cast<State*>(user)->calls;
    };
    const RequestHandle request = start(session.get(), options);
    CHECK(finish(request.get()).reason == DSV3_FINISH_CANCELLED);
  }
}

TEST_CASE("callbacks that throw are their request's problem") {
  const SessionHandle session = session_with(20);
  dsv3_request_options options = request_options();
  options.max_tokens = 5;
  options.ignore_eos = 1;
  options.notify = [](void*) { throw 1; };
  CHECK(generate(session.get(), options).tokens.size() == 5);
  options.notify = nullptr;
  options.logits_hook = [](void*, float*, uint64_t, const int32_t*, uint64_t) {
    throw std::runtime_error("from the hook");
  };
  const Outcome outcome = generate(session.get(), options);
  CHECK(outcome.reason == DSV3_FINISH_ERROR);
  CHECK(outcome.status == DSV3_E_INVALID_ARGUMENT);
  CHECK(outcome.error_field == "logits_hook");
  CHECK(dsv3_session_length(session.get()) == 25);
  // Progress of an evaluation.
  dsv3_evaluation e;
  dsv3_evaluation_init(&e, sizeof e);
  e.progress = [](void*, uint64_t, uint64_t) { throw 1; };
  const std::vector<int32_t> tokens = prompt_tokens(300);
  Error error;
  CHECK(dsv3_session_evaluate(session.get(), tokens.data(), tokens.size(), &e, error.out()) ==
        DSV3_E_INVALID_ARGUMENT);
  CHECK(error.field() == "progress");
  CHECK(dsv3_session_length(session.get()) == 25);
  // One step: the evaluation may be over when its progress is reported.
  for (int i = 0; i < 20; ++i) {
    CHECK(dsv3_session_evaluate(session.get(), tokens.data(), 40, &e, error.out()) ==
          DSV3_E_INVALID_ARGUMENT);
    CHECK(dsv3_session_length(session.get()) == 25);
  }
}

TEST_CASE("an evaluation's last progress is its end, however short it is") {
  const SessionHandle session = session_with(20);
  dsv3_evaluation e;
  dsv3_evaluation_init(&e, sizeof e);
  uint64_t seen = 0;
  e.progress = [](void* user, uint64_t done, uint64_t) { *static_cast<uint64_t*>(user) = done; };
  e.progress_user = &seen;
  const std::vector<int32_t> tokens = prompt_tokens(3);
  for (int i = 0; i < 200; ++i) {
    seen = 0;
    Error error;
    REQUIRE(dsv3_session_evaluate(session.get(), tokens.data(), 3, &e, error.out()) == DSV3_OK);
    CHECK(seen == 3);
    REQUIRE(dsv3_session_truncate(session.get(), 20, error.out()) == DSV3_OK);
  }
}

TEST_CASE("a hook that makes NaN fails its own request and nobody else's") {
  const SessionHandle bad = session_with(20), good = session_with(20);
  dsv3_request_options options = request_options();
  options.max_tokens = 30;
  options.ignore_eos = 1;
  const Outcome expected = generate(fork_session(good.get()).get(), options);
  const RequestHandle running = start(good.get(), options);
  options.logits_hook = [](void*, float* logits, uint64_t, const int32_t*, uint64_t count) {
    if (count >= 25) logits[0] = __builtin_nanf("");
  };
  const RequestHandle failing = start(bad.get(), options);
  const Outcome failed = finish(failing.get());
  CHECK(failed.reason == DSV3_FINISH_ERROR);
  CHECK(failed.status == DSV3_E_NUMERIC);
  CHECK(failed.tokens.size() == 5);
  CHECK(finish(running.get()).tokens == expected.tokens);
}

TEST_CASE("a token whose weights are not finite fails its own request and nobody else's") {
  constexpr int32_t kBad = 77;
  const std::string path = scratch_folder().file("not-finite.dsv3");
  std::string bytes = read_bytes(tiny_coder());
  uint64_t needed = 0;
  REQUIRE(dsv3_model_get_json(shared().model.get(), nullptr, 0, &needed, nullptr) == DSV3_OK);
  std::string text(needed, ' ');
  REQUIRE(dsv3_model_get_json(shared().model.get(), text.data(), needed, nullptr, nullptr) ==
          DSV3_OK);
  const nlohmann::json info = nlohmann::json::parse(text);
  for (const auto& tensor : info["tensors"]) {
    if (tensor["name"] != "model.embed_tokens.weight") continue;
    REQUIRE(tensor["dtype"] == "BF16");
    const size_t row = tensor["shape"][1].get<size_t>() * 2;
    bytes.replace(tensor["offset"].get<size_t>() + kBad * row, 2, "\xc0\x7f");  // NaN
  }
  write_bytes(path, bytes);
  const ModelHandle model = open_model(path);
  const ContextHandle context = make_context(model.get(), {.prefix_cache = 0});
  dsv3_request_options options = request_options();
  options.max_tokens = 10;
  options.ignore_eos = 1;
  const SessionHandle good[] = {session_with(20, context.get()), session_with(25, context.get())};
  Outcome expected[2];
  for (int i = 0; i < 2; ++i) expected[i] = generate(fork_session(good[i].get()).get(), options);
  const SessionHandle bad = session_with(20, context.get()), first = session_with(3, context.get());
  append(bad.get(), {kBad});

  // They wait for a step that takes its time, and share the next one.
  Gate gate;
  dsv3_request_options held = options;
  held.max_tokens = 1;
  held.logits_hook = Gate::hook;
  held.logits_hook_user = &gate;
  const RequestHandle holder = start(first.get(), held);
  while (!gate.inside) std::this_thread::yield();
  const RequestHandle one = start(good[0].get(), options), failing = start(bad.get(), options),
                      two = start(good[1].get(), options);
  gate.open = true;
  const Outcome failed = finish(failing.get());
  CHECK(failed.reason == DSV3_FINISH_ERROR);
  CHECK(failed.status == DSV3_E_NUMERIC);
  CHECK(failed.tokens.empty());
  CHECK(dsv3_session_length(bad.get()) == 21);
  CHECK(finish(one.get()).tokens == expected[0].tokens);
  CHECK(finish(two.get()).tokens == expected[1].tokens);
  CHECK(finish(holder.get()).tokens.size() == 1);
}
