#include "runtime/engine/evaluation.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>

#include "runtime/engine/engine.h"
#include "runtime/engine/task.h"

namespace dsv3 {
namespace {

class Evaluation final : public Task {
 public:
  Evaluation(std::shared_ptr<Session> session, const EvaluateOptions& options)
      : Task(std::move(session), Priority::kInteractive, options.cancel,
             std::numeric_limits<int64_t>::max()),
        options_(options) {}

  // Under the engine's mutex: the tokens become part of the session until settle() decides.
  Status prepare(Session::State& s, std::span<const int32_t> tokens) {
    const Engine& engine = *session().engine();
    base_ = static_cast<int64_t>(s.tokens.size());
    count_ = static_cast<uint64_t>(tokens.size());
    if (options_.mtp_logits != nullptr && base_ != 0) {
      return make_field_error(
          Code::kInvalidArgument, "mtp_logits",
          "the session has %lld tokens: mtp_logits can be had of an empty session only",
          static_cast<long long>(base_));
    }
    DSV3_TRY(engine.check_tokens(tokens, base_));
    DSV3_TRY(engine.check_fits(base_ + static_cast<int64_t>(tokens.size())));
    if (options_.mtp_logits != nullptr) {
      previous_.resize(static_cast<size_t>(engine.model().config().hidden_size));
    }
    s.tokens.insert(s.tokens.end(), tokens.begin(), tokens.end());
    return {};
  }

  bool exclusive() const override { return options_.mtp_logits != nullptr; }
  int64_t first_logits() const override {
    const bool any = options_.logits != nullptr || options_.logprobs != nullptr;
    return any ? base_ : std::numeric_limits<int64_t>::max();
  }
  int64_t reusable() const override { return base_; }
  Status commit(const StepRun& run, Finish* finish) override;

  void settle(bool success) noexcept override {
    if (success) return;
    Session::State& s = session().state();
    s.tokens.resize(static_cast<size_t>(base_));
    s.computed = std::min(s.computed, base_);
  }

  void finished(Finish* finish) noexcept override {
    const std::lock_guard lock(mutex_);
    status_ = finish->status;
    done_ = true;
    condition_.notify_all();
  }

  Status wait();

 private:
  // Calls the progress callback; false when it threw.
  bool report(uint64_t done) const noexcept;
  Status read_logits(const StepRun& run, int64_t first);
  Status mtp_rows(const StepRun& run);

  const EvaluateOptions& options_;  // of the caller, who waits
  int64_t base_ = 0;
  uint64_t count_ = 0;
  std::vector<float> previous_;  // [hidden] of the position before the next step's, for MTP
  std::vector<int32_t> rows_;

  std::mutex mutex_;
  std::condition_variable condition_;
  uint64_t progress_ = 0;
  bool done_ = false;
  Status status_;
};

Status Evaluation::read_logits(const StepRun& run, int64_t first) {
  const std::vector<int32_t>& tokens = session().state().tokens;
  for (int64_t at = first; at < run.end; ++at) {
    kernels::RowStats known;
    DSV3_TRY(run.row(at, &known));
    std::span<float> row;
    DSV3_TRY(run.logits(at, &row));
    const auto index = static_cast<size_t>(at - base_);
    if (options_.logits != nullptr) {
      std::copy(row.begin(), row.end(), options_.logits + index * row.size());
    }
    const auto next = static_cast<size_t>(at + 1);
    if (options_.logprobs == nullptr || next == tokens.size()) continue;
    options_.logprobs[index] = LogSoftmax(known)(row[static_cast<size_t>(tokens[next])]);
  }
  return {};
}

// Row i of mtp_logits comes from position i + 1; position 0 has none.
Status Evaluation::mtp_rows(const StepRun& run) {
  const auto& config = session().engine()->model().config();
  const auto vocab = static_cast<size_t>(config.vocab_size);
  const int64_t group = run.forward->max_head_rows();
  std::vector<float> last(previous_.size());
  run.forward->copy_hidden(run.row_begin + static_cast<int32_t>(run.end - run.begin - 1), 1,
                           last.data());
  DSV3_TRY(run.forward->run_mtp(*run.step, run.begin == 0 ? nullptr : previous_.data()));
  previous_.swap(last);
  for (int64_t at = std::max<int64_t>(run.begin, 1); at < run.end; at += group) {
    const int64_t count = std::min(group, run.end - at);
    rows_.clear();
    for (int64_t i = 0; i < count; ++i) {
      rows_.push_back(run.row_begin + static_cast<int32_t>(at - run.begin + i));
    }
    DSV3_TRY(
        run.forward->mtp_head(rows_, options_.mtp_logits + static_cast<size_t>(at - 1) * vocab));
  }
  return {};
}

Status Evaluation::commit(const StepRun& run, Finish* finish) {
  const auto total = static_cast<int64_t>(session().state().tokens.size());
  const int64_t first = std::max(run.begin, base_);
  if (first < run.end) {
    if (options_.logits != nullptr || options_.logprobs != nullptr) {
      DSV3_TRY(read_logits(run, first));
    }
    if (options_.hidden != nullptr) {
      const auto width = static_cast<size_t>(session().engine()->model().config().hidden_size);
      run.forward->copy_hidden(run.row_begin + static_cast<int32_t>(first - run.begin),
                               static_cast<int32_t>(run.end - first),
                               options_.hidden + static_cast<size_t>(first - base_) * width);
    }
    if (options_.mtp_logits != nullptr) DSV3_TRY(mtp_rows(run));
  }
  if (run.end == total) {
    finish->reason = FinishReason::kMaxTokens;  // whatever: an end without an error
  }
  const std::lock_guard lock(mutex_);
  // Never back: one that gave up its pages computes them again.
  progress_ = std::max(progress_, static_cast<uint64_t>(std::max<int64_t>(0, run.end - base_)));
  if (options_.progress) condition_.notify_all();
  return {};
}

bool Evaluation::report(uint64_t done) const noexcept {
  try {
    const CallbackScope scope;
    options_.progress(done, count_);
    return true;
  } catch (...) {
    return false;
  }
}

Status Evaluation::wait() {
  std::unique_lock lock(mutex_);
  uint64_t seen = 0;
  for (;;) {
    condition_.wait(lock, [&] { return done_ || (options_.progress && progress_ != seen); });
    if (!options_.progress || progress_ == seen) return status_;
    seen = progress_;
    lock.unlock();
    const bool goes_on = report(seen);
    lock.lock();
    if (goes_on) continue;
    // The engine works on the caller's buffers: nothing is returned before its end.
    cancel();
    session().engine()->wake_to_end();
    condition_.wait(lock, [&] { return done_; });
    lock.unlock();
    // It may have come to a good end meanwhile.
    if (status_.ok()) DSV3_TRY(session().truncate(static_cast<uint64_t>(base_)));
    return make_field_error(Code::kInvalidArgument, "progress",
                            "the progress callback threw an exception");
  }
}

}  // namespace

Status evaluate(std::shared_ptr<Session> session, std::span<const int32_t> tokens,
                const EvaluateOptions& options) {
  const std::shared_ptr<Engine> engine = session->engine();
  if (tokens.empty()) {
    return Status(Code::kInvalidArgument, "count is 0, expected at least one token", "count");
  }
  if (options.mtp_logits != nullptr && engine->model().config().num_nextn_predict_layers == 0) {
    return make_field_error(Code::kUnsupported, "mtp_logits", "%s has no MTP module",
                            engine->model().path().c_str());
  }
  auto task = std::make_shared<Evaluation>(std::move(session), options);
  DSV3_TRY(engine->submit(task, [&](Session::State& s) { return task->prepare(s, tokens); }));
  return task->wait();
}

}  // namespace dsv3
