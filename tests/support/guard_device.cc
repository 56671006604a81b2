#include "tests/support/guard_device.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "tests/support/forwarding_device.h"

namespace dsv3::test {
namespace {

using namespace kernels;  // NOLINT: the whole file is one implementation of its interface

class GuardDevice : public ForwardingDevice {
 public:
  using ForwardingDevice::ForwardingDevice;
  ~GuardDevice() override {
    for (const auto& [p, size] : ranges_) munmap(p, size);
  }

  // Lanes' operations would not pass here.
  Result<std::unique_ptr<Device>> make_lane() const override { return std::unique_ptr<Device>(); }

  Dev<std::byte> alloc(size_t bytes) override {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t size = (std::max<size_t>(bytes, 1) + page - 1) / page * page;
    void* p = mmap(nullptr, size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return {};
    ranges_[p] = size;
    return Dev<std::byte>(static_cast<std::byte*>(p));
  }
  void free(Dev<std::byte> p) override { unmap(p.get()); }
  void upload(Dev<std::byte> dst, const void* src, size_t bytes) override {
    const Opened opened(*this);
    inner_->upload(dst, src, bytes);
  }
  void download(void* dst, Dev<const std::byte> src, size_t bytes) override {
    const Opened opened(*this);
    inner_->download(dst, src, bytes);
  }
  void copy(Dev<std::byte> dst, Dev<const std::byte> src, size_t bytes) override {
    const Opened opened(*this);
    inner_->copy(dst, src, bytes);
  }
  void zero(Dev<std::byte> dst, size_t bytes) override {
    const Opened opened(*this);
    inner_->zero(dst, bytes);
  }
  Dev<const std::byte> bind(const void* host, size_t bytes) override {
    const Dev<std::byte> copy = alloc(bytes);
    if (copy && bytes > 0) upload(copy, host, bytes);
    return copy;
  }
  void unbind(Dev<const std::byte> p) override { unmap(const_cast<std::byte*>(p.get())); }

  void embed(const Matrix& table, std::span<const int32_t> ids, Dev<float> out,
             int64_t out_stride) override {
    const Opened opened(*this);
    inner_->embed(table, ids, out, out_stride);
  }
  void rms_norm(Dev<const float> x, int64_t x_stride, Dev<const float> gamma, float eps,
                int32_t rows, int32_t dim, Dev<float> out, int64_t out_stride) override {
    const Opened opened(*this);
    inner_->rms_norm(x, x_stride, gamma, eps, rows, dim, out, out_stride);
  }
  void linear(std::span<const LinearArgs> layers) override {
    const Opened opened(*this);
    inner_->linear(layers);
  }
  void rope_append(const RopeAppendArgs& args) override {
    const Opened opened(*this);
    inner_->rope_append(args);
  }
  void mla_attention(const MlaAttentionArgs& args) override {
    const Opened opened(*this);
    inner_->mla_attention(args);
  }
  void route(const RouteArgs& args) override {
    const Opened opened(*this);
    inner_->route(args);
  }
  void moe_ffn(const FfnArgs& args) override {
    const Opened opened(*this);
    inner_->moe_ffn(args);
  }
  void add(Dev<float> y, Dev<const float> x, size_t count) override {
    const Opened opened(*this);
    inner_->add(y, x, count);
  }
  void gather_rows(Dev<const float> x, int64_t x_stride, std::span<const int32_t> rows, int32_t dim,
                   Dev<float> out, int64_t out_stride) override {
    const Opened opened(*this);
    inner_->gather_rows(x, x_stride, rows, dim, out, out_stride);
  }
  void reduce_logits(Dev<const float> logits, int64_t stride, int32_t rows, int32_t vocab,
                     RowStats* stats) override {
    const Opened opened(*this);
    inner_->reduce_logits(logits, stride, rows, vocab, stats);
  }

 private:
  // All memory readable and writable while one of these lives.
  struct Opened {
    explicit Opened(GuardDevice& d) : device(d) { device.protect(PROT_READ | PROT_WRITE); }
    ~Opened() { device.protect(PROT_NONE); }
    GuardDevice& device;
  };
  void protect(int mode) {
    for (const auto& [p, size] : ranges_) {
      if (mprotect(p, size, mode) != 0) std::abort();
    }
  }
  void unmap(void* p) {
    const auto it = ranges_.find(p);
    if (it == ranges_.end()) return;
    munmap(p, it->second);
    ranges_.erase(it);
  }

  std::map<void*, size_t> ranges_;
};

}  // namespace

std::unique_ptr<Device> make_guard_device(std::unique_ptr<Device> inner) {
  return std::make_unique<GuardDevice>(std::move(inner));
}

}  // namespace dsv3::test
