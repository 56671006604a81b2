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

size_t padded(int64_t k) { return static_cast<size_t>(k + 32); }

// What packed_stride() adds to a row's bytes at most, INT16's padded block included.
constexpr size_t kRowPadding = 5 * kCacheLine;

// Room for one input as every type that one set uses: float32; raised float32, BF16 or INT16 with
// its scales (17 bits and padding); and INT8 with its own (10 bits).
size_t packed_size(const Limits& l) {
  const auto k = static_cast<size_t>(std::max(l.linear_k, l.hidden));
  return static_cast<size_t>(l.rows) *
         (k * (sizeof(float) + sizeof(float) + sizeof(uint16_t)) + 3 * kRowPadding);
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

Activation activation_for(const Micro& micro, const Matrix& w) {
  return micro.activation[static_cast<size_t>(w.dtype)];
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
  packed_bytes_ = packed_size(l);
  packed_rows_count_ = rows * 4;
  const auto groups = static_cast<size_t>(l.experts) + static_cast<size_t>(l.ffn_slots) + 1;
  ffn_first_cell_.resize(std::max(ffn_first_cell_.size(), groups));
  ffn_first_task_.resize(std::max(ffn_first_task_.size(), groups + 1));
  const auto make = [](auto& buffer, size_t count) {
    buffer = host_array<typename std::remove_reference_t<decltype(buffer)>::element_type>(count);
  };
  for_each_buffer(*this, l, make);
  workers_.resize(static_cast<size_t>(threads()));
  for (WorkerScratch& w : workers_) for_each_buffer_of(w, l, micro_->native, make);
}

uint64_t CpuDevice::scratch_bytes(const Limits& limits, int threads) const {
  uint64_t shared = 0, of_worker = 0;
  const auto add_to = [](uint64_t* sum) {
    return [sum](const auto& buffer, size_t count) {
      *sum += count * sizeof(typename std::remove_reference_t<decltype(buffer)>::element_type);
    };
  };
  for_each_buffer(*this, limits, add_to(&shared));
  const WorkerScratch none;
  for_each_buffer_of(none, limits, micro_->native, add_to(&of_worker));
  return shared + static_cast<uint64_t>(threads) * of_worker;
}

template <class Self, class Visit>
void CpuDevice::for_each_buffer(Self& self, const Limits& l, Visit visit) {
  const auto rows = static_cast<size_t>(l.rows);
  const size_t cells = rows * static_cast<size_t>(l.ffn_slots);
  visit(self.packed_, packed_size(l));
  visit(self.packed_rows_, rows * 4);
  // The padding of every slot's row comes on top of the widths.
  visit(self.ffn_activations_,
        rows * static_cast<size_t>(l.ffn_slot_width) * sizeof(float) + cells * kRowPadding);
  for (auto& inputs : self.ffn_inputs_) visit(inputs, cells);
  visit(self.ffn_hidden_, cells);
  visit(self.ffn_cell_, cells);
  const size_t shared = std::min(rows, size_t{kSharedRows});
  const size_t shared_queries = shared * static_cast<size_t>(l.mla.heads);
  visit(self.attention_queries_,
        shared_queries * attention_query_bytes(l.mla, self.micro_->native));
  visit(self.attention_inputs_, shared_queries * attention_input_bytes(l.mla));
  visit(self.attention_rows_, shared);
  visit(self.attention_first_part_, shared + 1);
  visit(self.attention_parts_, kSplitParts * attention_part_floats(l.mla));
  visit(self.route_logits_, rows * padded(l.experts));
}

template <class Scratch, class Visit>
void CpuDevice::for_each_buffer_of(Scratch& w, const Limits& l, Activation native, Visit visit) {
  const auto slots = static_cast<size_t>(l.ffn_slots);
  const size_t cells = static_cast<size_t>(l.rows) * slots;
  visit(w.gemm, kGemmScratch);
  visit(w.panel, size_t{2} * kPanelRows * kGroupColumns);
  visit(w.ffn_cells,
        std::max(cells, kDownCalls * std::min(cells, kSpreadRows * slots)) * kGroupColumns);
  visit(w.slot_parts, static_cast<size_t>(l.ffn_slots));
  visit(w.slot_weights, static_cast<size_t>(l.ffn_slots));
  visit(w.attention, attention_scratch_bytes(l.mla, native));
  visit(w.expanded, l.expand ? expanded_scratch_bytes(l.mla, native, l.rows) : 0);
  visit(w.latent, padded(l.mla.latent_dim()));
  visit(w.route, 2 * padded(l.experts));
}

void CpuDevice::run_on_threads(void (*body)(void*, int, int), void* context, int tasks) {
  pool_->run_on_all({body, context, tasks});
}

void CpuDevice::run(std::span<const Pool::Phase> phases, double ns) {
  if (ns >= kParallelNs) return pool_->run(phases);
  for (const Pool::Phase& phase : phases) {
    for (int task = 0; task < phase.tasks; ++task) phase.run(phase.context, task, 0);
  }
}

}  // namespace dsv3::kernels
