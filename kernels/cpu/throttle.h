// How many of its threads a pool uses on a machine that is busy with other programs.
//
// A worker that loses its CPU in the middle of a task holds up everybody for a few milliseconds, a
// hundred times what a task takes. Where that happens often, fewer threads are faster. As in the
// control of congestion: when too much time is lost, a part of the threads (of two: one) rests for
// a while; then they are tried again, and rest twice as long when that was too early.
//
// How much is too much: a rest costs the share of the threads that rest. Half as much may be lost:
// of two threads a quarter of the time, of four or more an eighth. (Only the workers' stalls are
// known; those of the calling thread are about as long.)
//
// Knows no clock: times are what the caller says, in nanoseconds.
#pragma once

#include <cstdint>

namespace dsv3::kernels {

class Throttle {
 public:
  // How much may be lost beyond the share at once: two slices of time as systems give them to
  // programs, up to 4 ms each. Stalls now and then on a quiet machine change nothing.
  static constexpr int64_t kTolerated = 8'000'000;
  static constexpr int64_t kShortestRest = 50'000'000;
  static constexpr int64_t kLongestRest = 800'000'000;
  // After so many times its length without another a rest is forgotten: the next one is short.
  static constexpr int64_t kMemory = 16;

  explicit Throttle(int threads) : threads_(threads), limit_(threads) {}

  // Threads to use, 1 to `threads`.
  int limit() const { return limit_; }
  bool is_resting() const { return limit_ < threads_; }
  // Time goes on: before a job while is_resting().
  void advance(int64_t now);
  // At `now` `lost` nanoseconds had passed in waiting for workers that had no CPU.
  void lose(int64_t now, int64_t lost);

 private:
  int next_to_rest() const;  // how many threads are next
  int64_t share() const;     // one part in so many of the time may be lost

  int threads_;
  int limit_;
  int64_t lost_ = 0;      // beyond the share, at last_
  int64_t last_ = 0;      // when lost_ was counted
  int64_t rest_ = 0;      // how long a rest is now
  int64_t rest_end_ = 0;  // of the present rest or the last one
};

}  // namespace dsv3::kernels
