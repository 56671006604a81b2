#include "runtime/engine/draft_reference.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <utility>

namespace dsv3 {
namespace {

constexpr int32_t kGram = 3;  // tokens that must agree for a place far away

}  // namespace

ReferenceText::ReferenceText(std::vector<int32_t> reference)
    : reference_(std::move(reference)), index_(kGram, size()) {
  index_.extend(reference_, size());
  replacements_.reserve(kReplacements);
}

void ReferenceText::propose(std::span<const int32_t> answer, int32_t most, Draft* out) {
  out->clear();
  while (seen_ < static_cast<int64_t>(answer.size())) {
    ++seen_;
    observe(answer.first(static_cast<size_t>(seen_)));
  }
  int64_t from = next_;
  const auto push = [&](int32_t token) {
    if (static_cast<int32_t>(out->tokens.size()) < most) out->tokens.push_back(token);
  };
  if (!aligned_) {
    // Nothing agrees yet. By turns: as many tokens were replaced as were written, or none was.
    const int64_t written = seen_ - departed_answer_;
    from = departed_reference_ + (guesses_++ % 2 == 0 ? written : 0);
  } else if (replacing_ >= 0) {
    const Replacement& r = replacements_[static_cast<size_t>(replacing_)];
    for (int64_t i = replaced_; i < r.inserted_count; ++i) push(r.inserted[static_cast<size_t>(i)]);
    from += r.removed_count;
  }
  while (from < size() && static_cast<int32_t>(out->tokens.size()) < most) {
    if (const Replacement* r = aligned_ ? expected(from) : nullptr) {
      for (int64_t i = 0; i < r->inserted_count; ++i) push(r->inserted[static_cast<size_t>(i)]);
      from += r->removed_count;
    } else {
      push(at(from++));
    }
  }
  if (out->tokens.empty()) return;
  out->source = DraftSource::kReference;
  out->confidence = aligned_ ? agreed_ : 0;
}

void ReferenceText::observe(std::span<const int32_t> answer) {
  const int64_t answer_at = seen_ - 1;
  if (aligned_) {
    const int64_t replaced = replacing_ >= 0 ? replaced_ : 0;
    if (follow(answer.back())) {
      if (departed_ && agreed_ >= kCertain) remember(answer);
      return;
    }
    aligned_ = false;
    // A place that was only tried did not hold: the departure before it goes on.
    if (!departed_) depart(answer_at - replaced);
  }
  align(answer);
}

bool ReferenceText::follow(int32_t token) {
  if (replacing_ >= 0) {
    Replacement& r = replacements_[static_cast<size_t>(replacing_)];
    if (r.inserted[static_cast<size_t>(replaced_)] != token) {
      r.score = std::max(r.score - 1, -kMaxScore);
      replacing_ = -1;
      return false;
    }
    if (++replaced_ == r.inserted_count) {
      next_ += r.removed_count;
      r.score = std::min(r.score + 1, kMaxScore);
      replacing_ = -1;
    }
    ++agreed_;
    return true;
  }
  if (next_ < size() && at(next_) == token) {
    if (Replacement* r = expected(next_)) --r->score;  // it was not made here
    ++next_;
    ++agreed_;
    return true;
  }
  return follow_replacement(token);
}

bool ReferenceText::follow_replacement(int32_t token) {
  for (size_t i = 0; i < replacements_.size(); ++i) {
    Replacement& r = replacements_[i];
    if (!stands_at(r, next_)) continue;
    const int64_t after = next_ + r.removed_count;
    if (r.inserted_count == 0) {
      if (after >= size() || at(after) != token) continue;
      next_ = after + 1;
    } else {
      if (r.inserted[0] != token) continue;
      if (r.inserted_count > 1) {
        replacing_ = static_cast<int32_t>(i);
        replaced_ = 1;
        ++agreed_;
        return true;
      }
      next_ = after;
    }
    r.score = std::min(r.score + 1, kMaxScore);
    ++agreed_;
    return true;
  }
  return false;
}

void ReferenceText::depart(int64_t answer_at) {
  departed_ = true;
  departed_reference_ = next_;
  departed_answer_ = answer_at;
  guesses_ = 0;
}

// Looks for the place in the reference where the answer's last tokens stand: many agreeing tokens
// count for it, distance from where one would expect it counts against it.
void ReferenceText::align(std::span<const int32_t> answer) {
  const int64_t written = seen_ - departed_answer_;
  const int64_t likely = departed_reference_ + written;
  double best = 0;
  const auto consider = [&](int64_t end, int64_t length) {
    const auto distance = static_cast<double>(std::abs(end - likely));
    const double score =
        4.0 * static_cast<double>(std::min<int64_t>(length, 8)) - std::log2(1 + distance);
    if (score <= best) return;
    best = score;
    next_ = end;
    agreed_ = length;
  };
  const int64_t last = std::min(size(), departed_reference_ + kNear);
  for (int64_t end = departed_reference_ + 1; end <= last; ++end) {
    int64_t length = 0;
    while (length < NgramIndex::kMaxMatch && length < end && length < seen_ &&
           at(end - 1 - length) == answer[static_cast<size_t>(seen_ - 1 - length)]) {
      ++length;
    }
    if (length > 0) consider(end, length);
  }
  index_.for_each_match(reference_, answer, consider);
  if (best <= 0) return;
  aligned_ = true;
  replacing_ = -1;
  // What agrees began after the departure, on both sides.
  const int64_t common =
      std::min({agreed_, written, std::max<int64_t>(next_ - departed_reference_, 0)});
  resumed_reference_ = next_ - common;
  resumed_answer_ = seen_ - common;
  if (agreed_ >= kCertain) remember(answer);
}

// The departure is over: what was replaced by what?
void ReferenceText::remember(std::span<const int32_t> answer) {
  departed_ = false;
  const int64_t removed = resumed_reference_ - departed_reference_;
  const int64_t inserted = resumed_answer_ - departed_answer_;
  constexpr auto kMost = static_cast<int64_t>(kMaxReplaced);
  if (removed < 1 || removed > kMost || inserted < 0 || inserted > kMost) return;
  Replacement r;
  r.removed_count = removed;
  r.inserted_count = inserted;
  r.score = 1;
  const auto from = reference_.begin() + static_cast<std::ptrdiff_t>(departed_reference_);
  std::copy(from, from + static_cast<std::ptrdiff_t>(removed), r.removed.begin());
  const auto to = answer.begin() + static_cast<std::ptrdiff_t>(departed_answer_);
  std::copy(to, to + static_cast<std::ptrdiff_t>(inserted), r.inserted.begin());
  for (Replacement& known : replacements_) {
    if (known.removed_count != removed || known.inserted_count != inserted ||
        !std::equal(r.removed.begin(), r.removed.begin() + removed, known.removed.begin()) ||
        !std::equal(r.inserted.begin(), r.inserted.begin() + inserted, known.inserted.begin())) {
      continue;
    }
    known.score = std::clamp(known.score + 1, 1, kMaxScore);
    return;
  }
  if (replacements_.size() < kReplacements) {
    replacements_.push_back(r);
    return;
  }
  if (replacing_ == static_cast<int32_t>(oldest_)) return;  // in use just now
  replacements_[oldest_] = r;
  oldest_ = (oldest_ + 1) % kReplacements;
}

bool ReferenceText::stands_at(const Replacement& r, int64_t position) const {
  if (position + r.removed_count > size()) return false;
  for (int64_t i = 0; i < r.removed_count; ++i) {
    if (at(position + i) != r.removed[static_cast<size_t>(i)]) return false;
  }
  return true;
}

// The most trusted replacement of what stands at a position; of equals the longest, then the last.
ReferenceText::Replacement* ReferenceText::expected(int64_t position) {
  Replacement* best = nullptr;
  for (Replacement& r : replacements_) {
    if (r.score <= 0 || !stands_at(r, position)) continue;
    if (best == nullptr || r.score > best->score ||
        (r.score == best->score && r.removed_count >= best->removed_count)) {
      best = &r;
    }
  }
  return best;
}

}  // namespace dsv3
