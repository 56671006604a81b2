// CPU masks of any size: those of this machine, and of one with more CPUs than a cpu_set_t has.
#include "runtime/base/os_affinity.h"

#include <doctest/doctest.h>
#include <errno.h>
#include <sched.h>
#include <stdlib.h>

#include <fstream>
#include <string>
#include <vector>

#include "runtime/base/os.h"

namespace dsv3 {
namespace {

// What the system says in words: "0-1,4".
std::vector<int> allowed_cpus() {
  std::ifstream in("/proc/thread-self/status");
  const std::string key = "Cpus_allowed_list:";
  std::vector<int> cpus;
  for (std::string line; std::getline(in, line);) {
    if (line.rfind(key, 0) != 0) continue;
    const char* p = line.c_str() + key.size();
    while (*p != 0) {
      char* end = nullptr;
      const long first = strtol(p, &end, 10);
      const long last = *end == '-' ? strtol(end + 1, &end, 10) : first;
      for (long cpu = first; cpu <= last; ++cpu) cpus.push_back(static_cast<int>(cpu));
      p = *end == ',' ? end + 1 : "";
    }
  }
  return cpus;
}

std::vector<int> cpus_of(const CpuMask& mask) {
  std::vector<int> cpus;
  for (int i = 0; i < mask.count(); ++i) cpus.push_back(mask.nth(i));
  CHECK(mask.nth(mask.count()) == -1);
  return cpus;
}

// A machine of 5,000 CPUs: the system refuses masks that are smaller.
std::vector<int> rooms;  // of the masks that were tried
int many_cpus(size_t bytes, void* mask) {
  rooms.push_back(static_cast<int>(bytes * 8));
  if (bytes * 8 < 5000) return EINVAL;
  for (const size_t cpu : {3, 1023, 1024, 4999})
    CPU_SET_S(cpu, bytes, static_cast<cpu_set_t*>(mask));
  return 0;
}

TEST_CASE("the CPUs of this process, at whatever size the mask begins") {
  const std::vector<int> allowed = allowed_cpus();
  if (allowed.empty()) return;  // a system that does not say
  for (const int room : {1, 64, 1024, 100000}) {
    CAPTURE(room);
    const CpuMask mask = CpuMask::of_this_thread(CpuMask::of_system, room);
    CHECK(cpus_of(mask) == allowed);
    CHECK(mask.room() >= room);
  }
  CHECK(available_cpus() >= 1);
  CHECK(available_cpus() <= static_cast<int>(allowed.size()));  // fewer: a quota
}

TEST_CASE("more CPUs than 1,024: the mask grows until it suffices") {
  rooms.clear();
  const CpuMask mask = CpuMask::of_this_thread(many_cpus);
  CHECK(rooms == std::vector<int>{1024, 2048, 4096, 8192});
  CHECK(cpus_of(mask) == std::vector<int>{3, 1023, 1024, 4999});
  CHECK(cpus_of(CpuMask::only(4999)) == std::vector<int>{4999});
  CHECK(CpuMask::only(4999).room() >= 5000);
}

TEST_CASE("a system that says nothing ends the search") {
  static int calls;
  calls = 0;
  const auto refused = [](size_t, void*) {
    calls += 1;
    return EPERM;
  };
  CHECK(CpuMask::of_this_thread(refused).count() == 0);
  CHECK(calls == 1);
  const auto never = [](size_t, void*) {
    calls += 1;
    return EINVAL;
  };
  CHECK(CpuMask::of_this_thread(never).count() == 0);
  CHECK(calls < 20);
}

TEST_CASE("a thread is pinned to the CPU of its index, modulo their number") {
  const CpuMask before = CpuMask::of_this_thread();
  const int count = before.count();
  if (count == 0) return;
  for (const int index : {0, count - 1, count, 3 * count + count / 2}) {
    CAPTURE(index);
    struct Pinned {
      int index;
      std::vector<int> cpus;
      int cpu = -1;
    } pinned{.index = index, .cpus = {}};
    auto thread = Thread::start(
        "pinned",
        [](void* arg) {
          auto* self = static_cast<Pinned*>(arg);
          pin_this_thread(self->index);
          self->cpus = allowed_cpus();
          self->cpu = sched_getcpu();
        },
        &pinned);
    REQUIRE(thread.ok());
    thread->join();
    CHECK(pinned.cpu == before.nth(index % count));
    CHECK(pinned.cpus == std::vector<int>{pinned.cpu});
  }
  CHECK(cpus_of(CpuMask::of_this_thread()) == cpus_of(before));  // only that thread
}

}  // namespace
}  // namespace dsv3
