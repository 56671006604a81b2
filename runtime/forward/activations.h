// The device buffers that the layers of one step work in, sized once for the largest step.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/base/status.h"
#include "runtime/model/config.h"

namespace dsv3 {

// An array of floats in device memory, its own or another's.
class DeviceFloats {
 public:
  DeviceFloats() = default;
  ~DeviceFloats();
  DeviceFloats(const DeviceFloats&) = delete;
  DeviceFloats& operator=(const DeviceFloats&) = delete;
  Status allocate(kernels::Device* device, size_t count);
  // What another array holds from `offset` on, which stays its owner.
  void view(const DeviceFloats& owner, size_t offset);
  kernels::Dev<float> at(size_t offset = 0) const { return data_ + offset; }

 private:
  kernels::Device* device_ = nullptr;  // to free it with; null: another's, or none
  kernels::Dev<float> data_;
};

struct Activations {
  DeviceFloats x;         // [rows, hidden] the residual stream
  DeviceFloats normed;    // [rows, hidden] a block's normalised input
  DeviceFloats q_a;       // [rows, q_lora_rank]
  DeviceFloats q;         // [rows, heads, qk_nope_head_dim + qk_rope_head_dim]
  DeviceFloats kv;        // [rows, kv_lora_rank + qk_rope_head_dim]
  DeviceFloats attended;  // [rows, heads, v_head_dim]
  DeviceFloats cos, sin;  // [rows, qk_rope_head_dim / 2]
  DeviceFloats hidden;    // [rows, hidden] after the final norm
  DeviceFloats head_in;   // [head_rows, hidden]
  DeviceFloats logits;    // [head_rows, vocab]
  // MTP only:
  DeviceFloats previous;      // [rows, hidden] the hidden state one position earlier
  DeviceFloats embed_hidden;  // [rows, 2 * hidden] normalised embedding, normalised hidden state
  DeviceFloats mtp_hidden;    // [rows, hidden] after shared_head.norm

  Status allocate(kernels::Device* device, const ModelConfig& config, int32_t rows,
                  int32_t head_rows);
  // The rows of `owner` from `first_row` on, as far as the main layers use them.
  void view(const Activations& owner, const ModelConfig& config, int32_t first_row);
  static uint64_t bytes(const ModelConfig& config, int32_t rows, int32_t head_rows);
};

kernels::MlaShape mla_shape(const ModelConfig& config);
// What the device needs to know to size its scratch.
kernels::Limits device_limits(const ModelConfig& config, int32_t rows);

}  // namespace dsv3
