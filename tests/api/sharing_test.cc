// Requests and what they share: priorities, the page budget, statistics, the model's file, the log.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>

#include "tests/api/request_support.h"

using namespace dsv3::test;            // NOLINT
using namespace dsv3::test::requests;  // NOLINT
using Clock = std::chrono::steady_clock;

TEST_CASE("interactive requests come before background ones") {
  const SessionHandle before = session_with(1), background = session_with(1900),
                      interactive = session_with(60);
  dsv3_request_options options = request_options();
  options.ignore_eos = 1;
  options.speculation = DSV3_SPECULATION_OFF;
  Gate gate;  // holds the engine until both are there
  options.max_tokens = 1;
  options.logits_hook = Gate::hook;
  options.logits_hook_user = &gate;
  const RequestHandle holds = start(before.get(), options);
  while (!gate.inside) std::this_thread::yield();
  options.max_tokens = 4;
  options.logits_hook = nullptr;
  options.priority = DSV3_PRIORITY_BACKGROUND;
  const RequestHandle first = start(background.get(), options);
  // What is computed of the background one when the other one has each of its tokens.
  struct Look {
    const dsv3_session* session;
    std::vector<uint64_t> computed;
  } look{background.get(), {}};
  options.priority = DSV3_PRIORITY_INTERACTIVE;
  options.logits_hook_user = &look;
  options.logits_hook = [](void* user, float*, uint64_t, const int32_t*, uint64_t) {
    auto* self = static_cast<Look*>(user);
    self->computed.push_back(dsv3_session_computed(self->session));
  };
  const RequestHandle second = start(interactive.get(), options);
  gate.open = true;
  CHECK(finish(second.get()).tokens.size() == 4);
  REQUIRE(look.computed.size() == 4);
  CHECK(look.computed.back() <= 4);  // a few rows beside the other one's
  CHECK(finish(first.get()).tokens.size() == 4);
  CHECK_FALSE(gate.gave_up);
}

TEST_CASE("a completion's deadline counts from its call, not from its turn") {
  using std::chrono::milliseconds;
  const ContextHandle context = make_context(shared().model.get());
  Gate gate;
  dsv3_request_options options = request_options();
  options.ignore_eos = 1;
  options.max_tokens = 1;
  options.logits_hook = Gate::hook;
  options.logits_hook_user = &gate;
  std::thread before([&] {
    Error error;
    CHECK(complete(context.get(), options, &error) == DSV3_OK);
  });
  while (!gate.inside) std::this_thread::yield();
  std::thread opener([&] {
    std::this_thread::sleep_for(milliseconds(1500));
    gate.open = true;
  });
  // It would come to its end long before its deadline, were that counted from its turn.
  auto until = Clock::now() + milliseconds(1800);
  dsv3_request_options late = options;
  late.max_tokens = 20;
  late.deadline_ms = 500;
  late.logits_hook_user = &until;
  late.logits_hook = [](void* user, float*, uint64_t, const int32_t*, uint64_t) {
    std::this_thread::sleep_until(*static_cast<Clock::time_point*>(user));
  };
  Error error;
  CHECK(complete(context.get(), late, &error) == DSV3_E_DEADLINE);
  CHECK(error.field() == "deadline_ms");
  opener.join();
  before.join();
}

// Background work beside requests that come one after another. Were its steps interrupted as often
// as they are where the next request is there as soon as the last one is done?
bool interrupts_background(const dsv3_request_options& two, const Outcome& expected) {
  const ContextHandle context = make_context(shared().model.get());
  dsv3_request_options options = two;
  const SessionHandle interactive = session_with(4, context.get());
  dsv3_request_options one = options;
  one.max_tokens = 1;
  generate(interactive.get(), one);
  const SessionHandle background = session_with(700, context.get());
  options.priority = DSV3_PRIORITY_BACKGROUND;
  std::atomic<bool> done{false};
  const RequestHandle request = start(background.get(), options);
  Outcome outcome;
  std::thread consumer([&] {
    outcome = finish(request.get());
    done = true;
  });
  int served = 0;
  for (; !done && served < 3000; ++served) {
    REQUIRE(dsv3_session_truncate(interactive.get(), 4, nullptr) == DSV3_OK);
    generate(interactive.get(), one);
  }
  const bool in_time = served < 3000;
  dsv3_request_cancel(request.get());
  consumer.join();
  CHECK(in_time);
  MESSAGE("interactive requests meanwhile: " << served);
  dsv3_context_statistics s;
  s.struct_size = sizeof s;
  REQUIRE(dsv3_context_get_statistics(context.get(), &s, nullptr) == DSV3_OK);
  MESSAGE("steps " << s.steps << ", abandoned " << s.steps_abandoned << ", rows " << s.rows);
  // Interrupted rows were not computed twice, but for a chunk or two.
  CHECK(s.rows <= 702 + 128 + static_cast<uint64_t>(served));
  CHECK(outcome.tokens == expected.tokens);
  CHECK(outcome.logprobs == expected.logprobs);
  // Two of its rows go with every fourth step of the requests; a step of its own, of the rest, has
  // at most 128.
  return s.steps_abandoned >= static_cast<uint64_t>(std::max(1, (700 - served / 2) / 128));
}

TEST_CASE("background work gets on however many interactive requests come") {
  dsv3_request_options options = request_options();
  options.max_tokens = 2;
  options.ignore_eos = 1;
  options.logprobs = 2;
  Outcome expected;
  {  // in another context, so that nothing is cached
    const ContextHandle other = make_context(shared().model.get());
    expected = generate(session_with(700, other.get()).get(), options);
  }
  // On a busy machine requests come late, and find steps that have run to their end.
  bool interrupted = false;
  for (int attempt = 0; !interrupted && attempt < 20; ++attempt) {
    interrupted = interrupts_background(options, expected);
  }
  CHECK(interrupted);
}

// Two requests of 800 tokens each, in 15 pages of 64, whose queues are full after two events. They
// come at the same time: otherwise the second one finds no room to begin.
struct Crowded {
  ContextHandle context;
  Outcome expected;
  SessionHandle sessions[2];
  RequestHandle requests[2];

  Crowded() {
    dsv3_context_info info;
    info.struct_size = sizeof info;
    REQUIRE(dsv3_context_get_info(shared().context.get(), &info, nullptr) == DSV3_OK);
    context = make_context(shared().model.get(),
                           {.cache_bytes = 15 * info.page_bytes, .prefix_cache = 0});
    dsv3_request_options options = request_options();
    options.max_tokens = 200;
    options.ignore_eos = 1;
    options.max_queued_events = 2;
    expected = generate(session_with(600).get(), options);
    Gate gate;
    dsv3_request_options before = request_options();
    before.max_tokens = 1;
    before.logits_hook = Gate::hook;  // holds the engine until both are there
    before.logits_hook_user = &gate;
    const SessionHandle session = session_with(1, context.get());
    const RequestHandle request = start(session.get(), before);
    while (!gate.inside) std::this_thread::yield();
    for (int i = 0; i < 2; ++i) {
      sessions[i] = session_with(600, context.get());
      requests[i] = start(sessions[i].get(), options);
    }
    gate.open = true;
  }
  dsv3_context_statistics statistics() const {
    dsv3_context_statistics s;
    s.struct_size = sizeof s;
    REQUIRE(dsv3_context_get_statistics(context.get(), &s, nullptr) == DSV3_OK);
    return s;
  }
};

TEST_CASE("slow consumers whose requests do not fit together do not take turns for every token") {
  const Crowded c;
  Outcome outcomes[2];
  std::vector<std::thread> consumers;
  for (size_t i = 0; i < 2; ++i) {
    consumers.emplace_back(
        [&, i] { outcomes[i] = finish(c.requests[i].get(), std::chrono::milliseconds(1)); });
  }
  for (std::thread& consumer : consumers) consumer.join();
  for (const Outcome& outcome : outcomes) CHECK(outcome.tokens == c.expected.tokens);
  const dsv3_context_statistics s = c.statistics();
  MESSAGE("rows " << s.rows << ", preemptions " << s.preemptions);
  CHECK(s.preemptions <= 10);
  CHECK(s.rows < 2 * 800 + 10 * 800);
}

TEST_CASE("a request whose consumer takes nothing gives way to one that had given way to it") {
  const Crowded c;
  // Nobody takes the first one's events, and nothing else wakes the engine.
  CHECK(finish(c.requests[1].get()).tokens == c.expected.tokens);
  CHECK(finish(c.requests[0].get()).tokens == c.expected.tokens);
  CHECK(c.statistics().preemptions >= 2);
}

TEST_CASE("who cancels often does not keep others from getting on") {
  const ContextHandle context = make_context(shared().model.get(), {.prefix_cache = 0});
  dsv3_request_options options = request_options();
  options.max_tokens = 2;
  options.ignore_eos = 1;
  options.logprobs = 2;
  options.speculation = DSV3_SPECULATION_OFF;
  const Outcome expected = generate(session_with(1900).get(), options);
  const SessionHandle patient = session_with(1900, context.get());
  const RequestHandle request = start(patient.get(), options);
  std::atomic<bool> done{false};
  Outcome outcome;
  std::thread consumer([&] {
    outcome = finish(request.get());
    done = true;
  });
  // Of the same class, in the same steps, and gone in the middle of them.
  const SessionHandle hasty = session_with(4, context.get());
  options.max_tokens = 100;
  uint64_t asked = 0, theirs = 0;
  for (; !done && asked < 3000; ++asked) {
    REQUIRE(dsv3_session_truncate(hasty.get(), 4, nullptr) == DSV3_OK);
    const RequestHandle one = start(hasty.get(), options);
    do {  // however slow the machine is: until a step has taken it along
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    } while (!has_begun(one.get()) && !done);
    dsv3_request_cancel(one.get());
    theirs += 4 + finish(one.get()).tokens.size();
  }
  const bool in_time = asked < 3000;
  dsv3_request_cancel(request.get());
  consumer.join();
  CHECK(in_time);
  dsv3_context_statistics s;
  s.struct_size = sizeof s;
  REQUIRE(dsv3_context_get_statistics(context.get(), &s, nullptr) == DSV3_OK);
  MESSAGE("cancelled requests meanwhile: " << asked << ", steps " << s.steps << ", abandoned "
                                           << s.steps_abandoned << ", rows " << s.rows);
  CHECK(s.steps_abandoned > 3);
  // No row of the patient one was computed twice: what lies above it is the others'.
  CHECK(s.rows <= 1902 + theirs + asked);
  CHECK(outcome.tokens == expected.tokens);
  CHECK(outcome.logprobs == expected.logprobs);
}

TEST_CASE("idle work gets on while both better classes always have some") {
  const ContextHandle context = make_context(shared().model.get());
  dsv3_request_options options = request_options();
  options.ignore_eos = 1;
  options.max_queued_events = 4096;
  options.speculation = DSV3_SPECULATION_OFF;
  options.max_tokens = 1500;
  const SessionHandle first = session_with(3, context.get());
  const SessionHandle jobs[] = {session_with(3, context.get()), session_with(4, context.get())};
  const SessionHandle last = session_with(5, context.get());
  const RequestHandle interactive = start(first.get(), options);
  options.priority = DSV3_PRIORITY_BACKGROUND;
  const RequestHandle one = start(jobs[0].get(), options), two = start(jobs[1].get(), options);
  while (dsv3_session_length(first.get()) < 50 || dsv3_session_length(jobs[1].get()) < 5) {
    std::this_thread::yield();
  }
  options.priority = DSV3_PRIORITY_IDLE;
  options.max_tokens = 5;
  const RequestHandle idle = start(last.get(), options);
  (void)finish(interactive.get());
  CHECK(dsv3_session_length(jobs[0].get()) < 1503);
  CHECK(dsv3_session_length(last.get()) == 10);
  dsv3_request_cancel(one.get());
  dsv3_request_cancel(two.get());
  (void)finish(idle.get());
}

TEST_CASE("the page budget: too large at once, and exhausted on the way") {
  dsv3_context_info info;
  info.struct_size = sizeof info;
  REQUIRE(dsv3_context_get_info(shared().context.get(), &info, nullptr) == DSV3_OK);
  const uint64_t page = info.page_bytes;
  const ContextHandle context =
      make_context(shared().model.get(), {.prefill_chunk = 64, .cache_bytes = 4 * page});
  REQUIRE(dsv3_context_get_info(context.get(), &info, nullptr) == DSV3_OK);
  CHECK(info.pages == 4);
  Error error;
  dsv3_request* request = nullptr;
  const SessionHandle large = session_with(257, context.get());
  CHECK(dsv3_request_start(large.get(), nullptr, &request, error.out()) == DSV3_E_CAPACITY);
  CHECK_FALSE(error.retryable());
  CHECK(error.field() == "cache_bytes");
  const std::vector<int32_t> tokens = prompt_tokens(300);
  const SessionHandle empty = make_session(context.get());
  CHECK(dsv3_session_evaluate(empty.get(), tokens.data(), 300, nullptr, error.out()) ==
        DSV3_E_CAPACITY);
  CHECK(dsv3_session_length(empty.get()) == 0);

  // One request alone outgrows the whole cache: waiting would not help.
  dsv3_request_options options = request_options();
  options.ignore_eos = 1;
  options.max_tokens = 100;
  SessionHandle holder = session_with(250, context.get());
  const Outcome outcome = generate(holder.get(), options);
  CHECK(outcome.reason == DSV3_FINISH_ERROR);
  CHECK(outcome.status == DSV3_E_CAPACITY);
  CHECK(outcome.error_field == "cache_bytes");
  CHECK_FALSE(outcome.error_retryable);
  CHECK(outcome.tokens.size() == 7);  // up to the last page's end, and the one that needs a fifth
  CHECK(dsv3_session_length(holder.get()) == 257);

  // What idle sessions and completions hold gives way; they stay valid.
  const SessionHandle other = session_with(40, context.get());
  const Outcome rest = generate(other.get(), options);
  CHECK(rest.tokens.size() == 100);
  REQUIRE(dsv3_context_get_info(context.get(), &info, nullptr) == DSV3_OK);
  CHECK(info.pages_used == 3);  // 139 computed tokens
  CHECK(dsv3_session_computed(holder.get()) == 0);
  CHECK(dsv3_session_length(holder.get()) == 257);
  REQUIRE(dsv3_session_truncate(holder.get(), 250, nullptr) == DSV3_OK);
  options.max_tokens = 6;
  CHECK(generate(holder.get(), options).tokens ==
        std::vector<int32_t>(outcome.tokens.begin(), outcome.tokens.end() - 1));
  char* text = nullptr;
  const std::string prefix = python_text().substr(0, 400);
  REQUIRE(dsv3_complete(context.get(), prefix.data(), prefix.size(), nullptr, 0, &options, &text,
                        nullptr, error.out()) == DSV3_OK);
  dsv3_string_free(text);
  const SessionHandle next = session_with(60, context.get());
  options.max_tokens = 190;
  CHECK(generate(next.get(), options).tokens.size() == 190);
}

TEST_CASE("of idle sessions the one that was used longest ago gives way") {
  dsv3_context_info info;
  info.struct_size = sizeof info;
  REQUIRE(dsv3_context_get_info(shared().context.get(), &info, nullptr) == DSV3_OK);
  const ContextHandle context =
      make_context(shared().model.get(), {.cache_bytes = 6 * info.page_bytes, .prefix_cache = 0});
  dsv3_request_options options = request_options();
  options.max_tokens = 1;
  const SessionHandle one = session_with(100, context.get()),
                      two = session_with(100, context.get());
  for (const SessionHandle* used : {&one, &two, &one}) generate(used->get(), options);
  const SessionHandle next = session_with(200, context.get());  // four pages of two that are free
  generate(next.get(), options);
  CHECK(dsv3_session_computed(one.get()) >= 100);
  CHECK(dsv3_session_computed(two.get()) == 0);
}

TEST_CASE("statistics add up") {
  const SessionHandle session = session_with(500);
  dsv3_request_options options = request_options();
  options.max_tokens = 20;
  options.ignore_eos = 1;
  const RequestHandle request = start(session.get(), options);
  const Outcome outcome = finish(request.get());
  dsv3_request_statistics s;
  s.struct_size = sizeof s;
  REQUIRE(dsv3_request_get_statistics(request.get(), &s, nullptr) == DSV3_OK);
  CHECK(s.total_ns == outcome.statistics.total_ns);
  CHECK(s.prompt_tokens == 500);
  CHECK(s.generated_tokens == 20);
  CHECK(s.first_token_ns >= s.queue_ns + s.prefill_ns);
  CHECK(s.total_ns >= s.first_token_ns + s.decode_ns);
  CHECK(s.prefill_ns > 0);
  CHECK(s.decode_ns > 0);
}

TEST_CASE("a mapped file that changes ends requests; a copied one may go") {
  const std::string path = scratch_folder().file("changing.dsv3");
  write_bytes(path, read_bytes(tiny_coder()));
  dsv3_model_options model_options;
  dsv3_model_options_init(&model_options, sizeof model_options);
  for (const int32_t residency : {DSV3_RESIDENCY_COPY, DSV3_RESIDENCY_MAP}) {
    model_options.residency = residency;
    dsv3_model* raw = nullptr;
    Error error;
    REQUIRE(dsv3_model_open(path.c_str(), &model_options, &raw, error.out()) == DSV3_OK);
    const ModelHandle model(raw);
    const ContextHandle context = make_context(model.get());
    const SessionHandle session = session_with(30, context.get());
    dsv3_request_options options = request_options();
    options.max_tokens = 4;
    options.ignore_eos = 1;
    CHECK(generate(session.get(), options).tokens.size() == 4);
    // The same size and contents: only the times tell.
    write_bytes(path, read_bytes(tiny_coder()));
    const Outcome outcome = generate(session.get(), options);
    if (residency == DSV3_RESIDENCY_COPY) {
      CHECK(outcome.tokens.size() == 4);
      continue;
    }
    CHECK(outcome.reason == DSV3_FINISH_ERROR);
    CHECK(outcome.status == DSV3_E_FILE_CHANGED);
    CHECK(outcome.error_message.find("changing.dsv3") != std::string::npos);
    CHECK(dsv3_session_length(session.get()) == 34);
  }
}

TEST_CASE("a model without a tokenizer generates ids, and refuses text by name") {
  const std::string path = scratch_folder().file("micro.dsv3");
  Error error;
  REQUIRE(dsv3_convert(source_path("tests/data/models/v3-micro").c_str(), path.c_str(), nullptr,
                       error.out()) == DSV3_OK);
  const ModelHandle model = open_model(path);
  const ContextHandle context = make_context(model.get());
  const SessionHandle session = make_session(context.get());
  append(session.get(), {1, 2, 3, 4, 5});
  dsv3_request_options options = request_options();
  options.max_tokens = 5;
  options.ignore_eos = 1;
  const Outcome outcome = generate(session.get(), options);
  CHECK(outcome.tokens.size() == 5);
  CHECK(outcome.text.empty());
  CHECK(dsv3_session_append_text(session.get(), "a", 1, 0, nullptr, nullptr, error.out()) ==
        DSV3_E_UNSUPPORTED);
  CHECK(error.message().find("micro.dsv3") != std::string::npos);
  const char* const stops[] = {"x"};
  options.stop_strings = stops;
  options.stop_string_count = 1;
  dsv3_request* request = nullptr;
  CHECK(dsv3_request_start(session.get(), &options, &request, error.out()) == DSV3_E_UNSUPPORTED);
  CHECK(error.field() == "stop_strings");
}

TEST_CASE("reasoning is reported apart") {
  const SessionHandle session = session_with(30);
  dsv3_request_options options = request_options();
  options.max_tokens = 12;
  options.ignore_eos = 1;
  const Outcome answer = generate(fork_session(session.get()).get(), options);
  options.reasoning = 1;
  const Outcome reasoning = generate(session.get(), options);
  CHECK(answer.reasoning.empty());
  CHECK(reasoning.text.empty());
  CHECK(reasoning.reasoning == answer.text);
  CHECK(reasoning.tokens == answer.tokens);
}

TEST_CASE("inside reasoning a token without text is reasoning too") {
  struct Forcer {
    std::vector<int32_t> script;
    size_t next = 0;
  } forcer{tokenize(shared().model.get(), "\xf0\x9f\x99\x82"), 0};
  REQUIRE(forcer.script.size() > 1);  // each a part of the character
  dsv3_request_options options = request_options();
  options.max_tokens = forcer.script.size();
  options.reasoning = 1;
  options.speculation = DSV3_SPECULATION_OFF;
  options.logits_hook_user = &forcer;
  options.logits_hook = [](void* user, float* logits, uint64_t, const int32_t*, uint64_t) {
    auto* f = static_cast<Forcer*>(user);
    logits[f->script[f->next++]] = 1e9F;
  };
  const SessionHandle session = session_with(30);
  const RequestHandle request = start(session.get(), options);
  size_t tokens = 0;
  for (dsv3_event event = next_event(request.get()); event.kind != DSV3_EVENT_FINISHED;
       event = next_event(request.get())) {
    if (event.token_count == 0) continue;
    CHECK(event.kind == DSV3_EVENT_REASONING);
    CHECK((event.text_length == 0) == (++tokens < forcer.script.size()));
  }
  CHECK(tokens == forcer.script.size());
}

TEST_CASE("logs go to the context's sink") {
  std::vector<std::string> lines;
  dsv3_context_options options;
  dsv3_context_options_init(&options, sizeof options);
  options.threads = 1;
  options.log_user = &lines;
  options.log = [](void* user, int32_t level, const char* message) {
    if (level == DSV3_LOG_INFO) static_cast<std::vector<std::string>*>(user)->emplace_back(message);
  };
  dsv3_context* context = nullptr;
  REQUIRE(dsv3_context_create(shared().model.get(), &options, &context, nullptr) == DSV3_OK);
  dsv3_context_free(context);
  REQUIRE(lines.size() == 1);
  CHECK(lines[0].find("kernels") != std::string::npos);
}
