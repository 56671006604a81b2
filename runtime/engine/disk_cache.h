// The prefix index's second home: full pages of prefixes in a directory, written when requests end,
// read when a request begins with tokens that memory does not know. A thread of its own does the
// input and output; the engine's thread only copies pages between its steps, some at a time, so
// that other requests do not wait for the disk.
//
// A request waits for what is read for it (it is not planned meanwhile, but can be cancelled). What
// goes wrong with the disk is logged and costs no more than computing again.
#pragma once

#include <atomic>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "runtime/base/os.h"
#include "runtime/base/status.h"
#include "runtime/cache/disk_tier.h"
#include "runtime/engine/task.h"

namespace dsv3 {

class Engine;

class DiskCache {
 public:
  static Result<std::unique_ptr<DiskCache>> open(const std::string& path, uint64_t max_bytes,
                                                 const LatentIdentity& identity);
  ~DiskCache();

  Status start(std::shared_ptr<Engine> engine);
  // Finishes what waits to be written, for at most `wait_ns`, and ends the thread. `may_wait`
  // false: at once, and the thread ends by itself. Before the engine's thread stops.
  void stop(int64_t wait_ns, bool may_wait) noexcept;

  // --- Called under the engine's mutex.
  // Reads the pages that follow what is computed of the task's session; task->restoring is set
  // until that is done. False: it cannot.
  bool restore(const std::shared_ptr<Task>& task) noexcept;
  // Writes the full pages of these tokens, as far as the prefix index has them when their turn
  // comes. Of too many that wait the oldest is forgotten.
  void keep(std::span<const int32_t> tokens) noexcept;

 private:
  explicit DiskCache(std::unique_ptr<DiskTier> tier, const LatentIdentity& identity)
      : tier_(std::move(tier)), identity_(identity) {}
  static void thread_main(void* self);
  void loop();
  void read_for(Task* task);
  void weed(std::span<const int32_t> tokens, size_t begin);
  void write(std::vector<int32_t> tokens);
  // Requests wait for what is read: if one does, these tokens are written after that.
  bool gives_way(std::vector<int32_t>* tokens);
  void report(const Status& status);
  size_t pages_at_once() const;

  const std::unique_ptr<DiskTier> tier_;
  const LatentIdentity identity_;
  std::shared_ptr<Engine> engine_;  // held by the thread
  std::optional<Thread> thread_;
  std::vector<std::byte> buffer_, page_;  // the thread's
  Status last_error_;

  std::mutex mutex_;  // taken inside the engine's, never the other way round
  std::condition_variable work_, done_;
  std::deque<std::shared_ptr<Task>> reads_;
  std::deque<std::vector<int32_t>> writes_;
  bool stop_ = false, detach_ = false, ended_ = false;
  std::atomic<bool> hurry_{false};  // leave the rest
};

}  // namespace dsv3
