#include "runtime/engine/draft_control.h"

#include <algorithm>
#include <cmath>

namespace dsv3 {
namespace {

// Weight of a new step's time. Steps are slower than they need to be more often than faster: what
// was measured as too slow would not be tried again.
constexpr double kSlower = 1.0 / 16, kFaster = 1.0 / 4;
constexpr double kTogether = 1.0 / 32;  // of what it says about steps of other widths
constexpr double kCountDecay = 0.97;    // of what was seen before, per draft
// Where wider steps were not measured: each further row costs this fraction of the first one. A
// small model on a CPU pays a third to a half, a large one less.
constexpr double kUnknownRow = 0.5;
constexpr double kPriorWeight = 6;  // drafts that the first guess of a rate counts for
constexpr std::array<int32_t, 13> kLengths = {1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64};

// First guesses by source and confidence class.
constexpr double kPriors[kDraftSources][kConfidenceClasses] = {
    {0, 0, 0, 0, 0, 0},
    {0.5, 0.7, 0.9, 0.95, 0.97, 0.98},  // reference: tokens that agreed
    {0.2, 0.2, 0.4, 0.6, 0.75, 0.9},    // lookup: the match's length
    {0.3, 0.5, 0.65, 0.8, 0.9, 0.7},    // MTP: by its own probability; all
};

}  // namespace

int StepCosts::bucket(int64_t rows) {
  int b = 0;
  while (b + 1 < kBuckets && rows_of(b + 1) <= rows) ++b;
  return b;
}

int64_t StepCosts::rows_of(int b) {
  if (b < 4) return b + 1;
  const int64_t power = int64_t{4} << ((b - 3) / 2);  // 4, then 6, 8, 12, 16, 24, ...
  return (b - 3) % 2 == 0 ? power : power + power / 2;
}

void StepCosts::record(int64_t rows, int64_t ns) {
  if (rows < 1 || ns <= 0) return;
  const double known = of(rows);
  auto time = static_cast<double>(ns);
  // A step that was interrupted by somebody else's work says little about its width.
  if (known > 0) time = std::min(time, known * 2);
  const auto own = static_cast<size_t>(bucket(rows));
  if (known > 0) {
    // The machine became slower, or the contexts longer: for steps of all widths.
    const double factor = 1 + kTogether * (time / known - 1);
    for (size_t i = 0; i < means_.size(); ++i) {
      if (i != own) means_[i].ns *= factor;
    }
  }
  Mean& m = means_[own];
  const double weight = std::max(time > m.ns ? kSlower : kFaster, 1.0 / (m.count + 1));
  m.ns += weight * (time - m.ns);
  m.rows += weight * (static_cast<double>(rows) - m.rows);
  m.count = std::min(m.count + 1, 1 << 20);
}

double StepCosts::of(int64_t rows) const {
  const auto wanted = static_cast<double>(rows);
  const Mean* below = nullptr;
  const Mean* above = nullptr;
  for (const Mean& m : means_) {
    if (m.count == 0) continue;
    if (m.rows <= wanted) {
      below = &m;
    } else if (above == nullptr) {
      above = &m;
    }
  }
  if (below == nullptr && above == nullptr) return 0;
  if (below == nullptr) {  // narrower than anything known
    const double row = above->ns / (1 + (above->rows - 1) * kUnknownRow);
    return row * (1 + (wanted - 1) * kUnknownRow);
  }
  if (above == nullptr) {
    if (below->rows == wanted) return below->ns;
    const double row = below->ns / (1 + (below->rows - 1) * kUnknownRow);
    return below->ns + (wanted - below->rows) * kUnknownRow * row;
  }
  const double along = (wanted - below->rows) / (above->rows - below->rows);
  return below->ns + along * (above->ns - below->ns);
}

DraftRates::DraftRates() {
  for (int s = 0; s < kDraftSources; ++s) {
    for (int c = 0; c < kConfidenceClasses; ++c) {
      rates_[static_cast<size_t>(s * kConfidenceClasses + c)] = {kPriorWeight * kPriors[s][c],
                                                                 kPriorWeight};
    }
  }
}

size_t DraftRates::index(DraftSource source, int64_t confidence) {
  const int c = confidence_class(confidence);
  return static_cast<size_t>(static_cast<int>(source) * kConfidenceClasses + c);
}

void DraftRates::record(DraftSource source, int64_t confidence, int32_t right, bool wrong) {
  Rate& r = rates_[index(source, confidence)];
  r.right = r.right * kCountDecay + right;
  r.seen = r.seen * kCountDecay + right + (wrong ? 1 : 0);
}

double DraftRates::chance(DraftSource source, int64_t confidence) const {
  const Rate& r = rates_[index(source, confidence)];
  return r.seen > 0 ? r.right / r.seen : 0;
}

DraftRates DraftRates::as_prior() const {
  DraftRates out = *this;
  for (Rate& r : out.rates_) {
    const double scale = r.seen > kPriorWeight ? kPriorWeight / r.seen : 1;
    r.right *= scale;
    r.seen *= scale;
  }
  return out;
}

DraftControl::Plan DraftControl::plan(const DraftExperience& shared, DraftSource source,
                                      int64_t confidence, int32_t available, int64_t others,
                                      double draft_ns) const {
  Plan best;
  const StepCosts& costs = shared.costs;
  const double plain = costs.of(others + 1);
  if (plain <= 0 || source == DraftSource::kNone) return best;
  const double chance = this->chance(shared, source, confidence);
  const double credit = shared.began ? shared.credit_ns : kFirstSteps * plain;
  double right = 0, all = 1;  // expected right tokens; chance that all so far are
  int32_t length = 0;
  const double tasks = static_cast<double>(others) + 1;
  const auto consider = [&] {
    const double wide = costs.of(others + 1 + length) + draft_ns;
    // The loss if the first token is wrong, as likely as that is.
    if ((wide - plain) * (1 - chance) > credit) return;
    // The step makes a token for every task; more for this one is no more than that.
    const double speedup = (1 + right / tasks) * plain / wide;
    if (speedup > best.speedup) best = {length, speedup};
  };
  for (const int32_t wanted : kLengths) {
    const int32_t until = std::min(wanted, available);
    if (until <= length) break;
    while (length < until) {
      all *= chance;
      right += all;
      ++length;
    }
    consider();
  }
  const int32_t probe = std::min(kProbeLength, available);
  if (best.length == 0 && probe > 0 && idle_steps_ >= shared.probe_after && chance > kHopeless &&
      costs.of(others + 1 + probe) + draft_ns - plain <= credit) {
    best.length = probe;
  }
  return best;
}

void DraftControl::record_draft(DraftExperience* shared, DraftSource source, int64_t confidence,
                                int32_t right, bool wrong) {
  if (source == DraftSource::kNone) return;
  if (!began_) rates_ = shared->rates.as_prior();
  began_ = true;
  rates_.record(source, confidence, right, wrong);
  shared->rates.record(source, confidence, right, wrong);
}

void DraftControl::record_step(DraftExperience* shared, int32_t drafted, int32_t tokens,
                               int64_t others, double draft_ns) {
  const double plain = shared->costs.of(others + 1);
  if (plain <= 0) return;
  double& credit = shared->credit_ns;
  if (!shared->began) credit = kFirstSteps * plain;
  shared->began = true;
  // The time of a step is everybody's in it.
  const double tasks = static_cast<double>(others) + 1;
  credit += kAllowance * plain / tasks;
  if (drafted > 0 || draft_ns > 0) {
    const double wide = shared->costs.of(others + 1 + drafted) + draft_ns;
    const double saved = (1 + (tokens - 1) / tasks) * plain - wide;
    saved_ns_ += saved;
    credit += saved;
    idle_steps_ = 0;
    shared->probe_after = saved > 0 ? kFirstProbe : std::min(2 * shared->probe_after, kLastProbe);
  } else {
    ++idle_steps_;
  }
  credit = std::clamp(credit, -kMostDebt * plain, kMostSteps * plain);
}

}  // namespace dsv3
