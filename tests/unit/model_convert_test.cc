// Every weight of every converted model against the checkpoint it was made from, element by
// element, read from both files by the tests' own definitions of the formats.
#include <doctest/doctest.h>
#include <sys/stat.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "runtime/base/os.h"
#include "runtime/model/convert.h"
#include "tests/support/support.h"
#include "tests/unit/model_support.h"

using namespace dsv3;
using namespace dsv3::test;

namespace {

std::shared_ptr<const Model> convert_and_open(const std::string& dir, const std::string& out,
                                              WeightsMode mode = WeightsMode::kKeep,
                                              Residency residency = Residency::kMap) {
  ConvertOptions options;
  options.weights = mode;
  options.overwrite = true;
  const Status status = convert_checkpoint(dir, out, options);
  INFO(status.message());
  REQUIRE(status.ok());
  OpenOptions open;
  open.residency = residency;
  open.verify = true;
  auto model = Model::open(out, open);
  INFO(model.status().message());
  REQUIRE(model.ok());
  return model.value();
}

// The checkpoint's side of the comparison.
class Source {
 public:
  explicit Source(std::vector<RawTensor> tensors, int64_t block_rows, int64_t block_columns)
      : rows_(block_rows), columns_(block_columns) {
    for (RawTensor& t : tensors) {
      std::string name = t.name;
      tensors_.emplace(std::move(name), std::move(t));
    }
  }
  const RawTensor& tensor(const std::string& name) const { return tensors_.at(name); }
  // A matrix that gives W[i][j], dequantised in float32 as the published code does.
  struct Matrix {
    const RawTensor* weight;
    const RawTensor* scales;
    int64_t rows, columns;
    double at(int64_t i, int64_t j) const {
      const double v = raw_at(*weight, i * weight->shape[1] + j);
      if (scales == nullptr) return v;
      const double s = raw_at(*scales, i / rows * scales->shape[1] + j / columns);
      return static_cast<double>(static_cast<float>(v) * static_cast<float>(s));
    }
  };
  Matrix matrix(const std::string& name) const {
    const auto scales = tensors_.find(name + "_scale_inv");
    return {&tensors_.at(name), scales == tensors_.end() ? nullptr : &scales->second, rows_,
            columns_};
  }

 private:
  std::map<std::string, RawTensor> tensors_;
  int64_t rows_, columns_;
};

class Comparison {
 public:
  Comparison(const Model& model, const Source& source) : m_(model), s_(source) {}
  // Fp8 mode: weights of linear layers may differ by half a step of E4M3.
  bool quantised = false;
  int64_t compared = 0;

  void all() {
    const ModelConfig& c = m_.config();
    const ModelWeights& w = m_.weights();
    exact_matrix(w.embed, "model.embed_tokens.weight");
    exact_matrix(w.head, c.tie_word_embeddings ? "model.embed_tokens.weight" : "lm_head.weight");
    vector(w.final_norm, "model.norm.weight");
    REQUIRE(w.layers.size() == static_cast<size_t>(c.num_hidden_layers));
    REQUIRE(w.mtp.size() == static_cast<size_t>(c.num_nextn_predict_layers));
    for (size_t i = 0; i < w.layers.size(); ++i) layer(static_cast<int64_t>(i), w.layers[i]);
    for (size_t i = 0; i < w.mtp.size(); ++i) {
      const int64_t index = c.num_hidden_layers + static_cast<int64_t>(i);
      const std::string p = "model.layers." + std::to_string(index) + ".";
      vector(w.mtp[i].enorm, p + "enorm.weight");
      vector(w.mtp[i].hnorm, p + "hnorm.weight");
      vector(w.mtp[i].head_norm, p + "shared_head.norm.weight");
      exact_matrix(w.mtp[i].eh_proj, p + "eh_proj.weight");
      layer(index, w.mtp[i].layer);
    }
  }

 private:
  void layer(int64_t i, const LayerWeights& w) {
    const ModelConfig& c = m_.config();
    const std::string p = "model.layers." + std::to_string(i) + ".", a = p + "self_attn.";
    vector(w.input_norm, p + "input_layernorm.weight");
    vector(w.post_norm, p + "post_attention_layernorm.weight");
    if (c.q_lora_rank > 0) {
      matrix(w.q_a, a + "q_a_proj.weight");
      vector(w.q_a_norm, a + "q_a_layernorm.weight");
      matrix(w.q_b, a + "q_b_proj.weight");
    } else {
      CHECK(w.q_a.empty());
      matrix(w.q_b, a + "q_proj.weight");
    }
    matrix(w.kv_a, a + "kv_a_proj_with_mqa.weight");
    vector(w.kv_a_norm, a + "kv_a_layernorm.weight");
    matrix(w.o, a + "o_proj.weight");
    heads(w, a + "kv_b_proj.weight");
    REQUIRE(w.moe == c.is_moe_layer(i));
    if (!w.moe) return ffn(w.dense, p + "mlp.");
    exact_matrix(w.router, p + "mlp.gate.weight");
    if (c.topk_method == TopkMethod::kNoAuxTc) {
      vector(w.router_bias, p + "mlp.gate.e_score_correction_bias");
    }
    ffn(w.shared, p + "mlp.shared_experts.");
    REQUIRE(w.experts.experts.size() == static_cast<size_t>(c.n_routed_experts));
    CHECK(w.experts.stride % 4096 == 0);
    for (size_t e = 0; e < w.experts.experts.size(); ++e) {
      const FfnView& f = w.experts.experts[e];
      ffn(f, p + "mlp.experts." + std::to_string(e) + ".");
      // One extent: gate, up and down with their scales between base + e * stride and the next.
      const uint8_t* begin = w.experts.base + e * w.experts.stride;
      CHECK(reinterpret_cast<uintptr_t>(begin) % 4096 == 0);
      for (const MatrixView* m : {&f.gate, &f.up, &f.down}) {
        CHECK(m->data >= begin);
        CHECK(m->data + m->bytes <= begin + w.experts.stride);
        if (m->scales == nullptr) continue;
        const auto* scales = reinterpret_cast<const uint8_t*>(m->scales);
        CHECK(scales >= m->data + m->bytes);
        CHECK(scales + 4 * m->scale_count() <= begin + w.experts.stride);
      }
    }
  }
  void ffn(const FfnView& f, const std::string& p) {
    matrix(f.gate, p + "gate_proj.weight");
    matrix(f.up, p + "up_proj.weight");
    matrix(f.down, p + "down_proj.weight");
  }
  void heads(const LayerWeights& w, const std::string& name) {
    const ModelConfig& c = m_.config();
    REQUIRE(w.w_uk.size() == static_cast<size_t>(c.num_attention_heads));
    REQUIRE(w.w_uv.size() == static_cast<size_t>(c.num_attention_heads));
    const int64_t rows = c.qk_nope_head_dim + c.v_head_dim;
    for (int64_t h = 0; h < c.num_attention_heads; ++h) {
      const MatrixView& uk = w.w_uk[static_cast<size_t>(h)];
      const MatrixView& uv = w.w_uv[static_cast<size_t>(h)];
      REQUIRE(uk.n == c.kv_lora_rank);
      REQUIRE(uk.k == c.qk_nope_head_dim);
      REQUIRE(uv.n == c.v_head_dim);
      REQUIRE(uv.k == c.kv_lora_rank);
      each(
          uk, name, [&](int64_t i, int64_t j) { return std::pair(h * rows + j, i); }, quantised);
      each(
          uv, name,
          [&](int64_t i, int64_t j) { return std::pair(h * rows + c.qk_nope_head_dim + i, j); },
          quantised);
    }
  }
  void vector(const VectorView& v, const std::string& name) {
    const RawTensor& t = s_.tensor(name);
    REQUIRE(v.size == t.count());
    CHECK(reinterpret_cast<uintptr_t>(v.data) % 64 == 0);
    int64_t wrong = 0;
    for (int32_t i = 0; i < v.size; ++i) {
      wrong += static_cast<double>(v.data[i]) != raw_at(t, i) ? 1 : 0;
    }
    compared += v.size;
    CHECK_MESSAGE(wrong == 0, name);
  }
  void exact_matrix(const MatrixView& m, const std::string& name) {
    const RawTensor& t = s_.tensor(name);
    REQUIRE(m.n == t.shape[0]);
    REQUIRE(m.k == t.shape[1]);
    each(
        m, name, [](int64_t i, int64_t j) { return std::pair(i, j); }, false);
  }
  void matrix(const MatrixView& m, const std::string& name) {
    const RawTensor& t = s_.tensor(name);
    REQUIRE(m.n == t.shape[0]);
    REQUIRE(m.k == t.shape[1]);
    if (quantised) CHECK(m.dtype == kernels::DType::kF8E4M3);
    each(
        m, name, [](int64_t i, int64_t j) { return std::pair(i, j); }, quantised);
  }
  template <class Where>
  void each(const MatrixView& m, const std::string& name, Where where, bool rounded) {
    CHECK(reinterpret_cast<uintptr_t>(m.data) % kernels::kWeightAlign == 0);
    CHECK(m.scale_k % 2 == 0);
    const Source::Matrix source = s_.matrix(name);
    int64_t wrong = 0;
    for (int64_t i = 0; i < m.n; ++i) {
      for (int64_t j = 0; j < m.k; ++j) {
        const auto [row, column] = where(i, j);
        const double expected = source.at(row, column), found = view_at(m, i, j);
        double bound = 0;
        if (rounded) {  // half a step: 2^-4 of the value, or of the smallest step
          const int64_t columns = (m.k + m.scale_k - 1) / m.scale_k;
          const double scale =
              static_cast<double>(m.scales[i / m.scale_n * columns + j / m.scale_k]);
          bound = std::max(std::fabs(expected) / 16, scale * std::ldexp(1, -10)) * 1.0001;
        }
        wrong += std::fabs(found - expected) <= bound ? 0 : 1;
      }
    }
    compared += int64_t{m.n} * m.k;
    CHECK_MESSAGE(wrong == 0, name);
    padding_is_zero(m, name);
  }
  void padding_is_zero(const MatrixView& m, const std::string& name) {
    if (m.layout != kernels::Layout::kTile16x2) return;
    MatrixView padded = m;
    padded.scales = nullptr;
    padded.k = (m.k + 1) / 2 * 2;
    int64_t wrong = 0;
    for (int64_t i = 0; i < (m.n + 15) / 16 * 16; ++i) {
      for (int64_t j = i < m.n ? m.k : 0; j < padded.k; ++j) {
        wrong += view_at(padded, i, j) != 0 ? 1 : 0;
      }
    }
    CHECK_MESSAGE(wrong == 0, name);
  }

  const Model& m_;
  const Source& s_;
};

void compare(const std::string& dir, WeightsMode mode = WeightsMode::kKeep,
             Residency residency = Residency::kMap) {
  TemporaryFolder folder;
  const auto model = convert_and_open(dir, folder.file("m.dsv3"), mode, residency);
  const ModelConfig& c = model->config();
  std::vector<RawTensor> tensors;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) {
    if (entry.path().extension() != ".safetensors") continue;
    for (RawTensor& t : read_safetensors(read_bytes(entry.path()))) tensors.push_back(std::move(t));
  }
  const Source source(std::move(tensors), c.weight_block_rows, c.weight_block_columns);
  Comparison comparison(*model, source);
  comparison.quantised = mode == WeightsMode::kFp8;
  comparison.all();
  const int64_t tied = c.tie_word_embeddings ? c.vocab_size * c.hidden_size : 0;
  CHECK(comparison.compared - tied == static_cast<int64_t>(model->parameters()));
}

void compare(const MiniCheckpoint& checkpoint, WeightsMode mode = WeightsMode::kKeep) {
  TemporaryFolder folder;
  checkpoint.write(folder.path());
  compare(folder.path(), mode);
}

std::vector<std::string> names_in(const std::string& dir) { return list_directory(dir).value(); }

}  // namespace

TEST_CASE("v3-micro: FP8, ragged blocks, MTP with copies of embedding and head") {
  compare(source_path("tests/data/models/v3-micro"));
  compare(source_path("tests/data/models/v3-micro"), WeightsMode::kKeep, Residency::kCopy);
}
TEST_CASE("v2-lite-micro: BF16, no q-LoRA; kept and quantised") {
  compare(source_path("tests/data/models/v2-lite-micro"));
  compare(source_path("tests/data/models/v2-lite-micro"), WeightsMode::kFp8);
}
TEST_CASE("tiny-coder: the shipped model, with its tokenizer") {
  compare(source_path("examples/models/tiny-coder"));
  TemporaryFolder folder;
  const auto model =
      convert_and_open(source_path("examples/models/tiny-coder"), folder.file("m.dsv3"));
  REQUIRE(model->has_tokenizer());
  CHECK(model->tokenizer().vocab_size() == 4096);
  CHECK(model->parameters() == 14653792);
  CHECK(model->chat_template() == ChatTemplate::kNone);
}

TEST_CASE("mini checkpoints: every type, small blocks, with and without copies") {
  compare(mini_fp8());
  compare(MiniBuilder(mini_config(), "F8_E4M3").build(true));
  compare(MiniBuilder(mini_config(), "BF16").build());
  compare(MiniBuilder(mini_config(), "F16", "F16").build(true));
  compare(MiniBuilder(mini_config(), "F32", "F32").build());
}
TEST_CASE("quantised from every type") {
  for (const char* dtype : {"BF16", "F16", "F32"}) {
    compare(MiniBuilder(mini_config(), dtype, dtype).build(), WeightsMode::kFp8);
  }
  // What is FP8 already stays as it is, bit for bit.
  TemporaryFolder folder;
  mini_fp8().write(folder.path());
  const auto kept = convert_and_open(folder.path(), folder.file("kept.dsv3"));
  const auto fp8 = convert_and_open(folder.path(), folder.file("fp8.dsv3"), WeightsMode::kFp8);
  CHECK(kept->fingerprint() == fp8->fingerprint());
}

TEST_CASE("tied embedding: one matrix, tiled, with or without a copy of the head") {
  OrderedJson config = mini_config();
  config["tie_word_embeddings"] = true;
  MiniCheckpoint tied = MiniBuilder(config, "BF16").build();
  compare(tied);
  RawTensor head = tied.at("model.embed_tokens.weight");
  head.name = "lm_head.weight";
  tied.tensors.push_back(head);
  compare(tied);
  TemporaryFolder folder;
  tied.write(folder.path());
  const auto model = convert_and_open(folder.path(), folder.file("m.dsv3"));
  CHECK(model->weights().head.data == model->weights().embed.data);
}

TEST_CASE("heads of kv_b_proj off the block grid") {
  // nope + v = 24 against blocks of 16: new blocks of 8. 8 + 24: W_UV begins inside a block. 8 + 10
  // = 18: of 2, which W_UK does not take (stored dequantised). Odd dimensions, padded.
  for (const auto& [nope, v, uk] :
       {std::tuple(8, 16, kernels::DType::kF8E4M3), std::tuple(8, 24, kernels::DType::kF8E4M3),
        std::tuple(8, 10, kernels::DType::kF32), std::tuple(9, 7, kernels::DType::kF8E4M3),
        std::tuple(9, 8, kernels::DType::kF32)}) {
    OrderedJson config = mini_config();
    config["qk_nope_head_dim"] = nope;
    config["v_head_dim"] = v;
    config["num_attention_heads"] = 3;
    const MiniCheckpoint checkpoint = MiniBuilder(config, "F8_E4M3").build();
    compare(checkpoint);
    TemporaryFolder folder;
    checkpoint.write(folder.path());
    const auto model = convert_and_open(folder.path(), folder.file("m.dsv3"));
    CHECK(model->weights().layers[0].w_uk[1].dtype == uk);
    CHECK(model->weights().layers[0].w_uv[1].dtype == kernels::DType::kF8E4M3);
  }
}

TEST_CASE("odd sizes everywhere are padded with zeros") {
  OrderedJson config = mini_config();
  config["hidden_size"] = 35;
  config["moe_intermediate_size"] = 17;
  config["q_lora_rank"] = 23;
  config["kv_lora_rank"] = 19;
  for (const char* dtype : {"F8_E4M3", "BF16", "F32"}) compare(MiniBuilder(config, dtype).build());
  compare(MiniBuilder(config, "BF16").build(), WeightsMode::kFp8);
}

TEST_CASE("quantised blocks: scale is the largest magnitude over 448, one for zeros") {
  OrderedJson config = mini_config();
  config["hidden_size"] = 160;
  config["intermediate_size"] = 144;
  MiniCheckpoint checkpoint = MiniBuilder(config, "F32", "F32").build();
  RawTensor& t = checkpoint.at("model.layers.0.mlp.gate_proj.weight");
  std::vector<float> values(144 * 160);
  std::memcpy(values.data(), t.bytes.data(), t.bytes.size());
  for (int i = 128; i < 144; ++i) {
    for (int j = 128; j < 160; ++j) values[static_cast<size_t>(i * 160 + j)] = 0;
  }
  values[5 * 160 + 7] = -3.5f;
  values[130 * 160 + 100] = 1e-40f;  // a subnormal must not disturb
  std::memcpy(t.bytes.data(), values.data(), t.bytes.size());
  TemporaryFolder folder;
  checkpoint.write(folder.path());
  const auto model = convert_and_open(folder.path(), folder.file("m.dsv3"), WeightsMode::kFp8);
  const MatrixView& gate = model->weights().layers[0].dense.gate;
  REQUIRE(gate.scale_count() == 4);
  CHECK(gate.scale_n == 128);
  CHECK(gate.scales[0] == 3.5f / 448);
  CHECK(gate.scales[3] == 1.0f);
  CHECK(view_at(gate, 5, 7) == doctest::Approx(-3.5));
  CHECK(model->weights().layers[0].dense.down.dtype == kernels::DType::kF8E4M3);
  CHECK(model->weights().embed.dtype == kernels::DType::kF32);
  CHECK(model->weights().mtp[0].eh_proj.dtype == kernels::DType::kF32);
}

TEST_CASE("scales stored as F8_E8M0, and as F32 powers of two (V3.1)") {
  MiniCheckpoint checkpoint = mini_fp8();
  checkpoint.config["quantization_config"]["scale_fmt"] = "ue8m0";
  for (RawTensor& t : checkpoint.tensors) {
    if (!t.name.ends_with("_scale_inv")) continue;
    std::string codes;
    for (int64_t i = 0; i < t.count(); ++i) codes += static_cast<char>(100 + i % 50);
    t.dtype = "F8_E8M0";
    t.bytes = codes;
  }
  compare(checkpoint);
}

TEST_CASE("shards named by an index") {
  const MiniCheckpoint checkpoint = mini_fp8();
  TemporaryFolder folder;
  OrderedJson index;
  std::vector<RawTensor> shards[3];
  for (size_t i = 0; i < checkpoint.tensors.size(); ++i) {
    const size_t s = i % 3;
    shards[s].push_back(checkpoint.tensors[i]);
    index["weight_map"][checkpoint.tensors[i].name] = "model-" + std::to_string(s) + ".safetensors";
  }
  for (size_t s = 0; s < 3; ++s) {
    write_bytes(folder.file("model-" + std::to_string(s) + ".safetensors"),
                safetensors_file(shards[s]));
  }
  write_bytes(folder.file("model.safetensors.index.json"), index.dump());
  write_bytes(folder.file("config.json"), checkpoint.config.dump());
  compare(folder.path());
}

TEST_CASE("MTP modules follow from the tensors when config.json does not say") {
  MiniCheckpoint checkpoint = mini_fp8();
  checkpoint.config.erase("num_nextn_predict_layers");
  TemporaryFolder folder;
  checkpoint.write(folder.path());
  CHECK(convert_and_open(folder.path(), folder.file("m.dsv3"))->weights().mtp.size() == 1);
}

TEST_CASE("rotary frequencies in old checkpoints are passed over") {
  MiniCheckpoint checkpoint = mini_fp8();
  checkpoint.tensors.push_back(
      {"model.layers.0.self_attn.rotary_emb.inv_freq", "F32", {2}, std::string(8, '\0')});
  compare(checkpoint);
}

TEST_CASE("the same checkpoint converts to the same bytes") {
  TemporaryFolder folder;
  const std::string dir = source_path("tests/data/models/v3-micro");
  convert_and_open(dir, folder.file("a.dsv3"));
  convert_and_open(dir, folder.file("b.dsv3"));
  CHECK(read_bytes(folder.file("a.dsv3")) == read_bytes(folder.file("b.dsv3")));
}

TEST_CASE("progress rises to its total; cancelling leaves nothing behind") {
  TemporaryFolder folder;
  const std::string dir = source_path("examples/models/tiny-coder");
  ConvertOptions options;
  uint64_t last = 0, total = 0;
  options.progress = [&](uint64_t done, uint64_t all) {
    CHECK(done >= last);
    CHECK(done <= all);
    last = done;
    total = all;
    return true;
  };
  REQUIRE(convert_checkpoint(dir, folder.file("m.dsv3"), options).ok());
  CHECK(last == total);
  CHECK(total > 16'000'000);

  options.progress = [](uint64_t, uint64_t) { return false; };
  const Status cancelled = convert_checkpoint(dir, folder.file("n.dsv3"), options);
  CHECK(cancelled.code() == Code::kCancelled);
  CHECK(names_in(folder.path()) == std::vector<std::string>{"m.dsv3"});
}

TEST_CASE("an existing output is kept unless overwriting is asked for") {
  TemporaryFolder folder;
  write_bytes(folder.file("m.dsv3"), "precious");
  const std::string dir = source_path("tests/data/models/v2-lite-micro");
  const Status refused = convert_checkpoint(dir, folder.file("m.dsv3"), {});
  CHECK(refused.code() == Code::kInvalidArgument);
  CHECK(refused.field() == "output");
  CHECK(read_bytes(folder.file("m.dsv3")) == "precious");
  convert_and_open(dir, folder.file("m.dsv3"));
  std::filesystem::create_directory(folder.file("d.dsv3"));
  ConvertOptions options;
  options.overwrite = true;
  const Status folder_there = convert_checkpoint(dir, folder.file("d.dsv3"), options);
  CHECK(folder_there.message().find("d.dsv3: is a directory") != std::string::npos);
}

TEST_CASE("a checkpoint folder that is not there, or is a file, is named") {
  for (const char* dir : {"/nonexistent-folder", "/etc/passwd"}) {
    const Status status = convert_checkpoint(dir, "/tmp/unused.dsv3", {});
    CHECK_FALSE(status.ok());
    CHECK(status.message().find(std::string(dir) + ": cannot list") != std::string::npos);
  }
}

TEST_CASE("a folder that cannot be written to is an error that names the file") {
  const Status status = convert_checkpoint(source_path("tests/data/models/v2-lite-micro"),
                                           "/nonexistent-folder/m.dsv3", {});
  CHECK(status.code() == Code::kNotFound);
  CHECK(status.message().find("/nonexistent-folder/m.dsv3") != std::string::npos);
}
