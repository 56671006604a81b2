// Which tasks the next step serves, and with how many rows each. Decides only: pages are reserved
// and rows run by the engine.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "runtime/engine/interrupted.h"
#include "runtime/engine/task.h"

namespace dsv3 {

struct StepPlan {
  std::vector<PlanRows> parts;
  int32_t rows = 0;
  Priority best = Priority::kInteractive;  // class of the step
  InterruptedStep* resumed = nullptr;      // the step goes on where this one was
  bool one_layer = false;                  // and only for a layer: better classes wait for it
  void clear() {
    parts.clear();
    rows = 0;
    resumed = nullptr;
    one_layer = false;
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
// steps are short (kShortRows rows) for kShortNs after an interactive request was there, and are
// interrupted between layers when one comes (Engine::should_give_way). An interrupted step goes on
// before anything else of its class; rows beside others would make its work worthless, so instead
// of those it has a layer after every kLayerSteps steps of better classes. Of several classes that
// stay out the better one comes first; the worst has such a turn to itself when it got nothing for
// kLastSteps steps.
class Scheduler {
 public:
  static constexpr int32_t kBesideRows = 2;
  static constexpr uint64_t kBesideSteps = 4;
  static constexpr uint64_t kLayerSteps = 16;
  static constexpr uint64_t kLastSteps = 64;
  static constexpr int32_t kShortRows = 64;
  static constexpr int32_t kRowsBesideDecoding = 64;
  static constexpr int64_t kShortNs = 1'000'000'000;

  explicit Scheduler(const SchedulerLimits& limits) : limits_(limits) {}

  // Room for so many tasks, so that plan() allocates nothing. Under the engine's mutex, as plan().
  void reserve(size_t tasks) { order_.reserve(tasks); }
  // Empty when no task can run.
  void plan(std::span<const std::shared_ptr<Task>> tasks, int64_t now_ns, StepPlan* out);
  // Where a step of such a class goes when it is interrupted.
  InterruptedStep& interrupted(Priority step) { return interrupted_[static_cast<size_t>(step)]; }

 private:
  struct Candidate {
    const std::shared_ptr<Task>* task = nullptr;
    int64_t left = 0;  // rows of its sequence to compute
  };
  void collect(std::span<const std::shared_ptr<Task>> tasks);
  bool resume(Priority step, StepPlan* out);
  int32_t room_for(const Task& task, const StepPlan& plan) const;
  void add(const Candidate& candidate, int64_t rows, StepPlan* out);
  void add_drafts(int32_t most_rows, StepPlan* out);

  const SchedulerLimits limits_;
  uint64_t clock_ = 0;                          // parts served
  std::array<InterruptedStep, 3> interrupted_;  // by class
  std::vector<Candidate> order_;
  Priority best_ = Priority::kInteractive;   // class of the first candidate
  int32_t beside_room_ = 0;                  // rows that worse classes may still have in this step
  uint64_t steps_ = 0;                       // of this class in a row
  Priority worst_ = Priority::kInteractive;  // class of the last candidate
  uint64_t unserved_ = 0;                    // steps in which it got nothing
  bool last_turn_ = false;                   // this step's beside rows are for it alone
  int64_t interactive_ns_ = INT64_MIN / 2;   // when an interactive request was last there
};

}  // namespace dsv3
