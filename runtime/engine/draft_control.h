// How long a draft may be: speculation has to pay. What a step of so many rows costs is measured
// per context, how often drafts are right per request, beginning with what the context's requests
// have seen. Times decide how much is drafted, never what is generated.
//
// Used by the engine's thread.
#pragma once

#include <array>
#include <cstdint>

#include "runtime/engine/draft.h"

namespace dsv3 {

// Nanoseconds that steps of decoding rows take, by their number of rows: a decayed mean where it
// was measured, straight lines between, and a cautious line beyond.
//
// What was measured long ago counts for less and less where it speaks against wide steps: their
// price then comes down to what the cautious line says, so that they are tried again. Without that
// one slow step, or times that drifted, would be believed for ever, since what looks too dear is
// never measured.
class StepCosts {
 public:
  void record(int64_t rows, int64_t ns);
  // 0 until anything was measured.
  double of(int64_t rows) const;
  // The least that one further row of a step of `rows` can be believed to cost: half of what those
  // from the narrowest known step on cost in the mean. 0 where nothing narrower is known. The
  // difference of two neighbours is the difference of two noisy means, and of many such
  // differences the one that looks cheapest is the one that gets believed.
  double least_row(int64_t rows) const;

 private:
  // Each number of rows up to kExact has a bucket: what a step costs whose requests do not draft is
  // what all else is held against. Then 48, 64, 96, ... rows.
  static constexpr int kExact = 32, kBuckets = kExact + 10;
  static int bucket(int64_t rows);
  static int64_t rows_of(int bucket);
  struct Mean {
    double ns = 0;        // of the recorded steps
    double rows = 0;      // their mean number of rows
    double evidence = 0;  // recorded steps; those of other buckets take from it
    int64_t at = 0;       // of all recorded steps, the number of its last one
  };
  std::array<Mean, kBuckets> means_;
  int64_t recorded_ = 0;
  // What of() goes by, made by record(): it is asked a dozen times for every request and step.
  struct Point {
    double rows = 0, ns = 0;
  };
  std::array<Point, kBuckets> points_;
  int known_ = 0;  // points, by ascending rows
  void make_points();
  // How much a step cost, by what is known and what the line from `base` says.
  static double believed(const Mean& m, const Mean& base);
};

// How often drafts are right, by source and confidence class; decayed counts. First tokens are
// counted for themselves: once one is right, the next ones mostly are, and a few long runs made
// first tokens look better than they are.
class DraftRates {
 public:
  struct Chances {
    double first = 0;  // that a draft's first token is right
    double next = 0;   // that a later one is when all before it were
  };
  DraftRates();
  // Of a draft's tokens `right` ones came, and then another than the next (`wrong`), or it ended.
  void record(DraftSource source, int64_t confidence, int32_t right, bool wrong);
  Chances chances(DraftSource source, int64_t confidence) const;
  // The same chances, to be changed quickly by what is recorded next.
  DraftRates as_prior() const;

 private:
  struct Rate {
    double right = 0, seen = 0;
    void record(int32_t more_right, bool wrong);
  };
  struct Rates {
    Rate first, next;
  };
  static size_t index(DraftSource source, int64_t confidence);
  std::array<Rates, kDraftSources * kConfidenceClasses> rates_;
};

// What the requests of one context share.
struct DraftExperience {
  StepCosts costs;
  DraftRates rates;
  // What drafting to depth 1, 2, 3 with the MTP module costs one request; 0: not measured yet.
  std::array<double, 3> mtp_ns = {};
  double credit_ns = 0;  // see DraftControl
  bool began = false;    // a step was measured
  // Steps without a draft after which one is tried that promises nothing; grows with each failure.
  // Of the context: requests that share their steps would otherwise all try in the same one.
  int32_t probe_after = 8;
  double idle_steps = 0;
  double since_plain = 0;  // steps with drafts since one without

  // A step of `tasks` requests and `rows` rows took so long, drafts by DraftControl::record_step()
  // included: it is paid for with what it really took. By what such a step was thought to cost,
  // drafts among many were paid again and again out of an error of a few per cent. The callers'
  // logits hooks are taken out: one comes for every token, however many tokens come at once.
  void end_step(int64_t tasks, int64_t rows, int64_t ns);

  // Of the step that is being committed.
  struct Committed {
    int64_t asked = 0;    // requests that may draft
    int64_t drafted = 0;  // rows
    int64_t more = 0;     // tokens beyond each request's one
    double draft_ns = 0;
    int64_t hook_ns = 0;  // in the requests' logits hooks
  };
  Committed committed;
};

// The drafts of one request, on an account that all requests of a context share and that keeps
// speculation from costing more than it brings: a draft is verified only while what its failure
// would cost, times the chance of that, is covered by what speculation has saved so far, plus
// kAllowance of the decoding time.
class DraftControl {
 public:
  static constexpr double kAllowance = 0.01;
  static constexpr double kFirstSteps = 2;  // plain steps of credit to begin with
  static constexpr double kMostSteps = 4;   // of credit that is kept
  static constexpr double kMostDebt = 2;    // steps that speculation can be behind
  // Where no length promises anything, short drafts are verified now and then all the same, first
  // after so many steps, then more and more seldom: rates and costs may have changed.
  static constexpr int32_t kFirstProbe = 8, kLastProbe = 256;
  // What a draft brings is held against steps without one. Where it is not much, one of them is
  // taken after so many with drafts: the machine may have become faster or slower since.
  // Where it looks like much, that may be for costs that are out of date: later, but also.
  static constexpr double kMeasureAfter = 24, kMeasureClearAfter = 96, kClearSpeedup = 1.5;

  struct Plan {
    int32_t length = 0;  // tokens of the draft to verify; 0: none
    double speedup = 1;  // expected, over decoding without it
    bool trial = false;  // it promises nothing: what was measured may have changed
  };
  // Gain over price, of a draft in a step that very many share: there a token is worth little of a
  // step, while the price is still the difference of two measured times, and requests that get on
  // unevenly end in narrower steps. Alone any gain will do.
  static constexpr double kSharedGain = 1.5;
  // How much of a draft of `available` tokens to verify in a step that `others` other requests
  // share. draft_ns: what making the draft costs (0: it is there already).
  Plan plan(DraftExperience* shared, DraftSource source, int64_t confidence, int32_t available,
            int64_t others, double draft_ns) const;

  // What became of a draft, see DraftRates. Drafts that were not verified count too: their first
  // token shows by itself.
  void record_draft(DraftExperience* shared, DraftSource source, int64_t confidence, int32_t right,
                    bool wrong);
  // A step committed `tokens` tokens after verifying `drafted` ones, beside `others` requests; then
  // comes DraftExperience::end_step().
  void record_step(DraftExperience* shared, int32_t drafted, int32_t tokens, int64_t others,
                   double draft_ns);

  // The chances that tokens of such a draft are right, by what is known.
  DraftRates::Chances chances(const DraftExperience& shared, DraftSource source,
                              int64_t confidence) const {
    return (began_ ? rates_ : shared.rates).chances(source, confidence);
  }

  // Nanoseconds that speculation saved; negative when it cost.
  double saved_ns() const { return saved_ns_; }

 private:
  static constexpr int32_t kProbeLength = 2;
  static constexpr double kHopeless = 0.15;  // the acceptance below which nothing is tried

  DraftRates rates_;
  bool began_ = false;  // rates_ hold what the context has seen
  double saved_ns_ = 0;
};

}  // namespace dsv3
