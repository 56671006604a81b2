#include "runtime/engine/draft_lookup.h"

namespace dsv3 {

void PromptLookup::propose(std::span<const int32_t> tokens, int32_t most, Draft* out) {
  out->clear();
  const auto length = static_cast<int64_t>(tokens.size());
  if (length < kShort || most <= 0) return;
  // Not the n-gram at the very end: it would find itself.
  long_.extend(tokens, length - 1);
  short_.extend(tokens, length - 1);
  int64_t best_end = -1, best_length = 0;
  const auto visit = [&](int64_t end, int64_t matched) {
    if (matched <= best_length) return;  // the more recent of equals was seen first
    best_end = end;
    best_length = matched;
  };
  long_.for_each_match(tokens, tokens, visit);
  if (best_end < 0) short_.for_each_match(tokens, tokens, visit);
  if (best_end < 0) return;
  out->source = DraftSource::kLookup;
  out->confidence = best_length;
  // A match that reaches the end goes on with the draft itself: the text is taken for periodic.
  for (int64_t i = 0; i < most; ++i) {
    const int64_t at = best_end + i;
    out->tokens.push_back(at < length ? tokens[static_cast<size_t>(at)]
                                      : out->tokens[static_cast<size_t>(at - length)]);
  }
}

}  // namespace dsv3
