// The CPU device: the drivers shared by all CPU kernel sets. They cut operations into tasks for the
// pool and call the micro-kernels of the chosen instruction set. linear.cc, ffn.cc,
// attention*.cc and small_ops.cc hold one operation family each.
//
// Which thread computes what, how rows are grouped and where tasks are cut never changes a bit of
// the result: every output element is one micro-kernel's chain of additions, the same for a row
// alone and among others.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels/cpu/micro.h"
#include "kernels/cpu/pool.h"
#include "kernels/host_device.h"
#include "runtime/base/alloc.h"

namespace dsv3::kernels {

class CpuDevice final : public HostDevice {
 public:
  static Result<std::unique_ptr<Device>> create(const Micro* micro, int threads, bool pin);

  const char* name() const override { return micro_->name; }
  int threads() const override { return pool_->threads(); }
  int threads_in_use() const override { return pool_->threads_in_use(); }
  Result<std::unique_ptr<Device>> make_lane() const override { return create(micro_, 1, false); }
  Status reserve(const Limits& limits) override;
  uint64_t scratch_bytes(const Limits& limits, int threads) const override;
  size_t latent_page_bytes(const MlaShape& shape) const override;

  void embed(const Matrix& table, std::span<const int32_t> ids, Dev<float> out,
             int64_t out_stride) override;
  void rms_norm(Dev<const float> x, int64_t x_stride, Dev<const float> gamma, float eps,
                int32_t rows, int32_t dim, Dev<float> out, int64_t out_stride) override;
  void linear(std::span<const LinearArgs> layers) override;
  void rope_append(const RopeAppendArgs& args) override;
  void mla_attention(const MlaAttentionArgs& args) override;
  void route(const RouteArgs& args) override;
  void moe_ffn(const FfnArgs& args) override;
  void add(Dev<float> y, Dev<const float> x, size_t count) override;
  void gather_rows(Dev<const float> x, int64_t x_stride, std::span<const int32_t> rows, int32_t dim,
                   Dev<float> out, int64_t out_stride) override;
  void reduce_logits(Dev<const float> logits, int64_t stride, int32_t rows, int32_t vocab,
                     RowStats* stats) override;
  void weigh(std::span<const float> logits, float max, float scale, float* weights,
             double* sums) override;
  void run_on_threads(void (*body)(void*, int, int), void* context, int tasks) override;

 private:
  friend struct LinearJob;
  friend struct FfnJob;
  friend struct AttentionJob;
  friend struct ExpandedJob;
  friend struct RouteJob;

  // What one worker needs for itself.
  struct WorkerScratch {
    HostBuffer<std::byte> gemm;           // kGemmScratch: weights of one block, widened
    HostBuffer<float> panel;              // [2][kPanelRows][kGroupColumns]: results of one gemm
    HostBuffer<float> ffn_cells;          // [calls][rows * slots][kGroupColumns]: down projections
    HostBuffer<const float*> slot_parts;  // [slots]
    HostBuffer<float> slot_weights;       // [slots]
    HostBuffer<std::byte> attention;      // see AttentionScratch in attention.cc
    HostBuffer<std::byte> expanded;       // see ExpandedScratch in attention_expanded.cc
    HostBuffer<float> latent;             // [latent_dim] of one row, and its padding
    HostBuffer<float> route;              // [2 * experts]
  };

  explicit CpuDevice(const Micro* micro) : micro_(micro) {}
  void reserve_all(const Limits& limits);
  // visit(buffer, elements) for every buffer that reserve() makes: the one list of their sizes.
  template <class Self, class Visit>
  static void for_each_buffer(Self& self, const Limits& limits, Visit visit);
  template <class Scratch, class Visit>
  static void for_each_buffer_of(Scratch& worker, const Limits& limits, Activation native,
                                 Visit visit);

  void latent_attention(const MlaAttentionArgs& args);
  void expanded_attention(const MlaAttentionArgs& args, const SequenceRows& seq);

  // Calls fn(row, worker) for all rows, shared out when they are worth it.
  template <class Fn>
  void for_rows(int32_t rows, double ns_per_row, const Fn& fn);
  // Runs one or more phases, on this thread alone when the whole job takes less than what waking
  // and joining the others costs.
  void run(std::span<const Pool::Phase> phases, double ns);

  const Micro* micro_;
  std::unique_ptr<Pool> pool_;
  Limits limits_;  // what scratch is sized for
  std::vector<WorkerScratch> workers_;

  // Shared by the workers during one operation.
  HostBuffer<std::byte> packed_;  // activations as the micro-kernels read them
  size_t packed_bytes_ = 0;
  HostBuffer<const void*> packed_rows_;  // pointers into them (or to the caller's rows)
  size_t packed_rows_count_ = 0;
  HostBuffer<std::byte> ffn_activations_;                 // [all rows of all groups][width]
  HostBuffer<const void*> ffn_inputs_[kActivationTypes];  // [rows * slots]
  HostBuffer<const void*> ffn_hidden_;                    // [rows * slots]
  HostBuffer<int32_t> ffn_cell_;              // [rows, slots] index of a slot's result, -1: none
  std::vector<int32_t> ffn_first_cell_;       // by group
  std::vector<int32_t> ffn_first_task_;       // by group, and the total
  HostBuffer<std::byte> attention_queries_;   // [kSharedRows, heads]
  HostBuffer<std::byte> attention_inputs_;    // [kSharedRows, heads]
  HostBuffer<int32_t> attention_rows_;        // [kSharedRows] rows of the batch
  HostBuffer<int32_t> attention_first_part_;  // [kSharedRows + 1] splits of the rows before
  HostBuffer<float> attention_parts_;         // [kSplitParts]
  HostBuffer<float> route_logits_;            // [rows, experts]
};

// Rows of one gemm call at most: their results stay in L1 and L2 while the weights pass by.
inline constexpr int kPanelRows = 192;
// Feed-forward networks of so many rows wait for memory: shared experts are spread among the
// others, and a task of the down projections may take several calls of gemm.
inline constexpr int32_t kSpreadRows = 64;
inline constexpr int32_t kDownCalls = 2;

inline int64_t tiles_of(int64_t n) { return (n + kTileN - 1) / kTileN; }
inline int32_t even(int32_t k) { return (k + 1) & ~1; }
// Values that are packed together.
constexpr int32_t packed_block(Activation type) {
  return type == Activation::kI8 ? kMxBlock : type == Activation::kI16 ? kFixedBlock : 2;
}
// A row of k activations, packed: how many values it has with its padding, its bytes, and where
// value i (a multiple of packed_block() for kI8 and kI16) begins.
inline int32_t packed_values(Activation type, int32_t k) {
  const int32_t block = packed_block(type);
  return (k + block - 1) / block * block;
}
inline size_t packed_offset(Activation type, int32_t i) {
  const auto at = static_cast<size_t>(i);
  if (type == Activation::kI8) return at / kMxBlock * sizeof(I8Block);
  if (type == Activation::kI16) return at / kFixedBlock * sizeof(I16Block);
  return at * (type == Activation::kBF16 ? sizeof(uint16_t) : sizeof(float));
}
inline size_t packed_bytes(Activation type, int32_t k) {
  return packed_offset(type, packed_values(type, k));
}
// Bytes from one packed row to the next. At a multiple of 1 KiB the rows of one pass would share so
// few sets of L1 that they evict each other (six rows of 2,048 float32: 0.94 of this speed).
inline size_t packed_stride(Activation type, int32_t k) {
  const size_t bytes = (packed_bytes(type, k) + kCacheLine - 1) / kCacheLine * kCacheLine;
  return bytes % 1024 == 0 ? bytes + kCacheLine : bytes;
}
TiledWeights tiled(const Matrix& w);
// What a set wants to multiply the matrix with.
Activation activation_for(const Micro& micro, const Matrix& w);
const uint8_t* tile_data(const Matrix& w, int32_t tile);
// Does the set read the matrix's tiles as several long streams for so few rows (Micro::streams)?
inline bool streams(const Micro& micro, const Matrix& w, int32_t rows) {
  const bool long_tiles = matrix_bytes(w.dtype, w.layout, kTileN, w.k) >= 8 * 1024;
  return micro.streams && long_tiles && rows <= kStreamRows &&
         (w.dtype == DType::kF8E4M3 || w.dtype == DType::kBF16);
}
// Estimated nanoseconds of multiplying `rows` rows by the matrix on one thread.
double gemm_ns(const Matrix& w, int64_t rows);

template <class Fn>
void CpuDevice::for_rows(int32_t rows, double ns_per_row, const Fn& fn) {
  struct Job {
    const Fn* fn;
    int32_t rows, step;
    static void run(void* context, int task, int worker) {
      const Job& job = *static_cast<Job*>(context);
      const int32_t end = std::min((task + 1) * job.step, job.rows);
      for (int32_t r = task * job.step; r < end; ++r) (*job.fn)(r, worker);
    }
  };
  const int32_t step = std::max(1, (rows + 4 * threads() - 1) / (4 * threads()));
  Job job{&fn, rows, step};
  const Pool::Phase phase{Job::run, &job, (rows + step - 1) / step};
  run({&phase, 1}, rows * ns_per_row);
}

}  // namespace dsv3::kernels
