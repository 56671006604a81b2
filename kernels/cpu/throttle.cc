#include "kernels/cpu/throttle.h"

#include <algorithm>

namespace dsv3::kernels {

void Throttle::advance(int64_t now) {
  if (!is_resting() || now < rest_end_) return;
  limit_ = std::min(threads_, 2 * limit_);
  // Nothing is tolerated at first: the next stall ends the trial.
  lost_ = kTolerated;
  last_ = now;
  rest_end_ = is_resting() ? now + rest_ : now;
}

int Throttle::next_to_rest() const { return std::max(1, limit_ / 4); }

int64_t Throttle::share() const { return 2 * limit_ / next_to_rest(); }

void Throttle::lose(int64_t now, int64_t lost) {
  lost_ = std::max(int64_t{0}, lost_ - (now - last_) / share()) + lost;
  last_ = now;
  if (lost_ <= kTolerated || limit_ == 1) return;
  rest_ = now - rest_end_ < kMemory * rest_ ? 2 * rest_ : kShortestRest;
  rest_ = std::min(kLongestRest, std::max(rest_, share() * lost));
  limit_ -= next_to_rest();
  rest_end_ = now + rest_;
  lost_ = 0;
}

}  // namespace dsv3::kernels
