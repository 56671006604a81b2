// Which tasks the next step serves. Decides only: pages are reserved and rows run by the engine.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "runtime/engine/task.h"

namespace dsv3 {

// One task's share of a step: positions [begin, end) of its session.
struct PlanRows {
  std::shared_ptr<Task> task;
  int64_t begin = 0, end = 0;
  int32_t row_begin = 0;
  int32_t head_row = -1;  // index among the step's head rows; -1: no logits wanted
  int32_t rows() const { return static_cast<int32_t>(end - begin); }
};

struct StepPlan {
  std::vector<PlanRows> parts;
  int32_t rows = 0;
  void clear() {
    parts.clear();
    rows = 0;
  }
  void add(const std::shared_ptr<Task>& task, int64_t begin, int64_t end);
};

class Scheduler {
 public:
  // A step has up to `prefill_chunk` rows of one task, or one row each of up to `max_batch` tasks.
  Scheduler(int32_t prefill_chunk, int32_t max_batch)
      : prefill_chunk_(prefill_chunk), max_batch_(max_batch) {}

  // The task of the best priority class that waited longest; when it has one row to compute (it
  // decodes), all others of its class that do the same join. Empty when no task can run.
  // Under the engine's mutex.
  void plan(std::span<const std::shared_ptr<Task>> tasks, StepPlan* out);

 private:
  const int32_t prefill_chunk_, max_batch_;
  uint64_t clock_ = 0;
};

}  // namespace dsv3
