#include "kernels/cpu/pool.h"

#include <sched.h>

#include <algorithm>
#include <cassert>
#include <limits>
#include <new>

namespace dsv3::kernels {
namespace {

// How long a worker without a job spins, and then yields, before it sleeps. The gaps between the
// operations of a step are a few microseconds, those between two tokens some tens.
constexpr int64_t kSpinNs = 20'000;
constexpr int64_t kYieldNs = 300'000;

// How long the caller spins for the workers' last tasks before it asks how they fare, and what it
// takes for a stall: other programs take a CPU for a millisecond and more.
constexpr int64_t kPatienceNs = 20'000;
constexpr int64_t kStallNs = 100'000;

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

Result<std::unique_ptr<Pool>> Pool::create(int threads, bool pin, const PoolTimes& times) try {
  std::unique_ptr<Pool> pool(new Pool(threads, times));
  const int others = threads - 1;
  pool->limit_.store(threads);
  pool->workers_.reserve(static_cast<size_t>(others));
  for (int i = 0; i < others; ++i) {
    Worker& args = pool->worker_args_[static_cast<size_t>(i)];
    args.pool = pool.get();
    args.index = i + 1;
    args.pin = pin;
    DSV3_ASSIGN(Thread thread, Thread::start("dsv3-compute", worker_main, &args));
    pool->workers_.push_back(std::move(thread));
  }
  return pool;
} catch (const std::bad_alloc&) {
  return make_error(Code::kOutOfMemory, "no memory for a pool of %d threads", threads);
}

Pool::~Pool() {
  stop_.store(true);
  limit_.store(std::numeric_limits<int>::max());
  limit_.notify_all();
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
    // A rest ends here alone: jobs that come and go meanwhile do not wake this worker.
    for (int limit = 0; (limit = pool->limit_.load(std::memory_order_relaxed)) <= self->index;) {
      pool->limit_.wait(limit, std::memory_order_relaxed);
    }
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
    // The limit may have fallen since this worker began to look out for a job.
    if (pool->limit_.load(std::memory_order_relaxed) > self->index) {
      self->inside.store(true, std::memory_order_relaxed);
      pool->work(self->index);
      self->inside.store(false, std::memory_order_relaxed);
    }
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
    const auto done = [&] { return counter.done.load(std::memory_order_acquire) >= phase.tasks; };
    if (worker == 0) {
      wait_for_workers(done);
    } else {
      wait_until(done);
    }
  }
}

template <class Ready>
void Pool::wait_for_workers(const Ready& ready) {
  for (int i = 0; i < 64; ++i) {
    if (ready()) return;
    cpu_relax();
  }
  const int64_t begin = times_.now();
  while (times_.now() - begin < kPatienceNs) {
    for (int i = 0; i < 16; ++i) {
      if (ready()) return;
      cpu_relax();
    }
  }
  note_starved(ready);
  wait_until(ready);
  judge_wait(begin);
}

template <class Ready>
void Pool::note_starved(const Ready& ready) {
  for (Worker& worker : worker_args_) {
    const bool ask = worker.inside.load(std::memory_order_relaxed) && !ready();
    worker.starved_ns =
        ask ? times_.starved_ns(workers_[static_cast<size_t>(worker.index - 1)]) : -1;
  }
}

void Pool::judge_wait(int64_t begin) {
  const int64_t now = times_.now();
  if (now - begin < kStallNs) return;
  int64_t most = 0;
  for (const Worker& worker : worker_args_) {
    if (worker.starved_ns < 0) continue;
    const int64_t starved = times_.starved_ns(workers_[static_cast<size_t>(worker.index - 1)]);
    most = std::max(most, starved - worker.starved_ns);
  }
  if (most == 0) return;
  throttle_.lose(now, std::min(most, now - begin));
  set_limit(throttle_.limit());
}

void Pool::set_limit(int limit) {
  if (limit_.load(std::memory_order_relaxed) == limit) return;
  limit_.store(limit, std::memory_order_relaxed);
  limit_.notify_all();
}

void Pool::run(std::span<const Phase> phases) {
  if (throttle_.is_resting()) {
    throttle_.advance(times_.now());
    set_limit(throttle_.limit());
  }
  run_with(throttle_.limit(), phases);
}

void Pool::run_on_all(const Phase& phase) {
  set_limit(threads());  // run() sets it again when some should rest
  run_with(threads(), {&phase, 1});
}

// With the workers below `limit`, which is limit_.
void Pool::run_with(int limit, std::span<const Phase> phases) {
  assert(phases.size() <= kMaxPhases);
  int most_tasks = 0;
  for (const Phase& phase : phases)
    most_tasks = phase.tasks > most_tasks ? phase.tasks : most_tasks;
  if (limit == 1 || most_tasks <= 1) {
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
  wait_for_workers([&] { return entry_.load(std::memory_order_acquire) == 0; });
}

}  // namespace dsv3::kernels
