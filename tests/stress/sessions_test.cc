// Eight threads do everything to 64 sessions of one context at random: append, truncate, fork, save
// and load (through memory and through files), generate (of all priorities, with and without
// sampling, along references that are right, wrong or both by turns), evaluate, complete, cancel,
// hand over to another thread, free, all under a twentieth of the pages they would like, beside a
// disk cache that holds fewer still. Whatever they do, every session is a prefix of one of a few
// sequences, which a request continues in one way only, and each was computed before, alone in a
// context without a prefix cache: a wrong latent, token, log-probability or page shows. Pool,
// tables and prefix index are checked all the while.
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

#include "runtime/api/handles.h"
#include "tests/api/api_support.h"

using namespace dsv3::test;  // NOLINT

namespace {

constexpr size_t kLength = 300;
constexpr int kThreads = 8;
constexpr size_t kSessionsPerThread = 8;
constexpr size_t kSequences = 16;
constexpr uint64_t kBudgetPages = 16;  // of the 320 that 64 sessions of 300 tokens would fill
constexpr uint64_t kDiskPages = 12;

// One sequence in two is sampled.
dsv3_request_options sampling(size_t sequence, uint64_t max_tokens) {
  dsv3_request_options options = request_options();
  options.temperature = sequence % 2 == 0 ? 1.0F : 0.0F;
  options.seed = 11;
  options.ignore_eos = 1;
  options.logprobs = 0;
  options.max_tokens = max_tokens;
  return options;
}

class Stress {
 public:
  Stress() {
    const ContextHandle alone =
        make_context(model_.get(), {.prefill_chunk = 32, .prefix_cache = 0});
    for (size_t i = 0; i < kSequences; ++i) {
      Sequence s;
      const SessionHandle session = make_session(alone.get());
      append(session.get(), {100 + static_cast<int32_t>(i), 200, 300});
      generate(session.get(), sampling(i, kLength - 3));
      s.tokens = tokens_of(session.get());
      s.logprobs.resize(kLength - 1);
      dsv3_evaluation e;
      dsv3_evaluation_init(&e, sizeof e);
      e.logprobs = s.logprobs.data();
      const SessionHandle other = make_session(alone.get());
      if (dsv3_session_evaluate(other.get(), s.tokens.data(), kLength, &e, nullptr) != DSV3_OK) {
        throw std::runtime_error("evaluate failed");
      }
      sequences_.push_back(std::move(s));
    }
    dsv3_context_info info;
    info.struct_size = sizeof info;
    dsv3_context_get_info(alone.get(), &info, nullptr);
    context_ = make_context(model_.get(), {.threads = 2,
                                           .prefill_chunk = 48,
                                           .cache_bytes = kBudgetPages * info.page_bytes,
                                           .disk_cache_dir = disk_.path().c_str(),
                                           .disk_cache_bytes = kDiskPages * info.page_bytes});
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
            capacity_errors_.load(), ", cancelled ", cancelled_.load(), ", loaded ",
            loaded_.load());
    dsv3_context_statistics s;
    s.struct_size = sizeof s;
    REQUIRE(dsv3_context_get_statistics(context_.get(), &s, nullptr) == DSV3_OK);
    MESSAGE("steps ", s.steps, " (abandoned ", s.steps_abandoned, "), prefix hits ", s.prefix_hits,
            ", evictions ", s.evictions, ", sessions dropped ", s.sessions_dropped,
            ", preemptions ", s.preemptions, ", refusals ", s.refusals, ", high water ",
            s.pages_high_water, " of ", s.pages, ", drafted ", s.drafted_tokens, " (accepted ",
            s.accepted_tokens, ")");
    CHECK(s.pages_high_water <= kBudgetPages);
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
    check_pages();
  }

 private:
  struct Sequence {
    std::vector<int32_t> tokens;
    std::vector<float> logprobs;  // of token i + 1 after token i
  };
  // A session, and the sequence that it is a prefix of.
  struct Member {
    SessionHandle handle;
    size_t sequence = 0;
    dsv3_session* get() const { return handle.get(); }
  };

  void check_pages() {
    const dsv3::Status status = context_->engine->check_pages();
    if (!status.ok()) throw std::runtime_error(status.message());
  }
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

  void check_prefix(const Member& member) {
    dsv3_session* session = member.get();
    const std::vector<int32_t> tokens = tokens_of(session);
    const std::vector<int32_t>& sequence_ = sequences_[member.sequence].tokens;
    require(tokens.size() <= kLength, "a session is too long");
    require(std::equal(tokens.begin(), tokens.end(), sequence_.begin()),
            "a session left the sequence");
    require(dsv3_session_computed(session) <= tokens.size(), "computed beyond the length");
  }

  void generate_some(const Member& member, std::mt19937& random) {
    dsv3_session* session = member.get();
    const auto& [sequence_, logprobs_] = sequences_[member.sequence];
    const uint64_t length = dsv3_session_length(session);
    if (length < 3 || length >= kLength) return;
    const uint64_t most = kLength - length;
    dsv3_request_options options =
        sampling(member.sequence, 1 + random() % std::min<uint64_t>(most, 40));
    options.speculation = static_cast<int32_t>(random() % 3);
    options.priority = static_cast<int32_t>(random() % 3);
    options.max_queued_events = 1 + random() % 8;
    std::vector<int32_t> reference;
    if (random() % 3 == 0) {
      reference = sequences_[random() % 2 == 0 ? member.sequence : random() % kSequences].tokens;
      for (int i = 0; i < 4; ++i) reference[random() % reference.size()] = 400;
      options.reference_tokens = reference.data();
      options.reference_token_count = reference.size();
    }
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

  void evaluate_some(const Member& member, std::mt19937& random) {
    dsv3_session* session = member.get();
    const auto& [sequence_, logprobs_] = sequences_[member.sequence];
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

  void save_and_load(Member* member, const std::string& path) {
    dsv3_session_io io;
    dsv3_session_io_init(&io, sizeof io);
    io.path = path.c_str();
    Error error;
    if (!accept(dsv3_session_save(member->get(), &io, error.out()), error)) return;
    dsv3_session* loaded = nullptr;
    if (!accept(dsv3_session_load(context_.get(), &io, &loaded, error.out()), error)) return;
    member->handle.reset(loaded);
    ++loaded_;
  }

  void save_and_load_in_memory(Member* member) {
    std::string bytes;
    dsv3_session_io io;
    dsv3_session_io_init(&io, sizeof io);
    io.user = &bytes;
    io.write = [](void* user, const void* data, uint64_t size) -> int32_t {
      static_cast<std::string*>(user)->append(static_cast<const char*>(data), size);
      return 0;
    };
    Error error;
    if (!accept(dsv3_session_save(member->get(), &io, error.out()), error)) return;
    struct Reader {
      const std::string* bytes;
      size_t at = 0;
    } reader{&bytes};
    dsv3_session_io_init(&io, sizeof io);
    io.user = &reader;
    io.read = [](void* user, void* data, uint64_t size) -> int32_t {
      auto* r = static_cast<Reader*>(user);
      if (size > r->bytes->size() - r->at) return 1;
      std::memcpy(data, r->bytes->data() + r->at, size);
      r->at += size;
      return 0;
    };
    dsv3_session* loaded = nullptr;
    if (!accept(dsv3_session_load(context_.get(), &io, &loaded, error.out()), error)) return;
    member->handle.reset(loaded);
    ++loaded_;
  }

  void append_some(const Member& member, std::mt19937& random) {
    dsv3_session* session = member.get();
    const std::vector<int32_t>& sequence_ = sequences_[member.sequence].tokens;
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
    std::vector<Member> sessions;
    while (!stop_ && std::chrono::steady_clock::now() < end) {
      ++operations_;
      if (sessions.empty() || (sessions.size() < kSessionsPerThread && random() % 4 == 0)) {
        sessions.push_back({make_session(context_.get()), random() % kSequences});
      }
      const size_t at = random() % sessions.size();
      Member& session = sessions[at];
      if (random() % 16 == 0) check_pages();
      switch (random() % 12) {
        case 0:
        case 1:
          append_some(session, random);
          break;
        case 2: {
          Error error;
          const uint64_t length = dsv3_session_length(session.get());
          accept(dsv3_session_truncate(session.get(), random() % (length + 1), error.out()), error);
          break;
        }
        case 3:
          if (sessions.size() < kSessionsPerThread) {
            sessions.push_back({fork_session(session.get()), session.sequence});
          }
          continue;
        case 8:
          if (random() % 2 == 0) {
            save_and_load_in_memory(&session);
          } else {
            save_and_load(&session, files_.file(std::to_string(seed)));
          }
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
  const TemporaryFolder disk_, files_;
  ContextHandle context_;
  std::vector<Sequence> sequences_;
  std::mutex mutex_;
  std::vector<Member> handed_over_;
  std::string failure_, completed_;
  std::atomic<bool> stop_{false};
  std::atomic<uint64_t> operations_{0}, generated_{0}, capacity_errors_{0}, cancelled_{0},
      loaded_{0};
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
        const RequestHandle request = start(session.get(), sampling(0, 200));
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
