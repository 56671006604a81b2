#include "runtime/model/parallel.h"

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <new>
#include <vector>

#include "runtime/base/os.h"

namespace dsv3 {
namespace {

struct Shared {
  size_t count = 0;
  const std::function<Status(size_t)>* body = nullptr;
  std::mutex mutex;
  std::condition_variable done;
  size_t next = 0;
  int running = 0;
  bool stop = false;
  size_t error_index = 0;
  Status error;
  // Made beforehand: a thread without memory has none for them either.
  const Status out_of_memory{Code::kOutOfMemory, "out of memory", "", /*retryable=*/true};
  const Status internal{Code::kInternal, "an unexpected exception in a thread"};

  bool take(size_t* index) {
    const std::lock_guard lock(mutex);
    if (stop || next == count) return false;
    *index = next++;
    return true;
  }
  void fail(size_t index, Status status) {
    const std::lock_guard lock(mutex);
    stop = true;
    if (error.ok() || index < error_index) {
      error = std::move(status);
      error_index = index;
    }
  }
};

Status call(const Shared& shared, size_t index) {
  try {
    return (*shared.body)(index);
  } catch (const std::bad_alloc&) {
    return shared.out_of_memory;
  } catch (...) {
    return shared.internal;
  }
}

void work(void* arg) {
  Shared& shared = *static_cast<Shared*>(arg);
  size_t index = 0;
  while (shared.take(&index)) {
    Status status = call(shared, index);
    if (!status.ok()) shared.fail(index, std::move(status));
  }
  const std::lock_guard lock(shared.mutex);
  if (--shared.running == 0) shared.done.notify_all();
}

}  // namespace

int io_threads() { return std::clamp(available_cpus(), 1, 4); }

Status parallel_for(size_t count, int threads, const std::function<Status(size_t)>& body,
                    const std::function<bool()>& tick) {
  Shared shared;
  shared.count = count;
  shared.body = &body;
  // Declared after what the threads use: their destructors join.
  std::vector<Thread> pool;
  struct StopFirst {  // before the joins, also when tick throws
    Shared& shared;
    ~StopFirst() {
      const std::lock_guard lock(shared.mutex);
      shared.stop = true;
    }
  };
  const int wanted = static_cast<int>(std::min<size_t>(static_cast<size_t>(threads), count));
  pool.reserve(static_cast<size_t>(wanted));
  const StopFirst guard{shared};
  for (int i = 0; i < wanted; ++i) {
    {
      const std::lock_guard lock(shared.mutex);
      ++shared.running;
    }
    Result<Thread> thread = Thread::start("dsv3-io", work, &shared);
    if (!thread.ok()) {
      const std::lock_guard lock(shared.mutex);
      --shared.running;
      if (i == 0) return thread.status();
      break;  // fewer threads do the same work
    }
    pool.push_back(std::move(*thread));
  }

  bool cancelled = false;
  std::unique_lock lock(shared.mutex);
  while (!shared.done.wait_for(lock, std::chrono::milliseconds(20),
                               [&] { return shared.running == 0; })) {
    if (!tick || cancelled) continue;
    lock.unlock();
    cancelled = !tick();
    lock.lock();
    if (cancelled) shared.stop = true;
  }
  if (!shared.error.ok()) return shared.error;
  lock.unlock();
  if (cancelled || (tick && !tick())) {
    return {Code::kCancelled, "cancelled by its cancel token", "cancel"};
  }
  return {};
}

}  // namespace dsv3
