#include <doctest/doctest.h>
#include <poll.h>

#include <limits>
#include <thread>

#include "runtime/engine/callback.h"
#include "runtime/engine/events.h"

using namespace dsv3;  // NOLINT

namespace {

constexpr int64_t kForever = std::numeric_limits<int64_t>::max();

void push_text(EventQueue* queue, const std::string& text) {
  Event event;
  event.clear(EventKind::kText);
  event.text = text;
  queue->push(event);
}

void push_progress(EventQueue* queue, uint64_t done) {
  Event event;
  event.clear(EventKind::kProgress);
  event.prompt_done = done;
  queue->push(event);
}

void push_final(EventQueue* queue, FinishReason reason) {
  Event event;
  event.clear(EventKind::kFinished);
  event.reason = reason;
  queue->finish(&event);
}

struct Taken {
  EventQueue::Outcome outcome;
  Event event;
  bool made_room;
};
Taken take(EventQueue* queue, int64_t deadline = 0) {
  Taken t;
  t.outcome = queue->next(deadline, &t.event, &t.made_room);
  return t;
}

bool readable(intptr_t descriptor) {
  pollfd p = {static_cast<int>(descriptor), POLLIN, 0};
  return poll(&p, 1, 0) == 1;
}

}  // namespace

TEST_CASE("events come in order, through growth and wrapping") {
  EventQueue queue(1000);
  int pushed = 0, taken = 0;
  for (const int burst : {3, 7, 20, 100, 5}) {
    for (int i = 0; i < burst; ++i) push_text(&queue, std::to_string(pushed++));
    for (int i = 0; i < burst - 2; ++i) CHECK(take(&queue).event.text == std::to_string(taken++));
  }
  while (taken < pushed) CHECK(take(&queue).event.text == std::to_string(taken++));
  CHECK(take(&queue).outcome == EventQueue::Outcome::kTimeout);
}

TEST_CASE("progress replaces progress that still waits, and nothing else") {
  EventQueue queue(10);
  push_progress(&queue, 1);
  push_progress(&queue, 2);
  push_text(&queue, "a");
  push_progress(&queue, 3);
  Taken t = take(&queue);
  CHECK(t.event.kind == EventKind::kProgress);
  CHECK(t.event.prompt_done == 2);
  CHECK(take(&queue).event.text == "a");
  CHECK(take(&queue).event.prompt_done == 3);
}

TEST_CASE("full says when its consumer is behind, and next when there is room again") {
  EventQueue queue(2);
  CHECK_FALSE(queue.full());
  push_text(&queue, "a");
  push_text(&queue, "b");
  CHECK(queue.full());
  push_text(&queue, "c");  // a token's second piece is not lost
  CHECK(take(&queue).made_room);
  CHECK(queue.full());
  CHECK(take(&queue).made_room);
  CHECK_FALSE(queue.full());
  CHECK_FALSE(take(&queue).made_room);
}

TEST_CASE("the final event comes last, once, and then there are no more") {
  EventQueue queue(1);
  push_text(&queue, "a");
  push_final(&queue, FinishReason::kMaxTokens);
  push_final(&queue, FinishReason::kCancelled);
  CHECK(take(&queue).event.text == "a");
  const Taken last = take(&queue, kForever);
  CHECK(last.event.kind == EventKind::kFinished);
  CHECK(last.event.reason == FinishReason::kMaxTokens);
  CHECK(take(&queue, kForever).outcome == EventQueue::Outcome::kEnd);
  push_final(&queue, FinishReason::kError);
  CHECK(take(&queue).outcome == EventQueue::Outcome::kEnd);
}

TEST_CASE("waiting ends with an event or with the time") {
  EventQueue queue(4);
  const int64_t begin = monotonic_ns();
  CHECK(take(&queue, begin + 20'000'000).outcome == EventQueue::Outcome::kTimeout);
  CHECK(monotonic_ns() - begin >= 20'000'000);
  std::thread producer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
    push_text(&queue, "late");
  });
  CHECK(take(&queue, kForever).event.text == "late");
  producer.join();
}

TEST_CASE("the descriptor follows the queue") {
  EventQueue queue(4);
  push_text(&queue, "a");
  const intptr_t descriptor = queue.descriptor();
  REQUIRE(descriptor >= 0);
  CHECK(readable(descriptor));
  take(&queue);
  CHECK_FALSE(readable(descriptor));
  push_text(&queue, "b");
  push_final(&queue, FinishReason::kMaxTokens);
  take(&queue);
  CHECK(readable(descriptor));
  take(&queue);
  CHECK_FALSE(readable(descriptor));
  // Asked for when only the final event waits.
  EventQueue late(4);
  push_final(&late, FinishReason::kMaxTokens);
  CHECK(readable(late.descriptor()));
  take(&late);
  CHECK_FALSE(readable(late.descriptor()));
}

TEST_CASE("frees inside callbacks wait for the outermost to return") {
  struct Work final : Deferred {
    std::vector<int>* log;
    int id;
    Work(std::vector<int>* l, int i) : log(l), id(i) {}
    void run_deferred() noexcept override {
      log->push_back(id);
      CHECK_FALSE(CallbackScope::active());
    }
  };
  std::vector<int> log;
  Work a(&log, 1), b(&log, 2), c(&log, 3);
  CHECK_FALSE(CallbackScope::active());
  CHECK_FALSE(CallbackScope::defer(&a));
  {
    const CallbackScope outer;
    CHECK(CallbackScope::active());
    CHECK(CallbackScope::defer(&a));
    {
      const CallbackScope inner;
      CHECK(CallbackScope::defer(&b));
    }
    CHECK(CallbackScope::defer(&c));
    CHECK(log.empty());
    std::thread([] { CHECK_FALSE(CallbackScope::active()); }).join();
  }
  CHECK(log == std::vector<int>{1, 2, 3});
  CHECK_FALSE(CallbackScope::active());
}
