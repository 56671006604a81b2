// dsv3 serve-bench FILE: what people wait for while the engine is busy. First the clients alone,
// then the same clients beside background jobs.
#include <algorithm>
#include <memory>

#include "commands.h"
#include "common.h"
#include "load.h"
#include "options.h"

namespace cli {
namespace {

struct Options {
  ModelOptions model;
  ContextOptions context;
  LoadOptions load;
  bool json = false;
};

Json percentiles(const std::vector<double>& values) {
  return {{"count", values.size()},
          {"p50", percentile(values, 50)},
          {"p95", percentile(values, 95)},
          {"p99", percentile(values, 99)}};
}

Json to_json(const Load& load) {
  const double seconds = std::max(load.seconds, 1e-9);
  return {{"seconds", load.seconds},
          {"questions", load.questions},
          {"cancelled", load.cancelled},
          {"refused", load.refused},
          {"jobs", load.jobs},
          {"first_token_ms", percentiles(load.first_token_ms)},
          {"between_tokens_ms", percentiles(load.between_tokens_ms)},
          {"cancel_ms", percentiles(load.cancel_ms)},
          {"client_tokens_per_second", static_cast<double>(load.client_tokens) / seconds},
          {"background_tokens_per_second", static_cast<double>(load.background_tokens) / seconds},
          {"prompt_tokens", load.prompt_tokens},
          {"cached_tokens", load.cached_tokens},
          {"pages_high_water", load.pages_high_water},
          {"pages", load.pages}};
}

void print_phase(const char* title, const Json& j) {
  std::string out = format("%s (%.1f s)\n", title, j["seconds"].get<double>());
  const auto row = [&](const char* name, const char* key) {
    const Json& p = j[key];
    if (p["count"] == 0) return;
    out += format("  %-22s p50 %8.2f ms   p95 %8.2f ms   p99 %8.2f ms   (%s)\n", name,
                  p["p50"].get<double>(), p["p95"].get<double>(), p["p99"].get<double>(),
                  human_count(p["count"]).c_str());
  };
  row("first token", "first_token_ms");
  row("between tokens", "between_tokens_ms");
  row("cancel to its end", "cancel_ms");
  const double prompt = j["prompt_tokens"];
  out += format("  %-22s clients %s tokens/s, background %s tokens/s\n", "throughput",
                human_rate(j["client_tokens_per_second"]).c_str(),
                human_rate(j["background_tokens_per_second"]).c_str());
  out += format("  %-22s %.1f %% of %s prompt tokens\n", "cached",
                prompt > 0 ? 100 * j["cached_tokens"].get<double>() / prompt : 0.0,
                human_count(j["prompt_tokens"]).c_str());
  out += format("  %-22s at most %s of %s in use; %s requests refused and retried\n\n", "pages",
                human_count(j["pages_high_water"]).c_str(), human_count(j["pages"]).c_str(),
                human_count(j["refused"]).c_str());
  write_out(out);
}

void check(const Options& o, const dsv3_model_info& info) {
  const LoadOptions& l = o.load;
  const int64_t longest = std::max<int64_t>(
      int64_t{l.prefix_tokens} + l.tail_tokens + l.answer_tokens, 2 * int64_t{l.job_tokens});
  if (longest <= info.max_position_embeddings) return;
  throw Misuse(format(
      "serve-bench: sequences of %lld tokens are more than the model's %lld positions: "
      "give a smaller --prefix or --job",
      static_cast<long long>(longest), static_cast<long long>(info.max_position_embeddings)));
}

void print_human(const Json& result) {
  if (result.contains("idle")) print_phase("clients alone", result["idle"]);
  if (!result.contains("loaded")) return;
  print_phase("beside background jobs", result["loaded"]);
  if (!result.contains("idle")) return;
  const double before = result["idle"]["first_token_ms"]["p95"];
  const double beside = result["loaded"]["first_token_ms"]["p95"];
  if (before > 0) {
    write_out(format("first token's p95 beside background jobs: %.2f times the idle one\n",
                     beside / before));
  }
}

void run(Options& o, Main& main) {
  main.json = o.json;
  Interrupt interrupt;
  const Model model = o.model.open(interrupt);
  const dsv3_model_info info = model_info(model.get());
  check(o, info);
  const Context context = o.context.create(model.get());
  LoadOptions alone = o.load;
  alone.background = 0;
  alone.seconds = o.load.background > 0 ? o.load.seconds / 2 : o.load.seconds;
  Json result = {{"clients", o.load.clients}, {"background", o.load.background}};
  if (o.load.clients > 0) result["idle"] = to_json(run_load(context.get(), info, alone, interrupt));
  if (o.load.background > 0 && !interrupt.is_set()) {
    LoadOptions beside = o.load;
    beside.first_stream = static_cast<uint64_t>(alone.clients);  // what was asked before is cached
    result["loaded"] = to_json(run_load(context.get(), info, beside, interrupt));
  }
  if (o.json) {
    write_json(result);
  } else {
    print_human(result);
  }
  o.context.end_trace(context.get());
}

}  // namespace

void add_serve_bench(CLI::App& app, Main& main) {
  CLI::App* command = app.add_subcommand(
      "serve-bench", "Latencies of interactive clients, alone and beside background jobs");
  auto o = std::make_shared<Options>();
  o->model.add_to(*command);
  LoadOptions& l = o->load;
  const auto at_least = [](auto low) { return in_range(low, decltype(low)(1'000'000)); };
  command->add_option("--clients", l.clients, "interactive clients")
      ->check(in_range(0, 256))
      ->capture_default_str();
  command->add_option("--background", l.background, "background jobs")
      ->check(in_range(0, 256))
      ->capture_default_str();
  command->add_option("--seconds", l.seconds, "length of the loaded phase; the idle one takes half")
      ->check(at_least(0.1))
      ->capture_default_str();
  command->add_option("--think", l.think_ms, "milliseconds between answer and question, on average")
      ->check(at_least(0.0))
      ->capture_default_str();
  command->add_option("--prefix", l.prefix_tokens, "tokens that all questions begin with")
      ->check(at_least(0))
      ->capture_default_str();
  command->add_option("--tail", l.tail_tokens, "tokens that each question adds")
      ->check(at_least(1))
      ->capture_default_str();
  command->add_option("--answer", l.answer_tokens, "tokens of an answer")
      ->check(at_least(1))
      ->capture_default_str();
  command->add_option("--cancel", l.cancel_percent, "percent of questions that are cancelled")
      ->check(in_range(0, 100))
      ->capture_default_str();
  command
      ->add_option("--job", l.job_tokens, "tokens of a background job's prompt, and of its answer")
      ->check(at_least(1))
      ->capture_default_str();
  command->add_option("--seed", l.seed, "of prompts and pauses")
      ->check(in_range(uint64_t{0}, UINT64_MAX))
      ->capture_default_str();
  command->add_flag("--json", o->json, "print one JSON object");
  o->context.add_to(*command);
  command->callback([o, &main] { run(*o, main); });
}

}  // namespace cli
