// The disk cache's thread: what waits for it while it makes way for reads.
#include <doctest/doctest.h>

#include <chrono>
#include <filesystem>
#include <optional>
#include <thread>

#include "runtime/engine/disk_cache.h"
#include "runtime/engine/engine.h"
#include "runtime/engine/evaluation.h"
#include "tests/golden/runner.h"
#include "tests/support/support.h"
#include "tests/support/waiting_task.h"

namespace dsv3 {
namespace {

constexpr size_t kPage = kernels::kLatentPageTokens;

std::shared_ptr<Session> session_with(Engine* engine, const std::vector<int32_t>& tokens) {
  auto made = engine->create_session();
  REQUIRE(made.ok());
  AppendResult result;
  REQUIRE((*made)->append(tokens, false, &result).ok());
  return *made;
}

std::vector<int32_t> prefix_of(int32_t i) { return std::vector<int32_t>(kPage, 100 + i); }

size_t pages_in(const std::string& path) {
  size_t count = 0;
  for (const auto& entry : std::filesystem::directory_iterator(path)) {
    count += entry.path().extension() == ".page" ? 1 : 0;
  }
  return count;
}

TEST_CASE("of too many prefixes that wait, the oldest are forgotten, also beside reads") {
  constexpr int32_t kPrefixes = 100, kMostWaiting = 64;
  auto made = Engine::create(test::open_model("v3-micro"), {});
  REQUIRE_MESSAGE(made.ok(), made.status().message());
  const std::shared_ptr<Engine> engine = *made;
  for (int32_t i = 0; i < kPrefixes; ++i) {  // for the prefix index to have their pages
    const auto session = session_with(engine.get(), {});
    REQUIRE(evaluate(session, prefix_of(i), {}).ok());
  }
  const auto reader = std::make_shared<test::WaitingTask>(session_with(engine.get(), prefix_of(0)));

  const test::TemporaryFolder folder;
  const std::string path = folder.file("cache");
  auto cache = DiskCache::open(path, uint64_t{1} << 30, engine->latent_identity());
  REQUIRE(cache.ok());
  DiskCache& disk = **cache;
  REQUIRE(disk.start(engine).ok());
  const auto keep = [&](int32_t begin, int32_t end) {
    for (int32_t i = begin; i < end; ++i) disk.keep(prefix_of(i));
  };
  auto directory = PrivateDirectory::open(path, /*make=*/false);
  REQUIRE(directory.ok());
  auto locked = directory->lock(0);
  REQUIRE(locked.ok());
  std::optional<PrivateDirectory::Lock> held(std::move(*locked));
  keep(0, 1);
  // Time for it to become the one that is written, which waits for the lock.
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  {
    const std::lock_guard lock(engine->mutex());
    keep(1, 1 + kMostWaiting);
    REQUIRE(disk.restore(reader));
    held.reset();
    // Time for it to be put back. What is read waits for the mutex.
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    keep(1 + kMostWaiting, kPrefixes);
  }
  disk.stop(int64_t{60'000'000'000}, /*may_wait=*/true);
  CHECK(pages_in(path) <= size_t{kMostWaiting} + 1);
  engine->shutdown();
}

}  // namespace
}  // namespace dsv3
