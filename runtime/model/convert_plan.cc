#include "runtime/model/convert_plan.h"

#include <algorithm>
#include <numeric>
#include <unordered_set>

#include "runtime/base/checked.h"
#include "runtime/model/repack.h"

namespace dsv3 {
namespace {

using kernels::DType;

constexpr uint64_t kChunkBytes = uint64_t{4} << 20;  // of the checkpoint, about

std::string shape_text(int64_t n, int64_t k) {
  return format("[%lld, %lld]", static_cast<long long>(n), static_cast<long long>(k));
}

class Planner {
 public:
  Planner(const Checkpoint& checkpoint, const ModelConfig& config, const WeightModes& modes)
      : checkpoint_(checkpoint), modes_(modes) {
    plan_.config = config;
  }

  Result<ConvertPlan> plan() {
    ModelWeights unused;
    plan_.records = model_records(plan_.config, &unused);
    plan_.sources.resize(plan_.records.size());
    for (size_t r = 0; r < plan_.records.size(); ++r) {
      DSV3_TRY(resolve(&plan_.records[r], &plan_.sources[r]));
    }
    DSV3_TRY(find_copies());
    DSV3_TRY(refuse_unknown());
    plan_.data_bytes = place_records(&plan_.records);
    cut_copies();  // first: a difference is found before hours of writing
    for (size_t r = 0; r < plan_.records.size(); ++r) {
      cut(static_cast<uint32_t>(r));
      // The views belong to `unused`, which ends here.
      plan_.records[r].vector = nullptr;
      plan_.records[r].matrix = nullptr;
      plan_.records[r].heads = nullptr;
      plan_.records[r].experts = nullptr;
    }
    return std::move(plan_);
  }

 private:
  // --- from names to tensors

  Result<const SourceTensor*> find(const std::string& name, std::vector<int64_t> shape) {
    const SourceTensor* tensor = checkpoint_.find(name);
    if (tensor == nullptr) {
      return make_field_error(Code::kCorrupt, name.c_str(), "%s: tensor %s is missing%s",
                              checkpoint_.where().c_str(), name.c_str(), hint(name).c_str());
    }
    if (tensor->shape != shape) {
      const std::string wanted = shape.size() == 1
                                     ? format("[%lld]", static_cast<long long>(shape[0]))
                                     : shape_text(shape[0], shape[1]);
      if (tensor->shape.empty()) {
        return make_field_error(Code::kUnsupported, name.c_str(),
                                "%s has type %s and rank 0, config needs shape %s",
                                tensor->where().c_str(), tensor->dtype.c_str(), wanted.c_str());
      }
      return make_field_error(Code::kCorrupt, name.c_str(), "%s has shape %s, config needs %s",
                              tensor->where().c_str(), tensor->shape_text().c_str(),
                              wanted.c_str());
    }
    used_.insert(tensor);
    return tensor;
  }

  // A frequent case deserves its reason: checkpoints saved without their MTP module.
  std::string hint(const std::string& name) const {
    const ModelConfig& c = plan_.config;
    for (int64_t i = c.num_hidden_layers; i < c.cache_layers(); ++i) {
      const std::string prefix = format("model.layers.%lld.", static_cast<long long>(i));
      if (name.rfind(prefix, 0) != 0) continue;
      return format(
          " (config.json's num_nextn_predict_layers is %lld; set it to 0 for a "
          "checkpoint without MTP modules)",
          static_cast<long long>(c.num_nextn_predict_layers));
    }
    return "";
  }

  Status type_error(const SourceTensor& tensor, const char* expected) {
    return make_field_error(Code::kUnsupported, tensor.name.c_str(), "%s has type %s, expected %s",
                            tensor.where().c_str(), tensor.dtype.c_str(), expected);
  }

  // Fills in type and scales of a tensor that was found with the right shape.
  Status describe(const SourceTensor* tensor, RecordKind kind, SourceMatrix* out) {
    out->weight = tensor;
    const char* expected = kind == RecordKind::kVector || kind == RecordKind::kRouter
                               ? "BF16, F16 or F32"
                               : dtypes_of(kind);
    switch (tensor->type) {
      case SourceType::kF32:
        out->dtype = DType::kF32;
        break;
      case SourceType::kBF16:
        out->dtype = DType::kBF16;
        break;
      case SourceType::kF16:
        out->dtype = DType::kF16;
        break;
      case SourceType::kF8E4M3:
        if (kind == RecordKind::kVector || kind == RecordKind::kRouter ||
            !dtype_fits(kind, DType::kF8E4M3)) {
          return type_error(*tensor, expected);
        }
        out->dtype = DType::kF8E4M3;
        DSV3_TRY(find_scales(out));
        break;
      default:
        return type_error(*tensor, expected);
    }
    const WeightsMode mode = modes_.of(kind);
    out->to_mx = mode == WeightsMode::kMxfp4;
    if (mode == WeightsMode::kFp8 && out->dtype != DType::kF8E4M3) {
      out->quantise = true;
      out->block_n = out->block_k = kQuantBlock;
    }
    return {};
  }

  Status find_scales(SourceMatrix* out) {
    out->block_n = plan_.config.weight_block_rows;
    out->block_k = plan_.config.weight_block_columns;
    DSV3_ASSIGN(out->scales,
                find(out->weight->name + "_scale_inv",
                     {ceil_div(out->n, out->block_n), ceil_div(out->k, out->block_k)}));
    if (out->scales->type != SourceType::kF32 && out->scales->type != SourceType::kF8E8M0) {
      return type_error(*out->scales, "F32 or F8_E8M0");
    }
    return {};
  }

  // A matrix stored as MXFP4 already: bytes of two elements, the even column in the low half, in a
  // tensor of its own name (compressed-tensors' "..._packed") or in the matrix's (Quark), with
  // E8M0 codes in "..._scale". False: it is not stored so.
  Result<bool> find_mxfp4(const std::string& name, RecordKind kind, SourceMatrix* out) {
    const SourceTensor* plain = checkpoint_.find(name);
    const bool packed_name = plain == nullptr;
    const std::string weight = packed_name ? name + "_packed" : name;
    const SourceTensor* tensor = checkpoint_.find(weight);
    if (tensor == nullptr || tensor->type != SourceType::kU8) return false;
    const std::string scale = name + "_scale";
    const SourceTensor* scales = checkpoint_.find(scale);
    if (scales == nullptr && !packed_name && !dtype_fits(kind, DType::kMXFP4)) return false;
    // The same bytes with scales for 16 inputs and a scale of the whole are another format.
    for (const char* suffix : {"_scale_2", "_global_scale"}) {
      if (checkpoint_.find(name + suffix) == nullptr) continue;
      return make_field_error(Code::kUnsupported, weight.c_str(),
                              "%s is stored as NVFP4 (it has %s%s), expected MXFP4 or %s",
                              tensor->where().c_str(), name.c_str(), suffix, dtypes_of(kind));
    }
    if (scales == nullptr ||
        (scales->type != SourceType::kU8 && scales->type != SourceType::kF8E8M0)) {
      return make_field_error(
          Code::kUnsupported, weight.c_str(),
          "%s has type U8 and %s, expected MXFP4 with scales %s of type U8 or F8_E8M0",
          tensor->where().c_str(),
          scales == nullptr ? "no scales"
                            : format("scales of type %s", scales->dtype.c_str()).c_str(),
          scale.c_str());
    }
    if (!dtype_fits(kind, DType::kMXFP4)) {
      return make_field_error(Code::kUnsupported, weight.c_str(),
                              "%s is stored as MXFP4, expected %s", tensor->where().c_str(),
                              dtypes_of(kind));
    }
    if (out->k % kernels::kMxBlock != 0) {
      return make_field_error(Code::kUnsupported, weight.c_str(),
                              "%s is stored as MXFP4 and has rows of %lld values, expected a "
                              "multiple of %d",
                              tensor->where().c_str(), static_cast<long long>(out->k),
                              kernels::kMxBlock);
    }
    out->dtype = DType::kMXFP4;
    DSV3_ASSIGN(out->weight, find(weight, {out->n, out->k / 2}));
    DSV3_ASSIGN(out->scales, find(scale, {out->n, out->k / kernels::kMxBlock}));
    return true;
  }

  Result<SourceMatrix> matrix(const std::string& name, RecordKind kind, int64_t n, int64_t k) {
    SourceMatrix source;
    source.n = n;
    source.k = k;
    DSV3_ASSIGN(const bool packed, find_mxfp4(name, kind, &source));
    if (packed) return source;
    std::vector<int64_t> shape{n};
    if (kind != RecordKind::kVector) shape.push_back(k);
    DSV3_ASSIGN(const SourceTensor* tensor, find(name, shape));
    DSV3_TRY(describe(tensor, kind, &source));
    return source;
  }

  // The type a part has in the file, given its source.
  static void set_type(const SourceMatrix& source, RecordKind kind, Part* part) {
    if (kind == RecordKind::kVector) {
      part->dtype = DType::kF32;
    } else if (kind == RecordKind::kRouter) {
      part->dtype = source.dtype == DType::kBF16 ? DType::kBF16 : DType::kF32;
    } else if (source.to_mx || source.is_mx()) {
      part->dtype = DType::kMXFP4;
    } else if (source.to_fp8()) {
      part->dtype = DType::kF8E4M3;
      part->scale_n = static_cast<uint32_t>(source.block_n);
      part->scale_k = static_cast<uint32_t>(source.block_k);
    } else {
      part->dtype = source.dtype;
    }
    part->layout = layout_of(part->dtype, part->layout);
  }

  Status resolve(Record* record, std::vector<SourceMatrix>* sources) {
    switch (record->kind) {
      case RecordKind::kHeadsUk:
      case RecordKind::kHeadsUv:
        return resolve_heads(record, sources);
      case RecordKind::kExperts:
        return resolve_experts(record, sources);
      default:
        break;
    }
    Part& part = record->parts[0];
    DSV3_ASSIGN(SourceMatrix source, matrix(record->name, record->kind, part.n, part.k));
    set_type(source, record->kind, &part);
    sources->push_back(source);
    return {};
  }

  Status resolve_experts(Record* record, std::vector<SourceMatrix>* sources) {
    for (uint32_t e = 0; e < record->count; ++e) {
      for (size_t p = 0; p < record->parts.size(); ++p) {
        Part& part = record->parts[p];
        DSV3_ASSIGN(SourceMatrix source,
                    matrix(record->part_name(e, p), record->kind, part.n, part.k));
        if (e == 0) {
          set_type(source, record->kind, &part);
        } else if (const DType first = (*sources)[p].dtype;
                   first != source.dtype && !source.to_mx) {
          // One stride for all experts of a layer needs one type.
          return type_error(*source.weight,
                            format("%s as in expert 0", kernels::dtype_name(first)).c_str());
        }
        sources->push_back(source);
      }
    }
    return {};
  }

  // kv_b_proj holds, head after head, qk_nope_head_dim rows of W_UK and v_head_dim rows of W_UV. A
  // head's part begins anywhere in the grid of scale blocks; with blocks of the greatest common
  // divisor of the grid and the heads' offsets, every new block lies in one old block, and the FP8
  // codes stay as they are.
  Status resolve_heads(Record* record, std::vector<SourceMatrix>* sources) {
    const ModelConfig& c = plan_.config;
    const int64_t head_rows = c.qk_nope_head_dim + c.v_head_dim;
    const std::string name = record->name.substr(0, record->name.rfind('.')) + ".weight";
    DSV3_ASSIGN(SourceMatrix source,
                matrix(name, record->kind, c.num_attention_heads * head_rows, c.kv_lora_rank));
    Part& part = record->parts[0];
    set_type(source, record->kind, &part);
    if (source.to_fp8()) {
      const int64_t grid = std::gcd(source.block_n, head_rows);
      if (record->kind == RecordKind::kHeadsUk) {
        part.scale_n = static_cast<uint32_t>(source.block_k);
        part.scale_k = static_cast<uint32_t>(grid);
        if (grid % 2 != 0 || grid < 8) {  // the kernels' blocks are even; tiny ones cost more
          part.dtype = DType::kF32;       // than they save
          part.scale_n = part.scale_k = 0;
        }
      } else {
        part.scale_n = static_cast<uint32_t>(std::gcd(grid, c.qk_nope_head_dim));
        part.scale_k = static_cast<uint32_t>(source.block_k);
      }
    }
    sources->push_back(source);
    return {};
  }

  // --- tensors that have no record of their own

  void add_copy(const std::string& copy, const std::string& original) {
    for (const char* suffix : {"", "_scale_inv"}) {
      const SourceTensor* a = checkpoint_.find(copy + suffix);
      const SourceTensor* b = checkpoint_.find(original + suffix);
      if (a == nullptr || b == nullptr) continue;  // a copy of nothing is refused as unknown
      plan_.copies.push_back({a, b});
      used_.insert(a);
    }
  }

  // Published checkpoints repeat the embedding and the head in the MTP module, and some repeat a
  // tied head. They share the original's memory, so they must be the same bytes.
  Status find_copies() {
    const ModelConfig& c = plan_.config;
    const std::string embed = "model.embed_tokens.weight";
    const std::string head = c.tie_word_embeddings ? embed : "lm_head.weight";
    if (c.tie_word_embeddings) add_copy("lm_head.weight", embed);
    for (int64_t i = c.num_hidden_layers; i < c.cache_layers(); ++i) {
      const std::string prefix = format("model.layers.%lld.", static_cast<long long>(i));
      add_copy(prefix + "embed_tokens.weight", embed);
      add_copy(prefix + "shared_head.head.weight", head);
    }
    for (const SourceCopy& copy : plan_.copies) {
      if (copy.copy->shape == copy.original->shape && copy.copy->dtype == copy.original->dtype) {
        continue;
      }
      return make_field_error(Code::kUnsupported, copy.copy->name.c_str(),
                              "%s has type %s and shape %s, expected a copy of %s (%s %s)",
                              copy.copy->where().c_str(), copy.copy->dtype.c_str(),
                              copy.copy->shape_text().c_str(), copy.original->name.c_str(),
                              copy.original->dtype.c_str(), copy.original->shape_text().c_str());
    }
    return {};
  }

  Status refuse_unknown() {
    const SourceTensor* first = nullptr;
    size_t count = 0;
    for (const auto& [name, tensor] : checkpoint_.tensors()) {
      // Frequencies of the rotary embedding, which follow from the config.
      const bool harmless = std::string_view(name).ends_with("rotary_emb.inv_freq");
      if (harmless || used_.count(&tensor) != 0) continue;
      if (count++ == 0) first = &tensor;
    }
    if (count == 0) return {};
    const std::string more = count == 1 ? "" : format(", nor for %zu others", count - 1);
    return make_field_error(Code::kUnsupported, utf8_prefix(first->name, 200).c_str(),
                            "%s: tensor %s: the config has no place for it%s",
                            first->file->path().c_str(), utf8_prefix(first->name, 200).c_str(),
                            more.c_str());
  }

  // --- from records to chunks

  void cut(uint32_t r) {
    const Record& record = plan_.records[r];
    for (uint32_t item = 0; item < record.count; ++item) {
      Chunk chunk;
      chunk.record = r;
      chunk.item = item;
      const bool head = record.kind == RecordKind::kHeadsUk || record.kind == RecordKind::kHeadsUv;
      if (head) {
        chunk.kind = Chunk::Kind::kHead;
        add(chunk, 0);
      } else {
        for (size_t p = 0; p < record.parts.size(); ++p) cut_part(record, chunk, p);
      }
      end_item(record);
    }
  }

  void cut_part(const Record& record, Chunk chunk, size_t p) {
    const Part& part = record.parts[p];
    chunk.part = static_cast<uint8_t>(p);
    const SourceMatrix& source = plan_.source(chunk);
    const auto n = static_cast<uint64_t>(part.n);
    // Bands of whole panels, and of whole blocks where the band makes the scales. A band's bytes
    // are contiguous in either layout.
    const uint64_t unit = source.quantise ? kQuantBlock : kernels::kTileN;
    const uint64_t rows =
        std::max(unit, kChunkBytes / std::max<size_t>(source.row_bytes(), 1) / unit * unit);
    for (uint64_t begin = 0; begin < n; begin += rows) {
      chunk.begin = begin;
      chunk.end = std::min(n, begin + rows);
      Part before = part;
      before.n = static_cast<int32_t>(begin);
      add(chunk, part.data + before.data_bytes());
    }
    if (part.scale_n == 0) return;
    chunk.kind = Chunk::Kind::kScales;
    chunk.begin = chunk.end = 0;
    add(chunk, part.scales);
  }

  // Appends a chunk at `offset` of its item; the one before it reaches up to there.
  void add(Chunk chunk, uint64_t offset) {
    chunk.offset = offset;
    if (offset > 0) {
      Chunk& before = plan_.chunks.back();
      before.bytes = offset - before.offset;
    }
    plan_.chunks.push_back(chunk);
  }
  void end_item(const Record& record) {
    Chunk& last = plan_.chunks.back();
    last.bytes = record.bytes - last.offset;
    last.last_of_item = true;
    plan_.work_bytes += record.bytes;
  }

  void cut_copies() {
    for (size_t i = 0; i < plan_.copies.size(); ++i) {
      const SourceTensor& copy = *plan_.copies[i].copy;
      const uint64_t bytes = copy.TensorEntry::end - copy.TensorEntry::begin;
      for (uint64_t begin = 0; begin < bytes; begin += kChunkBytes) {
        Chunk chunk;
        chunk.kind = Chunk::Kind::kCompare;
        chunk.record = static_cast<uint32_t>(i);
        chunk.begin = begin;
        chunk.end = std::min(bytes, begin + kChunkBytes);
        plan_.chunks.push_back(chunk);
        plan_.work_bytes += chunk.end - chunk.begin;
      }
    }
  }

  const Checkpoint& checkpoint_;
  const WeightModes modes_;
  ConvertPlan plan_;
  std::unordered_set<const SourceTensor*> used_;
};

}  // namespace

Result<ConvertPlan> plan_conversion(const Checkpoint& checkpoint, const ModelConfig& config,
                                    const WeightModes& modes) {
  return Planner(checkpoint, config, modes).plan();
}

}  // namespace dsv3
