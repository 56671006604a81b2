#include "kernels/profile.h"

#include <algorithm>
#include <string_view>

#include "runtime/base/os.h"

namespace dsv3::kernels {
namespace {

double bytes_of(const Matrix& m) {
  if (m.empty()) return 0;
  double bytes = static_cast<double>(matrix_bytes(m.dtype, m.layout, m.n, m.k));
  if (m.scales) {
    const int64_t blocks =
        int64_t{(m.n + m.scale_n - 1) / m.scale_n} * int64_t{(m.k + m.scale_k - 1) / m.scale_k};
    bytes += 4.0 * static_cast<double>(blocks);
  }
  return bytes;
}
double weights_of(const Matrix& m) { return static_cast<double>(m.n) * m.k; }

double floats(double count) { return count * sizeof(float); }

}  // namespace

bool ProfilingDevice::Key::operator==(const Key& o) const {
  const auto same = [](const Matrix& a, const Matrix& b) {
    return a.n == b.n && a.k == b.k && a.dtype == b.dtype;
  };
  return std::string_view(operation) == o.operation && matrices == o.matrices &&
         same(first, o.first) && same(second, o.second);
}

std::string ProfilingDevice::name_of(const Key& key) {
  std::string name = key.operation;
  const Matrix* matrices[] = {&key.first, &key.second};
  for (int32_t i = 0; i < key.matrices; ++i) {
    name += i == 0 ? " " : "+";
    name += std::to_string(matrices[i]->n) + "x" + std::to_string(matrices[i]->k);
    if (i + 1 == key.matrices) name += std::string(" ") + dtype_name(matrices[i]->dtype);
  }
  return name;
}

std::vector<OperationProfile> ProfilingDevice::profile() const {
  std::vector<OperationProfile> all;
  for (const Entry& e : operations_) {
    all.push_back(e.counts);
    all.back().name = name_of(e.key);
  }
  std::sort(all.begin(), all.end(), [](const OperationProfile& a, const OperationProfile& b) {
    return a.seconds > b.seconds;
  });
  return all;
}

template <class Call>
void ProfilingDevice::timed(const Key& key, double bytes, double flops, const Call& call) {
  const int64_t begin = monotonic_ns();
  call();
  const int64_t ns = monotonic_ns() - begin;
  auto entry = std::find_if(operations_.begin(), operations_.end(),
                            [&](const Entry& e) { return e.key == key; });
  if (entry == operations_.end()) entry = operations_.insert(entry, {key, {}});
  ++entry->counts.calls;
  entry->counts.seconds += static_cast<double>(ns) * 1e-9;
  entry->counts.bytes += bytes;
  entry->counts.flops += flops;
}

void ProfilingDevice::upload(Dev<std::byte> dst, const void* src, size_t bytes) {
  timed({"upload", 0, {}, {}}, static_cast<double>(bytes), 0,
        [&] { inner_->upload(dst, src, bytes); });
}
void ProfilingDevice::download(void* dst, Dev<const std::byte> src, size_t bytes) {
  timed({"download", 0, {}, {}}, static_cast<double>(bytes), 0,
        [&] { inner_->download(dst, src, bytes); });
}
void ProfilingDevice::copy(Dev<std::byte> dst, Dev<const std::byte> src, size_t bytes) {
  timed({"copy", 0, {}, {}}, static_cast<double>(bytes), 0, [&] { inner_->copy(dst, src, bytes); });
}
void ProfilingDevice::zero(Dev<std::byte> dst, size_t bytes) {
  timed({"zero", 0, {}, {}}, static_cast<double>(bytes), 0, [&] { inner_->zero(dst, bytes); });
}

void ProfilingDevice::embed(const Matrix& table, std::span<const int32_t> ids, Dev<float> out,
                            int64_t out_stride) {
  const double row = static_cast<double>(table.k) * static_cast<double>(dtype_size(table.dtype));
  timed({"embed", 1, table, {}}, row * static_cast<double>(ids.size()), 0,
        [&] { inner_->embed(table, ids, out, out_stride); });
}

void ProfilingDevice::rms_norm(Dev<const float> x, int64_t x_stride, Dev<const float> gamma,
                               float eps, int32_t rows, int32_t dim, Dev<float> out,
                               int64_t out_stride) {
  timed({"rms_norm", 0, {}, {}}, floats(double{1} * rows * dim), 0,
        [&] { inner_->rms_norm(x, x_stride, gamma, eps, rows, dim, out, out_stride); });
}

void ProfilingDevice::linear(std::span<const LinearArgs> layers) {
  if (layers.empty()) return;
  Key key{"linear", std::min<int32_t>(2, static_cast<int32_t>(layers.size())), layers[0].w, {}};
  if (layers.size() > 1) key.second = layers[1].w;
  double bytes = 0, flops = 0;
  for (const LinearArgs& l : layers) {
    bytes += bytes_of(l.w);
    flops += 2 * weights_of(l.w) * l.rows;
  }
  timed(key, bytes, flops, [&] { inner_->linear(layers); });
}

void ProfilingDevice::rope_append(const RopeAppendArgs& args) {
  double rows = 0;
  for (const SequenceRows& s : args.sequences) rows += s.rows;
  const double values = args.shape.heads * args.shape.qk_rope_head_dim + args.shape.latent_dim();
  timed({"rope_append", 0, {}, {}}, floats(rows * values), 0, [&] { inner_->rope_append(args); });
}

void ProfilingDevice::mla_attention(const MlaAttentionArgs& args) {
  double keys = 0, work = 0;
  for (const SequenceRows& s : args.sequences) {
    keys += static_cast<double>(s.first_position) + s.rows;
    work += attention_work(args.shape, s, expands(args.shape, s));
  }
  double bytes =
      keys * static_cast<double>(inner_->latent_page_bytes(args.shape)) / kLatentPageTokens;
  for (const std::span<const Matrix> heads : {args.w_uk, args.w_uv}) {
    for (const Matrix& m : heads) bytes += bytes_of(m);
  }
  timed({"mla_attention", 0, {}, {}}, bytes, 2 * work, [&] { inner_->mla_attention(args); });
}

void ProfilingDevice::route(const RouteArgs& args) {
  timed({"route", 1, args.gate, {}}, bytes_of(args.gate), 2 * weights_of(args.gate) * args.rows,
        [&] { inner_->route(args); });
}

void ProfilingDevice::moe_ffn(const FfnArgs& args) {
  if (args.groups.empty()) return;
  double bytes = 0, flops = 0;
  for (const FfnGroup& group : args.groups) {
    for (const Matrix* m : {&group.weights->gate, &group.weights->up, &group.weights->down}) {
      bytes += bytes_of(*m);
      flops += 2 * weights_of(*m) * group.count;
    }
  }
  const Key key{args.slots > 1 ? "moe_ffn" : "ffn", 1, args.groups[0].weights->gate, {}};
  timed(key, bytes, flops, [&] { inner_->moe_ffn(args); });
}

void ProfilingDevice::add(Dev<float> y, Dev<const float> x, size_t count) {
  timed({"add", 0, {}, {}}, floats(2 * static_cast<double>(count)), 0,
        [&] { inner_->add(y, x, count); });
}

void ProfilingDevice::gather_rows(Dev<const float> x, int64_t x_stride,
                                  std::span<const int32_t> rows, int32_t dim, Dev<float> out,
                                  int64_t out_stride) {
  timed({"gather_rows", 0, {}, {}}, floats(static_cast<double>(rows.size()) * dim), 0,
        [&] { inner_->gather_rows(x, x_stride, rows, dim, out, out_stride); });
}

void ProfilingDevice::reduce_logits(Dev<const float> logits, int64_t stride, int32_t rows,
                                    int32_t vocab, RowStats* stats) {
  timed({"reduce_logits", 0, {}, {}}, floats(double{1} * rows * vocab), 0,
        [&] { inner_->reduce_logits(logits, stride, rows, vocab, stats); });
}

void ProfilingDevice::weigh(std::span<const float> logits, float max, float scale, float* weights,
                            double* sums) {
  timed({"weigh", 0, {}, {}}, floats(2 * static_cast<double>(logits.size())), 0,
        [&] { inner_->weigh(logits, max, scale, weights, sums); });
}

}  // namespace dsv3::kernels
