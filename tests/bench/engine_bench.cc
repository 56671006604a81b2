// What the engine promises about many sessions: decoding side by side, a shared prefix, interactive
// requests beside a saturating background job, cancel in the middle of prefill. kUsage lists the
// lines. Requests go through dsv3.h; synthetic models, what a step reads and what the machine could
// read come from inside the library, for the header has none of them.
//
// Prompts are pseudo-random tokens; every line prints what it compares in the same run.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <string>
#include <thread>
#include <vector>

#include "include/dsv3.h"
#include "kernels/machine.h"
#include "runtime/api/handles.h"
#include "runtime/engine/benchmark.h"
#include "runtime/model/synthetic.h"

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

template <class T, void (*kFree)(T*)>
struct Freer {
  void operator()(T* p) const { kFree(p); }
};
using Model = std::unique_ptr<dsv3_model, Freer<dsv3_model, dsv3_model_free>>;
using Context = std::unique_ptr<dsv3_context, Freer<dsv3_context, dsv3_context_free>>;
using Session = std::unique_ptr<dsv3_session, Freer<dsv3_session, dsv3_session_free>>;
using Request = std::unique_ptr<dsv3_request, Freer<dsv3_request, dsv3_request_free>>;

void must(dsv3_status status, dsv3_error* error) {
  if (status == DSV3_OK) return;
  std::fprintf(stderr, "%s: %s\n", dsv3_status_name(status), dsv3_error_message(error));
  std::exit(1);
}

struct Bench {
  Model model;
  int32_t threads = 0;
  double seconds = 3;
  uint64_t longest = 0;
  int32_t vocab = 0, layers = 0;

  Context context(int32_t prefix_cache = 1, const char* kernels = nullptr) const {
    dsv3_context_options options;
    dsv3_context_options_init(&options, sizeof options);
    options.threads = threads;
    options.prefix_cache = prefix_cache;
    options.kernels = kernels;
    dsv3_error* error = nullptr;
    dsv3_context* out = nullptr;
    must(dsv3_context_create(model.get(), &options, &out, &error), error);
    return Context(out);
  }
  std::vector<int32_t> prompt(size_t count, uint32_t seed) const {
    std::vector<int32_t> tokens(count);
    for (int32_t& t : tokens) {
      seed = seed * 1664525u + 1013904223u;
      t = 16 + static_cast<int32_t>((seed >> 8) % static_cast<uint32_t>(vocab - 16));
    }
    return tokens;
  }
  static Session session(dsv3_context* context, const std::vector<int32_t>& tokens) {
    dsv3_error* error = nullptr;
    dsv3_session* out = nullptr;
    must(dsv3_session_create(context, &out, &error), error);
    Session session(out);
    must(dsv3_session_append_tokens(out, tokens.data(), tokens.size(), 0, nullptr, nullptr, &error),
         error);
    return session;
  }
  static dsv3_request_options options(uint64_t max_tokens) {
    dsv3_request_options o;
    dsv3_request_options_init(&o, sizeof o);
    o.max_tokens = max_tokens;
    o.ignore_eos = 1;
    o.max_queued_events = 4096;
    return o;
  }
  static Request start(dsv3_session* session, const dsv3_request_options& options) {
    dsv3_error* error = nullptr;
    dsv3_request* out = nullptr;
    must(dsv3_request_start(session, &options, &out, &error), error);
    return Request(out);
  }
};

// Reads events to the end.
dsv3_request_statistics finish(dsv3_request* request) {
  dsv3_event event;
  do {
    event.struct_size = sizeof event;
    dsv3_error* error = nullptr;
    must(dsv3_request_next(request, DSV3_WAIT_FOREVER, &event, &error), error);
  } while (event.kind != DSV3_EVENT_FINISHED);
  if (event.finish_reason == DSV3_FINISH_ERROR) {
    std::fprintf(stderr, "a request failed: %s\n", event.error_message);
    std::exit(1);
  }
  return *event.statistics;
}

double quantile(std::vector<double> values, double q) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, static_cast<size_t>(q * values.size()))];
}

// Tokens per second of `count` sessions that decode at once.
double decode(const Bench& b, int count, bool plain) {
  const Context context = b.context(0);
  const uint64_t tokens = std::min<uint64_t>(400, b.longest / 2);
  double best = 0;
  const auto end = Clock::now() + std::chrono::duration<double>(b.seconds);
  while (Clock::now() < end || best == 0) {
    std::vector<Session> sessions;
    std::vector<Request> requests;
    dsv3_request_options o = Bench::options(0);
    for (int i = 0; i < count; ++i) {
      sessions.push_back(Bench::session(context.get(), b.prompt(32, static_cast<uint32_t>(i))));
      finish(Bench::start(sessions.back().get(), o).get());
    }
    o.max_tokens = tokens;
    o.max_queued_events = 1024;
    if (plain) o.speculation = DSV3_SPECULATION_OFF;
    const auto begin = Clock::now();
    for (const Session& s : sessions) requests.push_back(Bench::start(s.get(), o));
    for (const Request& r : requests) finish(r.get());
    best = std::max(best, static_cast<double>(tokens) * count / seconds_since(begin));
  }
  return best;
}

void decode_line(const Bench& b) {
  const double one = decode(b, 1, true);
  for (const int count : {2, 4, 8, 16, 32}) {
    const double many = decode(b, count, true);
    std::printf("decode        %2d sessions %8.0f tokens/s, 1 session %8.0f: %.2fx\n", count, many,
                one, many / one);
  }
}

void prefix_line(const Bench& b) {
  const uint64_t length = std::min<uint64_t>(1900, b.longest - 100);
  std::vector<double> cold, warm;
  for (uint32_t i = 0; i < 8; ++i) {
    const Context context = b.context();
    const std::vector<int32_t> prompt = b.prompt(length, 77 + i);
    for (const bool again : {false, true}) {
      const Session session = Bench::session(context.get(), prompt);
      const dsv3_request_statistics s =
          finish(Bench::start(session.get(), Bench::options(1)).get());
      (again ? warm : cold).push_back(static_cast<double>(s.first_token_ns) / 1e6);
    }
  }
  std::printf("shared prefix %llu tokens: first token after %.2f ms, cold %.2f ms: %.1f %%\n",
              static_cast<unsigned long long>(length), quantile(warm, 0.5), quantile(cold, 0.5),
              100 * quantile(warm, 0.5) / quantile(cold, 0.5));
}

// First-token times of interactive requests that add a few tokens to a cached prefix.
std::vector<double> interactive(const Bench& b, dsv3_context* context,
                                std::vector<double>* between) {
  const uint64_t length = std::min<uint64_t>(1024, b.longest / 2);
  std::vector<int32_t> prompt = b.prompt(length, 5);
  std::vector<double> times;
  const auto end = Clock::now() + std::chrono::duration<double>(b.seconds);
  for (int32_t i = 0; Clock::now() < end; ++i) {
    prompt.resize(length);
    for (int32_t k = 0; k < 8; ++k) prompt.push_back(16 + (i * 8 + k) % (b.vocab - 16));
    const Session session = Bench::session(context, prompt);
    const dsv3_request_statistics s = finish(Bench::start(session.get(), Bench::options(8)).get());
    if (i > 0) times.push_back(static_cast<double>(s.first_token_ns) / 1e6);
    if (i > 0) between->push_back(static_cast<double>(s.decode_ns) / 7e6);
    std::this_thread::sleep_for(std::chrono::milliseconds(3 + i % 5));
  }
  return times;
}

void background_line(const Bench& b, int32_t priority, uint64_t generated) {
  const Context context = b.context();
  std::vector<double> idle_between, busy_between;
  const std::vector<double> idle = interactive(b, context.get(), &idle_between);
  std::atomic<bool> stop{false};
  std::atomic<uint64_t> computed{0};
  std::vector<std::thread> jobs;
  for (uint32_t j = 0; j < 2; ++j) {
    jobs.emplace_back([&, j] {
      dsv3_request_options o = Bench::options(generated);
      o.priority = priority;
      for (uint32_t i = 0; !stop; ++i) {
        const uint64_t length = std::min<uint64_t>(1500, b.longest - generated - 1);
        const Session session = Bench::session(context.get(), b.prompt(length, 1000 + 2 * i + j));
        finish(Bench::start(session.get(), o).get());
        computed += length + generated;
      }
    });
  }
  const auto begin = Clock::now();
  const std::vector<double> busy = interactive(b, context.get(), &busy_between);
  const double rate = static_cast<double>(computed) / seconds_since(begin);
  stop = true;
  for (std::thread& t : jobs) t.join();
  std::printf(
      "interactive   p50 %.2f p95 %.2f p99 %.2f ms to the first token beside %s (%.0f tokens/s), "
      "idle p50 %.2f p95 %.2f: p95 %.2fx; between tokens %.2f ms, idle %.2f (%zu requests)\n",
      quantile(busy, 0.5), quantile(busy, 0.95), quantile(busy, 0.99),
      generated > 100 ? "background decoding" : "background prefill", rate, quantile(idle, 0.5),
      quantile(idle, 0.95), quantile(busy, 0.95) / quantile(idle, 0.95),
      quantile(busy_between, 0.5), quantile(idle_between, 0.5), busy.size());
}

dsv3_context_statistics statistics(const Context& context) {
  dsv3_context_statistics out;
  out.struct_size = sizeof out;
  must(dsv3_context_get_statistics(context.get(), &out, nullptr), nullptr);
  return out;
}

// Cancels prompts of `length` tokens, `cached` of them found computed, 2 to `spread` ms after their
// start. Beside it the mean time of one layer of one chunk in the same prompts.
void cancel_line(const Bench& b, uint64_t length, uint64_t cached, uint32_t spread) {
  const Context context = b.context();
  std::vector<int32_t> tokens = b.prompt(cached, 1);
  Session keeps;  // the pages that the others find
  if (cached > 0) {
    keeps = Bench::session(context.get(), tokens);
    finish(Bench::start(keeps.get(), Bench::options(0)).get());
  }
  std::vector<double> times;
  const dsv3_context_statistics before = statistics(context);
  const auto end = Clock::now() + std::chrono::duration<double>(b.seconds);
  for (uint32_t i = 0; Clock::now() < end || times.empty(); ++i) {
    tokens.resize(cached);
    const std::vector<int32_t> more = b.prompt(length - cached, 2 + i);
    tokens.insert(tokens.end(), more.begin(), more.end());
    const Session session = Bench::session(context.get(), tokens);
    const Request request = Bench::start(session.get(), Bench::options(4));
    std::this_thread::sleep_for(
        std::chrono::microseconds(2000 + spread * 1000 / 40 * (i * 7 % 40)));
    const auto begin = Clock::now();
    dsv3_request_cancel(request.get());
    finish(request.get());
    const double ms = 1e3 * seconds_since(begin);
    const uint64_t computed = dsv3_session_computed(session.get());
    if (computed < length) times.push_back(ms);
  }
  const dsv3_context_statistics after = statistics(context);
  const uint64_t whole =
      (after.steps - after.steps_abandoned) - (before.steps - before.steps_abandoned);
  // The abandoned ones ran half of their layers on average.
  const double steps = static_cast<double>(whole) +
                       0.5 * static_cast<double>(after.steps_abandoned - before.steps_abandoned);
  const double layer_ms = static_cast<double>(after.step_ns - before.step_ns) * 1e-6 / steps /
                          static_cast<double>(b.layers);
  std::printf(
      "cancel        in a %llu-token prefill, %llu of them cached: p50 %.3f p99 %.3f ms (%zu "
      "times);"
      " a layer of a chunk %.3f ms; pages held before %llu, after %llu\n",
      static_cast<unsigned long long>(length), static_cast<unsigned long long>(cached),
      quantile(times, 0.5), quantile(times, 0.99), times.size(), layer_ms,
      static_cast<unsigned long long>(before.pages_used),
      static_cast<unsigned long long>(after.pages_used));
}

// What sixteen sessions with distinct prompts read while they decode side by side: a thread looks
// at the expert load after every step, which waits for nothing.
void touched_line(const Bench& b, int count) {
  const Context context = b.context(0);
  const dsv3::Engine& engine = *context->engine;
  const dsv3::StepBytes bytes = dsv3::step_bytes(*b.model->model);
  std::vector<Session> sessions;
  std::vector<Request> requests;
  dsv3_request_options o = Bench::options(0);
  o.speculation = DSV3_SPECULATION_OFF;
  for (int i = 0; i < count; ++i) {
    sessions.push_back(Bench::session(context.get(), b.prompt(32, static_cast<uint32_t>(i))));
    finish(Bench::start(sessions.back().get(), o).get());
  }
  dsv3::kernels::DeviceOptions device_options;
  device_options.threads = b.threads;
  auto device = dsv3::kernels::make_device(device_options);
  if (!device.ok()) std::exit(1);
  auto probe = dsv3::kernels::MachineProbe::create(device->get(), b.model->model->weight_memory());
  if (!probe.ok()) std::exit(1);
  std::vector<double> limits = {(*probe)->measure().read_bytes_per_second};
  double seconds = 0, read = 0, distinct = 0;
  uint64_t steps = 0, all = 0;
  const auto end = Clock::now() + std::chrono::duration<double>(b.seconds);
  while (Clock::now() < end || steps == 0) {
    o.max_tokens = 24;
    requests.clear();
    std::vector<uint64_t> load, last;
    dsv3::EngineStatistics at = engine.statistics(&last);
    const uint64_t before = at.steps;
    for (const Session& s : sessions) requests.push_back(Bench::start(s.get(), o));
    std::atomic<bool> done{false};
    std::thread watch([&] {
      Clock::time_point since;
      bool began = false;
      while (!done) {
        const dsv3::EngineStatistics now = engine.statistics(&load);
        if (now.steps > at.steps) {
          // The first step of the run began when somebody's request came, not when a step ended.
          if (began && now.steps == at.steps + 1 &&
              now.rows - at.rows == static_cast<uint64_t>(count)) {
            double chosen = 0;
            for (size_t i = 0; i < load.size(); ++i) chosen += load[i] > last[i] ? 1 : 0;
            seconds += seconds_since(since);
            read += bytes.every_row + bytes.head + chosen * bytes.expert;
            distinct += chosen;
            ++steps;
          }
          since = Clock::now();
          began = true;
          at = now;
          last = load;
        }
        std::this_thread::sleep_for(std::chrono::microseconds(300));
      }
    });
    for (const Request& r : requests) finish(r.get());
    done = true;
    watch.join();
    all += at.steps - before;
    limits.push_back((*probe)->read_pass());
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // till the probe's threads sleep
  }
  const double limit = dsv3::kernels::median(limits);
  const auto moe = static_cast<double>(b.model->model->config().num_hidden_layers -
                                       b.model->model->config().first_k_dense_replace);
  std::printf(
      "touched       %d sessions: %.1f tokens/s; %.1f of %lld experts a layer and step, %.0f MB a "
      "step: %.1f GB/s, %.0f %% of %.1f (%llu of %llu steps)\n",
      count, static_cast<double>(steps) * count / seconds, distinct / steps / moe,
      static_cast<long long>(b.model->model->config().n_routed_experts), read / steps * 1e-6,
      read / seconds * 1e-9, 100 * read / seconds / limit, limit * 1e-9,
      static_cast<unsigned long long>(steps), static_cast<unsigned long long>(all));
}

// The sets "A,B" in turns, within one process: nanoseconds of each, and how many times as fast B
// is.
void sets_line(const Bench& b, const std::string& sets) {
  using dsv3::kernels::median;
  const size_t comma = sets.find(',');
  const std::string names[2] = {sets.substr(0, comma),
                                sets.substr(std::min(comma + 1, sets.size()))};
  const Context contexts[2] = {b.context(0, names[0].c_str()), b.context(0, names[1].c_str())};
  const auto compare = [&](const char* what, uint64_t size, const auto& run) {
    std::vector<double> ns[2], ratios;
    const auto end = Clock::now() + std::chrono::duration<double>(b.seconds);
    for (int turn = 0; turn < 3 || Clock::now() < end; ++turn) {
      double of[2];
      for (const int i : {turn % 2, 1 - turn % 2}) ns[i].push_back(of[i] = run(i, turn));
      ratios.push_back(of[0] / of[1]);
    }
    std::printf("%s %4llu  %s %9.2f ms  %s %9.2f ms  %.2fx (%.2f to %.2f, %zu turns)\n", what,
                static_cast<unsigned long long>(size), names[0].c_str(), median(ns[0]) * 1e-6,
                names[1].c_str(), median(ns[1]) * 1e-6, median(ratios), quantile(ratios, 0.25),
                quantile(ratios, 0.75), ratios.size());
    std::fflush(stdout);
  };
  for (const uint64_t count : {1, 2, 4, 16}) {
    std::vector<Session> sessions[2];
    for (int i : {0, 1}) {
      for (uint32_t s = 0; s < count; ++s) {
        sessions[i].push_back(Bench::session(contexts[i].get(), b.prompt(32, s)));
        finish(Bench::start(sessions[i].back().get(), Bench::options(0)).get());
      }
    }
    compare("decoding, sequences", count, [&](int i, int) {
      dsv3_request_options o = Bench::options(8);
      o.speculation = DSV3_SPECULATION_OFF;
      const auto begin = Clock::now();
      std::vector<Request> requests;
      for (const Session& s : sessions[i]) requests.push_back(Bench::start(s.get(), o));
      for (const Request& r : requests) finish(r.get());
      const double ns = seconds_since(begin) * 1e9 / 8;
      requests.clear();
      dsv3_error* error = nullptr;
      for (const Session& s : sessions[i]) must(dsv3_session_truncate(s.get(), 32, &error), error);
      return ns;
    });
  }
  for (const uint64_t length : {128, 512, 1900}) {
    compare("prompts of tokens  ", length, [&](int i, int turn) {
      const auto prompt = b.prompt(length, 1000 + static_cast<uint32_t>(turn));
      const Session session = Bench::session(contexts[i].get(), prompt);
      return static_cast<double>(
          finish(Bench::start(session.get(), Bench::options(0)).get()).prefill_ns);
    });
  }
}

// "v2-lite:4", "v2-lite:4:bf16"
dsv3_model* synthesise(const std::string& what) {
  const size_t colon = what.find(':');
  const size_t second = what.find(':', colon + 1);
  const std::string type = second == std::string::npos ? "fp8" : what.substr(second + 1);
  dsv3::SyntheticOptions options;
  if (type == "bf16") {
    options.linear = options.ffn = options.experts = dsv3::kernels::DType::kBF16;
  } else if (type != "fp8") {
    std::fprintf(stderr, "engine_bench: type is \"%s\", expected fp8 or bf16\n", type.c_str());
    std::exit(2);
  }
  auto config = dsv3::synthetic_config(what.substr(0, colon), std::atoi(what.c_str() + colon + 1));
  auto model = config.ok() ? dsv3::Model::synthesise(*config, options) : config.status();
  if (!model.ok()) {
    std::fprintf(stderr, "%s\n", model.status().message().c_str());
    std::exit(1);
  }
  auto handle = std::make_unique<dsv3_model>();
  handle->model = *model;
  return handle.release();
}

constexpr const char* kUsage =
    R"(usage: engine_bench MODEL.dsv3 [THREADS [SECONDS [LINE]]]
       engine_bench SHAPE:LAYERS[:TYPE] [THREADS [SECONDS [LINE]]]
SHAPE:LAYERS  a synthetic model with random weights: tiny, v2-lite or v3; 0 layers: all
TYPE          of its matrices: fp8 (default) or bf16; embedding and head are BF16
THREADS       0 (default): the CPUs this process may use
SECONDS       of each measurement, 3 by default
LINE          all (default), or of a file:
                decode       2 to 32 sessions side by side against one
                prefix       first token over a prefix that another session has computed
                interactive  first token beside background jobs that prefill and that decode
                cancel       in the middle of a prompt of 1,900 tokens
              of a synthetic model:
                touched      what 16 sessions with distinct prompts read in a step
                cancel       in a prompt of 16,384 tokens, half of them found computed
              of either, and not part of all:
                sets=A,B     two kernel sets in turns, avx2,avx2i16 say
)";

// The lines that there are for a model of this kind.
std::vector<std::string> lines_of(bool synthetic) {
  if (synthetic) return {"all", "touched", "cancel"};
  return {"all", "decode", "prefix", "interactive", "cancel"};
}

bool known(const std::string& line, bool synthetic) {
  if (line.starts_with("sets=")) {
    const size_t comma = line.find(',');
    return comma != std::string::npos && comma > 5 && comma + 1 < line.size();
  }
  const std::vector<std::string> lines = lines_of(synthetic);
  return std::find(lines.begin(), lines.end(), line) != lines.end();
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 5) {
    std::fputs(kUsage, stderr);
    return 2;
  }
  Bench b;
  dsv3_error* error = nullptr;
  dsv3_model* model = nullptr;
  const bool synthetic = std::string(argv[1]).find(':') != std::string::npos;
  const std::string line = argc > 4 ? argv[4] : "all";
  if (!known(line, synthetic)) {
    std::string expected;
    for (const std::string& name : lines_of(synthetic)) expected += name + ", ";
    std::fprintf(stderr, "engine_bench: line is \"%s\", expected %ssets=A,B\n", line.c_str(),
                 expected.c_str());
    return 2;
  }
  if (synthetic) {
    model = synthesise(argv[1]);
  } else {
    must(dsv3_model_open(argv[1], nullptr, &model, &error), error);
  }
  b.model.reset(model);
  if (argc > 2) b.threads = std::atoi(argv[2]);
  if (argc > 3) b.seconds = std::atof(argv[3]);
  dsv3_model_info info;
  info.struct_size = sizeof info;
  must(dsv3_model_get_info(model, &info, &error), error);
  b.longest = static_cast<uint64_t>(info.max_position_embeddings);
  b.vocab = info.vocab_size;
  b.layers = info.num_hidden_layers;
  if (line.starts_with("sets=")) {
    sets_line(b, line.substr(5));
    return 0;
  }
  const auto wanted = [&](const char* name) { return line == "all" || line == name; };
  if (synthetic) {
    if (wanted("touched")) touched_line(b, 16);
    if (wanted("cancel")) cancel_line(b, 16384, 8192, 1000);
    return 0;
  }
  if (wanted("decode")) decode_line(b);
  if (wanted("prefix")) prefix_line(b);
  if (wanted("interactive")) {
    background_line(b, DSV3_PRIORITY_BACKGROUND, 1);
    background_line(b, DSV3_PRIORITY_BACKGROUND, 400);
  }
  if (wanted("cancel")) cancel_line(b, std::min<uint64_t>(1900, b.longest - 100), 0, 28);
  return 0;
}
