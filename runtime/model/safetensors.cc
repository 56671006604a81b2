#include "runtime/model/safetensors.h"

#include <algorithm>
#include <cstring>

#include "runtime/base/checked.h"
#include "runtime/base/json.h"

namespace dsv3 {
namespace {

constexpr uint64_t kMaxHeader = 100'000'000;  // the original reader's limit
constexpr size_t kMaxRank = 8;

struct TypeInfo {
  const char* name;
  SourceType type;
  unsigned bits;
};
// All of the format (the enum Dtype of the original reader): what no weight can have is refused
// where it is needed, by its name, and a tensor that is not needed may have any.
constexpr TypeInfo kTypes[] = {
    {"F32", SourceType::kF32, 32},          {"BF16", SourceType::kBF16, 16},
    {"F16", SourceType::kF16, 16},          {"F8_E4M3", SourceType::kF8E4M3, 8},
    {"F8_E8M0", SourceType::kF8E8M0, 8},    {"U8", SourceType::kU8, 8},
    {"F4", SourceType::kOther, 4},          {"F6_E2M3", SourceType::kOther, 6},
    {"F6_E3M2", SourceType::kOther, 6},     {"F8_E5M2", SourceType::kOther, 8},
    {"F8_E4M3FNUZ", SourceType::kOther, 8}, {"F8_E5M2FNUZ", SourceType::kOther, 8},
    {"BOOL", SourceType::kOther, 8},        {"I8", SourceType::kOther, 8},
    {"I16", SourceType::kOther, 16},        {"U16", SourceType::kOther, 16},
    {"I32", SourceType::kOther, 32},        {"U32", SourceType::kOther, 32},
    {"F64", SourceType::kOther, 64},        {"I64", SourceType::kOther, 64},
    {"U64", SourceType::kOther, 64},        {"C64", SourceType::kOther, 64},
};

std::string shape_text_of(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += format("%s%lld", i == 0 ? "" : ", ", static_cast<long long>(shape[i]));
  }
  return text + "]";
}

unsigned long long ull(uint64_t v) { return v; }

// A name for messages: what a hostile file can put there must not fill the screen.
std::string shown(const std::string& name) { return utf8_prefix(name, 200); }

// Reads one entry of the header: {"dtype": ..., "shape": [...], "data_offsets": [begin, end]}.
class EntryReader {
 public:
  EntryReader(const std::string& where, const std::string& name)
      : field_(shown(name)), prefix_(where + ": tensor " + field_) {}

  Result<TensorEntry> read(const std::string& name, const Json& json, uint64_t data_bytes) {
    TensorEntry entry;
    entry.name = name;
    if (name.empty() || name.find('\0') != std::string::npos) {
      return error("has a name that is empty or has a NUL in it");
    }
    if (!json.is_object()) return error("is not an object");
    for (const auto& [key, value] : json.items()) {
      if (key == "dtype") {
        DSV3_TRY(read_type(value, &entry));
      } else if (key == "shape") {
        DSV3_TRY(read_shape(value, &entry));
      } else if (key == "data_offsets") {
        DSV3_TRY(read_offsets(value, data_bytes, &entry));
      } else {
        return error("has an unknown field \"%s\"", utf8_prefix(key, 60).c_str());
      }
    }
    if (entry.dtype.empty()) return error("has no dtype");
    if (!has_shape_) return error("has no shape");
    if (!has_offsets_) return error("has no data_offsets");
    const bool packed = element_bits_ % 8 != 0;
    uint64_t bytes = packed ? element_bits_ : entry.element_bytes;  // of packed ones bits, at first
    for (const int64_t dim : entry.shape) {
      if (!checked_mul(bytes, static_cast<uint64_t>(dim), &bytes)) {
        return error("has shape %s, whose size overflows", shape_text_of(entry.shape).c_str());
      }
    }
    if (packed && bytes % 8 != 0) {
      return error("has %llu bits for %s %s, expected whole bytes", ull(bytes), entry.dtype.c_str(),
                   shape_text_of(entry.shape).c_str());
    }
    if (packed) bytes /= 8;
    if (bytes != entry.end - entry.begin) {
      return error("has data_offsets [%llu, %llu], which is %llu bytes, expected %llu for %s %s",
                   ull(entry.begin), ull(entry.end), ull(entry.end - entry.begin), ull(bytes),
                   entry.dtype.c_str(), shape_text_of(entry.shape).c_str());
    }
    return entry;
  }

 private:
  template <class... A>
  Status error(const char* fmt, A... args) {
    return make_field_error(Code::kCorrupt, field_.c_str(), "%s %s", prefix_.c_str(),
                            format(fmt, args...).c_str());
  }
  Status error(const char* text) { return error("%s", text); }

  Status read_type(const Json& value, TensorEntry* entry) {
    if (!value.is_string()) return error("has a dtype that is not a string");
    entry->dtype = value.get<std::string>();
    for (const TypeInfo& info : kTypes) {
      if (entry->dtype != info.name) continue;
      entry->type = info.type;
      entry->element_bytes = info.bits / 8;
      element_bits_ = info.bits;
      return {};
    }
    return error("has unknown dtype \"%s\"", utf8_prefix(entry->dtype, 60).c_str());
  }
  Status read_shape(const Json& value, TensorEntry* entry) {
    if (!value.is_array()) return error("has a shape that is not an array");
    if (value.size() > kMaxRank) {
      return error("has a shape of rank %zu, expected at most %zu dimensions", value.size(),
                   kMaxRank);
    }
    has_shape_ = true;
    for (const Json& dim : value) {
      if (!dim.is_number_unsigned() || dim.get<uint64_t>() > INT64_MAX) {
        return error("has %s in its shape, expected integers from 0 to 2^63-1",
                     dim.is_structured() ? "a list" : utf8_prefix(dim.dump(), 60).c_str());
      }
      entry->shape.push_back(dim.get<int64_t>());
    }
    return {};
  }
  Status read_offsets(const Json& value, uint64_t data_bytes, TensorEntry* entry) {
    if (!value.is_array() || value.size() != 2 || !value[0].is_number_unsigned() ||
        !value[1].is_number_unsigned()) {
      return error("has data_offsets that are not two non-negative integers");
    }
    entry->begin = value[0].get<uint64_t>();
    entry->end = value[1].get<uint64_t>();
    has_offsets_ = true;
    if (entry->begin > entry->end || entry->end > data_bytes) {
      return error(
          "has data_offsets [%llu, %llu], expected begin <= end <= %llu, the bytes after "
          "the header",
          ull(entry->begin), ull(entry->end), ull(data_bytes));
    }
    return {};
  }

  std::string field_, prefix_;
  unsigned element_bits_ = 0;
  bool has_shape_ = false, has_offsets_ = false;
};

// The format allows neither overlaps nor holes: in the order of their offsets, every tensor begins
// where the one before it ends.
Status check_coverage(const std::vector<TensorEntry>& entries, uint64_t data_bytes,
                      const std::string& where) {
  std::vector<const TensorEntry*> order;
  order.reserve(entries.size());
  for (const TensorEntry& entry : entries) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const TensorEntry* a, const TensorEntry* b) {
    return a->begin != b->begin ? a->begin < b->begin : a->end < b->end;
  });
  uint64_t end = 0;
  for (const TensorEntry* entry : order) {
    if (entry->begin != end) {
      return make_error(Code::kCorrupt,
                        "%s: tensor %s begins at byte %llu of the data, %s, "
                        "expected %llu, where the tensor before it ends",
                        where.c_str(), shown(entry->name).c_str(), ull(entry->begin),
                        entry->begin < end ? "overlapping another" : "leaving a hole", ull(end));
    }
    end = entry->end;
  }
  if (end != data_bytes) {
    return make_error(Code::kCorrupt, "%s: has %llu bytes after the last tensor, expected none",
                      where.c_str(), ull(data_bytes - end));
  }
  return {};
}

Result<uint64_t> header_length(std::span<const uint8_t> head, uint64_t file_bytes,
                               const std::string& where) {
  if (file_bytes < 8 || head.size() < 8) {
    return make_error(Code::kCorrupt,
                      "%s: has %llu bytes, expected a safetensors file of 10 or more",
                      where.c_str(), ull(file_bytes));
  }
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | head[static_cast<size_t>(i)];
  if (length > kMaxHeader || length > file_bytes - 8) {
    return make_error(Code::kCorrupt,
                      "%s: header length is %llu, expected at most %llu (the file has %llu bytes)",
                      where.c_str(), ull(length), ull(std::min(kMaxHeader, file_bytes - 8)),
                      ull(file_bytes));
  }
  return length;
}

}  // namespace

Result<std::vector<TensorEntry>> parse_safetensors(std::span<const uint8_t> head,
                                                   uint64_t file_bytes, const std::string& where) {
  DSV3_ASSIGN(const uint64_t length, header_length(head, file_bytes, where));
  if (head.size() - 8 < length) {
    return make_error(Code::kInternal, "%s: header was not read whole", where.c_str());
  }
  const std::string_view text(reinterpret_cast<const char*>(head.data()) + 8, length);
  if (text.empty() || text[0] != '{') {
    return make_error(Code::kCorrupt, "%s: header does not begin with '{'", where.c_str());
  }
  JsonLimits limits;
  limits.max_depth = 4;  // header, tensor, shape
  limits.max_bytes = kMaxHeader;
  DSV3_ASSIGN(const JsonDocument json, parse_json(text, where, limits));

  const uint64_t data_begin = 8 + length;
  const uint64_t data_bytes = file_bytes - data_begin;
  std::vector<TensorEntry> entries;
  for (const auto& [name, value] : json->items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) {
        return make_error(Code::kCorrupt, "%s: __metadata__ is not an object", where.c_str());
      }
      continue;
    }
    DSV3_ASSIGN(TensorEntry entry, EntryReader(where, name).read(name, value, data_bytes));
    entries.push_back(std::move(entry));
  }
  DSV3_TRY(check_coverage(entries, data_bytes, where));
  for (TensorEntry& entry : entries) {
    entry.begin += data_begin;
    entry.end += data_begin;
  }
  return entries;
}

Result<std::map<std::string, std::string>> parse_safetensors_index(std::string_view text,
                                                                   const std::string& where) {
  DSV3_ASSIGN(const JsonDocument document, parse_json(text, where));
  const Json& json = *document;
  const auto map = json.is_object() ? json.find("weight_map") : json.end();
  if (!json.is_object() || map == json.end() || !map->is_object()) {
    return make_field_error(Code::kCorrupt, "weight_map", "%s: has no weight_map object",
                            where.c_str());
  }
  std::map<std::string, std::string> out;
  for (const auto& [name, value] : map->items()) {
    const std::string shard = value.is_string() ? value.get<std::string>() : std::string();
    // A plain name in the checkpoint's own folder: nothing in an index may lead out of it.
    if (shard.empty() || shard.size() > 255 || shard[0] == '.' ||
        shard.find_first_of(std::string_view("/\\\0", 3)) != std::string::npos) {
      return make_field_error(Code::kCorrupt, "weight_map",
                              "%s: weight_map names \"%s\" as the file of %s, expected the "
                              "plain name of a file beside it",
                              where.c_str(), utf8_prefix(shard, 100).c_str(), shown(name).c_str());
    }
    out.emplace(name, shard);
  }
  return out;
}

std::string SourceTensor::where() const { return file->path() + ": tensor " + name; }
std::string SourceTensor::shape_text() const { return shape_text_of(shape); }

Status Checkpoint::add_file(const std::string& path) {
  DSV3_ASSIGN(File opened, File::open(path));
  files_.push_back(std::make_unique<File>(std::move(opened)));
  const File& file = *files_.back();
  std::vector<uint8_t> head(std::min<uint64_t>(8, file.size()));
  DSV3_TRY(file.read_at(0, head.data(), head.size()));
  DSV3_ASSIGN(const uint64_t length, header_length(head, file.size(), path));
  head.resize(8 + length);
  DSV3_TRY(file.read_at(0, head.data(), head.size()));
  DSV3_ASSIGN(std::vector<TensorEntry> entries, parse_safetensors(head, file.size(), path));
  for (TensorEntry& entry : entries) {
    SourceTensor tensor;
    static_cast<TensorEntry&>(tensor) = std::move(entry);
    tensor.file = &file;
    const auto [it, added] = tensors_.emplace(tensor.name, tensor);
    if (!added) {
      return make_field_error(Code::kCorrupt, tensor.name.c_str(),
                              "%s: tensor %s is also in %s, expected it once", path.c_str(),
                              shown(tensor.name).c_str(), it->second.file->path().c_str());
    }
  }
  return {};
}

Result<Checkpoint> Checkpoint::open(const std::string& folder) {
  Checkpoint checkpoint;
  const std::string single = join_path(folder, "model.safetensors");
  const std::string index = join_path(folder, "model.safetensors.index.json");
  DSV3_ASSIGN(const bool has_single, file_exists(single));
  if (has_single) {
    checkpoint.where_ = single;
    DSV3_TRY(checkpoint.add_file(single));
    return checkpoint;
  }
  DSV3_ASSIGN(const bool has_index, file_exists(index));
  if (!has_index) {
    DSV3_TRY(list_directory(folder).status());  // no such folder, or no folder at all
    return make_error(Code::kNotFound,
                      "%s: has neither model.safetensors nor model.safetensors.index.json",
                      folder.c_str());
  }
  checkpoint.where_ = index;
  DSV3_ASSIGN(const std::string text, read_file(index, uint64_t{1} << 28));
  DSV3_ASSIGN(const auto weight_map, parse_safetensors_index(text, index));
  std::vector<std::string> shards;
  for (const auto& [name, shard] : weight_map) shards.push_back(shard);
  std::sort(shards.begin(), shards.end());
  shards.erase(std::unique(shards.begin(), shards.end()), shards.end());
  for (const std::string& shard : shards) {
    DSV3_TRY(checkpoint.add_file(join_path(folder, shard)));
  }
  for (const auto& [name, shard] : weight_map) {
    const SourceTensor* tensor = checkpoint.find(name);
    if (tensor == nullptr || tensor->file->path() != join_path(folder, shard)) {
      return make_field_error(Code::kCorrupt, name.c_str(),
                              "%s: weight_map says that tensor %s is in %s, which does not have it",
                              index.c_str(), shown(name).c_str(), shard.c_str());
    }
  }
  return checkpoint;
}

const SourceTensor* Checkpoint::find(std::string_view name) const {
  const auto it = tensors_.find(name);
  return it == tensors_.end() ? nullptr : &it->second;
}

uint64_t Checkpoint::bytes() const {
  uint64_t sum = 0;
  for (const auto& file : files_) sum += file->size();
  return sum;
}

}  // namespace dsv3
