#include "runtime/api/handles.h"
#include "runtime/base/json.h"

using namespace dsv3;       // NOLINT: the C boundary translates between the two
using namespace dsv3::api;  // NOLINT

namespace {

constexpr dsv3_model_options kModelDefaults = {.struct_size = sizeof(dsv3_model_options),
                                               .residency = DSV3_RESIDENCY_MAP,
                                               .verify = 0,
                                               .reserved = 0,
                                               .progress = nullptr,
                                               .progress_user = nullptr,
                                               .cancel = nullptr};

std::string hex(std::span<const uint8_t> bytes) {
  std::string out;
  for (const uint8_t b : bytes) out += format("%02x", b);
  return out;
}

void write_config(const ModelConfig& c, JsonWriter* out) {
  out->open_field("config", '{');
  out->field("model_type", c.model_type);
  out->field("vocab_size", c.vocab_size);
  out->field("hidden_size", c.hidden_size);
  out->field("intermediate_size", c.intermediate_size);
  out->field("moe_intermediate_size", c.moe_intermediate_size);
  out->field("num_hidden_layers", c.num_hidden_layers);
  out->field("num_nextn_predict_layers", c.num_nextn_predict_layers);
  out->field("num_attention_heads", c.num_attention_heads);
  out->field("q_lora_rank", c.q_lora_rank == 0 ? Json(nullptr) : Json(c.q_lora_rank));
  out->field("kv_lora_rank", c.kv_lora_rank);
  out->field("qk_nope_head_dim", c.qk_nope_head_dim);
  out->field("qk_rope_head_dim", c.qk_rope_head_dim);
  out->field("v_head_dim", c.v_head_dim);
  out->field("n_routed_experts", c.n_routed_experts);
  out->field("n_shared_experts", c.n_shared_experts);
  out->field("num_experts_per_tok", c.num_experts_per_tok);
  out->field("first_k_dense_replace", c.first_k_dense_replace);
  out->field("moe_layer_freq", c.moe_layer_freq);
  out->field("n_group", c.n_group);
  out->field("topk_group", c.topk_group);
  out->field("scoring_func", c.scoring_func == ScoringFunc::kSigmoid ? "sigmoid" : "softmax");
  out->field("topk_method", c.topk_method == TopkMethod::kGreedy ? "greedy"
                            : c.topk_method == TopkMethod::kGroupLimitedGreedy
                                ? "group_limited_greedy"
                                : "noaux_tc");
  out->field("norm_topk_prob", c.norm_topk_prob);
  out->field("routed_scaling_factor", c.routed_scaling_factor);
  out->field("rms_norm_eps", c.rms_norm_eps);
  out->field("rope_theta", c.rope_theta);
  if (c.yarn.enabled) {
    out->open_field("rope_scaling", '{');
    out->field("type", "yarn");
    out->field("factor", c.yarn.factor);
    out->field("original_max_position_embeddings", c.yarn.original_max_position_embeddings);
    out->field("beta_fast", c.yarn.beta_fast);
    out->field("beta_slow", c.yarn.beta_slow);
    out->field("mscale", c.yarn.mscale);
    out->field("mscale_all_dim", c.yarn.mscale_all_dim);
    out->close('}');
  } else {
    out->field("rope_scaling", nullptr);
  }
  out->field("max_position_embeddings", c.max_position_embeddings);
  out->field("tie_word_embeddings", c.tie_word_embeddings);
  out->field("bos_token_id", c.bos_token_id < 0 ? Json(nullptr) : Json(c.bos_token_id));
  out->list_field("eos_token_id", c.eos_token_ids);
  out->close('}');
}

void write_tokenizer(const Model& model, JsonWriter* out) {
  if (!model.has_tokenizer()) return out->field("tokenizer", nullptr);
  const Tokenizer& t = model.tokenizer();
  const auto id = [](std::optional<int32_t> v) { return v ? Json(*v) : Json(nullptr); };
  out->open_field("tokenizer", '{');
  out->field("vocab_size", t.vocab_size());
  out->field("bos_id", id(t.bos_id()));
  out->field("eos_id", id(t.eos_id()));
  out->field("add_bos", t.add_bos());
  out->close('}');
}

std::string model_json(const Model& model) {
  JsonWriter writer;
  JsonWriter* const out = &writer;
  out->open('{');
  out->field("path", model.path());  // may hold bytes that are not UTF-8
  out->field("fingerprint", hex(model.fingerprint().bytes));
  out->field("parameters", model.parameters());
  out->field("file_bytes", model.file_bytes());
  out->field("weight_bytes", model.weight_bytes());
  out->field("active_bytes_per_token", model.active_bytes_per_token());
  out->field("chat_template", chat_template_name(model.chat_template()));
  write_config(model.config(), out);
  write_tokenizer(model, out);
  out->open_field("tensors", '[');
  for (const TensorInfo& t : model.tensors()) {
    out->open('{');
    out->field("name", t.name);
    out->field("dtype", t.dtype);
    out->list_field("shape", t.shape);
    out->field("offset", t.offset);
    out->field("bytes", t.bytes);
    out->field("xxh3", format("%016llx", static_cast<unsigned long long>(t.xxh3)));
    out->close('}');
  }
  out->close(']');
  out->close('}');
  return writer.take();
}

bool has_fim(const Model& model) {
  std::vector<int32_t> tokens;
  return model.has_tokenizer() && encode_fim(model.tokenizer(), "", "", &tokens).ok();
}

}  // namespace

extern "C" {

void dsv3_model_options_init(dsv3_model_options* options, uint32_t struct_size) {
  init_struct(options, struct_size, kModelDefaults);
}

dsv3_status dsv3_model_open(const char* path, const dsv3_model_options* options, dsv3_model** out,
                            dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    if (path == nullptr) return invalid("path", "path is NULL");
    DSV3_TRY(check_out(out, "out"));
    dsv3_model_options o = kModelDefaults;
    if (options != nullptr) DSV3_TRY(read_struct(options, "dsv3_model_options", &o));
    DSV3_TRY(check_reserved(o, "dsv3_model_options"));
    if (o.residency != DSV3_RESIDENCY_MAP && o.residency != DSV3_RESIDENCY_COPY) {
      return invalid("residency", format("residency is %d, expected DSV3_RESIDENCY_MAP or "
                                         "DSV3_RESIDENCY_COPY",
                                         o.residency));
    }
    DSV3_TRY(check_flag_value(o.verify, "verify"));
    std::shared_ptr<CancelToken> cancel;
    DSV3_TRY(read_cancel(o.cancel, &cancel));
    if (cancel != nullptr && cancel->cancelled.load(std::memory_order_relaxed)) {
      return Status(Code::kCancelled, "opening was cancelled before it began", "cancel");
    }
    ProgressCall progress(o.progress, o.progress_user, cancel);
    OpenOptions open;
    open.residency = o.residency == DSV3_RESIDENCY_COPY ? Residency::kCopy : Residency::kMap;
    open.verify = o.verify == 1;
    open.progress = progress.progress();
    auto handle = std::make_unique<dsv3_model>();
    Result<std::shared_ptr<const Model>> model = Model::open(path, open);
    if (!model.ok()) return progress.result(model.status());
    handle->model = std::move(*model);
    *out = handle.release();
    return {};
  });
}

void dsv3_model_free(dsv3_model* model) { free_handle(model, dsv3_model::kMagic); }

dsv3_status dsv3_model_get_info(const dsv3_model* model, dsv3_model_info* info,
                                dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(model, "model"));
    DSV3_TRY(check_out_struct(info, "dsv3_model_info"));
    const Model& m = *model->model;
    const ModelConfig& c = m.config();
    dsv3_model_info i = {};
    i.vocab_size = static_cast<int32_t>(c.vocab_size);
    i.hidden_size = static_cast<int32_t>(c.hidden_size);
    i.num_hidden_layers = static_cast<int32_t>(c.num_hidden_layers);
    i.num_nextn_predict_layers = static_cast<int32_t>(c.num_nextn_predict_layers);
    i.n_routed_experts = static_cast<int32_t>(c.n_routed_experts);
    i.num_experts_per_tok = static_cast<int32_t>(c.num_experts_per_tok);
    i.kv_lora_rank = static_cast<int32_t>(c.kv_lora_rank);
    i.qk_rope_head_dim = static_cast<int32_t>(c.qk_rope_head_dim);
    i.bos_token_id = c.bos_token_id;
    i.eos_token_id = c.eos_token_ids.empty() ? -1 : c.eos_token_ids.front();
    i.has_tokenizer = m.has_tokenizer() ? 1 : 0;
    i.has_fim = has_fim(m) ? 1 : 0;
    i.max_position_embeddings = c.max_position_embeddings;
    i.parameters = m.parameters();
    i.file_bytes = m.file_bytes();
    i.weight_bytes = m.weight_bytes();
    i.active_bytes_per_token = m.active_bytes_per_token();
    i.model_type = c.model_type.c_str();
    i.chat_template = chat_template_name(m.chat_template());
    i.path = m.path().c_str();
    std::memcpy(i.fingerprint, m.fingerprint().bytes.data(), sizeof i.fingerprint);
    fill_struct(info, i);
    return {};
  });
}

dsv3_status dsv3_model_get_json(const dsv3_model* model, char* buffer, uint64_t capacity,
                                uint64_t* needed, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(model, "model"));
    DSV3_TRY(check_buffer(buffer, capacity, needed));
    return fill_text(model_json(*model->model), buffer, capacity, needed);
  });
}

dsv3_status dsv3_model_verify(const dsv3_model* model, dsv3_progress_fn progress,
                              void* progress_user, dsv3_cancel* cancel, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(model, "model"));
    std::shared_ptr<CancelToken> token;
    DSV3_TRY(read_cancel(cancel, &token));
    ProgressCall call(progress, progress_user, token);
    const std::shared_ptr<const Model> kept = model->model;
    return call.result(kept->verify(call.progress()));
  });
}

}  // extern "C"
