#include "runtime/engine/scheduler.h"

#include <algorithm>

namespace dsv3 {
namespace {

int64_t rows_left(const Task& task) {
  const Session::State& s = task.session().state();
  return static_cast<int64_t>(s.tokens.size()) - s.computed;
}

}  // namespace

void StepPlan::add(const std::shared_ptr<Task>& task, int64_t begin, int64_t end) {
  parts.push_back({task, begin, end, rows, -1});
  rows += parts.back().rows();
}

void Scheduler::plan(std::span<const std::shared_ptr<Task>> tasks, StepPlan* out) {
  out->clear();
  const std::shared_ptr<Task>* first = nullptr;
  for (const auto& task : tasks) {
    if (task->paused() || rows_left(*task) == 0) continue;
    if (first == nullptr || task->priority() < (*first)->priority() ||
        (task->priority() == (*first)->priority() && task->last_served < (*first)->last_served)) {
      first = &task;
    }
  }
  if (first == nullptr) return;
  const int64_t left = rows_left(**first);
  ++clock_;
  const auto add = [&](const std::shared_ptr<Task>& task, int64_t rows) {
    const int64_t begin = task->session().state().computed;
    out->add(task, begin, begin + rows);
    task->last_served = clock_;
  };
  add(*first, std::min<int64_t>(left, prefill_chunk_));
  if (left != 1 || !(*first)->batchable()) return;
  const Priority priority = (*first)->priority();
  // From the first on, around: where not all fit, everyone's turn comes.
  const auto start = static_cast<size_t>(first - tasks.data());
  for (size_t i = 1; i < tasks.size() && out->rows < max_batch_; ++i) {
    const auto& task = tasks[(start + i) % tasks.size()];
    if (task->priority() != priority || !task->batchable()) continue;
    if (rows_left(*task) == 1 && !task->paused()) add(task, 1);
  }
}

}  // namespace dsv3
