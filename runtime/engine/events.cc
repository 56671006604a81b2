#include "runtime/engine/events.h"

#include <algorithm>
#include <chrono>
#include <limits>

namespace dsv3 {

void Event::clear(EventKind new_kind) {
  kind = new_kind;
  text.clear();
  tokens.clear();
  top.clear();
  prompt_done = prompt_total = 0;
  reason = FinishReason::kNone;
  status = Status();
  stop_token = -1;
  stop_string.clear();
}

EventQueue::EventQueue(uint32_t limit) : limit_(std::max<size_t>(limit, 1)) {
  ring_.resize(std::min<size_t>(limit_ + 1, 8));
}

size_t EventQueue::room() const {
  const std::lock_guard lock(mutex_);
  return count_ < limit_ ? limit_ - count_ : 0;
}

void EventQueue::push(Event* event) {
  const std::lock_guard lock(mutex_);
  if (event->kind == EventKind::kProgress && count_ > 0) {
    Event& newest = ring_[(head_ + count_ - 1) % ring_.size()];
    if (newest.kind == EventKind::kProgress) {
      std::swap(newest, *event);
      return;
    }
  }
  if (count_ == ring_.size()) {
    std::vector<Event> larger(ring_.size() * 2);
    for (size_t i = 0; i < count_; ++i) {
      std::swap(larger[i], ring_[(head_ + i) % ring_.size()]);
    }
    ring_ = std::move(larger);
    head_ = 0;
  }
  std::swap(ring_[(head_ + count_) % ring_.size()], *event);
  ++count_;
  signal();
}

void EventQueue::finish(Event* event) noexcept {
  const std::lock_guard lock(mutex_);
  if (final_waits_ || final_taken_) return;
  std::swap(final_, *event);
  final_waits_ = true;
  signal();
}

void EventQueue::signal() {
  if (waiting_ > 0) condition_.notify_all();
  if (descriptor_) descriptor_->set();
}

EventQueue::Outcome EventQueue::next(int64_t deadline_ns, Event* event, bool* made_room) {
  *made_room = false;
  std::unique_lock lock(mutex_);
  const auto ready = [&] { return count_ > 0 || final_waits_ || final_taken_; };
  ++waiting_;
  while (!ready()) {
    if (deadline_ns == std::numeric_limits<int64_t>::max()) {
      condition_.wait(lock);
      continue;
    }
    const int64_t left = deadline_ns - monotonic_ns();
    if (left <= 0) break;
    // At most an hour at a time: a deadline far away must not overflow the clock.
    condition_.wait_for(
        lock, std::chrono::nanoseconds(std::min<int64_t>(left, int64_t{3600} * 1'000'000'000)));
  }
  --waiting_;
  Outcome outcome = Outcome::kTimeout;
  if (count_ > 0) {
    *made_room = count_ >= limit_;
    std::swap(*event, ring_[head_]);
    head_ = (head_ + 1) % ring_.size();
    --count_;
    outcome = Outcome::kEvent;
  } else if (final_waits_) {
    std::swap(*event, final_);
    final_waits_ = false;
    final_taken_ = true;
    outcome = Outcome::kEvent;
  } else if (final_taken_) {
    outcome = Outcome::kEnd;
  }
  if (descriptor_ && count_ == 0 && !final_waits_) descriptor_->clear();
  return outcome;
}

intptr_t EventQueue::descriptor() {
  const std::lock_guard lock(mutex_);
  if (!descriptor_) {
    Result<WaitDescriptor> made = WaitDescriptor::create();
    if (!made.ok()) return -1;
    descriptor_.emplace(std::move(*made));
    if (count_ > 0 || final_waits_) descriptor_->set();
  }
  return descriptor_->native();
}

}  // namespace dsv3
