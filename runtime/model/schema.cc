#include "runtime/model/schema.h"

#include <algorithm>

#include "runtime/base/checked.h"

namespace dsv3 {
namespace {

using kernels::DType;
using kernels::Layout;

Part part_of(int64_t n, int64_t k, const char* name = "") {
  Part part;
  part.name = name;
  part.n = static_cast<int32_t>(n);
  part.k = static_cast<int32_t>(k);
  return part;
}

// Walks over a model's weights in the order of the file.
class Builder {
 public:
  explicit Builder(const ModelConfig& config) : c_(config) {}

  void model(ModelWeights* w) {
    matrix("model.embed_tokens.weight", RecordKind::kEmbedding, c_.vocab_size, c_.hidden_size,
           &w->embed);
    // A tied embedding is the head's matrix too, so it is stored as kernels read a head.
    if (!c_.tie_word_embeddings) records_.back().parts[0].layout = Layout::kRowMajor;
    w->layers.resize(static_cast<size_t>(c_.num_hidden_layers));
    for (int64_t i = 0; i < c_.num_hidden_layers; ++i) {
      layer(i, &w->layers[static_cast<size_t>(i)]);
    }
    vector("model.norm.weight", c_.hidden_size, &w->final_norm);
    if (!c_.tie_word_embeddings) {
      matrix("lm_head.weight", RecordKind::kHead, c_.vocab_size, c_.hidden_size, &w->head);
    }
    mtp_ = true;
    w->mtp.resize(static_cast<size_t>(c_.num_nextn_predict_layers));
    for (int64_t i = 0; i < c_.num_nextn_predict_layers; ++i) {
      mtp(c_.num_hidden_layers + i, &w->mtp[static_cast<size_t>(i)]);
    }
  }

  std::vector<Record> take() { return std::move(records_); }

 private:
  Record* add(std::string name, RecordKind kind, std::vector<Part> parts) {
    Record& record = records_.emplace_back();
    record.name = std::move(name);
    record.kind = kind;
    record.parts = std::move(parts);
    record.mtp = mtp_;
    return &record;
  }
  void vector(const std::string& name, int64_t size, VectorView* view) {
    Record* record = add(name, RecordKind::kVector, {part_of(size, 1)});
    record->parts[0].layout = Layout::kRowMajor;
    record->vector = view;
  }
  void matrix(const std::string& name, RecordKind kind, int64_t n, int64_t k, MatrixView* view) {
    Record* record = add(name, kind, {part_of(n, k)});
    record->matrix = view;
  }
  void linear(const std::string& name, int64_t n, int64_t k, MatrixView* view) {
    matrix(name, RecordKind::kLinear, n, k, view);
  }
  void heads(const std::string& name, RecordKind kind, int64_t n, int64_t k,
             std::vector<MatrixView>* view) {
    Record* record = add(name, kind, {part_of(n, k)});
    record->count = static_cast<uint32_t>(c_.num_attention_heads);
    record->heads = view;
  }
  void ffn(const std::string& prefix, int64_t width, FfnView* view) {
    const RecordKind kind = RecordKind::kFfn;
    matrix(prefix + "gate_proj.weight", kind, width, c_.hidden_size, &view->gate);
    matrix(prefix + "up_proj.weight", kind, width, c_.hidden_size, &view->up);
    matrix(prefix + "down_proj.weight", kind, c_.hidden_size, width, &view->down);
  }

  void layer(int64_t index, LayerWeights* w) {
    const std::string prefix = format("model.layers.%lld.", static_cast<long long>(index));
    const std::string attention = prefix + "self_attn.";
    const int64_t q_out = c_.num_attention_heads * c_.qk_head_dim();
    vector(prefix + "input_layernorm.weight", c_.hidden_size, &w->input_norm);
    if (c_.q_lora_rank > 0) {
      linear(attention + "q_a_proj.weight", c_.q_lora_rank, c_.hidden_size, &w->q_a);
      vector(attention + "q_a_layernorm.weight", c_.q_lora_rank, &w->q_a_norm);
      linear(attention + "q_b_proj.weight", q_out, c_.q_lora_rank, &w->q_b);
    } else {
      linear(attention + "q_proj.weight", q_out, c_.hidden_size, &w->q_b);
    }
    linear(attention + "kv_a_proj_with_mqa.weight", c_.latent_dim(), c_.hidden_size, &w->kv_a);
    vector(attention + "kv_a_layernorm.weight", c_.kv_lora_rank, &w->kv_a_norm);
    heads(attention + "kv_b_proj.uk", RecordKind::kHeadsUk, c_.kv_lora_rank, c_.qk_nope_head_dim,
          &w->w_uk);
    heads(attention + "kv_b_proj.uv", RecordKind::kHeadsUv, c_.v_head_dim, c_.kv_lora_rank,
          &w->w_uv);
    linear(attention + "o_proj.weight", c_.hidden_size, c_.num_attention_heads * c_.v_head_dim,
           &w->o);
    vector(prefix + "post_attention_layernorm.weight", c_.hidden_size, &w->post_norm);
    w->moe = c_.is_moe_layer(index);
    const std::string mlp = prefix + "mlp.";
    if (!w->moe) return ffn(mlp, c_.intermediate_size, &w->dense);
    matrix(mlp + "gate.weight", RecordKind::kRouter, c_.n_routed_experts, c_.hidden_size,
           &w->router);
    if (c_.topk_method == TopkMethod::kNoAuxTc) {
      vector(mlp + "gate.e_score_correction_bias", c_.n_routed_experts, &w->router_bias);
    }
    if (c_.n_shared_experts > 0) ffn(mlp + "shared_experts.", c_.shared_width(), &w->shared);
    Record* record = add(mlp + "experts", RecordKind::kExperts,
                         {part_of(c_.moe_intermediate_size, c_.hidden_size, "gate_proj"),
                          part_of(c_.moe_intermediate_size, c_.hidden_size, "up_proj"),
                          part_of(c_.hidden_size, c_.moe_intermediate_size, "down_proj")});
    record->count = static_cast<uint32_t>(c_.n_routed_experts);
    record->experts = &w->experts;
  }

  void mtp(int64_t index, MtpWeights* w) {
    const std::string prefix = format("model.layers.%lld.", static_cast<long long>(index));
    vector(prefix + "enorm.weight", c_.hidden_size, &w->enorm);
    vector(prefix + "hnorm.weight", c_.hidden_size, &w->hnorm);
    matrix(prefix + "eh_proj.weight", RecordKind::kKept, c_.hidden_size, 2 * c_.hidden_size,
           &w->eh_proj);
    layer(index, &w->layer);
    vector(prefix + "shared_head.norm.weight", c_.hidden_size, &w->head_norm);
  }

  const ModelConfig& c_;
  std::vector<Record> records_;
  bool mtp_ = false;
};

MatrixView view_of(const Part& part, const uint8_t* item) {
  MatrixView view;
  view.dtype = part.dtype;
  view.layout = part.layout;
  view.n = part.n;
  view.k = part.k;
  view.data = item + part.data;
  view.bytes = part.data_bytes();
  if (part.scale_n > 0) {
    view.scales = reinterpret_cast<const float*>(item + part.scales);
    view.scale_n = static_cast<int32_t>(part.scale_n);
    view.scale_k = static_cast<int32_t>(part.scale_k);
  }
  return view;
}

}  // namespace

uint64_t Part::data_bytes() const { return kernels::matrix_bytes(dtype, layout, n, k); }

uint64_t Part::scale_count() const {
  if (scale_n == 0) return 0;
  return ceil_div(static_cast<uint64_t>(n), uint64_t{scale_n}) *
         ceil_div(static_cast<uint64_t>(k), uint64_t{scale_k});
}

std::string Record::item_name(uint64_t item) const {
  const bool many =
      kind == RecordKind::kExperts || kind == RecordKind::kHeadsUk || kind == RecordKind::kHeadsUv;
  if (!many) return name;
  return format("%s.%llu", name.c_str(), static_cast<unsigned long long>(item));
}

std::string Record::part_name(uint64_t item, size_t part) const {
  if (kind != RecordKind::kExperts) return item_name(item);
  return format("%s.%s.weight", item_name(item).c_str(), parts[part].name);
}

std::vector<Record> model_records(const ModelConfig& config, ModelWeights* weights) {
  *weights = {};
  Builder builder(config);
  builder.model(weights);
  return builder.take();
}

bool dtype_fits(RecordKind kind, DType dtype) {
  switch (kind) {
    case RecordKind::kVector:
      return dtype == DType::kF32;
    case RecordKind::kRouter:
      return dtype == DType::kF32 || dtype == DType::kBF16;
    case RecordKind::kFfn:
    case RecordKind::kExperts:
      return true;
    default:
      return dtype != DType::kMXFP4;
  }
}

const char* dtypes_of(RecordKind kind) {
  switch (kind) {
    case RecordKind::kVector:
      return "F32";
    case RecordKind::kRouter:
      return "BF16 or F32";
    case RecordKind::kFfn:
    case RecordKind::kExperts:
      return "MXFP4, F8_E4M3, BF16, F16 or F32";
    default:
      return "F8_E4M3, BF16, F16 or F32";
  }
}

Layout layout_of(DType dtype, Layout layout) {
  if (dtype == DType::kMXFP4) return Layout::kTileMx;
  return layout == Layout::kTileMx ? Layout::kTile16x2 : layout;
}

uint64_t place_records(std::vector<Record>* records) {
  uint64_t end = 0;
  for (Record& record : *records) {
    const uint64_t align = record.kind == RecordKind::kExperts ? kDataAlign : kPartAlign;
    uint64_t bytes = 0;
    for (Part& part : record.parts) {
      part.data = round_up(bytes, kPartAlign);
      bytes = part.data + part.data_bytes();
      part.scales = 0;
      if (part.scale_n > 0) {
        part.scales = round_up(bytes, kPartAlign);
        bytes = part.scales + part.scale_count() * sizeof(float);
      }
    }
    record.bytes = bytes;
    record.stride = round_up(bytes, align);
    record.offset = round_up(end, align);
    end = record.offset + record.stride * record.count;
  }
  return end;
}

void bind_records(const std::vector<Record>& records, const ModelConfig& config,
                  const uint8_t* data, ModelWeights* weights) {
  for (const Record& record : records) {
    const uint8_t* base = data + record.offset;
    const Part& first = record.parts[0];
    if (record.vector != nullptr) {
      record.vector->data = reinterpret_cast<const float*>(base + first.data);
      record.vector->size = first.n;
    } else if (record.matrix != nullptr) {
      *record.matrix = view_of(first, base);
    } else if (record.heads != nullptr) {
      record.heads->clear();
      record.heads->reserve(record.count);
      for (uint64_t i = 0; i < record.count; ++i) {
        record.heads->push_back(view_of(first, base + i * record.stride));
      }
    } else if (record.experts != nullptr) {
      record.experts->base = base;
      record.experts->stride = record.stride;
      record.experts->experts.clear();
      record.experts->experts.reserve(record.count);
      for (uint64_t i = 0; i < record.count; ++i) {
        const uint8_t* item = base + i * record.stride;
        record.experts->experts.push_back(
            {view_of(first, item), view_of(record.parts[1], item), view_of(record.parts[2], item)});
      }
    }
  }
  if (config.tie_word_embeddings) weights->head = weights->embed;
}

}  // namespace dsv3
