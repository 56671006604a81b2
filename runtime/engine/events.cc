#include "runtime/engine/events.h"

#include <algorithm>
#include <chrono>
#include <limits>

#include "runtime/text/stream.h"

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

void Event::reserve(size_t top_count) {
  text.reserve(kTokenTextBytes);
  tokens.reserve(1);
  top.reserve(top_count);
}

EventQueue::EventQueue(uint32_t limit, size_t top) : limit_(std::max<size_t>(limit, 1)) {
  const size_t events = std::min(limit_, kPrepared) + 1;
  records_.reserve(events);
  text_.reserve(events * kTextBytes);
  tokens_.reserve(events);
  top_.reserve(events * top);
}

size_t EventQueue::room() const {
  const std::lock_guard lock(mutex_);
  return records_.size() < limit_ ? limit_ - records_.size() : 0;
}

bool EventQueue::full_for(int64_t ns) const {
  const std::lock_guard lock(mutex_);
  return records_.size() >= limit_ && monotonic_ns() - full_since_ns_ >= ns;
}

void EventQueue::push(const Event& event) {
  const std::lock_guard lock(mutex_);
  const Record record = {event.kind,
                         static_cast<uint32_t>(event.tokens.size()),
                         static_cast<uint32_t>(event.top.size()),
                         event.text.size(),
                         event.prompt_done,
                         event.prompt_total};
  if (event.kind == EventKind::kProgress && records_.size() > 0 &&
      records_.back().kind == EventKind::kProgress) {
    records_.back() = record;
    return;
  }
  records_.reserve(1);
  text_.reserve(record.text);
  tokens_.reserve(record.tokens);
  top_.reserve(record.top);
  records_.append(&record, 1);
  if (records_.size() == limit_) full_since_ns_ = monotonic_ns();
  text_.append(event.text.data(), record.text);
  tokens_.append(event.tokens.data(), record.tokens);
  top_.append(event.top.data(), record.top);
  signal();
}

// The oldest one's content, copied into memory that the consumer uses again and again.
void EventQueue::take(Event* event) {
  const Record record = *records_.data();
  event->clear(record.kind);
  event->text.assign(text_.data(), record.text);
  event->tokens.assign(tokens_.data(), tokens_.data() + record.tokens);
  event->top.assign(top_.data(), top_.data() + record.top);
  event->prompt_done = record.prompt_done;
  event->prompt_total = record.prompt_total;
  // Nothing was taken if that threw.
  records_.pop(1);
  text_.pop(record.text);
  tokens_.pop(record.tokens);
  top_.pop(record.top);
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
  const auto ready = [&] { return records_.size() > 0 || final_waits_ || final_taken_; };
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
  if (records_.size() > 0) {
    const bool was_full = records_.size() >= limit_;
    take(event);
    *made_room = was_full;
    outcome = Outcome::kEvent;
  } else if (final_waits_) {
    std::swap(*event, final_);
    final_waits_ = false;
    final_taken_ = true;
    outcome = Outcome::kEvent;
  } else if (final_taken_) {
    outcome = Outcome::kEnd;
  }
  if (descriptor_ && records_.size() == 0 && !final_waits_) descriptor_->clear();
  return outcome;
}

intptr_t EventQueue::descriptor() {
  const std::lock_guard lock(mutex_);
  if (!descriptor_) {
    Result<WaitDescriptor> made = WaitDescriptor::create();
    if (!made.ok()) return -1;
    descriptor_.emplace(std::move(*made));
    if (records_.size() > 0 || final_waits_) descriptor_->set();
  }
  return descriptor_->native();
}

}  // namespace dsv3
