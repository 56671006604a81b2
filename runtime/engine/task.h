// What the scheduler serves: a generation (request.h) or an evaluation (evaluation.h) on a session.
// The engine computes a task's rows in steps and commits them; the task decides what happens then.
#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <span>

#include "runtime/base/status.h"
#include "runtime/engine/callback.h"
#include "runtime/engine/draft_control.h"
#include "runtime/engine/events.h"
#include "runtime/engine/logits.h"
#include "runtime/engine/mtp_drafter.h"
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

// A step that ran, as a task sees its share of it: rows at positions [begin, end) of its session.
// Those from `draft_begin` on (the session's length when the step was planned) hold tokens of the
// task's draft, which nobody has accepted yet.
struct StepRun {
  ForwardModel* forward = nullptr;
  Sampler* sampler = nullptr;
  const Step* step = nullptr;  // all tasks' rows
  StepLogits* head = nullptr;
  DraftExperience* experience = nullptr;  // with drafts, of the context
  int32_t row_begin = 0;                  // of the task's rows in the step
  int64_t begin = 0, end = 0;
  int64_t draft_begin = 0;
  int64_t logits_begin = 0;  // position of the first row whose logits may be asked for
  int32_t head_begin = 0;    // that row's index in `head`

  // Tasks that share the step.
  int64_t others() const { return static_cast<int64_t>(step->sequences.size()) - 1; }
  // The token that the row at `position` stood for.
  int32_t token(int64_t position) const {
    return step->tokens[static_cast<size_t>(row_begin + (position - begin))];
  }
  // Logits [vocab] after `position`, which is at least Task::first_logits(); valid until the next
  // call, and the caller's to change. Ascending positions, each at most once: the head runs for
  // some rows at a time, when they are asked for, so that the rest of a rejected draft costs
  // nothing more.
  Status logits(int64_t position, std::span<float>* out) const {
    return head->get(head_begin + static_cast<int32_t>(position - logits_begin), out);
  }
  // Only what is known of them: the best token, and their sum as exponentials. Before or instead of
  // logits() of the same position.
  Status row(int64_t position, kernels::RowStats* out) const {
    return head->row(head_begin + static_cast<int32_t>(position - logits_begin), out);
  }
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
  Priority priority() const { return priority_; }
  int64_t deadline_ns() const { return deadline_ns_; }
  bool has_cancel_token() const { return token_ != nullptr; }
  // Without a call that wakes the engine.
  bool ends_by_itself() const { return has_cancel_token() || deadline_ns_ != INT64_MAX; }

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
  // For so long at the least, in which it has taken nothing?
  virtual bool paused_for(int64_t /*ns*/) const { return false; }
  // Must have a step of its own.
  virtual bool exclusive() const { return false; }
  // commit() may ask for the logits of rows from this position on; INT64_MAX: of none.
  virtual int64_t first_logits() const = 0;
  // Tokens that may follow the session's sequence. A step that reaches the sequence's end may go on
  // through some of them (as many as there is room for); what commit() does not append to the
  // session is rolled back. Not changed between planning and commit().
  virtual std::span<const int32_t> draft() const { return {}; }
  // Latents of positions below this one may be taken from the prefix cache instead of computed.
  virtual int64_t reusable() const = 0;
  // So many were.
  virtual void found_cached(int64_t /*tokens*/) {}
  virtual void started(int64_t /*now_ns*/) {}
  // The step ran. Appends what it accepts to the session: a draft's row stays computed if and only
  // if the session has its token at its position afterwards. Sets *finish to end the task; an error
  // ends it too.
  virtual Status commit(const StepRun& run, Finish* finish) = 0;
  // After commit(): how deep the MTP module should draft for the next step; 0: not.
  virtual int32_t mtp_depth() const { return 0; }
  virtual MtpState* mtp_state() { return nullptr; }
  // What it drafted, in `ns`; `others` tasks shared the step.
  virtual void mtp_drafted(const DraftExperience& /*experience*/, const MtpGuesses& /*guesses*/,
                           double /*ns*/, int64_t /*others*/) {}
  // Under the engine's mutex, before the session is free for others.
  virtual void settle(bool /*success*/) noexcept {}
  // Once, at the end: what a request tells about itself from then on, for the context's sums;
  // evaluations say nothing.
  virtual bool account(RequestStatistics* /*out*/) { return false; }
  // Once, after settle(), without the mutex: tells the owner.
  virtual void finished(Finish* finish) noexcept = 0;

  uint64_t last_served = 0;  // the scheduler's
  // The engine's, under its mutex.
  uint64_t order = 0;        // in which tasks came
  bool admitted = false;     // it has had pages: from now on it waits for some instead of failing
  bool disk_asked = false;   // whether the disk cache was asked for its prefix
  bool restoring = false;    // pages are being read for it: not planned meanwhile
  bool stalled = false;      // it gave up its pages and waits for room
  uint64_t preemptions = 0;  // how often
  uint64_t most_pages = 0;   // it held at once

 private:
  const std::shared_ptr<Session> session_;
  const Priority priority_;
  const std::shared_ptr<CancelToken> token_;
  const int64_t deadline_ns_;  // INT64_MAX: none
  std::atomic<bool> cancelled_{false}, abandoned_{false};
};

}  // namespace dsv3
