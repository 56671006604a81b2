#include "runtime/engine/mtp_drafter.h"

#include <algorithm>

namespace dsv3 {

MtpDrafter::MtpDrafter(ForwardModel* forward, size_t tasks) : forward_(forward) {
  tokens_.reserve(static_cast<size_t>(forward->max_rows()));
  hidden_rows_.reserve(static_cast<size_t>(forward->max_rows()));
  sequences_.reserve(tasks);
  first_keys_.reserve(tasks);
  last_rows_.reserve(tasks);
  rows_.reserve(static_cast<size_t>(forward->max_head_rows()));
  guesses_.resize(static_cast<size_t>(forward->max_head_rows()));
}

// The share's slots whose hidden states the step has, the sampled token's last.
void MtpDrafter::add(MtpShare* share) {
  MtpState& state = *share->state;
  int64_t first = share->begin + 1;
  if (state.end != first) {  // not where it left off: it begins anew
    first = std::max(first, share->length - kWindow);
    state.first = first;
  }
  const int64_t count = share->length - first;
  const auto row = static_cast<int32_t>(tokens_.size());
  if (row + count > forward_->max_rows()) {
    last_rows_.push_back(-1);
    return;
  }
  sequences_.push_back({row, static_cast<int32_t>(count), first, share->pages});
  first_keys_.push_back(state.first);
  for (int64_t slot = first; slot < share->length; ++slot) {
    tokens_.push_back(share->tokens[slot]);
    hidden_rows_.push_back(share->row_begin + static_cast<int32_t>(slot - 1 - share->begin));
  }
  last_rows_.push_back(row + static_cast<int32_t>(count) - 1);
  state.end = share->length;
}

// The best tokens after the shares' last rows, to shares that draft so deep.
Status MtpDrafter::guess(std::vector<MtpShare>* shares, int32_t depth) {
  const auto most = static_cast<size_t>(forward_->max_head_rows());
  for (size_t i = 0; i < shares->size();) {
    rows_.clear();
    size_t end = i;
    for (; end < shares->size() && rows_.size() < most; ++end) {
      if (last_rows_[end] >= 0 && (*shares)[end].depth > depth) rows_.push_back(last_rows_[end]);
    }
    if (!rows_.empty()) DSV3_TRY(forward_->mtp_guess(rows_, guesses_.data()));
    size_t next = 0;
    for (; i < end; ++i) {
      const MtpShare& share = (*shares)[i];
      if (last_rows_[i] < 0 || share.depth <= depth) continue;
      share.out->guesses[static_cast<size_t>(share.out->count++)] = guesses_[next++];
    }
  }
  return {};
}

Status MtpDrafter::run(std::vector<MtpShare>* shares) {
  last_rows_.clear();
  int32_t deepest = 0;
  for (const MtpShare& share : *shares) deepest = std::max(deepest, share.depth);
  for (int32_t depth = 0; depth < deepest; ++depth) {
    tokens_.clear();
    hidden_rows_.clear();
    sequences_.clear();
    first_keys_.clear();
    for (size_t i = 0; i < shares->size(); ++i) {
      MtpShare& share = (*shares)[i];
      if (depth == 0) {
        share.out->count = 0;
        add(&share);
        continue;
      }
      if (last_rows_[i] < 0 || share.depth <= depth) continue;
      // The guess takes the place of a token, and the module's hidden state that of the model's.
      const auto row = static_cast<int32_t>(tokens_.size());
      sequences_.push_back({row, 1, share.length - 1 + depth, share.pages});
      first_keys_.push_back(share.state->first);
      tokens_.push_back(share.out->guesses[static_cast<size_t>(depth - 1)].token);
      hidden_rows_.push_back(last_rows_[i]);
      last_rows_[i] = row;
    }
    if (tokens_.empty()) break;
    MtpStep step;
    step.tokens = tokens_;
    step.sequences = sequences_;
    step.hidden_rows = hidden_rows_;
    step.chained = depth > 0;
    step.first_keys = first_keys_;
    DSV3_TRY(forward_->run_mtp(step));
    DSV3_TRY(guess(shares, depth));
  }
  return {};
}

}  // namespace dsv3
