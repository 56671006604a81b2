// The engine's thread: plan, reserve pages, run, commit or roll back. A step that fails leaves
// every session at the length it had; latents written beyond that are nobody's.
#include <algorithm>
#include <chrono>
#include <exception>
#include <limits>
#include <new>
#include <utility>

#include "runtime/engine/engine.h"

namespace dsv3 {
namespace {

// A cancel token cannot wake the engine (setting it is wait-free): a task that waits for its
// consumer is looked at this often.
constexpr int64_t kPollNs = 5'000'000;
// A step gives way to a better class when it would go on for longer than this.
constexpr int64_t kGiveWayNs = 500'000;
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

}  // namespace

void Engine::thread_main(void* self) {
  auto* engine = static_cast<Engine*>(self);
  mark_engine_thread();
  // It computes as the first of the device's threads, which pins the others.
  if (engine->options_.pin_threads) pin_this_thread(0);
  engine->loop();
  bool detached = false;
  {
    const std::lock_guard lock(engine->mutex_);
    detached = engine->detach_;
  }
  if (detached) engine->finish_trace();  // who freed the context could not wait to do it
  std::shared_ptr<Engine> last;
  {
    const std::lock_guard lock(engine->mutex_);
    last.swap(engine->self_);
    if (detached) engine->thread_->detach();
  }
}

void Engine::loop() {
  StoppedTasks stopped;  // nothing here may fail: only steps can run out of memory
  // Errands come before a step, and a step before further errands: however many threads save
  // sessions, requests get on.
  bool errands_done = false;
  for (;;) {
    bool errands = false;
    {
      std::unique_lock lock(mutex_);
      wake_ = false;
      collect_stopped(&stopped);
      const bool stop = stop_.load(std::memory_order_relaxed);
      errands = errands_ != nullptr && (stop || !errands_done);
      errands_done = errands;
      if (stopped.count == 0 && !errands) {
        if (stop) return;
        admit();
        newcomer_.store(kNobody, std::memory_order_relaxed);
        const int64_t now = monotonic_ns();
        scheduler_->plan(tasks_, now, &plan_);
        next_look_ns_ = next_look(now);
        if (plan_.parts.empty()) {
          if (errands_ == nullptr) wait_for_work(&lock);
          continue;
        }
      }
    }
    for (size_t i = 0; i < stopped.count; ++i) {
      end_task(std::move(stopped.tasks[i]), {stopped.reasons[i], Status()});
    }
    stopped.count = 0;
    if (errands) run_errands();
    if (!plan_.parts.empty()) run_plan(&plan_);
    plan_.clear();  // may drop the last reference of a session: not under the mutex
  }
}

// Oldest last, which nobody can tell: their callers wait for each of theirs.
void Engine::run_errands() {
  Errand* errand = nullptr;
  {
    const std::lock_guard lock(mutex_);
    errand = std::exchange(errands_, nullptr);
    errand_waits_.store(false, std::memory_order_relaxed);
  }
  while (errand != nullptr) {
    Status status = cancelled_;
    try {
      if (!stop_.load(std::memory_order_relaxed)) status = (*errand->work)(device_.get());
    } catch (const std::bad_alloc&) {
      status = out_of_memory_;
    } catch (...) {
      status = internal_;
    }
    Errand* const next = errand->next;
    const std::lock_guard lock(mutex_);
    errand->status = std::move(status);
    errand->done = true;  // its caller may return from here on
    errand_done_.notify_all();
    errand = next;
  }
}

void Engine::collect_stopped(StoppedTasks* out) {
  const int64_t now = monotonic_ns();
  const bool stop = stop_.load(std::memory_order_relaxed);
  for (const auto& task : tasks_) {
    if (out->count == out->tasks.size()) return;  // the rest next time
    const FinishReason reason = stop ? FinishReason::kCancelled : task->stop_reason(now);
    if (reason == FinishReason::kNone) continue;
    out->tasks[out->count] = task;
    out->reasons[out->count++] = reason;
  }
}

// Under the mutex: when a task may have to end, or may come back, though nobody wakes the engine.
int64_t Engine::next_look(int64_t now) const {
  int64_t at = kNever;
  for (const auto& task : tasks_) {
    at = std::min(at, task->deadline_ns());
    if (task->has_cancel_token()) at = std::min(at, now + kPollNs);
    if (task->stalled) at = std::min(at, now + LatentCache::kPatienceNs / 8);
  }
  return at;
}

// Between layers: does a task have to end, though it has no rows in the step? Its owner waits no
// longer than one who has.
bool Engine::others_end(int64_t now) {
  if (!end_asked_.load(std::memory_order_relaxed) && now < next_look_ns_) return false;
  const std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return false;  // at the next layer
  next_look_ns_ = next_look(now);
  const bool ends = std::any_of(tasks_.begin(), tasks_.end(), [&](const auto& task) {
    return task->stop_reason(now) != FinishReason::kNone;
  });
  end_asked_.store(ends, std::memory_order_relaxed);
  return ends;
}

void Engine::wait_for_work(std::unique_lock<std::mutex>* lock) {
  const auto woken = [&] { return wake_ || stop_.load(std::memory_order_relaxed); };
  const int64_t now = monotonic_ns();
  const int64_t until = next_look(now);
  if (until == kNever) {
    work_.wait(*lock, woken);
  } else if (until > now) {
    constexpr int64_t kHourNs = int64_t{3600} * 1'000'000'000;
    work_.wait_for(*lock, std::chrono::nanoseconds(std::min(until - now, kHourNs)), woken);
  }
}

// A better class came while the step runs and would have to wait for longer than a moment. The step
// goes on at this layer later, and then computes one before it can be interrupted again. A session
// that is saved or loaded, and a prefix that is read from the disk, take an errand for every few
// pages: they wait for steps of interactive requests, but not for whole ones of other work. Nor
// does a request that was cancelled before its turn.
bool Engine::should_give_way(int32_t done, int64_t now) {
  if (done == 0 && first_layer_ > 0) return false;
  if (running_->one_layer) return gave_way_ = true;
  const bool newcomer =
      newcomer_.load(std::memory_order_relaxed) < static_cast<int32_t>(running_->best);
  const bool errand = errand_waits_.load(std::memory_order_relaxed) && done > 0 &&
                      running_->best != Priority::kInteractive;
  if (!newcomer && !errand && !(done > 0 && others_end(now))) return false;
  const int64_t left = model_->config().num_hidden_layers - first_layer_ - done;
  gave_way_ = done == 0 || (now - step_begin_ns_) / done * left > kGiveWayNs;
  return gave_way_;
}

bool Engine::should_stop(void* self) {
  auto* engine = static_cast<Engine*>(self);
  if (engine->stop_.load(std::memory_order_relaxed)) return true;
  const int64_t now = monotonic_ns();
  const int32_t done = engine->layers_begun_++;
  const auto& parts = engine->running_->parts;
  const bool ends = std::any_of(parts.begin(), parts.end(), [&](const PlanRows& part) {
    return part.task->stop_reason(now) != FinishReason::kNone;
  });
  return ends || engine->should_give_way(done, now);
}

// Nothing that a step throws goes further than its tasks.
void Engine::run_plan(StepPlan* plan) {
  Status status;
  try {
    status = model_->check_unchanged();
    if (status.ok()) run_step(plan);
#if !defined(NDEBUG) || defined(DSV3_SANITIZED)
    if (status.ok()) status = check_pages();
    if (!status.ok()) log(LogLevel::kError, status.message().c_str());
#endif
  } catch (const std::bad_alloc&) {
    status = out_of_memory_;
  } catch (...) {
    status = internal_;
  }
  running_ = nullptr;
  if (status.ok()) return;
  for (PlanRows& part : plan->parts) {
    if (part.task != nullptr) fail(&part, status);
  }
}

// Under the mutex, before a step is planned: who waited for room gets on if there is some, and
// prompts skip what others have computed meanwhile.
void Engine::admit() {
  if (Task* stalled = LatentCache::first_stalled(tasks_); stalled != nullptr) {
    const auto spare = std::count_if(tasks_.begin(), tasks_.end(),
                                     [](const auto& task) { return !task->stalled; });
    stalled->stalled = !cache_->fits(*stalled, tasks_, spare);
  }
  for (const auto& task : tasks_) {
    if (task->stalled || task->restoring) continue;
    const Session::State& s = task->session().state();
    if (static_cast<int64_t>(s.tokens.size()) - s.computed < 2) continue;
    const int64_t found = cache_->attach(&task->session(), task->reusable());
    if (found > 0) task->found_cached(found);
    if (disk_ == nullptr || std::exchange(task->disk_asked, true)) continue;
    const auto whole = static_cast<int64_t>(s.tokens.size()) / kernels::kLatentPageTokens;
    const bool missing =
        whole > s.computed / kernels::kLatentPageTokens && task->reusable() > s.computed;
    if (missing) disk_->restore(task);
  }
}

// Pages for a part's rows; where its draft's find none, it goes without.
Status Engine::reserve_part(PlanRows* part) {
  Task& task = *part->task;
  const auto length = static_cast<int64_t>(task.session().state().tokens.size());
  if (!task.admitted && !cache_->fits(task, tasks_, 0)) {
    cache_->count_refusal();
    return Status(
        Code::kCapacity,
        format("%lld tokens find no room in the latent cache of %lld pages beside the "
               "requests that run",
               static_cast<long long>(length), static_cast<long long>(cache_->pool().capacity())),
        "cache_bytes", /*retryable=*/true);
  }
  const int64_t least = std::min(part->end, part->draft_begin);
  Status status = cache_->reserve(&task, part->begin, least, &part->end, tasks_);
  if (status.ok()) {
    task.admitted = true;
  } else if (status.code() == Code::kCapacity) {
    DSV3_TRY(check_fits(length));  // alone it does not fit either: not a matter of time
    if (!task.admitted || !cache_->others_run(task, tasks_)) return status;
    cache_->preempt(&task);
    return {};
  }
  return status;
}

// Parts whose tasks have no pages are gone afterwards.
void Engine::reserve_pages(StepPlan* plan) {
  for (PlanRows& part : plan->parts) {
    Status reserved;
    {
      const std::lock_guard lock(mutex_);
      if (!part.task->stalled) reserved = reserve_part(&part);
    }
    if (!reserved.ok()) fail(&part, reserved);
  }
  // Also of those that gave way to a later part.
  std::erase_if(plan->parts,
                [](const PlanRows& part) { return part.task == nullptr || part.task->stalled; });
}

// The rows of all parts, one after another.
void Engine::gather_rows(StepPlan* plan) {
  step_tokens_.clear();
  step_sequences_.clear();
  step_logits_->clear();
  for (PlanRows& part : plan->parts) {
    const Session::State& s = part.task->session().state();
    part.row_begin = static_cast<int32_t>(step_tokens_.size());
    const int64_t known = std::min(part.end, part.draft_begin);
    // Drafts are verified to the bits of decoding one by one.
    const bool may_expand = options_.expand_prompts && known == part.end;
    step_sequences_.push_back(
        {part.row_begin, part.rows(), part.begin, s.table.data(), may_expand});
    step_tokens_.insert(step_tokens_.end(), s.tokens.begin() + part.begin,
                        s.tokens.begin() + known);
    const std::span<const int32_t> draft =
        part.task->draft().first(static_cast<size_t>(part.end - known));
    step_tokens_.insert(step_tokens_.end(), draft.begin(), draft.end());
    part.logits_begin = std::clamp(part.task->first_logits(), part.begin, part.end);
    const auto before = static_cast<int32_t>(part.logits_begin - part.begin);
    part.head_begin = step_logits_->add(part.row_begin + before, part.row_begin + part.rows());
  }
  plan->rows = static_cast<int32_t>(step_tokens_.size());  // fewer than planned: pages were short
}

void Engine::run_step(StepPlan* plan) {
  const int64_t now = monotonic_ns();
  for (PlanRows& part : plan->parts) part.task->started(now);
  reserve_pages(plan);
  if (plan->parts.empty()) return;
  gather_rows(plan);
  Step step;
  step.tokens = step_tokens_;
  step.sequences = step_sequences_;
  step.should_stop = should_stop;
  step.should_stop_user = this;
  running_ = plan;
  step_begin_ns_ = monotonic_ns();
  layers_begun_ = 0;
  gave_way_ = false;
  if (plan->resumed != nullptr) plan->resumed->go_on(&step);
  first_layer_ = step.first_layer;
  plan->one_layer = plan->one_layer && first_layer_ > 0;
  // What a step of decoding rows costs decides how much may be drafted.
  const bool decoding = std::all_of(plan->parts.begin(), plan->parts.end(),
                                    [](const PlanRows& p) { return p.begin + 1 == p.draft_begin; });
  const Status status = forward_->run(step);
  count_step(*plan, status.code() == Code::kCancelled);
  if (status.code() == Code::kCancelled) {
    // The loop finds out whose; others go on at this layer without it.
    const int64_t layer = forward_->stopped_before();
    if ((gave_way_ || plan->parts.size() > 1) && layer > 0) {
      scheduler_->interrupted(plan->best)
          .keep(plan->parts, step_tokens_, layer, model_->config().hidden_size, forward_.get());
    }
    return;
  }
  if (plan->resumed != nullptr) plan->resumed->clear();
  if (status.ok()) {
    commit(plan, step);
    if (decoding && first_layer_ == 0) {
      draft_experience_.end_step(static_cast<int64_t>(step.sequences.size()),
                                 static_cast<int64_t>(step.tokens.size()), monotonic_ns() - now);
    }
    try {
      if (mtp_drafter_ != nullptr) draft_mtp(*plan);
    } catch (...) {
      // No memory for a draft: the next step goes without.
    }
  } else if (plan->parts.size() == 1) {
    fail(&plan->parts[0], status);
  } else {
    run_alone(plan);
  }
}

void Engine::count_step(const StepPlan& plan, bool abandoned) {
  const int64_t now = monotonic_ns();
  {
    const std::lock_guard lock(mutex_);
    ++statistics_.steps;
    statistics_.steps_abandoned += abandoned ? 1 : 0;
    // Not those of a step that went on, nor of one that gave way before it began.
    const bool computed = !abandoned || forward_->stopped_before() > 0;
    if (first_layer_ == 0 && computed) statistics_.rows += step_tokens_.size();
    statistics_.step_ns += static_cast<uint64_t>(now - step_begin_ns_);
    const std::vector<uint64_t>& load = forward_->expert_load();
    std::copy(load.begin(), load.end(), expert_load_.begin());
  }
  if (trace_ == nullptr) return;
  trace_->step(plan, step_begin_ns_, now, abandoned);
  log_trace_error();
}

void Engine::log_trace_error() noexcept {
  const Status* error = trace_->new_error();
  if (error != nullptr) log(LogLevel::kWarning, error->message().c_str());
}

// A batch failed: whose fault it is shows when each runs alone. Results do not depend on the batch.
void Engine::run_alone(StepPlan* plan) {
  for (PlanRows& part : plan->parts) {
    StepPlan single;
    single.parts.push_back(part);
    single.rows = part.rows();
    single.best = plan->best;
    part.task.reset();  // the single plan answers for it now
    run_plan(&single);
  }
}

// How many tokens of the session are computed after the part's rows ran: rows that stood for other
// tokens than the session has (a draft's, rejected) do not count.
int64_t Engine::computed_after(const PlanRows& part) const {
  const std::vector<int32_t>& tokens = part.task->session().state().tokens;
  const auto known = std::min(part.end, static_cast<int64_t>(tokens.size()));
  int64_t at = std::min(part.draft_begin, known);
  const auto* row = step_tokens_.data() + part.row_begin;
  while (at < known && tokens[static_cast<size_t>(at)] == row[at - part.begin]) ++at;
  return at;
}

void Engine::set_computed(const PlanRows& part) {
  const std::lock_guard lock(mutex_);
  Session& session = part.task->session();
  session.state().computed = computed_after(part);
  session.publish();
  // The index's pages may lack what an exclusive task writes for the MTP module.
  if (!part.task->exclusive()) cache_->keep(&session);
}

void Engine::commit(StepPlan* plan, const Step& step) {
  draft_experience_.committed = {};  // a step with prompts in it was not accounted for
  for (PlanRows& part : plan->parts) {
    set_computed(part);
    StepRun run;
    run.forward = forward_.get();
    run.sampler = sampler_.get();
    run.step = &step;
    run.head = step_logits_.get();
    run.experience = &draft_experience_;
    run.row_begin = part.row_begin;
    run.begin = part.begin;
    run.end = part.end;
    run.draft_begin = part.draft_begin;
    run.logits_begin = part.logits_begin;
    run.head_begin = part.head_begin;
    Finish finish;
    Status status;
    try {
      status = part.task->commit(run, &finish);
    } catch (const std::bad_alloc&) {
      status = out_of_memory_;
    } catch (...) {
      status = internal_;
    }
    if (part.end > part.draft_begin) set_computed(part);
    if (!status.ok()) {
      fail(&part, status);
    } else if (finish.reason != FinishReason::kNone) {
      end_task(std::move(part.task), std::move(finish));
    }
  }
}

// Drafts for the next step where tasks asked the MTP module for one. What fails here costs a draft
// and nothing else.
void Engine::draft_mtp(const StepPlan& plan) {
  const int64_t begin = monotonic_ns();
  mtp_shares_.clear();
  int32_t deepest = 0;
  for (const PlanRows& part : plan.parts) {
    if (part.task == nullptr) continue;
    const int32_t depth = part.task->mtp_depth();
    if (depth == 0) continue;
    const std::lock_guard lock(mutex_);
    Session& session = part.task->session();
    const Session::State& s = session.state();
    const auto length = static_cast<int64_t>(s.tokens.size());
    if (s.computed + 1 != length ||
        !cache_->reserve_free(&session, length - 1, length - 1 + depth).ok()) {
      continue;
    }
    MtpShare share;
    share.tokens = s.tokens.data();
    share.pages = s.table.data();
    share.begin = part.begin;
    share.length = length;
    share.row_begin = part.row_begin;
    share.depth = depth;
    share.state = part.task->mtp_state();
    share.out = &mtp_guesses_[mtp_shares_.size()];
    mtp_shares_.push_back(share);
    deepest = std::max(deepest, depth);
  }
  if (mtp_shares_.empty()) return;
  const bool ok = mtp_drafter_->run(&mtp_shares_).ok();
  const double ns =
      static_cast<double>(monotonic_ns() - begin) / static_cast<double>(mtp_shares_.size());
  if (ok) {
    double& known = draft_experience_.mtp_ns[static_cast<size_t>(deepest - 1)];
    // The first call is slower than all others: what becomes faster counts at once.
    known = known == 0 ? ns : known + (std::min(ns, 2 * known) - known) / (ns < known ? 3 : 16);
  }
  size_t next = 0;
  for (const PlanRows& part : plan.parts) {
    if (next == mtp_shares_.size()) break;
    if (part.task == nullptr || part.task->mtp_state() != mtp_shares_[next].state) continue;
    MtpGuesses& guesses = mtp_guesses_[next++];
    if (!ok) guesses.count = 0;
    const auto others = static_cast<int64_t>(plan.parts.size()) - 1;
    part.task->mtp_drafted(draft_experience_, guesses, ns, others);
  }
}

void Engine::fail(PlanRows* part, const Status& status) {
  // A hook that found its request freed reports it as cancelled.
  const bool cancelled = status.code() == Code::kCancelled;
  if (!cancelled) log(LogLevel::kWarning, status.message().c_str());
  end_task(std::move(part->task),
           {cancelled ? FinishReason::kCancelled : FinishReason::kError, status});
}

void Engine::end_task(std::shared_ptr<Task> task, Finish finish) noexcept {
  RequestStatistics own;
  const bool accounted = task->account(&own);
  if (finish.status.ok() && finish.reason == FinishReason::kCancelled) finish.status = cancelled_;
  if (finish.status.ok() && finish.reason == FinishReason::kDeadline) finish.status = deadline_;
  {
    const std::lock_guard lock(mutex_);
    Session& session = task->session();
    Session::State& s = session.state();
    task->settle(finish.status.ok());
    s.table.truncate(s.computed);
    cache_->touch(&session);
    if (disk_ != nullptr) {
      disk_->keep(std::span(s.tokens).first(static_cast<size_t>(s.computed)));
    }
    session.publish();
    s.running = nullptr;
    std::erase(tasks_, task);
    idle_.notify_all();
    if (accounted) {
      ++statistics_.requests_finished;
      statistics_.prompt_tokens += own.prompt_tokens;
      statistics_.cached_tokens += own.cached_tokens;
      statistics_.generated_tokens += own.generated_tokens;
      statistics_.drafted_tokens += own.drafted_tokens;
      statistics_.accepted_tokens += own.accepted_tokens;
      statistics_.queue_ns += own.queue_ns;
      statistics_.prefill_ns += own.prefill_ns;
      statistics_.decode_ns += own.decode_ns;
    }
  }
  if (trace_ != nullptr && accounted) {
    trace_->request(task->order, task->priority(), own, finish.reason, monotonic_ns());
    log_trace_error();
  }
  task->finished(&finish);
  task.reset();  // maybe the last reference, and with it the session's: not under the mutex
}

}  // namespace dsv3
