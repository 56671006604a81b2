// How fast a model runs here, measured against the machine's own limits in the same run: read
// bandwidth bounds decoding (every active weight is read once a step), multiply-adds bound prefill.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/machine.h"
#include "kernels/profile.h"
#include "runtime/base/status.h"
#include "runtime/engine/callback.h"
#include "runtime/model/model.h"

namespace dsv3 {

struct BenchmarkOptions {
  std::string kernels;  // "": the best this machine runs
  int32_t threads = 0;
  bool pin_threads = false;
  int32_t repeats = 5;       // of every line, at the least
  double least_seconds = 0;  // spent on a line's repeats, for many when they are short
  std::vector<int32_t> batches = {1, 4, 16};          // decode, context 0
  std::vector<int64_t> contexts = {4096, 16384};      // decode
  std::vector<int32_t> context_batches = {1, 4, 16};  // at each of them, distinct sequences
  std::vector<int32_t> prefills = {128, 512, 2048};   // tokens
  bool profile = false;  // one more repeat of every line, measured operation by operation
  // The first decode and the last prefill line on one thread as well, right after.
  bool scaling = false;
  // Every prompt in turns with attention in latent space and with keys and values expanded, which
  // is what bit-identical results forbid; and a prompt after this many tokens. 0: none.
  bool invariance = false;
  int64_t prefill_context = 16384;
  // A part of the labels of the lines to measure, beside the first token; "": all.
  std::string only;
  // Bytes that a line's latents may take; none: what of the machine's memory is left.
  std::optional<uint64_t> latent_room;
  std::function<bool(int done, int total)> progress;  // of lines; false cancels
  std::shared_ptr<CancelToken> cancel;                // asked between layers; may be null
};

// "decode, batch 16, context 4096"; "prefill 512"; "first token".
std::string line_label(const std::string& name, int32_t batch, int64_t context, int32_t tokens);

struct BenchmarkLine {
  // "decode", "prefill"; "first token": the first decoding step after opening, measured once, page
  // faults and all.
  std::string name;
  int32_t threads = 0;
  int32_t batch = 1;
  int64_t context = 0;
  int32_t tokens = 0;     // of one repeat
  bool expanded = false;  // keys and values of a prompt
  // Of a line that was measured in turns with the one before: how many times as fast as that one,
  // the median of the turns.
  double times_as_fast = 0;
  double seconds = 0;  // median of a repeat
  double fastest = 0, slowest = 0;
  double bytes = 0;         // of weights and latents that a repeat must read, at the least
  double weight_flops = 0;  // 2 * weights used * rows
  double attention_flops = 0;
  uint64_t page_faults = 0;  // of a first token
  // The machine's limits between this line's repeats, medians as the line itself is.
  double read_bytes_per_second = 0, dot_flops_per_second = 0;
  double bound_seconds = 0;  // what they allow a repeat: the larger of reading and computing
  const char* bound = "";    // "bandwidth" or "compute"
  // The same limits met by one operation after the other, as a step has to run them: those of few
  // rows wait for memory, those of many for arithmetic. Never less than bound_seconds.
  double operations_seconds = 0;
  // Of one repeat, where asked for; the clock of each operation is in it.
  std::vector<kernels::OperationProfile> profile;
  double profile_seconds = 0;  // of that repeat, what lies between the operations included
  double tokens_per_second() const { return tokens / seconds; }
  double percent_of_limit() const { return 100 * bound_seconds / seconds; }
  double percent_by_operation() const { return 100 * operations_seconds / seconds; }
};

// Was asked for and cannot be measured here.
struct LeftOutLine {
  std::string name;
  int32_t batch = 1;
  int64_t context = 0;
  int32_t tokens = 0;
  std::string reason;
};

struct BenchmarkResult {
  std::string kernels;
  int32_t threads = 0;
  kernels::MachineLimits limits;  // before the lines
  double limits_drift = 0;        // by what part some line's own limits differ from those: noise
  std::vector<BenchmarkLine> lines;
  std::vector<LeftOutLine> left_out;
  uint64_t resident_bytes = 0;            // what is mapped of a file included
  uint64_t resident_anonymous_bytes = 0;  // and not
};

// What one step reads of the weights, in bytes.
struct StepBytes {
  double every_row = 0;  // of all layers but routed experts; the head is apart
  double head = 0;
  double expert = 0;  // of one routed expert
};
StepBytes step_bytes(const Model& model);

Result<BenchmarkResult> run_benchmark(const std::shared_ptr<const Model>& model,
                                      const BenchmarkOptions& options);

}  // namespace dsv3
