#include "runtime/engine/speculator.h"

#include <algorithm>
#include <iterator>

namespace dsv3 {
namespace {

// What a guess costs until it was measured, in plain steps.
constexpr double kUnknownMtp = 0.3;
// The module works after every step, so what it is thought to gain must be more than what such an
// estimate is wrong by, unless somebody wants it. On tiny-coder, where a second row costs 0.4 of a
// step and a guess 0.3, taking every gain made sampled answers slower (0.96 of the rate without it
// in the run that had 1.05 with the other drafters alone).
constexpr double kClearGain = 1.1;

// MTP guesses are told apart by the probability that the module gives them; the last class counts
// all of them.
constexpr int64_t kAnyProbability = 16;
int64_t mtp_confidence(float probability) {
  constexpr float kBounds[] = {0.3F, 0.5F, 0.7F, 0.9F};
  constexpr int64_t kOfClass[] = {0, 1, 2, 4, 8};  // see confidence_class()
  return kOfClass[std::upper_bound(std::begin(kBounds), std::end(kBounds), probability) -
                  std::begin(kBounds)];
}

}  // namespace

Speculator::Speculator(const SpeculationOptions& options, int64_t expected, bool has_mtp)
    : mode_(options.mode),
      max_draft_(options.max_draft > 0 ? options.max_draft : kMaxDraft),
      mtp_(options.mtp && has_mtp &&
           (options.require_mtp || options.mode == SpeculationMode::kAuto)),
      mtp_named_(options.require_mtp) {
  if (mode_ == SpeculationMode::kOff) return;
  if (options.lookup) lookup_.emplace(expected);
  if (!options.reference.empty()) reference_.emplace(options.reference);
  lookup_draft_.tokens.reserve(kMaxDraft);
  reference_draft_.tokens.reserve(kMaxDraft);
  mtp_draft_.tokens.reserve(kMaxMtpDepth);
}

// How many of the draft's tokens came, whether they were verified or not.
void Speculator::learn_from(DraftExperience* shared, const Draft& draft,
                            std::span<const int32_t> fresh) {
  if (draft.source == DraftSource::kNone) return;
  const size_t most = std::min(draft.tokens.size(), fresh.size());
  size_t right = 0;
  while (right < most && draft.tokens[right] == fresh[right]) ++right;
  const bool wrong = right < most;
  control_.record_draft(shared, draft.source, draft.confidence, static_cast<int32_t>(right), wrong);
  if (draft.source != DraftSource::kMtp) return;
  for (size_t i = 0; i < right + (wrong ? 1 : 0); ++i) {
    control_.record_draft(shared, DraftSource::kMtp, mtp_confidence(mtp_probabilities_[i]),
                          i < right ? 1 : 0, i == right);
  }
}

void Speculator::learn(DraftExperience* shared, std::span<const int32_t> tokens, int32_t fresh,
                       int32_t drafted, int64_t others) {
  if (mode_ == SpeculationMode::kOff) return;  // its time is not what others may spend
  const auto last = tokens.last(static_cast<size_t>(fresh));
  learn_from(shared, lookup_draft_, last);
  learn_from(shared, reference_draft_, last);
  learn_from(shared, mtp_draft_, last);
  control_.record_step(shared, drafted, fresh, others, draft_ns_);
}

void Speculator::propose(DraftExperience* shared, std::span<const int32_t> tokens, int64_t others,
                         int64_t room) {
  draft_ = {};
  draft_ns_ = 0;
  mtp_depth_ = 0;
  lookup_draft_.clear();
  reference_draft_.clear();
  mtp_draft_.clear();
  if (mode_ == SpeculationMode::kOff) return;
  const auto most = static_cast<int32_t>(std::clamp<int64_t>(room, 0, max_draft_));
  if (most == 0) return;
  if (reference_) reference_->propose(tokens.subspan(prompt_), most, &reference_draft_);
  if (lookup_) lookup_->propose(tokens, most, &lookup_draft_);
  if (mode_ == SpeculationMode::kAlways) {
    const bool sure = reference_draft_.confidence > 0 || lookup_draft_.confidence > 3;
    if (mtp_ && !sure) mtp_depth_ = std::min(most, kMaxMtpDepth);
    draft_ = reference_draft_.confidence > 0 ? reference_draft_.tokens : lookup_draft_.tokens;
    if (draft_.empty()) draft_ = reference_draft_.tokens;
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
  if (mtp_) propose_mtp(shared, others, most, best);
}

void Speculator::propose_mtp(DraftExperience* shared, int64_t others, int32_t most, double best) {
  const double plain = shared->costs.of(others + 1);
  for (int32_t depth = 1; depth <= std::min(most, kMaxMtpDepth); ++depth) {
    const double known = shared->mtp_ns[static_cast<size_t>(depth - 1)];
    const double ns = known > 0 ? known : kUnknownMtp * plain * depth;
    const DraftControl::Plan plan =
        control_.plan(shared, DraftSource::kMtp, kAnyProbability, depth, others, ns);
    if (plan.length == 0) break;  // each further guess costs as much and is right less often
    if (plan.length != depth || plan.speedup <= best) continue;
    const bool clear = plan.speedup >= kClearGain * std::max(best, 1.0);
    // A trial of one token now and then, as of any draft, so that its costs are known.
    if (!mtp_named_ && !clear && !(plan.trial && depth == 1)) continue;
    best = plan.speedup;
    mtp_depth_ = depth;
  }
}

void Speculator::mtp_drafted(const DraftExperience& shared, const MtpGuesses& guesses, double ns,
                             int64_t others) {
  mtp_depth_ = 0;
  if (guesses.count == 0) return;
  mtp_draft_.source = DraftSource::kMtp;
  mtp_draft_.confidence = kAnyProbability;
  draft_ns_ = ns;
  // What the draft cost is spent: what of it is worth a row? As long as each one's chance is.
  const double plain = shared.costs.of(others + 1);
  size_t length = 0;
  double right = 0, all = 1, speedup = 1;
  for (int32_t i = 0; i < guesses.count; ++i) {
    const ForwardModel::Guess& guess = guesses.guesses[static_cast<size_t>(i)];
    mtp_draft_.tokens.push_back(guess.token);
    mtp_probabilities_[static_cast<size_t>(i)] = guess.probability;
    all *= control_.chances(shared, DraftSource::kMtp, mtp_confidence(guess.probability)).first;
    right += all;
    const double wide = shared.costs.of(others + 2 + i);
    const double tasks = static_cast<double>(others) + 1;
    const double gain = wide > 0 ? (1 + right / tasks) * plain / wide : 0;
    if (gain <= speedup) continue;
    speedup = gain;
    length = static_cast<size_t>(i) + 1;
  }
  if (mode_ == SpeculationMode::kAlways) length = mtp_draft_.tokens.size();
  draft_ = std::span<const int32_t>(mtp_draft_.tokens).first(length);
}

}  // namespace dsv3
