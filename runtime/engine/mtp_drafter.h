// Drafts from the model's MTP module, for all tasks of a step that want one: after the step its
// hidden states and the tokens just sampled give the first guess; fed with its own hidden states,
// the one module guesses deeper.
//
// The module attends to the last kWindow slots before the answer and to what came since, not to the
// whole prompt: on tiny-coder, acceptance at depth 1 is 67.7 % with 64 slots of the prompt and
// 64.9 % with all of it (tests/bench/mtp_bench.cc), and prompts, cached or not, need not pass
// through the module at all. Its latents stand at the slots of tokens, in the MTP layer's part of
// the pages; they are never part of what another session relies on.
//
// The engine's thread only.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/base/status.h"
#include "runtime/forward/model.h"

namespace dsv3 {

inline constexpr int32_t kMaxMtpDepth = 3;

// What the module has seen of one task's sequence.
struct MtpState {
  int64_t first = 0, end = 0;  // slots [first, end) are filled
};

struct MtpGuesses {
  std::array<ForwardModel::Guess, kMaxMtpDepth> guesses;
  int32_t count = 0;
};

// One task's share: its step had rows at positions [begin, length - 1) of its sequence of `length`
// tokens, the last of them just sampled.
struct MtpShare {
  const int32_t* tokens = nullptr;                 // [length]
  const kernels::Dev<std::byte>* pages = nullptr;  // writable from slot length - 1 on, for `depth`
  int64_t begin = 0, length = 0;
  int32_t row_begin = 0;  // of the position `begin`, in the step
  int32_t depth = 0;      // 1 to kMaxMtpDepth
  MtpState* state = nullptr;
  MtpGuesses* out = nullptr;
};

class MtpDrafter {
 public:
  static constexpr int64_t kWindow = 64;

  MtpDrafter(ForwardModel* forward, size_t tasks);

  // Right after the step's ForwardModel::run(). Shares that find no room in the call are left
  // without guesses. On an error nobody has a draft.
  Status run(std::vector<MtpShare>* shares);

 private:
  void add(MtpShare* share);
  Status guess(std::vector<MtpShare>* shares, int32_t depth);

  ForwardModel* const forward_;
  // Of the next call of the module.
  std::vector<int32_t> tokens_, hidden_rows_;
  std::vector<kernels::SequenceRows> sequences_;
  std::vector<int64_t> first_keys_;
  std::vector<int32_t> last_rows_;  // by share: its last row in the last call, -1: none
  std::vector<int32_t> rows_;
  std::vector<ForwardModel::Guess> guesses_;
};

}  // namespace dsv3
