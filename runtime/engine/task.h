// What the scheduler serves: a generation (request.h) or an evaluation (evaluation.h) on a session.
// The engine computes a task's rows in steps and commits them; the task decides what happens then.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>

#include "runtime/base/status.h"
#include "runtime/engine/callback.h"
#include "runtime/engine/events.h"
#include "runtime/engine/sampler.h"
#include "runtime/engine/session.h"
#include "runtime/forward/model.h"

namespace dsv3 {

// Lower is served first.
enum class Priority : int32_t { kInteractive = 0, kBackground = 1, kIdle = 2 };

struct Finish {
  FinishReason reason = FinishReason::kNone;
  Status status;
};

// A step that ran, as a task sees its share of it.
struct StepRun {
  ForwardModel* forward = nullptr;
  Sampler* sampler = nullptr;
  const Step* step = nullptr;
  int32_t row_begin = 0;       // of the task's rows in the step
  int64_t begin = 0, end = 0;  // positions of these rows
  std::span<float> logits;     // [vocab] of the last row, where wants_logits() said so
  std::span<float> scratch;    // [max_head_rows, vocab]; overlaps `logits`
};

class Task {
 public:
  Task(std::shared_ptr<Session> session, Priority priority, std::shared_ptr<CancelToken> cancel,
       int64_t deadline_ns)
      : session_(std::move(session)),
        priority_(priority),
        token_(std::move(cancel)),
        deadline_ns_(deadline_ns) {}
  virtual ~Task() = default;
  Task(const Task&) = delete;

  Session& session() const { return *session_; }
  const std::shared_ptr<Session>& shared_session() const { return session_; }
  Priority priority() const { return priority_; }
  int64_t deadline_ns() const { return deadline_ns_; }
  bool has_cancel_token() const { return token_ != nullptr; }

  // Any thread, at any time. Engine::wake() afterwards makes an idle engine look.
  void cancel() noexcept { cancelled_.store(true, std::memory_order_relaxed); }
  // Cancelled by an owner that is gone: who wants to use the session next waits for the task's end
  // instead of being told kBusy.
  void abandon() noexcept {
    abandoned_.store(true, std::memory_order_relaxed);
    cancel();
  }
  bool abandoned() const noexcept { return abandoned_.load(std::memory_order_relaxed); }
  FinishReason stop_reason(int64_t now_ns) const noexcept {
    if (cancelled_.load(std::memory_order_relaxed) ||
        (token_ != nullptr && token_->cancelled.load(std::memory_order_relaxed))) {
      return FinishReason::kCancelled;
    }
    return now_ns >= deadline_ns_ ? FinishReason::kDeadline : FinishReason::kNone;
  }

  // --- The engine's thread only.
  // Its consumer is behind: not to be served now.
  virtual bool paused() const { return false; }
  // Whether it may share a step with others when it has one row left to compute.
  virtual bool batchable() const { return false; }
  // Whether the logits of the row at `end` - 1 are needed after a step up to `end`.
  virtual bool wants_logits(int64_t end) const = 0;
  virtual void started(int64_t /*now_ns*/) {}
  // The step ran; the session's computed length is up to date. Sets *finish to end the task; an
  // error ends it too.
  virtual Status commit(const StepRun& run, Finish* finish) = 0;
  // Under the engine's mutex, before the session is free for others.
  virtual void settle(bool /*success*/) noexcept {}
  // Once, after settle(), without the mutex: tells the owner.
  virtual void finished(Finish* finish) noexcept = 0;

  uint64_t last_served = 0;  // the scheduler's

 private:
  const std::shared_ptr<Session> session_;
  const Priority priority_;
  const std::shared_ptr<CancelToken> token_;
  const int64_t deadline_ns_;  // INT64_MAX: none
  std::atomic<bool> cancelled_{false}, abandoned_{false};
};

}  // namespace dsv3
