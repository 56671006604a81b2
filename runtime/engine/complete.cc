#include "runtime/engine/complete.h"

#include <chrono>
#include <limits>

namespace dsv3 {

// Waits its turn; gives it to the next when it goes.
class Completer::Turn {
 public:
  Turn(Completer* owner, const CancelToken* cancel, int64_t deadline_ns) : owner_(owner) {
    std::unique_lock lock(owner->mutex_);
    while (owner->busy_) {
      if (cancel != nullptr && cancel->cancelled.load(std::memory_order_relaxed)) {
        stopped_ = Code::kCancelled;
        return;
      }
      if (monotonic_ns() >= deadline_ns) {
        stopped_ = Code::kDeadline;
        return;
      }
      // A cancel token cannot wake anyone, and a deadline comes by itself.
      owner->condition_.wait_for(lock, std::chrono::milliseconds(5));
    }
    owner->busy_ = true;
  }
  ~Turn() {
    if (stopped_ != Code::kOk) return;
    const std::lock_guard lock(owner_->mutex_);
    owner_->busy_ = false;
    owner_->condition_.notify_one();
  }
  Turn(const Turn&) = delete;
  Code stopped() const { return stopped_; }

 private:
  Completer* owner_;
  Code stopped_ = Code::kOk;
};

Status Completer::run(std::span<const int32_t> tokens, RequestOptions options, std::string* text) {
  DSV3_TRY(engine_->check_process());
  DSV3_TRY(options.validate(engine_->model()));
  const int64_t deadline = deadline_after(options.deadline_ms, monotonic_ns());
  const Turn turn(this, options.cancel.get(), deadline);
  if (turn.stopped() == Code::kCancelled) {
    return Status(Code::kCancelled, "cancelled while another completion ran");
  }
  if (turn.stopped() == Code::kDeadline) {
    return Status(Code::kDeadline, "the deadline passed while another completion ran",
                  "deadline_ms");
  }
  return run_in_turn(tokens, std::move(options), deadline, text);
}

Status Completer::run_in_turn(std::span<const int32_t> tokens, RequestOptions options,
                              int64_t deadline_ns, std::string* text) {
  if (session_ == nullptr) {
    DSV3_ASSIGN(session_, engine_->create_session());
  }
  AppendResult appended;
  DSV3_TRY(session_->append(tokens, /*replace=*/true, &appended));
  options.collect = true;
  DSV3_ASSIGN(const std::shared_ptr<Request> request,
              Request::start(session_, std::move(options), deadline_ns));
  // Whatever happens from here on, no callback of this call runs once it has returned.
  struct Release {
    Request* request;
    ~Release() { request->release(); }
  };
  const Release release{request.get()};
  Event event;
  while (request->next(std::numeric_limits<int64_t>::max(), &event) ==
             EventQueue::Outcome::kEvent &&
         event.kind != EventKind::kFinished) {
  }
  if (!event.status.ok()) return event.status;
  *text = request->take_collected_text();
  return {};
}

}  // namespace dsv3
