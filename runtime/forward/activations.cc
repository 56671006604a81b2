#include "runtime/forward/activations.h"

#include <algorithm>
#include <cassert>
#include <initializer_list>

namespace dsv3 {
namespace {

// The buffers that the main layers use, as members, with their floats of one row.
template <class Visit>
void for_each_main_buffer(const ModelConfig& c, Visit visit) {
  const auto hidden = static_cast<size_t>(c.hidden_size);
  const auto heads = static_cast<size_t>(c.num_attention_heads);
  visit(&Activations::x, hidden);
  visit(&Activations::normed, hidden);
  visit(&Activations::q_a, static_cast<size_t>(c.q_lora_rank));
  visit(&Activations::q, heads * static_cast<size_t>(c.qk_head_dim()));
  visit(&Activations::kv, static_cast<size_t>(c.latent_dim()));
  visit(&Activations::attended, heads * static_cast<size_t>(c.v_head_dim));
  visit(&Activations::cos, static_cast<size_t>(c.qk_rope_head_dim / 2));
  visit(&Activations::sin, static_cast<size_t>(c.qk_rope_head_dim / 2));
  visit(&Activations::hidden, hidden);
}

// Every buffer with its number of floats: the one list that allocate() and bytes() share.
template <class Visit>
void for_each_buffer(Activations& a, const ModelConfig& c, int32_t rows, int32_t head_rows,
                     Visit visit) {
  const auto r = static_cast<size_t>(rows), h = static_cast<size_t>(head_rows);
  const auto hidden = static_cast<size_t>(c.hidden_size);
  for_each_main_buffer(
      c, [&](DeviceFloats Activations::*buffer, size_t width) { visit(a.*buffer, r * width); });
  visit(a.head_in, h * hidden);
  visit(a.logits, h * static_cast<size_t>(c.vocab_size));
  if (c.num_nextn_predict_layers > 0) {
    visit(a.previous, r * hidden);
    visit(a.embed_hidden, r * 2 * hidden);
    visit(a.mtp_hidden, r * hidden);
  }
}

}  // namespace

DeviceFloats::~DeviceFloats() {
  if (device_ != nullptr)
    device_->free(kernels::Dev<std::byte>(reinterpret_cast<std::byte*>(data_.get())));
}

Status DeviceFloats::allocate(kernels::Device* device, size_t count) {
  if (count == 0) return {};
  const kernels::Dev<std::byte> p = device->alloc(count * sizeof(float));
  if (!p) {
    return make_memory_error("no device memory for %zu bytes of activations",
                             count * sizeof(float));
  }
  device_ = device;
  data_ = kernels::Dev<float>(reinterpret_cast<float*>(p.get()));
  return {};
}

void DeviceFloats::view(const DeviceFloats& owner, size_t offset) {
  assert(device_ == nullptr);
  data_ = owner.at(offset);
}

Status Activations::allocate(kernels::Device* device, const ModelConfig& config, int32_t rows,
                             int32_t head_rows) {
  Status status;
  for_each_buffer(*this, config, rows, head_rows, [&](DeviceFloats& buffer, size_t count) {
    if (status.ok()) status = buffer.allocate(device, count);
  });
  return status;
}

void Activations::view(const Activations& owner, const ModelConfig& config, int32_t first_row) {
  for_each_main_buffer(config, [&](DeviceFloats Activations::*buffer, size_t width) {
    (this->*buffer).view(owner.*buffer, static_cast<size_t>(first_row) * width);
  });
}

uint64_t Activations::bytes(const ModelConfig& config, int32_t rows, int32_t head_rows) {
  Activations none;
  uint64_t floats = 0;
  for_each_buffer(none, config, rows, head_rows,
                  [&](DeviceFloats&, size_t count) { floats += count; });
  return floats * sizeof(float);
}

kernels::MlaShape mla_shape(const ModelConfig& config) {
  kernels::MlaShape shape;
  shape.heads = static_cast<int32_t>(config.num_attention_heads);
  shape.kv_lora_rank = static_cast<int32_t>(config.kv_lora_rank);
  shape.qk_nope_head_dim = static_cast<int32_t>(config.qk_nope_head_dim);
  shape.qk_rope_head_dim = static_cast<int32_t>(config.qk_rope_head_dim);
  shape.v_head_dim = static_cast<int32_t>(config.v_head_dim);
  return shape;
}

kernels::Limits device_limits(const ModelConfig& c, int32_t rows) {
  const int64_t q_width = c.num_attention_heads * c.qk_head_dim();
  const int64_t v_width = c.num_attention_heads * c.v_head_dim;
  kernels::Limits limits;
  limits.rows = rows;
  limits.hidden = static_cast<int32_t>(c.hidden_size);
  limits.linear_k = static_cast<int32_t>(
      std::max({c.hidden_size * (c.num_nextn_predict_layers > 0 ? 2 : 1), c.q_lora_rank, v_width}));
  limits.linear_n = static_cast<int32_t>(std::max(
      {c.hidden_size, c.q_lora_rank, q_width, c.latent_dim(), c.vocab_size, c.n_routed_experts}));
  limits.ffn_width = static_cast<int32_t>(
      std::max({c.intermediate_size, c.moe_intermediate_size, c.shared_width()}));
  limits.ffn_slots = static_cast<int32_t>(std::max<int64_t>(c.num_experts_per_tok + 1, 1));
  limits.ffn_slot_width = std::max(
      c.intermediate_size, c.num_experts_per_tok * c.moe_intermediate_size + c.shared_width());
  limits.experts = static_cast<int32_t>(c.n_routed_experts);
  limits.mla = mla_shape(c);
  return limits;
}

}  // namespace dsv3
