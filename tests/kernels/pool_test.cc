// The thread pool: every task once, phases in order, any number of threads, sleeping workers.
#include "kernels/cpu/pool.h"

#include <doctest/doctest.h>
#include <sched.h>
#include <sys/resource.h>
#include <time.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <fstream>
#include <string>
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

// --- Times as the test wants them: who starves, how long, and when a rest is over.

constexpr int64_t kMs = 1'000'000;
std::atomic<int64_t> invented_now, invented_starved;
std::atomic<bool> asked;  // the caller has begun to wonder why it waits

const kernels::PoolTimes kInvented{
    // Goes on a little each time somebody looks, so that patience ends.
    .now = [] { return invented_now.fetch_add(1000); },
    .starved_ns =
        [](const Thread&) {
          const int64_t starved = invented_starved;
          asked = true;
          return starved;
        },
};

// A pool of `threads`, and jobs that need as many threads as the throttle allows.
struct Rested {
  static constexpr int kMostThreads = 8;
  std::unique_ptr<Pool> pool;
  int limit = 0;  // when the job began
  std::atomic<int> arrived{0};
  std::atomic<bool> late{false};  // somebody did not come
  std::array<std::atomic<int>, kMostThreads> tasks{};
  std::array<std::atomic<int>, kMostThreads> ids{};  // of the system

  explicit Rested(int threads) {
    invented_now = 1'000'000 * kMs;
    invented_starved = 0;
    auto made = Pool::create(threads, false, kInvented);
    REQUIRE(made.ok());
    pool = std::move(*made);
  }

  template <class Ready>
  void wait(const Ready& ready) {
    const int64_t end = monotonic_ns() + 20'000 * kMs;
    while (!ready() && !late) {
      if (monotonic_ns() > end) late = true;
      sched_yield();
    }
  }
  // The first tasks wait for each other, so that `limit` threads have to take one each.
  void count(int task, int worker) {
    tasks[static_cast<size_t>(worker)] += 1;
    ids[static_cast<size_t>(worker)] = gettid();
    if (task >= limit) return;
    arrived += 1;
    wait([&] { return arrived >= limit; });
  }
  static void meet(void* self, int task, int worker) {
    static_cast<Rested*>(self)->count(task, worker);
  }
  // All are in their tasks, and those of the workers last until the caller has waited for `stall`.
  static void stall(void* self, int task, int worker) {
    static_cast<Rested*>(self)->count(task, worker);
    if (worker == 0) return;
    static_cast<Rested*>(self)->wait([] { return asked.load(); });
    if (task != 0 && task != 1) return;  // one of the two is a worker's
    invented_now += 2 * kernels::Throttle::kTolerated;
    invented_starved += 2 * kernels::Throttle::kTolerated;
  }

  void begin() {
    limit = pool->threads_in_use();
    arrived = 0;
    for (auto& n : tasks) n = 0;
  }
  // Loses a stall's time, alone or between phases whose results have to be right.
  void lose(bool inside_a_job) {
    begin();
    asked = false;
    Job job{std::vector<int>(20), std::vector<int>(20), std::vector<int>(kMostThreads), 0};
    const Pool::Phase phases[] = {
        {Job::one, &job, 20}, {stall, this, limit}, {Job::two, &job, 20}, {Job::two, &job, 20}};
    pool->run(inside_a_job ? std::span(phases) : std::span(phases).subspan(1, 1));
    REQUIRE_FALSE(late);
    if (!inside_a_job) return;
    for (size_t t = 0; t < 20; ++t) CHECK((job.first[t] == 1 && job.second[t] == 2));
  }
  // Threads below the limit all run tasks, those above run none.
  void check() {
    begin();
    const Pool::Phase phase{meet, this, limit + 100};
    pool->run({&phase, 1});
    check_tasks();
    check_results();
  }
  // So do all in a job for every thread, which changes nothing for the next one.
  void check_all() {
    begin();
    const int in_use = limit;
    limit = pool->threads();
    pool->run_on_all({meet, this, limit + 100});
    check_tasks();
    limit = in_use;
    CHECK(pool->threads_in_use() == in_use);
    check();
  }
  void check_tasks() {
    REQUIRE_FALSE(late);
    int sum = 0;
    for (int worker = 0; worker < pool->threads(); ++worker) {
      CAPTURE(worker);
      CAPTURE(limit);
      const int n = tasks[static_cast<size_t>(worker)];
      CHECK((n > 0) == (worker < limit));
      sum += n;
    }
    CHECK(sum == limit + 100);
  }
  void check_results() const {
    Job job{std::vector<int>(30), std::vector<int>(30), std::vector<int>(kMostThreads), 0};
    const Pool::Phase phases[] = {{Job::one, &job, 30}, {Job::two, &job, 30}};
    pool->run(phases);
    for (size_t t = 0; t < 30; ++t) CHECK((job.first[t] == 1 && job.second[t] == 1));
    for (int worker = limit; worker < pool->threads(); ++worker) {
      CHECK(job.workers[static_cast<size_t>(worker)] == 0);
    }
  }

  // A line of what the system says about a worker; empty when it says nothing.
  std::string line(int worker, const std::string& name) const {
    std::ifstream in(format("/proc/self/task/%d/status", ids[static_cast<size_t>(worker)].load()));
    std::string text;
    while (std::getline(in, text)) {
      if (text.rfind(name + ":", 0) == 0) return text.substr(name.size() + 1);
    }
    return "";
  }
  // Those above the limit sleep through jobs instead of looking at each.
  void check_sleep() {
    const auto switches = [&](int worker) { return line(worker, "voluntary_ctxt_switches"); };
    if (switches(0).empty()) return;
    const auto each = [&](const auto& function) {
      for (int worker = limit; worker < pool->threads(); ++worker) function(worker);
    };
    check_results();  // whoever still waits for a job is woken by this one, or rests already
    std::array<std::string, kMostThreads> before;
    each([&](int worker) {
      wait([&] { return line(worker, "State").find('S') != std::string::npos; });
      before[static_cast<size_t>(worker)] = switches(worker);
    });
    REQUIRE_FALSE(late);
    for (int i = 0; i < 5; ++i) {
      check_results();
      const timespec nap{0, 2 * kMs};  // longer than a worker that waits for a job is awake
      nanosleep(&nap, nullptr);
    }
    each([&](int worker) {
      CAPTURE(worker);
      CAPTURE(limit);
      CHECK(switches(worker) == before[static_cast<size_t>(worker)]);
    });
  }
};

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
    std::atomic<int> done[2] = {0, 0};  // by worker
    std::atomic<int> took_long{0};      // the worker that the first task went to
    static void run(void* context, int task, int worker) {
      auto& job = *static_cast<Uneven*>(context);
      volatile double x = 1;
      for (int i = 0; i < (task == 0 ? 200000 : 100); ++i) x = x * 1.0000001;
      job.done[worker].fetch_add(1);
      if (task == 0) job.took_long = worker;
    }
  };
  // Whoever has the long one leaves the others to the other, wherever that one finds a CPU: a busy
  // machine may take some tries.
  int least = 100;
  for (int i = 0; i < 1000 && least > 25; ++i) {
    Uneven job;
    const Pool::Phase phase{Uneven::run, &job, 100};
    (*pool)->run({&phase, 1});
    CHECK(job.done[0] + job.done[1] == 100);
    least = std::min<int>(least, job.done[job.took_long]);
  }
  CHECK(least <= 25);
}

TEST_CASE("pool: a worker that finds no CPU is left out, and comes back when it finds one") {
  if (access("/proc/thread-self/schedstat", R_OK) != 0) return;  // then nobody is left out
  cpu_set_t before, one, others;
  if (sched_getaffinity(0, sizeof before, &before) != 0) return;  // more CPUs than it has bits
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

TEST_CASE("pool: workers above the limit run nothing, and work again when it rises") {
  for (const int threads : {2, 3, 8}) {
    for (const bool inside_a_job : {false, true}) {
      CAPTURE(threads);
      CAPTURE(inside_a_job);
      Rested rested(threads);
      rested.check();
      int limit = threads;
      while (limit > 1) {
        rested.lose(inside_a_job);
        limit -= std::max(1, limit / 4);
        REQUIRE(rested.pool->threads_in_use() == limit);
        rested.check();
        rested.check_all();
        rested.check_sleep();
      }
      while (limit < threads) {
        invented_now += kernels::Throttle::kLongestRest;
        rested.limit = limit = std::min(threads, 2 * limit);
        rested.check_results();
        REQUIRE(rested.pool->threads_in_use() == limit);
        rested.check();
      }
    }
  }
}

}  // namespace dsv3::test
