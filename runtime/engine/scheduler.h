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
  Priority best = Priority::kInteractive;  // class of the step
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
// as far as the budget reaches; the budget is a quarter while requests of that class decode.
//
// Worse classes stay out of a better one's steps but for kBesideRows rows in every kBesideSteps-th:
// a row more costs a decoding step of tiny-coder half of its time again (eight in each step made
// 0.42 ms between tokens 1.2), so this is what keeps them moving, not what feeds them. Their own
// steps are short (kShortRows rows) for kShortNs after an interactive request was there, and can be
// abandoned between layers when one comes (Engine::should_give_way).
class Scheduler {
 public:
  static constexpr int32_t kBesideRows = 2;
  static constexpr uint64_t kBesideSteps = 4;
  static constexpr int32_t kShortRows = 64;
  static constexpr int64_t kShortNs = 1'000'000'000;

  explicit Scheduler(const SchedulerLimits& limits) : limits_(limits) {}

  // Room for so many tasks, so that plan() allocates nothing. Under the engine's mutex, as plan().
  void reserve(size_t tasks) { order_.reserve(tasks); }
  // Empty when no task can run.
  void plan(std::span<const std::shared_ptr<Task>> tasks, int64_t now_ns, StepPlan* out);
  // The step was abandoned: those that lost their work are not at the end of the queue for it.
  static void gave_way(const StepPlan& plan);

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
  int32_t beside_room_ = 0;                 // rows that worse classes may still have in this step
  uint64_t steps_ = 0;                      // of this class in a row
  int64_t interactive_ns_ = INT64_MIN / 2;  // when an interactive request was last there
};

}  // namespace dsv3
