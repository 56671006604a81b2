// Where a token sequence has had the same last tokens before: hash chains over its n-grams, as
// compressors of the LZ77 family keep them. Adding a position is O(1); a search looks at the
// kMaxCandidates most recent places and compares backwards. Memory is bounded: positions that are
// further back than its window are forgotten.
//
// Used by the drafters (draft_lookup.h, draft_reference.h), on the engine's thread.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace dsv3 {

class NgramIndex {
 public:
  static constexpr int kMaxCandidates = 32;  // places one search looks at
  static constexpr int64_t kMaxMatch = 32;   // tokens compared at each

  // N-grams of `n` tokens; the last `positions` at least are remembered, 8 to 16 bytes each. All
  // memory is taken here.
  NgramIndex(int32_t n, int64_t positions);

  // Makes the n-grams that end at positions up to `end` findable; text[0, end) as before, and grown
  // since. Each n-gram is added once.
  void extend(std::span<const int32_t> text, int64_t end);

  // For each known place where `text` has the last n tokens of `tail`, most recent first: calls
  // visit(end, length), where text[end - length, end) are tail's last `length` tokens (n to
  // kMaxMatch) and text[end] is what came then.
  template <class Visit>
  void for_each_match(std::span<const int32_t> text, std::span<const int32_t> tail,
                      Visit visit) const {
    if (static_cast<int64_t>(tail.size()) < n_) return;
    int64_t at = head_[slot(tail.last(static_cast<size_t>(n_)))];
    for (int i = 0; i < kMaxCandidates && at >= 0 && newest_ - at < window(); ++i) {
      const int64_t length = match_length(text.first(static_cast<size_t>(at)), tail);
      if (length >= n_) visit(at, length);
      at = previous_[static_cast<size_t>(at & mask_)];
    }
  }

 private:
  int64_t window() const { return mask_ + 1; }
  size_t slot(std::span<const int32_t> gram) const;  // gram has n_ tokens
  static int64_t match_length(std::span<const int32_t> a, std::span<const int32_t> b);

  int64_t n_;
  int64_t mask_;                   // window() - 1, a power of two less one
  int64_t newest_ = 0;             // the last end that was added
  std::vector<int32_t> head_;      // by hash: the most recent end, -1 for none
  std::vector<int32_t> previous_;  // by end & mask_: the end before with the same hash, -1 for none
};

}  // namespace dsv3
