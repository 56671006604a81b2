// Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1). What is cached per
// token is one latent for all heads; the table's mla_attention attends to latents directly, with
// each head's key and value projections absorbed into its query and output.
#include "runtime/forward/layer.h"

namespace dsv3 {
namespace {

// Of the norms inside the low-rank bottlenecks: the published code leaves them at its default,
// whatever rms_norm_eps is.
constexpr float kBottleneckEps = 1e-6f;

}  // namespace

void mla_block(const LayerContext& c, const BoundLayer& layer, size_t page_offset,
               std::span<const int64_t> first_keys) {
  kernels::Device& device = *c.device;
  Activations& a = *c.a;
  const auto hidden = static_cast<int32_t>(c.config->hidden_size);
  const int64_t q_width = int64_t{c.shape.heads} * c.shape.qk_head_dim();
  const int64_t v_width = int64_t{c.shape.heads} * c.shape.v_head_dim;

  // x [rows, hidden] -> normed [rows, hidden]
  device.rms_norm(a.x.at(), hidden, layer.input_norm, c.config->rms_norm_eps, c.rows, hidden,
                  a.normed.at(), hidden);

  // normed -> kv [rows, kv_lora_rank + rope], and q [rows, heads, nope + rope], directly or through
  // a low-rank bottleneck of its own with a norm in the middle.
  const kernels::LinearArgs kv{layer.kv_a,           a.normed.at(), hidden, a.kv.at(),
                               c.shape.latent_dim(), c.rows,        false};
  if (layer.q_a.empty()) {
    const kernels::LinearArgs both[] = {
        {layer.q_b, a.normed.at(), hidden, a.q.at(), q_width, c.rows, false}, kv};
    device.linear(both);
  } else {
    const int32_t rank = layer.q_a.n;
    const kernels::LinearArgs both[] = {
        {layer.q_a, a.normed.at(), hidden, a.q_a.at(), rank, c.rows, false}, kv};
    device.linear(both);
    device.rms_norm(a.q_a.at(), rank, layer.q_a_norm, kBottleneckEps, c.rows, rank, a.q_a.at(),
                    rank);
    const kernels::LinearArgs up[] = {
        {layer.q_b, a.q_a.at(), rank, a.q.at(), q_width, c.rows, false}};
    device.linear(up);
  }

  // Rotates q's and kv's positional parts; the latents go to the pages.
  kernels::RopeAppendArgs append;
  append.shape = c.shape;
  append.sequences = c.sequences;
  append.page_offset = page_offset;
  append.q = a.q.at();
  append.kv = a.kv.at();
  append.gamma = layer.kv_a_norm;
  append.eps = kBottleneckEps;
  append.cos = a.cos.at();
  append.sin = a.sin.at();
  device.rope_append(append);

  // q, latents of all positions up to each row's -> attended [rows, heads, v_head_dim]
  kernels::MlaAttentionArgs attention;
  attention.shape = c.shape;
  attention.page_offset = page_offset;
  attention.softmax_scale = c.softmax_scale;
  attention.q = a.q.at();
  attention.w_uk = layer.w_uk;
  attention.w_uv = layer.w_uv;
  attention.out = a.attended.at();
  // One call for neighbours that begin at the same key; in the main layers that is all of them.
  const auto key_of = [&](size_t i) { return first_keys.empty() ? 0 : first_keys[i]; };
  for (size_t i = 0, end = 0; i < c.sequences.size(); i = end) {
    for (end = i + 1; end < c.sequences.size() && key_of(end) == key_of(i);) ++end;
    attention.sequences = c.sequences.subspan(i, end - i);
    attention.first_key = key_of(i);
    device.mla_attention(attention);
  }

  // x += W_o attended
  const kernels::LinearArgs out[] = {
      {layer.o, a.attended.at(), v_width, a.x.at(), hidden, c.rows, true}};
  device.linear(out);
}

}  // namespace dsv3
