// Small checkpoints made by the tests: an own writer of safetensors files and an own list of the
// names and shapes of a checkpoint, so that a mistake in the library's cannot hide here. Tests
// change a tensor, a field or a byte and look at what the library says.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/model/weights.h"
#include "tests/support/support.h"

namespace dsv3::test {

using OrderedJson = nlohmann::ordered_json;

struct RawTensor {
  std::string name, dtype;
  std::vector<int64_t> shape;
  std::string bytes;
  int64_t count() const {
    int64_t n = 1;
    for (const int64_t d : shape) n *= d;
    return n;
  }
};

inline std::string le64(uint64_t v) {
  std::string s(8, '\0');
  for (size_t i = 0; i < 8; ++i) s[i] = static_cast<char>(v >> (8 * i));
  return s;
}

// A file with this header text and data, whatever they say.
inline std::string safetensors_file(const std::string& header, const std::string& data) {
  return le64(header.size()) + header + data;
}

inline std::string safetensors_file(const std::vector<RawTensor>& tensors) {
  OrderedJson header = OrderedJson::object();
  header["__metadata__"] = {{"format", "pt"}};
  std::string data;
  for (const RawTensor& t : tensors) {
    header[t.name] = {{"dtype", t.dtype},
                      {"shape", t.shape},
                      {"data_offsets", {data.size(), data.size() + t.bytes.size()}}};
    data += t.bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' ');
  return safetensors_file(text, data);
}

// The file back into tensors.
inline std::vector<RawTensor> read_safetensors(const std::string& bytes) {
  uint64_t length = 0;
  std::memcpy(&length, bytes.data(), 8);
  std::vector<RawTensor> out;
  const OrderedJson header = OrderedJson::parse(bytes.substr(8, length));
  for (const auto& [name, info] : header.items()) {
    if (name == "__metadata__") continue;
    const auto begin = info["data_offsets"][0].get<size_t>();
    const auto end = info["data_offsets"][1].get<size_t>();
    out.push_back({name, info["dtype"], info["shape"].get<std::vector<int64_t>>(),
                   bytes.substr(8 + length + begin, end - begin)});
  }
  return out;
}

// Values by their definitions, not by the library's tables.
inline double e4m3_value(uint8_t v) {
  const int e = v >> 3 & 15, m = v & 7;
  if (e == 15 && m == 7) return NAN;
  const double magnitude = e == 0 ? std::ldexp(m, -9) : std::ldexp(8 + m, e - 10);
  return (v & 0x80) != 0 ? -magnitude : magnitude;
}
inline double raw_value(std::string_view dtype, const char* p) {
  const auto u8 = static_cast<uint8_t>(*p);
  if (dtype == "F8_E4M3") return e4m3_value(u8);
  if (dtype == "F8_E8M0") return std::ldexp(1.0, u8 - 127);
  if (dtype == "F32") {
    float f;
    std::memcpy(&f, p, 4);
    return static_cast<double>(f);
  }
  uint16_t v;
  std::memcpy(&v, p, 2);
  if (dtype == "BF16") {
    const uint32_t bits = static_cast<uint32_t>(v) << 16;
    float f;
    std::memcpy(&f, &bits, 4);
    return static_cast<double>(f);
  }
  const int e = v >> 10 & 31, m = v & 1023;  // F16
  const double magnitude = e == 0 ? std::ldexp(m, -24) : std::ldexp(1024 + m, e - 25);
  return (v & 0x8000) != 0 ? -magnitude : magnitude;
}
inline size_t raw_bytes(std::string_view dtype) {
  return dtype == "F32" ? 4 : dtype == "BF16" || dtype == "F16" ? 2 : 1;
}
inline double raw_at(const RawTensor& t, int64_t index) {
  return raw_value(t.dtype, t.bytes.data() + static_cast<size_t>(index) * raw_bytes(t.dtype));
}

inline double e2m1_value(int v) {
  const int e = v >> 1 & 3, m = v & 1;
  const double magnitude = e == 0 ? m * 0.5 : std::ldexp(2 + m, e - 2);
  return (v & 8) != 0 ? -magnitude : magnitude;
}
// The scale's code of element [i, j] of an MXFP4 matrix, and the element without it.
struct MxElement {
  int scale;
  double value;
};
inline MxElement mx_at(const MatrixView& m, int64_t i, int64_t j) {
  const int64_t blocks = (m.k + 31) / 32, lines = (blocks + 3) / 4, b = j / 32;
  const uint8_t* line = m.data + i / 16 * (blocks * 256 + lines * 64) + b / 4 * (64 + 4 * 256);
  const uint8_t pair = line[64 + b % 4 * 256 + j % 32 / 8 * 64 + i % 16 * 4 + j % 4];
  return {line[b % 4 * 16 + i % 16], e2m1_value(j % 8 < 4 ? pair & 15 : pair >> 4)};
}

// Element [i, j] of a matrix as the .dsv3 file holds it, by the layout's definition.
inline double view_at(const MatrixView& m, int64_t i, int64_t j) {
  if (m.layout == kernels::Layout::kTileMx) {
    const MxElement e = mx_at(m, i, j);
    return std::ldexp(e.value, e.scale - 127);
  }
  static const char* const kNames[] = {"F32", "BF16", "F16", "F8_E4M3"};
  const std::string_view dtype = kNames[static_cast<int>(m.dtype)];
  int64_t index = i * m.k + j;
  if (m.layout == kernels::Layout::kTile16x2) {
    index = (((i / 16) * ((m.k + 1) / 2) + j / 2) * 16 + i % 16) * 2 + j % 2;
  }
  const double v = raw_value(
      dtype, reinterpret_cast<const char*>(m.data) + static_cast<size_t>(index) * raw_bytes(dtype));
  if (m.scales == nullptr) return v;
  const int64_t columns = (m.k + m.scale_k - 1) / m.scale_k;
  return static_cast<double>(static_cast<float>(v) *
                             m.scales[i / m.scale_n * columns + j / m.scale_k]);
}

struct MiniCheckpoint {
  OrderedJson config;
  std::vector<RawTensor> tensors;

  RawTensor& at(const std::string& name) {
    for (RawTensor& t : tensors) {
      if (t.name == name) return t;
    }
    throw std::runtime_error("no tensor " + name);
  }
  const RawTensor* find(const std::string& name) const {
    for (const RawTensor& t : tensors) {
      if (t.name == name) return &t;
    }
    return nullptr;
  }
  void remove(const std::string& name) {
    std::erase_if(tensors, [&](const RawTensor& t) { return t.name == name; });
  }
  void write(const std::string& folder) const {
    write_bytes(folder + "/config.json", config.dump(1));
    write_bytes(folder + "/model.safetensors", safetensors_file(tensors));
  }
};

class Random {
 public:
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }
  float uniform() { return static_cast<float>(next()) / 1073741824.0f - 1.0f; }  // [-1, 1)

 private:
  uint64_t state_ = 88172645463325252u;
};

// All tensors that a config calls for. `weight_dtype` is the linear layers' type, `dtype` that of
// everything else.
class MiniBuilder {
 public:
  MiniBuilder(OrderedJson config, std::string weight_dtype, std::string dtype = "BF16")
      : weight_dtype_(std::move(weight_dtype)), dtype_(std::move(dtype)) {
    out_.config = std::move(config);
    if (weight_dtype_ == "F8_E4M3" && !out_.config.contains("quantization_config")) {
      out_.config["quantization_config"] = {{"quant_method", "fp8"},
                                            {"fmt", "e4m3"},
                                            {"activation_scheme", "dynamic"},
                                            {"weight_block_size", {16, 16}}};
    }
  }

  MiniCheckpoint build(bool mtp_copies = false) {
    const int64_t hidden = get("hidden_size"), layers = get("num_hidden_layers");
    plain("model.embed_tokens.weight", {get("vocab_size"), hidden});
    for (int64_t i = 0; i < layers; ++i) layer(i);
    plain("model.norm.weight", {hidden});
    if (!out_.config.value("tie_word_embeddings", false)) {
      plain("lm_head.weight", {get("vocab_size"), hidden});
    }
    for (int64_t i = layers; i < layers + out_.config.value("num_nextn_predict_layers", 0); ++i) {
      const std::string p = "model.layers." + std::to_string(i) + ".";
      plain(p + "enorm.weight", {hidden});
      plain(p + "hnorm.weight", {hidden});
      plain(p + "eh_proj.weight", {hidden, 2 * hidden});
      plain(p + "shared_head.norm.weight", {hidden});
      if (mtp_copies) {
        copy(p + "embed_tokens.weight", "model.embed_tokens.weight");
        copy(p + "shared_head.head.weight", "lm_head.weight");
      }
      layer(i);
    }
    return std::move(out_);
  }

 private:
  int64_t get(const char* key) const { return out_.config.at(key).get<int64_t>(); }

  std::string value_bytes(const std::string& dtype, float v) {
    std::string s(raw_bytes(dtype), '\0');
    uint32_t bits;
    std::memcpy(&bits, &v, 4);
    if (dtype == "F32") {
      std::memcpy(s.data(), &v, 4);
    } else if (dtype == "BF16") {
      const auto upper = static_cast<uint16_t>(bits >> 16);
      std::memcpy(s.data(), &upper, 2);
    } else {  // F16, truncated; |v| < 1 and not tiny here
      const uint16_t half =
          static_cast<uint16_t>((bits >> 16 & 0x8000) |
                                std::max<int>(0, static_cast<int>(bits >> 13 & 0x3ffff) - 0x1c000));
      std::memcpy(s.data(), &half, 2);
    }
    return s;
  }
  void plain(const std::string& name, std::vector<int64_t> shape, std::string dtype = "") {
    if (dtype.empty()) dtype = dtype_;
    RawTensor t{name, dtype, std::move(shape), ""};
    for (int64_t i = 0; i < t.count(); ++i) t.bytes += value_bytes(dtype, random_.uniform());
    out_.tensors.push_back(std::move(t));
  }
  void linear(const std::string& name, int64_t n, int64_t k) {
    if (weight_dtype_ != "F8_E4M3") return plain(name, {n, k}, weight_dtype_);
    RawTensor t{name, "F8_E4M3", {n, k}, ""};
    for (int64_t i = 0; i < n * k; ++i) {
      auto code = static_cast<uint8_t>(random_.next());
      if ((code & 0x7f) == 0x7f) code = 0x7e;
      t.bytes += static_cast<char>(code);
    }
    const auto& block = out_.config["quantization_config"]["weight_block_size"];
    const auto rows = block[0].get<int64_t>(), columns = block[1].get<int64_t>();
    RawTensor s{
        name + "_scale_inv", "F32", {(n + rows - 1) / rows, (k + columns - 1) / columns}, ""};
    for (int64_t i = 0; i < s.count(); ++i) {
      s.bytes += value_bytes("F32", 0.001f + 0.01f * std::fabs(random_.uniform()));
    }
    out_.tensors.push_back(std::move(t));
    out_.tensors.push_back(std::move(s));
  }
  void copy(const std::string& name, const std::string& of) {
    RawTensor t = out_.at(of);
    t.name = name;
    out_.tensors.push_back(std::move(t));
  }
  void ffn(const std::string& p, int64_t width) {
    linear(p + "gate_proj.weight", width, get("hidden_size"));
    linear(p + "up_proj.weight", width, get("hidden_size"));
    linear(p + "down_proj.weight", get("hidden_size"), width);
  }
  void layer(int64_t i) {
    const std::string p = "model.layers." + std::to_string(i) + ".";
    const std::string a = p + "self_attn.";
    const int64_t hidden = get("hidden_size"), heads = get("num_attention_heads");
    const int64_t nope = get("qk_nope_head_dim"), rope = get("qk_rope_head_dim");
    const int64_t v = get("v_head_dim"), kv = get("kv_lora_rank");
    plain(p + "input_layernorm.weight", {hidden});
    plain(p + "post_attention_layernorm.weight", {hidden});
    if (out_.config["q_lora_rank"].is_null()) {
      linear(a + "q_proj.weight", heads * (nope + rope), hidden);
    } else {
      linear(a + "q_a_proj.weight", get("q_lora_rank"), hidden);
      plain(a + "q_a_layernorm.weight", {get("q_lora_rank")});
      linear(a + "q_b_proj.weight", heads * (nope + rope), get("q_lora_rank"));
    }
    linear(a + "kv_a_proj_with_mqa.weight", kv + rope, hidden);
    plain(a + "kv_a_layernorm.weight", {kv});
    linear(a + "kv_b_proj.weight", heads * (nope + v), kv);
    linear(a + "o_proj.weight", hidden, heads * v);
    if (i < get("first_k_dense_replace")) return ffn(p + "mlp.", get("intermediate_size"));
    plain(p + "mlp.gate.weight", {get("n_routed_experts"), hidden});
    if (out_.config["topk_method"] == "noaux_tc") {
      plain(p + "mlp.gate.e_score_correction_bias", {get("n_routed_experts")}, "F32");
    }
    for (int64_t e = 0; e < get("n_routed_experts"); ++e) {
      ffn(p + "mlp.experts." + std::to_string(e) + ".", get("moe_intermediate_size"));
    }
    ffn(p + "mlp.shared_experts.", get("moe_intermediate_size") * get("n_shared_experts"));
  }

  std::string weight_dtype_, dtype_;
  MiniCheckpoint out_;
  Random random_;
};

inline OrderedJson mini_config() {
  return OrderedJson{{"model_type", "deepseek_v3"},
                     {"hidden_act", "silu"},
                     {"vocab_size", 40},
                     {"hidden_size", 32},
                     {"intermediate_size", 48},
                     {"moe_intermediate_size", 24},
                     {"num_hidden_layers", 2},
                     {"num_nextn_predict_layers", 1},
                     {"num_attention_heads", 2},
                     {"q_lora_rank", 24},
                     {"kv_lora_rank", 20},
                     {"qk_nope_head_dim", 8},
                     {"qk_rope_head_dim", 4},
                     {"v_head_dim", 8},
                     {"n_routed_experts", 4},
                     {"n_shared_experts", 1},
                     {"num_experts_per_tok", 2},
                     {"first_k_dense_replace", 1},
                     {"moe_layer_freq", 1},
                     {"n_group", 2},
                     {"topk_group", 1},
                     {"topk_method", "noaux_tc"},
                     {"scoring_func", "sigmoid"},
                     {"norm_topk_prob", true},
                     {"routed_scaling_factor", 2.5},
                     {"rms_norm_eps", 1e-6},
                     {"rope_theta", 10000},
                     {"rope_scaling", nullptr},
                     {"max_position_embeddings", 128},
                     {"tie_word_embeddings", false},
                     {"bos_token_id", 0},
                     {"eos_token_id", 1}};
}

inline MiniCheckpoint mini_fp8() { return MiniBuilder(mini_config(), "F8_E4M3").build(); }

// Runs a function on a thread with a small stack: what is recursive in a hostile input's depth
// crashes here.
void on_small_stack(const std::function<void()>& body);

}  // namespace dsv3::test
