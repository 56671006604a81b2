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

 private:
  // Buckets 1, 2, 3, 4, 6, 8, 12, 16, 24, ... rows.
  static constexpr int kBuckets = 18;
  static int bucket(int64_t rows);
  static int64_t rows_of(int bucket);
  struct Mean {
    double ns = 0;        // of the recorded steps
    double rows = 0;      // their mean number of rows
    double evidence = 0;  // recorded steps; those of other buckets take from it
  };
  std::array<Mean, kBuckets> means_;
  // How much a step cost, by what is known and what the line from `base` says.
  static double believed(const Mean& m, const Mean& base);
};

// How often drafts are right, by source and confidence class; decayed counts.
class DraftRates {
 public:
  DraftRates();
  // Of a draft's tokens `right` ones came, and then another than the next (`wrong`), or it ended.
  void record(DraftSource source, int64_t confidence, int32_t right, bool wrong);
  // The chance that a token is right when all before it were.
  double chance(DraftSource source, int64_t confidence) const;
  // The same chances, to be changed quickly by what is recorded next.
  DraftRates as_prior() const;

 private:
  struct Rate {
    double right = 0, seen = 0;
  };
  static size_t index(DraftSource source, int64_t confidence);
  std::array<Rate, kDraftSources * kConfidenceClasses> rates_;
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
  int32_t probe_after = 8;
};

// The drafts of one request, on an account that all requests of a context share and that keeps
// speculation from costing more than it brings: a draft is verified only while what its failure
// would cost, times the chance of that, is covered by what speculation has saved so far, plus
// kAllowance of the decoding time.
class DraftControl {
 public:
  static constexpr double kAllowance = 0.01;
  static constexpr double kFirstSteps = 2;  // plain steps of credit to begin with
  static constexpr double kMostSteps = 8;   // of credit that is kept
  static constexpr double kMostDebt = 2;    // steps that speculation can be behind
  // Where no length promises anything, short drafts are verified now and then all the same, first
  // after so many steps, then more and more seldom: rates and costs may have changed.
  static constexpr int32_t kFirstProbe = 8, kLastProbe = 256;

  struct Plan {
    int32_t length = 0;  // tokens of the draft to verify; 0: none
    double speedup = 1;  // expected, over decoding without it
    bool trial = false;  // it promises nothing: what was measured may have changed
  };
  // How much of a draft of `available` tokens to verify in a step that `others` other requests
  // share. draft_ns: what making the draft costs (0: it is there already).
  Plan plan(const DraftExperience& shared, DraftSource source, int64_t confidence,
            int32_t available, int64_t others, double draft_ns) const;

  // What became of a draft, see DraftRates. Drafts that were not verified count too: their first
  // token shows by itself.
  void record_draft(DraftExperience* shared, DraftSource source, int64_t confidence, int32_t right,
                    bool wrong);
  // A step committed `tokens` tokens after verifying `drafted` ones, beside `others` requests.
  void record_step(DraftExperience* shared, int32_t drafted, int32_t tokens, int64_t others,
                   double draft_ns);

  // The chance that a token of such a draft is right, by what is known.
  double chance(const DraftExperience& shared, DraftSource source, int64_t confidence) const {
    return (began_ ? rates_ : shared.rates).chance(source, confidence);
  }

  // Nanoseconds that speculation saved; negative when it cost.
  double saved_ns() const { return saved_ns_; }

 private:
  static constexpr int32_t kProbeLength = 2;
  static constexpr double kHopeless = 0.15;  // the acceptance below which nothing is tried

  DraftRates rates_;
  bool began_ = false;  // rates_ hold what the context has seen
  double saved_ns_ = 0;
  int32_t idle_steps_ = 0;  // since a draft was verified
};

}  // namespace dsv3
