#include "runtime/model/container.h"

#include <flatbuffers/flatbuffers.h>
#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <cstring>

#include "runtime/base/checked.h"
#include "runtime/model/format_generated.h"

namespace dsv3 {
namespace {

static_assert(std::endian::native == std::endian::little, "the container is little-endian");

constexpr uint8_t kMagic[8] = {'D', 'S', 'V', '3', '\r', '\n', 0x1a, '\n'};
constexpr uint64_t kMaxHeader = uint64_t{1} << 30;
constexpr size_t kMaxTokenizer = size_t{1} << 29;

unsigned long long ull(uint64_t v) { return v; }

std::array<uint8_t, 16> hash_of(std::span<const uint8_t> bytes) {
  XXH128_canonical_t canonical;
  XXH128_canonicalFromHash(&canonical, XXH3_128bits(bytes.data(), bytes.size()));
  std::array<uint8_t, 16> out;
  std::memcpy(out.data(), canonical.digest, out.size());
  return out;
}

template <class T>
T load(const uint8_t* p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
void store(uint8_t* p, T v) {
  std::memcpy(p, &v, sizeof v);
}

// --- config

flatbuffers::Offset<fb::Config> encode_config(flatbuffers::FlatBufferBuilder& b,
                                              const ModelConfig& c) {
  const auto model_type = b.CreateString(c.model_type);
  const auto eos = b.CreateVector(c.eos_token_ids);
  flatbuffers::Offset<fb::Yarn> yarn;
  if (c.yarn.enabled) {
    yarn = fb::CreateYarn(b, c.yarn.factor, c.yarn.original_max_position_embeddings,
                          c.yarn.beta_fast, c.yarn.beta_slow, c.yarn.mscale, c.yarn.mscale_all_dim);
  }
  fb::ConfigBuilder t(b);
  t.add_model_type(model_type);
  t.add_vocab_size(c.vocab_size);
  t.add_hidden_size(c.hidden_size);
  t.add_intermediate_size(c.intermediate_size);
  t.add_moe_intermediate_size(c.moe_intermediate_size);
  t.add_num_hidden_layers(c.num_hidden_layers);
  t.add_num_nextn_predict_layers(c.num_nextn_predict_layers);
  t.add_num_attention_heads(c.num_attention_heads);
  t.add_q_lora_rank(c.q_lora_rank);
  t.add_kv_lora_rank(c.kv_lora_rank);
  t.add_qk_nope_head_dim(c.qk_nope_head_dim);
  t.add_qk_rope_head_dim(c.qk_rope_head_dim);
  t.add_v_head_dim(c.v_head_dim);
  t.add_n_routed_experts(c.n_routed_experts);
  t.add_n_shared_experts(c.n_shared_experts);
  t.add_num_experts_per_tok(c.num_experts_per_tok);
  t.add_first_k_dense_replace(c.first_k_dense_replace);
  t.add_moe_layer_freq(c.moe_layer_freq);
  t.add_n_group(c.n_group);
  t.add_topk_group(c.topk_group);
  t.add_scoring_func(static_cast<uint8_t>(c.scoring_func));
  t.add_topk_method(static_cast<uint8_t>(c.topk_method));
  t.add_norm_topk_prob(c.norm_topk_prob);
  t.add_routed_scaling_factor(c.routed_scaling_factor);
  t.add_rms_norm_eps(c.rms_norm_eps);
  t.add_rope_theta(c.rope_theta);
  if (c.yarn.enabled) t.add_yarn(yarn);
  t.add_max_position_embeddings(c.max_position_embeddings);
  t.add_tie_word_embeddings(c.tie_word_embeddings);
  t.add_bos_token_id(c.bos_token_id);
  t.add_eos_token_ids(eos);
  t.add_weight_block_rows(c.weight_block_rows);
  t.add_weight_block_columns(c.weight_block_columns);
  return t.Finish();
}

Result<ModelConfig> decode_config(const fb::Config& t, const std::string& where) {
  ModelConfig c;
  c.model_type = t.model_type() == nullptr ? "" : t.model_type()->str();
  c.vocab_size = t.vocab_size();
  c.hidden_size = t.hidden_size();
  c.intermediate_size = t.intermediate_size();
  c.moe_intermediate_size = t.moe_intermediate_size();
  c.num_hidden_layers = t.num_hidden_layers();
  c.num_nextn_predict_layers = t.num_nextn_predict_layers();
  c.num_attention_heads = t.num_attention_heads();
  c.q_lora_rank = t.q_lora_rank();
  c.kv_lora_rank = t.kv_lora_rank();
  c.qk_nope_head_dim = t.qk_nope_head_dim();
  c.qk_rope_head_dim = t.qk_rope_head_dim();
  c.v_head_dim = t.v_head_dim();
  c.n_routed_experts = t.n_routed_experts();
  c.n_shared_experts = t.n_shared_experts();
  c.num_experts_per_tok = t.num_experts_per_tok();
  c.first_k_dense_replace = t.first_k_dense_replace();
  c.moe_layer_freq = t.moe_layer_freq();
  c.n_group = t.n_group();
  c.topk_group = t.topk_group();
  if (t.scoring_func() > 1 || t.topk_method() > 2) {
    return make_field_error(Code::kCorrupt, t.scoring_func() > 1 ? "scoring_func" : "topk_method",
                            "%s: scoring_func is %d and topk_method %d, expected at most 1 and 2",
                            where.c_str(), t.scoring_func(), t.topk_method());
  }
  c.scoring_func = static_cast<ScoringFunc>(t.scoring_func());
  c.topk_method = static_cast<TopkMethod>(t.topk_method());
  c.norm_topk_prob = t.norm_topk_prob();
  c.routed_scaling_factor = t.routed_scaling_factor();
  c.rms_norm_eps = t.rms_norm_eps();
  c.rope_theta = t.rope_theta();
  if (const fb::Yarn* y = t.yarn()) {
    c.yarn = {true,
              y->factor(),
              y->original_max_position_embeddings(),
              y->beta_fast(),
              y->beta_slow(),
              y->mscale(),
              y->mscale_all_dim()};
  }
  c.max_position_embeddings = t.max_position_embeddings();
  c.tie_word_embeddings = t.tie_word_embeddings();
  c.bos_token_id = t.bos_token_id();
  if (t.eos_token_ids() != nullptr) {
    c.eos_token_ids.assign(t.eos_token_ids()->begin(), t.eos_token_ids()->end());
  }
  c.weight_block_rows = t.weight_block_rows();
  c.weight_block_columns = t.weight_block_columns();
  DSV3_TRY(c.validate(where));
  return c;
}

// --- records

flatbuffers::Offset<fb::Record> encode_record(flatbuffers::FlatBufferBuilder& b,
                                              const Record& record) {
  std::vector<fb::Part> parts;
  for (const Part& p : record.parts) {
    parts.emplace_back(p.n, p.k, static_cast<uint8_t>(p.dtype), static_cast<uint8_t>(p.layout), 0,
                       p.scale_n, p.scale_k, p.data, p.scales);
  }
  const auto name = b.CreateString(record.name);
  const auto part_vector = b.CreateVectorOfStructs(parts);
  const auto hashes = b.CreateVector(record.hashes);
  return fb::CreateRecord(b, name, record.count, record.offset, record.stride, record.bytes,
                          part_vector, hashes);
}

// Compares what the file says of one record with what the config calls for, and takes over the
// types and checksums.
class RecordReader {
 public:
  RecordReader(const std::string& where, const fb::Record& found, Record* expected)
      : where_(where), found_(found), expected_(*expected) {}

  Status read() {
    if (found_.name() == nullptr || found_.name()->string_view() != expected_.name) {
      const std::string name = found_.name() == nullptr ? "" : found_.name()->str();
      return error("is called \"%s\" in the index", utf8_prefix(name, 100).c_str());
    }
    DSV3_TRY(same("count", found_.count(), expected_.count));
    if (found_.parts() == nullptr || found_.hashes() == nullptr) {
      return error("has no parts or no checksums in the index");
    }
    // FlatBuffers' verifier looks where a vector's length lies, not its elements.
    if (!aligned(*found_.parts(), alignof(fb::Part)) ||
        !aligned(*found_.hashes(), alignof(uint64_t))) {
      return error("has parts or checksums in the index that are not aligned to 8 bytes");
    }
    DSV3_TRY(same("the number of parts", found_.parts()->size(), expected_.parts.size()));
    DSV3_TRY(same("the number of checksums", found_.hashes()->size(), expected_.count));
    for (size_t i = 0; i < expected_.parts.size(); ++i) {
      DSV3_TRY(read_part(*found_.parts()->Get(static_cast<flatbuffers::uoffset_t>(i)),
                         &expected_.parts[i]));
    }
    expected_.hashes.assign(found_.hashes()->begin(), found_.hashes()->end());
    return {};
  }

  // After place_records(): everything lies where it must.
  Status check_placement() {
    DSV3_TRY(same("offset", found_.offset(), expected_.offset));
    DSV3_TRY(same("stride", found_.stride(), expected_.stride));
    DSV3_TRY(same("bytes", found_.bytes(), expected_.bytes));
    for (size_t i = 0; i < expected_.parts.size(); ++i) {
      const fb::Part& part = *found_.parts()->Get(static_cast<flatbuffers::uoffset_t>(i));
      DSV3_TRY(same("offset of the weights", part.data(), expected_.parts[i].data));
      DSV3_TRY(same("offset of the scales", part.scales(), expected_.parts[i].scales));
    }
    return {};
  }

 private:
  template <class... A>
  Status error(const char* fmt, A... args) {
    return make_field_error(Code::kCorrupt, expected_.name.c_str(), "%s: tensor %s %s",
                            where_.c_str(), expected_.name.c_str(), format(fmt, args...).c_str());
  }
  Status error(const char* text) { return error("%s", text); }
  template <class T>
  static bool aligned(const flatbuffers::Vector<T>& vector, size_t alignment) {
    return reinterpret_cast<uintptr_t>(vector.Data()) % alignment == 0;
  }
  Status same(const char* what, uint64_t found, uint64_t expected) {
    if (found == expected) return {};
    return error("has %s %llu, expected %llu", what, ull(found), ull(expected));
  }

  Status read_part(const fb::Part& found, Part* part) {
    if (found.n() != part->n || found.k() != part->k) {
      return error("has shape [%d, %d], config needs [%d, %d]", found.n(), found.k(), part->n,
                   part->k);
    }
    const auto dtype = static_cast<kernels::DType>(found.dtype());
    if (found.dtype() > 4 || !dtype_fits(expected_.kind, dtype)) {
      return error("has type number %d, expected %s", found.dtype(), dtypes_of(expected_.kind));
    }
    part->dtype = dtype;
    part->layout = layout_of(dtype, part->layout);
    DSV3_TRY(same("layout", found.layout(), static_cast<uint8_t>(part->layout)));
    DSV3_TRY(same("reserved bytes", found.reserved(), 0));
    part->scale_n = found.scale_n();
    part->scale_k = found.scale_k();
    constexpr uint32_t kMaxBlock = 1u << 24;
    const bool ok = dtype == kernels::DType::kF8E4M3
                        ? part->scale_n >= 1 && part->scale_n <= kMaxBlock && part->scale_k >= 2 &&
                              part->scale_k <= kMaxBlock && part->scale_k % 2 == 0
                        : part->scale_n == 0 && part->scale_k == 0;
    if (!ok) {
      return error("has scale blocks of %u x %u, expected %s", part->scale_n, part->scale_k,
                   dtype == kernels::DType::kF8E4M3 ? "positive ones with an even width" : "none");
    }
    return {};
  }

  const std::string& where_;
  const fb::Record& found_;
  Record& expected_;
};

Status decode_records(const fb::Header& header, const Preamble& preamble, const std::string& where,
                      std::vector<Record>* records) {
  const auto* found = header.records();
  const size_t count = found == nullptr ? 0 : found->size();
  if (count != records->size()) {
    return make_field_error(Code::kCorrupt, "records",
                            "%s: index has %zu records, config needs %zu", where.c_str(), count,
                            records->size());
  }
  const auto at = [found](size_t i) -> const fb::Record& {
    return *found->Get(static_cast<flatbuffers::uoffset_t>(i));
  };
  for (size_t i = 0; i < count; ++i) {
    DSV3_TRY(RecordReader(where, at(i), &(*records)[i]).read());
  }
  const uint64_t data_bytes = place_records(records);
  for (size_t i = 0; i < count; ++i) {
    DSV3_TRY(RecordReader(where, at(i), &(*records)[i]).check_placement());
  }
  if (data_bytes != preamble.file_bytes - preamble.data_offset) {
    return make_error(Code::kCorrupt, "%s: has %llu bytes of data, expected %llu", where.c_str(),
                      ull(preamble.file_bytes - preamble.data_offset), ull(data_bytes));
  }
  return {};
}

}  // namespace

Result<std::vector<uint8_t>> encode_container(const ContainerHeader& header) {
  if (header.tokenizer.size() > kMaxTokenizer) {
    return make_field_error(Code::kUnsupported, "tokenizer",
                            "tokenizer image has %zu bytes, expected at most %zu",
                            header.tokenizer.size(), kMaxTokenizer);
  }
  flatbuffers::FlatBufferBuilder b(1 << 16);
  std::vector<flatbuffers::Offset<fb::Record>> offsets;
  offsets.reserve(header.records.size());
  uint64_t data_bytes = 0;
  for (const Record& record : header.records) {
    offsets.push_back(encode_record(b, record));
    data_bytes = record.offset + record.stride * record.count;
  }
  const auto records = b.CreateVector(offsets);
  flatbuffers::Offset<flatbuffers::Vector<uint8_t>> tokenizer;
  if (header.has_tokenizer) {
    b.ForceVectorAlignment(header.tokenizer.size(), 1, 8);  // the image holds arrays, used in place
    tokenizer = b.CreateVector(header.tokenizer.data(), header.tokenizer.size());
  }
  const auto config = encode_config(b, header.config);
  fb::HeaderBuilder root(b);
  root.add_config(config);
  if (header.has_tokenizer) root.add_tokenizer(tokenizer);
  root.add_chat_template(header.chat_template);
  root.add_records(records);
  fb::FinishHeaderBuffer(b, root.Finish());

  const std::span<const uint8_t> bytes(b.GetBufferPointer(), b.GetSize());
  const uint64_t data_offset = round_up(uint64_t{kPreambleBytes + bytes.size()}, kDataAlign);
  std::vector<uint8_t> out(data_offset, 0);
  std::memcpy(out.data(), kMagic, sizeof kMagic);
  store<uint32_t>(&out[8], kContainerVersion);
  store<uint64_t>(&out[16], bytes.size());
  store<uint64_t>(&out[24], data_offset);
  store<uint64_t>(&out[32], data_offset + data_bytes);
  const auto hash = hash_of(bytes);
  std::memcpy(&out[40], hash.data(), hash.size());
  std::memcpy(&out[kPreambleBytes], bytes.data(), bytes.size());
  return out;
}

Result<Preamble> decode_preamble(std::span<const uint8_t> bytes, uint64_t file_bytes,
                                 const std::string& where) {
  const auto corrupt = [&](const char* what, uint64_t found, uint64_t expected) {
    return make_field_error(Code::kCorrupt, what, "%s: %s is %llu, expected %llu", where.c_str(),
                            what, ull(found), ull(expected));
  };
  const auto out_of_range = [&](const char* what, uint64_t found, const char* side,
                                uint64_t limit) {
    return make_field_error(Code::kCorrupt, what, "%s: %s is %llu, expected at %s %llu",
                            where.c_str(), what, ull(found), side, ull(limit));
  };
  if (bytes.size() < sizeof kMagic || std::memcmp(bytes.data(), kMagic, sizeof kMagic) != 0) {
    return make_error(Code::kCorrupt, "%s: is not a .dsv3 file (it does not begin with its magic)",
                      where.c_str());
  }
  if (bytes.size() < kPreambleBytes) {
    return out_of_range("file size", bytes.size(), "least", kPreambleBytes);
  }
  const uint32_t version = load<uint32_t>(&bytes[8]);
  if (version != kContainerVersion) {
    return make_field_error(Code::kUnsupported, "version",
                            "%s: has container version %u, this build reads version %u",
                            where.c_str(), version, kContainerVersion);
  }
  Preamble p;
  p.header_bytes = load<uint64_t>(&bytes[16]);
  p.data_offset = load<uint64_t>(&bytes[24]);
  p.file_bytes = load<uint64_t>(&bytes[32]);
  std::memcpy(p.fingerprint.data(), &bytes[40], p.fingerprint.size());
  const uint64_t reserved = load<uint32_t>(&bytes[12]) | load<uint64_t>(&bytes[56]);
  if (reserved != 0) return corrupt("reserved field", reserved, 0);
  if (p.file_bytes != file_bytes) return corrupt("file size", file_bytes, p.file_bytes);
  if (p.header_bytes > kMaxHeader || p.header_bytes > file_bytes - kPreambleBytes) {
    return out_of_range("header size", p.header_bytes, "most",
                        std::min(kMaxHeader, file_bytes - uint64_t{kPreambleBytes}));
  }
  const uint64_t data_offset = round_up(kPreambleBytes + p.header_bytes, kDataAlign);
  if (p.data_offset != data_offset) return corrupt("data offset", p.data_offset, data_offset);
  if (p.data_offset > file_bytes) {
    return out_of_range("file size", file_bytes, "least", p.data_offset);
  }
  return p;
}

Result<ContainerHeader> decode_header(const Preamble& preamble, std::span<const uint8_t> bytes,
                                      const std::string& where, ModelWeights* weights) {
  if (hash_of(bytes) != preamble.fingerprint) {
    return make_field_error(Code::kCorrupt, "header",
                            "%s: header's checksum does not match: the file is damaged",
                            where.c_str());
  }
  flatbuffers::Verifier::Options options;
  options.max_depth = 8;
  options.max_tables = 100'000;
  flatbuffers::Verifier verifier(bytes.data(), bytes.size(), options);
  if (!fb::VerifyHeaderBuffer(verifier)) {
    return make_field_error(Code::kCorrupt, "header",
                            "%s: header is not a well-formed FlatBuffer of format.fbs",
                            where.c_str());
  }
  const fb::Header& header = *fb::GetHeader(bytes.data());
  if (header.config() == nullptr) {
    return make_field_error(Code::kCorrupt, "config", "%s: header has no config", where.c_str());
  }
  ContainerHeader out;
  DSV3_ASSIGN(out.config, decode_config(*header.config(), where));
  out.records = model_records(out.config, weights);
  DSV3_TRY(decode_records(header, preamble, where, &out.records));
  if (header.tokenizer() != nullptr) {
    out.has_tokenizer = true;
    out.tokenizer = {header.tokenizer()->data(), header.tokenizer()->size()};
  }
  out.chat_template = header.chat_template();
  return out;
}

}  // namespace dsv3
