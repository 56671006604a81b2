#include "runtime/engine/scheduler.h"

#include <algorithm>

namespace dsv3 {
namespace {

int64_t rows_left(const Task& task) {
  const Session::State& s = task.session().state();
  return static_cast<int64_t>(s.tokens.size()) - s.computed;
}

}  // namespace

void Scheduler::collect(std::span<const std::shared_ptr<Task>> tasks) {
  order_.clear();
  for (const auto& task : tasks) {
    if (task->stalled || task->restoring) continue;
    const int64_t left = rows_left(*task);
    if (left > 0 && !task->paused()) order_.push_back({&task, left});
  }
  // Those of one step differ as well, by their place in it: otherwise, where more wait than a step
  // has room for, the same ones would come first time after time. New ones stay in the order they
  // came in: the address in `tasks` decides.
  std::sort(order_.begin(), order_.end(), [](const Candidate& a, const Candidate& b) {
    const Task &x = **a.task, &y = **b.task;
    if (x.priority() != y.priority()) return x.priority() < y.priority();
    if (x.last_served != y.last_served) return x.last_served < y.last_served;
    return a.task < b.task;
  });
}

// How many rows the step still has for a task.
int32_t Scheduler::room_for(const Task& task, const StepPlan& plan) const {
  if (plan.parts.size() >= static_cast<size_t>(limits_.tasks)) return 0;
  const int32_t room = limits_.rows - plan.rows;
  if (task.priority() == best_) return room;
  if (last_turn_ && task.priority() != worst_) return 0;
  const InterruptedStep& step = interrupted_[static_cast<size_t>(task.priority())];
  if (step.holds(task.order)) return 0;
  return std::min(room, beside_room_);
}

void Scheduler::add(const Candidate& candidate, int64_t rows, StepPlan* out) {
  const std::shared_ptr<Task>& task = *candidate.task;
  const Session::State& s = task->session().state();
  PlanRows part;
  part.task = task;
  part.begin = s.computed;
  part.end = s.computed + rows;
  part.draft_begin = static_cast<int64_t>(s.tokens.size());
  task->last_served = ++clock_;
  if (task->priority() == worst_) unserved_ = 0;
  out->rows += part.rows();
  if (task->priority() != best_) beside_room_ -= part.rows();
  out->parts.push_back(std::move(part));
}

// Drafts extend the parts that reach their sequence's end; everyone gets an equal share of the
// room.
void Scheduler::add_drafts(int32_t most_rows, StepPlan* out) {
  auto waiting = static_cast<int32_t>(out->parts.size());
  for (PlanRows& part : out->parts) {
    const int64_t share = std::max(0, most_rows - out->rows) / waiting--;
    if (part.task->priority() != best_) continue;
    const auto draft = static_cast<int64_t>(part.task->draft().size());
    const int64_t rows =
        std::min({draft, share, int64_t{limits_.draft}, limits_.sequence - part.end});
    if (rows <= 0) continue;
    part.end += rows;
    out->rows += static_cast<int32_t>(rows);
  }
}

// The interrupted step of a class, if it can go on.
bool Scheduler::resume(Priority which, StepPlan* out) {
  InterruptedStep& step = interrupted(which);
  const auto find = [&](uint64_t order) -> const std::shared_ptr<Task>* {
    for (const Candidate& c : order_) {
      if ((*c.task)->order == order) return c.task;
    }
    return nullptr;
  };
  if (!step.resume(find, &out->parts)) return false;
  for (PlanRows& part : out->parts) {
    part.task->last_served = ++clock_;
    out->rows += part.rows();
  }
  if (which == worst_) unserved_ = 0;
  out->resumed = &step;
  out->best = which;
  out->one_layer = which != best_;
  return true;
}

void Scheduler::plan(std::span<const std::shared_ptr<Task>> tasks, int64_t now_ns, StepPlan* out) {
  out->clear();
  collect(tasks);
  if (order_.empty()) return;
  const Priority best = (*order_[0].task)->priority();
  steps_ = best == best_ ? steps_ + 1 : 1;
  best_ = out->best = best;
  beside_room_ = steps_ % kBesideSteps == 0 ? kBesideRows : 0;
  worst_ = (*order_.back().task)->priority();
  last_turn_ = worst_ != best && ++unserved_ >= kLastSteps;
  if (last_turn_) {
    unserved_ = 0;
    beside_room_ = kBesideRows;
  }
  if (best == Priority::kInteractive) interactive_ns_ = now_ns;
  if (resume(best, out)) return;
  if (last_turn_ && resume(worst_, out)) return;
  if (steps_ % kLayerSteps == 0) {
    for (const Priority worse : {Priority::kBackground, Priority::kIdle}) {
      if (worse > best && resume(worse, out)) return;
    }
  }
  int32_t prefill = limits_.prefill;
  if (best != Priority::kInteractive && now_ns - interactive_ns_ < kShortNs) {
    prefill = std::min(prefill, kShortRows);
  }
  if ((*order_[0].task)->exclusive()) {
    add(order_[0], std::min<int64_t>(order_[0].left, prefill), out);
    return;
  }
  // However many decode, a prompt that waits in their class gets on.
  const bool prompts = std::any_of(order_.begin(), order_.end(), [&](const Candidate& c) {
    return c.left > 1 && (*c.task)->priority() == best_;
  });
  const int32_t decode_rows = prompts ? limits_.rows - std::max(1, limits_.rows / 4) : limits_.rows;
  const size_t decode_tasks = static_cast<size_t>(limits_.tasks - (prompts ? 1 : 0));
  for (const Candidate& c : order_) {
    if (out->rows == decode_rows || out->parts.size() == decode_tasks) break;
    const Task& task = **c.task;
    if (c.left == 1 && !task.exclusive() && room_for(task, *out) > 0) add(c, 1, out);
  }
  if (!out->parts.empty()) {
    add_drafts(prompts ? limits_.rows / 2 : limits_.rows, out);
    // Who decodes waits for its next token no longer than for a short chunk.
    prefill = std::min(prefill, std::max(kRowsBesideDecoding, limits_.prefill / 4));
  }
  for (const Candidate& c : order_) {
    const Task& task = **c.task;
    if (c.left == 1 || task.exclusive()) continue;
    const int64_t rows = std::min<int64_t>({c.left, prefill, room_for(task, *out)});
    if (rows <= 0) continue;
    prefill -= static_cast<int32_t>(rows);
    add(c, rows, out);
  }
}

}  // namespace dsv3
