// What a context tells about itself: counters, the same as JSON, a trace.
#include <doctest/doctest.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <thread>

#include "tests/api/request_support.h"

using namespace dsv3::test;            // NOLINT
using namespace dsv3::test::requests;  // NOLINT

namespace {

dsv3_context_statistics statistics_of(dsv3_context* context) {
  dsv3_context_statistics s;
  s.struct_size = sizeof s;
  REQUIRE(dsv3_context_get_statistics(context, &s, nullptr) == DSV3_OK);
  return s;
}

nlohmann::json json_of(dsv3_context* context) {
  char* text = nullptr;
  REQUIRE(dsv3_context_get_statistics_json(context, &text, nullptr) == DSV3_OK);
  const nlohmann::json json = nlohmann::json::parse(text);
  dsv3_string_free(text);
  return json;
}

dsv3_request_options plain(uint64_t max_tokens) {
  dsv3_request_options options = request_options();
  options.max_tokens = max_tokens;
  options.ignore_eos = 1;
  options.speculation = DSV3_SPECULATION_OFF;
  return options;
}

}  // namespace

TEST_CASE("who ends while waiting has waited all the time") {
  // Now and then the second one has its turn before it is cancelled.
  bool waited = false;
  for (int attempt = 0; !waited && attempt < 50; ++attempt) {
    const ContextHandle context = make_context(shared().model.get(), {.prefix_cache = 0});
    const SessionHandle busy = session_with(1900, context.get());
    const SessionHandle idle = session_with(10, context.get());
    dsv3_request_options options = plain(1);
    const RequestHandle first = start(busy.get(), options);
    options.priority = DSV3_PRIORITY_IDLE;
    const RequestHandle second = start(idle.get(), options);
    dsv3_request_cancel(second.get());
    const dsv3_request_statistics s = finish(second.get()).statistics;
    waited = s.queue_ns == s.total_ns;
    const uint64_t served = finish(first.get()).statistics.queue_ns;
    CHECK(statistics_of(context.get()).queue_ns == served + s.queue_ns);
  }
  CHECK(waited);
}

TEST_CASE("who gave way is counted by kind") {
  dsv3_context_info info;
  info.struct_size = sizeof info;
  REQUIRE(dsv3_context_get_info(shared().context.get(), &info, nullptr) == DSV3_OK);
  const ContextHandle context =
      make_context(shared().model.get(), {.cache_bytes = 6 * info.page_bytes});
  const auto computed = [&](size_t count, int32_t first) {
    std::vector<int32_t> tokens = prompt_tokens(count);
    tokens[0] = first;
    SessionHandle session = make_session(context.get());
    append(session.get(), tokens);
    generate(session.get(), plain(0));
    return session;
  };
  computed(140, 5).reset();  // leaves two pages in the prefix cache
  const SessionHandle four = computed(250, 6);
  dsv3_context_statistics s = statistics_of(context.get());
  CHECK(s.pages_used == 4);
  CHECK(s.pages_cached == 2);
  CHECK(s.evictions == 0);
  const SessionHandle three = computed(150, 7);  // the kept ones, then four's
  s = statistics_of(context.get());
  CHECK(s.evictions == 2);
  CHECK(s.sessions_dropped == 1);
  CHECK(s.preemptions == 0);
  CHECK(s.refusals == 0);
  CHECK(s.pages_used == 3);
  CHECK(s.pages_cached == 3);
  CHECK(s.pages_high_water == 4);
  const nlohmann::json json = json_of(context.get());
  CHECK(json["evictions"] == 2);
  CHECK(json["sessions_dropped"] == 1);
  CHECK(json["pages_cached"] == 3);
}

TEST_CASE("waiting for the engine is told apart from computing") {
  const ContextHandle context = make_context(shared().model.get(), {.prefix_cache = 0});
  Gate gate;
  dsv3_request_options options = plain(1);
  options.logits_hook = Gate::hook;
  options.logits_hook_user = &gate;
  const SessionHandle one = session_with(10, context.get()), two = session_with(10, context.get());
  const RequestHandle first = start(one.get(), options);
  while (!gate.inside) std::this_thread::yield();
  const RequestHandle second = start(two.get(), plain(2));
  dsv3_context_info info;
  info.struct_size = sizeof info;
  REQUIRE(dsv3_context_get_info(context.get(), &info, nullptr) == DSV3_OK);
  CHECK(info.requests_running == 1);
  CHECK(info.requests_waiting == 1);
  std::this_thread::sleep_for(std::chrono::milliseconds(50));
  gate.open = true;
  finish(first.get());
  const dsv3_request_statistics s = finish(second.get()).statistics;
  CHECK(s.queue_ns >= 50'000'000);
  CHECK(s.prefill_ns > 0);
  CHECK(s.first_token_ns >= s.queue_ns + s.prefill_ns);
  CHECK(s.total_ns >= s.first_token_ns + s.decode_ns);
}

TEST_CASE("a context's counters are the sums of what its requests report") {
  const ContextHandle context = make_context(shared().model.get(), {.prefill_chunk = 64});
  const dsv3_context_statistics none = statistics_of(context.get());
  CHECK(none.steps == 0);
  CHECK(none.pages > 0);
  const SessionHandle one = session_with(200, context.get()),
                      two = session_with(200, context.get());
  const Outcome a = generate(one.get(), plain(30)), b = generate(two.get(), plain(10));
  CHECK(a.statistics.pages == 4);  // 229 computed tokens
  CHECK(a.statistics.preemptions == 0);
  const dsv3_context_statistics s = statistics_of(context.get());
  CHECK(s.requests_finished == 2);
  CHECK(s.prompt_tokens == 400);
  CHECK(s.generated_tokens == 40);
  CHECK(s.cached_tokens == a.statistics.cached_tokens + b.statistics.cached_tokens);
  CHECK(b.statistics.cached_tokens == 192);
  CHECK(s.prefix_hits == 3);
  CHECK(s.steps == 4 + 29 + 1 + 9);
  CHECK(s.rows == 200 + 29 + 8 + 9);
  CHECK(s.steps_abandoned == 0);
  CHECK(s.step_ns > 0);
  CHECK(s.queue_ns == a.statistics.queue_ns + b.statistics.queue_ns);
  CHECK(s.prefill_ns == a.statistics.prefill_ns + b.statistics.prefill_ns);
  CHECK(s.decode_ns == a.statistics.decode_ns + b.statistics.decode_ns);
  CHECK(s.decode_ns > 0);
  CHECK(s.pages_used == 5);  // three are shared
  CHECK(s.pages_high_water == 5);
  CHECK(s.pages_cached == 0);

  const nlohmann::json json = json_of(context.get());
  CHECK(json["rows"] == s.rows);
  CHECK(json["refusals"] == 0);
  CHECK(json["decode_ns"] == s.decode_ns);
  const auto& load = json["expert_load"];
  REQUIRE(load.size() == 7);  // six layers and an MTP module
  for (size_t layer = 0; layer < load.size(); ++layer) {
    REQUIRE(load[layer].size() == 16);
    uint64_t sum = 0;
    for (const auto& n : load[layer]) sum += n.get<uint64_t>();
    // The first layer is dense; every row chooses four experts in the others.
    CHECK(sum == (layer == 0 || layer == 6 ? 0 : 4 * s.rows));
  }

  // The same without JSON.
  Error error;
  uint64_t needed = 0, experts = 0;
  REQUIRE(dsv3_context_get_expert_load(context.get(), nullptr, 0, &needed, &experts, error.out()) ==
          DSV3_OK);
  REQUIRE(needed == 7 * 16);
  CHECK(experts == 16);
  std::vector<uint64_t> counts(needed + 1, 99);
  needed = experts = 0;
  CHECK(dsv3_context_get_expert_load(context.get(), counts.data(), 7 * 16 - 1, &needed, &experts,
                                     error.out()) == DSV3_E_BUFFER_TOO_SMALL);
  CHECK(error.field() == "capacity");
  CHECK(needed == 7 * 16);
  CHECK(experts == 16);
  CHECK(counts == std::vector<uint64_t>(7 * 16 + 1, 99));
  REQUIRE(dsv3_context_get_expert_load(context.get(), counts.data(), 7 * 16, nullptr, nullptr,
                                       error.out()) == DSV3_OK);
  CHECK(counts.back() == 99);
  for (size_t i = 0; i < 7 * 16; ++i) CHECK(load[i / 16][i % 16] == counts[i]);
}

TEST_CASE("the high-water mark counts pages that a draft of the MTP module takes first") {
  const ContextHandle context = make_context(shared().model.get());
  const SessionHandle session = session_with(63, context.get());
  dsv3_request_options options = plain(50);
  options.speculation = DSV3_SPECULATION_ALWAYS;
  options.drafters = DSV3_DRAFT_MTP;
  CHECK(generate(session.get(), options).statistics.drafted_tokens > 0);
  const dsv3_context_statistics s = statistics_of(context.get());
  CHECK(s.pages_used == 2);
  CHECK(s.pages_high_water == 2);
}

TEST_CASE("a request's statistics as JSON") {
  const SessionHandle session = session_with(100);
  const RequestHandle request = start(session.get(), plain(20));
  finish(request.get());
  dsv3_request_statistics s;
  s.struct_size = sizeof s;
  REQUIRE(dsv3_request_get_statistics(request.get(), &s, nullptr) == DSV3_OK);
  char* text = nullptr;
  REQUIRE(dsv3_request_get_statistics_json(request.get(), &text, nullptr) == DSV3_OK);
  const nlohmann::json json = nlohmann::json::parse(text);
  dsv3_string_free(text);
  CHECK(json == nlohmann::json{{"prompt_tokens", 100},
                               {"cached_tokens", s.cached_tokens},
                               {"generated_tokens", 20},
                               {"drafted_tokens", 0},
                               {"accepted_tokens", 0},
                               {"queue_ns", s.queue_ns},
                               {"prefill_ns", s.prefill_ns},
                               {"decode_ns", s.decode_ns},
                               {"first_token_ns", s.first_token_ns},
                               {"total_ns", s.total_ns},
                               {"decode_steps", s.decode_steps},
                               {"speculation_saved_ns", s.speculation_saved_ns},
                               {"pages", 2},
                               {"preemptions", 0}});
  CHECK(s.decode_ns > 0);
}

TEST_CASE("a trace holds the steps and the requests") {
  const ContextHandle context = make_context(shared().model.get());
  const std::string path = scratch_folder().file("trace.json");
  Error error;
  CHECK(dsv3_context_trace_stop(context.get(), error.out()) == DSV3_E_NOT_FOUND);
  for (const uint64_t max_bytes : {uint64_t{1} << 20, uint64_t{2000}}) {
    REQUIRE(dsv3_context_trace_start(context.get(), path.c_str(), max_bytes, error.out()) ==
            DSV3_OK);
    CHECK(dsv3_context_trace_start(context.get(), path.c_str(), 1000, error.out()) == DSV3_E_BUSY);
    const dsv3_context_statistics before = statistics_of(context.get());
    const SessionHandle session = session_with(100, context.get());
    generate(session.get(), plain(20));
    REQUIRE(dsv3_context_trace_stop(context.get(), error.out()) == DSV3_OK);
    const uint64_t steps = statistics_of(context.get()).steps - before.steps;
    const std::string text = read_bytes(path);
    CHECK(text.size() <= max_bytes);
    const nlohmann::json trace = nlohmann::json::parse(text);
    uint64_t seen = 0, requests = 0;
    for (const auto& event : trace["traceEvents"]) {
      seen += event["name"] == "step" ? 1 : 0;
      requests += event["name"] == "interactive" ? 1 : 0;
    }
    const uint64_t left_out = trace["otherData"]["left_out"];
    CHECK(seen + requests + left_out == steps + 1);
    CHECK((left_out == 0) == (max_bytes > 2000));
  }
  // A context that is freed ends its trace.
  const std::string last = scratch_folder().file("last.json");
  {
    const ContextHandle freed = make_context(shared().model.get());
    REQUIRE(dsv3_context_trace_start(freed.get(), last.c_str(), 1 << 20, error.out()) == DSV3_OK);
  }
  CHECK(nlohmann::json::parse(read_bytes(last)).contains("traceEvents"));
  // Also where that cannot be waited for: inside a callback.
  const std::string deferred = scratch_folder().file("deferred.json");
  {
    dsv3_context* freed = make_context(shared().model.get()).release();
    REQUIRE(dsv3_context_trace_start(freed, deferred.c_str(), 1 << 20, error.out()) == DSV3_OK);
    const SessionHandle session = session_with(10, freed);
    dsv3_request_options options = plain(3);
    options.notify = [](void* user) {
      dsv3_context_free(std::exchange(*static_cast<dsv3_context**>(user), nullptr));
    };
    options.notify_user = &freed;
    finish(start(session.get(), options).get());
  }
  for (int i = 0; i < 5000 && !std::filesystem::exists(deferred); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  CHECK(nlohmann::json::parse(read_bytes(deferred)).contains("traceEvents"));
  CHECK(dsv3_context_trace_start(context.get(), "/nonexistent/trace", 1000, error.out()) ==
        DSV3_E_NOT_FOUND);
}

namespace {

struct Writer {
  std::string text;
  int calls = 0;
  bool fails = false;
  static dsv3_status write(void* user, const void* bytes, uint64_t size) {
    auto* self = static_cast<Writer*>(user);
    ++self->calls;
    if (self->fails) return DSV3_E_IO;
    self->text.append(static_cast<const char*>(bytes), size);
    return DSV3_OK;
  }
};

}  // namespace

TEST_CASE("a trace can go to a function, piece by piece") {
  const ContextHandle context = make_context(shared().model.get());
  Writer writer;
  Error error;
  CHECK(dsv3_context_trace_start_writer(context.get(), nullptr, nullptr, 1 << 20, error.out()) ==
        DSV3_E_INVALID_ARGUMENT);
  CHECK(error.field() == "write");
  REQUIRE(dsv3_context_trace_start_writer(context.get(), Writer::write, &writer, 1 << 20,
                                          error.out()) == DSV3_OK);
  CHECK(dsv3_context_trace_start_writer(context.get(), Writer::write, &writer, 1 << 20,
                                        error.out()) == DSV3_E_BUSY);
  const SessionHandle session = session_with(100, context.get());
  generate(session.get(), plain(900));
  CHECK(writer.calls > 0);  // not all of it at the end
  REQUIRE(dsv3_context_trace_stop(context.get(), error.out()) == DSV3_OK);
  const nlohmann::json trace = nlohmann::json::parse(writer.text);
  uint64_t steps = 0;
  for (const auto& event : trace["traceEvents"]) steps += event["name"] == "step" ? 1 : 0;
  CHECK(steps == statistics_of(context.get()).steps);
}

TEST_CASE("a trace is whole whatever max_bytes cuts off") {
  const ContextHandle context = make_context(shared().model.get());
  for (uint64_t max_bytes = 512; max_bytes < 1100; max_bytes += 41) {
    CAPTURE(max_bytes);
    Writer writer;
    REQUIRE(dsv3_context_trace_start_writer(context.get(), Writer::write, &writer, max_bytes,
                                            nullptr) == DSV3_OK);
    generate(session_with(10, context.get()).get(), plain(8));
    REQUIRE(dsv3_context_trace_stop(context.get(), nullptr) == DSV3_OK);
    CHECK(writer.text.size() <= max_bytes);
    CHECK(nlohmann::json::parse(writer.text)["otherData"]["left_out"] > 0);
  }
}

TEST_CASE("a trace's writer that fails is told once, and the engine goes on") {
  static std::atomic<int> warnings{0};
  warnings = 0;
  dsv3_context_options options;
  dsv3_context_options_init(&options, sizeof options);
  options.threads = 1;
  options.log = [](void*, int32_t level, const char* message) {
    if (level <= DSV3_LOG_WARNING && std::string(message).find("write") != std::string::npos) {
      ++warnings;
    }
  };
  Error error;
  dsv3_context* raw = nullptr;
  REQUIRE(dsv3_context_create(shared().model.get(), &options, &raw, error.out()) == DSV3_OK);
  const ContextHandle context(raw);
  Writer writer;
  writer.fails = true;
  REQUIRE(dsv3_context_trace_start_writer(raw, Writer::write, &writer, 64 << 20, error.out()) ==
          DSV3_OK);
  const SessionHandle session = session_with(20, raw);
  CHECK(generate(session.get(), plain(1800)).tokens.size() == 1800);
  CHECK(writer.calls == 1);
  CHECK(warnings == 1);
  CHECK(dsv3_context_trace_stop(raw, error.out()) == DSV3_E_IO);
  CHECK(writer.calls == 1);
  CHECK(dsv3_context_trace_stop(raw, error.out()) == DSV3_E_NOT_FOUND);
}

TEST_CASE("statistics do not wait for the step in flight") {
  const ContextHandle context = make_context(shared().model.get());
  Gate gate;
  dsv3_request_options options = plain(1);
  options.logits_hook = Gate::hook;
  options.logits_hook_user = &gate;
  const SessionHandle session = session_with(50, context.get());
  const RequestHandle request = start(session.get(), options);
  while (!gate.inside) std::this_thread::yield();
  CHECK(json_of(context.get())["expert_load"].size() == 7);
  statistics_of(context.get());
  gate.open = true;
  finish(request.get());
  CHECK_FALSE(gate.gave_up);
}
