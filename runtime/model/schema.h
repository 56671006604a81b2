// What a model of a given config consists of: the one place where the weights' names and shapes
// stand. The converter fills the records' types from a checkpoint and writes them, opening compares
// them with what a file says; both let place_records() decide where every byte lies.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/base/status.h"
#include "runtime/model/config.h"
#include "runtime/model/weights.h"

namespace dsv3 {

enum class RecordKind : uint8_t {
  kVector,     // F32 values
  kEmbedding,  // [vocab, hidden]
  kHead,       // [vocab, hidden]
  kKept,       // eh_proj: a linear layer that the converter leaves as it is
  kLinear,     // a linear layer of attention
  kFfn,        // a matrix of a dense feed-forward network or the shared experts
  kRouter,     // BF16 or F32
  kHeadsUk,    // per head [kv_lora_rank, qk_nope_head_dim], out of kv_b_proj
  kHeadsUv,    // per head [v_head_dim, kv_lora_rank], out of kv_b_proj
  kExperts,    // per expert gate_proj, up_proj, down_proj
};

inline constexpr uint64_t kDataAlign = 4096;  // of the data, and of every expert
inline constexpr uint64_t kPartAlign = 64;    // of everything else

struct Part {
  const char* name = "";  // of an expert's part: "gate_proj"
  kernels::DType dtype = kernels::DType::kF32;
  kernels::Layout layout = kernels::Layout::kTile16x2;
  int32_t n = 0, k = 0;
  uint32_t scale_n = 0, scale_k = 0;  // 0: no scales
  uint64_t data = 0, scales = 0;      // offsets inside the item

  uint64_t data_bytes() const;
  uint64_t scale_count() const;
};

struct Record {
  std::string name;  // the tensor's in the checkpoint; of experts "model.layers.3.mlp.experts"
  RecordKind kind = RecordKind::kVector;
  uint32_t count = 1;
  std::vector<Part> parts;
  uint64_t offset = 0, stride = 0, bytes = 0;
  std::vector<uint64_t> hashes;
  bool mtp = false;  // belongs to a module after the last layer

  // Where the views of this record belong; the one that fits the kind is set.
  VectorView* vector = nullptr;
  MatrixView* matrix = nullptr;
  std::vector<MatrixView>* heads = nullptr;
  ExpertsView* experts = nullptr;

  uint64_t item_offset(uint64_t item) const { return offset + item * stride; }
  // What item `item` is called: "model.layers.3.mlp.experts.17".
  std::string item_name(uint64_t item) const;
  // What part `part` of item `item` is called in the checkpoint (for messages and `inspect`).
  std::string part_name(uint64_t item, size_t part) const;
};

// All records of a model, in the order of the file, with every type still F32. Sizes `weights` and
// points the records into it. The config has passed validate(), which bounds what this allocates.
std::vector<Record> model_records(const ModelConfig& config, ModelWeights* weights);

// Whether a part of this kind may have this type.
bool dtype_fits(RecordKind kind, kernels::DType dtype);
const char* dtypes_of(RecordKind kind);  // "BF16, F16 or F32"
// The layout of a matrix of this type that would stand in `layout` otherwise.
kernels::Layout layout_of(kernels::DType dtype, kernels::Layout layout);

// Fills offsets, strides and sizes from types and shapes; returns the bytes of all data.
uint64_t place_records(std::vector<Record>* records);

// Makes the weights' views point into `data` (the start of the file's data). Sizes the vectors of
// heads and experts, and lets a tied head share the embedding.
void bind_records(const std::vector<Record>& records, const ModelConfig& config,
                  const uint8_t* data, ModelWeights* weights);

}  // namespace dsv3
