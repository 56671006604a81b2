#include "options.h"

#include <cmath>
#include <cstdlib>

namespace cli {

namespace {
constexpr const char* kModelGroup = "Model and machine";
constexpr const char* kSamplingGroup = "Sampling";
constexpr const char* kSpeculationGroup =
    "Speculation (faster where it can be; never another answer)";
constexpr const char* kOutputGroup = "Output";

void log_to_stderr(void*, int32_t level, const char* message) {
  static const char* const kNames[] = {"", "error", "warning", "info", "debug"};
  const char* name = level >= 1 && level <= 4 ? kNames[level] : "log";
  write_err(format("[%s] %s\n", name, message));
}
}  // namespace

void WeightOptions::add_to(CLI::App& app) {
  app.add_option("--ffn", ffn, "feed-forward layers, experts included, where it differs")
      ->check(CLI::IsMember({"keep", "fp8", "mxfp4"}))
      ->capture_default_str();
  app.add_option("--experts", experts, "routed experts, where they differ from --ffn")
      ->check(CLI::IsMember({"keep", "fp8", "mxfp4"}))
      ->capture_default_str();
  app.add_option("--head", head, "embedding and head")
      ->check(CLI::IsMember({"keep", "fp8"}))
      ->capture_default_str();
}

int32_t WeightOptions::value(const std::string& name) {
  if (name == "mxfp4") return DSV3_WEIGHTS_MXFP4;
  return name == "fp8" ? DSV3_WEIGHTS_FP8 : DSV3_WEIGHTS_KEEP;
}

void ModelOptions::add_to(CLI::App& app) {
  app.add_option("FILE", file, "the .dsv3 file (made by `dsv3 convert`)")->required();
  app.add_option("--residency", residency, "map the file, or copy it into memory")
      ->check(CLI::IsMember({"map", "copy"}))
      ->capture_default_str()
      ->group(kModelGroup);
}

Model ModelOptions::open(Interrupt& interrupt) const {
  dsv3_model_options options;
  dsv3_model_options_init(&options, sizeof options);
  options.residency = residency == "copy" ? DSV3_RESIDENCY_COPY : DSV3_RESIDENCY_MAP;
  options.cancel = interrupt.token();
  Progress progress("opening", Progress::Unit::kBytes);
  options.progress = Progress::callback;
  options.progress_user = &progress;
  dsv3_model* model = nullptr;
  call([&](dsv3_error** e) { return dsv3_model_open(file.c_str(), &options, &model, e); });
  return Model(model);
}

void ContextOptions::add_compute_to(CLI::App& app) {
  app.add_option("--threads", threads, "compute threads; 0: the CPUs this process may use")
      ->check(in_range(0, 1024))
      ->capture_default_str()
      ->group(kModelGroup);
  app.add_option("--kernels", kernels,
                 "kernel set: ref, portable, avx2, avx2i16, avx512, avx512bf16, neon, neonbf16; "
                 "default: the environment variable DSV3_KERNELS, else the best this machine runs")
      ->group(kModelGroup);
  app.add_flag("--pin", pin, "pin compute threads to CPUs")->group(kModelGroup);
}

void ContextOptions::add_to(CLI::App& app) {
  add_compute_to(app);
  app.add_option("--cache-mb", cache_mb, "budget of the latent cache in MiB; 0: automatic")
      ->check(in_range(uint64_t{0}, uint64_t{1} << 40))
      ->capture_default_str()
      ->group(kModelGroup);
  app.add_option("--disk-cache", disk_cache,
                 "directory in which computed prompts outlive the process (private to you)")
      ->group(kModelGroup);
  app.add_option("--disk-cache-mb", disk_cache_mb, "its budget in MiB; 0: 1024")
      ->check(in_range(uint64_t{0}, uint64_t{1} << 40))
      ->capture_default_str()
      ->group(kModelGroup);
  app.add_option("--prompt-attention", prompt_attention,
                 "expanded: long prompts faster, but not bit-identical however they are computed")
      ->check(CLI::IsMember({"latent", "expanded"}))
      ->capture_default_str()
      ->group(kModelGroup);
  app.add_option("--prefill-chunk", prefill_chunk,
                 "most tokens of a prompt in one step; 0: automatic")
      ->check(in_range(0, 65536))
      ->capture_default_str()
      ->group(kModelGroup);
  app.add_option("--trace", trace,
                 "write what the engine does to this file, for Perfetto (256 MiB at most)")
      ->group(kOutputGroup);
  app.add_flag("-v,--verbose", verbose, "show the library's log on stderr")->group(kOutputGroup);
}

dsv3_context_options ContextOptions::make() const {
  dsv3_context_options options;
  dsv3_context_options_init(&options, sizeof options);
  options.threads = threads;
  options.kernels = kernels.empty() ? nullptr : kernels.c_str();
  options.cache_bytes = cache_mb << 20;
  options.pin_threads = pin ? 1 : 0;
  options.prefill_chunk = prefill_chunk;
  options.prompt_attention =
      prompt_attention == "expanded" ? DSV3_PROMPT_EXPANDED : DSV3_PROMPT_LATENT;
  options.disk_cache_dir = disk_cache.empty() ? nullptr : disk_cache.c_str();
  options.disk_cache_bytes = disk_cache_mb << 20;
  if (verbose) options.log = log_to_stderr;
  return options;
}

Context ContextOptions::create(dsv3_model* model) const {
  const dsv3_context_options options = make();
  dsv3_context* context = nullptr;
  call([&](dsv3_error** e) { return dsv3_context_create(model, &options, &context, e); });
  Context owned(context);
  if (!trace.empty()) {
    call([&](dsv3_error** e) {
      return dsv3_context_trace_start(context, trace.c_str(), uint64_t{256} << 20, e);
    });
  }
  return owned;
}

void ContextOptions::end_trace(dsv3_context* context) const {
  if (trace.empty()) return;
  call([&](dsv3_error** e) { return dsv3_context_trace_stop(context, e); });
}

void SamplingOptions::add_to(CLI::App& app) {
  const auto add = [&](const char* name, auto& variable, const char* help) {
    return app.add_option(name, variable, help)->capture_default_str()->group(kSamplingGroup);
  };
  add("-n,--max-tokens", max_tokens, "at most so many new tokens")
      ->check(in_range(uint64_t{0}, uint64_t{INT32_MAX}));
  add("--temperature", temperature, "0: always the most probable token");
  add("--top-k", top_k, "sample from the k most probable tokens; 0: off");
  add("--top-p", top_p, "sample from the most probable tokens that hold p together; 1: off");
  add("--min-p", min_p, "drop tokens below p times the most probable one; 0: off");
  add("--repetition-penalty", repetition_penalty, "1: off");
  add("--presence-penalty", presence_penalty, "0: off");
  add("--frequency-penalty", frequency_penalty, "0: off");
  add("--seed", seed, "the same seed gives the same text")
      ->check(in_range(uint64_t{0}, UINT64_MAX));
  app.add_option("--stop", stop, "end before this text (may be repeated)")
      ->take_all()
      ->allow_extra_args(false)
      ->group(kSamplingGroup);
  app.add_option("--stop-token", stop_tokens, "end after this token id (may be repeated)")
      ->take_all()
      ->allow_extra_args(false)
      ->group(kSamplingGroup);
  app.add_option("--logit-bias", logit_bias,
                 "ID=BIAS, added to the token's logit; -inf forbids it (may be repeated)")
      ->take_all()
      ->allow_extra_args(false)
      ->group(kSamplingGroup);
  app.add_flag("--ignore-eos", ignore_eos, "go on after the model's end-of-sentence token")
      ->group(kSamplingGroup);
  app.add_option("--logprobs", logprobs,
                 "report log-probabilities: of the chosen tokens (0) and of the N best as well")
      ->check(in_range(0, 64))
      ->group(kOutputGroup);
  app.add_option("--deadline-ms", deadline_ms, "give up after so many milliseconds; 0: never")
      ->check(in_range(uint64_t{0}, uint64_t{1} << 40))
      ->capture_default_str()
      ->group(kSamplingGroup);
  app.add_option("--speculate", speculate,
                 "verify guessed tokens: auto (as many as pay), off, always (whatever it costs)")
      ->check(CLI::IsMember({"auto", "off", "always"}))
      ->capture_default_str()
      ->group(kSpeculationGroup);
  app.add_option("--draft", drafters,
                 "who guesses: lookup (repetitions in the text), reference, mtp (the model's "
                 "module); default: lookup and reference, and with --speculate auto also mtp where "
                 "it was measured to pay")
      ->check(CLI::IsMember({"lookup", "reference", "mtp"}))
      ->delimiter(',')
      ->allow_extra_args(false)
      ->group(kSpeculationGroup);
  app.add_option("--max-draft", max_draft, "most tokens guessed at once; 0: no other limit than 64")
      ->check(in_range(0, 64))
      ->capture_default_str()
      ->group(kSpeculationGroup);
  app.add_option("--reference", reference,
                 "a file that the answer mostly copies (the old text of an edit)")
      ->group(kSpeculationGroup);
}

namespace {

dsv3_logit_bias parse_bias(const std::string& text) {
  const char* begin = text.c_str();
  char* end = nullptr;
  dsv3_logit_bias bias = {};
  const long id = std::strtol(begin, &end, 10);
  const bool has_id = end != begin && *end == '=' && id >= 0 && id <= INT32_MAX;
  const char* number = end + 1;
  if (has_id) bias.bias = std::strtof(number, &end);
  if (!has_id || end == number || *end != '\0' || std::isnan(bias.bias)) {
    throw Misuse("--logit-bias: found \"" + text +
                 "\", expected ID=BIAS, for example 17=-1.5 or 17=-inf");
  }
  bias.token = static_cast<int32_t>(id);
  return bias;
}

}  // namespace

void SamplingOptions::make_speculation(dsv3_request_options* options) {
  options->speculation = speculate == "off"      ? DSV3_SPECULATION_OFF
                         : speculate == "always" ? DSV3_SPECULATION_ALWAYS
                                                 : DSV3_SPECULATION_AUTO;
  for (const std::string& name : drafters) {
    options->drafters |= name == "lookup"      ? DSV3_DRAFT_LOOKUP
                         : name == "reference" ? DSV3_DRAFT_REFERENCE
                                               : DSV3_DRAFT_MTP;
  }
  options->max_draft_tokens = max_draft;
  if (reference.empty()) return;
  reference_text_ = read_input(reference);
  require_utf8(reference_text_, reference);
  options->reference_text = reference_text_.data();
  options->reference_text_length = reference_text_.size();
}

dsv3_request_options SamplingOptions::make(const Interrupt& interrupt) {
  dsv3_request_options options;
  dsv3_request_options_init(&options, sizeof options);
  options.max_tokens = max_tokens;
  options.temperature = temperature;
  options.top_k = top_k;
  options.top_p = top_p;
  options.min_p = min_p;
  options.repetition_penalty = repetition_penalty;
  options.presence_penalty = presence_penalty;
  options.frequency_penalty = frequency_penalty;
  options.seed = seed;
  options.ignore_eos = ignore_eos ? 1 : 0;
  options.logprobs = logprobs;
  options.deadline_ms = deadline_ms;
  options.cancel = interrupt.token();
  make_speculation(&options);
  stop_pointers_.clear();
  for (const std::string& text : stop) stop_pointers_.push_back(text.c_str());
  options.stop_strings = stop_pointers_.data();
  options.stop_string_count = static_cast<uint32_t>(stop_pointers_.size());
  options.stop_tokens = stop_tokens.data();
  options.stop_token_count = static_cast<uint32_t>(stop_tokens.size());
  biases_.clear();
  for (const std::string& text : logit_bias) biases_.push_back(parse_bias(text));
  options.logit_bias = biases_.data();
  options.logit_bias_count = static_cast<uint32_t>(biases_.size());
  options.logit_bias_stride = sizeof(dsv3_logit_bias);
  return options;
}

void OutputOptions::add_to(CLI::App& app) {
  CLI::Option* one = app.add_flag("--json", json, "print one JSON object at the end");
  CLI::Option* lines =
      app.add_flag("--json-events", json_events, "print one JSON object per event, as they come");
  one->excludes(lines)->group(kOutputGroup);
  lines->excludes(one)->group(kOutputGroup);
  app.add_flag("--stats", stats, "print all counts and times at the end (stderr)")
      ->group(kOutputGroup);
  app.add_flag("-q,--quiet", quiet, "no tokens/s line at the end")->group(kOutputGroup);
}

Session create_session(dsv3_context* context) {
  dsv3_session* session = nullptr;
  call([&](dsv3_error** e) { return dsv3_session_create(context, &session, e); });
  return Session(session);
}

}  // namespace cli
