// The dimensions and choices of a model, as its config.json states them and as a .dsv3 file repeats
// them. Everything else in the library may rely on validate() having passed.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/base/json_fwd.h"
#include "runtime/base/status.h"

namespace dsv3 {

enum class ScoringFunc : uint8_t { kSigmoid = 0, kSoftmax = 1 };
enum class TopkMethod : uint8_t { kGreedy = 0, kGroupLimitedGreedy = 1, kNoAuxTc = 2 };

struct YarnConfig {
  bool enabled = false;
  float factor = 1;
  int64_t original_max_position_embeddings = 0;
  float beta_fast = 32;
  float beta_slow = 1;
  float mscale = 1;
  float mscale_all_dim = 0;
};

struct ModelConfig {
  std::string model_type;  // deepseek_v2, deepseek_v3, kimi_k2
  int64_t vocab_size = 0;
  int64_t hidden_size = 0;
  int64_t intermediate_size = 0;      // of the dense layers
  int64_t moe_intermediate_size = 0;  // of one routed expert
  int64_t num_hidden_layers = 0;
  int64_t num_nextn_predict_layers = 0;
  int64_t num_attention_heads = 0;
  int64_t q_lora_rank = 0;  // 0: queries come straight from q_proj
  int64_t kv_lora_rank = 0;
  int64_t qk_nope_head_dim = 0;
  int64_t qk_rope_head_dim = 0;
  int64_t v_head_dim = 0;
  int64_t n_routed_experts = 0;  // 0: every layer is dense
  int64_t n_shared_experts = 0;
  int64_t num_experts_per_tok = 0;
  int64_t first_k_dense_replace = 0;
  int64_t moe_layer_freq = 1;
  int64_t n_group = 1;
  int64_t topk_group = 1;
  ScoringFunc scoring_func = ScoringFunc::kSoftmax;
  TopkMethod topk_method = TopkMethod::kGreedy;
  bool norm_topk_prob = false;
  float routed_scaling_factor = 1;
  float rms_norm_eps = 1e-6f;
  float rope_theta = 10000;
  YarnConfig yarn;
  int64_t max_position_embeddings = 0;
  bool tie_word_embeddings = false;
  int32_t bos_token_id = -1;           // -1: none
  std::vector<int32_t> eos_token_ids;  // config.json and generation_config.json, in that order
  // The checkpoint's own FP8 block, [rows, columns]; 128 x 128 in everything published.
  int64_t weight_block_rows = 128;
  int64_t weight_block_columns = 128;

  bool is_moe_layer(int64_t layer) const {
    return n_routed_experts > 0 && layer >= first_k_dense_replace && layer % moe_layer_freq == 0;
  }
  int64_t qk_head_dim() const { return qk_nope_head_dim + qk_rope_head_dim; }
  int64_t latent_dim() const { return kv_lora_rank + qk_rope_head_dim; }
  int64_t shared_width() const { return n_shared_experts * moe_intermediate_size; }
  // All layers that own latents: the main ones and the MTP modules.
  int64_t cache_layers() const { return num_hidden_layers + num_nextn_predict_layers; }

  // Reads config.json (an object); `where` is the file's name for messages.
  static Result<ModelConfig> from_json(const Json& json, const std::string& where);
  // Adds what generation_config.json says: further end-of-sequence tokens.
  Status add_generation_config(const Json& json, const std::string& where);
  // Every rule that the rest of the library relies on: positive sizes, divisibility, ranges, totals
  // that fit. Names the field, its value and what was expected.
  Status validate(const std::string& where) const;
};

}  // namespace dsv3
