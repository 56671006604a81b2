#include "runtime/model/config.h"

#include <algorithm>
#include <climits>
#include <limits>

#include "runtime/base/json.h"

namespace dsv3 {
namespace {

// What was found, short enough for a message.
std::string brief(const Json& value) {
  if (value.is_object()) return "an object";
  if (value.is_array()) return "an array";
  std::string text = value.dump();
  if (text.size() > 60) text = utf8_prefix(text, 57) + "...";
  return text;
}

// Reads fields of one JSON object; the first error sticks, and what follows it returns defaults.
class Fields {
 public:
  // `path` opens the names of fields in messages ("rope_scaling.").
  Fields(const Json& object, std::string where, std::string path = "")
      : object_(object), where_(std::move(where)), path_(std::move(path)) {}

  // The value, or null when the field is absent or JSON's null.
  const Json* find(const char* key) const {
    const auto it = object_.find(key);
    return it == object_.end() || it->is_null() ? nullptr : &*it;
  }
  bool has(const char* key) const { return object_.find(key) != object_.end(); }

  int64_t integer(const char* key, int64_t fallback) {
    const Json* v = find(key);
    if (v == nullptr) return fallback;
    return integer_value(key, *v);
  }
  int64_t integer_value(const char* key, const Json& v) {
    if (v.is_number_unsigned()) {
      const auto u = v.get<uint64_t>();
      if (u <= static_cast<uint64_t>(INT64_MAX)) return static_cast<int64_t>(u);
    } else if (v.is_number_integer()) {
      return v.get<int64_t>();
    }
    return mismatch(key, v, "an integer"), 0;
  }
  float number(const char* key, double fallback) {
    const Json* v = find(key);
    if (v == nullptr) return static_cast<float>(fallback);
    if (!v->is_number()) return mismatch(key, *v, "a number"), 0.0f;
    const double d = v->get<double>();
    if (!(d >= -std::numeric_limits<float>::max() && d <= std::numeric_limits<float>::max())) {
      return mismatch(key, *v, "a number that fits a float"), 0.0f;
    }
    return static_cast<float>(d);
  }
  bool boolean(const char* key, bool fallback) {
    const Json* v = find(key);
    if (v == nullptr) return fallback;
    if (!v->is_boolean()) return mismatch(key, *v, "true or false"), fallback;
    return v->get<bool>();
  }
  std::string text(const char* key, const char* fallback) {
    const Json* v = find(key);
    if (v == nullptr) return fallback;
    if (!v->is_string()) return mismatch(key, *v, "a string"), fallback;
    return v->get<std::string>();
  }

  void mismatch(const char* key, const Json& found, const char* expected) {
    error(Code::kCorrupt, key, brief(found), expected);
  }
  void unsupported(const char* key, const std::string& found, const char* expected) {
    error(Code::kUnsupported, key, format("\"%s\"", utf8_prefix(found, 60).c_str()), expected);
  }
  void error(Code code, const char* key, const std::string& found, const char* expected) {
    if (!status_.ok()) return;
    const std::string field = path_ + key;
    status_ = make_field_error(code, field.c_str(), "%s: %s is %s, expected %s", where_.c_str(),
                               field.c_str(), found.c_str(), expected);
  }
  void adopt(const Fields& inner) {
    if (status_.ok()) status_ = inner.status_;
  }
  const Status& status() const { return status_; }
  const std::string& where() const { return where_; }

 private:
  const Json& object_;
  std::string where_, path_;
  Status status_;
};

// What the published configuration classes take for a field that config.json does not have. kimi_k2
// derives from the V3 class.
struct Defaults {
  int64_t vocab_size, hidden_size, intermediate_size, moe_intermediate_size, num_hidden_layers,
      num_attention_heads, n_shared_experts, n_routed_experts, num_experts_per_tok,
      first_k_dense_replace, n_group, topk_group, max_position_embeddings;
  double routed_scaling_factor;
  bool norm_topk_prob;
  const char *topk_method, *scoring_func;
  int32_t bos, eos;
};
constexpr Defaults kV2Defaults{102400, 4096,     11008,     1407,   30,    32,   0,
                               0,      0,        0,         1,      1,     2048, 1.0,
                               false,  "greedy", "softmax", 100000, 100001};
constexpr Defaults kV3Defaults{129280, 7168, 18432, 2048, 61,   128,        1,         256, 8, 3,
                               8,      4,    4096,  2.5,  true, "noaux_tc", "sigmoid", 0,   1};

void read_sizes(Fields& f, const Defaults& d, ModelConfig* c) {
  c->vocab_size = f.integer("vocab_size", d.vocab_size);
  c->hidden_size = f.integer("hidden_size", d.hidden_size);
  c->intermediate_size = f.integer("intermediate_size", d.intermediate_size);
  c->moe_intermediate_size = f.integer("moe_intermediate_size", d.moe_intermediate_size);
  c->num_hidden_layers = f.integer("num_hidden_layers", d.num_hidden_layers);
  c->num_nextn_predict_layers = f.integer("num_nextn_predict_layers", 0);
  c->num_attention_heads = f.integer("num_attention_heads", d.num_attention_heads);
  // null means "no q-LoRA"; absent means the class's default.
  c->q_lora_rank = f.integer("q_lora_rank", f.has("q_lora_rank") ? 0 : 1536);
  if (f.find("q_lora_rank") != nullptr && c->q_lora_rank <= 0) {
    f.mismatch("q_lora_rank", *f.find("q_lora_rank"), "null or a positive integer");
  }
  c->kv_lora_rank = f.integer("kv_lora_rank", 512);
  c->qk_nope_head_dim = f.integer("qk_nope_head_dim", 128);
  c->qk_rope_head_dim = f.integer("qk_rope_head_dim", 64);
  c->v_head_dim = f.integer("v_head_dim", 128);
  c->max_position_embeddings = f.integer("max_position_embeddings", d.max_position_embeddings);
  c->rms_norm_eps = f.number("rms_norm_eps", 1e-6);
  c->tie_word_embeddings = f.boolean("tie_word_embeddings", false);
}

void read_experts(Fields& f, const Defaults& d, ModelConfig* c) {
  const auto or_none = [&f](const char* key, int64_t fallback, int64_t none) {
    return f.integer(key, f.has(key) ? none : fallback);  // null: none
  };
  c->n_routed_experts = or_none("n_routed_experts", d.n_routed_experts, 0);
  c->n_shared_experts = or_none("n_shared_experts", d.n_shared_experts, 0);
  c->num_experts_per_tok = or_none("num_experts_per_tok", d.num_experts_per_tok, 0);
  c->first_k_dense_replace = f.integer("first_k_dense_replace", d.first_k_dense_replace);
  c->moe_layer_freq = f.integer("moe_layer_freq", 1);
  c->n_group = or_none("n_group", d.n_group, 1);
  c->topk_group = or_none("topk_group", d.topk_group, 1);
  c->norm_topk_prob = f.boolean("norm_topk_prob", d.norm_topk_prob);
  c->routed_scaling_factor = f.number("routed_scaling_factor", d.routed_scaling_factor);

  const std::string method = f.text("topk_method", d.topk_method);
  if (method == "greedy" || method == "gready") {  // the V2 class's default is spelt "gready"
    c->topk_method = TopkMethod::kGreedy;
  } else if (method == "group_limited_greedy") {
    c->topk_method = TopkMethod::kGroupLimitedGreedy;
  } else if (method == "noaux_tc") {
    c->topk_method = TopkMethod::kNoAuxTc;
  } else {
    f.unsupported("topk_method", method, "\"greedy\", \"group_limited_greedy\" or \"noaux_tc\"");
  }
  const std::string scoring = f.text("scoring_func", d.scoring_func);
  if (scoring == "sigmoid") {
    c->scoring_func = ScoringFunc::kSigmoid;
  } else if (scoring == "softmax") {
    c->scoring_func = ScoringFunc::kSoftmax;
  } else {
    f.unsupported("scoring_func", scoring, "\"sigmoid\" or \"softmax\"");
  }
  // As the published gates compute: a single expert's weight is never normalised, and V2 either
  // normalises or scales (modeling_deepseek.py of DeepSeek-V2, MoEGate), where V3 does both.
  if (c->num_experts_per_tok == 1) c->norm_topk_prob = false;
  if (c->model_type == "deepseek_v2" && c->norm_topk_prob) c->routed_scaling_factor = 1;
}

void read_rope(Fields& f, ModelConfig* c) {
  c->rope_theta = f.number("rope_theta", 10000);
  if (!f.boolean("rope_interleave", true)) {
    f.error(Code::kUnsupported, "rope_interleave", "false", "true");
  }
  // Newer writers keep rope_theta and the scaling together in rope_parameters.
  // Where both stand, rope_scaling counts (as for the published code), null or empty does not.
  const auto given = [&f](const char* name) {
    const Json* value = f.find(name);
    return value != nullptr && value->is_object() && value->empty() ? nullptr : value;
  };
  const char* key = given("rope_scaling") != nullptr ? "rope_scaling" : "rope_parameters";
  const Json* scaling = given(key);
  if (scaling == nullptr) return;
  if (!scaling->is_object()) return f.mismatch(key, *scaling, "null or an object");
  Fields r(*scaling, f.where(), std::string(key) + ".");
  const char* type_key = r.find("rope_type") != nullptr ? "rope_type" : "type";
  const std::string type = r.text(type_key, "");
  c->rope_theta = r.number("rope_theta", static_cast<double>(c->rope_theta));
  if (type == "yarn") {
    // Absent fields: DeepseekV3YarnRotaryEmbedding's defaults; the softmax scale reads
    // mscale_all_dim with default 0.
    c->yarn.enabled = true;
    if (r.find("factor") == nullptr) r.error(Code::kCorrupt, "factor", "absent", "a number");
    c->yarn.factor = r.number("factor", 1);
    c->yarn.original_max_position_embeddings = r.integer("original_max_position_embeddings", 4096);
    c->yarn.beta_fast = r.number("beta_fast", 32);
    c->yarn.beta_slow = r.number("beta_slow", 1);
    c->yarn.mscale = r.number("mscale", 1);
    c->yarn.mscale_all_dim = r.number("mscale_all_dim", 0);
  } else if (type != "default") {
    r.unsupported(type_key, type, "\"yarn\" or no scaling");
  }
  f.adopt(r);
}

void read_quantization(Fields& f, ModelConfig* c) {
  const Json* quantization = f.find("quantization_config");
  if (quantization == nullptr) return;
  if (!quantization->is_object()) {
    return f.mismatch("quantization_config", *quantization, "null or an object");
  }
  Fields q(*quantization, f.where(), "quantization_config.");
  const auto expect = [&q](const char* key, const char* fallback, const char* wanted) {
    const std::string found = q.text(key, fallback);
    if (found != wanted) q.unsupported(key, found, format("\"%s\"", wanted).c_str());
  };
  // These two name a scheme for each tensor; what is stored says more, and the planner reads that.
  const std::string method = q.text("quant_method", "");
  if (method == "quark" || method == "compressed-tensors") return f.adopt(q);
  if (method != "fp8") {
    q.unsupported("quant_method", method, "\"fp8\", \"compressed-tensors\" or \"quark\"");
  }
  expect("fmt", "e4m3", "e4m3");
  expect("activation_scheme", "dynamic", "dynamic");
  const std::string scale_fmt = q.text("scale_fmt", "ue8m0");
  if (scale_fmt != "ue8m0" && scale_fmt != "float") {
    q.unsupported("scale_fmt", scale_fmt, "\"ue8m0\" or none");
  }
  const Json* block = q.find("weight_block_size");
  if (block == nullptr) {
    q.error(Code::kUnsupported, "weight_block_size", "absent", "two positive integers");
  } else if (!block->is_array() || block->size() != 2) {
    q.mismatch("weight_block_size", *block, "two positive integers");
  } else {
    c->weight_block_rows = q.integer_value("weight_block_size", (*block)[0]);
    c->weight_block_columns = q.integer_value("weight_block_size", (*block)[1]);
  }
  f.adopt(q);
}

int32_t token_id(Fields& f, const char* key, const Json& value) {
  const int64_t id = f.integer_value(key, value);
  if (id < 0 || id > INT32_MAX) {
    f.mismatch(key, value, "a token id");
    return 0;
  }
  return static_cast<int32_t>(id);
}

void read_eos(Fields& f, ModelConfig* c) {
  const Json* eos = f.find("eos_token_id");
  if (eos == nullptr) return;
  const auto add = [&](const Json& value) {
    const int32_t id = token_id(f, "eos_token_id", value);
    auto& ids = c->eos_token_ids;
    if (std::find(ids.begin(), ids.end(), id) == ids.end()) ids.push_back(id);
  };
  constexpr size_t kMaxEos = 256;
  if (!eos->is_array()) return add(*eos);
  if (eos->size() > kMaxEos) return f.mismatch("eos_token_id", *eos, "at most 256 token ids");
  for (const Json& value : *eos) add(value);
}

}  // namespace

Result<ModelConfig> ModelConfig::from_json(const Json& json, const std::string& where) {
  if (!json.is_object()) {
    return make_error(Code::kCorrupt, "%s: is %s, expected an object", where.c_str(),
                      brief(json).c_str());
  }
  Fields f(json, where);
  ModelConfig c;
  c.model_type = f.text("model_type", "");
  if (c.model_type != "deepseek_v2" && c.model_type != "deepseek_v3" && c.model_type != "kimi_k2") {
    f.unsupported("model_type", c.model_type, "\"deepseek_v2\", \"deepseek_v3\" or \"kimi_k2\"");
    return f.status();
  }
  const Defaults& defaults = c.model_type == "deepseek_v2" ? kV2Defaults : kV3Defaults;
  read_sizes(f, defaults, &c);
  read_experts(f, defaults, &c);
  read_rope(f, &c);
  read_quantization(f, &c);

  const std::string act = f.text("hidden_act", "silu");
  if (act != "silu") f.unsupported("hidden_act", act, "\"silu\"");
  for (const char* key : {"attention_bias", "mlp_bias"}) {
    if (f.boolean(key, false)) f.error(Code::kUnsupported, key, "true", "false");
  }
  c.bos_token_id = defaults.bos;
  if (f.has("bos_token_id")) {
    const Json* bos = f.find("bos_token_id");
    c.bos_token_id = bos == nullptr ? -1 : token_id(f, "bos_token_id", *bos);
  }
  if (f.has("eos_token_id")) {
    read_eos(f, &c);
  } else {
    c.eos_token_ids = {defaults.eos};
  }
  if (!f.status().ok()) return f.status();
  return c;
}

Status ModelConfig::add_generation_config(const Json& json, const std::string& where) {
  if (!json.is_object()) {
    return make_error(Code::kCorrupt, "%s: is %s, expected an object", where.c_str(),
                      brief(json).c_str());
  }
  Fields f(json, where);
  read_eos(f, this);
  return f.status();
}

}  // namespace dsv3
