#include "runtime/base/os.h"

#include <doctest/doctest.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>

#include "runtime/base/os_cgroup.h"
#include "runtime/base/os_directory.h"
#include "tests/support/support.h"

namespace dsv3 {
namespace {

TEST_CASE("only regular files open, and nothing blocks") {
  const test::TemporaryFolder folder;
  CHECK(File::open(folder.file("none")).status().code() == Code::kNotFound);
  CHECK(File::open("").status().code() == Code::kInvalidArgument);
  CHECK(File::open(std::string("a\0b", 3)).status().code() == Code::kInvalidArgument);
  const auto directory = File::open(folder.path());
  CHECK(directory.status().message().find("is a directory") != std::string::npos);
  REQUIRE(mkfifo(folder.file("fifo").c_str(), 0600) == 0);
  CHECK(File::open(folder.file("fifo")).status().message().find("is a FIFO") != std::string::npos);
  CHECK(File::open("/dev/null").status().message().find("is a device") != std::string::npos);
}

TEST_CASE("what is short now may be tried again, what is wrong may not") {
  const std::string path = test::source_path("README.md");
  rlimit before, none;
  REQUIRE(getrlimit(RLIMIT_NOFILE, &before) == 0);
  none = {0, before.rlim_max};
  REQUIRE(setrlimit(RLIMIT_NOFILE, &none) == 0);
  const Status short_of = File::open(path).status();
  const Status directory = PrivateDirectory::open(path + ".none", /*make=*/false).status();
  REQUIRE(setrlimit(RLIMIT_NOFILE, &before) == 0);
  CHECK(short_of.message() == path + ": cannot open: Too many open files");
  CHECK(short_of.retryable());
  CHECK(directory.retryable());
  CHECK(File::open(path).ok());
  CHECK(!File::open(path + ".none").status().retryable());
}

TEST_CASE("reads are whole or an error") {
  const test::TemporaryFolder folder;
  test::write_bytes(folder.file("a"), "0123456789");
  auto file = File::open(folder.file("a"));
  REQUIRE(file.ok());
  char buffer[8] = {};
  CHECK(file->read_at(6, buffer, 4).ok());
  CHECK(std::string(buffer) == "6789");
  CHECK(file->read_at(6, buffer, 5).code() == Code::kCorrupt);
  CHECK(*file->current_identity() == file->identity());
  CHECK(truncate(folder.file("a").c_str(), 3) == 0);
  CHECK(!(*file->current_identity() == file->identity()));
  CHECK(read_file(folder.file("a"), 2).status().code() == Code::kCorrupt);
  CHECK(*read_file(folder.file("a"), 3) == "012");
}

TEST_CASE("whether a file exists") {
  const test::TemporaryFolder folder;
  test::write_bytes(folder.file("a"), "");
  REQUIRE(symlink("nowhere", folder.file("link").c_str()) == 0);
  CHECK(file_exists(folder.file("a")).value());
  CHECK(file_exists(folder.file("link")).value());
  CHECK(!file_exists(folder.file("b")).value());
  CHECK(!file_exists(folder.file("a/b")).value());
  // Neither is an answer.
  CHECK(file_exists(folder.file(std::string(256, 'a'))).status().code() == Code::kIo);
}

TEST_CASE("an atomic file appears whole or not at all") {
  const test::TemporaryFolder folder;
  {
    auto file = AtomicFile::create(folder.file("out"));
    REQUIRE(file.ok());
    CHECK(file->write_at(5, "world", 5).ok());
    CHECK(file->write_at(0, "hello", 5).ok());
    CHECK(!file_exists(folder.file("out")).value());
  }
  CHECK(list_directory(folder.path())->empty());
  {
    auto file = AtomicFile::create(folder.file("out"));
    REQUIRE(file.ok());
    CHECK(file->write_at(0, "hello", 5).ok());
    CHECK(file->commit().ok());
  }
  CHECK(test::read_bytes(folder.file("out")) == "hello");
  CHECK(list_directory(folder.path())->size() == 1);
  CHECK(AtomicFile::create(folder.file("none/out")).status().code() == Code::kNotFound);
}

TEST_CASE("an atomic file may have the longest name there is, and says at once what is longer") {
  const test::TemporaryFolder folder;
  for (const std::string& end : {std::string("aa"), std::string("bb"), std::string("\u00E9")}) {
    std::string name = "a";  // its characters of two bytes begin at odd offsets
    for (int i = 0; i < 126; ++i) name += "\u00E9";
    name += end;
    REQUIRE(name.size() == 255);
    auto file = AtomicFile::create(folder.file(name));
    REQUIRE(file.ok());
    auto second = AtomicFile::create(folder.file(name));
    REQUIRE(second.ok());
    CHECK(file->write_at(0, "hello", 5).ok());
    CHECK(second->write_at(0, "other", 5).ok());
    auto names = list_directory(folder.path());
    for (const std::string& found : *names) CHECK(utf8_prefix(found, 99) == utf8_prefix(name, 99));
    CHECK(file->commit().ok());
    CHECK(test::read_bytes(folder.file(name)) == "hello");
  }
  CHECK(list_directory(folder.path())->size() == 3);
  const auto status = AtomicFile::create(folder.file(std::string(256, 'a'))).status();
  CHECK(status.code() == Code::kIo);
  CHECK(status.message().find("File name too long") != std::string::npos);
  CHECK(list_directory(folder.path())->size() == 3);
}

TEST_CASE("a text is cut where a character ends") {
  const std::string text = "a\u00E9\u20AC\U0001F600z";  // of 1, 2, 3, 4 and 1 bytes
  const size_t ends[] = {0, 1, 1, 3, 3, 3, 6, 6, 6, 6, 10, 11, 11};
  for (size_t i = 0; i < std::size(ends); ++i) CHECK(utf8_prefix(text, i).size() == ends[i]);
  CHECK(utf8_prefix("\x80\x80\x80\x80\x80\x80", 5).size() == 5);  // no UTF-8
  CHECK(utf8_prefix("", 0).empty());
}

TEST_CASE("an atomic file that may replace nothing takes no place that was taken meanwhile") {
  const test::TemporaryFolder folder;
  for (const bool taken : {false, true}) {
    auto file = AtomicFile::create(folder.file("out"));
    REQUIRE(file.ok());
    CHECK(file->write_at(0, "hello", 5).ok());
    if (taken) test::write_bytes(folder.file("out"), "precious");
    const Status status = file->commit(/*replace=*/false);
    CHECK(status.code() == (taken ? Code::kInvalidArgument : Code::kOk));
    CHECK(test::read_bytes(folder.file("out")) == (taken ? "precious" : "hello"));
  }
  CHECK(list_directory(folder.path())->size() == 1);
}

TEST_CASE("an atomic file takes the place of nothing but a file") {
  const test::TemporaryFolder folder;
  const std::string fifo = folder.file("fifo"), directory = folder.file("directory");
  REQUIRE(mkfifo(fifo.c_str(), 0600) == 0);
  std::filesystem::create_directory(directory);
  CHECK(AtomicFile::create(fifo).status().message().find("is a FIFO") != std::string::npos);
  CHECK(AtomicFile::create(directory).status().message().find("is a directory") !=
        std::string::npos);
  CHECK(AtomicFile::create("/dev/null").status().message().find("is a device") !=
        std::string::npos);
  auto file = AtomicFile::create(folder.file("out"));
  REQUIRE(file.ok());
  REQUIRE(mkfifo(folder.file("out").c_str(), 0600) == 0);
  CHECK(file->commit().message().find("is a FIFO") != std::string::npos);
  CHECK(!std::filesystem::is_regular_file(folder.file("out")));
}

TEST_CASE("a full disk is a clear error") {
  if (access("/dev/full", W_OK) != 0) return;
  // Through AtomicFile nothing can be put on /dev/full itself; a write error looks the same.
  const test::TemporaryFolder folder;
  auto file = AtomicFile::create(folder.file("out"));
  REQUIRE(file.ok());
  const Status status = file->write_at(uint64_t{1} << 62, "x", 1);  // beyond what a file can hold
  CHECK(status.code() == Code::kIo);
  CHECK(status.message().find("cannot write") != std::string::npos);
}

// What `body` returns in a child process that may write no file beyond 4,096 bytes; -1 when a
// signal ended it.
template <class Body>
int with_file_limit(const Body& body) {
  const pid_t child = fork();
  if (child == 0) {
    const rlimit size = {4096, 4096}, core = {0, 0};
    setrlimit(RLIMIT_CORE, &core);
    setrlimit(RLIMIT_FSIZE, &size);
    signal(SIGXFSZ, SIG_DFL);
    _exit(body());
  }
  int status = 0;
  if (child < 0 || waitpid(child, &status, 0) != child) return -2;
  return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
}

TEST_CASE("beyond the limit of file size a write is an error and no signal") {
  const test::TemporaryFolder folder;
  const std::string bytes(5000, 'x');
  CHECK(with_file_limit([&] {
          auto file = AtomicFile::create(folder.file("out"));
          if (!file.ok()) return 1;
          const Status status = file->write_at(0, bytes.data(), bytes.size());
          if (status.code() != Code::kIo) return 2;
          if (status.message() != folder.file("out") + ": cannot write: File too large") return 3;
          if (!file->write_at(0, bytes.data(), 4096).ok()) return 4;
          sigset_t mask, pending;
          pthread_sigmask(SIG_SETMASK, nullptr, &mask);
          sigpending(&pending);
          return sigismember(&mask, SIGXFSZ) == 0 && sigismember(&pending, SIGXFSZ) == 0 ? 0 : 5;
        }) == 0);
  CHECK(with_file_limit([&] {
          auto directory = PrivateDirectory::open(folder.file("private"), /*make=*/true);
          if (!directory.ok()) return 1;
          const std::span<const std::byte> part = std::as_bytes(std::span(bytes));
          if (directory->write("page", {&part, 1}).code() != Code::kIo) return 2;
          if (directory->contains("page")) return 3;
          const rlimit nothing = {0, 0};
          setrlimit(RLIMIT_FSIZE, &nothing);
          auto lock = directory->lock(0);
          if (!lock.ok()) return 4;
          lock->set_counter(7);
          return lock->counter() == 0 ? 0 : 5;
        }) == 0);
  // A signal that waits already is the host's.
  CHECK(with_file_limit([&] {
          sigset_t mask, pending;
          sigemptyset(&mask);
          sigaddset(&mask, SIGXFSZ);
          pthread_sigmask(SIG_BLOCK, &mask, nullptr);
          raise(SIGXFSZ);
          auto file = AtomicFile::create(folder.file("out"));
          if (!file.ok() || file->write_at(4096, "x", 1).code() != Code::kIo) return 1;
          sigpending(&pending);
          return sigismember(&pending, SIGXFSZ) == 1 ? 0 : 2;
        }) == 0);
}

TEST_CASE("our threads take no signals and have their own floating-point mode") {
  struct Seen {
    bool blocked = false;
    int rounding = -1;
    std::string name;
  } seen;
  std::fesetround(FE_UPWARD);  // what a strange host may do
  auto thread = Thread::start(
      "dsv3-test",
      [](void* arg) {
        auto* s = static_cast<Seen*>(arg);
        sigset_t mask;
        pthread_sigmask(SIG_SETMASK, nullptr, &mask);
        s->blocked = sigismember(&mask, SIGINT) == 1 && sigismember(&mask, SIGTERM) == 1 &&
                     sigismember(&mask, SIGUSR1) == 1;
        s->rounding = std::fegetround();
        char name[16];
        pthread_getname_np(pthread_self(), name, sizeof name);
        s->name = name;
      },
      &seen);
  std::fesetround(FE_TONEAREST);
  REQUIRE(thread.ok());
  thread->join();
  CHECK(seen.blocked);
  CHECK(seen.rounding == FE_TONEAREST);
  CHECK(seen.name == "dsv3-test");
  sigset_t mask;
  pthread_sigmask(SIG_SETMASK, nullptr, &mask);
  CHECK(sigismember(&mask, SIGINT) == 0);  // the caller's mask is what it was
}

TEST_CASE("a wait descriptor is level-triggered") {
  auto d = WaitDescriptor::create();
  REQUIRE(d.ok());
  pollfd p{static_cast<int>(d->native()), POLLIN, 0};
  CHECK(poll(&p, 1, 0) == 0);
  d->set();
  d->set();
  CHECK(poll(&p, 1, 0) == 1);
  CHECK(poll(&p, 1, 0) == 1);
  d->clear();
  CHECK(poll(&p, 1, 0) == 0);
}

// A tree of files below a folder, as the kernel shows control groups.
class Tree {
 public:
  void write(const std::string& name, const std::string& text) const {
    const std::filesystem::path path = folder_.file(name);
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path) << text << "\n";
  }
  CgroupLimits limits() const { return cgroup_limits(folder_.file("fs"), folder_.file("self")); }

 private:
  const test::TemporaryFolder folder_;
};

TEST_CASE("limits of control groups, version 2: the least of a group and its parents") {
  const Tree tree;
  CHECK(tree.limits().cpus == 0);  // nothing is mounted
  CHECK(tree.limits().memory == 0);
  tree.write("self", "0::/user.slice/editor");
  tree.write("fs/cpu.max", "max 100000");
  tree.write("fs/user.slice/cpu.max", "150000 100000");
  tree.write("fs/user.slice/editor/cpu.max", "400000 100000");
  tree.write("fs/user.slice/memory.max", "max");
  tree.write("fs/user.slice/editor/memory.max", "1073741824");
  CHECK(tree.limits().cpus == 1.5);
  CHECK(tree.limits().memory == 0x1p30);
  tree.write("fs/user.slice/editor/cpu.max", "50000 100000");
  CHECK(tree.limits().cpus == 0.5);
  // What is used but for files leaves the rest; the parent may leave less.
  tree.write("fs/user.slice/editor/memory.current", "805306368");
  tree.write("fs/user.slice/editor/memory.stat",
             "anon 536870912\nactive_file 134217728\ninactive_file 134217728");
  CHECK(tree.limits().memory_left == 0x1p29);
  tree.write("fs/user.slice/memory.max", "4294967296");
  tree.write("fs/user.slice/memory.current", "4026531840");
  CHECK(tree.limits().memory == 0x1p30);
  CHECK(tree.limits().memory_left == 0x1p28);
  tree.write("fs/user.slice/memory.current", "5000000000");
  CHECK(tree.limits().memory_left == 1);
}

TEST_CASE("limits of control groups, version 1: a tree for each controller") {
  const Tree tree;
  tree.write("self", "9:name=systemd:/\n4:memory:/a/b\n1:cpu,cpuacct:/c\n3:cpuset:/d\n0::/");
  tree.write("fs/cpu,cpuacct/cpu.cfs_quota_us", "-1");
  tree.write("fs/cpu,cpuacct/cpu.cfs_period_us", "100000");
  tree.write("fs/memory/memory.limit_in_bytes", "9223372036854771712");
  CHECK(tree.limits().cpus == 0);
  CHECK(tree.limits().memory == 0);
  tree.write("fs/cpu,cpuacct/c/cpu.cfs_quota_us", "250000");
  tree.write("fs/cpu,cpuacct/c/cpu.cfs_period_us", "100000");
  tree.write("fs/memory/a/memory.limit_in_bytes", "2147483648");
  tree.write("fs/memory/a/b/memory.limit_in_bytes", "9223372036854771712");
  CHECK(tree.limits().cpus == 2.5);
  CHECK(tree.limits().memory == 0x1p31);
  tree.write("fs/memory/a/memory.usage_in_bytes", "2147483648");
  tree.write("fs/memory/a/memory.stat", "active_file 7\ntotal_active_file 1048576");
  CHECK(tree.limits().memory_left == 0x1p20);
}

TEST_CASE("limits of control groups, in a container: the mount's root is its own group") {
  const Tree tree;
  tree.write("self", "4:memory:/docker/0123\n1:cpu:/docker/0123\n0::/../host");
  tree.write("fs/cpu/cpu.cfs_quota_us", "200000");
  tree.write("fs/cpu/cpu.cfs_period_us", "100000");
  tree.write("fs/memory/memory.limit_in_bytes", "4096");
  tree.write("fs/unified/cpu.max", "300000 100000");
  CHECK(tree.limits().cpus == 2);
  CHECK(tree.limits().memory == 4096);
}

TEST_CASE("a thread knows how long it had no CPU") {
  if (access("/proc/thread-self/schedstat", R_OK) != 0) return;
  // Two threads that never rest on one CPU: one of them waits at any time.
  static std::atomic<bool> stop;
  stop = false;
  const auto spin = [](void*) {
    pin_this_thread(0);
    while (!stop) {
    }
  };
  const auto sleep = [](void*) {
    while (!stop) usleep(1000);
  };
  auto first = Thread::start("first", spin, nullptr);
  auto second = Thread::start("second", spin, nullptr);
  auto third = Thread::start("third", sleep, nullptr);
  REQUIRE((first.ok() && second.ok() && third.ok()));
  usleep(200'000);
  const int64_t starved = first->starved_ns() + second->starved_ns();
  CHECK(starved > 50'000'000);
  CHECK(third->starved_ns() >= 0);
  CHECK(third->starved_ns() < starved);
  stop = true;
  first->join();
  CHECK(first->starved_ns() == -1);
}

TEST_CASE("the machine is known") {
  CHECK(available_cpus() >= 1);
  CHECK(total_memory() > (uint64_t{1} << 26));
  CHECK(available_memory() > 0);
  CHECK(available_memory() <= total_memory());
  CHECK(resident_anonymous_bytes() > 0);
  CHECK(resident_bytes() > resident_anonymous_bytes());
  CHECK(monotonic_ns() > 0);
}

}  // namespace
}  // namespace dsv3
