// The threads of one CPU device. run() shares out the tasks of a job; the calling thread works too.
//
// Made for many small jobs in a row on cores that others use as well: workers that are awake join a
// job by themselves and take tasks until there are none, so a job never waits for a worker that is
// asleep or descheduled, only for tasks somebody has begun. After a job a worker looks out for the
// next one for a fraction of a millisecond, first spinning, then yielding, then it sleeps: an idle
// context burns no CPU.
//
// Used by one thread at a time.
#pragma once

#include <array>
#include <atomic>
#include <memory>
#include <span>
#include <vector>

#include "runtime/base/alloc.h"
#include "runtime/base/os.h"
#include "runtime/base/status.h"

namespace dsv3::kernels {

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

  static Result<std::unique_ptr<Pool>> create(int threads, bool pin);
  ~Pool();
  Pool(const Pool&) = delete;

  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  // Returns when all tasks of all phases are done. Allocates nothing.
  void run(std::span<const Phase> phases);

 private:
  struct Worker {
    Pool* pool = nullptr;
    int index = 0;
    bool pin = false;
  };
  // Counters of a phase, on cache lines of their own.
  struct Counter {
    alignas(kCacheLine) std::atomic<int> next{0};
    alignas(kCacheLine) std::atomic<int> done{0};
  };
  static constexpr uint32_t kOpen = 1u << 31;

  Pool() = default;
  static void worker_main(void* worker);
  uint32_t wait_for_job(uint32_t seen) const;
  void work(int worker);

  std::vector<Worker> worker_args_;
  std::vector<Thread> workers_;

  // The job; written by the caller while no worker is inside.
  std::array<Phase, kMaxPhases> phases_;
  int phase_count_ = 0;
  std::array<Counter, kMaxPhases> counters_;

  alignas(kCacheLine) std::atomic<uint32_t> epoch_{0};  // counts jobs; workers wait on it
  std::atomic<bool> stop_{false};
  alignas(kCacheLine) std::atomic<uint32_t> entry_{0};  // kOpen | number of workers inside
};

}  // namespace dsv3::kernels
