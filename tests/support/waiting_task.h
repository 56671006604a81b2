#pragma once

#include <limits>
#include <memory>
#include <utility>

#include "runtime/engine/task.h"

namespace dsv3::test {

// Says what the scheduler asks of a task, and does nothing.
class WaitingTask final : public Task {
 public:
  explicit WaitingTask(std::shared_ptr<Session> session)
      : Task(std::move(session), Priority::kInteractive, nullptr,
             std::numeric_limits<int64_t>::max()) {}
  int64_t reusable() const override { return 0; }
  int64_t first_logits() const override { return 0; }
  Status commit(const StepRun&, Finish*) override { return {}; }
  void finished(Finish*) noexcept override {}
};

}  // namespace dsv3::test
