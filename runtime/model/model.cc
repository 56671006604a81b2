#include "runtime/model/model.h"

#include <xxhash.h>

#include <algorithm>
#include <cassert>
#include <optional>

#include "runtime/base/alloc.h"
#include "runtime/base/os.h"
#include "runtime/model/container.h"
#include "runtime/model/parallel.h"
#include "runtime/model/synthetic.h"
#include "runtime/model/weight_check.h"

namespace dsv3 {
namespace {

// One read: large enough for a disk's full speed, small enough that cancelling takes effect soon.
constexpr uint64_t kReadBytes = uint64_t{16} << 20;

unsigned long long ull(uint64_t v) { return v; }

}  // namespace

struct Model::Impl {
  explicit Impl(File opened) : file(std::move(opened)) {}
  Impl() = default;  // synthetic: no file

  Status read_header();
  Status read_data(const Progress& progress);
  Status open_tokenizer();
  uint64_t item_bytes() const;
  Status verify(const Progress& progress) const;
  Status verify_item(const Record& record, uint64_t item,
                     const std::function<void(uint64_t)>& did) const;

  std::optional<File> file;
  OpenOptions options;
  Preamble preamble;
  Fingerprint fingerprint;
  // The header is read into memory and never mapped: what was verified cannot change afterwards.
  HostBuffer<uint8_t> header_bytes;
  std::optional<Mapping> mapping;
  HostBuffer<uint8_t> copy;  // of the data
  uint64_t data_bytes = 0;   // of either

  ContainerHeader header;
  ModelWeights weights;
  std::optional<Tokenizer> tokenizer;
};

Status Model::Impl::read_header() {
  uint8_t first[kPreambleBytes];
  const size_t available = std::min<uint64_t>(file->size(), sizeof first);
  DSV3_TRY(file->read_at(0, first, available));
  DSV3_ASSIGN(preamble, decode_preamble({first, available}, file->size(), file->path()));
  fingerprint.bytes = preamble.fingerprint;
  header_bytes = host_array<uint8_t>(preamble.header_bytes);
  DSV3_TRY(file->read_at(kPreambleBytes, header_bytes.get(), preamble.header_bytes));
  DSV3_ASSIGN(header, decode_header(preamble, {header_bytes.get(), preamble.header_bytes},
                                    file->path(), &weights));
  return {};
}

Status Model::Impl::read_data(const Progress& progress) {
  const uint64_t bytes = data_bytes = preamble.file_bytes - preamble.data_offset;
  if (options.residency == Residency::kMap) {
    DSV3_ASSIGN(mapping, Mapping::map(*file));
    bind_records(header.records, header.config, mapping->data() + preamble.data_offset, &weights);
    return {};
  }
  const uint64_t memory = total_memory();
  if (memory == 0 || bytes <= memory)
    copy.reset(static_cast<uint8_t*>(host_alloc(bytes, kPageAlign)));
  if (copy == nullptr) {
    return make_field_error(Code::kOutOfMemory, "residency",
                            "%s: has %llu bytes of weights, which do not fit into memory (%llu "
                            "bytes); open it with residency=map",
                            file->path().c_str(), ull(bytes), ull(memory));
  }
  std::atomic<uint64_t> done{0};
  const auto read = [&](size_t i) {
    const uint64_t begin = i * kReadBytes;
    const uint64_t size = std::min(kReadBytes, bytes - begin);
    DSV3_TRY(file->read_at(preamble.data_offset + begin, copy.get() + begin, size));
    done += size;
    return ok_status();
  };
  DSV3_TRY(parallel_for((bytes + kReadBytes - 1) / kReadBytes, io_threads(), read,
                        [&] { return !progress || progress(done, bytes); }));
  bind_records(header.records, header.config, copy.get(), &weights);
  // Half old and half new bytes would be a model nobody made.
  DSV3_ASSIGN(const FileIdentity now, file->current_identity());
  if (now.size != file->identity().size || now.mtime_ns != file->identity().mtime_ns) {
    return make_error(Code::kFileChanged, "%s: was changed while it was read",
                      file->path().c_str());
  }
  return {};
}

Status Model::Impl::open_tokenizer() {
  if (header.chat_template > static_cast<uint8_t>(kLastChatTemplate)) {
    return make_field_error(Code::kUnsupported, "chat_template",
                            "%s: has chat template number %d, this build knows 0 to %d",
                            file->path().c_str(), header.chat_template,
                            static_cast<int>(kLastChatTemplate));
  }
  if (!header.has_tokenizer) return {};
  DSV3_ASSIGN(Tokenizer opened, Tokenizer::open(header.tokenizer, file->path()));
  if (opened.vocab_size() > header.config.vocab_size) {
    return make_field_error(Code::kCorrupt, "tokenizer",
                            "%s: tokenizer has ids up to %d, vocab_size is %lld",
                            file->path().c_str(), opened.vocab_size() - 1,
                            static_cast<long long>(header.config.vocab_size));
  }
  tokenizer.emplace(std::move(opened));
  return {};
}

Status Model::Impl::verify_item(const Record& record, uint64_t item,
                                const std::function<void(uint64_t)>& did) const {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  HostBuffer<uint8_t> buffer;
  if (copy == nullptr) buffer = host_array<uint8_t>(std::min(kReadBytes, record.bytes));
  std::optional<BadWeight> bad;
  for (uint64_t at = 0; at < record.bytes;) {
    const uint64_t size = std::min(kReadBytes, record.bytes - at);
    const uint64_t offset = record.item_offset(item) + at;
    // Read and not looked at through the mapping: a file that was cut short is an error here, and
    // would be a signal there.
    if (copy == nullptr) {
      DSV3_TRY(file->read_at(preamble.data_offset + offset, buffer.get(), size));
    }
    const uint8_t* bytes = copy == nullptr ? buffer.get() : copy.get() + offset;
    XXH3_64bits_update(&state, bytes, size);
    if (!bad) bad = first_bad_weight(record, at, {bytes, size});
    at += size;
    did(size);
  }
  if (XXH3_64bits_digest(&state) != record.hashes[item]) {
    const std::string name = record.item_name(item);
    return make_field_error(Code::kCorrupt, name.c_str(),
                            "%s: tensor %s: checksum does not match: its bytes are damaged",
                            file->path().c_str(), name.c_str());
  }
  if (!bad) return {};
  const std::string name = record.part_name(item, bad->part);
  return make_field_error(Code::kCorrupt, name.c_str(),
                          "%s: tensor %s has %s, expected finite numbers (the checksum matches: "
                          "the file was made so)",
                          file->path().c_str(), name.c_str(), bad->what.c_str());
}

uint64_t Model::Impl::item_bytes() const {
  uint64_t sum = 0;
  for (const Record& record : header.records) sum += record.bytes * record.count;
  return sum;
}

Status Model::Impl::verify(const Progress& progress) const {
  struct Item {
    const Record* record;
    uint32_t index;
  };
  std::vector<Item> items;
  for (const Record& record : header.records) {
    for (uint32_t i = 0; i < record.count; ++i) items.push_back({&record, i});
  }
  const uint64_t total = item_bytes();
  std::atomic<uint64_t> done{0};
  return parallel_for(
      items.size(), io_threads(),
      [&](size_t i) {
        return verify_item(*items[i].record, items[i].index, [&](uint64_t n) { done += n; });
      },
      [&] { return !progress || progress(done, total); });
}

Result<std::shared_ptr<const Model>> Model::open(const std::string& path,
                                                 const OpenOptions& options) {
  DSV3_ASSIGN(File file, File::open(path));
  auto impl = std::make_unique<Impl>(std::move(file));
  impl->options = options;
  DSV3_TRY(impl->read_header());
  DSV3_TRY(impl->open_tokenizer());
  // Reading into memory and checking the checksums are two passes; together they are one whole.
  const bool copies = options.residency == Residency::kCopy;
  const uint64_t read = copies ? impl->preamble.file_bytes - impl->preamble.data_offset : 0;
  const uint64_t whole = read + (options.verify ? impl->item_bytes() : 0);
  const auto from = [&](uint64_t before) -> Progress {
    if (!options.progress) return nullptr;
    return [&, before](uint64_t done, uint64_t) { return options.progress(before + done, whole); };
  };
  DSV3_TRY(impl->read_data(from(0)));
  if (options.verify) DSV3_TRY(impl->verify(from(read)));
  impl->options.progress = nullptr;  // it may refer to what ends with this call
  return std::shared_ptr<const Model>(new Model(std::move(impl)));
}

Result<std::shared_ptr<const Model>> Model::synthesise(const ModelConfig& config,
                                                       const SyntheticOptions& options) {
  DSV3_TRY(config.validate("synthetic model"));
  auto impl = std::make_unique<Impl>();
  impl->options.residency = Residency::kCopy;
  impl->header.config = config;
  impl->header.records = model_records(config, &impl->weights);
  choose_synthetic_types(&impl->header.records, options);
  const uint64_t bytes = place_records(&impl->header.records);
  const uint64_t memory = total_memory();
  if (memory != 0 && bytes > memory) {
    return make_field_error(Code::kOutOfMemory, "shape",
                            "a synthetic model of %llu bytes does not fit into memory (%llu bytes)",
                            ull(bytes), ull(memory));
  }
  impl->copy.reset(static_cast<uint8_t*>(host_alloc(bytes, kPageAlign)));
  impl->data_bytes = bytes;
  if (impl->copy == nullptr) {
    return make_field_error(Code::kOutOfMemory, "shape",
                            "no memory for a synthetic model of %llu bytes", ull(bytes));
  }
  DSV3_TRY(fill_synthetic(impl->header.records, options, impl->copy.get()));
  bind_records(impl->header.records, config, impl->copy.get(), &impl->weights);
  impl->preamble.file_bytes = bytes;
  return std::shared_ptr<const Model>(new Model(std::move(impl)));
}

Model::Model(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Model::~Model() = default;

const std::string& Model::path() const {
  static const std::string none;
  return impl_->file.has_value() ? impl_->file->path() : none;
}
const ModelConfig& Model::config() const { return impl_->header.config; }
const ModelWeights& Model::weights() const { return impl_->weights; }
const Tokenizer& Model::tokenizer() const {
  assert(impl_->tokenizer.has_value());
  return *impl_->tokenizer;
}
bool Model::has_tokenizer() const { return impl_->tokenizer.has_value(); }
ChatTemplate Model::chat_template() const {
  return static_cast<ChatTemplate>(impl_->header.chat_template);
}
const Fingerprint& Model::fingerprint() const { return impl_->fingerprint; }
uint64_t Model::file_bytes() const { return impl_->preamble.file_bytes; }

std::span<const uint8_t> Model::weight_memory() const {
  if (!impl_->mapping) return {impl_->copy.get(), impl_->data_bytes};
  return {impl_->mapping->data() + impl_->preamble.data_offset, impl_->data_bytes};
}
uint64_t Model::weight_bytes() const { return impl_->item_bytes(); }

uint64_t Model::active_bytes_per_token() const {
  const ModelConfig& c = config();
  uint64_t sum = 0;
  for (const Record& record : impl_->header.records) {
    if (record.mtp) continue;
    if (record.kind == RecordKind::kExperts) {
      sum += record.bytes * static_cast<uint64_t>(c.num_experts_per_tok);
    } else if (record.kind == RecordKind::kEmbedding) {
      const uint64_t row = record.bytes / static_cast<uint64_t>(c.vocab_size);
      sum += row + (c.tie_word_embeddings ? record.bytes : 0);
    } else {
      sum += record.bytes * record.count;
    }
  }
  return sum;
}

uint64_t Model::parameters() const {
  uint64_t sum = 0;
  for (const Record& record : impl_->header.records) {
    for (const Part& part : record.parts) {
      sum += static_cast<uint64_t>(part.n) * static_cast<uint64_t>(part.k) * record.count;
    }
  }
  return sum;
}

std::vector<TensorInfo> Model::tensors() const {
  std::vector<TensorInfo> out;
  for (const Record& record : impl_->header.records) {
    for (uint64_t item = 0; item < record.count; ++item) {
      for (size_t p = 0; p < record.parts.size(); ++p) {
        const Part& part = record.parts[p];
        TensorInfo info;
        info.name = record.part_name(item, p);
        info.dtype = kernels::dtype_name(part.dtype);
        info.shape = {part.n};
        if (record.kind != RecordKind::kVector) info.shape.push_back(part.k);
        info.offset = impl_->preamble.data_offset + record.item_offset(item) + part.data;
        info.bytes = part.data_bytes() + part.scale_count() * sizeof(float);
        info.xxh3 = record.hashes[item];
        out.push_back(std::move(info));
      }
    }
  }
  return out;
}

// Size and modification time of the file that is mapped (not of what its path names by now: a file
// that was replaced by renaming another over it lives on for us). The change time is left out: it
// also moves when the file is renamed, linked or made read-only, which harms nobody.
Status Model::check_unchanged() const {
  if (impl_->options.residency == Residency::kCopy) return {};
  DSV3_ASSIGN(const FileIdentity now, impl_->file->current_identity());
  const FileIdentity& then = impl_->file->identity();
  if (now.size != then.size) {
    return make_error(Code::kFileChanged, "%s: has %llu bytes, had %llu when it was opened",
                      path().c_str(), ull(now.size), ull(then.size));
  }
  if (now.mtime_ns != then.mtime_ns) {
    return make_error(Code::kFileChanged, "%s: was modified after it was opened", path().c_str());
  }
  return {};
}

Status Model::verify(const Progress& progress) const {
  DSV3_TRY(check_unchanged());
  return impl_->verify(progress);
}

}  // namespace dsv3
