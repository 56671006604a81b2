#include "runtime/engine/speculator.h"

#include <algorithm>

namespace dsv3 {
Speculator::Speculator(const SpeculationOptions& options, int64_t expected)
    : mode_(options.mode), max_draft_(options.max_draft > 0 ? options.max_draft : kMaxDraft) {
  if (mode_ == SpeculationMode::kOff) return;
  if (options.lookup) lookup_.emplace(expected);
  if (!options.reference.empty()) reference_.emplace(options.reference);
  lookup_draft_.tokens.reserve(kMaxDraft);
  reference_draft_.tokens.reserve(kMaxDraft);
}

// How many of the draft's tokens came, whether they were verified or not.
void Speculator::learn_from(DraftExperience* shared, const Draft& draft,
                            std::span<const int32_t> fresh) {
  if (draft.source == DraftSource::kNone) return;
  const size_t most = std::min(draft.tokens.size(), fresh.size());
  size_t right = 0;
  while (right < most && draft.tokens[right] == fresh[right]) ++right;
  control_.record_draft(shared, draft.source, draft.confidence, static_cast<int32_t>(right),
                        right < most);
}

void Speculator::learn(DraftExperience* shared, std::span<const int32_t> tokens, int32_t fresh,
                       int32_t drafted, int64_t others) {
  const auto last = tokens.last(static_cast<size_t>(fresh));
  learn_from(shared, lookup_draft_, last);
  learn_from(shared, reference_draft_, last);
  control_.record_step(shared, drafted, fresh, others, 0);
}

void Speculator::propose(const DraftExperience& shared, std::span<const int32_t> tokens,
                         int64_t others, int64_t room) {
  draft_ = {};
  lookup_draft_.clear();
  reference_draft_.clear();
  if (mode_ == SpeculationMode::kOff) return;
  const auto most = static_cast<int32_t>(std::clamp<int64_t>(room, 0, max_draft_));
  if (most == 0) return;
  if (reference_) reference_->propose(tokens.subspan(prompt_), most, &reference_draft_);
  if (lookup_) lookup_->propose(tokens, most, &lookup_draft_);
  if (mode_ == SpeculationMode::kAlways) {
    const bool guess = reference_draft_.confidence == 0 && !lookup_draft_.tokens.empty();
    draft_ = guess ? lookup_draft_.tokens : reference_draft_.tokens;
    if (draft_.empty()) draft_ = lookup_draft_.tokens;
    return;
  }
  double best = 0;
  for (const Draft* d : {&reference_draft_, &lookup_draft_}) {
    const DraftControl::Plan plan =
        control_.plan(shared, d->source, d->confidence, static_cast<int32_t>(d->tokens.size()),
                      others, /*draft_ns=*/0);
    if (plan.length == 0 || plan.speedup <= best) continue;
    best = plan.speedup;
    draft_ = std::span(d->tokens).first(static_cast<size_t>(plan.length));
  }
}

}  // namespace dsv3
