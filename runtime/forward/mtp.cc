// Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): a module after the last
// layer combines a position's hidden state with the next token's embedding and predicts the token
// after that. Published code takes the embedding first in the concatenation and the hidden state
// after the final norm.
#include <cassert>
#include <cstring>

#include "runtime/forward/model_impl.h"

namespace dsv3 {

using kernels::Dev;

namespace {

Dev<std::byte> as_bytes(Dev<float> p) {
  return Dev<std::byte>(reinterpret_cast<std::byte*>(p.get()));
}

}  // namespace

Status ForwardModel::Impl::mtp_module(std::span<const int32_t> tokens,
                                      std::span<const kernels::SequenceRows> sequences,
                                      std::span<const int64_t> first_keys) {
  const BoundMtp& module = weights.mtp[0];
  const auto rows = static_cast<int32_t>(tokens.size());
  const auto hidden = static_cast<int32_t>(config().hidden_size);
  const float eps = config().rms_norm_eps;

  // x = W_eh [enorm(embedding); hnorm(previous)]
  device->embed(weights.embed, tokens, a.x.at(), hidden);
  device->rms_norm(a.x.at(), hidden, module.enorm, eps, rows, hidden, a.embed_hidden.at(),
                   2 * int64_t{hidden});
  device->rms_norm(a.previous.at(), hidden, module.hnorm, eps, rows, hidden,
                   a.embed_hidden.at(static_cast<size_t>(hidden)), 2 * int64_t{hidden});
  const kernels::LinearArgs combine[] = {
      {module.eh_proj, a.embed_hidden.at(), 2 * int64_t{hidden}, a.x.at(), hidden, rows, false}};
  device->linear(combine);

  upload_rope(rows, sequences);
  const LayerContext context = layer_context(rows, sequences);
  const int64_t layer = config().num_hidden_layers;
  mla_block(context, module.layer, page_offset(layer), first_keys);
  ffn_block(context, module.layer, load.data() + load_offset(layer));

  device->rms_norm(a.x.at(), hidden, module.head_norm, eps, rows, hidden, a.mtp_hidden.at(),
                   hidden);
  return device->synchronize();
}

Status ForwardModel::run_mtp(const Step& step, const float* previous_hidden) {
  Impl& m = *impl_;
  assert(!m.weights.mtp.empty() && step.sequences.size() == 1);
  const auto width = static_cast<size_t>(m.config().hidden_size);
  const size_t row_bytes = width * sizeof(float);

  // Position 0 has no hidden state before it: its row is left out, and slot 0 stays empty.
  kernels::SequenceRows sequence = step.sequences[0];
  const bool skip = sequence.first_position == 0;
  assert(skip || previous_hidden != nullptr);
  m.mtp_skipped = skip ? 1 : 0;
  const auto tokens = step.tokens.subspan(skip ? 1 : 0);
  const auto rows = static_cast<int32_t>(tokens.size());
  if (rows == 0) return {};
  sequence.row_begin = 0;
  sequence.rows = rows;
  sequence.first_position += m.mtp_skipped;

  // previous [rows, hidden]: the hidden state one position before each row.
  size_t filled = 0;
  if (!skip) {
    m.device->upload(as_bytes(m.a.previous.at()), previous_hidden, row_bytes);
    filled = 1;
  }
  const size_t from_run = static_cast<size_t>(rows) - filled;
  if (from_run > 0) {
    m.device->copy(as_bytes(m.a.previous.at(filled * width)), as_bytes(m.a.hidden.at()),
                   from_run * row_bytes);
  }
  constexpr int64_t kFirstKeys[] = {1};
  return m.mtp_module(tokens, std::span(&sequence, 1), kFirstKeys);
}

Status ForwardModel::run_mtp(const MtpStep& step) {
  Impl& m = *impl_;
  assert(!m.weights.mtp.empty() && step.tokens.size() == step.hidden_rows.size());
  m.mtp_skipped = 0;
  const auto hidden = static_cast<int32_t>(m.config().hidden_size);
  // x still holds the residual stream of the rows that ran last, from before their norm.
  const DeviceFloats& after = step.chained ? m.a.mtp_hidden : m.a.hidden;
  const DeviceFloats& source = step.before_norm ? m.a.x : after;
  m.device->gather_rows(source.at(), hidden, step.hidden_rows, hidden, m.a.previous.at(), hidden);
  return m.mtp_module(step.tokens, step.sequences, step.first_keys);
}

Status ForwardModel::mtp_guess(std::span<const int32_t> rows, Guess* out) {
  Impl& m = *impl_;
  DSV3_TRY(m.compute_logits(m.a.mtp_hidden, rows));
  for (size_t r = 0; r < rows.size(); ++r) {
    out[r] = {m.stats[r].argmax, static_cast<float>(1 / m.stats[r].sum_exp)};
  }
  return {};
}

Status ForwardModel::mtp_head(std::span<const int32_t> rows, float* out) {
  Impl& m = *impl_;
  m.mtp_rows.assign(rows.begin(), rows.end());
  for (int32_t& row : m.mtp_rows) row -= m.mtp_skipped;
  return m.head(m.a.mtp_hidden, m.mtp_rows, out);
}

}  // namespace dsv3
