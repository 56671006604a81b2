// Saving and loading sessions takes a few pages of memory, however long the session: every
// operator new of the process is counted while one of 2,000 pages goes through.
#include <doctest/doctest.h>
#include <malloc.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "runtime/engine/engine.h"
#include "runtime/engine/session_io.h"
#include "runtime/model/synthetic.h"
#include "tests/support/emulated.h"
#include "tests/support/replaced_new.h"
#include "tests/support/support.h"

namespace {

std::atomic<int64_t> live{0}, peak{0};  // bytes

}  // namespace

void* dsv3::test::replaced_new(size_t size, size_t align) {
  void* p = plain_new(size, align);
  const auto bytes = static_cast<int64_t>(malloc_usable_size(p));
  const int64_t now = live.fetch_add(bytes) + bytes;
  int64_t most = peak.load();
  while (now > most && !peak.compare_exchange_weak(most, now)) {
  }
  return p;
}

void dsv3::test::replaced_delete(void* p) noexcept {
  if (p == nullptr) return;
  live.fetch_sub(static_cast<int64_t>(malloc_usable_size(p)));
  std::free(p);
}

namespace dsv3 {
namespace {

constexpr uint64_t kPages = 2000;
// A batch of pages, the tokens a few times over, and change.
constexpr int64_t kMost = 7 << 20;

std::shared_ptr<Engine> engine_with_room() {
  Result<ModelConfig> config = synthetic_config("tiny", 2);
  REQUIRE(config.ok());
  Result<std::shared_ptr<const Model>> model = Model::synthesise(*config, {});
  REQUIRE(model.ok());
  EngineOptions options;
  options.threads = 1;
  options.cache_bytes = uint64_t{100} << 20;
  Result<std::shared_ptr<Engine>> engine = Engine::create(*model, options);
  REQUIRE(engine.ok());
  return *engine;
}

// What any session of so many computed tokens could hold: the latents are believed.
void write_session(const Engine& engine, const std::string& path) {
  const LatentIdentity identity = engine.latent_identity();
  SnapshotContent content;
  for (uint64_t i = 0; i < kPages * identity.page_tokens; ++i) {
    content.tokens.push_back(static_cast<int32_t>(2 + i * i % 4000));
  }
  content.computed = content.tokens.size();
  std::ofstream file(path, std::ios::binary);
  std::vector<std::byte> page(identity.page_bytes);
  const auto next_page = [&](uint64_t index) -> Result<std::span<const std::byte>> {
    for (size_t i = 0; i < page.size(); ++i) page[i] = static_cast<std::byte>(index * 7 + i % 64);
    return std::span<const std::byte>(page);
  };
  const auto write = [&](const void* bytes, size_t size) -> Status {
    file.write(static_cast<const char*>(bytes), static_cast<std::streamsize>(size));
    return {};
  };
  REQUIRE(write_snapshot(identity, content, write, next_page).ok());
  file.close();
  REQUIRE(file.good());
}

// The most that lived at once while `work` ran, beyond what lived before.
template <class Work>
int64_t peak_of(const Work& work) {
  const int64_t before = live.load();
  peak.store(before);
  work();
  return peak.load() - before;
}

TEST_CASE("a long session goes through a few pages of memory") {
  if (test::kEmulated) return;  // counts what is the same everywhere
  const test::TemporaryFolder folder;
  const std::string path = folder.file("long.session");
  const std::shared_ptr<Engine> engine = engine_with_room();
  write_session(*engine, path);
  const uint64_t bytes = engine->latent_identity().page_bytes * kPages;
  REQUIRE(static_cast<int64_t>(bytes) > 10 * kMost);

  std::shared_ptr<Session> session;
  const int64_t loading = peak_of([&] {
    Result<std::shared_ptr<Session>> loaded = load_session_file(engine, path, {});
    REQUIRE_MESSAGE(loaded.ok(), loaded.status().message());
    session = std::move(*loaded);
  });
  CHECK(loading < kMost);

  // Saved through a function, and byte for byte what it was made from.
  std::ifstream file(path, std::ios::binary);
  std::vector<char> expected;
  uint64_t total = 0;
  bool same = true;
  const WriteBytes compare = [&](const void* data, size_t size) -> Status {
    expected.resize(size);
    file.read(expected.data(), static_cast<std::streamsize>(size));
    same = same && file.good() && std::memcmp(expected.data(), data, size) == 0;
    total += size;
    return {};
  };
  const int64_t saving = peak_of([&] { REQUIRE(save_session(*session, compare, {}).ok()); });
  CHECK(saving < kMost);
  CHECK(same);
  CHECK(total > bytes);
  const int64_t saving_file =
      peak_of([&] { REQUIRE(save_session_file(*session, folder.file("again.session"), {}).ok()); });
  CHECK(saving_file < kMost);
  session.reset();

  // Read through a function.
  file.seekg(0);
  const ReadBytes read = [&](void* data, size_t size) -> Status {
    file.read(static_cast<char*>(data), static_cast<std::streamsize>(size));
    return file.good() ? Status() : make_error(Code::kIo, "the file ended");
  };
  const int64_t reading = peak_of([&] {
    Result<std::shared_ptr<Session>> loaded = load_session(engine, "it", read, {});
    REQUIRE_MESSAGE(loaded.ok(), loaded.status().message());
  });
  CHECK(reading < kMost);
}

}  // namespace
}  // namespace dsv3
