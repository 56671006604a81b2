#include "kernels/ref/ref_device.h"

#include <algorithm>
#include <cassert>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/host_device.h"
#include "kernels/ref/ref_weights.h"

namespace dsv3::kernels {
namespace {

using ref::matmul;

// A page: [kLatentPageTokens][latent_dim] float32, row-major.
class RefDevice final : public HostDevice {
 public:
  const char* name() const override { return "ref"; }
  int threads() const override { return 1; }
  Status reserve(const Limits& limits) override;
  uint64_t scratch_bytes(const Limits& limits, int threads) const override;
  size_t latent_page_bytes(const MlaShape& shape) const override {
    return static_cast<size_t>(kLatentPageTokens) * static_cast<size_t>(shape.latent_dim()) *
           sizeof(float);
  }
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

 private:
  template <class Self, class Visit>
  static void for_each_buffer(Self& self, const Limits& limits, Visit visit);

  std::vector<float> slots_;               // [rows, slots, hidden]
  std::vector<uint8_t> slot_used_;         // [rows, slots]
  std::vector<float> inputs_;              // [rows, hidden]: the rows of one expert
  std::vector<float> outputs_;             // [rows, hidden]
  std::vector<float> gate_, up_;           // [rows, ffn_width]
  std::vector<float> scores_, selection_;  // [rows, experts], [2 * experts]
  std::vector<float> query_, attended_;    // [rows, kv_lora_rank]: of one head
};

// visit(buffer, elements) for every buffer: the one list of their sizes.
template <class Self, class Visit>
void RefDevice::for_each_buffer(Self& self, const Limits& limits, Visit visit) {
  const int64_t rows = limits.rows;
  visit(self.slots_, rows * limits.ffn_slots * limits.hidden);
  visit(self.slot_used_, rows * limits.ffn_slots);
  visit(self.inputs_, rows * limits.hidden);
  visit(self.outputs_, rows * limits.hidden);
  visit(self.gate_, rows * limits.ffn_width);
  visit(self.up_, rows * limits.ffn_width);
  visit(self.scores_, rows * limits.experts);
  visit(self.selection_, int64_t{2} * limits.experts);
  visit(self.query_, rows * limits.mla.kv_lora_rank);
  visit(self.attended_, rows * limits.mla.kv_lora_rank);
}

Status RefDevice::reserve(const Limits& limits) try {
  for_each_buffer(*this, limits, [](auto& buffer, int64_t count) {
    if (static_cast<int64_t>(buffer.size()) < count) buffer.resize(static_cast<size_t>(count));
  });
  return ok_status();
} catch (const std::bad_alloc&) {
  return make_error(Code::kOutOfMemory, "ref: no memory for the scratch of %d rows", limits.rows);
}

uint64_t RefDevice::scratch_bytes(const Limits& limits, int /*threads*/) const {
  uint64_t bytes = 0;
  for_each_buffer(*this, limits, [&](const auto& buffer, int64_t count) {
    bytes += static_cast<uint64_t>(count) * sizeof(buffer[0]);
  });
  return bytes;
}

void RefDevice::embed(const Matrix& table, std::span<const int32_t> ids, Dev<float> out,
                      int64_t out_stride) {
  for (size_t r = 0; r < ids.size(); ++r) {
    float* row = out.get() + static_cast<int64_t>(r) * out_stride;
    for (int32_t i = 0; i < table.k; ++i) row[i] = ref::weight_at(table, ids[r], i);
  }
}

void norm_row(const float* x, const float* gamma, float eps, int32_t dim, float* out) {
  double sum = 0;
  for (int32_t i = 0; i < dim; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(x[i]);
  const float mean = static_cast<float>(sum / dim);
  const float scale = 1.0f / std::sqrt(mean + eps);
  for (int32_t i = 0; i < dim; ++i) out[i] = x[i] * scale * gamma[i];
}

void RefDevice::rms_norm(Dev<const float> x, int64_t x_stride, Dev<const float> gamma, float eps,
                         int32_t rows, int32_t dim, Dev<float> out, int64_t out_stride) {
  for (int32_t r = 0; r < rows; ++r) {
    norm_row(x.get() + r * x_stride, gamma.get(), eps, dim, out.get() + r * out_stride);
  }
}

void RefDevice::linear(std::span<const LinearArgs> layers) {
  for (const LinearArgs& a : layers) {
    matmul(a.w, a.x.get(), a.x_stride, a.rows, a.y.get(), a.y_stride, a.accumulate);
  }
}

// Turns interleaved pairs (2i, 2i+1) by their angles.
void rotate(const float* in, const float* cos, const float* sin, int32_t pairs, float* out) {
  for (int32_t i = 0; i < pairs; ++i) {
    const float a = in[2 * i];
    const float b = in[2 * i + 1];
    out[2 * i] = a * cos[i] - b * sin[i];
    out[2 * i + 1] = a * sin[i] + b * cos[i];
  }
}

float* page_row(const SequenceRows& seq, size_t page_offset, int64_t position, int32_t dim) {
  std::byte* page = seq.pages[position / kLatentPageTokens].get() + page_offset;
  return reinterpret_cast<float*>(page) + position % kLatentPageTokens * dim;
}

void RefDevice::rope_append(const RopeAppendArgs& args) {
  const MlaShape& s = args.shape;
  const int32_t pairs = s.qk_rope_head_dim / 2;
  for (const SequenceRows& seq : args.sequences) {
    for (int32_t i = 0; i < seq.rows; ++i) {
      const int64_t row = seq.row_begin + i;
      const float* cos = args.cos.get() + row * pairs;
      const float* sin = args.sin.get() + row * pairs;
      for (int32_t h = 0; h < s.heads; ++h) {
        float* q = args.q.get() + (row * s.heads + h) * s.qk_head_dim() + s.qk_nope_head_dim;
        rotate(q, cos, sin, pairs, q);
      }
      const float* kv = args.kv.get() + row * s.latent_dim();
      float* latent = page_row(seq, args.page_offset, seq.first_position + i, s.latent_dim());
      norm_row(kv, args.gamma.get(), args.eps, s.kv_lora_rank, latent);
      rotate(kv + s.kv_lora_rank, cos, sin, pairs, latent + s.kv_lora_rank);
    }
  }
}

// One row and head: attended = sum of softmax(scores) * latents [kv_lora_rank]. query: W_UK q_nope
// [kv_lora_rank]. The softmax runs online, so that no array of scores is needed.
void attend(const MlaAttentionArgs& args, const SequenceRows& seq, int64_t last, const float* query,
            const float* q_rope, float* attended) {
  const MlaShape& s = args.shape;
  std::fill_n(attended, s.kv_lora_rank, 0.0f);
  float max = -std::numeric_limits<float>::infinity();
  double sum = 0;
  for (int64_t p = args.first_key; p <= last; ++p) {
    const float* latent = page_row(seq, args.page_offset, p, s.latent_dim());
    const float* rope = latent + s.kv_lora_rank;
    double dot = 0;
    for (int32_t i = 0; i < s.kv_lora_rank; ++i) {
      dot += static_cast<double>(query[i]) * static_cast<double>(latent[i]);
    }
    for (int32_t i = 0; i < s.qk_rope_head_dim; ++i) {
      dot += static_cast<double>(q_rope[i]) * static_cast<double>(rope[i]);
    }
    const float score = static_cast<float>(dot) * args.softmax_scale;
    if (score > max) {
      const float shrink = std::exp(max - score);
      sum *= static_cast<double>(shrink);
      for (int32_t i = 0; i < s.kv_lora_rank; ++i) attended[i] *= shrink;
      max = score;
    }
    const float weight = std::exp(score - max);  // a NaN score spoils the sum, and so the row
    sum += static_cast<double>(weight);
    for (int32_t i = 0; i < s.kv_lora_rank; ++i) attended[i] += weight * latent[i];
  }
  const float norm = sum == 0 ? 0.0f : static_cast<float>(1.0 / sum);
  for (int32_t i = 0; i < s.kv_lora_rank; ++i) attended[i] *= norm;
}

void RefDevice::mla_attention(const MlaAttentionArgs& args) {
  const MlaShape& s = args.shape;
  const int64_t q_stride = int64_t{s.heads} * s.qk_head_dim();
  const int64_t out_stride = int64_t{s.heads} * s.v_head_dim;
  for (const SequenceRows& seq : args.sequences) {
    for (int64_t head = 0; head < s.heads; ++head) {
      const auto h = static_cast<size_t>(head);
      const float* q = args.q.get() + seq.row_begin * q_stride + head * s.qk_head_dim();
      matmul(args.w_uk[h], q, q_stride, seq.rows, query_.data(), s.kv_lora_rank, false);
      for (int64_t row = 0; row < seq.rows; ++row) {
        attend(args, seq, seq.first_position + row, query_.data() + row * s.kv_lora_rank,
               q + row * q_stride + s.qk_nope_head_dim, attended_.data() + row * s.kv_lora_rank);
      }
      float* out = args.out.get() + seq.row_begin * out_stride + head * s.v_head_dim;
      matmul(args.w_uv[h], attended_.data(), s.kv_lora_rank, seq.rows, out, out_stride, false);
    }
  }
}

void RefDevice::route(const RouteArgs& args) {
  const int64_t experts = args.gate.n;
  matmul(args.gate, args.x.get(), args.gate.k, args.rows, scores_.data(), experts, false);
  for (int64_t r = 0; r < args.rows; ++r) {
    route_row(args, scores_.data() + r * experts, selection_.data(),
              args.expert_ids + r * args.top_k, args.expert_weights + r * args.top_k);
  }
}

void RefDevice::moe_ffn(const FfnArgs& args) {
  const int64_t hidden = args.hidden;
  std::fill_n(slot_used_.begin(), int64_t{args.rows} * args.slots, uint8_t{0});
  for (const FfnGroup& group : args.groups) {
    const FfnWeights& w = *group.weights;
    const int64_t width = w.gate.n;
    for (int64_t i = 0; i < group.count; ++i) {
      std::copy_n(args.x.get() + group.tokens[i] * hidden, hidden, inputs_.data() + i * hidden);
    }
    matmul(w.gate, inputs_.data(), hidden, group.count, gate_.data(), width, false);
    matmul(w.up, inputs_.data(), hidden, group.count, up_.data(), width, false);
    for (size_t j = 0; j < static_cast<size_t>(group.count * width); ++j) {
      gate_[j] = gate_[j] / (1.0f + std::exp(-gate_[j])) * up_[j];
    }
    matmul(w.down, gate_.data(), width, group.count, outputs_.data(), hidden, false);
    for (int64_t i = 0; i < group.count; ++i) {
      const int64_t cell = int64_t{group.tokens[i]} * args.slots + group.slots[i];
      slot_used_[static_cast<size_t>(cell)] = 1;
      std::copy_n(outputs_.data() + i * hidden, hidden, slots_.data() + cell * hidden);
    }
  }
  for (int64_t t = 0; t < args.rows; ++t) {
    float* y = args.y.get() + t * args.hidden;
    const uint8_t* used = slot_used_.data() + t * args.slots;
    if (std::find(used, used + args.slots, uint8_t{1}) == used + args.slots) continue;
    for (int32_t i = 0; i < args.hidden; ++i) {
      float sum = 0;
      for (int64_t s = 0; s < args.slots; ++s) {
        if (used[s] == 0) continue;
        sum += args.slot_weights[t * args.slots + s] *
               slots_[static_cast<size_t>((t * args.slots + s) * args.hidden + i)];
      }
      y[i] += sum;
    }
  }
}

void RefDevice::add(Dev<float> y, Dev<const float> x, size_t count) {
  for (size_t i = 0; i < count; ++i) y.get()[i] += x.get()[i];
}

void RefDevice::gather_rows(Dev<const float> x, int64_t x_stride, std::span<const int32_t> rows,
                            int32_t dim, Dev<float> out, int64_t out_stride) {
  for (size_t r = 0; r < rows.size(); ++r) {
    std::copy_n(x.get() + rows[r] * x_stride, dim,
                out.get() + static_cast<int64_t>(r) * out_stride);
  }
}

void RefDevice::reduce_logits(Dev<const float> logits, int64_t stride, int32_t rows, int32_t vocab,
                              RowStats* stats) {
  for (int32_t r = 0; r < rows; ++r) stats[r] = reduce_row(logits.get() + r * stride, vocab);
}

void RefDevice::weigh(std::span<const float> logits, float max, float scale, float* weights,
                      double* sums) {
  constexpr double kLeast = -87;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double exponent =
        (static_cast<double>(logits[i]) - static_cast<double>(max)) * static_cast<double>(scale);
    weights[i] = exponent < kLeast ? 0.0F : static_cast<float>(std::exp(exponent));
    double& sum = sums[i / kWeighBlock];
    sum = (i % kWeighBlock == 0 ? 0 : sum) + static_cast<double>(weights[i]);
  }
}

}  // namespace

std::unique_ptr<Device> make_ref_device() { return std::make_unique<RefDevice>(); }

}  // namespace dsv3::kernels
