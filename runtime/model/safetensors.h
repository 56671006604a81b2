// Reading checkpoints in the safetensors format: one file, or the shards that
// model.safetensors.index.json names. The reader is as strict as the format's specification: data
// without holes, overlaps or trailing bytes, no name twice. Used by the converter alone.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/os.h"
#include "runtime/base/status.h"

namespace dsv3 {

enum class SourceType : uint8_t { kF32, kBF16, kF16, kF8E4M3, kF8E8M0, kU8, kOther };

// A tensor as a safetensors header describes it.
struct TensorEntry {
  std::string name;
  std::string dtype;  // as written: "F8_E4M3"
  SourceType type = SourceType::kOther;
  size_t element_bytes = 0;     // 0: less than a byte
  std::vector<int64_t> shape;   // empty: a single number
  uint64_t begin = 0, end = 0;  // bytes of the file
};

// Parses the first bytes of a safetensors file: `head` must hold the 8-byte length and the header
// (more is ignored). `where` is the file's name for messages.
Result<std::vector<TensorEntry>> parse_safetensors(std::span<const uint8_t> head,
                                                   uint64_t file_bytes, const std::string& where);

// Tensor name -> shard's file name, from the text of an index.
Result<std::map<std::string, std::string>> parse_safetensors_index(std::string_view text,
                                                                   const std::string& where);

struct SourceTensor : TensorEntry {
  const File* file = nullptr;  // of the checkpoint that owns this tensor

  std::string where() const;  // "model-00001-of-00002.safetensors: tensor NAME"
  // "[15, 192]"
  std::string shape_text() const;
};

// All tensors of a checkpoint folder.
class Checkpoint {
 public:
  static Result<Checkpoint> open(const std::string& folder);

  // Null when there is none of that name.
  const SourceTensor* find(std::string_view name) const;
  const std::map<std::string, SourceTensor, std::less<>>& tensors() const { return tensors_; }
  const std::string& where() const { return where_; }  // the file or index, for messages
  uint64_t bytes() const;                              // of all files

 private:
  Status add_file(const std::string& path);

  std::string where_;
  std::vector<std::unique_ptr<File>> files_;  // addresses are kept by tensors
  std::map<std::string, SourceTensor, std::less<>> tensors_;
};

}  // namespace dsv3
