// The threads of one CPU device. run() shares out the tasks of a job; the calling thread works too.
//
// Made for many small jobs in a row on cores that others use as well: workers that are awake join a
// job by themselves and take tasks until there are none, so a job never waits for a worker that is
// asleep or descheduled, only for tasks somebody has begun. After a job a worker looks out for the
// next one for a fraction of a millisecond, first spinning, then yielding, then it sleeps: an idle
// context burns no CPU.
//
// What it does wait for is a worker that lost its CPU to another program in the middle of a task.
// The system knows how long a thread was ready to run and did not; where that, and nothing else
// (uneven tasks, a page read from a disk), made the caller wait, Throttle hears of it and may let
// some or all workers sleep for a while. On a quiet machine hardly a wait is long enough to ask.
//
// Used by one thread at a time.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <span>
#include <vector>

#include "kernels/cpu/throttle.h"
#include "runtime/base/alloc.h"
#include "runtime/base/os.h"
#include "runtime/base/status.h"

namespace dsv3::kernels {

// What the caller's waits are judged by. A test brings times of its own: then it says who starves
// and when a rest is over. Called by the thread that calls run().
struct PoolTimes {
  int64_t (*now)() = monotonic_ns;
  int64_t (*starved_ns)(const Thread& worker) = [](const Thread& worker) {
    return worker.starved_ns();
  };
};

class Pool {
 public:
  // Tasks 0..tasks of one phase; a phase begins when all tasks of the one before are done. worker
  // is 0..threads() and tells which scratch to use. Tasks are taken in ascending order.
  struct Phase {
    void (*run)(void* context, int task, int worker) = nullptr;
    void* context = nullptr;
    int tasks = 0;
  };
  static constexpr int kMaxPhases = 4;

  static Result<std::unique_ptr<Pool>> create(int threads, bool pin, const PoolTimes& times = {});
  ~Pool();
  Pool(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  // Fewer while the machine is busy. Workers of this index and above run no task of a job that
  // began with it.
  int threads_in_use() const { return throttle_.limit(); }
  // Returns when all tasks of all phases are done. Allocates nothing.
  void run(std::span<const Phase> phases);
  // The same for one phase, with every thread however busy the machine is.
  void run_on_all(const Phase& phase);

 private:
  struct alignas(kCacheLine) Worker {
    Pool* pool = nullptr;
    int index = 0;
    bool pin = false;
    std::atomic<bool> inside{false};  // a hint: whom the caller may be waiting for
    int64_t starved_ns = -1;          // the caller's: at the beginning of its wait
  };
  // Counters of a phase, on cache lines of their own.
  struct Counter {
    alignas(kCacheLine) std::atomic<int> next{0};
    alignas(kCacheLine) std::atomic<int> done{0};
  };
  static constexpr uint32_t kOpen = 1u << 31;

  Pool(int threads, const PoolTimes& times)
      : times_(times), worker_args_(static_cast<size_t>(threads - 1)), throttle_(threads) {}
  static void worker_main(void* worker);
  uint32_t wait_for_job(uint32_t seen) const;
  void work(int worker);
  // The caller's waits: how long the workers have starved before and after tells why it waited.
  template <class Ready>
  void wait_for_workers(const Ready& ready);
  template <class Ready>
  void note_starved(const Ready& ready);
  void judge_wait(int64_t begin);
  void set_limit(int limit);
  void run_with(int limit, std::span<const Phase> phases);

  const PoolTimes times_;
  std::vector<Worker> worker_args_;
  std::vector<Thread> workers_;
  Throttle throttle_;

  // The job; written by the caller while no worker is inside.
  std::array<Phase, kMaxPhases> phases_;
  int phase_count_ = 0;
  std::array<Counter, kMaxPhases> counters_;

  alignas(kCacheLine) std::atomic<uint32_t> epoch_{0};  // counts jobs; workers wait on it
  std::atomic<int> limit_{0};  // workers of this index and above rest; they wait on it
  std::atomic<bool> stop_{false};
  alignas(kCacheLine) std::atomic<uint32_t> entry_{0};  // kOpen | number of workers inside
};

}  // namespace dsv3::kernels
