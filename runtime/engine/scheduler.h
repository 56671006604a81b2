// Which tasks the next step serves, and with how many rows each. Decides only: pages are reserved
// and rows run by the engine.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "runtime/engine/task.h"

namespace dsv3 {

// One task's share of a step: positions [begin, end) of its session; those from draft_begin on are
// rows of its draft.
struct PlanRows {
  std::shared_ptr<Task> task;
  int64_t begin = 0, end = 0;
  int64_t draft_begin = 0;
  // Filled in when the step runs.
  int32_t row_begin = 0;
  int64_t logits_begin = 0;
  int32_t head_begin = 0;
  int32_t rows() const { return static_cast<int32_t>(end - begin); }
};

struct StepPlan {
  std::vector<PlanRows> parts;
  int32_t rows = 0;
  void clear() {
    parts.clear();
    rows = 0;
  }
};

struct SchedulerLimits {
  int32_t rows = 0;      // of a step
  int32_t tasks = 0;     // of a step
  int32_t prefill = 0;   // rows of prompts in a step
  int32_t draft = 0;     // rows of one task's draft
  int64_t sequence = 0;  // the longest
};

// The order: a better class before a worse one; within a class, who was served least recently comes
// first. A step has a row for every task that decodes, then rows of drafts, then chunks of prompts
// as far as the budget reaches. Beside a better class, worse ones get kBesideRows rows in all:
// on a small model they cost next to nothing there, and on a large one little of the latency.
class Scheduler {
 public:
  static constexpr int32_t kBesideRows = 8;

  explicit Scheduler(const SchedulerLimits& limits) : limits_(limits) {}

  // Room for so many tasks, so that plan() allocates nothing. Under the engine's mutex, as plan().
  void reserve(size_t tasks) { order_.reserve(tasks); }
  // Empty when no task can run.
  void plan(std::span<const std::shared_ptr<Task>> tasks, StepPlan* out);

 private:
  struct Candidate {
    const std::shared_ptr<Task>* task = nullptr;
    int64_t left = 0;  // rows of its sequence to compute
  };
  void collect(std::span<const std::shared_ptr<Task>> tasks);
  int32_t room_for(const Task& task, const StepPlan& plan) const;
  void add(const Candidate& candidate, int64_t rows, StepPlan* out);
  void add_drafts(int32_t most_rows, StepPlan* out);

  const SchedulerLimits limits_;
  uint64_t clock_ = 0;
  std::vector<Candidate> order_;
  Priority best_ = Priority::kInteractive;  // class of the first candidate
  int32_t beside_ = 0;                      // rows of worse classes in this step
};

}  // namespace dsv3
