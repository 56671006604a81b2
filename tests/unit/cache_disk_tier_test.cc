// Prefix pages in a directory: found again by their tokens, within a budget, by several processes,
// and not by other users.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <numeric>
#include <thread>

#include "runtime/base/os.h"
#include "runtime/cache/disk_tier.h"
#include "tests/support/support.h"

namespace dsv3 {
namespace {

LatentIdentity identity() {
  LatentIdentity id;
  id.fingerprint.fill(7);
  id.kernels = "ref";
  id.page_tokens = 64;
  id.page_bytes = 4096;
  return id;
}

std::vector<int32_t> tokens(size_t count, int32_t first = 0) {
  std::vector<int32_t> out(count);
  std::iota(out.begin(), out.end(), first);
  return out;
}
std::vector<std::byte> page(int value) {
  return std::vector<std::byte>(4096, static_cast<std::byte>(value));
}

std::unique_ptr<DiskTier> tier(const std::string& path, uint64_t bytes = 1 << 20,
                               const LatentIdentity& id = identity()) {
  auto opened = DiskTier::open(path, bytes, id);
  REQUIRE_MESSAGE(opened.ok(), opened.status().message());
  return std::move(opened.value());
}

bool has(DiskTier* t, const std::vector<int32_t>& prefix, int value) {
  std::vector<std::byte> out;
  bool found = false;
  REQUIRE(t->get(prefix, &out, &found).ok());
  if (found) CHECK(out == page(value));
  return found;
}

std::vector<PrivateDirectory::Entry> entries_in(const std::string& path) {
  const auto directory = PrivateDirectory::open(path, /*make=*/true);
  REQUIRE(directory.ok());
  auto entries = directory.value().list();
  REQUIRE(entries.ok());
  return std::move(entries.value());
}

uint64_t bytes_in(const std::string& path) {
  uint64_t sum = 0;
  for (const auto& entry : entries_in(path)) sum += entry.size;
  return sum;
}

std::string only_file(const std::string& path) {
  const auto entries = entries_in(path);
  REQUIRE(entries.size() == 1);
  return path + "/" + entries[0].name;
}

TEST_CASE("pages are found by their whole prefix, after a restart too") {
  test::TemporaryFolder dir;
  const std::string path = dir.file("cache");
  {
    const auto t = tier(path);
    CHECK_FALSE(has(t.get(), tokens(64), 1));
    REQUIRE(t->put(tokens(64), page(1)).ok());
    REQUIRE(t->put(tokens(128), page(2)).ok());
    REQUIRE(t->put(tokens(64), page(1)).ok());
  }
  const auto t = tier(path);
  CHECK(has(t.get(), tokens(64), 1));
  CHECK(has(t.get(), tokens(128), 2));
  CHECK_FALSE(has(t.get(), tokens(64, 1), 1));
  CHECK_FALSE(has(t.get(), tokens(192), 1));
  struct stat st;
  REQUIRE(::stat(path.c_str(), &st) == 0);
  CHECK((st.st_mode & 0777) == 0700);
  for (const auto& entry : entries_in(path)) {
    REQUIRE(::stat((path + "/" + entry.name).c_str(), &st) == 0);
    CHECK((st.st_mode & 0777) == 0600);
  }
}

TEST_CASE("other models, kernel sets and arithmetic do not see each other's pages") {
  test::TemporaryFolder dir;
  const std::string path = dir.file("cache");
  REQUIRE(tier(path)->put(tokens(64), page(1)).ok());
  LatentIdentity other = identity();
  other.kernels = "avx2";
  CHECK_FALSE(has(tier(path, 1 << 20, other).get(), tokens(64), 1));
  other = identity();
  other.fingerprint[3] ^= 1;
  CHECK_FALSE(has(tier(path, 1 << 20, other).get(), tokens(64), 1));
  other = identity();
  ++other.numeric_revision;
  CHECK_FALSE(has(tier(path, 1 << 20, other).get(), tokens(64), 1));
  CHECK(has(tier(path).get(), tokens(64), 1));
}

TEST_CASE("damaged pages are not found, and go") {
  test::TemporaryFolder dir;
  const std::string path = dir.file("cache");
  const auto t = tier(path);
  for (const size_t at : {size_t{0}, size_t{9}, size_t{79}, size_t{100}, size_t{2000}}) {
    CAPTURE(at);
    REQUIRE(t->put(tokens(64), page(1)).ok());
    const std::string file = only_file(path);
    std::string bytes = test::read_bytes(file);
    bytes[at] = static_cast<char>(bytes[at] ^ 4);
    test::write_bytes(file, bytes);
    CHECK_FALSE(has(t.get(), tokens(64), 1));
    CHECK_FALSE(file_exists(file).value());
  }
  for (const size_t size : {size_t{0}, size_t{50}, size_t{4000}}) {
    REQUIRE(t->put(tokens(64), page(1)).ok());
    const std::string file = only_file(path);
    test::write_bytes(file, test::read_bytes(file).substr(0, size));
    CHECK_FALSE(has(t.get(), tokens(64), 1));
  }
  {  // A link is not followed, wherever it leads, and does not stand in the way for ever.
    REQUIRE(t->put(tokens(64), page(1)).ok());
    const std::string file = only_file(path), elsewhere = dir.file("elsewhere");
    ::rename(file.c_str(), elsewhere.c_str());
    REQUIRE(::symlink(elsewhere.c_str(), file.c_str()) == 0);
    CHECK_FALSE(has(t.get(), tokens(64), 1));
    CHECK(file_exists(elsewhere).value());
    REQUIRE(t->put(tokens(64), page(1)).ok());
    CHECK(has(t.get(), tokens(64), 1));
    ::unlink(file.c_str());
  }
  {  // Nor does an empty directory.
    REQUIRE(t->put(tokens(64), page(1)).ok());
    const std::string file = only_file(path);
    ::unlink(file.c_str());
    REQUIRE(::mkdir(file.c_str(), 0700) == 0);
    CHECK_FALSE(has(t.get(), tokens(64), 1));
    REQUIRE(t->put(tokens(64), page(1)).ok());
    CHECK(has(t.get(), tokens(64), 1));
    ::unlink(file.c_str());
  }
  // Another prefix's good page under this one's name: a collision of hashes.
  REQUIRE(t->put(tokens(64), page(1)).ok());
  const std::string file = only_file(path);
  const std::string mine = test::read_bytes(file);
  ::unlink(file.c_str());
  REQUIRE(t->put(tokens(64, 5), page(2)).ok());
  ::rename(only_file(path).c_str(), file.c_str());
  CHECK_FALSE(has(t.get(), tokens(64), 2));
  CHECK(file_exists(file).value());
  test::write_bytes(file, mine);
  CHECK(has(t.get(), tokens(64), 1));
}

TEST_CASE("the budget holds, and what was used last stays") {
  test::TemporaryFolder dir;
  const std::string path = dir.file("cache");
  constexpr uint64_t kBudget = 10 * 4600;
  const auto t = tier(path, kBudget);
  const auto age = [&] {  // everything that is there was used a minute ago
    for (const auto& entry : entries_in(path)) {
      const timespec then[2] = {{time(nullptr) - 60, 0}, {time(nullptr) - 60, 0}};
      ::utimensat(AT_FDCWD, (path + "/" + entry.name).c_str(), then, 0);
    }
  };
  for (int32_t i = 0; i < 8; ++i) REQUIRE(t->put(tokens(64, i), page(i)).ok());
  age();
  CHECK(has(t.get(), tokens(64, 3), 3));
  CHECK(t->touch(tokens(64, 4)));
  CHECK_FALSE(t->touch(tokens(64, 99)));
  REQUIRE(t->put(tokens(64, 5), page(5)).ok());  // is there
  int64_t used = 0;
  for (const auto& entry : entries_in(path)) {
    used += entry.used_ns / 1'000'000'000 > time(nullptr) - 50 ? 1 : 0;
  }
  CHECK(used == 3);
  for (int32_t i = 100; i < 105; ++i) {
    REQUIRE(t->put(tokens(64, i), page(i)).ok());
    CHECK(bytes_in(path) <= kBudget);
  }
  for (int32_t i = 3; i < 6; ++i) CHECK(has(t.get(), tokens(64, i), i));
  CHECK(has(t.get(), tokens(64, 104), 104));
  // A smaller budget applies when it is opened.
  const auto smaller = tier(path, 5000);
  CHECK(bytes_in(path) <= 5000);
  REQUIRE(tier(path, 100)->put(tokens(64), page(1)).ok());  // too large for it: not stored
  CHECK(bytes_in(path) == 0);
}

TEST_CASE("the budget holds where the count of what is there was lost") {
  test::TemporaryFolder dir;
  const std::string path = dir.file("cache");
  constexpr uint64_t kBudget = 10 * 4600;
  const auto t = tier(path, kBudget);
  for (int32_t i = 0; i < 8; ++i) REQUIRE(t->put(tokens(64, i), page(i)).ok());
  REQUIRE(::unlink((path + "/.lock").c_str()) == 0);  // as by who tidies up
  for (int32_t i = 8; i < 16; ++i) {
    REQUIRE(t->put(tokens(64, i), page(i)).ok());
    CHECK(bytes_in(path) <= kBudget);
  }
}

TEST_CASE("ends of prefixes go before their beginnings") {
  test::TemporaryFolder dir;
  const std::string path = dir.file("cache");
  const auto t = tier(path, 6 * 5200);
  for (size_t i = 1; i <= 6; ++i) REQUIRE(t->put(tokens(64 * i), page(static_cast<int>(i))).ok());
  REQUIRE(t->put(tokens(64, 9), page(9)).ok());
  CHECK(has(t.get(), tokens(64), 1));
  CHECK_FALSE(has(t.get(), tokens(64 * 6), 6));
}

TEST_CASE("several writers and readers at once") {
  test::TemporaryFolder dir;
  const std::string path = dir.file("cache");
  constexpr uint64_t kBudget = 12 * 4600;
  (void)tier(path, kBudget);
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (int w = 0; w < 4; ++w) {
    threads.emplace_back([&, w] {
      auto mine = DiskTier::open(path, kBudget, identity());  // as another process would
      for (int i = 0; i < 60; ++i) {
        const int which = (i * 7 + w) % 20;
        std::vector<std::byte> out;
        bool found = false;
        if (!mine.value()->get(tokens(64, which), &out, &found).ok()) ++wrong;
        if (found && out != page(which)) ++wrong;
        const Status put = mine.value()->put(tokens(64, which), page(which));
        if (!put.ok() && put.code() != Code::kBusy) ++wrong;  // a slow disk may keep the lock
      }
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(wrong == 0);
  CHECK(bytes_in(path) <= kBudget);
}

TEST_CASE("a lock that somebody keeps costs a page or an error, not a thread") {
  test::TemporaryFolder dir;
  const std::string path = dir.file("cache");
  const auto t = tier(path);
  REQUIRE(t->put(tokens(64), page(1)).ok());
  const int fd = ::open((path + "/.lock").c_str(), O_RDWR | O_CLOEXEC);
  REQUIRE(fd >= 0);
  REQUIRE(::flock(fd, LOCK_EX) == 0);
  const Status put = t->put(tokens(128), page(2));
  CHECK(put.code() == Code::kBusy);
  CHECK(put.message().find(path + "/.lock") != std::string::npos);
  CHECK(has(t.get(), tokens(64), 1));  // reading takes no lock
  const Status opened = DiskTier::open(path, 1 << 20, identity()).status();
  CHECK(opened.code() == Code::kBusy);
  CHECK(opened.retryable());
  ::close(fd);
  CHECK(t->put(tokens(128), page(2)).ok());
}

TEST_CASE("purge, leftovers of a writer that died, and foreign files") {
  test::TemporaryFolder dir;
  const std::string path = dir.file("cache");
  auto t = tier(path);
  REQUIRE(t->put(tokens(64), page(1)).ok());
  const std::string name(32, 'a');
  const std::string leftover = path + "/.tmp-1-" + name + ".page";
  const std::string foreign[] = {"notes.txt",
                                 ".tmp-mine",
                                 "notes.page",
                                 name.substr(1) + ".page",
                                 name + "a.page",
                                 name + ".page~",
                                 "A" + name.substr(1) + ".page",
                                 ".tmp-" + name + ".page",
                                 ".tmp-1-notes",
                                 ".tmp-x-" + name + ".page"};
  for (const std::string& other : foreign) {
    test::write_bytes(path + "/" + other, std::string(8192, 'x'));
  }
  test::write_bytes(leftover, "half");
  t = tier(path, 8192);  // others' files are neither removed nor counted
  CHECK_FALSE(file_exists(leftover).value());
  CHECK(has(t.get(), tokens(64), 1));
  test::write_bytes(leftover, "half");
  uint64_t bytes = 0;
  REQUIRE(DiskTier::purge(path, &bytes).ok());
  CHECK(bytes > 4096);
  CHECK_FALSE(file_exists(leftover).value());
  CHECK_FALSE(has(t.get(), tokens(64), 1));
  for (const std::string& other : foreign) {
    CAPTURE(other);
    CHECK(file_exists(path + "/" + other).value());
  }
}

TEST_CASE("a process that forks does not keep the lock") {
  test::TemporaryFolder dir;
  const auto made = PrivateDirectory::open(dir.file("cache"), /*make=*/true);
  REQUIRE(made.ok());
  int ends[2];
  REQUIRE(::pipe(ends) == 0);
  pid_t child = 0;
  {
    const auto lock = made.value().lock(0);
    REQUIRE(lock.ok());
    CHECK(made.value().lock(0).status().code() == Code::kBusy);
    child = ::fork();
    if (child == 0) {  // lives until the parent closes its end
      ::close(ends[1]);
      char byte;
      ::_exit(::read(ends[0], &byte, 1) == 0 ? 0 : 1);
    }
  }
  REQUIRE(child > 0);
  CHECK(made.value().lock(0).ok());
  ::close(ends[0]);
  ::close(ends[1]);
  int status = 0;
  CHECK(::waitpid(child, &status, 0) == child);
  CHECK(status == 0);
}

TEST_CASE("directories that others may read, files and missing parents are refused") {
  test::TemporaryFolder dir;
  const std::string path = dir.file("open");
  REQUIRE(::mkdir(path.c_str(), 0755) == 0);
  ::chmod(path.c_str(), 0755);
  Status status = DiskTier::open(path, 1 << 20, identity()).status();
  CHECK(status.code() == Code::kIo);
  CHECK(status.message().find("0755, expected 0700") != std::string::npos);
  test::write_bytes(dir.file("file"), "x");
  CHECK_FALSE(DiskTier::open(dir.file("file"), 1 << 20, identity()).ok());
  CHECK_FALSE(DiskTier::open(dir.file("a/b/c"), 1 << 20, identity()).ok());
  REQUIRE(::symlink(path.c_str(), dir.file("link").c_str()) == 0);
  CHECK_FALSE(DiskTier::open(dir.file("link"), 1 << 20, identity()).ok());
  CHECK_FALSE(DiskTier::open("", 1 << 20, identity()).ok());
}

}  // namespace
}  // namespace dsv3
