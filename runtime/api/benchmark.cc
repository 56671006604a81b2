#include "runtime/engine/benchmark.h"

#include <limits>

#include "runtime/api/handles.h"
#include "runtime/base/json.h"
#include "runtime/engine/benchmark_plan.h"
#include "runtime/model/convert.h"
#include "runtime/model/synthetic.h"

using namespace dsv3;       // NOLINT: the C boundary translates between the two
using namespace dsv3::api;  // NOLINT

namespace {

constexpr dsv3_benchmark_options kBenchmarkDefaults = {
    .struct_size = sizeof(dsv3_benchmark_options),
    .repeats = 5,
    .model_path = nullptr,
    .shape = nullptr,
    .layers = 0,
    .ffn = DSV3_WEIGHTS_KEEP,
    .experts = DSV3_WEIGHTS_KEEP,
    .head = DSV3_WEIGHTS_KEEP,
    .quick = 0,
    .profile = 0,
    .scaling = 0,
    .context = nullptr,
    .progress = nullptr,
    .progress_user = nullptr,
    .cancel = nullptr,
    .invariance = 0,
    .reserved = 0,
    .only = nullptr};

// The types of a synthetic model's weights, of the same fields as a conversion's.
Status read_types(const dsv3_benchmark_options& o, SyntheticOptions* out) {
  WeightModes modes;
  DSV3_TRY(read_weights_mode(o.ffn, "ffn", true, &modes.ffn));
  DSV3_TRY(read_weights_mode(o.experts, "experts", true, &modes.experts));
  DSV3_TRY(read_weights_mode(o.head, "head", false, &modes.head));
  const auto take = [&modes](RecordKind kind, kernels::DType* type) {
    const WeightsMode mode = modes.of(kind);
    if (mode == WeightsMode::kFp8) *type = kernels::DType::kF8E4M3;
    if (mode == WeightsMode::kMxfp4) *type = kernels::DType::kMXFP4;
  };
  take(RecordKind::kFfn, &out->ffn);
  take(RecordKind::kExperts, &out->experts);
  take(RecordKind::kHead, &out->head);
  return {};
}

Result<std::shared_ptr<const Model>> model_of(const dsv3_benchmark_options& o,
                                              const std::shared_ptr<CancelToken>& cancel) {
  SyntheticOptions synthetic;
  DSV3_TRY(read_types(o, &synthetic));
  if (o.model_path != nullptr) {
    const int32_t given[] = {o.ffn, o.experts, o.head};
    const char* const names[] = {"ffn", "experts", "head"};
    for (int i = 0; i < 3; ++i) {
      if (given[i] == DSV3_WEIGHTS_KEEP) continue;
      return invalid(names[i],
                     format("%s is given beside model_path, and is of a shape alone", names[i]));
    }
    if (o.layers != 0) {
      return invalid("layers", "layers is given beside model_path, and is of a shape alone");
    }
    if (o.shape != nullptr) {
      return invalid("shape", "shape is given beside model_path, expected one of the two");
    }
    return Model::open(o.model_path, {});
  }
  if (o.shape == nullptr) return invalid("shape", "neither shape nor model_path is given");
  DSV3_ASSIGN(const ModelConfig config, synthetic_config(o.shape, o.layers));
  if (cancel != nullptr) synthetic.go_on = [&cancel] { return !cancel->cancelled.load(); };
  return Model::synthesise(config, synthetic);
}

// A machine that others use is fast and slow by turns of a second or less.
constexpr double kLineSeconds = 2;

void write_line(const BenchmarkLine& line, int32_t all_threads, JsonWriter* out) {
  std::string label = line_label(line.name, line.batch, line.context, line.tokens);
  if (line.expanded) label += ", expanded";
  if (line.threads != all_threads) label += format(", %d thread", line.threads);
  out->open('{');
  out->field("name", line.name);
  out->field("label", label);
  out->field("threads", line.threads);
  out->field("batch", line.batch);
  out->field("context", line.context);
  out->field("tokens", line.tokens);
  out->field("seconds", line.seconds);
  out->field("fastest_seconds", line.fastest);
  out->field("slowest_seconds", line.slowest);
  out->field("tokens_per_second", line.tokens_per_second());
  out->field("bytes", line.bytes);
  out->field("bytes_per_second", line.bytes / line.seconds);
  out->field("weight_flops", line.weight_flops);
  out->field("attention_flops", line.attention_flops);
  out->field("flops_per_second", (line.weight_flops + line.attention_flops) / line.seconds);
  out->field("limit_read_bytes_per_second", line.read_bytes_per_second);
  out->field("limit_dot_flops_per_second", line.dot_flops_per_second);
  out->field("limit", line.bound);
  out->field("limit_seconds", line.bound_seconds);
  out->field("percent_of_limit", line.percent_of_limit());
  out->field("percent_by_operation", line.percent_by_operation());
  if (line.expanded) {
    out->field("prompt_attention", "expanded");
    out->field("times_as_fast", line.times_as_fast);
  }
  if (line.page_faults > 0) out->field("page_faults", line.page_faults);
  if (!line.profile.empty()) {
    out->field("profile_seconds", line.profile_seconds);
    out->open_field("profile", '[');
    for (const kernels::OperationProfile& p : line.profile) {
      out->open('{');
      out->field("name", p.name);
      out->field("calls", p.calls);
      out->field("seconds", p.seconds);
      out->field("share", p.seconds / line.profile_seconds);
      out->field("bytes", p.bytes);
      out->field("bytes_per_second", p.bytes / p.seconds);
      out->field("flops", p.flops);
      out->field("flops_per_second", p.flops / p.seconds);
      out->close('}');
    }
    out->close(']');
  }
  out->close('}');
}

// All threads' figures over one thread's, from lines that were measured one after the other.
std::vector<std::pair<std::string, double>> scaling_of(const BenchmarkResult& result) {
  std::vector<std::pair<std::string, double>> out;
  for (size_t i = 2; i < result.lines.size(); ++i) {
    const BenchmarkLine& one = result.lines[i];
    if (one.threads == result.threads) continue;
    // Between the two may stand the same prompt with keys and values expanded.
    const BenchmarkLine& all = result.lines[i - (result.lines[i - 1].expanded ? 2 : 1)];
    // Its own line may have found no room for its latents.
    if (all.name != one.name || all.tokens != one.tokens) continue;
    out.emplace_back(one.name, one.seconds / all.seconds);
    if (one.name == "decode") {
      out.emplace_back("read_bytes_per_second",
                       all.read_bytes_per_second / one.read_bytes_per_second);
    } else {
      out.emplace_back("dot_flops_per_second", all.dot_flops_per_second / one.dot_flops_per_second);
    }
  }
  return out;
}

void write_machine(const BenchmarkResult& result, JsonWriter* out) {
  out->open_field("machine", '{');
  out->field("threads", result.threads);
  out->field("kernels", result.kernels);
  out->field("read_bytes_per_second", result.limits.read_bytes_per_second);
  out->field("cache_bytes_per_second", result.limits.cache_bytes_per_second);
  out->field("dot_flops_per_second", result.limits.dot_flops_per_second);
  out->field("dot", result.limits.dot);
  out->field("int8_ops_per_second", result.limits.int8_ops_per_second);
  out->field("drift", result.limits_drift);
  out->close('}');
}

void write_model(const BenchmarkResult& result, const Model& model, double load_seconds,
                 JsonWriter* out) {
  out->open_field("model", '{');
  out->field("path", model.path());  // may hold bytes that are not UTF-8
  out->field("model_type", model.config().model_type);
  out->field("num_hidden_layers", model.config().num_hidden_layers);
  out->field("parameters", model.parameters());
  out->field("weight_bytes", model.weight_bytes());
  out->field("active_bytes_per_token", model.active_bytes_per_token());
  out->field("load_seconds", load_seconds);
  out->field("resident_bytes", result.resident_bytes);
  out->field("resident_anonymous_bytes", result.resident_anonymous_bytes);
  out->close('}');
}

std::string json_of(const BenchmarkResult& result, const Model& model, double load_seconds) {
  JsonWriter writer;
  JsonWriter* const out = &writer;
  out->open('{');
  write_machine(result, out);
  write_model(result, model, load_seconds, out);
  out->open_field("lines", '[');
  for (const BenchmarkLine& line : result.lines) write_line(line, result.threads, out);
  out->close(']');
  out->open_field("left_out", '[');
  for (const LeftOutLine& line : result.left_out) {
    out->open('{');
    out->field("name", line.name);
    out->field("label", line_label(line.name, line.batch, line.context, line.tokens));
    out->field("batch", line.batch);
    out->field("context", line.context);
    out->field("tokens", line.tokens);
    out->field("reason", line.reason);
    out->close('}');
  }
  out->close(']');
  if (const auto scaling = scaling_of(result); !scaling.empty()) {
    out->open_field("scaling", '{');
    out->field("threads", result.threads);
    for (const auto& [name, times] : scaling) out->field(name, times);
    out->close('}');
  }
  out->close('}');
  return writer.take();
}

}  // namespace

extern "C" {

void dsv3_benchmark_options_init(dsv3_benchmark_options* options, uint32_t struct_size) {
  init_struct(options, struct_size, kBenchmarkDefaults);
}

dsv3_status dsv3_benchmark(const dsv3_benchmark_options* options, char** json, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_out(json, "json"));
    dsv3_benchmark_options o = kBenchmarkDefaults;
    DSV3_TRY(read_struct(options, "dsv3_benchmark_options", &o));
    if (o.repeats < 1 || o.repeats > 100) {
      return invalid("repeats", format("repeats is %d, expected 1 to 100", o.repeats));
    }
    DSV3_TRY(check_flag_value(o.quick, "quick"));
    DSV3_TRY(check_flag_value(o.profile, "profile"));
    DSV3_TRY(check_flag_value(o.scaling, "scaling"));
    DSV3_TRY(check_flag_value(o.invariance, "invariance"));
    DSV3_TRY(check_reserved(o, "dsv3_benchmark_options"));
    std::shared_ptr<CancelToken> cancel;
    DSV3_TRY(read_cancel(o.cancel, &cancel));
    EngineOptions context;
    DSV3_TRY(read_context_options(o.context, &context));
    ProgressCall progress(o.progress, o.progress_user, cancel);
    const Progress report_progress = progress.progress();
    BenchmarkOptions benchmark;
    benchmark.kernels = context.kernels;
    benchmark.threads = context.threads;
    benchmark.pin_threads = context.pin_threads;
    benchmark.cancel = cancel;
    benchmark.repeats = o.repeats;
    benchmark.profile = o.profile == 1;
    benchmark.scaling = o.scaling == 1;
    benchmark.invariance = o.invariance == 1;
    if (o.only != nullptr) benchmark.only = o.only;
    if (o.quick == 0) benchmark.least_seconds = kLineSeconds;
    if (o.quick == 1) {
      benchmark.batches = {1, 4};
      benchmark.contexts = {1024};
      benchmark.context_batches = {1};
      benchmark.prefills = {128};
      benchmark.prefill_context = 0;
    }
    if (report_progress) {
      benchmark.progress = [&](int done, int total) {
        return report_progress(static_cast<uint64_t>(done), static_cast<uint64_t>(total));
      };
    }
    std::vector<LeftOutLine> unused;  // a model may take half a minute: `only` is looked at before
    DSV3_TRY(
        plan_benchmark(benchmark, std::numeric_limits<int64_t>::max(), false, &unused).status());
    const DefaultFloats floats;
    const int64_t begin = monotonic_ns();
    Result<std::shared_ptr<const Model>> model = model_of(o, cancel);
    const double load_seconds = static_cast<double>(monotonic_ns() - begin) * 1e-9;
    Result<BenchmarkResult> result =
        model.ok() ? run_benchmark(*model, benchmark) : Result<BenchmarkResult>(model.status());
    if (result.status().code() == Code::kCancelled) {
      result = Status(Code::kCancelled, "the benchmark was cancelled");
    }
    DSV3_TRY(progress.result(result.status()));
    *json = new_string(json_of(*result, **model, load_seconds));
    return {};
  });
}

}  // extern "C"
