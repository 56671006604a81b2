// What a conversion will do, decided before a byte is written: which tensor of the checkpoint
// becomes which record, in what type, and in what pieces the data is made. Every check of names,
// types and shapes happens here.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/model/config.h"
#include "runtime/model/convert.h"
#include "runtime/model/safetensors.h"
#include "runtime/model/schema.h"

namespace dsv3 {

// A matrix (or vector) of the checkpoint, [n, k].
struct SourceMatrix {
  const SourceTensor* weight = nullptr;
  const SourceTensor* scales = nullptr;  // of FP8 weights: [ceil(n/block_n), ceil(k/block_k)]
  kernels::DType dtype = kernels::DType::kF32;
  int64_t n = 0, k = 0;
  int64_t block_n = 0, block_k = 0;
  bool quantise = false;  // to E4M3 on the way
  bool to_mx = false;     // to MXFP4 on the way

  // MXFP4 (weights [n, k/2] U8, the even column in the low half; scales [n, k/32] E8M0).
  bool is_mx() const { return dtype == kernels::DType::kMXFP4; }
  size_t row_bytes() const {
    return is_mx() ? static_cast<size_t>(k) / 2
                   : static_cast<size_t>(k) * kernels::dtype_size(dtype);
  }
  bool to_fp8() const { return quantise || dtype == kernels::DType::kF8E4M3; }
};

// A tensor that only repeats another (an MTP module's embedding, a tied head).
struct SourceCopy {
  const SourceTensor* copy = nullptr;
  const SourceTensor* original = nullptr;
};

// One piece of work, small enough to hold in memory. The chunks that write tile the items of the
// records without gaps, in the order of the file.
struct Chunk {
  enum class Kind : uint8_t {
    kRows,     // rows [begin, end) of a matrix or vector
    kScales,   // all scales of an FP8 matrix, after its rows
    kHead,     // one head of w_uk or w_uv, with its scales
    kCompare,  // bytes [begin, end) of copy number `record` against its original
  };
  Kind kind = Kind::kRows;
  uint8_t part = 0;
  bool last_of_item = false;
  uint32_t record = 0, item = 0;
  uint64_t begin = 0, end = 0;
  uint64_t offset = 0, bytes = 0;  // in the item; bytes reach up to the next chunk
};

struct ConvertPlan {
  ModelConfig config;
  std::vector<Record> records;
  // sources[r]: items x parts matrices (experts), or one (everything else; kv_b_proj for heads).
  std::vector<std::vector<SourceMatrix>> sources;
  std::vector<SourceCopy> copies;
  std::vector<Chunk> chunks;
  uint64_t data_bytes = 0;
  uint64_t work_bytes = 0;  // written and compared, for progress

  const SourceMatrix& source(const Chunk& c) const {
    const std::vector<SourceMatrix>& all = sources[c.record];
    return all.size() == 1 ? all[0] : all[c.item * records[c.record].parts.size() + c.part];
  }
};

// `plan` outlives nothing: it points into `checkpoint`.
Result<ConvertPlan> plan_conversion(const Checkpoint& checkpoint, const ModelConfig& config,
                                    const WeightModes& modes);

}  // namespace dsv3
