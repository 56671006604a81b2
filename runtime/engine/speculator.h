// Speculation of one request: which drafter's guess of the next tokens the next step verifies, and
// how much of it. The request (request.cc) accepts a token if and only if it is the position's own
// sample, so that nothing here changes what is generated.
//
// The engine's thread only; allocates nothing after it was made.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <vector>

#include "runtime/engine/draft.h"
#include "runtime/engine/draft_control.h"
#include "runtime/engine/draft_lookup.h"
#include "runtime/engine/draft_reference.h"
#include "runtime/engine/mtp_drafter.h"

namespace dsv3 {

// The numbers are those of dsv3.h.
enum class SpeculationMode : int32_t {
  kAuto = 0,    // as much as pays, by measured acceptance and measured step times
  kOff = 1,     //
  kAlways = 2,  // whatever there is to draft, whether it pays or not
};

struct SpeculationOptions {
  SpeculationMode mode = SpeculationMode::kAuto;
  bool lookup = true;  // drafts from the session's own text
  bool mtp = true;     // drafts from the model's MTP module, if it has one
  // It was asked for by name: a model without one is refused, and it drafts wherever it may pay.
  // Otherwise only where it pays clearly, and never in kAlways.
  bool require_mtp = false;
  int32_t max_draft = 0;           // tokens of one draft; 0: kMaxDraft
  std::vector<int32_t> reference;  // what the answer mostly copies; empty: nothing
};

class Speculator {
 public:
  // expected: tokens of the session at the answer's end, about; has_mtp: the model has a module.
  Speculator(const SpeculationOptions& options, int64_t expected, bool has_mtp);
  // Tokens of the session before the answer.
  void begin(size_t prompt) { prompt_ = prompt; }

  // A step committed the last `fresh` of `tokens` (the whole session) after verifying `drafted`
  // rows of the draft, beside `others` other tasks.
  void learn(DraftExperience* shared, std::span<const int32_t> tokens, int32_t fresh,
             int32_t drafted, int64_t others);
  // Makes the draft for the next step, of at most `room` tokens, or asks for one by mtp_depth().
  void propose(DraftExperience* shared, std::span<const int32_t> tokens, int64_t others,
               int64_t room);
  std::span<const int32_t> draft() const { return draft_; }
  // How deep the MTP module should draft; then mtp_drafted() gives what it did, in `ns`. Until then
  // (and if it fails) there is another drafter's draft, or none.
  int32_t mtp_depth() const { return mtp_depth_; }
  MtpState* mtp_state() { return &mtp_state_; }
  void mtp_drafted(const DraftExperience& shared, const MtpGuesses& guesses, double ns,
                   int64_t others);

  // Nanoseconds that it saved, by measured step times; negative: that it cost.
  double saved_ns() const { return control_.saved_ns(); }

 private:
  void propose_mtp(DraftExperience* shared, int64_t others, int32_t most, double best);
  void learn_from(DraftExperience* shared, const Draft& draft, std::span<const int32_t> fresh);

  const SpeculationMode mode_;
  const int32_t max_draft_;
  const bool mtp_, mtp_named_;
  size_t prompt_ = 0;
  std::optional<PromptLookup> lookup_;
  std::optional<ReferenceText> reference_;
  DraftControl control_;
  Draft lookup_draft_, reference_draft_;  // proposed last, verified or not
  Draft mtp_draft_;
  std::array<float, kMaxMtpDepth> mtp_probabilities_ = {};
  MtpState mtp_state_;
  int32_t mtp_depth_ = 0;
  double draft_ns_ = 0;             // what the draft that is to be verified cost
  std::span<const int32_t> draft_;  // the part of one of them that is to be verified
};

}  // namespace dsv3
