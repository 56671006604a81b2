#include "runtime/forward/binding.h"

namespace dsv3 {

using kernels::Dev;

namespace {

Dev<const float> as_floats(Dev<const std::byte> p) {
  return Dev<const float>(reinterpret_cast<const float*>(p.get()));
}

}  // namespace

BoundWeights::~BoundWeights() {
  for (const auto& binding : bindings_) {
    if (binding) device_->unbind(binding);
  }
}

Status BoundWeights::bind_bytes(const void* host, size_t bytes, Dev<const std::byte>* out) {
  bindings_.emplace_back();  // before the binding: what cannot be remembered must not be made
  *out = device_->bind(host, bytes);
  if (!*out) {
    return make_memory_error("no device memory for %zu bytes of weights", bytes);
  }
  bindings_.back() = *out;
  return {};
}

Status BoundWeights::bind_matrix(const MatrixView& view, kernels::Matrix* out) {
  out->dtype = view.dtype;
  out->layout = view.layout;
  out->n = view.n;
  out->k = view.k;
  out->scale_n = view.scale_n;
  out->scale_k = view.scale_k;
  if (view.empty()) return {};
  DSV3_TRY(bind_bytes(view.data, view.bytes, &out->data));
  if (view.scales != nullptr) {
    Dev<const std::byte> scales;
    DSV3_TRY(bind_bytes(view.scales, view.scale_count() * sizeof(float), &scales));
    out->scales = as_floats(scales);
  }
  return {};
}

Status BoundWeights::bind_vector(const VectorView& view, Dev<const float>* out) {
  if (view.empty()) return {};
  Dev<const std::byte> bytes;
  DSV3_TRY(bind_bytes(view.data, static_cast<size_t>(view.size) * sizeof(float), &bytes));
  *out = as_floats(bytes);
  return {};
}

Status BoundWeights::bind_ffn(const FfnView& view, kernels::FfnWeights* out) {
  DSV3_TRY(bind_matrix(view.gate, &out->gate));
  DSV3_TRY(bind_matrix(view.up, &out->up));
  return bind_matrix(view.down, &out->down);
}

// All experts of a layer are one range of the file: bound once, each matrix is an offset into it.
Status BoundWeights::bind_experts(const ExpertsView& view, std::vector<kernels::FfnWeights>* out) {
  Dev<const std::byte> base;
  DSV3_TRY(bind_bytes(view.base, view.stride * view.experts.size(), &base));
  const auto place = [&](const MatrixView& m) {
    kernels::Matrix bound;
    bound.dtype = m.dtype;
    bound.layout = m.layout;
    bound.n = m.n;
    bound.k = m.k;
    bound.scale_n = m.scale_n;
    bound.scale_k = m.scale_k;
    bound.data = base + static_cast<size_t>(m.data - view.base);
    if (m.scales != nullptr) {
      const auto* scales = reinterpret_cast<const uint8_t*>(m.scales);
      bound.scales = as_floats(base + static_cast<size_t>(scales - view.base));
    }
    return bound;
  };
  out->reserve(view.experts.size());
  for (const FfnView& expert : view.experts) {
    out->push_back({place(expert.gate), place(expert.up), place(expert.down)});
  }
  return {};
}

Status BoundWeights::bind_layer(const LayerWeights& weights, BoundLayer* out) {
  DSV3_TRY(bind_vector(weights.input_norm, &out->input_norm));
  DSV3_TRY(bind_vector(weights.post_norm, &out->post_norm));
  DSV3_TRY(bind_matrix(weights.q_a, &out->q_a));
  DSV3_TRY(bind_vector(weights.q_a_norm, &out->q_a_norm));
  DSV3_TRY(bind_matrix(weights.q_b, &out->q_b));
  DSV3_TRY(bind_matrix(weights.kv_a, &out->kv_a));
  DSV3_TRY(bind_vector(weights.kv_a_norm, &out->kv_a_norm));
  DSV3_TRY(bind_matrix(weights.o, &out->o));
  out->w_uk.resize(weights.w_uk.size());
  out->w_uv.resize(weights.w_uv.size());
  for (size_t h = 0; h < weights.w_uk.size(); ++h) {
    DSV3_TRY(bind_matrix(weights.w_uk[h], &out->w_uk[h]));
    DSV3_TRY(bind_matrix(weights.w_uv[h], &out->w_uv[h]));
  }
  out->moe = weights.moe;
  if (!weights.moe) return bind_ffn(weights.dense, &out->dense);
  DSV3_TRY(bind_matrix(weights.router, &out->router));
  DSV3_TRY(bind_vector(weights.router_bias, &out->router_bias));
  out->has_shared = !weights.shared.gate.empty();
  if (out->has_shared) DSV3_TRY(bind_ffn(weights.shared, &out->shared));
  return bind_experts(weights.experts, &out->experts);
}

Status BoundWeights::bind(const ModelWeights& weights) {
  DSV3_TRY(bind_matrix(weights.embed, &embed));
  DSV3_TRY(bind_matrix(weights.head, &head));
  DSV3_TRY(bind_vector(weights.final_norm, &final_norm));
  layers.resize(weights.layers.size());
  for (size_t i = 0; i < layers.size(); ++i) DSV3_TRY(bind_layer(weights.layers[i], &layers[i]));
  mtp.resize(weights.mtp.size());
  for (size_t i = 0; i < mtp.size(); ++i) {
    const MtpWeights& from = weights.mtp[i];
    DSV3_TRY(bind_vector(from.enorm, &mtp[i].enorm));
    DSV3_TRY(bind_vector(from.hnorm, &mtp[i].hnorm));
    DSV3_TRY(bind_matrix(from.eh_proj, &mtp[i].eh_proj));
    DSV3_TRY(bind_layer(from.layer, &mtp[i].layer));
    DSV3_TRY(bind_vector(from.head_norm, &mtp[i].head_norm));
  }
  return {};
}

}  // namespace dsv3
