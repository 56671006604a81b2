// Steps that gave way to a better class between two layers, and go on at that layer later: what
// their rows had become is kept, and their latents of the layers before stay in the tasks' pages.
// So nothing is computed twice, and however many better requests come, every interruption leaves a
// step at least a layer further. A step that stopped because one of its requests was cancelled goes
// on in the same way without it: whoever cancels often does not keep others from getting on.
//
// Used by the engine's thread.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "runtime/engine/task.h"
#include "runtime/forward/model.h"

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

class InterruptedStep {
 public:
  // After forward's run() of these parts stopped before `layer`, which is not the first one. Where
  // there is no memory for it, the step begins anew.
  void keep(std::span<const PlanRows> parts, std::span<const int32_t> tokens, int64_t layer,
            int64_t hidden_size, ForwardModel* forward) noexcept;
  void clear() { parts_.clear(); }
  bool empty() const { return parts_.empty(); }
  // Whether a task with this order has rows in it.
  bool holds(uint64_t order) const;

  // Under the engine's mutex: the step's parts whose tasks are still where they were and can run
  // (find(order): the task, or null). The others' rows are forgotten. False: nothing is left.
  template <class Find>
  bool resume(Find find, std::vector<PlanRows>* out);
  // Where the same rows go on; the first layer for other ones.
  void go_on(Step* step) const;

 private:
  // By the task's order: nothing here keeps a task or its pages alive.
  struct Part {
    uint64_t order = 0, preemptions = 0;
    int64_t begin = 0, end = 0, draft_begin = 0;
  };
  static bool stands(const Part& part, const Task& task);
  void move_rows(size_t from, size_t to, size_t count) noexcept;

  std::vector<Part> parts_;
  std::vector<int32_t> tokens_;  // [rows]
  std::vector<float> residual_;  // [rows, width_]
  size_t width_ = 0;             // hidden_size
  int64_t layer_ = 0;
};

template <class Find>
bool InterruptedStep::resume(Find find, std::vector<PlanRows>* out) {
  size_t parts = 0, rows = 0, row = 0;  // that stay; where the part's rows lie
  for (size_t i = 0; i < parts_.size(); ++i) {
    const Part part = parts_[i];
    const auto count = static_cast<size_t>(part.end - part.begin);
    const std::shared_ptr<Task>* task = find(part.order);
    if (task != nullptr && stands(part, **task)) {
      move_rows(row, rows, count);
      rows += count;
      parts_[parts++] = part;
      PlanRows plan;
      plan.task = *task;
      plan.begin = part.begin;
      plan.end = part.end;
      plan.draft_begin = part.draft_begin;
      out->push_back(std::move(plan));
    }
    row += count;
  }
  parts_.resize(parts);
  tokens_.resize(rows);
  return parts > 0;
}

}  // namespace dsv3
