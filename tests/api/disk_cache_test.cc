// Prefixes that outlive the process: a new context starts warm from a directory, with the same
// bits, and whatever happens to the directory costs no more than computing again.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <limits>
#include <thread>

#include "tests/api/outcome_support.h"
#include "tests/api/request_support.h"

using namespace dsv3::test;            // NOLINT
using namespace dsv3::test::requests;  // NOLINT

namespace {

dsv3_request_options answer() {
  dsv3_request_options options = request_options();
  options.max_tokens = 12;
  options.temperature = 0.8f;
  options.seed = 5;
  options.ignore_eos = 1;
  options.logprobs = 0;
  return options;
}

// One life of a process: a context that answers, and is gone with what it had in memory.
Outcome live(const std::string& path, size_t prompt, uint64_t bytes = 0,
             const char* kernels = nullptr) {
  const ModelHandle model = open_model();
  const ContextHandle context =
      make_context(model.get(), {.kernels = kernels,
                                 .prefill_chunk = 64,
                                 .disk_cache_dir = path.empty() ? nullptr : path.c_str(),
                                 .disk_cache_bytes = bytes});
  const SessionHandle session = session_with(prompt, context.get());
  return generate(session.get(), answer());
}

uint64_t bytes_in(const std::string& path) {
  uint64_t sum = 0;
  for (const auto& entry : std::filesystem::directory_iterator(path)) {
    if (entry.path().extension() == ".page") sum += entry.file_size();
  }
  return sum;
}

}  // namespace

TEST_CASE("a new context starts warm, to the same bits") {
  for (const size_t prompt : {64, 128, 500}) {
    CAPTURE(prompt);
    const TemporaryFolder folder;
    const std::string path = folder.file("cache");
    const Outcome alone = live("", prompt);
    const Outcome cold = live(path, prompt);
    check_same(cold, alone);
    CHECK(cold.statistics.cached_tokens == 0);
    const Outcome warm = live(path, prompt);
    check_same(warm, alone);
    CHECK(warm.statistics.cached_tokens == std::min(prompt / 64 * 64, prompt - 1));
    // Longer, shorter and other prompts share what they begin with.
    CHECK(live(path, prompt + 70).statistics.cached_tokens >= prompt / 64 * 64);
    struct stat st;
    REQUIRE(::stat(path.c_str(), &st) == 0);
    CHECK((st.st_mode & 0777) == 0700);
  }
}

TEST_CASE("other kernels compute for themselves") {
  const TemporaryFolder folder;
  const std::string path = folder.file("cache");
  (void)live(path, 200);
  CHECK(live(path, 200, 0, "ref").statistics.cached_tokens == 0);
  CHECK(live(path, 200, 0, "ref").statistics.cached_tokens == 192);
  CHECK(live(path, 200).statistics.cached_tokens == 192);
}

TEST_CASE("damage costs a computation, and purging too") {
  const TemporaryFolder folder;
  const std::string path = folder.file("cache");
  const Outcome good = live(path, 300);
  for (const auto& entry : std::filesystem::directory_iterator(path)) {
    if (entry.path().extension() != ".page") continue;
    std::string bytes = read_bytes(entry.path());
    bytes[bytes.size() / 2] = static_cast<char>(bytes[bytes.size() / 2] ^ 1);
    dsv3::test::write_bytes(entry.path(), bytes);
  }
  const Outcome again = live(path, 300);
  check_same(again, good);
  CHECK(again.statistics.cached_tokens == 0);
  CHECK(live(path, 300).statistics.cached_tokens == 256);
  uint64_t removed = 0;
  Error error;
  REQUIRE(dsv3_disk_cache_purge(path.c_str(), &removed, error.out()) == DSV3_OK);
  CHECK(removed > 0);
  CHECK(bytes_in(path) == 0);
  CHECK(live(path, 300).statistics.cached_tokens == 0);
  // A wrong name is told, and not made.
  CHECK(dsv3_disk_cache_purge(folder.file("wrong").c_str(), &removed, error.out()) ==
        DSV3_E_NOT_FOUND);
  CHECK(!std::filesystem::exists(folder.file("wrong")));
}

TEST_CASE("what a request that failed had computed is kept") {
  const TemporaryFolder folder;
  const std::string path = folder.file("cache");
  {
    const ModelHandle model = open_model();
    const ContextHandle context = make_context(model.get(), {.disk_cache_dir = path.c_str()});
    dsv3_request_options options = answer();
    options.logits_hook = [](void*, float* logits, uint64_t, const int32_t*, uint64_t) {
      logits[0] = std::numeric_limits<float>::quiet_NaN();
    };
    const SessionHandle session = session_with(300, context.get());
    CHECK(generate(session.get(), options).reason == DSV3_FINISH_ERROR);
  }
  CHECK(live(path, 300).statistics.cached_tokens == 256);
}

TEST_CASE("trouble with the disk is told once, and no error of a request") {
  const TemporaryFolder folder;
  const std::string path = folder.file("cache");
  std::atomic<int> warnings{0};
  dsv3_context_options options;
  dsv3_context_options_init(&options, sizeof options);
  options.threads = 1;
  options.disk_cache_dir = path.c_str();
  options.log_user = &warnings;
  options.log = [](void* user, int32_t level, const char* message) {
    if (level == DSV3_LOG_WARNING && std::strstr(message, "cache") != nullptr) {
      ++*static_cast<std::atomic<int>*>(user);
    }
  };
  const ModelHandle model = open_model();
  dsv3_context* raw = nullptr;
  REQUIRE(dsv3_context_create(model.get(), &options, &raw, nullptr) == DSV3_OK);
  ContextHandle context(raw);
  std::filesystem::remove_all(path);
  for (const size_t prompt : {100, 200, 300}) {
    const SessionHandle session = session_with(prompt, context.get());
    CHECK(generate(session.get(), answer()).tokens.size() == 12);
  }
  context.reset();  // all that waits is written, or is not
  CHECK(warnings == 1);
}

TEST_CASE("the budget holds") {
  const TemporaryFolder folder;
  const std::string path = folder.file("cache");
  constexpr uint64_t kBudget = 1 << 20;  // seven pages of tiny-coder
  (void)live(path, 900, kBudget);
  CHECK(bytes_in(path) > 0);
  CHECK(bytes_in(path) <= kBudget);
  const Outcome warm = live(path, 900, kBudget);
  CHECK(warm.statistics.cached_tokens > 0);
  CHECK(warm.statistics.cached_tokens < 896);
}

TEST_CASE("several contexts share a directory, and requests can be cancelled while it is read") {
  const TemporaryFolder folder;
  const std::string path = folder.file("cache");
  const Outcome good = live(path, 400);
  std::vector<std::thread> threads;
  std::vector<Outcome> outcomes(3);
  for (size_t i = 0; i < outcomes.size(); ++i) {
    threads.emplace_back([&, i] { outcomes[i] = live(path, 400); });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Outcome& outcome : outcomes) {
    check_same(outcome, good);
    CHECK(outcome.statistics.cached_tokens == 384);
  }
  const ModelHandle model = open_model();
  const ContextHandle context =
      make_context(model.get(), {.prefill_chunk = 64, .disk_cache_dir = path.c_str()});
  for (int i = 0; i < 30; ++i) {
    const SessionHandle session =
        session_with(400 + static_cast<size_t>(i) % 3 * 64, context.get());
    const RequestHandle request = start(session.get(), answer());
    if (i % 3 == 0) std::this_thread::sleep_for(std::chrono::microseconds(i * 50));
    if (i % 3 != 2) dsv3_request_cancel(request.get());
    const Outcome outcome = finish(request.get());
    CHECK((outcome.reason == DSV3_FINISH_CANCELLED || outcome.reason == DSV3_FINISH_MAX_TOKENS));
  }
}

size_t pages_in(const std::string& path) {
  size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(path)) {
    count += entry.path().extension() == ".page" ? 1 : 0;
  }
  return count;
}

// Holds the lock of a directory, but for moments: pages are written slowly.
class Contender {
 public:
  explicit Contender(const std::string& path)
      : fd_(::open((path + "/.lock").c_str(), O_RDWR | O_CLOEXEC)), thread_([this] {
          while (!done_) {
            ::flock(fd_, LOCK_EX);
            std::this_thread::sleep_for(std::chrono::milliseconds(20));
            ::flock(fd_, LOCK_UN);
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
          }
        }) {}
  ~Contender() {
    done_ = true;
    thread_.join();
    ::close(fd_);
  }

 private:
  const int fd_;
  std::atomic<bool> done_{false};
  std::thread thread_;
};

// How slowly depends on the machine: some attempt shows what has to be seen.
bool is_seen(const std::function<bool(dsv3_model* model, const std::string& path)>& attempt) {
  const ModelHandle model = open_model();
  for (int i = 0; i < 30; ++i) {
    const TemporaryFolder folder;
    if (attempt(model.get(), folder.file("cache"))) return true;
  }
  return false;
}

constexpr size_t kLongPages = 1900 / 64;

TEST_CASE("a request does not wait until another one's prefix is written") {
  CHECK(is_seen([](dsv3_model* model, const std::string& path) {
    const ContextHandle context =
        make_context(model, {.prefill_chunk = 64, .disk_cache_dir = path.c_str()});
    {
      const Contender contender(path);
      generate(session_with(1900, context.get()).get(), answer());
      dsv3_request_options one = answer();
      one.max_tokens = 1;
      const SessionHandle session = make_session(context.get());
      append(session.get(), std::vector<int32_t>(100, 77));  // the disk is asked for its first page
      for (int i = 0; i < 1000 && pages_in(path) == 0; ++i) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
      generate(session.get(), one);
      if (pages_in(path) >= kLongPages) return false;
    }
    // What was put off is written all the same, unless somebody held the lock too long.
    for (int i = 0; i < 100 && pages_in(path) < kLongPages; ++i) {
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    return pages_in(path) >= kLongPages;
  }));
}

TEST_CASE("a context that is being freed starts nothing") {
  CHECK(is_seen([](dsv3_model* model, const std::string& path) {
    ContextHandle context =
        make_context(model, {.prefill_chunk = 64, .disk_cache_dir = path.c_str()});
    const SessionHandle other = session_with(10, context.get());
    const Contender contender(path);
    generate(session_with(1900, context.get()).get(), answer());
    std::thread freeing([&] { context.reset(); });
    dsv3_status status = DSV3_OK;
    while (status == DSV3_OK) {
      dsv3_request* request = nullptr;
      Error error;
      const dsv3_request_options options = answer();
      status = dsv3_request_start(other.get(), &options, &request, error.out());
      const RequestHandle handle(request);
      if (status == DSV3_OK) finish(handle.get());
    }
    CHECK(status == DSV3_E_CANCELLED);
    // From the beginning on, not only when everything is written.
    const size_t written = pages_in(path);
    freeing.join();
    return pages_in(path) > written;
  }));
}

TEST_CASE("directories that cannot serve are refused when the context is made") {
  const TemporaryFolder folder;
  const ModelHandle model = open_model();
  Error error;
  dsv3_context_options options;
  dsv3_context_options_init(&options, sizeof options);
  dsv3_context* context = nullptr;
  const auto refused = [&](const std::string& path) {
    options.disk_cache_dir = path.c_str();
    const dsv3_status status = dsv3_context_create(model.get(), &options, &context, error.out());
    CHECK(context == nullptr);
    return status;
  };
  const std::string open = folder.file("open");
  std::filesystem::create_directory(open);
  ::chmod(open.c_str(), 0755);
  CHECK(refused(open) == DSV3_E_IO);
  CHECK(error.message().find("expected 0700") != std::string::npos);
  CHECK(error.field() == "disk_cache_dir");
  CHECK(refused(folder.file("no/parent")) == DSV3_E_NOT_FOUND);
  CHECK(error.field() == "disk_cache_dir");
  std::filesystem::create_directory_symlink(open, folder.file("link"));
  CHECK(refused(folder.file("link")) == DSV3_E_IO);
  CHECK(error.message().find("is a symbolic link") != std::string::npos);
  CHECK(refused("") == DSV3_E_INVALID_ARGUMENT);
  CHECK(error.field() == "disk_cache_dir");
  options.disk_cache_bytes = 1;
  CHECK(refused(folder.file("none")) == DSV3_E_INVALID_ARGUMENT);
  CHECK(error.field() == "disk_cache_bytes");
  CHECK(!std::filesystem::exists(folder.file("none")));
  options.disk_cache_bytes = 0;
  options.prefix_cache = 0;
  CHECK(refused(folder.file("unused")) == DSV3_E_INVALID_ARGUMENT);
  CHECK(error.field() == "disk_cache_dir");
  CHECK(dsv3_disk_cache_purge(nullptr, nullptr, error.out()) == DSV3_E_INVALID_ARGUMENT);
}
