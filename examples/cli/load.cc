#include "load.h"

#include <algorithm>
#include <cmath>
#include <exception>
#include <functional>
#include <mutex>
#include <random>
#include <thread>

#include "options.h"

namespace cli {
namespace {

using Clock = std::chrono::steady_clock;
using Random = std::mt19937_64;

double ms_since(Clock::time_point begin) {
  return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
}

std::vector<int32_t> random_tokens(Random& random, int32_t vocab, int32_t count) {
  std::uniform_int_distribution<int32_t> pick(0, vocab - 1);
  std::vector<int32_t> tokens(static_cast<size_t>(count));
  for (int32_t& token : tokens) token = pick(random);
  return tokens;
}

// One client's or job's thread and what it measured.
class Worker {
 public:
  Worker(dsv3_context* context, const dsv3_model_info& model, const LoadOptions& options,
         uint64_t stream, const std::atomic<bool>& stop)
      : options_(options),
        vocab_(model.vocab_size),
        stop_(stop),
        random_(options.seed * 1'000'003 + stream),
        session_(create_session(context)) {}

  // cold: clients that have not had an answer yet.
  void ask_until_stopped(const std::vector<int32_t>& prefix, std::atomic<int32_t>* cold) {
    std::exponential_distribution<double> think(1.0);
    std::uniform_real_distribution<double> uniform(0, 1);
    for (int32_t i = 0; !stop_; ++i) {
      std::vector<int32_t> prompt = prefix;
      const std::vector<int32_t> tail = random_tokens(random_, vocab_, options_.tail_tokens);
      prompt.insert(prompt.end(), tail.begin(), tail.end());
      const bool cancel = uniform(random_) * 100 < options_.cancel_percent;
      const auto keep = static_cast<uint64_t>(uniform(random_) * options_.answer_tokens);
      run(prompt, DSV3_PRIORITY_INTERACTIVE, options_.answer_tokens, cancel, keep);
      if (i == 0) {
        load = {};
        --*cold;
        wait_for(*cold);
      }
      pause(think(random_) * options_.think_ms);
    }
  }

  void work_until_stopped(const std::atomic<int32_t>& cold) {
    wait_for(cold);
    while (!stop_) {
      const bool done = run(random_tokens(random_, vocab_, options_.job_tokens),
                            DSV3_PRIORITY_BACKGROUND, options_.job_tokens, false, 0);
      load.jobs += done ? 1 : 0;
    }
  }

  Load load;

 private:
  void wait_for(const std::atomic<int32_t>& cold) const {
    while (cold > 0 && !stop_) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }

  void pause(double ms) const {
    const auto begin = Clock::now();
    while (!stop_ && ms_since(begin) < ms) {
      std::this_thread::sleep_for(
          std::chrono::duration<double, std::milli>(std::min(5.0, ms - ms_since(begin) + 0.01)));
    }
  }

  // Whether the request came to its own end.
  bool run(const std::vector<int32_t>& prompt, int32_t priority, int32_t answer, bool cancel,
           uint64_t keep) {
    const bool client = priority == DSV3_PRIORITY_INTERACTIVE;
    dsv3_request_options options;
    dsv3_request_options_init(&options, sizeof options);
    options.priority = priority;
    options.max_tokens = static_cast<uint64_t>(answer);
    options.ignore_eos = 1;
    const auto begin = Clock::now();
    call([&](dsv3_error** e) {
      return dsv3_session_append_tokens(session_.get(), prompt.data(), prompt.size(),
                                        DSV3_APPEND_REPLACE, nullptr, nullptr, e);
    });
    dsv3_request* started = nullptr;
    call([&](dsv3_error** e) { return dsv3_request_start(session_.get(), &options, &started, e); });
    const Request request(started);
    if (client) ++load.questions;
    uint64_t tokens = 0;
    Clock::time_point last = begin, cancelled;
    bool dropped = false;
    for (;;) {
      if (!dropped && (stop_ || (cancel && tokens >= keep))) {
        dropped = true;
        cancelled = Clock::now();
        dsv3_request_cancel(request.get());
      }
      dsv3_event event;
      event.struct_size = sizeof event;
      call([&](dsv3_error** e) {
        return dsv3_request_next(request.get(), DSV3_WAIT_FOREVER, &event, e);
      });
      if (event.kind == DSV3_EVENT_FINISHED) {
        return finish(event, client, dropped ? ms_since(cancelled) : 0);
      }
      if (event.token_count == 0) continue;
      const double ms = std::chrono::duration<double, std::milli>(Clock::now() - last).count();
      last = Clock::now();
      if (client && !dropped)
        (tokens == 0 ? load.first_token_ms : load.between_tokens_ms).push_back(ms);
      tokens += event.token_count;
      (client ? load.client_tokens : load.background_tokens) += event.token_count;
    }
  }

  bool finish(const dsv3_event& event, bool client, double cancel_ms) {
    if (event.finish_reason == DSV3_FINISH_CANCELLED) {
      if (client && !stop_) {
        ++load.cancelled;
        load.cancel_ms.push_back(cancel_ms);
      }
      return false;
    }
    if (event.finish_reason == DSV3_FINISH_ERROR) {
      if (event.error_retryable == 0) throw Failure(event.error_message, event.status);
      ++load.refused;
      pause(20);
      return false;
    }
    if (!client) return true;
    load.prompt_tokens += event.statistics->prompt_tokens;
    load.cached_tokens += event.statistics->cached_tokens;
    return true;
  }

  const LoadOptions& options_;
  const int32_t vocab_;
  const std::atomic<bool>& stop_;
  Random random_;
  const Session session_;
};

dsv3_context_statistics statistics_of(dsv3_context* context) {
  dsv3_context_statistics out;
  out.struct_size = sizeof out;
  call([&](dsv3_error** e) { return dsv3_context_get_statistics(context, &out, e); });
  return out;
}

}  // namespace

double percentile(std::vector<double> values, double percent) {
  if (values.empty()) return 0;
  const double rank = std::ceil(percent / 100 * static_cast<double>(values.size()));
  const auto at = static_cast<std::ptrdiff_t>(std::max(rank, 1.0)) - 1;
  std::nth_element(values.begin(), values.begin() + at, values.end());
  return values[static_cast<size_t>(at)];
}

void Load::add(const Load& o) {
  const auto append = [](std::vector<double>& to, const std::vector<double>& from) {
    to.insert(to.end(), from.begin(), from.end());
  };
  append(first_token_ms, o.first_token_ms);
  append(between_tokens_ms, o.between_tokens_ms);
  append(cancel_ms, o.cancel_ms);
  questions += o.questions;
  cancelled += o.cancelled;
  jobs += o.jobs;
  client_tokens += o.client_tokens;
  background_tokens += o.background_tokens;
  prompt_tokens += o.prompt_tokens;
  cached_tokens += o.cached_tokens;
  refused += o.refused;
}

Load run_load(dsv3_context* context, const dsv3_model_info& model, const LoadOptions& options,
              const Interrupt& interrupt) {
  std::atomic<bool> stop{false};
  Random random(options.seed);
  const std::vector<int32_t> prefix =
      random_tokens(random, model.vocab_size, options.prefix_tokens);
  std::vector<std::unique_ptr<Worker>> workers;
  const int32_t count = options.clients + options.background;
  for (int32_t i = 0; i < count; ++i) {
    workers.push_back(std::make_unique<Worker>(
        context, model, options, options.first_stream + static_cast<uint64_t>(i) + 1, stop));
  }
  std::mutex mutex;
  std::exception_ptr failure;
  std::vector<std::thread> threads;
  std::atomic<int32_t> cold{options.clients};
  Load total;
  {
    struct Joiner {
      std::atomic<bool>& stop;
      std::vector<std::thread>& threads;
      ~Joiner() {
        stop = true;
        for (std::thread& thread : threads) thread.join();
      }
    } joiner{stop, threads};
    for (int32_t i = 0; i < count; ++i) {
      threads.emplace_back([&, i] {
        Worker& worker = *workers[static_cast<size_t>(i)];
        try {
          if (i < options.clients) {
            worker.ask_until_stopped(prefix, &cold);
          } else {
            worker.work_until_stopped(cold);
          }
        } catch (...) {
          const std::lock_guard lock(mutex);
          if (failure == nullptr) failure = std::current_exception();
          stop = true;
        }
      });
    }
    while (!stop && cold > 0 && !interrupt.is_set()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    const Stopwatch watch;
    while (!stop && watch.seconds() < options.seconds && !interrupt.is_set()) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    total.seconds = watch.seconds();
  }
  if (failure != nullptr) std::rethrow_exception(failure);
  for (const auto& worker : workers) total.add(worker->load);
  const dsv3_context_statistics statistics = statistics_of(context);
  total.pages_high_water = statistics.pages_high_water;
  total.pages = statistics.pages;
  return total;
}

}  // namespace cli
