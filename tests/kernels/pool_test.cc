// The thread pool: every task once, phases in order, any number of threads, sleeping workers.
#include "kernels/cpu/pool.h"

#include <doctest/doctest.h>
#include <sched.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <vector>

namespace dsv3::test {
namespace {

using kernels::Pool;

struct Job {
  std::vector<int> first, second;  // plain ints: the pool orders all accesses
  std::vector<int> workers;
  int threads = 0;

  static void one(void* context, int task, int worker) {
    Job& job = *static_cast<Job*>(context);
    job.first[static_cast<size_t>(task)] += 1;
    job.workers[static_cast<size_t>(worker)] += 1;
  }
  // Reads what other threads wrote in the phase before.
  static void two(void* context, int task, int) {
    Job& job = *static_cast<Job*>(context);
    const size_t n = job.first.size();
    int sum = 0;
    for (int v : job.first) sum += v;
    job.second[static_cast<size_t>(task)] += sum == static_cast<int>(n) ? 1 : -1000;
  }
};

void check_jobs(int threads, int jobs, size_t tasks) {
  auto pool = Pool::create(threads, false);
  REQUIRE(pool.ok());
  CHECK((*pool)->threads() == threads);
  for (int i = 0; i < jobs; ++i) {
    Job job{std::vector<int>(tasks), std::vector<int>(tasks),
            std::vector<int>(static_cast<size_t>(threads)), threads};
    const Pool::Phase phases[] = {{Job::one, &job, static_cast<int>(tasks)},
                                  {Job::two, &job, static_cast<int>(tasks)},
                                  {Job::two, &job, static_cast<int>(tasks)}};
    (*pool)->run(phases);
    bool right = true;
    for (size_t t = 0; t < tasks; ++t) right = right && job.first[t] == 1 && job.second[t] == 2;
    CHECK(right);
  }
}

double cpu_seconds() {
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

}  // namespace

TEST_CASE("pool: every task once, phases in order") {
  check_jobs(1, 10, 7);
  check_jobs(2, 2000, 40);
  check_jobs(3, 500, 3);
  check_jobs(2, 100, 0);
  check_jobs(2, 100, 1);
}

TEST_CASE("pool: far more threads than cores") { check_jobs(24, 200, 64); }

TEST_CASE("pool: workers that fell asleep come back, and idle ones burn no CPU") {
  auto pool = Pool::create(3, false);
  REQUIRE(pool.ok());
  for (int round = 0; round < 5; ++round) {
    Job job{std::vector<int>(50), std::vector<int>(50), std::vector<int>(3), 3};
    const Pool::Phase phases[] = {{Job::one, &job, 50}, {Job::two, &job, 50}};
    (*pool)->run(phases);
    CHECK(job.second[49] == 1);
    timespec nap{0, 20'000'000};
    nanosleep(&nap, nullptr);
  }
  const double before = cpu_seconds();
  timespec nap{0, 200'000'000};
  nanosleep(&nap, nullptr);
  CHECK(cpu_seconds() - before < 0.02);
}

TEST_CASE("pool: made and freed at once, without a job, while workers start") {
  for (int i = 0; i < 50; ++i) {
    auto pool = Pool::create(1 + i % 5, false);
    CHECK(pool.ok());
  }
}

TEST_CASE("pool: uneven tasks leave nobody waiting for a fixed share") {
  auto pool = Pool::create(2, true);
  REQUIRE(pool.ok());
  struct Uneven {
    std::atomic<int> done{0};
    static void run(void* context, int task, int) {
      volatile double x = 1;
      for (int i = 0; i < (task == 0 ? 200000 : 100); ++i) x = x * 1.0000001;
      static_cast<Uneven*>(context)->done.fetch_add(1);
    }
  } job;
  const Pool::Phase phase{Uneven::run, &job, 100};
  (*pool)->run({&phase, 1});
  CHECK(job.done.load() == 100);
}

TEST_CASE("pool: a worker that finds no CPU is left out, and comes back when it finds one") {
  if (access("/proc/thread-self/schedstat", R_OK) != 0) return;  // then nobody is left out
  cpu_set_t before, one, others;
  REQUIRE(sched_getaffinity(0, sizeof before, &before) == 0);
  if (CPU_COUNT(&before) < 2) return;
  // Threads inherit the mask: the worker shares its CPU with a thread that never rests.
  CPU_ZERO(&one);
  for (int cpu = 0; CPU_COUNT(&one) == 0; ++cpu) {
    if (CPU_ISSET(cpu, &before)) CPU_SET(cpu, &one);
  }
  CPU_XOR(&others, &before, &one);
  sched_setaffinity(0, sizeof one, &one);
  static std::atomic<bool> stop;
  stop = false;
  auto busy = Thread::start(
      "busy",
      [](void*) {
        while (!stop) {
        }
      },
      nullptr);
  struct Spin {
    int workers[2] = {0, 0};
    static void run(void* context, int, int worker) {
      static_cast<Spin*>(context)->workers[worker] += 1;
      const int64_t end = monotonic_ns() + 100'000;
      while (monotonic_ns() < end) {
      }
    }
  } spin;
  const Pool::Phase phases[] = {{Spin::run, &spin, 8}, {Spin::run, &spin, 8}};
  auto pool = Pool::create(2, false);
  sched_setaffinity(0, sizeof others, &others);
  REQUIRE((busy.ok() && pool.ok()));
  const auto run_until = [&](int threads) {
    const int64_t end = monotonic_ns() + int64_t{10'000'000'000};
    while (monotonic_ns() < end && (*pool)->threads_in_use() != threads) (*pool)->run(phases);
    return (*pool)->threads_in_use() == threads;
  };
  CHECK(run_until(1));
  const int before_rest = spin.workers[1];
  for (int i = 0; i < 5; ++i) (*pool)->run(phases);
  CHECK(spin.workers[1] == before_rest);
  stop = true;
  CHECK(run_until(2));
  sched_setaffinity(0, sizeof before, &before);
}

}  // namespace dsv3::test
