// The rules that the rest of the library relies on: after validate() every dimension is positive
// and fits an int32, every product of dimensions fits an int64, and the whole model fits a file.
#include <cmath>

#include "runtime/model/config.h"

namespace dsv3 {
namespace {

// Far above anything published (V3: 61 layers, 256 experts, 671e9 parameters), and small enough
// that no arithmetic on accepted values overflows.
constexpr int64_t kMaxDim = int64_t{1} << 24;
constexpr int64_t kMaxRows = int64_t{1} << 30;  // heads * head_dim and the like
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxMtp = 16;
constexpr int64_t kMaxHeads = 1 << 14;
constexpr int64_t kMaxExperts = 1 << 14;
constexpr int64_t kMaxPositions = int64_t{1} << 30;
constexpr double kMaxParameters = 17592186044416.0;  // 2^44

class Rules {
 public:
  explicit Rules(const std::string& where) : where_(where) {}

  void range(const char* field, int64_t value, int64_t low, int64_t high) {
    if (value >= low && value <= high) return;
    fail(field, "%s: %s is %lld, expected %lld to %lld", where_.c_str(), field, ll(value), ll(low),
         ll(high));
  }
  void at_most(const char* field, int64_t value, const char* other, int64_t limit) {
    if (value <= limit) return;
    fail(field, "%s: %s is %lld, expected at most %s, which is %lld", where_.c_str(), field,
         ll(value), other, ll(limit));
  }
  void multiple(const char* field, int64_t value, const char* other, int64_t divisor) {
    if (divisor > 0 && value % divisor == 0) return;
    fail(field, "%s: %s is %lld, expected a multiple of %s, which is %lld", where_.c_str(), field,
         ll(value), other, ll(divisor));
  }
  // low < value <= high, or low <= value with `closed`.
  void real(const char* field, float value, float low, bool closed, float high) {
    if (std::isfinite(value) && (closed ? value >= low : value > low) && value <= high) return;
    fail(field, "%s: %s is %g, expected %s %g and at most %g", where_.c_str(), field,
         static_cast<double>(value), closed ? "at least" : "more than", static_cast<double>(low),
         static_cast<double>(high));
  }
  template <class... A>
  void fail(const char* field, const char* fmt, A... args) {
    if (status_.ok()) status_ = Status(Code::kCorrupt, format(fmt, args...), field);
  }
  const std::string& where() const { return where_; }
  bool ok() const { return status_.ok(); }
  Status take() { return std::move(status_); }

  static long long ll(int64_t v) { return static_cast<long long>(v); }

 private:
  const std::string& where_;
  Status status_;
};

void check_sizes(Rules& r, const ModelConfig& c) {
  r.range("vocab_size", c.vocab_size, 1, kMaxDim);
  r.range("hidden_size", c.hidden_size, 1, kMaxDim);
  r.range("intermediate_size", c.intermediate_size, 1, kMaxDim);
  r.range("num_hidden_layers", c.num_hidden_layers, 1, kMaxLayers);
  r.range("num_nextn_predict_layers", c.num_nextn_predict_layers, 0, kMaxMtp);
  r.range("num_attention_heads", c.num_attention_heads, 1, kMaxHeads);
  r.range("q_lora_rank", c.q_lora_rank, 0, kMaxDim);
  r.range("kv_lora_rank", c.kv_lora_rank, 1, kMaxDim);
  r.range("qk_nope_head_dim", c.qk_nope_head_dim, 1, kMaxDim);
  r.range("qk_rope_head_dim", c.qk_rope_head_dim, 2, kMaxDim);
  if (c.qk_rope_head_dim % 2 != 0) {
    r.fail("qk_rope_head_dim", "%s: qk_rope_head_dim is %lld, expected an even number",
           r.where().c_str(), Rules::ll(c.qk_rope_head_dim));
  }
  r.range("v_head_dim", c.v_head_dim, 1, kMaxDim);
  r.range("max_position_embeddings", c.max_position_embeddings, 1, kMaxPositions);
  r.range("weight_block_size[0]", c.weight_block_rows, 1, kMaxDim);
  r.range("weight_block_size[1]", c.weight_block_columns, 8, kMaxDim);
  r.multiple("weight_block_size[1]", c.weight_block_columns, "the kernels' pair of inputs", 2);
  r.real("rms_norm_eps", c.rms_norm_eps, 0, false, 1);
  if (!r.ok()) return;  // products only of what is known to be in range
  r.range("num_attention_heads * (qk_nope_head_dim + qk_rope_head_dim)",
          c.num_attention_heads * c.qk_head_dim(), 1, kMaxRows);
  r.range("num_attention_heads * (qk_nope_head_dim + v_head_dim)",
          c.num_attention_heads * (c.qk_nope_head_dim + c.v_head_dim), 1, kMaxRows);
}

void check_experts(Rules& r, const ModelConfig& c) {
  r.range("n_routed_experts", c.n_routed_experts, 0, kMaxExperts);
  r.range("first_k_dense_replace", c.first_k_dense_replace, 0, kMaxLayers);
  r.at_most("first_k_dense_replace", c.first_k_dense_replace, "num_hidden_layers",
            c.num_hidden_layers);
  r.range("moe_layer_freq", c.moe_layer_freq, 1, kMaxLayers);
  r.range("n_shared_experts", c.n_shared_experts, 0, kMaxExperts);
  r.range("moe_intermediate_size", c.moe_intermediate_size, c.n_routed_experts > 0 ? 1 : 0,
          kMaxDim);
  r.range("num_experts_per_tok", c.num_experts_per_tok, c.n_routed_experts > 0 ? 1 : 0,
          kMaxExperts);
  if (!r.ok()) return;
  // Of a model without experts, too: buffers are sized by it.
  r.range("n_shared_experts * moe_intermediate_size", c.shared_width(), 0, kMaxDim);
  if (c.n_routed_experts == 0) return;
  r.at_most("num_experts_per_tok", c.num_experts_per_tok, "n_routed_experts", c.n_routed_experts);
  r.range("n_group", c.n_group, 1, kMaxExperts);
  r.range("topk_group", c.topk_group, 1, kMaxExperts);
  r.multiple("n_routed_experts", c.n_routed_experts, "n_group", c.n_group);
  r.at_most("topk_group", c.topk_group, "n_group", c.n_group);
  r.real("routed_scaling_factor", c.routed_scaling_factor, 0, false, 1e6f);
  if (c.topk_method == TopkMethod::kGreedy || !r.ok()) return;
  const int64_t group = c.n_routed_experts / c.n_group;
  r.at_most("num_experts_per_tok", c.num_experts_per_tok,
            "the experts of topk_group groups (topk_group * n_routed_experts / n_group)",
            c.topk_group * group);
  if (c.topk_method == TopkMethod::kNoAuxTc && c.n_group > 1 && group < 2) {
    r.fail("n_group",
           "%s: n_group is %lld, which leaves %lld expert per group, expected at least 2",
           r.where().c_str(), Rules::ll(c.n_group), Rules::ll(group));
  }
}

void check_rope(Rules& r, const ModelConfig& c) {
  r.real("rope_theta", c.rope_theta, 1, false, 1e12f);
  if (!c.yarn.enabled) return;
  const YarnConfig& y = c.yarn;
  r.real("rope_scaling.factor", y.factor, 0, false, 1e6f);
  r.range("rope_scaling.original_max_position_embeddings", y.original_max_position_embeddings, 1,
          kMaxPositions);
  r.real("rope_scaling.beta_slow", y.beta_slow, 0, false, 1e6f);
  r.real("rope_scaling.beta_fast", y.beta_fast, y.beta_slow, true, 1e6f);
  r.real("rope_scaling.mscale", y.mscale, 0, true, 1e3f);
  r.real("rope_scaling.mscale_all_dim", y.mscale_all_dim, 0, true, 1e3f);
}

void check_tokens(Rules& r, const ModelConfig& c) {
  if (c.bos_token_id != -1) r.range("bos_token_id", c.bos_token_id, 0, c.vocab_size - 1);
  for (const int32_t id : c.eos_token_ids) r.range("eos_token_id", id, 0, c.vocab_size - 1);
}

// In floating point: exact enough for a limit, and it cannot overflow.
double parameters(const ModelConfig& c) {
  const auto d = [](int64_t v) { return static_cast<double>(v); };
  const double attention =
      d(c.num_attention_heads) *
          (d(c.qk_head_dim()) * d(c.q_lora_rank > 0 ? c.q_lora_rank : c.hidden_size) +
           d(c.qk_nope_head_dim + c.v_head_dim) * d(c.kv_lora_rank) +
           d(c.v_head_dim) * d(c.hidden_size)) +
      d(c.q_lora_rank + c.latent_dim()) * d(c.hidden_size);
  const double dense = 3.0 * d(c.intermediate_size) * d(c.hidden_size);
  const double moe = (3.0 * d(c.n_routed_experts) * d(c.moe_intermediate_size) +
                      3.0 * d(c.shared_width()) + d(c.n_routed_experts)) *
                     d(c.hidden_size);
  double total = 2.0 * d(c.vocab_size) * d(c.hidden_size);
  for (int64_t layer = 0; layer < c.cache_layers(); ++layer) {
    total += attention + (c.is_moe_layer(layer) ? moe : dense);
  }
  return total + d(c.num_nextn_predict_layers) * 2.0 * d(c.hidden_size) * d(c.hidden_size);
}

}  // namespace

Status ModelConfig::validate(const std::string& where) const {
  Rules r(where);
  if (model_type != "deepseek_v2" && model_type != "deepseek_v3" && model_type != "kimi_k2") {
    return make_field_error(Code::kUnsupported, "model_type",
                            "%s: model_type is \"%s\", expected \"deepseek_v2\", "
                            "\"deepseek_v3\" or \"kimi_k2\"",
                            where.c_str(), utf8_prefix(model_type, 60).c_str());
  }
  check_sizes(r, *this);
  Status status = r.take();
  if (!status.ok()) return status;  // later rules compute with what is now known to be in range
  check_experts(r, *this);
  check_rope(r, *this);
  check_tokens(r, *this);
  status = r.take();
  if (!status.ok()) return status;
  const double total = parameters(*this);
  if (total > kMaxParameters) {
    return make_field_error(Code::kCorrupt, "hidden_size",
                            "%s: the sizes make a model of %.3g parameters, expected at most %.3g",
                            where.c_str(), total, kMaxParameters);
  }
  return {};
}

}  // namespace dsv3
