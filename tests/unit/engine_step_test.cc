// The engine's steps: rows of several tasks side by side, drafts that are verified and rolled back.
#include <doctest/doctest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <numeric>
#include <thread>

#include "runtime/engine/engine.h"
#include "runtime/engine/session_io.h"
#include "runtime/model/synthetic.h"
#include "tests/golden/runner.h"
#include "tests/support/waiting_task.h"

namespace dsv3 {
namespace {

using Row = std::vector<float>;

// Generates greedily and drafts what `script` says comes next, where it says anything.
class Drafter final : public Task {
 public:
  Drafter(std::shared_ptr<Session> session, size_t length, std::vector<int32_t> script,
          size_t depth)
      : Task(std::move(session), Priority::kInteractive, nullptr,
             std::numeric_limits<int64_t>::max()),
        length_(length),
        script_(std::move(script)),
        depth_(depth) {
    prepare_draft();
  }

  int64_t reusable() const override { return first_logits(); }
  int64_t first_logits() const override {
    return static_cast<int64_t>(session().state().tokens.size()) - 1;
  }
  std::span<const int32_t> draft() const override { return draft_; }

  Status commit(const StepRun& run, Finish* finish) override {
    const std::vector<int32_t>& tokens = session().state().tokens;
    if (run.end < static_cast<int64_t>(tokens.size())) return {};
    ++steps_;
    drafted_ += static_cast<size_t>(run.end - run.draft_begin);
    for (int64_t at = run.draft_begin - 1; at < run.end; ++at) {
      kernels::RowStats row;
      DSV3_TRY(run.row(at, &row));
      std::span<float> logits;
      DSV3_TRY(run.logits(at, &logits));
      rows_.emplace_back(logits.begin(), logits.end());
      SampledToken sampled;
      DSV3_TRY(run.sampler->sample({}, tokens, logits, row, {}, &sampled));
      {
        const std::lock_guard lock(session().engine()->mutex());
        session().state().tokens.push_back(sampled.id);
        session().publish();
      }
      if (tokens.size() == length_) {
        finish->reason = FinishReason::kMaxTokens;
        break;
      }
      if (at + 1 == run.end || run.token(at + 1) != sampled.id) break;
    }
    prepare_draft();
    return {};
  }
  void finished(Finish* finish) noexcept override {
    const std::lock_guard lock(mutex_);
    status_ = finish->status;
    done_ = true;
    condition_.notify_all();
  }
  Status wait() {
    std::unique_lock lock(mutex_);
    condition_.wait(lock, [&] { return done_; });
    return status_;
  }

  const std::vector<Row>& rows() const { return rows_; }
  size_t steps() const { return steps_; }
  size_t drafted() const { return drafted_; }

 private:
  void prepare_draft() {
    draft_.clear();
    const size_t length = session().state().tokens.size();
    for (size_t i = length; i < std::min(length + depth_, script_.size()); ++i) {
      draft_.push_back(script_[i]);
    }
  }

  const size_t length_;
  const std::vector<int32_t> script_;
  const size_t depth_;
  std::vector<int32_t> draft_;
  std::vector<Row> rows_;
  size_t steps_ = 0, drafted_ = 0;
  std::mutex mutex_;
  std::condition_variable condition_;
  bool done_ = false;
  Status status_;
};

struct Fixture {
  Fixture() : engine(make({})) {}
  static std::shared_ptr<Engine> make(EngineOptions options) {
    static const std::shared_ptr<const Model> model = test::open_model("tiny-coder");
    auto made = Engine::create(model, options);
    REQUIRE_MESSAGE(made.ok(), made.status().message());
    return *made;
  }
  ~Fixture() { engine->shutdown(); }

  std::shared_ptr<Session> session(const std::vector<int32_t>& tokens) {
    auto made = engine->create_session();
    REQUIRE(made.ok());
    AppendResult result;
    REQUIRE((*made)->append(tokens, false, &result).ok());
    return *made;
  }
  std::shared_ptr<Drafter> start(const std::vector<int32_t>& prompt, size_t length,
                                 std::vector<int32_t> script, size_t depth) {
    auto task = std::make_shared<Drafter>(session(prompt), length, std::move(script), depth);
    REQUIRE(engine->submit(task, [](Session::State&) { return Status(); }).ok());
    return task;
  }
  static std::vector<int32_t> tokens(const Drafter& task) { return task.session().state().tokens; }

  std::shared_ptr<Engine> engine;
};

std::vector<int32_t> prompt_of(size_t length, int32_t seed) {
  std::vector<int32_t> tokens;
  for (size_t i = 0; i < length; ++i) {
    tokens.push_back(static_cast<int32_t>((i * 37 + i * i * 11) % 4000) + seed);
  }
  return tokens;
}

bool same_bits(const std::vector<Row>& a, const std::vector<Row>& b) {
  return a.size() == b.size() && std::equal(a.begin(), a.end(), b.begin(), [](auto& x, auto& y) {
           return x.size() == y.size() &&
                  std::memcmp(x.data(), y.data(), x.size() * sizeof(float)) == 0;
         });
}

TEST_CASE_FIXTURE(Fixture, "within a class everyone gets on alike") {
  const auto served = [&](size_t count, int64_t left, int steps) {
    std::vector<std::shared_ptr<Task>> tasks;
    for (size_t i = 0; i < count; ++i) {
      tasks.push_back(std::make_shared<test::WaitingTask>(session(prompt_of(1000, 1))));
      // The engine has not heard of them: nobody else looks.
      tasks.back()->session().state().computed = 1000 - left;
    }
    Scheduler scheduler({.rows = 256, .tasks = 64, .prefill = 64, .draft = 16, .sequence = 2048});
    scheduler.reserve(tasks.size());
    StepPlan plan;
    std::map<const Task*, int64_t> rows;
    for (int step = 0; step < steps; ++step) {
      scheduler.plan(tasks, 0, &plan);
      for (const PlanRows& part : plan.parts) rows[part.task.get()] += part.rows();
    }
    for (const auto& task : tasks) task->session().state().computed = 0;
    std::vector<int64_t> out;
    for (const auto& task : tasks) out.push_back(rows[task.get()]);
    std::sort(out.begin(), out.end());
    return out;
  };
  // More sequences that decode than a step has room for: 64 of 80 each time.
  const std::vector<int64_t> decoding = served(80, 1, 101);
  CHECK(std::accumulate(decoding.begin(), decoding.end(), int64_t{0}) == 101 * 64);
  CHECK(decoding.back() - decoding.front() <= 1);
  // Prompts longer than a step's share of them take turns.
  CHECK(served(2, 900, 10) == std::vector<int64_t>{320, 320});
  const std::vector<int64_t> three = served(3, 900, 10);
  CHECK(three.front() == 3 * 64);
  CHECK(three.back() == 4 * 64);
}

TEST_CASE_FIXTURE(Fixture, "a draft changes the number of steps and nothing else") {
  const std::vector<int32_t> prompt = prompt_of(50, 3);
  constexpr size_t kLength = 150;  // over two page boundaries
  const auto plain = start(prompt, kLength, {}, 0);
  REQUIRE(plain->wait().ok());
  const std::vector<int32_t> expected = tokens(*plain);
  CHECK(plain->steps() == 100);

  std::vector<int32_t> script = expected;
  for (const size_t depth : {size_t{1}, size_t{7}, size_t{40}, size_t{100}}) {
    CAPTURE(depth);
    const auto right = start(prompt, kLength, script, depth);
    REQUIRE(right->wait().ok());
    CHECK(tokens(*right) == expected);
    CHECK(same_bits(right->rows(), plain->rows()));
    // The prompt's step has no draft; every other accepts its whole draft and one more.
    const size_t most = std::min(depth, size_t{kMaxDraft});
    CHECK(right->steps() == 1 + (99 + most) / (most + 1));
  }
  for (size_t i = 50; i < script.size(); i += 9) script[i] ^= 1;  // wrong here and there
  for (const size_t depth : {size_t{3}, size_t{40}}) {
    CAPTURE(depth);
    const auto wrong = start(prompt, kLength, script, depth);
    REQUIRE(wrong->wait().ok());
    CHECK(tokens(*wrong) == expected);
    CHECK(same_bits(wrong->rows(), plain->rows()));
    CHECK(wrong->steps() < 60);
    CHECK(wrong->session().computed() == kLength - 1);
  }
  const auto never = start(prompt, kLength, prompt_of(200, 9), 5);
  REQUIRE(never->wait().ok());
  CHECK(tokens(*never) == expected);
  CHECK(same_bits(never->rows(), plain->rows()));
}

TEST_CASE_FIXTURE(Fixture, "tasks with and without drafts share steps") {
  constexpr size_t kTasks = 20, kLength = 120;
  std::vector<std::vector<int32_t>> prompts, expected;
  std::vector<std::vector<Row>> rows;
  for (size_t i = 0; i < kTasks; ++i) {
    prompts.push_back(prompt_of(20 + 4 * i, static_cast<int32_t>(i)));
    const auto alone = start(prompts.back(), kLength, {}, 0);
    REQUIRE(alone->wait().ok());
    expected.push_back(tokens(*alone));
    rows.push_back(alone->rows());
  }
  std::vector<std::shared_ptr<Drafter>> tasks;
  for (size_t i = 0; i < kTasks; ++i) {
    std::vector<int32_t> script;
    if (i % 3 != 0) script = expected[i];
    for (size_t j = 5; j < script.size(); j += 6 + i) script[j] ^= 1;
    tasks.push_back(start(prompts[i], kLength, script, 2 * i));
  }
  for (size_t i = 0; i < kTasks; ++i) {
    CAPTURE(i);
    REQUIRE(tasks[i]->wait().ok());
    CHECK(tokens(*tasks[i]) == expected[i]);
    CHECK(same_bits(tasks[i]->rows(), rows[i]));
  }
}

TEST_CASE_FIXTURE(Fixture, "requests get on however many errands come") {
  std::atomic<bool> done{false};
  std::atomic<int> left{4000};
  const std::function<Status(kernels::Device*)> work = [](kernels::Device*) -> Status {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
    return {};
  };
  // While one is carried out the others wait already.
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      while (!done && left.fetch_sub(1) > 0) CHECK(engine->between_steps(work).ok());
    });
  }
  const auto task = start(prompt_of(20, 1), 60, {}, 0);
  const Status status = task->wait();
  const bool in_time = left > 0;
  done = true;
  for (std::thread& t : threads) t.join();
  CHECK(status.ok());
  CHECK(in_time);
}

TEST_CASE("an answer begins in reasoning only where the chat before it ended there") {
  Fixture f;
  const auto session = f.session(prompt_of(20, 1));
  AppendResult result;
  for (const bool empties : {false, true}) {
    session->set_reasoning(true);
    REQUIRE(session->append(prompt_of(3, 2), /*replace=*/false, &result).ok());
    CHECK(session->reasoning());
    REQUIRE(session->truncate(20).ok());
    CHECK(session->reasoning());
    if (empties) {
      REQUIRE(session->truncate(0).ok());
    } else {
      REQUIRE(session->append(prompt_of(30, 3), /*replace=*/true, &result).ok());
    }
    CHECK_FALSE(session->reasoning());
  }
}

TEST_CASE("a copy of a session answers as it would: forked, or saved and loaded") {
  Fixture f;
  for (const bool reasoning : {true, false}) {
    CAPTURE(reasoning);
    const auto session = f.session(prompt_of(20, 1));
    session->set_reasoning(reasoning);
    auto forked = session->fork();
    REQUIRE(forked.ok());
    CHECK((*forked)->reasoning() == reasoning);
    std::string bytes;
    const auto write = [&](const void* data, size_t size) -> Status {
      bytes.append(static_cast<const char*>(data), size);
      return {};
    };
    REQUIRE(save_session(*session, write, {}).ok());
    size_t at = 0;
    const auto read = [&](void* data, size_t size) -> Status {
      REQUIRE(size <= bytes.size() - at);
      std::memcpy(data, bytes.data() + at, size);
      at += size;
      return {};
    };
    auto loaded = load_session(f.engine, "it", read, {});
    REQUIRE_MESSAGE(loaded.ok(), loaded.status().message());
    CHECK((*loaded)->reasoning() == reasoning);
  }
}

TEST_CASE("a draft that finds no page is left out") {
  Fixture f;
  const uint64_t page = f.engine->info().page_bytes;
  f.engine->shutdown();
  EngineOptions options;
  options.cache_bytes = page;
  f.engine = Fixture::make(options);
  const std::vector<int32_t> prompt = prompt_of(50, 3);
  const auto plain = f.start(prompt, 64, {}, 0);
  REQUIRE(plain->wait().ok());
  const std::vector<int32_t> expected = Fixture::tokens(*plain);
  std::vector<int32_t> script = expected;
  script.resize(100, 7);  // beyond the page
  REQUIRE(plain->session().truncate(0).ok());
  const auto drafted = f.start(prompt, 64, script, 50);
  REQUIRE(drafted->wait().ok());
  CHECK(Fixture::tokens(*drafted) == expected);
}

TEST_CASE("steps that need more memory than the machine has are refused before they take it") {
  Result<ModelConfig> config = synthetic_config("tiny", 2);
  REQUIRE(config.ok());
  config->intermediate_size = 1 << 17;
  Result<std::shared_ptr<const Model>> model = Model::synthesise(*config, {});
  REQUIRE(model.ok());
  EngineOptions options;
  options.threads = 1;
  options.prefill_chunk = 65536;
  Result<MemoryEstimate> estimate = Engine::estimate(**model, options);
  REQUIRE(estimate.ok());
  if (estimate->machine_bytes == 0 || estimate->scratch_bytes <= estimate->machine_bytes) return;
  const Status status = Engine::create(*model, options).status();
  CHECK(status.code() == Code::kOutOfMemory);
  CHECK(status.message().find("steps of 65536 rows") != std::string::npos);
  CHECK(status.message().find("prefill_chunk") != std::string::npos);
  options.prefill_chunk = 64;
  CHECK(Engine::create(*model, options).ok());
}

}  // namespace
}  // namespace dsv3
