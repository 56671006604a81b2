// An opened .dsv3 file: config, tokenizer, weights. Immutable; shared by any number of threads and
// contexts through std::shared_ptr.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "runtime/base/status.h"
#include "runtime/model/config.h"
#include "runtime/model/weights.h"
#include "runtime/text/chat.h"
#include "runtime/text/tokenizer.h"

namespace dsv3 {

enum class Residency : uint8_t {
  kMap = 0,   // the file stays mapped; nobody may change it (checked before every step)
  kCopy = 1,  // the data is read into memory; the file may go
};

// Called now and then from the working thread with finished and total bytes; returns false to
// cancel.
using Progress = std::function<bool(uint64_t done, uint64_t total)>;

struct OpenOptions {
  Residency residency = Residency::kMap;
  bool verify = false;  // check every checksum (reads the whole file)
  Progress progress;    // used with kCopy and verify
};

struct SyntheticOptions {
  kernels::DType linear = kernels::DType::kF8E4M3;   // of attention
  kernels::DType ffn = kernels::DType::kF8E4M3;      // of dense layers and shared experts
  kernels::DType experts = kernels::DType::kF8E4M3;  // of routed experts
  kernels::DType head = kernels::DType::kBF16;       // of the embedding and the head
  uint64_t seed = 1;
  std::function<bool()> go_on;  // asked now and then by the calling thread; false cancels
};

struct Fingerprint {  // of the header, and so of every tensor's checksum: tells models apart
  std::array<uint8_t, 16> bytes{};
  bool operator==(const Fingerprint&) const = default;
};

// One line of `inspect`.
struct TensorInfo {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;  // logical
  uint64_t offset = 0, bytes = 0;
  uint64_t xxh3 = 0;
};

class Model {
 public:
  static Result<std::shared_ptr<const Model>> open(const std::string& path,
                                                   const OpenOptions& options);
  // A model of the given shape with random weights, made in memory without a file or a tokenizer:
  // for measuring, and for tests of shapes nobody wants to ship.
  static Result<std::shared_ptr<const Model>> synthesise(const ModelConfig& config,
                                                         const SyntheticOptions& options);
  ~Model();
  Model(const Model&) = delete;

  const std::string& path() const;
  const ModelConfig& config() const;
  const ModelWeights& weights() const;
  const Tokenizer& tokenizer() const;
  bool has_tokenizer()
      const;  // false: the checkpoint had no tokenizer.json (text calls are refused)
  ChatTemplate chat_template() const;
  const Fingerprint& fingerprint() const;
  uint64_t file_bytes() const;
  uint64_t weight_bytes() const;  // all tensors
  // Where all of them lie, in one piece.
  std::span<const uint8_t> weight_memory() const;
  uint64_t active_bytes_per_token()
      const;  // weights one token reads (embedding row and head included)
  uint64_t parameters() const;
  std::vector<TensorInfo> tensors() const;

  // kFileChanged when a mapped file is no longer the one that was opened.
  Status check_unchanged() const;
  // Reads everything, compares the checksums and looks for weights that are not finite; names the
  // first tensor that is wrong.
  Status verify(const Progress& progress) const;

 private:
  struct Impl;
  explicit Model(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsv3
