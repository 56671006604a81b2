#include "runtime/engine/draft_control.h"

#include <algorithm>
#include <cmath>
#include <utility>

namespace dsv3 {
namespace {

// Weight of a new step's time. Steps are slower than they need to be more often than faster: what
// was measured as too slow would not be tried again.
constexpr double kSlower = 1.0 / 16, kFaster = 1.0 / 4;
// What a recorded step takes from the evidence of other widths, and how much evidence weighs as
// much as the line that they are held against.
constexpr double kForget = 1.0 / 256, kMostEvidence = 64, kLineWeight = 1;
constexpr double kSteady = 4;         // evidence from which on a mean's changes are the machine's
constexpr double kStale = 16;         // steps after which a mean goes with another's changes fully
constexpr double kCountDecay = 0.97;  // of what was seen before, per draft
// Where wider steps were not measured: each further row costs this fraction of the first one. A
// small model on a CPU pays a third to a half, a large one less.
constexpr double kUnknownRow = 0.5;
constexpr double kLeastRow = 0.5;   // of what narrower steps' rows cost
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
  if (b < kExact) return b + 1;
  const int64_t power = int64_t{kExact} << ((b - kExact + 1) / 2);  // 48, 64, 96, 128, ...
  return (b - kExact) % 2 == 0 ? power + power / 2 : power;
}

void StepCosts::record(int64_t rows, int64_t ns) {
  if (rows < 1 || ns <= 0) return;
  const double known = of(rows);
  auto time = static_cast<double>(ns);
  // A step that was interrupted by somebody else's work says little about its width.
  if (known > 0) time = std::min(time, known * 2);
  Mean& m = means_[static_cast<size_t>(bucket(rows))];
  const double before = m.ns;
  const bool steady = m.evidence >= kSteady && std::abs(m.rows - static_cast<double>(rows)) < 0.01;
  const double weight = std::max(time > m.ns ? kSlower : kFaster, 1.0 / (m.evidence + 1));
  m.ns += weight * (time - m.ns);
  m.rows += weight * (static_cast<double>(rows) - m.rows);
  m.evidence = std::min(m.evidence + 1, kMostEvidence);
  m.at = ++recorded_;
  // The machine became slower, or the contexts longer: for steps of all widths. As far as the mean
  // moved, which goes up and down again: differences of single times would add up, since they are
  // above the mean more often than below. What was measured itself a moment ago follows less: two
  // widths that are both measured all the time would keep the ratio they had in the beginning,
  // however wrong that was.
  const double moved = steady ? m.ns / before : 1;
  for (Mean& other : means_) {
    if (&other == &m) continue;
    const double age = static_cast<double>(recorded_ - other.at);
    other.ns *= 1 + (moved - 1) * std::min(1.0, age / kStale);
    other.evidence *= 1 - kForget;
  }
  make_points();
}

double StepCosts::believed(const Mean& m, const Mean& base) {
  const double row = base.ns / (1 + (base.rows - 1) * kUnknownRow);
  const double line = base.ns + (m.rows - base.rows) * kUnknownRow * row;
  if (m.ns <= line) return m.ns;
  return (m.evidence * m.ns + kLineWeight * line) / (m.evidence + kLineWeight);
}

void StepCosts::make_points() {
  known_ = 0;
  const Mean* base = nullptr;  // the narrowest known step is what the others are held against
  for (const Mean& m : means_) {
    if (m.ns == 0) continue;
    if (base == nullptr) base = &m;
    points_[static_cast<size_t>(known_++)] = {m.rows, &m == base ? m.ns : believed(m, *base)};
  }
}

double StepCosts::of(int64_t rows) const {
  if (known_ == 0) return 0;
  const auto wanted = static_cast<double>(rows);
  const Point* const begin = points_.data();
  const Point* const end = begin + known_;
  const Point* above = begin;
  while (above < end && above->rows <= wanted) ++above;
  const auto row = [](const Point& p) {
    return kUnknownRow * p.ns / (1 + (p.rows - 1) * kUnknownRow);
  };
  if (above == begin) return above->ns - (above->rows - wanted) * row(*above);
  const Point& below = above[-1];
  if (above == end) return below.ns + (wanted - below.rows) * row(below);
  return below.ns + (wanted - below.rows) / (above->rows - below.rows) * (above->ns - below.ns);
}

double StepCosts::least_row(int64_t rows) const {
  if (known_ == 0) return 0;
  const Point& narrow = points_[0];
  const double more = static_cast<double>(rows) - narrow.rows;
  return more >= 1 ? kLeastRow * std::max(0.0, of(rows) - narrow.ns) / more : 0;
}

DraftRates::DraftRates() {
  for (int s = 0; s < kDraftSources; ++s) {
    for (int c = 0; c < kConfidenceClasses; ++c) {
      Rates& r = rates_[static_cast<size_t>(s * kConfidenceClasses + c)];
      r.first = {kPriorWeight * kPriors[s][c], kPriorWeight};
    }
  }
}

size_t DraftRates::index(DraftSource source, int64_t confidence) {
  const int c = confidence_class(confidence);
  return static_cast<size_t>(static_cast<int>(source) * kConfidenceClasses + c);
}

void DraftRates::Rate::record(int32_t more_right, bool wrong) {
  right = right * kCountDecay + more_right;
  seen = seen * kCountDecay + more_right + (wrong ? 1 : 0);
}

void DraftRates::record(DraftSource source, int64_t confidence, int32_t right, bool wrong) {
  if (right == 0 && !wrong) return;
  Rates& r = rates_[index(source, confidence)];
  r.first.record(right > 0 ? 1 : 0, right == 0);
  if (right > 1 || (right == 1 && wrong)) r.next.record(right - 1, wrong);
}

DraftRates::Chances DraftRates::chances(DraftSource source, int64_t confidence) const {
  const Rates& r = rates_[index(source, confidence)];
  const double first = r.first.seen > 0 ? r.first.right / r.first.seen : 0;
  // Until more is known, as likely as the first ones.
  return {first, (r.next.right + kPriorWeight * first) / (r.next.seen + kPriorWeight)};
}

DraftRates DraftRates::as_prior() const {
  DraftRates out = *this;
  for (Rates& rates : out.rates_) {
    for (Rate* r : {&rates.first, &rates.next}) {
      const double scale = r->seen > kPriorWeight ? kPriorWeight / r->seen : 1;
      r->right *= scale;
      r->seen *= scale;
    }
  }
  return out;
}

DraftControl::Plan DraftControl::plan(DraftExperience* shared, DraftSource source,
                                      int64_t confidence, int32_t available, int64_t others,
                                      double draft_ns) const {
  Plan best;
  const StepCosts& costs = shared->costs;
  const double plain = costs.of(others + 1);
  if (plain <= 0 || source == DraftSource::kNone) return best;
  const DraftRates::Chances chances = this->chances(*shared, source, confidence);
  const double credit = shared->began ? shared->credit_ns : kFirstSteps * plain;
  double right = 0, all = 1;  // expected right tokens; chance that all so far are
  int32_t length = 0;
  const double tasks = static_cast<double>(others) + 1;
  const double least_gain = kSharedGain - (kSharedGain - 1) / tasks;
  const double least_row = costs.least_row(others + 1);
  const auto consider = [&] {
    const double price =
        std::max(costs.of(others + 1 + length) - plain, length * least_row) + draft_ns;
    // The loss if the first token is wrong, as likely as that is.
    if (price * (1 - chances.first) > credit) return;
    // The step makes a token for every task; more for this one is no more than that.
    if (right / tasks * plain < least_gain * price) return;
    const double speedup = (1 + right / tasks) * plain / (plain + price);
    if (speedup > best.speedup) best = {length, speedup, /*trial=*/false};
  };
  for (const int32_t wanted : kLengths) {
    const int32_t until = std::min(wanted, available);
    if (until <= length) break;
    while (length < until) {
      all *= length == 0 ? chances.first : chances.next;
      right += all;
      ++length;
    }
    consider();
  }
  const double measure_after = best.speedup < kClearSpeedup ? kMeasureAfter : kMeasureClearAfter;
  if (shared->since_plain >= measure_after) return {};
  const int32_t probe = std::min(kProbeLength, available);
  if (best.length == 0 && probe > 0 && shared->idle_steps >= shared->probe_after &&
      chances.first > kHopeless && costs.of(others + 1 + probe) + draft_ns - plain <= credit) {
    best.length = probe;
    best.trial = true;
    shared->idle_steps = 0;  // the others of this step need not try too
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
  DraftExperience::Committed& step = shared->committed;
  ++step.asked;
  step.drafted += drafted;
  step.more += tokens - 1;
  step.draft_ns += draft_ns;
  const double plain = shared->costs.of(others + 1);
  if (drafted == 0 && draft_ns == 0) return;
  const double tasks = static_cast<double>(others) + 1;
  const double wide = shared->costs.of(others + 1 + drafted) + draft_ns;
  saved_ns_ += (1 + (tokens - 1) / tasks) * plain - wide;
}

void DraftExperience::end_step(int64_t tasks, int64_t rows, int64_t ns) {
  const Committed step = std::exchange(committed, {});
  ns -= step.hook_ns;
  const double plain = costs.of(tasks), wide = costs.of(rows);
  costs.record(rows, ns);
  if (plain <= 0 || step.asked == 0) return;
  if (!began) credit_ns = DraftControl::kFirstSteps * plain;
  began = true;
  const double share = static_cast<double>(step.asked) / static_cast<double>(tasks);
  credit_ns += DraftControl::kAllowance * plain * share;
  if (step.drafted > 0 || step.draft_ns > 0) {
    // A step that was interrupted by somebody else's work says little.
    const double took = std::min(static_cast<double>(ns), wide * 2) + step.draft_ns;
    const double more = static_cast<double>(step.more) / static_cast<double>(tasks);
    const double saved = (1 + more) * plain - took;
    credit_ns += saved;
    idle_steps = 0;
    ++since_plain;
    probe_after =
        saved > 0 ? DraftControl::kFirstProbe : std::min(2 * probe_after, DraftControl::kLastProbe);
  } else {
    ++idle_steps;
    since_plain = 0;
  }
  credit_ns =
      std::clamp(credit_ns, -DraftControl::kMostDebt * plain, DraftControl::kMostSteps * plain);
}

}  // namespace dsv3
