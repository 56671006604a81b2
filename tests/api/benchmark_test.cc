// dsv3_benchmark: what its JSON holds, that its parts add up, and what it refuses. How fast
// anything is cannot fail here.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <thread>

#include "tests/api/api_support.h"

using namespace dsv3::test;  // NOLINT
using Json = nlohmann::json;

namespace {

dsv3_benchmark_options quick_options(const dsv3_context_options* context) {
  dsv3_benchmark_options o;
  dsv3_benchmark_options_init(&o, sizeof o);
  o.shape = "tiny";
  o.layers = 2;
  o.quick = 1;
  o.repeats = 1;
  o.context = context;
  return o;
}

dsv3_context_options two_threads() {
  dsv3_context_options context;
  dsv3_context_options_init(&context, sizeof context);
  context.threads = 2;
  return context;
}

Json run(const dsv3_benchmark_options& o) {
  Error e;
  char* text = nullptr;
  REQUIRE_MESSAGE(dsv3_benchmark(&o, &text, e.out()) == DSV3_OK, e.message());
  const Json result = Json::parse(text);
  dsv3_string_free(text);
  return result;
}

TEST_CASE("every line with what it read, multiplied and took") {
  const dsv3_context_options context = two_threads();
  const Json result = run(quick_options(&context));
  CHECK(result["machine"]["threads"] == 2);
  for (const char* limit : {"read_bytes_per_second", "dot_flops_per_second"}) {
    CHECK(result["machine"][limit].get<double>() > 1e8);
  }
  CHECK(result["model"]["num_hidden_layers"] == 2);
  std::vector<std::string> names;
  for (const Json& line : result["lines"]) {
    names.push_back(line["name"]);
    CAPTURE(line.dump());
    CHECK(line["threads"] == 2);
    CHECK(line["seconds"].get<double>() > 0);
    CHECK(line["fastest_seconds"].get<double>() <= line["slowest_seconds"].get<double>());
    CHECK(line["bytes"].get<double>() > 0);
    CHECK(line["weight_flops"].get<double>() > 0);
    CHECK(line["percent_of_limit"].get<double>() > 0);
    // The larger of two sums is no larger than the sum of what is larger.
    CHECK(line["percent_by_operation"].get<double>() >=
          line["percent_of_limit"].get<double>() * (1 - 1e-9));
    CHECK(!line.contains("profile"));
  }
  CHECK(names == std::vector<std::string>{"first token", "decode", "decode", "decode", "prefill"});
  CHECK(!result.contains("scaling"));
  // Four rows choose at least the experts of one, and at most four times as many.
  const Json &one = result["lines"][1], &four = result["lines"][2];
  CHECK(one["batch"] == 1);
  CHECK(four["batch"] == 4);
  CHECK(four["weight_flops"] == 4 * one["weight_flops"].get<double>());
  CHECK(four["bytes"].get<double>() >= one["bytes"].get<double>());
  CHECK(four["bytes"].get<double>() <= 4 * one["bytes"].get<double>());
}

TEST_CASE("a profile's operations add up to no more than its repeat") {
  const dsv3_context_options context = two_threads();
  dsv3_benchmark_options o = quick_options(&context);
  o.profile = 1;
  const Json result = run(o);
  for (const Json& line : result["lines"]) {
    if (line["name"] == "first token") continue;
    CAPTURE(line.dump());
    REQUIRE(line.contains("profile"));
    const double whole = line["profile_seconds"];
    double seconds = 0, share = 0, flops = 0;
    std::set<std::string> names;
    for (const Json& p : line["profile"]) {
      CHECK(names.insert(p["name"].get<std::string>()).second);
      CHECK(p["calls"].get<int64_t>() > 0);
      seconds += p["seconds"].get<double>();
      share += p["share"].get<double>();
      flops += p["flops"].get<double>();
    }
    CHECK(seconds > 0);
    CHECK(seconds <= whole);
    CHECK(share <= 1.0 + 1e-9);
    // The same multiply-adds as the line counts, from the other side.
    const double counted =
        line["weight_flops"].get<double>() + line["attention_flops"].get<double>();
    CHECK(flops > 0.9 * counted);
    CHECK(flops < 1.1 * counted);
  }
}

TEST_CASE("scaling: one thread's lines beside all threads'") {
  const dsv3_context_options context = two_threads();
  dsv3_benchmark_options o = quick_options(&context);
  o.scaling = 1;
  const Json result = run(o);
  int single = 0;
  for (const Json& line : result["lines"]) single += line["threads"] == 1 ? 1 : 0;
  CHECK(single == 2);
  CHECK(result["scaling"]["threads"] == 2);
  for (const char* name : {"read_bytes_per_second", "dot_flops_per_second", "decode", "prefill"}) {
    CAPTURE(name);
    CHECK(result["scaling"][name].get<double>() > 0);
  }
}

TEST_CASE("invariance: prompts without bit-identical results beside those with") {
  const dsv3_context_options context = two_threads();
  dsv3_benchmark_options o = quick_options(&context);
  o.invariance = 1;
  o.scaling = 1;
  const Json result = run(o);
  std::vector<Json> prefill;
  for (const Json& line : result["lines"]) {
    if (line["name"] == "prefill") prefill.push_back(line);
  }
  REQUIRE(prefill.size() == 3);
  CHECK(!prefill[0].contains("prompt_attention"));
  CHECK(prefill[1]["prompt_attention"] == "expanded");
  CHECK(prefill[1]["times_as_fast"].get<double>() > 0);
  CHECK(prefill[2]["threads"] == 1);
  // Threads against one: of the line that is as it is by default.
  CHECK(result["scaling"]["prefill"].get<double>() ==
        doctest::Approx(prefill[2]["seconds"].get<double>() / prefill[0]["seconds"].get<double>()));
}

TEST_CASE("operations of four-bit weights stand beside what multiplies them") {
  // Every set multiplies them as INT8.
  const dsv3_context_options context = two_threads();
  dsv3_benchmark_options o = quick_options(&context);
  o.ffn = DSV3_WEIGHTS_MXFP4;
  const Json result = run(o);
  const Json& machine = result["machine"];
  const Json& prefill = result["lines"].back();
  REQUIRE(prefill["name"] == "prefill");
  REQUIRE(prefill["limit"] == "compute");
  const double flops =
      prefill["weight_flops"].get<double>() + prefill["attention_flops"].get<double>();
  const double all_dot = flops / prefill["limit_dot_flops_per_second"].get<double>();
  const double gain =
      machine["int8_ops_per_second"].get<double>() / machine["dot_flops_per_second"].get<double>();
  const double limit = prefill["limit_seconds"];
  CAPTURE(prefill.dump());
  // Three fifths of the two layers' operations are of four-bit weights. How much those gain was
  // measured beside the limit: a busy machine changes both.
  const auto with_share = [&](double share) { return all_dot * (1 - share + share / gain); };
  CHECK(limit > 0.99 * std::min(with_share(0.5), with_share(0.7)));
  CHECK(limit < 1.01 * std::max(with_share(0.5), with_share(0.7)));
}

TEST_CASE("a path that is not UTF-8") {
  const TemporaryFolder folder;
  const std::string path = folder.file("\xff.dsv3");
  std::filesystem::copy_file(tiny_coder(), path);
  const dsv3_context_options context = two_threads();
  dsv3_benchmark_options o = quick_options(&context);
  o.shape = nullptr;
  o.layers = 0;
  o.model_path = path.c_str();
  o.only = "first token";
  const Json result = run(o);
  CHECK(result.dump().find("\uFFFD.dsv3") != std::string::npos);
}

TEST_CASE("refused, named, and nothing written") {
  const auto refused = [](const char* field, auto change) {
    dsv3_benchmark_options o = quick_options(nullptr);
    change(&o);
    Error e;
    char* text = nullptr;
    CAPTURE(field);
    CHECK(dsv3_benchmark(&o, &text, e.out()) == DSV3_E_INVALID_ARGUMENT);
    CHECK(e.field() == field);
    CHECK(e.message().find(field) != std::string::npos);
    CHECK(text == nullptr);
  };
  refused("repeats", [](auto* o) { o->repeats = 0; });
  refused("quick", [](auto* o) { o->quick = 2; });
  refused("profile", [](auto* o) { o->profile = -1; });
  refused("scaling", [](auto* o) { o->scaling = 7; });
  refused("invariance", [](auto* o) { o->invariance = 2; });
  refused("only", [](auto* o) { o->only = "batch 5"; });
  refused("only", [](auto* o) { o->only = "prefill 512"; });  // quick has none
  refused("shape", [](auto* o) { o->shape = "enormous"; });
  refused("shape", [](auto* o) { o->shape = nullptr; });
  refused("shape", [](auto* o) { o->model_path = "model.dsv3", o->layers = 0; });
  refused("layers", [](auto* o) { o->model_path = "model.dsv3", o->shape = nullptr; });
}

TEST_CASE("cancelled in the middle of a line") {
  const CancelHandle cancel = make_cancel();
  const dsv3_context_options context = two_threads();
  dsv3_benchmark_options o = quick_options(&context);
  o.layers = 0;
  o.repeats = 100;
  o.quick = 0;  // two seconds a line
  o.cancel = cancel.get();
  // When the first decoding line begins, a tenth of a second is left.
  struct Timer {
    dsv3_cancel* cancel;
    std::thread thread;
    std::chrono::steady_clock::time_point due;
  } timer{cancel.get(), {}, {}};
  o.progress_user = &timer;
  o.progress = [](void* user, uint64_t done, uint64_t) {
    auto* t = static_cast<Timer*>(user);
    if (done != 1) return;
    t->due = std::chrono::steady_clock::now() + std::chrono::milliseconds(100);
    t->thread = std::thread([t] {
      std::this_thread::sleep_until(t->due);
      dsv3_cancel_set(t->cancel);
    });
  };
  Error e;
  char* text = nullptr;
  CHECK(dsv3_benchmark(&o, &text, e.out()) == DSV3_E_CANCELLED);
  const auto late = std::chrono::steady_clock::now() - timer.due;
  REQUIRE(timer.thread.joinable());
  timer.thread.join();
  CHECK(e.message() == "the benchmark was cancelled");
  CHECK(text == nullptr);
  CHECK(late < std::chrono::milliseconds(1000));  // a line takes two seconds
}

TEST_CASE("cancelled between lines") {
  const CancelHandle cancel = make_cancel();
  dsv3_benchmark_options o = quick_options(nullptr);
  o.cancel = cancel.get();
  dsv3_cancel_set(cancel.get());
  Error e;
  char* text = nullptr;
  CHECK(dsv3_benchmark(&o, &text, e.out()) == DSV3_E_CANCELLED);
  CHECK(text == nullptr);
}

}  // namespace
