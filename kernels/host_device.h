// What every device whose memory is the host's has in common: ref/ and cpu/ derive from this.
#pragma once

#include "kernels/kernels.h"

namespace dsv3::kernels {

class HostDevice : public Device {
 public:
  Dev<std::byte> alloc(size_t bytes) override;
  void free(Dev<std::byte> p) override;
  void upload(Dev<std::byte> dst, const void* src, size_t bytes) override;
  void download(void* dst, Dev<const std::byte> src, size_t bytes) override;
  void copy(Dev<std::byte> dst, Dev<const std::byte> src, size_t bytes) override;
  void zero(Dev<std::byte> dst, size_t bytes) override;
  Dev<const std::byte> bind(const void* host, size_t bytes) override;
  void unbind(Dev<const std::byte> p) override;
  Status synchronize() override;
  void run_on_threads(void (*body)(void*, int, int), void* context, int tasks) override;
};

// The experts of one row, best first, and their weights: the part of route() after the scores'
// dot products. logits: [experts] gate x, overwritten with the unbiased scores. scratch: [experts +
// groups]. Shared by all host devices, so that they agree on every tie.
void route_row(const RouteArgs& args, float* logits, float* scratch, int32_t* ids, float* weights);

// Statistics of one row of logits.
RowStats reduce_row(const float* logits, int32_t vocab);

}  // namespace dsv3::kernels
