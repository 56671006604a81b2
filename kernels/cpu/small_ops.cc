// The operations that must not show up in a profile.
#include <algorithm>
#include <cstring>

#include "kernels/cpu/cpu_device.h"
#include "kernels/numeric.h"

namespace dsv3::kernels {
namespace {

// out[0..k) = row `row` of an embedding table.
void embed_row(const Matrix& w, int64_t row, float* out) {
  const bool tiled_layout = w.layout == Layout::kTile16x2;
  const int64_t pairs = (int64_t{w.k} + 1) / 2;
  // Element i stands at base + i (row-major) or base + i / 2 * 32 + i % 2.
  const int64_t base = tiled_layout ? row / kTileN * pairs * 32 + row % kTileN * 2 : row * w.k;
  const auto fill = [&](auto convert) {
    if (!tiled_layout) {
      for (int64_t i = 0; i < w.k; ++i) out[i] = convert(base + i);
    } else {
      for (int64_t i = 0; i < w.k; ++i) out[i] = convert(base + i / 2 * 32 + i % 2);
    }
  };
  const std::byte* data = w.data.get();
  switch (w.dtype) {
    case DType::kF32: {
      const auto* p = reinterpret_cast<const float*>(data);
      return fill([p](int64_t i) { return p[i]; });
    }
    case DType::kBF16: {
      const auto* p = reinterpret_cast<const uint16_t*>(data);
      return fill([p](int64_t i) { return bf16_to_float(p[i]); });
    }
    case DType::kF16: {
      const auto* p = reinterpret_cast<const uint16_t*>(data);
      return fill([p](int64_t i) { return f16_to_float(p[i]); });
    }
    case DType::kF8E4M3:
      break;
    case DType::kMXFP4:
      return;  // never a table's
  }
  const auto* p = reinterpret_cast<const uint8_t*>(data);
  fill([p](int64_t i) { return kF8E4M3Table[p[i]]; });
  const int64_t columns = (int64_t{w.k} + w.scale_k - 1) / w.scale_k;
  const float* scales = w.scales.get() + row / w.scale_n * columns;
  for (int64_t i = 0; i < w.k; ++i) out[i] *= scales[i / w.scale_k];
}

// Turns interleaved pairs (2i, 2i+1) by their angles; out may be in.
void rotate(const float* in, const float* cos, const float* sin, int32_t pairs, float* out) {
  for (int32_t i = 0; i < pairs; ++i) {
    const float a = in[2 * i];
    const float b = in[2 * i + 1];
    out[2 * i] = a * cos[i] - b * sin[i];
    out[2 * i + 1] = a * sin[i] + b * cos[i];
  }
}

}  // namespace

void CpuDevice::embed(const Matrix& table, std::span<const int32_t> ids, Dev<float> out,
                      int64_t out_stride) {
  for_rows(static_cast<int32_t>(ids.size()), table.k, [&](int32_t r, int) {
    embed_row(table, ids[static_cast<size_t>(r)], out.get() + r * out_stride);
  });
}

void CpuDevice::rms_norm(Dev<const float> x, int64_t x_stride, Dev<const float> gamma, float eps,
                         int32_t rows, int32_t dim, Dev<float> out, int64_t out_stride) {
  for_rows(rows, dim * 0.15, [&](int32_t r, int) {
    micro_->rms_norm(x.get() + r * x_stride, gamma.get(), eps, dim, out.get() + r * out_stride);
  });
}

namespace {

// A row's way into its page: its positions' neighbours share its cache lines, but no value of it.
void append_row(const RopeAppendArgs& args, const Micro& micro, const SequenceRows& seq, int32_t i,
                float* latent) {
  const MlaShape& s = args.shape;
  const int32_t pairs = s.qk_rope_head_dim / 2;
  const int64_t row = seq.row_begin + i;
  const float* cos = args.cos.get() + row * pairs;
  const float* sin = args.sin.get() + row * pairs;
  for (int32_t h = 0; h < s.heads; ++h) {
    float* q = args.q.get() + (row * s.heads + h) * s.qk_head_dim() + s.qk_nope_head_dim;
    rotate(q, cos, sin, pairs, q);
  }
  const float* kv = args.kv.get() + row * s.latent_dim();
  micro.rms_norm(kv, args.gamma.get(), args.eps, s.kv_lora_rank, latent);
  rotate(kv + s.kv_lora_rank, cos, sin, pairs, latent + s.kv_lora_rank);
  latent[s.latent_dim()] = 0;  // the other half of an odd last pair
  const int64_t position = seq.first_position + i;
  std::byte* page = seq.pages[position / kPageKeys].get() + args.page_offset +
                    position % kPageKeys * int64_t{2 * sizeof(uint16_t)};
  for (int32_t d = 0; d < s.latent_dim(); d += 2) {
    const uint16_t pair[] = {bf16_from_float(latent[d]), bf16_from_float(latent[d + 1])};
    std::memcpy(page + int64_t{d} * kPageKeys * int64_t{sizeof(uint16_t)}, pair, sizeof pair);
  }
}

}  // namespace

void CpuDevice::rope_append(const RopeAppendArgs& args) {
  const MlaShape& s = args.shape;
  const double ns = s.heads * s.qk_rope_head_dim + 2.0 * s.latent_dim();
  int32_t rows = 0;
  for (const SequenceRows& seq : args.sequences) rows += seq.rows;
  for_rows(rows, ns, [&](int32_t i, int worker) {
    const SequenceRows* seq = args.sequences.data();
    for (; i >= seq->rows; ++seq) i -= seq->rows;
    append_row(args, *micro_, *seq, i, workers_[static_cast<size_t>(worker)].latent.get());
  });
}

struct RouteJob {
  // Of one task at most: 2,048 rows are shared out evenly. Fewer would widen the weights too often.
  static constexpr int32_t kRows = 96;
  // With fewer, choosing the experts on several threads costs what it gains.
  static constexpr int32_t kManyRows = 64;

  CpuDevice* device;
  const RouteArgs* args;
  TiledWeights gate;
  int32_t panels;

  // Task: one group of tiles for one panel of rows.
  static void scores(void* context, int task, int worker) {
    const RouteJob& job = *static_cast<RouteJob*>(context);
    auto& scratch = job.device->workers_[static_cast<size_t>(worker)];
    const int32_t first = task % job.panels * kRows;
    GemmArgs g;
    g.w = job.gate;
    g.tile = task / job.panels * kGroupTiles;
    g.tiles = static_cast<int32_t>(std::min<int64_t>(kGroupTiles, tiles_of(g.w.n) - g.tile));
    g.rows = std::min(kRows, job.args->rows - first);
    g.x = job.device->packed_rows_.get() + first;
    g.out = scratch.panel.get();
    g.out_stride = kGroupColumns;
    g.scratch = scratch.gemm.get();
    job.device->micro_->gemm_f32(g);
    const int32_t column = g.tile * kTileN;
    const int32_t count = std::min(g.tiles * kTileN, g.w.n - column);
    for (int32_t r = 0; r < g.rows; ++r) {
      std::copy_n(g.out + r * g.out_stride, count,
                  job.device->route_logits_.get() + int64_t{first + r} * g.w.n + column);
    }
  }
};

void CpuDevice::route(const RouteArgs& args) {
  RouteJob job{this, &args, tiled(args.gate), (args.rows + RouteJob::kRows - 1) / RouteJob::kRows};
  const int32_t k = args.gate.k;
  for (int32_t r = 0; r < args.rows; ++r) {
    const float* x = args.x.get() + int64_t{r} * k;
    packed_rows_[static_cast<size_t>(r)] = x;
    if (k % 2 == 0) continue;
    float* padded = reinterpret_cast<float*>(packed_.get()) + int64_t{r} * even(k);
    micro_->pack(Activation::kF32, x, k, even(k), padded);
    packed_rows_[static_cast<size_t>(r)] = padded;
  }
  const auto groups = static_cast<int>((tiles_of(args.gate.n) + kGroupTiles - 1) / kGroupTiles);
  const Pool::Phase phase{RouteJob::scores, &job, groups * job.panels};
  run({&phase, 1}, gemm_ns(args.gate, 4 * args.rows));
  const double row_ns = args.rows < RouteJob::kManyRows ? 0 : 15.0 * args.gate.n;
  for_rows(args.rows, row_ns, [&](int32_t r, int worker) {
    route_row(args, route_logits_.get() + int64_t{r} * args.gate.n,
              workers_[static_cast<size_t>(worker)].route.get(),
              args.expert_ids + int64_t{r} * args.top_k,
              args.expert_weights + int64_t{r} * args.top_k);
  });
}

void CpuDevice::add(Dev<float> y, Dev<const float> x, size_t count) {
  micro_->add(y.get(), x.get(), static_cast<int64_t>(count));
}

void CpuDevice::gather_rows(Dev<const float> x, int64_t x_stride, std::span<const int32_t> rows,
                            int32_t dim, Dev<float> out, int64_t out_stride) {
  for (size_t r = 0; r < rows.size(); ++r) {
    std::copy_n(x.get() + rows[r] * x_stride, dim,
                out.get() + static_cast<int64_t>(r) * out_stride);
  }
}

void CpuDevice::reduce_logits(Dev<const float> logits, int64_t stride, int32_t rows, int32_t vocab,
                              RowStats* stats) {
  for_rows(rows, vocab * 0.5, [&](int32_t r, int) {
    RowStats& s = stats[r];
    micro_->reduce(logits.get() + r * stride, vocab, &s.argmax, &s.max, &s.sum_exp, &s.finite);
  });
}

static_assert(kWeighed == kWeighBlock);

void CpuDevice::weigh(std::span<const float> logits, float max, float scale, float* weights,
                      double* sums) {
  micro_->weigh(logits.data(), static_cast<int32_t>(logits.size()), max, scale, weights, sums);
}

}  // namespace dsv3::kernels
