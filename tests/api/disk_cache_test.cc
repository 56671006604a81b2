// Prefixes that outlive the process: a new context starts warm from a directory, with the same
// bits, and whatever happens to the directory costs no more than computing again.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <cstring>
#include <filesystem>
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
