#include "kernels/cpu/cpu_device.h"

#include <algorithm>
#include <new>

#include "kernels/cpu/attention.h"

namespace dsv3::kernels {

static_assert(static_cast<int>(WeightType::kF32) == static_cast<int>(DType::kF32) &&
              static_cast<int>(WeightType::kBF16) == static_cast<int>(DType::kBF16) &&
              static_cast<int>(WeightType::kF16) == static_cast<int>(DType::kF16) &&
              static_cast<int>(WeightType::kF8E4M3) == static_cast<int>(DType::kF8E4M3) &&
              static_cast<int>(WeightType::kMXFP4) == static_cast<int>(DType::kMXFP4));
static_assert(kPageKeys == kLatentPageTokens);

namespace {

// Below this an operation runs on the calling thread: two threads would not finish it sooner.
constexpr double kParallelNs = 3000;

// The inputs summed at a time: all of a scale's, or an even divisor of them that fits.
int32_t block_k(const Matrix& w) {
  if (w.dtype != DType::kF8E4M3) return kBlockK;
  if (w.scale_k <= kBlockK) return w.scale_k;
  for (int32_t block = kBlockK; block > 2; block -= 2) {
    if (w.scale_k % block == 0) return block;
  }
  return 2;
}

}  // namespace

TiledWeights tiled(const Matrix& w) {
  TiledWeights t;
  t.type = static_cast<WeightType>(w.dtype);
  t.n = w.n;
  t.k = w.k;
  t.block_k = block_k(w);
  t.data = reinterpret_cast<const uint8_t*>(w.data.get());
  t.scales = w.scales.get();
  t.scale_n = w.scale_n;
  t.scale_k = w.scale_k;
  t.scale_columns = (w.k + w.scale_k - 1) / w.scale_k;
  return t;
}

const uint8_t* tile_data(const Matrix& w, int32_t tile) {
  return reinterpret_cast<const uint8_t*>(w.data.get()) +
         matrix_bytes(w.dtype, w.layout, int64_t{tile} * kTileN, w.k);
}

double gemm_ns(const Matrix& w, int64_t rows) {
  const double weights = static_cast<double>(w.n) * w.k;
  return static_cast<double>(matrix_bytes(w.dtype, w.layout, w.n, w.k)) / 30 +
         weights * static_cast<double>(rows) / 75;
}

Result<std::unique_ptr<Device>> CpuDevice::create(const Micro* micro, int threads, bool pin) try {
  std::unique_ptr<CpuDevice> device(new CpuDevice(micro));
  DSV3_ASSIGN(device->pool_, Pool::create(threads, pin));
  return std::unique_ptr<Device>(std::move(device));
} catch (const std::bad_alloc&) {
  return make_error(Code::kOutOfMemory, "no memory for a device of %d threads", threads);
}

size_t CpuDevice::latent_page_bytes(const MlaShape& shape) const {
  return static_cast<size_t>(even(shape.latent_dim())) * kPageKeys * sizeof(uint16_t);
}

Status CpuDevice::reserve(const Limits& limits) try {
  reserve_all(limits);
  return ok_status();
} catch (const std::bad_alloc&) {
  return make_error(Code::kOutOfMemory, "%s: no memory for the scratch of %d rows", name(),
                    limits.rows);
}

void CpuDevice::reserve_all(const Limits& wanted) {
  Limits& l = limits_;
  const auto grow = [](auto* have, auto want) { *have = std::max(*have, want); };
  grow(&l.rows, wanted.rows);
  grow(&l.hidden, wanted.hidden);
  grow(&l.linear_k, wanted.linear_k);
  grow(&l.linear_n, wanted.linear_n);
  grow(&l.ffn_width, wanted.ffn_width);
  grow(&l.ffn_slots, wanted.ffn_slots);
  grow(&l.ffn_slot_width, wanted.ffn_slot_width);
  grow(&l.experts, wanted.experts);
  grow(&l.mla.heads, wanted.mla.heads);
  grow(&l.mla.kv_lora_rank, wanted.mla.kv_lora_rank);
  grow(&l.mla.qk_nope_head_dim, wanted.mla.qk_nope_head_dim);
  grow(&l.mla.qk_rope_head_dim, wanted.mla.qk_rope_head_dim);
  grow(&l.mla.v_head_dim, wanted.mla.v_head_dim);
  grow(&l.expand, wanted.expand);

  const auto rows = static_cast<size_t>(l.rows);
  const size_t cells = rows * static_cast<size_t>(l.ffn_slots);
  const auto padded = [](int64_t k) { return static_cast<size_t>(k + 32); };
  // Room for one input as every type at a time (INT8 with its scales: 10 bits and padding).
  packed_bytes_ = rows * padded(std::max(l.linear_k, l.hidden)) *
                  (sizeof(float) + sizeof(uint16_t) + sizeof(uint16_t));
  packed_ = host_array<std::byte>(packed_bytes_);
  packed_rows_count_ = rows * 4;
  packed_rows_ = host_array<const void*>(packed_rows_count_);
  // The padding of every slot's row comes on top of the widths.
  ffn_activations_ = host_array<std::byte>(
      (rows * static_cast<size_t>(l.ffn_slot_width) + cells * 32) * sizeof(float));
  for (auto& inputs : ffn_inputs_) inputs = host_array<const void*>(cells);
  ffn_hidden_ = host_array<const void*>(cells);
  ffn_cell_ = host_array<int32_t>(cells);
  const auto groups = static_cast<size_t>(l.experts) + static_cast<size_t>(l.ffn_slots) + 1;
  ffn_first_cell_.resize(std::max(ffn_first_cell_.size(), groups));
  ffn_first_task_.resize(std::max(ffn_first_task_.size(), groups + 1));
  const size_t shared = std::min(rows, size_t{kSharedRows});
  const size_t shared_queries = shared * static_cast<size_t>(l.mla.heads);
  attention_queries_ =
      host_array<std::byte>(shared_queries * attention_query_bytes(l.mla, micro_->native));
  attention_inputs_ = host_array<std::byte>(shared_queries * attention_input_bytes(l.mla));
  attention_rows_ = host_array<int32_t>(shared);
  attention_first_part_ = host_array<int32_t>(shared + 1);
  attention_parts_ = host_array<float>(kSplitParts * attention_part_floats(l.mla));
  route_logits_ = host_array<float>(rows * padded(l.experts));
  route_scratch_ = host_array<float>(2 * padded(l.experts));

  workers_.resize(static_cast<size_t>(threads()));
  for (WorkerScratch& w : workers_) {
    w.gemm = host_array<std::byte>(kGemmScratch);
    w.panel = host_array<float>(size_t{2} * kPanelRows * kGroupColumns);
    w.ffn_cells = host_array<float>(cells * kGroupColumns);
    w.slot_parts = host_array<const float*>(static_cast<size_t>(l.ffn_slots));
    w.slot_weights = host_array<float>(static_cast<size_t>(l.ffn_slots));
    w.attention = host_array<std::byte>(attention_scratch_bytes(l.mla, micro_->native));
    if (l.expand) {
      w.expanded = host_array<std::byte>(expanded_scratch_bytes(l.mla, micro_->native, l.rows));
    }
    w.latent = host_array<float>(padded(l.mla.latent_dim()));
  }
}

void CpuDevice::run(std::span<const Pool::Phase> phases, double ns) {
  if (ns >= kParallelNs) return pool_->run(phases);
  for (const Pool::Phase& phase : phases) {
    for (int task = 0; task < phase.tasks; ++task) phase.run(phase.context, task, 0);
  }
}

}  // namespace dsv3::kernels
