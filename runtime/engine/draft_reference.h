// A reference text as the draft: an edit mostly copies a file, so the caller says which, and the
// answer is followed along it. Where the answer departs (an insertion, a deletion, a replacement),
// its next tokens are looked for nearby, and further away when several of them agree. A
// replacement that was seen once (a renamed identifier) is expected to be made again.
//
// Works on tokens: where the answer is cut into other tokens than the reference, that is a
// replacement like any other, over after the next token that both have.
//
// Used by the engine's thread. All memory is taken when it is made: any place in the reference is
// found again, however far from its end.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "runtime/engine/draft.h"
#include "runtime/engine/ngram_index.h"

namespace dsv3 {

class ReferenceText {
 public:
  explicit ReferenceText(std::vector<int32_t> reference);

  // A draft of up to `most` tokens that follow `answer` (what was generated so far; it has grown
  // since the last call). Confidence: the tokens that agreed since the answer last departed from
  // the reference; 0 for a guess.
  void propose(std::span<const int32_t> answer, int32_t most, Draft* out);

 private:
  static constexpr int64_t kNear = 256;        // tokens ahead where one token's agreement counts
  static constexpr int64_t kCertain = 3;       // tokens that must agree before a departure is over
  static constexpr size_t kMaxReplaced = 8;    // tokens on each side of a remembered replacement
  static constexpr size_t kReplacements = 32;  // remembered
  static constexpr int32_t kMaxScore = 4;

  struct Replacement {
    std::array<int32_t, kMaxReplaced> removed, inserted;
    int64_t removed_count = 0, inserted_count = 0;
    int32_t score = 0;  // positive: expected wherever `removed` stands
  };

  int64_t size() const { return static_cast<int64_t>(reference_.size()); }
  int32_t at(int64_t i) const { return reference_[static_cast<size_t>(i)]; }
  void observe(std::span<const int32_t> answer);  // its last token is new
  bool follow(int32_t token);
  bool follow_replacement(int32_t token);
  void depart(int64_t answer_at);
  void align(std::span<const int32_t> answer);
  void remember(std::span<const int32_t> answer);
  bool stands_at(const Replacement& r, int64_t position) const;
  Replacement* expected(int64_t position);

  const std::vector<int32_t> reference_;
  NgramIndex index_;
  std::vector<Replacement> replacements_;
  size_t oldest_ = 0;  // the next to be overwritten
  int64_t seen_ = 0;   // tokens of the answer

  // Where the answer goes on in the reference, as far as is known.
  bool aligned_ = false;
  int64_t next_ = 0;        // in the reference
  int64_t agreed_ = 0;      // tokens since the last departure
  int32_t replacing_ = -1;  // a remembered replacement that the answer is in the middle of
  int64_t replaced_ = 0;    // tokens of its `inserted` that were seen

  // The last departure; not over before kCertain tokens agreed.
  bool departed_ = true;
  int64_t departed_reference_ = 0, departed_answer_ = 0;
  int64_t resumed_reference_ = 0, resumed_answer_ = 0;
  int64_t guesses_ = 0;
};

}  // namespace dsv3
