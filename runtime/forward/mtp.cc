// Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): a module after the last
// layer combines a position's hidden state with the next token's embedding and predicts the token
// after that. Published code takes the embedding first in the concatenation and the hidden state
// after the final norm.
#include <cassert>
#include <cstring>

#include "runtime/forward/model_impl.h"

namespace dsv3 {

using kernels::Dev;

Status ForwardModel::run_mtp(const Step& step, const float* previous_hidden) {
  Impl& m = *impl_;
  const ModelConfig& config = m.config();
  assert(!m.weights.mtp.empty() && step.sequences.size() == 1);
  const BoundMtp& module = m.weights.mtp[0];
  const auto hidden = static_cast<int32_t>(config.hidden_size);
  const auto width = static_cast<size_t>(hidden);
  const size_t row_bytes = width * sizeof(float);
  const float eps = config.rms_norm_eps;
  const auto as_bytes = [](Dev<float> p) {
    return Dev<std::byte>(reinterpret_cast<std::byte*>(p.get()));
  };

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
  const std::span<const kernels::SequenceRows> sequences(&sequence, 1);

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

  // x = W_eh [enorm(embedding); hnorm(previous)]
  m.device->embed(m.weights.embed, tokens, m.a.x.at(), hidden);
  m.device->rms_norm(m.a.x.at(), hidden, module.enorm, eps, rows, hidden, m.a.embed_hidden.at(),
                     2 * int64_t{hidden});
  m.device->rms_norm(m.a.previous.at(), hidden, module.hnorm, eps, rows, hidden,
                     m.a.embed_hidden.at(width), 2 * int64_t{hidden});
  const kernels::LinearArgs combine[] = {{module.eh_proj, m.a.embed_hidden.at(),
                                          2 * int64_t{hidden}, m.a.x.at(), hidden, rows, false}};
  m.device->linear(combine);

  m.upload_rope(rows, sequences);
  const LayerContext context = m.layer_context(rows, sequences);
  mla_block(context, module.layer, m.page_offset(config.num_hidden_layers), /*first_key=*/1);
  ffn_block(context, module.layer, m.load_of(config.num_hidden_layers));

  m.device->rms_norm(m.a.x.at(), hidden, module.head_norm, eps, rows, hidden, m.a.mtp_hidden.at(),
                     hidden);
  return m.device->synchronize();
}

Status ForwardModel::mtp_head(std::span<const int32_t> rows, float* out) {
  Impl& m = *impl_;
  m.mtp_rows.assign(rows.begin(), rows.end());
  for (int32_t& row : m.mtp_rows) row -= m.mtp_skipped;
  return m.head(m.a.mtp_hidden, m.mtp_rows, out);
}

}  // namespace dsv3
