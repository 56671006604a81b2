// Handles: freed in any order, on any thread, in callbacks, in a child process.
#include <dirent.h>
#include <doctest/doctest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <csignal>
#include <filesystem>
#include <fstream>
#include <functional>
#include <set>
#include <thread>

#include "tests/api/api_support.h"

using namespace dsv3::test;  // NOLINT

namespace {

struct Handles {
  ModelHandle model = open_model();
  ContextHandle context = make_context(model.get());
  SessionHandle session = make_session(context.get());
  RequestHandle request;
  explicit Handles(uint64_t max_tokens = 1500) {
    append(session.get(), {5, 6, 7, 8});
    dsv3_request_options options = request_options();
    options.max_tokens = max_tokens;
    options.ignore_eos = 1;
    options.max_queued_events = 4096;
    request = start(session.get(), options);
  }
};

int open_threads() {
  int count = 0;
  DIR* dir = opendir("/proc/self/task");
  while (const dirent* entry = readdir(dir)) count += entry->d_name[0] != '.' ? 1 : 0;
  closedir(dir);
  return count;
}

}  // namespace

TEST_CASE("handles are freed in every order") {
  std::array<int, 4> order = {0, 1, 2, 3};
  { const Handles once; }  // a sanitizer starts a thread of its own with the first
  const int threads_before = open_threads();
  do {
    Handles h;
    for (const int which : order) {
      if (which == 0) h.model.reset();
      if (which == 1) h.context.reset();
      if (which == 2) h.session.reset();
      if (which == 3) h.request.reset();
    }
  } while (std::next_permutation(order.begin(), order.end()));
  for (int i = 0; i < 2000 && open_threads() > threads_before; ++i) usleep(1000);
  CHECK(open_threads() == threads_before);
}

TEST_CASE("a completion's notify does not run once the call has returned") {
  const ModelHandle model = open_model();
  const ContextHandle context = make_context(model.get());
  struct Host {
    std::atomic<bool> returned{false};
    std::atomic<int> late{0};
  } host;
  dsv3_request_options options = request_options();
  options.max_tokens = 1;
  options.notify_user = &host;
  options.notify = [](void* user) {
    usleep(20'000);
    auto* h = static_cast<Host*>(user);
    if (h->returned) ++h->late;
  };
  for (int i = 0; i < 3; ++i) {
    host.returned = false;
    char* text = nullptr;
    REQUIRE(dsv3_complete(context.get(), "a", 1, nullptr, 0, &options, &text, nullptr, nullptr) ==
            DSV3_OK);
    host.returned = true;
    dsv3_string_free(text);
    usleep(30'000);
  }
  CHECK(host.late == 0);
}

TEST_CASE("a context may be freed while a completion runs, by its notify too") {
  const ModelHandle model = open_model();
  dsv3_request_options options = request_options();
  options.max_tokens = 400;
  options.ignore_eos = 1;
  for (int i = 0; i < 10; ++i) {
    for (const bool inside : {false, true}) {
      dsv3_context* context = make_context(model.get(), {.threads = 1}).release();
      std::thread other;
      options.notify = nullptr;
      if (inside) {
        options.max_tokens = 2;
        options.notify_user = context;
        options.notify = [](void* user) { dsv3_context_free(static_cast<dsv3_context*>(user)); };
      } else {
        options.max_tokens = 400;
        other = std::thread([context] {
          dsv3_context_statistics s;
          do {
            s.struct_size = sizeof s;
          } while (dsv3_context_get_statistics(context, &s, nullptr) == DSV3_OK && s.steps < 3);
          dsv3_context_free(context);
        });
      }
      char* text = nullptr;
      const dsv3_status status =
          dsv3_complete(context, "def", 3, nullptr, 0, &options, &text, nullptr, nullptr);
      // On a busy machine the completion may end before the other thread gets to free.
      CHECK((status == DSV3_OK || (!inside && status == DSV3_E_CANCELLED)));
      dsv3_string_free(text);
      if (other.joinable()) other.join();
    }
  }
}

TEST_CASE("every handle on its own thread at the same time") {
  for (int i = 0; i < 20; ++i) {
    Handles h;
    std::vector<std::thread> threads;
    threads.emplace_back([&] { h.model.reset(); });
    threads.emplace_back([&] { h.context.reset(); });
    threads.emplace_back([&] { h.session.reset(); });
    threads.emplace_back([&] { h.request.reset(); });
    for (std::thread& t : threads) t.join();
  }
}

TEST_CASE("what outlives its context stays valid to ask") {
  Handles h;
  dsv3_event event;
  event.struct_size = sizeof event;
  REQUIRE(dsv3_request_next(h.request.get(), DSV3_WAIT_FOREVER, &event, nullptr) == DSV3_OK);
  h.context.reset();
  h.model.reset();
  const Outcome outcome = finish(h.request.get());
  CHECK(outcome.reason == DSV3_FINISH_CANCELLED);
  CHECK(dsv3_session_length(h.session.get()) == 4 + outcome.tokens.size());
  CHECK(tokens_of(h.session.get()).size() == 4 + outcome.tokens.size());
  const SessionHandle copy = fork_session(h.session.get());
  CHECK(dsv3_session_length(copy.get()) == dsv3_session_length(h.session.get()));
  Error error;
  CHECK(dsv3_session_truncate(copy.get(), 2, error.out()) == DSV3_OK);
  dsv3_request* request = nullptr;
  CHECK(dsv3_request_start(copy.get(), nullptr, &request, error.out()) == DSV3_E_CANCELLED);
  const int32_t token = 3;
  CHECK(dsv3_session_evaluate(copy.get(), &token, 1, nullptr, error.out()) == DSV3_E_CANCELLED);
  CHECK(dsv3_session_length(copy.get()) == 2);
}

TEST_CASE("cancel, free and deadline at once: exactly one final event") {
  const ModelHandle model = open_model();
  const ContextHandle context = make_context(model.get());
  for (int i = 0; i < 60; ++i) {
    const SessionHandle session = make_session(context.get());
    append(session.get(), {5, 6, 7, 8});
    const CancelHandle cancel = make_cancel();
    dsv3_request_options options = request_options();
    options.max_tokens = static_cast<uint64_t>(i % 7 + 1);
    options.ignore_eos = 1;
    options.deadline_ms = 1 + static_cast<uint64_t>(i) % 3;
    options.cancel = cancel.get();
    const RequestHandle request = start(session.get(), options);
    std::thread a([&] { dsv3_cancel_set(cancel.get()); });
    std::thread b([&] { dsv3_request_cancel(request.get()); });
    const Outcome outcome = finish(request.get());  // throws when anything follows FINISHED
    a.join();
    b.join();
    CHECK(outcome.reason != 0);
    CHECK(dsv3_session_length(session.get()) == 4 + outcome.tokens.size());
  }
}

TEST_CASE("the child of a fork is told so, and can free what it inherited") {
  Handles h;
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(20);  // a hang is a failure
    int failures = 0;
    const auto expect = [&](dsv3_status status) { failures += status == DSV3_E_FORKED ? 0 : 1; };
    dsv3_session* session = nullptr;
    dsv3_request* request = nullptr;
    dsv3_event event;
    event.struct_size = sizeof event;
    const int32_t token = 5;
    char* text = nullptr;
    expect(dsv3_session_create(h.context.get(), &session, nullptr));
    expect(dsv3_session_append_tokens(h.session.get(), &token, 1, 0, nullptr, nullptr, nullptr));
    expect(dsv3_session_truncate(h.session.get(), 0, nullptr));
    expect(dsv3_session_fork(h.session.get(), &session, nullptr));
    expect(dsv3_session_evaluate(h.session.get(), &token, 1, nullptr, nullptr));
    expect(dsv3_request_start(h.session.get(), nullptr, &request, nullptr));
    expect(dsv3_request_next(h.request.get(), DSV3_WAIT_FOREVER, &event, nullptr));
    expect(dsv3_complete(h.context.get(), "a", 1, nullptr, 0, nullptr, &text, nullptr, nullptr));
    dsv3_request_cancel(h.request.get());
    failures += dsv3_session_length(h.session.get()) >= 4 ? 0 : 1;
    h.request.reset();
    h.session.reset();
    h.context.reset();
    h.model.reset();
    _exit(failures);
  }
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

TEST_CASE("freed and foreign handles are told where that can be told") {
  Error error;
  const CancelHandle cancel = make_cancel();
  dsv3_model_info info;
  info.struct_size = sizeof info;
  CHECK(dsv3_model_get_info(reinterpret_cast<const dsv3_model*>(cancel.get()), &info,
                            error.out()) == DSV3_E_INVALID_ARGUMENT);
  CHECK(error.field() == "model");
  dsv3_model_free(reinterpret_cast<dsv3_model*>(cancel.get()));  // ignored
  CHECK(dsv3_cancel_is_set(cancel.get()) == 0);
}

TEST_CASE("the library's threads block all signals") {
  static volatile std::sig_atomic_t on_library_thread = 0;
  static const pid_t main_thread = gettid();
  struct sigaction action = {};
  action.sa_handler = [](int) {
    if (gettid() != main_thread) on_library_thread = 1;
  };
  struct sigaction before;
  sigaction(SIGUSR1, &action, &before);
  const Handles h;
  for (int i = 0; i < 200; ++i) kill(getpid(), SIGUSR1);
  sigaction(SIGUSR1, &before, nullptr);
  CHECK(on_library_thread == 0);
}

namespace {
// The library's threads, by their folders in /proc.
std::set<std::filesystem::path> library_threads() {
  std::set<std::filesystem::path> found;
  for (const auto& entry : std::filesystem::directory_iterator("/proc/self/task")) {
    std::string name;
    std::ifstream comm(entry.path() / "comm");
    if (std::getline(comm, name) && name.starts_with("dsv3-")) found.insert(entry.path());
  }
  return found;
}
}  // namespace

TEST_CASE("pinned: every thread that computes, the engine's own too") {
  const std::set<std::filesystem::path> before = library_threads();
  const ModelHandle model = open_model();
  dsv3_context_options options;
  dsv3_context_options_init(&options, sizeof options);
  options.pin_threads = 1;
  options.threads = 2;
  dsv3_context* context = nullptr;
  REQUIRE(dsv3_context_create(model.get(), &options, &context, nullptr) == DSV3_OK);
  const ContextHandle keep(context);
  const SessionHandle session = make_session(context);
  append(session.get(), {5, 6, 7, 8});
  (void)generate(session.get(), request_options());
  const auto pinned = [&] {
    int count = 0;
    for (const std::filesystem::path& thread : library_threads()) {
      if (before.contains(thread)) continue;
      std::ifstream status(thread / "status");
      for (std::string line; std::getline(status, line);) {
        if (!line.starts_with("Cpus_allowed_list:")) continue;
        count += line.find_first_of(",-", line.find('\t')) == std::string::npos ? 1 : 0;
      }
    }
    return count;
  };
  // A thread pins itself when it first runs, which on a busy machine may be later.
  for (int i = 0; i < 5000 && pinned() < 2; ++i) usleep(1000);
  CHECK(pinned() == 2);
}

TEST_CASE("two engines whose callbacks free each other's contexts wait for nobody") {
  static std::atomic<int> arrived;
  arrived = 0;
  struct Side {
    ModelHandle model = open_model();
    dsv3_context* context = make_context(model.get()).release();
    SessionHandle session = make_session(context);
    dsv3_context* other = nullptr;
    std::atomic<bool> called{false};
    static void notify(void* user) {
      auto* self = static_cast<Side*>(user);
      if (self->called.exchange(true)) return;
      ++arrived;
      for (int i = 0; i < 10000 && arrived < 2; ++i) usleep(1000);
      dsv3_context_free(self->other);  // carried out on this engine's thread, after the callback
    }
  };
  alarm(60);  // a hang is a failure
  for (int round = 0; round < 5; ++round) {
    arrived = 0;
    Side a, b;
    a.other = b.context;
    b.other = a.context;
    std::vector<RequestHandle> requests;
    for (Side* side : {&a, &b}) {
      append(side->session.get(), {5, 6, 7, 8});
      dsv3_request_options options = request_options();
      options.max_tokens = 500;
      options.ignore_eos = 1;
      options.max_queued_events = 4096;
      options.notify = Side::notify;
      options.notify_user = side;
      requests.push_back(start(side->session.get(), options));
    }
    for (const RequestHandle& request : requests) {
      CHECK(finish(request.get()).reason == DSV3_FINISH_CANCELLED);
    }
    CHECK(arrived == 2);
  }
  alarm(0);
}

TEST_CASE("the child of a fork frees handles whose lock another thread held") {
  Handles h;
  const SessionHandle session = make_session(h.context.get());
  append(session.get(), std::vector<int32_t>(2000, 9));
  std::atomic<bool> stop{false};
  std::thread holder([&] {
    std::vector<int32_t> tokens(2000);
    uint64_t needed = 0;
    while (!stop) {
      dsv3_session_get_tokens(session.get(), 0, tokens.data(), tokens.size(), &needed, nullptr);
    }
  });
  int failures = 0;
  for (int i = 0; i < 40; ++i) {
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      alarm(10);  // a hang is a failure
      h.session.reset();
      h.request.reset();
      h.context.reset();
      _exit(0);
    }
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    failures += WIFEXITED(status) && WEXITSTATUS(status) == 0 ? 0 : 1;
    if (failures > 0) break;
  }
  stop = true;
  holder.join();
  CHECK(failures == 0);
}
