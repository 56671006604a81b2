// A device that measures another: every operation goes through to it and is timed, and what it had
// to read and multiply is counted. Without it nothing is measured and nothing costs.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "kernels/kernels.h"

namespace dsv3::kernels {

// One kind of operation: its name, and for matrices their sizes ("linear 2048x2048 F8_E4M3").
struct OperationProfile {
  std::string name;
  int64_t calls = 0;
  double seconds = 0;
  double bytes = 0;  // weights, latents and activations it had to read, at the least
  double flops = 0;  // two per weight and row
};

class ProfilingDevice final : public Device {
 public:
  explicit ProfilingDevice(Device* inner) : inner_(inner) {}

  // What was counted since the last clear(), the longest first.
  std::vector<OperationProfile> profile() const;
  void clear() { operations_.clear(); }

  const char* name() const override { return inner_->name(); }
  int threads() const override { return inner_->threads(); }
  Dev<std::byte> alloc(size_t bytes) override { return inner_->alloc(bytes); }
  void free(Dev<std::byte> p) override { inner_->free(p); }
  void upload(Dev<std::byte> dst, const void* src, size_t bytes) override;
  void download(void* dst, Dev<const std::byte> src, size_t bytes) override;
  void copy(Dev<std::byte> dst, Dev<const std::byte> src, size_t bytes) override;
  void zero(Dev<std::byte> dst, size_t bytes) override;
  Dev<const std::byte> bind(const void* host, size_t bytes) override {
    return inner_->bind(host, bytes);
  }
  void unbind(Dev<const std::byte> p) override { inner_->unbind(p); }
  Status reserve(const Limits& limits) override { return inner_->reserve(limits); }
  uint64_t scratch_bytes(const Limits& limits, int threads) const override {
    return inner_->scratch_bytes(limits, threads);
  }
  Status synchronize() override { return inner_->synchronize(); }
  size_t latent_page_bytes(const MlaShape& shape) const override {
    return inner_->latent_page_bytes(shape);
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
  void run_on_threads(void (*body)(void*, int, int), void* context, int tasks) override {
    inner_->run_on_threads(body, context, tasks);
  }

 private:
  // Operations are told apart by numbers; names are made when somebody asks.
  struct Key {
    const char* operation = "";
    int32_t matrices = 0;
    Matrix first, second;  // sizes and types only
    bool operator==(const Key& o) const;
  };
  struct Entry {
    Key key;
    OperationProfile counts;
  };
  template <class Call>
  void timed(const Key& key, double bytes, double flops, const Call& call);
  static std::string name_of(const Key& key);

  Device* inner_;
  std::vector<Entry> operations_;
};

}  // namespace dsv3::kernels
