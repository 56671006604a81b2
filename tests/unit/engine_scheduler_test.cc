// Who is in the next step, with how many rows; steps that were interrupted and go on.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "runtime/engine/engine.h"
#include "runtime/engine/interrupted.h"
#include "runtime/engine/scheduler.h"
#include "runtime/model/synthetic.h"

namespace dsv3 {
namespace {

// What the scheduler asks of a task, and nothing more.
class Waiter final : public Task {
 public:
  Waiter(std::shared_ptr<Session> session, Priority priority)
      : Task(std::move(session), priority, nullptr, std::numeric_limits<int64_t>::max()) {}
  bool exclusive() const override { return alone; }
  int64_t first_logits() const override { return 0; }
  std::span<const int32_t> draft() const override { return drafted; }
  int64_t reusable() const override { return 0; }
  Status commit(const StepRun&, Finish*) override { return {}; }
  void finished(Finish*) noexcept override {}

  bool alone = false;
  std::vector<int32_t> drafted;
};

// The engine is there for the sessions' sake, and never hears of the tasks.
struct Fixture {
  Fixture() : device(std::move(*kernels::make_device({.kernels = "ref", .threads = 1}))) {
    Result<ModelConfig> config = synthetic_config("tiny", 2);
    REQUIRE(config.ok());
    Result<std::shared_ptr<const Model>> made = Model::synthesise(*config, {});
    REQUIRE(made.ok());
    model = *made;
    EngineOptions options;
    options.threads = 1;
    Result<std::shared_ptr<Engine>> context = Engine::create(model, options);
    REQUIRE(context.ok());
    engine = *context;
  }
  ~Fixture() {
    for (const auto& task : tasks) task->session().state().computed = 0;
    tasks.clear();
    engine->shutdown();
  }
  // With so many rows of its sequence left to compute: 1 decodes, more are a prompt.
  Waiter* task(Priority priority, int64_t left) {
    auto session = engine->create_session();
    REQUIRE(session.ok());
    Session::State& s = (*session)->state();
    s.tokens.assign(1000, static_cast<int32_t>(tasks.size()));
    s.computed = 1000 - left;
    auto made = std::make_shared<Waiter>(*session, priority);
    made->order = tasks.size() + 1;
    tasks.push_back(made);
    return made.get();
  }
  int64_t rows_of(const Task* task) const {
    for (const PlanRows& part : plan.parts) {
      if (part.task.get() == task) return part.rows();
    }
    return 0;
  }
  void next(Scheduler* scheduler, int64_t now_ns = 0) {
    scheduler->reserve(tasks.size());
    scheduler->plan(tasks, now_ns, &plan);
  }

  std::unique_ptr<kernels::Device> device;
  std::shared_ptr<const Model> model;
  std::shared_ptr<Engine> engine;
  std::vector<std::shared_ptr<Task>> tasks;
  StepPlan plan;
};

constexpr SchedulerLimits kLimits = {
    .rows = 256, .tasks = 64, .prefill = 256, .draft = 16, .sequence = 2048};

TEST_CASE_FIXTURE(Fixture, "worse classes have two rows in every fourth step, the worst its turn") {
  Scheduler scheduler(kLimits);
  const Waiter* const interactive = task(Priority::kInteractive, 1);
  const Waiter* const background = task(Priority::kBackground, 900);
  const Waiter* const idle = task(Priority::kIdle, 900);
  for (int step = 1; step <= 130; ++step) {
    CAPTURE(step);
    next(&scheduler);
    CHECK(rows_of(interactive) == 1);
    const bool last = step % 64 == 0;
    CHECK(rows_of(idle) == (last ? 2 : 0));
    CHECK(rows_of(background) == (step % 4 == 0 && !last ? 2 : 0));
  }
}

TEST_CASE_FIXTURE(Fixture, "beside a better class nothing is drafted") {
  Scheduler scheduler(kLimits);
  Waiter* const interactive = task(Priority::kInteractive, 1);
  Waiter* const background = task(Priority::kBackground, 1);
  interactive->drafted.assign(5, 7);
  background->drafted.assign(5, 7);
  for (int step = 1; step <= 4; ++step) next(&scheduler);
  CHECK(rows_of(interactive) == 6);
  CHECK(rows_of(background) == 1);
}

TEST_CASE_FIXTURE(Fixture, "other work has short steps for a second after an interactive request") {
  Scheduler scheduler(kLimits);
  const Waiter* const background = task(Priority::kBackground, 900);
  next(&scheduler, 0);
  CHECK(rows_of(background) == 256);  // there was none yet
  task(Priority::kInteractive, 1);
  next(&scheduler, 0);
  tasks.pop_back();
  next(&scheduler, Scheduler::kShortNs - 1);
  CHECK(rows_of(background) == Scheduler::kShortRows);
  next(&scheduler, Scheduler::kShortNs);
  CHECK(rows_of(background) == 256);
}

TEST_CASE_FIXTURE(Fixture, "who decodes and who has a prompt share a step") {
  SUBCASE("a short chunk beside one who decodes") {
    Scheduler scheduler(kLimits);
    const Waiter* const prompt = task(Priority::kInteractive, 900);
    next(&scheduler);
    CHECK(rows_of(prompt) == 256);
    const Waiter* const decodes = task(Priority::kInteractive, 1);
    next(&scheduler);
    CHECK(rows_of(decodes) == 1);
    CHECK(rows_of(prompt) == Scheduler::kRowsBesideDecoding);
  }
  SUBCASE("a quarter of the rows, however many decode") {
    Scheduler scheduler({.rows = 16, .tasks = 64, .prefill = 16, .draft = 16, .sequence = 2048});
    for (int i = 0; i < 20; ++i) task(Priority::kInteractive, 1);
    next(&scheduler);
    CHECK(plan.rows == 16);
    const Waiter* const prompt = task(Priority::kInteractive, 900);
    next(&scheduler);
    CHECK(rows_of(prompt) == 4);
    CHECK(plan.rows == 16);
  }
}

TEST_CASE_FIXTURE(Fixture, "who must have a step of its own has it in its turn") {
  for (const int64_t left : {1, 900}) {
    CAPTURE(left);
    Scheduler scheduler(kLimits);
    tasks.clear();
    const Waiter* const first = task(Priority::kInteractive, 1);
    Waiter* const own = task(Priority::kInteractive, left);
    own->alone = true;
    for (int turn = 0; turn < 3; ++turn) {
      next(&scheduler);
      CHECK(plan.parts.size() == 1);
      CHECK(rows_of(first) == 1);
      next(&scheduler);
      CHECK(plan.parts.size() == 1);
      CHECK(rows_of(own) == std::min<int64_t>(left, 256));
    }
  }
}

// Steps of two tasks that stopped before their second layer.
struct Interrupted : Fixture {
  Interrupted() {
    Result<std::unique_ptr<ForwardModel>> made = ForwardModel::create(model, device.get(), 16, 4);
    REQUIRE(made.ok());
    forward = std::move(*made);
    pool = std::make_unique<PagePool>(device.get(), forward->page_bytes(), 2);
    first = task(Priority::kBackground, 3);
    second = task(Priority::kBackground, 1);
    second->drafted = {8, 9};
  }
  // first's three rows, second's one and two of its draft.
  void stop(InterruptedStep* step) {
    std::vector<kernels::SequenceRows> sequences;
    std::vector<PageTable> tables(2, PageTable(pool.get()));
    tokens.clear();
    std::vector<PlanRows> parts;
    for (const auto& owner : tasks) {
      if (owner->priority() != Priority::kBackground) continue;
      const Session::State& s = owner->session().state();
      const auto length = static_cast<int64_t>(s.tokens.size());
      PlanRows part;
      part.task = owner;
      part.begin = s.computed;
      part.end = length + static_cast<int64_t>(owner->draft().size());
      part.draft_begin = length;
      // The rows stand at the beginning of a page of their own: what was before does not matter.
      PageTable& table = tables[parts.size()];
      REQUIRE(table.make_writable(0, part.rows()).ok());
      sequences.push_back(
          {static_cast<int32_t>(tokens.size()), part.rows(), 0, table.data(), false});
      tokens.insert(tokens.end(), s.tokens.begin() + s.computed, s.tokens.end());
      tokens.insert(tokens.end(), owner->draft().begin(), owner->draft().end());
      parts.push_back(part);
    }
    Step run;
    run.tokens = tokens;
    run.sequences = sequences;
    int layers = 0;
    run.should_stop = [](void* user) { return ++*static_cast<int*>(user) > 1; };
    run.should_stop_user = &layers;
    REQUIRE(forward->run(run).code() == Code::kCancelled);
    REQUIRE(forward->stopped_before() == 1);
    width = static_cast<size_t>(model->config().hidden_size);
    residual.resize(tokens.size() * width);
    forward->copy_residual(static_cast<int32_t>(tokens.size()), residual.data());
    step->keep(parts, tokens, 1, model->config().hidden_size, forward.get());
  }
  bool resume(InterruptedStep* step, std::vector<PlanRows>* out) {
    const auto find = [&](uint64_t order) -> const std::shared_ptr<Task>* {
      const auto at = std::find_if(tasks.begin(), tasks.end(),
                                   [&](const auto& task) { return task->order == order; });
      return at == tasks.end() ? nullptr : &*at;
    };
    return step->resume(find, out);
  }
  // Where the step goes on with these tokens, and whether with the rows from `row` on.
  int64_t layer(const InterruptedStep& step, std::span<const int32_t> rows, size_t row) const {
    Step run;
    run.tokens = rows;
    step.go_on(&run);
    if (run.first_layer > 0) {
      CHECK(std::memcmp(run.residual, residual.data() + row * width,
                        rows.size() * width * sizeof(float)) == 0);
    }
    return run.first_layer;
  }

  std::unique_ptr<ForwardModel> forward;
  std::unique_ptr<PagePool> pool;
  Waiter* first = nullptr;
  Waiter* second = nullptr;
  std::vector<int32_t> tokens;
  std::vector<float> residual;  // [rows, width]
  size_t width = 0;
};

TEST_CASE_FIXTURE(Interrupted, "an interrupted step goes on with those who are where they were") {
  InterruptedStep step;
  stop(&step);
  CHECK(step.holds(first->order));
  std::vector<PlanRows> parts;
  SUBCASE("all of them") {
    REQUIRE(resume(&step, &parts));
    CHECK(parts.size() == 2);
    CHECK(layer(step, tokens, 0) == 1);
    // Of other rows it knows nothing.
    CHECK(layer(step, std::span(tokens).first(5), 0) == 0);
    tokens[4] ^= 1;
    CHECK(layer(step, tokens, 0) == 0);
  }
  SUBCASE("without the first") {
    SUBCASE("which gave up its pages and computed them again") { ++first->preemptions; }
    SUBCASE("which skipped what others have computed") { ++first->session().state().computed; }
    SUBCASE("which is gone") { first->order = 99; }
    REQUIRE(resume(&step, &parts));
    REQUIRE(parts.size() == 1);
    CHECK(parts[0].task.get() == second);
    CHECK(parts[0].draft_begin == 1000);
    CHECK(parts[0].end == 1002);
    CHECK(layer(step, std::span(tokens).subspan(3), 3) == 1);
  }
  SUBCASE("without one whose draft became shorter") {
    second->drafted.pop_back();
    REQUIRE(resume(&step, &parts));
    CHECK(parts.size() == 1);
    CHECK(layer(step, std::span(tokens).first(3), 0) == 1);
  }
  SUBCASE("with none") {
    ++first->preemptions;
    second->session().state().tokens.push_back(8);
    CHECK_FALSE(resume(&step, &parts));
    CHECK(step.empty());
  }
}

TEST_CASE_FIXTURE(Interrupted, "an interrupted step goes on first, or a layer at a time") {
  Scheduler scheduler(kLimits);
  stop(&scheduler.interrupted(Priority::kBackground));
  const Waiter* const interactive = task(Priority::kInteractive, 1);
  for (int step = 1; step < 16; ++step) {
    next(&scheduler);
    CHECK(plan.resumed == nullptr);
    CHECK(rows_of(interactive) == 1);
    CHECK(plan.parts.size() == 1);  // beside others its rows would make the step worthless
  }
  next(&scheduler);
  CHECK(plan.resumed == &scheduler.interrupted(Priority::kBackground));
  CHECK(plan.one_layer);
  CHECK(plan.best == Priority::kBackground);
  CHECK(plan.rows == 6);
  tasks.pop_back();
  next(&scheduler);
  CHECK(plan.resumed != nullptr);
  CHECK_FALSE(plan.one_layer);
}

}  // namespace
}  // namespace dsv3
