#include "runtime/model/synthetic.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "runtime/base/checked.h"
#include "runtime/model/parallel.h"

namespace dsv3 {
namespace {

using kernels::DType;

constexpr uint64_t kChunk = uint64_t{4} << 20;

// SplitMix64: a stream that may begin anywhere.
constexpr uint64_t kStep = 0x9e3779b97f4a7c15u;
uint64_t mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// What random bits become weights of a type with: (bits & keep) | set. Magnitudes lie within a
// factor of 16 of each other and signs are random, as in trained weights; the scale makes the layer
// keep its input's size.
struct Masks {
  uint64_t keep, set;
};
Masks masks_of(DType type) {
  switch (type) {
    case DType::kF8E4M3:  // exponents 8, 10, 12 and 14 of 0..15: 2 to 240, as in trained blocks
      return {0xb7b7b7b7b7b7b7b7u, 0x4040404040404040u};
    case DType::kBF16:  // exponents 2^-7 .. 2^-4 around 1/32
      return {0x81ff81ff81ff81ffu, 0x3c003c003c003c00u};
    case DType::kF16:
      return {0x8fff8fff8fff8fffu, 0x2000200020002000u};
    case DType::kF32:
      return {0x81ffffff81ffffffu, 0x3c0000003c000000u};
    case DType::kMXFP4:  // any codes; the scales among them are written afterwards
      break;
  }
  return {~uint64_t{0}, 0};
}

// Eight streams of Marsaglia's xorshift side by side: shifts and exclusive ors alone, which any
// processor has vectors for, so that memory and not the numbers takes the time.
class Lanes {
 public:
  Lanes(uint64_t seed, uint64_t stream) {
    uint64_t state = mix(seed) ^ mix(stream * kStep);
    for (uint64_t& lane : lanes_) lane = mix(state += kStep) | 1;  // not zero, which would stay
  }

  void next(const Masks& masks, uint64_t* out) {
    for (int i = 0; i < kLanes; ++i) {
      uint64_t x = lanes_[i];
      x ^= x << 13;
      x ^= x >> 7;
      x ^= x << 17;
      lanes_[i] = x;
      out[i] = (x & masks.keep) | masks.set;
    }
  }

  static constexpr int kLanes = 8;

 private:
  uint64_t lanes_[kLanes];
};

void fill_random(uint64_t seed, uint64_t stream, DType type, uint8_t* out, uint64_t bytes) {
  const Masks masks = masks_of(type);
  Lanes lanes(seed, stream);
  uint64_t words[Lanes::kLanes];
  uint64_t at = 0;
  for (; at + sizeof words <= bytes; at += sizeof words) {
    lanes.next(masks, words);
    std::memcpy(out + at, words, sizeof words);
  }
  lanes.next(masks, words);
  std::memcpy(out + at, words, bytes - at);
}

// The scales of tiles [begin, end) of an MXFP4 matrix.
void fill_mx_scales(const Part& part, uint64_t begin, uint64_t end, uint8_t* out) {
  // E2M1 codes have a root mean square of 2.9.
  const double scale = 1 / (2.9 * std::sqrt(static_cast<double>(part.k)));
  const int code = 127 + static_cast<int>(std::lround(std::log2(scale)));
  constexpr int64_t kInputs = 4 * kernels::kMxBlock;  // behind one line of scales
  for (uint64_t row = begin * kernels::kTileN; row < end * kernels::kTileN;
       row += kernels::kTileN) {
    for (int64_t column = 0; column < part.k; column += kInputs) {
      const auto place = kernels::mx_place(static_cast<int64_t>(row), column, part.k);
      std::memset(out + place.scale, code, 64);
    }
  }
}

void fill_floats(float value, float* out, uint64_t count) { std::fill_n(out, count, value); }

// One stretch of a part's data.
struct Piece {
  const Record* record;
  const Part* part;
  uint64_t item, begin, end;
};

void fill_piece(const Piece& piece, uint64_t seed, uint8_t* data) {
  const Part& part = *piece.part;
  const uint64_t base = piece.record->item_offset(piece.item);
  uint8_t* out = data + base + part.data;
  if (piece.record->kind == RecordKind::kVector) {
    const bool bias = piece.record->name.find("bias") != std::string::npos;
    fill_floats(bias ? 0.0f : 1.0f, reinterpret_cast<float*>(out), part.data_bytes() / 4);
    return;
  }
  fill_random(seed, base + part.data + piece.begin, part.dtype, out + piece.begin,
              piece.end - piece.begin);
  if (part.dtype == DType::kMXFP4) {
    const uint64_t tile = kernels::matrix_bytes(part.dtype, part.layout, kernels::kTileN, part.k);
    fill_mx_scales(part, piece.begin / tile, piece.end / tile, out);
  }
  if (piece.begin == 0 && part.scale_n > 0) {
    // Their root mean square is 96: this scale keeps a row of k of them at the input's size.
    const float scale = 1.25f / (96 * std::sqrt(static_cast<float>(part.k)));
    fill_floats(scale, reinterpret_cast<float*>(data + base + part.scales), part.scale_count());
  }
}

}  // namespace

Result<ModelConfig> synthetic_config(const std::string& shape, int64_t layers) {
  ModelConfig c;
  c.model_type = "deepseek_v3";
  c.n_shared_experts = 1;
  c.first_k_dense_replace = 1;
  c.max_position_embeddings = 163840;
  c.bos_token_id = 0;
  c.eos_token_ids = {1};
  if (shape == "v2-lite") {
    c.model_type = "deepseek_v2";
    c.vocab_size = 102400;
    c.hidden_size = 2048;
    c.intermediate_size = 10944;
    c.moe_intermediate_size = 1408;
    c.num_hidden_layers = 27;
    c.num_attention_heads = 16;
    c.kv_lora_rank = 512;
    c.qk_nope_head_dim = 128;
    c.qk_rope_head_dim = 64;
    c.v_head_dim = 128;
    c.n_routed_experts = 64;
    c.n_shared_experts = 2;
    c.num_experts_per_tok = 6;
  } else if (shape == "v3") {
    c.vocab_size = 129280;
    c.hidden_size = 7168;
    c.intermediate_size = 18432;
    c.moe_intermediate_size = 2048;
    c.num_hidden_layers = 61;
    c.num_attention_heads = 128;
    c.q_lora_rank = 1536;
    c.kv_lora_rank = 512;
    c.qk_nope_head_dim = 128;
    c.qk_rope_head_dim = 64;
    c.v_head_dim = 128;
    c.n_routed_experts = 256;
    c.num_experts_per_tok = 8;
    c.first_k_dense_replace = 3;
    c.n_group = 8;
    c.topk_group = 4;
    c.scoring_func = ScoringFunc::kSigmoid;
    c.topk_method = TopkMethod::kNoAuxTc;
    c.norm_topk_prob = true;
    c.routed_scaling_factor = 2.5f;
  } else if (shape == "tiny") {
    c.vocab_size = 4096;
    c.hidden_size = 256;
    c.intermediate_size = 768;
    c.moe_intermediate_size = 128;
    c.num_hidden_layers = 6;
    c.num_attention_heads = 4;
    c.q_lora_rank = 128;
    c.kv_lora_rank = 128;
    c.qk_nope_head_dim = 64;
    c.qk_rope_head_dim = 32;
    c.v_head_dim = 64;
    c.n_routed_experts = 16;
    c.num_experts_per_tok = 4;
    c.n_group = 4;
    c.topk_group = 2;
    c.scoring_func = ScoringFunc::kSigmoid;
    c.topk_method = TopkMethod::kNoAuxTc;
    c.norm_topk_prob = true;
    c.routed_scaling_factor = 2.5f;
  } else {
    return make_field_error(Code::kInvalidArgument, "shape",
                            "shape is \"%s\", expected tiny, v2-lite or v3", shape.c_str());
  }
  if (layers < 0 || layers > c.num_hidden_layers) {
    return make_field_error(
        Code::kInvalidArgument, "layers", "layers is %lld, expected 0 (all) to %lld of shape %s",
        static_cast<long long>(layers), static_cast<long long>(c.num_hidden_layers), shape.c_str());
  }
  if (layers > 0) {
    c.num_hidden_layers = layers;
    // Of a few layers at least the last has experts.
    c.first_k_dense_replace = std::min(c.first_k_dense_replace, layers - 1);
  }
  return c;
}

void choose_synthetic_types(std::vector<Record>* records, const SyntheticOptions& options) {
  for (Record& record : *records) {
    for (Part& part : record.parts) {
      switch (record.kind) {
        case RecordKind::kVector:
          part.dtype = DType::kF32;
          break;
        case RecordKind::kEmbedding:
        case RecordKind::kHead:
          part.dtype = options.head;
          break;
        case RecordKind::kKept:
        case RecordKind::kRouter:
          part.dtype = DType::kBF16;
          break;
        case RecordKind::kLinear:
        case RecordKind::kHeadsUk:
        case RecordKind::kHeadsUv:
          part.dtype = options.linear;
          break;
        case RecordKind::kFfn:
          part.dtype = options.ffn;
          break;
        case RecordKind::kExperts:
          part.dtype = options.experts;
          break;
      }
      part.layout = layout_of(part.dtype, part.layout);
      part.scale_n = part.scale_k = part.dtype == DType::kF8E4M3 ? 128 : 0;
    }
  }
}

Status fill_synthetic(const std::vector<Record>& records, const SyntheticOptions& options,
                      uint8_t* data) {
  std::vector<Piece> pieces;
  for (const Record& record : records) {
    for (uint64_t item = 0; item < record.count; ++item) {
      for (const Part& part : record.parts) {
        const uint64_t bytes = part.data_bytes();
        uint64_t step = record.kind == RecordKind::kVector ? bytes : kChunk;
        if (part.dtype == DType::kMXFP4) {  // whole tiles
          const uint64_t tile =
              kernels::matrix_bytes(part.dtype, part.layout, kernels::kTileN, part.k);
          step = std::max(tile, kChunk / tile * tile);
        }
        for (uint64_t begin = 0; begin < bytes; begin += step) {
          pieces.push_back({&record, &part, item, begin, std::min(bytes, begin + step)});
        }
      }
    }
  }
  return parallel_for(
      pieces.size(), io_threads(),
      [&](size_t i) {
        fill_piece(pieces[i], options.seed, data);
        return ok_status();
      },
      options.go_on);
}

}  // namespace dsv3
