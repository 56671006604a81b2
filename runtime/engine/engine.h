// One engine per context: a device, the model bound to it, the pool of latent pages, and one thread
// that serves tasks in steps: plan, reserve pages, run, commit or roll back. One task's failure is
// its own.
//
// Threads: mutex() guards the list of tasks, every session's state and the page pool. The device
// and the forward pass belong to the engine's thread alone and run without the mutex. Callbacks of
// the embedder run without any lock of the engine.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/base/os.h"
#include "runtime/base/status.h"
#include "runtime/cache/snapshot.h"
#include "runtime/engine/disk_cache.h"
#include "runtime/engine/draft.h"
#include "runtime/engine/latent_cache.h"
#include "runtime/engine/sampler.h"
#include "runtime/engine/scheduler.h"
#include "runtime/engine/session.h"
#include "runtime/engine/task.h"
#include "runtime/engine/trace.h"
#include "runtime/forward/model.h"
#include "runtime/model/model.h"

namespace dsv3 {

enum class LogLevel : int32_t { kError = 1, kWarning = 2, kInfo = 3, kDebug = 4 };
using LogFn = void (*)(void* user, int32_t level, const char* message);

struct EngineOptions {
  int32_t threads = 0;        // 0: the CPUs this process may use
  std::string kernels;        // "": the best this machine runs
  uint64_t cache_bytes = 0;   // 0: four sequences of max_position_embeddings, at most 1/4 of memory
  int32_t prefill_chunk = 0;  // 0: kDefaultPrefillChunk, or with expand_prompts its own
  bool pin_threads = false;
  // Prompts' keys and values may be expanded (kernels::expands): faster, and other bits.
  bool expand_prompts = false;
  bool prefix_cache = true;       // sessions find each other's latents of the same beginning
  std::string disk_cache_dir;     // "": prefixes are kept in memory only
  uint64_t disk_cache_bytes = 0;  // 0: kDefaultDiskCacheBytes
  LogFn log = nullptr;
  void* log_user = nullptr;

  Status validate() const;
};
inline constexpr int32_t kDefaultPrefillChunk = 256;
// Every chunk expands the keys before it again.
inline constexpr int32_t kDefaultExpandedChunk = 512;
inline constexpr uint64_t kDefaultDiskCacheBytes = uint64_t{1} << 30;
inline constexpr int32_t kMaxBatch = 16;  // rows of one call of the head; a step has room for more
inline constexpr int32_t kMaxStepTasks = 64;  // tasks that share a step

struct EngineInfo {
  int32_t threads = 0;
  bool bit_identical = true;
  const char* kernels = "";
  const char* allocator = "";
  uint64_t page_bytes = 0, pages = 0, pages_used = 0;
  uint64_t sessions = 0, requests_running = 0, requests_waiting = 0;
};

// Since the context was made, but for the pages, which are of now.
struct EngineStatistics {
  uint64_t steps = 0, steps_abandoned = 0, rows = 0, step_ns = 0;
  uint64_t requests_finished = 0;
  uint64_t prompt_tokens = 0, cached_tokens = 0;  // of finished requests, as are the next three
  uint64_t generated_tokens = 0, drafted_tokens = 0, accepted_tokens = 0;
  uint64_t queue_ns = 0, prefill_ns = 0, decode_ns = 0;  // theirs too
  uint64_t pages = 0, pages_used = 0, pages_cached = 0, pages_high_water = 0;
  LatentCache::Counters cache;
};

struct MemoryEstimate {
  uint64_t weight_bytes = 0, cache_bytes = 0, cache_tokens = 0, scratch_bytes = 0;
  uint64_t machine_bytes = 0;
};

class Engine : public std::enable_shared_from_this<Engine> {
 public:
  // `device`: instead of one that the options describe, for tests.
  static Result<std::shared_ptr<Engine>> create(std::shared_ptr<const Model> model,
                                                const EngineOptions& options,
                                                std::unique_ptr<kernels::Device> device = nullptr);
  // What create() would need.
  static Result<MemoryEstimate> estimate(const Model& model, const EngineOptions& options);
  ~Engine();
  Engine(const Engine&) = delete;

  // Ends all tasks (kCancelled) and the thread; sessions stay valid to ask and to free. Waits for
  // the thread, except on a thread of an engine (a deferred free), where it cannot.
  void shutdown() noexcept;
  // Whether this is another process than the one that made the engine. Nothing that locks may be
  // called then: another thread may have held the lock at the time of the fork.
  bool forked() const { return process_id() != process_; }
  Status check_process() const;

  const Model& model() const { return *model_; }
  EngineInfo info() const;
  EngineStatistics statistics() const;
  // Both of the same moment. load: how often each expert was chosen,
  // [layers with MTP modules, n_routed_experts].
  EngineStatistics statistics(std::vector<uint64_t>* load) const;
  Status start_trace(const std::string& path, uint64_t max_bytes);
  Status start_trace(WriteBytes write, uint64_t max_bytes);
  Status stop_trace();
  Result<std::shared_ptr<Session>> create_session();
  // Ids within the vocabulary, and `length` + tokens within the longest sequence.
  Status check_tokens(std::span<const int32_t> tokens, int64_t length) const;
  // kCapacity, not retryable, when the whole pool cannot hold so many tokens.
  Status check_fits(int64_t tokens) const;
  // Whether pool, tables and prefix index agree (kInternal if not). For tests; builds for debugging
  // and with sanitizers do it after every step.
  Status check_pages() const;

  // Hands a task over. `prepare(Session::State&)` runs under the mutex when the session is free,
  // and may refuse. kBusy when another task runs on the session; waits for one that was abandoned.
  template <class Prepare>
  Status submit(std::shared_ptr<Task> task, Prepare prepare);
  // Makes an idle engine look at its tasks again.
  void wake() noexcept;
  // The same after a task was cancelled: it ends within a layer of the step that runs.
  void wake_to_end() noexcept;
  // The same, and a step of worse classes gives way, as when a task of this class is submitted.
  void wake_for(Priority priority) noexcept;
  // Cancels the task that runs on the session, if any.
  void cancel_running(const Session& session) noexcept;

  // Runs `work` on the engine's thread between two steps, without the mutex, and waits for it.
  // kCancelled when the context was freed.
  Status between_steps(const std::function<Status(kernels::Device*)>& work);
  // Inside between_steps(): makes positions [begin, end) of a pinned session writable.
  Status reserve_positions(Session* session, int64_t begin, int64_t end);
  // --- The disk cache's thread only.
  // The task's tokens as far as pages of them can be found.
  std::vector<int32_t> restorable(Task* task) const;
  // Inside between_steps(): `page` follows what is computed of the task's session; the index and
  // the session get it. False: there is no room for it, or nobody waits for it any more.
  bool adopt_page(kernels::Device* device, Task* task, std::span<const int32_t> prefix,
                  const std::byte* page);
  // Inside between_steps(): copies up to `count` pages from page `begin` of the tokens' chain on,
  // as far as the index has them. Returns how many that were.
  size_t copy_pages(kernels::Device* device, std::span<const int32_t> tokens, size_t begin,
                    size_t count, std::byte* out) const;
  void restored(Task* task);

  // Whose latents this engine's pages hold.
  LatentIdentity latent_identity() const;

  // --- Sessions and tasks only.
  std::mutex& mutex() const { return mutex_; }
  // Locks the mutex with no task running on the session.
  Status lock_idle(const Session& session, std::unique_lock<std::mutex>* lock);
  void session_made(Session* session);           // under the mutex
  void session_gone(Session* session) noexcept;  // under the mutex
  // Its latents came from elsewhere: others may find them. Under the mutex.
  void session_loaded(Session* session) noexcept {
    cache_->keep(session);
    cache_->touch(session);
  }
  // As much as by a request: it is not the first to lose its pages. Under the mutex.
  void session_used(Session* session) noexcept { cache_->touch(session); }
  const Status& out_of_memory() const { return out_of_memory_; }
  void log(LogLevel level, const char* message) const noexcept;

 private:
  Engine(std::shared_ptr<const Model> model, const EngineOptions& options);
  Status start();
  Status set_trace(std::unique_ptr<Trace> trace);
  EngineStatistics locked_statistics() const;  // under the mutex, as the next
  void announce(Priority priority);
  void reserve_table(Session* session);

  // The engine's thread: loop.cc.
  static void thread_main(void* self);
  void loop();
  struct StoppedTasks {
    std::array<std::shared_ptr<Task>, 16> tasks;
    std::array<FinishReason, 16> reasons;
    size_t count = 0;
  };
  void collect_stopped(StoppedTasks* out);
  int64_t next_look(int64_t now) const;
  void wait_for_work(std::unique_lock<std::mutex>* lock);
  void run_errands();
  void run_plan(StepPlan* plan);
  void run_step(StepPlan* plan);
  void admit();
  void reserve_pages(StepPlan* plan);
  Status reserve_part(PlanRows* part);
  void gather_rows(StepPlan* plan);
  void commit(StepPlan* plan, const Step& step);
  void draft_mtp(const StepPlan& plan);
  void run_alone(StepPlan* plan);
  int64_t computed_after(const PlanRows& part) const;
  void set_computed(const PlanRows& part);
  void fail(PlanRows* part, const Status& status);
  void end_task(std::shared_ptr<Task> task, Finish finish) noexcept;
  static bool should_stop(void* self);
  bool should_give_way(int32_t done, int64_t now);
  bool others_end(int64_t now);
  void count_step(const StepPlan& plan, bool abandoned);
  void log_trace_error() noexcept;
  void finish_trace() noexcept;  // when nobody uses it any more

  const std::shared_ptr<const Model> model_;
  const EngineOptions options_;
  const uint64_t process_;
  const Status out_of_memory_, internal_, cancelled_,
      deadline_;  // made beforehand: reporting them cannot fail

  std::unique_ptr<kernels::Device> device_;
  std::unique_ptr<ForwardModel> forward_;
  std::unique_ptr<LatentCache> cache_;
  std::unique_ptr<DiskCache> disk_;  // may be null

  mutable std::mutex mutex_;
  std::condition_variable work_;  // the engine's thread waits here
  // What between_steps() was given, linked; its callers own the entries.
  struct Errand {
    const std::function<Status(kernels::Device*)>* work = nullptr;
    Status status;
    bool done = false;
    Errand* next = nullptr;
  };
  Errand* errands_ = nullptr;
  std::condition_variable errand_done_;
  std::condition_variable idle_;  // who waits for an abandoned task's end
  std::vector<std::shared_ptr<Task>> tasks_;
  bool wake_ = false;     // something changed since the thread last looked
  bool detach_ = false;   // nobody will join the thread
  bool closing_ = false;  // no task is taken any more; the disk cache still is written
  std::atomic<bool> stop_{false};
  uint64_t sessions_ = 0, submitted_ = 0;
  EngineStatistics statistics_;
  std::vector<uint64_t> expert_load_;  // after the last step
  std::shared_ptr<Engine> self_;       // held for the thread
  std::optional<Thread> thread_;

  // The engine's thread's own.
  std::unique_ptr<Scheduler> scheduler_;
  std::unique_ptr<Sampler> sampler_;
  StepPlan plan_;
  const StepPlan* running_ = nullptr;
  std::unique_ptr<Trace> trace_;
  int64_t step_begin_ns_ = 0;
  int64_t first_layer_ = 0;   // of the running step: not 0 when it was interrupted before
  int32_t layers_begun_ = 0;  // of the running step, this time
  bool gave_way_ = false;     // the running step was interrupted for a better class
  // The best class of a task that came since the last plan; read between layers.
  std::atomic<int32_t> newcomer_{kNobody};
  static constexpr int32_t kNobody = 1 << 30;
  std::atomic<bool> errand_waits_{false};  // read between layers
  std::atomic<bool> end_asked_{false};     // look at all tasks; read between layers
  int64_t next_look_ns_ = 0;               // at the tasks' deadlines and tokens while a step runs
  std::vector<int32_t> step_tokens_;
  std::vector<kernels::SequenceRows> step_sequences_;
  std::unique_ptr<StepLogits> step_logits_;
  DraftExperience draft_experience_;
  std::unique_ptr<MtpDrafter> mtp_drafter_;  // null without a module
  std::vector<MtpShare> mtp_shares_;
  std::vector<MtpGuesses> mtp_guesses_;  // [kMaxStepTasks]
};

template <class Prepare>
Status Engine::submit(std::shared_ptr<Task> task, Prepare prepare) {
  std::unique_lock<std::mutex> lock;
  Session& session = task->session();
  DSV3_TRY(lock_idle(session, &lock));
  if (closing_) {
    return Status(Code::kCancelled, "the context was freed", "context");
  }
  tasks_.reserve(tasks_.size() + 1);  // what can fail comes before the session is changed
  scheduler_->reserve(tasks_.size() + 1);
  reserve_table(&session);
  DSV3_TRY(prepare(session.state()));
  session.publish();
  session.state().running = task.get();
  task->order = ++submitted_;
  announce(task->priority());
  // The step that runs knows nothing of its deadline and token.
  if (task->ends_by_itself()) end_asked_.store(true, std::memory_order_relaxed);
  tasks_.push_back(std::move(task));
  wake_ = true;
  work_.notify_one();
  return {};
}

}  // namespace dsv3
