// Eight threads do everything to sessions of one context at random: append, truncate, fork,
// generate, evaluate, complete, cancel, hand over to another thread, free, all under a page budget
// that does not suffice. Whatever they do, every session is a prefix of one sequence, which
// sampling with a fixed seed continues in one way only: a wrong latent, token or page shows.
//
// Seconds: DSV3_STRESS_SECONDS (default 3). Meant to be run under TSan and ASan too.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <thread>

#include "tests/api/api_support.h"

using namespace dsv3::test;  // NOLINT

namespace {

constexpr size_t kLength = 300;
constexpr int kThreads = 8;
constexpr uint64_t kBudgetPages = 26;

dsv3_request_options sampling(uint64_t max_tokens) {
  dsv3_request_options options = request_options();
  options.temperature = 1;
  options.seed = 11;
  options.ignore_eos = 1;
  options.logprobs = 0;
  options.max_tokens = max_tokens;
  return options;
}

class Stress {
 public:
  Stress() {
    const ContextHandle alone = make_context(model_.get(), {.prefill_chunk = 32});
    const SessionHandle session = make_session(alone.get());
    append(session.get(), {100, 200, 300});
    generate(session.get(), sampling(kLength - 3));
    sequence_ = tokens_of(session.get());
    logprobs_.resize(kLength - 1);
    dsv3_evaluation e;
    dsv3_evaluation_init(&e, sizeof e);
    e.logprobs = logprobs_.data();
    const SessionHandle other = make_session(alone.get());
    if (dsv3_session_evaluate(other.get(), sequence_.data(), kLength, &e, nullptr) != DSV3_OK) {
      throw std::runtime_error("evaluate failed");
    }
    dsv3_context_info info;
    info.struct_size = sizeof info;
    dsv3_context_get_info(alone.get(), &info, nullptr);
    context_ = make_context(
        model_.get(),
        {.threads = 2, .prefill_chunk = 48, .cache_bytes = kBudgetPages * info.page_bytes});
  }

  void run(std::chrono::seconds duration) {
    const auto end = std::chrono::steady_clock::now() + duration;
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back([this, i, end] {
        try {
          worker(static_cast<uint32_t>(i), end);
        } catch (const std::exception& e) {
          fail(e.what());
        }
      });
    }
    for (std::thread& t : threads) t.join();
    handed_over_.clear();
    CHECK_MESSAGE(failure_.empty(), failure_);
    CHECK(generated_ > 0);
    MESSAGE("operations ", operations_.load(), ", tokens ", generated_.load(), ", capacity errors ",
            capacity_errors_.load(), ", cancelled ", cancelled_.load());
    // Everything is given back, what the shared completion keeps aside.
    dsv3_context_info info;
    info.struct_size = sizeof info;
    for (int i = 0; i < 2000; ++i) {
      REQUIRE(dsv3_context_get_info(context_.get(), &info, nullptr) == DSV3_OK);
      if (info.requests_running + info.requests_waiting == 0 && info.sessions <= 1) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    CHECK(info.requests_running + info.requests_waiting == 0);
    CHECK(info.sessions <= 1);
    CHECK(info.pages_used <= 2);
  }

 private:
  void fail(const std::string& what) {
    const std::lock_guard lock(mutex_);
    if (failure_.empty()) failure_ = what;
    stop_ = true;
  }
  void require(bool condition, const char* what) {
    if (!condition) throw std::runtime_error(what);
  }
  // Errors of a full pool are part of the game; anything else is not.
  bool accept(dsv3_status status, const Error& error) {
    if (status == DSV3_OK) return true;
    if (status != DSV3_E_CAPACITY) throw std::runtime_error(error.message());
    ++capacity_errors_;
    return false;
  }

  void check_prefix(dsv3_session* session) {
    const std::vector<int32_t> tokens = tokens_of(session);
    require(tokens.size() <= kLength, "a session is too long");
    require(std::equal(tokens.begin(), tokens.end(), sequence_.begin()),
            "a session left the sequence");
    require(dsv3_session_computed(session) <= tokens.size(), "computed beyond the length");
  }

  void generate_some(dsv3_session* session, std::mt19937& random) {
    const uint64_t length = dsv3_session_length(session);
    if (length < 3 || length >= kLength) return;
    const uint64_t most = kLength - length;
    dsv3_request_options options = sampling(1 + random() % std::min<uint64_t>(most, 40));
    options.priority = static_cast<int32_t>(random() % 3);
    options.max_queued_events = 1 + random() % 8;
    const CancelHandle cancel = make_cancel();
    options.cancel = cancel.get();
    if (random() % 4 == 0) options.deadline_ms = 1 + random() % 20;
    dsv3_request* raw = nullptr;
    Error error;
    if (!accept(dsv3_request_start(session, &options, &raw, error.out()), error)) return;
    RequestHandle request(raw);
    switch (random() % 6) {
      case 0:
        dsv3_cancel_set(cancel.get());
        break;
      case 1:
        dsv3_request_cancel(request.get());
        break;
      case 2: {  // freed in the middle; the session is used at once
        dsv3_event event;
        event.struct_size = sizeof event;
        (void)dsv3_request_next(request.get(), random() % 3, &event, nullptr);
        return;
      }
      default:
        break;
    }
    const Outcome outcome = finish(request.get());
    for (size_t i = 0; i < outcome.tokens.size(); ++i) {
      require(outcome.tokens[i] == sequence_[length + i], "a token is wrong");
      require(std::memcmp(&outcome.logprobs[i], &logprobs_[length + i - 1], 4) == 0,
              "a log-probability's bits are wrong");
    }
    generated_ += outcome.tokens.size();
    if (outcome.reason == DSV3_FINISH_CANCELLED) ++cancelled_;
    if (outcome.reason == DSV3_FINISH_ERROR) {
      require(outcome.status == DSV3_E_CAPACITY, outcome.error_message.c_str());
      ++capacity_errors_;
    }
    require(dsv3_session_length(session) == length + outcome.tokens.size(), "a length is wrong");
  }

  void evaluate_some(dsv3_session* session, std::mt19937& random) {
    const uint64_t length = dsv3_session_length(session);
    const uint64_t count = random() % 60 + 1;
    if (length + count > kLength) return;
    std::vector<float> logprobs(count);
    dsv3_evaluation e;
    dsv3_evaluation_init(&e, sizeof e);
    e.logprobs = logprobs.data();
    Error error;
    if (!accept(dsv3_session_evaluate(session, sequence_.data() + length, count, &e, error.out()),
                error)) {
      return;
    }
    require(
        count < 2 || std::memcmp(logprobs.data(), logprobs_.data() + length, (count - 1) * 4) == 0,
        "an evaluation's bits are wrong");
  }

  void append_some(dsv3_session* session, std::mt19937& random) {
    const uint64_t length = dsv3_session_length(session);
    const uint64_t wanted = random() % (kLength - 20) + 1;
    Error error;
    dsv3_status status = DSV3_OK;
    if (random() % 2 == 0) {
      status = dsv3_session_append_tokens(session, sequence_.data(), wanted, DSV3_APPEND_REPLACE,
                                          nullptr, nullptr, error.out());
    } else if (length < wanted) {
      status = dsv3_session_append_tokens(session, sequence_.data() + length, wanted - length, 0,
                                          nullptr, nullptr, error.out());
    }
    accept(status, error);
  }

  void complete_some(std::mt19937& random) {
    dsv3_request_options options = request_options();
    options.max_tokens = 4;
    if (random() % 2 == 0) options.deadline_ms = 1 + random() % 10;
    char* text = nullptr;
    Error error;
    const dsv3_status status = dsv3_complete(context_.get(), "import os\n", DSV3_NUL_TERMINATED,
                                             nullptr, 0, &options, &text, nullptr, error.out());
    if (status == DSV3_OK) {
      const std::lock_guard lock(mutex_);
      if (completed_.empty()) completed_ = text;
      require(completed_ == text, "a completion differs");
    } else if (status != DSV3_E_DEADLINE) {
      accept(status, error);
    }
    dsv3_string_free(text);
  }

  void worker(uint32_t seed, std::chrono::steady_clock::time_point end) {
    std::mt19937 random(seed);
    std::vector<SessionHandle> sessions;
    while (!stop_ && std::chrono::steady_clock::now() < end) {
      ++operations_;
      if (sessions.empty()) sessions.push_back(make_session(context_.get()));
      const size_t at = random() % sessions.size();
      dsv3_session* session = sessions[at].get();
      switch (random() % 10) {
        case 0:
        case 1:
          append_some(session, random);
          break;
        case 2: {
          Error error;
          const uint64_t length = dsv3_session_length(session);
          accept(dsv3_session_truncate(session, random() % (length + 1), error.out()), error);
          break;
        }
        case 3:
          if (sessions.size() < 4) sessions.push_back(fork_session(session));
          break;
        case 4:
          evaluate_some(session, random);
          break;
        case 5:
          complete_some(random);
          break;
        case 6: {  // to another thread, and from one
          const std::lock_guard lock(mutex_);
          handed_over_.push_back(std::move(sessions[at]));
          sessions.erase(sessions.begin() + static_cast<std::ptrdiff_t>(at));
          if (handed_over_.size() > 4) {
            sessions.push_back(std::move(handed_over_.front()));
            handed_over_.erase(handed_over_.begin());
          }
          continue;
        }
        case 7:
          sessions.erase(sessions.begin() + static_cast<std::ptrdiff_t>(at));
          continue;
        default:
          generate_some(session, random);
          break;
      }
      check_prefix(session);
    }
  }

  const ModelHandle model_ = open_model();
  ContextHandle context_;
  std::vector<int32_t> sequence_;
  std::vector<float> logprobs_;
  std::mutex mutex_;
  std::vector<SessionHandle> handed_over_;
  std::string failure_, completed_;
  std::atomic<bool> stop_{false};
  std::atomic<uint64_t> operations_{0}, generated_{0}, capacity_errors_{0}, cancelled_{0};
};

}  // namespace

TEST_CASE("sessions under stress") {
  const char* seconds = std::getenv("DSV3_STRESS_SECONDS");
  Stress stress;
  stress.run(std::chrono::seconds(seconds == nullptr ? 3 : std::atoi(seconds)));
}

TEST_CASE("contexts come and go while others work") {
  const ModelHandle model = open_model();
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 6; ++round) {
        ContextHandle context = make_context(model.get());
        const SessionHandle session = make_session(context.get());
        append(session.get(), {100, 200, 300});
        const RequestHandle request = start(session.get(), sampling(200));
        dsv3_event event;
        event.struct_size = sizeof event;
        (void)dsv3_request_next(request.get(), 5, &event, nullptr);
        if (round % 2 == 0) context.reset();
        const Outcome outcome = finish(request.get());
        const bool cancelled = outcome.reason == DSV3_FINISH_CANCELLED;
        if (!cancelled && outcome.reason != DSV3_FINISH_MAX_TOKENS) ++wrong;
      }
    });
  }
  for (std::thread& t : threads) t.join();
  CHECK(wrong == 0);
}
