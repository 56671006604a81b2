// When threads rest on a busy machine and when they are tried again; with invented times.
#include "kernels/cpu/throttle.h"

#include <doctest/doctest.h>

#include <algorithm>

namespace dsv3::test {
namespace {

using kernels::Throttle;

constexpr int64_t kMs = 1'000'000;
constexpr int64_t kStart = 1'000'000 * kMs;  // clocks do not begin at zero

// A machine on which every `period` of working with `most` threads or more a stall of `stall`
// comes.
struct Machine {
  Throttle throttle;
  int64_t now = kStart;
  int64_t lost = 0, alone = 0;

  explicit Machine(int threads) : throttle(threads) {}
  void run(int64_t duration, int most, int64_t period, int64_t stall) {
    const int64_t end = now + duration;
    int64_t worked = 0;
    while (now < end) {
      now += kMs / 10;
      if (throttle.is_resting()) throttle.advance(now);
      alone += throttle.limit() == 1 ? kMs / 10 : 0;
      if (throttle.limit() < most || (worked += kMs / 10) < period) continue;
      worked = 0;
      now += stall;
      lost += stall;
      throttle.lose(now, stall);
    }
  }
};

}  // namespace

TEST_CASE("throttle: what happens now and then on a quiet machine changes nothing") {
  Machine machine(2);
  machine.run(60'000 * kMs, 2, 100 * kMs, 3 * kMs);  // 3 of each 103 ms
  CHECK(machine.lost > 1000 * kMs);
  CHECK(machine.alone == 0);
  machine.throttle.lose(machine.now + kMs, Throttle::kTolerated / 2);
  CHECK_FALSE(machine.throttle.is_resting());
}

TEST_CASE("throttle: nobody rests where that would cost more than the stalls do") {
  // A slice of 4 ms in 26 is less than one thread of two or three would be worth, more than
  // one of four.
  for (const int threads : {2, 3, 4, 8, 64}) {
    CAPTURE(threads);
    Machine machine(threads);
    machine.run(5'000 * kMs, threads, 22 * kMs, 4 * kMs);
    CHECK((machine.throttle.limit() == threads) == (threads <= 3));
    CHECK(machine.alone == 0);
  }
  // 1 in 3 is more.
  Machine machine(2);
  machine.run(5'000 * kMs, 2, 8 * kMs, 4 * kMs);
  CHECK(machine.alone > 4'000 * kMs);
}

TEST_CASE("throttle: on a busy machine a small share of the time is lost") {
  for (const int64_t stall : {1 * kMs, 3 * kMs, 9 * kMs, 40 * kMs}) {
    CAPTURE(stall);
    Machine machine(2);
    machine.run(20'000 * kMs, 2, 2 * kMs, stall);
    CHECK(machine.throttle.is_resting());
    CHECK(machine.lost < 20'000 * kMs / 16);
    CHECK(machine.lost > 0);
    CHECK(machine.alone > 17'000 * kMs);
  }
}

TEST_CASE("throttle: rests grow to their bound, and end when the machine is quiet again") {
  Machine machine(2);
  machine.run(30'000 * kMs, 2, 1 * kMs, 4 * kMs);
  const int64_t before = machine.lost;
  machine.run(8'000 * kMs, 2, 1 * kMs, 4 * kMs);
  CHECK(machine.lost - before <= (8'000 * kMs / Throttle::kLongestRest + 2) * 4 * kMs);
  CHECK(machine.lost - before >= 5 * 4 * kMs);  // still tried

  machine.run(Throttle::kLongestRest + kMs, 3, 1, 1);
  CHECK(machine.throttle.limit() == 2);
  machine.run(Throttle::kMemory * Throttle::kLongestRest, 3, 1, 1);
  // Long quiet: the next rest is short again, and one stall is tolerated.
  machine.throttle.lose(machine.now, Throttle::kTolerated);
  CHECK_FALSE(machine.throttle.is_resting());
  machine.throttle.lose(machine.now, 1);
  REQUIRE(machine.throttle.is_resting());
  machine.throttle.advance(machine.now + Throttle::kShortestRest - 1);
  CHECK(machine.throttle.is_resting());
  machine.throttle.advance(machine.now + Throttle::kShortestRest);
  CHECK_FALSE(machine.throttle.is_resting());
}

TEST_CASE("throttle: the first stall of a trial ends it") {
  Throttle throttle(2);
  throttle.lose(kStart, Throttle::kTolerated + 1);
  REQUIRE(throttle.limit() == 1);
  throttle.advance(kStart + Throttle::kShortestRest);
  REQUIRE(throttle.limit() == 2);
  const int64_t now = kStart + Throttle::kShortestRest + kMs;
  throttle.lose(now, kMs);
  CHECK(throttle.limit() == 1);
  throttle.advance(now + 2 * Throttle::kShortestRest - 1);
  CHECK(throttle.limit() == 1);
  throttle.advance(now + 2 * Throttle::kShortestRest);
  CHECK(throttle.limit() == 2);
}

TEST_CASE("throttle: of many threads only those without a CPU rest") {
  Machine machine(16);
  machine.run(10'000 * kMs, 14, 2 * kMs, 3 * kMs);  // 13 find a CPU each
  CHECK(machine.lost < 10'000 * kMs / 8);
  CHECK(machine.alone == 0);
  CHECK(machine.throttle.limit() >= 9);
  // All CPUs taken away, and given back.
  machine.run(10'000 * kMs, 2, 1 * kMs, 5 * kMs);
  CHECK(machine.throttle.limit() <= 2);
  machine.run(5 * Throttle::kLongestRest, 17, 1, 1);
  CHECK(machine.throttle.limit() == 16);
  CHECK_FALSE(machine.throttle.is_resting());
}

TEST_CASE("throttle: one thread is never less") {
  Throttle throttle(1);
  for (int i = 0; i < 10; ++i) throttle.lose(kStart + i, 100 * kMs);
  CHECK(throttle.limit() == 1);
  CHECK_FALSE(throttle.is_resting());
}

}  // namespace dsv3::test
