// A generation in progress: prompt to the end of its answer. The engine's thread samples tokens,
// turns them into text and queues events; one consumer takes the events.
#pragma once

#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime/engine/events.h"
#include "runtime/engine/speculator.h"
#include "runtime/engine/task.h"
#include "runtime/text/stream.h"

namespace dsv3 {

using LogitsFn = void (*)(void* user, float* logits, uint64_t vocab_size, const int32_t* tokens,
                          uint64_t count);
using NotifyFn = void (*)(void* user);

inline constexpr size_t kMaxStopStrings = 64;
inline constexpr size_t kMaxStopStringBytes = 1024;  // the matcher's states cost 1 KiB per byte

struct RequestOptions {
  SamplingOptions sampling;
  SpeculationOptions speculation;
  std::string reference_text;  // becomes speculation.reference when the request starts
  Priority priority = Priority::kInteractive;
  uint64_t max_tokens = 256;  // 0: the prompt is computed and nothing is generated
  std::vector<std::string> stop_strings;
  std::vector<int32_t> stop_tokens;
  bool ignore_eos = false;
  uint64_t deadline_ms = 0;  // 0: none
  int32_t reasoning = -1;    // -1: as the session says
  uint32_t max_queued_events = 256;
  // No events but the final one; the answer's text is collected (collected_text()). A consumer that
  // blocks until the end is then not woken by every token.
  bool collect = false;
  std::shared_ptr<CancelToken> cancel;
  LogitsFn logits_hook = nullptr;
  void* logits_hook_user = nullptr;
  NotifyFn notify = nullptr;
  void* notify_user = nullptr;

  Status validate(const Model& model) const;
};

// The monotonic time `ms` milliseconds after start_ns; INT64_MAX for 0 (none) and beyond the clock.
int64_t deadline_after(uint64_t ms, int64_t start_ns);

class Request final : public Task {
 public:
  // Starts generating after the session's sequence. `deadline_ns` (monotonic; 0: from deadline_ms).
  static Result<std::shared_ptr<Request>> start(const std::shared_ptr<Session>& session,
                                                RequestOptions options, int64_t deadline_ns = 0);

  // --- The consumer's side.
  EventQueue::Outcome next(int64_t deadline_ns, Event* event);
  intptr_t descriptor() { return queue_.descriptor(); }
  RequestStatistics statistics() const;
  void cancel_now() noexcept;  // any thread
  // The consumer goes: cancels; when it returns, no callback runs and none will.
  void release() noexcept;
  // Of a request with `collect`, after its final event.
  std::string take_collected_text() { return std::move(collected_); }

  // --- Task
  bool paused() const override { return !options_.collect && queue_.full(); }
  bool paused_for(int64_t ns) const override { return !options_.collect && queue_.full_for(ns); }
  int64_t first_logits() const override;
  std::span<const int32_t> draft() const override { return speculator_.draft(); }
  int64_t reusable() const override;
  void found_cached(int64_t tokens) override;
  int32_t mtp_depth() const override { return speculator_.mtp_depth(); }
  MtpState* mtp_state() override { return speculator_.mtp_state(); }
  void mtp_drafted(const DraftExperience& experience, const MtpGuesses& guesses, double ns,
                   int64_t others) override {
    speculator_.mtp_drafted(experience, guesses, ns, others);
  }
  void started(int64_t now_ns) override;
  bool account(RequestStatistics* out) override;
  Status commit(const StepRun& run, Finish* finish) override;
  void finished(Finish* finish) noexcept override;

  Request(const std::shared_ptr<Session>& session, RequestOptions options, int64_t start_ns,
          int64_t deadline_ns);

 private:
  bool is_stop_token(int32_t id) const;
  Status sample(const StepRun& run, int64_t position);
  Status generate(const StepRun& run, Finish* finish);
  void speculate(const StepRun& run, int64_t fresh);
  Status append(int32_t token);  // kCancelled when the owner is gone
  // Events of a new token; true when a stop string ended the answer.
  bool emit_token(bool is_stop_token);
  void emit_progress(int64_t done);
  void emit_segments(bool with_token);
  void push(const Event& event);
  void notify() noexcept;
  static Status run_hook(void* self, std::span<float> logits, std::span<const int32_t> tokens);

  const RequestOptions options_;
  std::vector<int32_t> stop_tokens_;  // the model's end tokens included, sorted
  const int64_t max_length_;          // of the sequence
  const int64_t start_ns_;
  Speculator speculator_;
  std::optional<StreamDecoder> decoder_;  // none without a tokenizer
  SampledToken sampled_;
  Segments segments_;
  Event scratch_, final_;
  std::string collected_;
  std::string matched_stop_;
  int64_t progress_ = 0;
  bool prompt_done_ = false, flushed_ = false, pushed_ = false;
  int64_t service_ns_ = 0, prefill_end_ns_ = 0, last_token_ns_ = 0;
  int32_t stop_token_ = -1;

  EventQueue queue_;
  mutable std::mutex statistics_mutex_;  // of the next two
  RequestStatistics statistics_;
  bool began_ = false;  // it had its turn
  // Held while a callback of this request runs, so that release() can wait for it.
  std::mutex callback_mutex_;
  bool detached_ = false;
  int64_t hook_ns_ = 0;  // in the logits hook, since sample() last asked
};

}  // namespace dsv3
