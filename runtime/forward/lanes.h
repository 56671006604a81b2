// Steps of a small model that several sequences share, cut by sequences instead of by operations.
//
// The operations of a large model take each thread far longer than the threads need to meet before
// the next one. Those of a small one take microseconds, and a step has dozens of such meetings,
// each as long as a cache line needs to get from one core to another: several times as long where
// the cores share no L3. So here each thread takes some of the sequences through all layers by
// itself, in a lane of its own (one sequence in the only one). Lanes read the same weights, each
// for itself: this is for models whose weights lie in the caches.
//
// Which way is faster depends on the machine and changes with it (a virtual machine's CPUs move),
// so both are tried from time to time and measured. The bits are the same: no row's depend on
// others.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/base/status.h"
#include "runtime/experts/plan.h"
#include "runtime/forward/activations.h"
#include "runtime/forward/model.h"
#include "runtime/model/config.h"

namespace dsv3 {

// Chooses between two ways of doing the same, by how long they took for about as many rows.
class FasterWay {
 public:
  static constexpr int kFirst = 0, kSecond = 1;
  // One of so many choices is the other way, to see how long it takes by now.
  static constexpr int kLookEvery = 256;

  int choose(int32_t rows);
  void record(int32_t rows, int way, int64_t ns);

 private:
  struct Times {
    std::array<double, 2> ns_per_row = {};  // 0: not seen yet
    int choices = 0;
    int faster = kFirst;
  };
  Times& times_of(int32_t rows);
  std::array<Times, 16> times_;  // by the logarithm of the rows
};

class Lanes {
 public:
  // Rows of a lane, and of a sequence in one, at most: longer parts of prompts have operations
  // large enough for all threads.
  static constexpr int32_t kRows = 32;
  static constexpr int32_t kSequenceRows = 16;

  struct Lane {
    std::unique_ptr<kernels::Device> device;       // for one thread
    Activations a;                                 // this lane's rows of the step's
    RoutingPlan plan;                              //
    int32_t rows = 0;                              //
    std::vector<kernels::SequenceRows> sequences;  // row_begin counted from the lane's first row
    std::vector<uint64_t> load;                    // [layers, n_routed_experts]; zero between steps
  };

  // Makes lanes for a model and a device that they are for; else there are none. max_rows: of a
  // step. Lanes do not stop between layers, so theirs are no longer than one layer of such a step.
  Status create(kernels::Device* device, const ModelConfig& config, int32_t max_rows);
  // What create() would allocate.
  static uint64_t bytes(const kernels::Device& device, const ModelConfig& config, int threads);

  // Can the step be cut into lanes that are about as long as each other? Then they have their
  // sequences, and their rows of `a`.
  bool cut(const Step& step, const Activations& a);
  std::span<Lane> lanes() { return {lanes_.data(), in_use_}; }
  // The first way is to give every thread a part of each operation, the second these lanes.
  FasterWay& choice() { return choices_[in_use_ > 1 ? 1 : 0]; }

 private:
  void add(Lane* lane, const kernels::SequenceRows& sequence, int32_t first_row);

  const kernels::Device* device_ = nullptr;
  const ModelConfig* config_ = nullptr;
  double row_work_ = 0;    // of one layer, as attention_work()
  int64_t most_rows_ = 0;  // of one lane
  std::vector<Lane> lanes_;
  size_t in_use_ = 0;
  std::array<FasterWay, 2> choices_;  // one lane, several
};

}  // namespace dsv3
