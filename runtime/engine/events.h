// What a request tells its consumer, and the queue between the engine's thread and the consumer's.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "runtime/base/os.h"
#include "runtime/base/status.h"
#include "runtime/engine/sampler.h"

namespace dsv3 {

// The numbers are those of dsv3.h.
enum class EventKind : int32_t { kProgress = 1, kText = 2, kReasoning = 3, kFinished = 4 };
enum class FinishReason : int32_t {
  kNone = 0,  // not finished
  kStopToken = 1,
  kStopString = 2,
  kMaxTokens = 3,
  kContextLength = 4,
  kCancelled = 5,
  kDeadline = 6,
  kError = 7,
};

struct RequestStatistics {
  uint64_t prompt_tokens = 0;
  uint64_t cached_tokens = 0;
  uint64_t generated_tokens = 0;
  uint64_t drafted_tokens = 0;
  uint64_t accepted_tokens = 0;
  uint64_t decode_steps = 0;         // that generated tokens
  int64_t speculation_saved_ns = 0;  // by measured step times; negative: it cost
  uint64_t queue_ns = 0;
  uint64_t prefill_ns = 0;
  uint64_t decode_ns = 0;
  uint64_t first_token_ns = 0;
  uint64_t total_ns = 0;
  uint64_t pages = 0;        // the most that were held at once
  uint64_t preemptions = 0;  // how often the pages were given up for others
};

struct EventToken {
  int32_t id = -1;
  float logprob = 0;
  uint32_t top_begin = 0;  // in Event::top
  uint32_t top_count = 0;
};

// One event. Objects are reused: clear() keeps the buffers.
struct Event {
  EventKind kind = EventKind::kProgress;
  std::string text;  // kText, kReasoning
  std::vector<EventToken> tokens;
  std::vector<TopToken> top;
  uint64_t prompt_done = 0, prompt_total = 0;  // kProgress
  // kFinished
  FinishReason reason = FinishReason::kNone;
  Status status;
  int32_t stop_token = -1;
  std::string stop_string;
  RequestStatistics statistics;

  void clear(EventKind new_kind);
  // For one token's text and so many alternatives.
  void reserve(size_t top_count);
};

// A queue of values in one block of memory, which grows by doubling and is never given back.
template <class T>
class Fifo {
 public:
  size_t size() const { return items_.size() - head_; }
  const T* data() const { return items_.data() + head_; }
  T& back() { return items_.back(); }
  // Room for `more` values behind those there are: append() of so many cannot fail.
  void reserve(size_t more) {
    if (items_.size() + more <= items_.capacity()) return;
    // Half empty at the least when they are moved up, so that each is moved once or twice.
    if (2 * (size() + more) > items_.capacity()) {
      std::vector<T> larger;
      larger.reserve(2 * std::max(items_.capacity(), size() + more));
      larger.assign(items_.begin() + static_cast<std::ptrdiff_t>(head_), items_.end());
      items_.swap(larger);
    } else {
      items_.erase(items_.begin(), items_.begin() + static_cast<std::ptrdiff_t>(head_));
    }
    head_ = 0;
  }
  void append(const T* values, size_t count) {
    items_.insert(items_.end(), values, values + count);
  }
  void pop(size_t count) {
    head_ += count;
    if (head_ < items_.size()) return;
    items_.clear();
    head_ = 0;
  }

 private:
  std::vector<T> items_;
  size_t head_ = 0;  // those before it were taken
};

// Bounded: the engine asks full() before it works for the request. The final event has its own
// place, so that it can always be delivered. One producer, one consumer. Events that wait are kept
// as records beside the bytes, tokens and alternatives of all of them: however far the consumer is
// behind, an event costs no allocation once the queue has been that long.
class EventQueue {
 public:
  // `top`: alternatives of a token. Room for kPrepared events is taken here.
  explicit EventQueue(uint32_t limit, size_t top = 0);

  // --- the engine's side
  bool full() const { return room() == 0; }
  size_t room() const;  // events until then
  // For so long at the least, without anything being taken?
  bool full_for(int64_t ns) const;
  // A progress event replaces a progress event that still waits. May throw std::bad_alloc, and then
  // nothing was added.
  void push(const Event& event);
  // Delivers the final event, once.
  void finish(Event* event) noexcept;

  // --- the consumer's side
  enum class Outcome { kEvent, kTimeout, kEnd };
  // Waits until `deadline_ns` (monotonic; INT64_MAX: forever). *made_room: the queue was full.
  Outcome next(int64_t deadline_ns, Event* event, bool* made_room);
  // Made on first use; -1 when the system has none left. Readable while events wait.
  intptr_t descriptor();

 private:
  static constexpr size_t kPrepared = 256;  // the default limit
  static constexpr size_t kTextBytes = 8;   // of an event, in the mean
  // An event that waits; its content is at the heads of the other queues when it is at the head.
  struct Record {
    EventKind kind;
    uint32_t tokens, top;
    size_t text;                         // bytes
    uint64_t prompt_done, prompt_total;  // kProgress
  };
  void signal();  // under mutex_
  void take(Event* event);

  const size_t limit_;
  mutable std::mutex mutex_;
  std::condition_variable condition_;
  Fifo<Record> records_;
  Fifo<char> text_;
  Fifo<EventToken> tokens_;
  Fifo<TopToken> top_;
  Event final_;
  bool final_waits_ = false, final_taken_ = false;
  int64_t full_since_ns_ = 0;  // while it is full
  int waiting_ = 0;            // consumers in next(): without one, no wake-up is paid for
  std::optional<WaitDescriptor> descriptor_;
};

}  // namespace dsv3
