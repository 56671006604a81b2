// The forward pass of one context: weights bound to its device, activations, and run(), which takes
// a batch of tokens through all layers. Decides nothing about requests; the engine plans steps and
// owns the pages.
//
// Used by one thread at a time (the engine's).
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/base/status.h"
#include "runtime/model/model.h"

namespace dsv3 {

// One step: rows of one or several sequences. Pages of every row's position must be writable.
struct Step {
  std::span<const int32_t> tokens;                   // [rows], valid ids
  std::span<const kernels::SequenceRows> sequences;  // cover the rows in order
  // Asked between layers (and before the first); true ends the step with kCancelled. Latents that
  // were written by then stand at positions nobody counts as computed yet.
  bool (*should_stop)(void*) = nullptr;
  void* should_stop_user = nullptr;
  // Goes on with what copy_residual() gave when a step of the same rows had stopped before this
  // layer, with the latents of the layers before in the same places. [rows, hidden], host.
  int64_t first_layer = 0;
  const float* residual = nullptr;
};

// Rows of the MTP module for one or several sequences: a row at slot p combines the embedding of
// token p with the hidden state of position p - 1, stores its latent at slot p, and predicts token
// p + 1.
struct MtpStep {
  std::span<const int32_t> tokens;                   // [rows] the token at each row's slot
  std::span<const kernels::SequenceRows> sequences;  // slots, from 1 on; their pages writable
  // [rows] whose hidden state each row takes: rows of the last run(), or when `chained` of the last
  // run_mtp(), which then stands for the main model's (drafting deeper with the one module).
  std::span<const int32_t> hidden_rows;
  bool chained = false;
  // The hidden state before its norm (the final one; for chained rows shared_head.norm), not after.
  bool before_norm = false;
  // [sequences] the first slot each of them has filled: slots before it are not attended to.
  std::span<const int64_t> first_keys;
};

class ForwardModel {
 public:
  // Binds the weights to the device and sizes everything for steps of up to `max_rows` rows and
  // head calls of up to `max_head_rows`. expand: steps may have SequenceRows::may_expand. The
  // device must outlive the object.
  static Result<std::unique_ptr<ForwardModel>> create(std::shared_ptr<const Model> model,
                                                      kernels::Device* device, int32_t max_rows,
                                                      int32_t max_head_rows, bool expand = false);
  ~ForwardModel();
  ForwardModel(const ForwardModel&) = delete;

  // Bytes of a latent page for all layers, MTP modules included (PagePool's page_bytes).
  size_t page_bytes() const;
  int32_t max_rows() const;
  int32_t max_head_rows() const;
  // Bytes of activations and scratch that create() would allocate on such a device with so many
  // threads, for estimates.
  static uint64_t scratch_bytes(const ModelConfig& config, const kernels::Device& device,
                                int threads, int32_t max_rows, int32_t max_head_rows, bool expand);

  // Runs the main layers and the final norm over the step's rows.
  Status run(const Step& step);
  // In how many lanes the last run() went (lanes.h); 0: every thread had a part of each operation.
  int lanes() const;
  // After a run() that stopped: before which layer, and the residual stream of its first `rows`
  // rows there, to the host [rows, hidden].
  int64_t stopped_before() const;
  void copy_residual(int32_t rows, float* out);
  // Hidden states after the final norm of rows [begin, begin + count) of the last run, to the host.
  void copy_hidden(int32_t begin, int32_t count, float* out);  // [count, hidden]
  // Logits of some rows of the last run (or run_mtp), copied to host [rows, vocab]; at most
  // max_head_rows rows. kNumeric names the first row whose logits are not finite.
  Status head(std::span<const int32_t> rows, float* out);
  // The same, but the logits stay on the device until somebody asks for them (and until the next
  // call that makes any): a greedy choice needs what is known of the row, and no more. `index`
  // counts the rows of the call.
  Status compute_head(std::span<const int32_t> rows);
  const kernels::RowStats& logits_row(int32_t index) const;
  void copy_logits(int32_t index, float* out);  // [vocab]

  // Runs MTP module 0 over the rows of the last run (same step, one sequence). Row r at position p
  // combines the embedding of token p with the hidden state of position p - 1: of row r - 1, or
  // `previous_hidden` [hidden] for the first row (null when its position is 0: that row is left
  // out). Latents are stored at slot p. Afterwards mtp_head gives logits that predict token p + 1.
  Status run_mtp(const Step& step, const float* previous_hidden);
  Status mtp_head(std::span<const int32_t> rows, float* out);

  // The same for drafts. Right after run(), whose rows it takes (or after another such call).
  Status run_mtp(const MtpStep& step);
  struct Guess {
    int32_t token = 0;
    float probability = 0;
  };
  // The best token after each of some rows of the last run_mtp, at most max_head_rows.
  Status mtp_guess(std::span<const int32_t> rows, Guess* out);

  // How often each routed expert was chosen since the start, [layers, n_routed_experts].
  const std::vector<uint64_t>& expert_load() const;

 private:
  struct Impl;
  explicit ForwardModel(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsv3
