// A device that leaves everything to another one. Tests derive from it and change what they are
// about.
#pragma once

#include <memory>
#include <utility>

#include "kernels/kernels.h"

namespace dsv3::test {

class ForwardingDevice : public kernels::Device {
 public:
  template <class T>
  using Dev = kernels::Dev<T>;

  explicit ForwardingDevice(std::unique_ptr<kernels::Device> inner) : inner_(std::move(inner)) {}

  const char* name() const override { return inner_->name(); }
  int threads() const override { return inner_->threads(); }
  int threads_in_use() const override { return inner_->threads_in_use(); }
  Result<std::unique_ptr<kernels::Device>> make_lane() const override {
    return inner_->make_lane();
  }

  Dev<std::byte> alloc(size_t bytes) override { return inner_->alloc(bytes); }
  void free(Dev<std::byte> p) override { inner_->free(p); }
  void upload(Dev<std::byte> dst, const void* src, size_t bytes) override {
    inner_->upload(dst, src, bytes);
  }
  void download(void* dst, Dev<const std::byte> src, size_t bytes) override {
    inner_->download(dst, src, bytes);
  }
  void copy(Dev<std::byte> dst, Dev<const std::byte> src, size_t bytes) override {
    inner_->copy(dst, src, bytes);
  }
  void zero(Dev<std::byte> dst, size_t bytes) override { inner_->zero(dst, bytes); }
  Dev<const std::byte> bind(const void* host, size_t bytes) override {
    return inner_->bind(host, bytes);
  }
  void unbind(Dev<const std::byte> p) override { inner_->unbind(p); }

  Status reserve(const kernels::Limits& limits) override { return inner_->reserve(limits); }
  uint64_t scratch_bytes(const kernels::Limits& limits, int threads) const override {
    return inner_->scratch_bytes(limits, threads);
  }
  Status synchronize() override { return inner_->synchronize(); }
  size_t latent_page_bytes(const kernels::MlaShape& shape) const override {
    return inner_->latent_page_bytes(shape);
  }

  void embed(const kernels::Matrix& table, std::span<const int32_t> ids, Dev<float> out,
             int64_t out_stride) override {
    inner_->embed(table, ids, out, out_stride);
  }
  void rms_norm(Dev<const float> x, int64_t x_stride, Dev<const float> gamma, float eps,
                int32_t rows, int32_t dim, Dev<float> out, int64_t out_stride) override {
    inner_->rms_norm(x, x_stride, gamma, eps, rows, dim, out, out_stride);
  }
  void linear(std::span<const kernels::LinearArgs> layers) override { inner_->linear(layers); }
  void rope_append(const kernels::RopeAppendArgs& args) override { inner_->rope_append(args); }
  void mla_attention(const kernels::MlaAttentionArgs& args) override {
    inner_->mla_attention(args);
  }
  void route(const kernels::RouteArgs& args) override { inner_->route(args); }
  void moe_ffn(const kernels::FfnArgs& args) override { inner_->moe_ffn(args); }
  void add(Dev<float> y, Dev<const float> x, size_t count) override { inner_->add(y, x, count); }
  void gather_rows(Dev<const float> x, int64_t x_stride, std::span<const int32_t> rows, int32_t dim,
                   Dev<float> out, int64_t out_stride) override {
    inner_->gather_rows(x, x_stride, rows, dim, out, out_stride);
  }
  void reduce_logits(Dev<const float> logits, int64_t stride, int32_t rows, int32_t vocab,
                     kernels::RowStats* stats) override {
    inner_->reduce_logits(logits, stride, rows, vocab, stats);
  }
  void weigh(std::span<const float> logits, float max, float scale, float* weights,
             double* sums) override {
    inner_->weigh(logits, max, scale, weights, sums);
  }
  void run_on_threads(void (*body)(void*, int, int), void* context, int tasks) override {
    inner_->run_on_threads(body, context, tasks);
  }

 protected:
  std::unique_ptr<kernels::Device> inner_;
};

}  // namespace dsv3::test
