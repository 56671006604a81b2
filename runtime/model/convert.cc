#include "runtime/model/convert.h"

#include "runtime/base/json.h"
#include "runtime/base/os.h"
#include "runtime/model/container.h"
#include "runtime/model/convert_pipeline.h"
#include "runtime/model/convert_plan.h"

namespace dsv3 {
namespace {

Result<ModelConfig> read_config(const std::string& dir, const Checkpoint& checkpoint) {
  const std::string path = join_path(dir, "config.json");
  DSV3_ASSIGN(const JsonDocument document, read_json(path, kSmallFile));
  const Json& json = *document;
  DSV3_ASSIGN(ModelConfig config, ModelConfig::from_json(json, path));
  const std::string generation = join_path(dir, "generation_config.json");
  DSV3_ASSIGN(const bool has_generation, file_exists(generation));
  if (has_generation) {
    DSV3_ASSIGN(const JsonDocument more, read_json(generation, kSmallFile));
    DSV3_TRY(config.add_generation_config(more, generation));
  }
  DSV3_TRY(config.validate(path));
  // A config without the field: the V3 class would assume one module, its derivatives none. The
  // tensors tell.
  if (json.find("num_nextn_predict_layers") == json.end()) {
    const auto has_module = [&](int64_t layer) {
      return checkpoint.find(format("model.layers.%lld.eh_proj.weight",
                                    static_cast<long long>(layer))) != nullptr;
    };
    while (has_module(config.cache_layers())) ++config.num_nextn_predict_layers;
    DSV3_TRY(config.validate(path));
  }
  return config;
}

// The tokenizer's image and the chat template, where the checkpoint has them.
Status read_text(const std::string& dir, const ModelConfig& config, std::string* image,
                 ContainerHeader* header) {
  const std::string path = join_path(dir, "tokenizer.json");
  bool any = false;
  // Other tokenizers are not silently left out: the compiler refuses them by name.
  for (const char* name : {"tokenizer.json", "tiktoken.model", "tokenizer.model"}) {
    DSV3_ASSIGN(const bool exists, file_exists(join_path(dir, name)));
    any = any || exists;
  }
  if (!any) return {};
  DSV3_ASSIGN(*image, Tokenizer::compile(dir));
  header->has_tokenizer = true;
  header->tokenizer = {reinterpret_cast<const uint8_t*>(image->data()), image->size()};
  DSV3_ASSIGN(const Tokenizer tokenizer, Tokenizer::open(header->tokenizer, path));
  if (tokenizer.vocab_size() > config.vocab_size) {
    return make_field_error(Code::kCorrupt, "vocab_size",
                            "%s: has token ids up to %d, config.json's vocab_size is %lld",
                            path.c_str(), tokenizer.vocab_size() - 1,
                            static_cast<long long>(config.vocab_size));
  }
  DSV3_ASSIGN(const ChatTemplate chat, detect_chat_template(dir));
  header->chat_template = static_cast<uint8_t>(chat);
  return {};
}

}  // namespace

WeightsMode WeightModes::of(RecordKind kind) const {
  const auto first = [](WeightsMode a, WeightsMode b) { return a != WeightsMode::kKeep ? a : b; };
  switch (kind) {
    case RecordKind::kLinear:
    case RecordKind::kHeadsUk:
    case RecordKind::kHeadsUv:
      return weights;
    case RecordKind::kFfn:
      return first(ffn, weights);
    case RecordKind::kExperts:
      return first(experts, first(ffn, weights));
    case RecordKind::kEmbedding:
    case RecordKind::kHead:
      return head;
    default:
      return WeightsMode::kKeep;
  }
}

Status convert_checkpoint(const std::string& checkpoint_dir, const std::string& output,
                          const ConvertOptions& options) {
  if (options.overwrite) {
    // Renaming over a folder would fail after all the work.
    Status old = File::open(output).status();
    if (!old.ok() && old.code() != Code::kNotFound) return old;
  } else {
    DSV3_ASSIGN(const bool exists, file_exists(output));
    if (exists) {
      return make_field_error(Code::kInvalidArgument, "output",
                              "%s: exists already, and overwriting it was not asked for",
                              output.c_str());
    }
  }
  DSV3_ASSIGN(const Checkpoint checkpoint, Checkpoint::open(checkpoint_dir));
  ContainerHeader header;
  DSV3_ASSIGN(header.config, read_config(checkpoint_dir, checkpoint));
  DSV3_ASSIGN(ConvertPlan plan, plan_conversion(checkpoint, header.config, options));
  std::string image;
  DSV3_TRY(read_text(checkpoint_dir, header.config, &image, &header));

  // The header's size must be known before the data is written, its checksums are known after: it
  // is encoded twice, the first time with zeros.
  for (Record& record : plan.records) record.hashes.assign(record.count, 0);
  header.records = plan.records;
  DSV3_ASSIGN(std::vector<uint8_t> bytes, encode_container(header));
  const uint64_t data_offset = bytes.size();

  DSV3_ASSIGN(AtomicFile file, AtomicFile::create(output));
  DSV3_TRY(ConvertPipeline(&plan, &file, data_offset).run(options.progress));
  const uint8_t zero = 0;  // the last item may be shorter than its stride
  const Record& last = plan.records.back();
  if (last.bytes < last.stride) {
    DSV3_TRY(file.write_at(data_offset + plan.data_bytes - 1, &zero, 1));
  }
  header.records = plan.records;
  DSV3_ASSIGN(bytes, encode_container(header));
  if (bytes.size() != data_offset) {
    return make_error(Code::kInternal, "%s: header changed its size", output.c_str());
  }
  DSV3_TRY(file.write_at(0, bytes.data(), bytes.size()));
  return file.commit(options.overwrite);
}

}  // namespace dsv3
