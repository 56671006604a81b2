#include "kernels/cpu/pool.h"

#include <sched.h>

#include <cassert>
#include <new>

namespace dsv3::kernels {
namespace {

// How long a worker without a job spins, and then yields, before it sleeps. The gaps between the
// operations of a step are a few microseconds, those between two tokens some tens.
constexpr int64_t kSpinNs = 20'000;
constexpr int64_t kYieldNs = 300'000;

inline void cpu_relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Waits until ready() holds: spins for about a microsecond, then gives the CPU away in between, for
// what we wait for may be a thread that waits for this very CPU.
template <class Ready>
void wait_until(Ready ready) {
  for (int i = 0; i < 64; ++i) {
    if (ready()) return;
    cpu_relax();
  }
  for (;;) {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return;
      cpu_relax();
    }
    sched_yield();
  }
}

}  // namespace

Result<std::unique_ptr<Pool>> Pool::create(int threads, bool pin) try {
  std::unique_ptr<Pool> pool(new Pool());
  const int others = threads - 1;
  pool->worker_args_.resize(static_cast<size_t>(others));
  pool->workers_.reserve(static_cast<size_t>(others));
  for (int i = 0; i < others; ++i) {
    Worker& args = pool->worker_args_[static_cast<size_t>(i)];
    args = {pool.get(), i + 1, pin};
    DSV3_ASSIGN(Thread thread, Thread::start("dsv3-compute", worker_main, &args));
    pool->workers_.push_back(std::move(thread));
  }
  return pool;
} catch (const std::bad_alloc&) {
  return make_error(Code::kOutOfMemory, "no memory for a pool of %d threads", threads);
}

Pool::~Pool() {
  stop_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  workers_.clear();  // joins
}

uint32_t Pool::wait_for_job(uint32_t seen) const {
  uint32_t epoch = 0;
  int64_t start = 0;
  for (int round = 0;; ++round) {
    for (int i = 0; i < 64; ++i) {
      epoch = epoch_.load(std::memory_order_acquire);
      if (epoch != seen) return epoch;
      cpu_relax();
    }
    const int64_t now = monotonic_ns();
    if (round == 0) start = now;
    if (now - start > kYieldNs) break;
    if (now - start > kSpinNs) sched_yield();
  }
  epoch_.wait(seen, std::memory_order_acquire);
  return epoch_.load(std::memory_order_acquire);
}

void Pool::worker_main(void* argument) {
  auto* self = static_cast<Worker*>(argument);
  Pool* pool = self->pool;
  if (self->pin) pin_this_thread(self->index);
  uint32_t seen = 0;
  for (;;) {
    const uint32_t epoch = pool->wait_for_job(seen);
    if (pool->stop_.load()) return;
    uint32_t entry = pool->entry_.load(std::memory_order_acquire);
    bool inside = false;
    while ((entry & kOpen) != 0 && !inside) {
      inside = pool->entry_.compare_exchange_weak(entry, entry + 1, std::memory_order_acquire);
    }
    if (!inside) {  // that job is over already
      seen = epoch;
      continue;
    }
    // It may be a later job than the one that woke us; while we are inside there is no next one.
    seen = pool->epoch_.load(std::memory_order_acquire);
    pool->work(self->index);
    pool->entry_.fetch_sub(1, std::memory_order_release);
  }
}

void Pool::work(int worker) {
  for (int p = 0; p < phase_count_; ++p) {
    const Phase& phase = phases_[static_cast<size_t>(p)];
    Counter& counter = counters_[static_cast<size_t>(p)];
    for (;;) {
      const int task = counter.next.fetch_add(1, std::memory_order_relaxed);
      if (task >= phase.tasks) break;
      phase.run(phase.context, task, worker);
      counter.done.fetch_add(1, std::memory_order_acq_rel);
    }
    if (p + 1 == phase_count_) break;  // run() waits for everybody to leave
    wait_until([&] { return counter.done.load(std::memory_order_acquire) >= phase.tasks; });
  }
}

void Pool::run(std::span<const Phase> phases) {
  assert(phases.size() <= kMaxPhases);
  int most_tasks = 0;
  for (const Phase& phase : phases)
    most_tasks = phase.tasks > most_tasks ? phase.tasks : most_tasks;
  if (workers_.empty() || most_tasks <= 1) {
    for (const Phase& phase : phases) {
      for (int task = 0; task < phase.tasks; ++task) phase.run(phase.context, task, 0);
    }
    return;
  }
  phase_count_ = static_cast<int>(phases.size());
  for (size_t p = 0; p < phases.size(); ++p) {
    phases_[p] = phases[p];
    counters_[p].next.store(0, std::memory_order_relaxed);
    counters_[p].done.store(0, std::memory_order_relaxed);
  }
  // Opened before it is announced. A worker may come in between, on the heels of the job before;
  // then it sees the old epoch, finds the work done later, and looks in once more: harmless.
  entry_.store(kOpen, std::memory_order_release);
  epoch_.fetch_add(1, std::memory_order_seq_cst);
  epoch_.notify_all();
  work(0);
  entry_.fetch_and(~kOpen, std::memory_order_acq_rel);
  wait_until([&] { return entry_.load(std::memory_order_acquire) == 0; });
}

}  // namespace dsv3::kernels
