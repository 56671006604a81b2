// MXFP4 in the converter: the choice of scales, what becomes MXFP4 and what does not, checkpoints
// that are stored so already, and what is refused.
#include <doctest/doctest.h>

#include <cfloat>
#include <cmath>

#include "runtime/model/convert.h"
#include "runtime/model/repack.h"
#include "tests/support/support.h"
#include "tests/unit/model_support.h"

using namespace dsv3;
using namespace dsv3::test;

namespace {

using kernels::DType;

MatrixView quantised(const std::vector<float>& rows, int32_t n, int32_t k,
                     std::vector<uint8_t>* bytes) {
  MatrixView m;
  m.dtype = DType::kMXFP4;
  m.layout = kernels::Layout::kTileMx;
  m.n = n;
  m.k = k;
  m.bytes = kernels::matrix_bytes(m.dtype, m.layout, n, k);
  bytes->assign(m.bytes, 0xaa);
  quantise_mx(rows.data(), n, k, bytes->data());
  m.data = bytes->data();
  return m;
}

// The squared error of 32 values with a scale, each rounded to the nearest.
double block_error(const double* values, int count, int exponent) {
  double sum = 0;
  for (int i = 0; i < count; ++i) {
    double least = INFINITY;
    for (int code = 0; code < 16; ++code) {
      least = std::min(least, std::fabs(values[i] - std::ldexp(e2m1_value(code), exponent)));
    }
    sum += least * least;
  }
  return sum;
}

// Every element is the nearest of its scale, every scale the best of the three around the format's
// own rule. Returns how often another than the format's own was chosen.
template <class At>
int check_quantised(const MatrixView& m, At at) {
  int wrong = 0, other = 0;
  for (int64_t i = 0; i < m.n; ++i) {
    for (int64_t begin = 0; begin < m.k; begin += 32) {
      double values[32];
      double amax = 0;
      const int count = static_cast<int>(std::min<int64_t>(32, m.k - begin));
      for (int j = 0; j < count; ++j) {
        values[j] = at(i, begin + j);
        amax = std::max(amax, std::fabs(values[j]));
      }
      const int exponent = mx_at(m, i, begin).scale - 127;
      double found = 0;
      for (int j = 0; j < count; ++j) {
        found += std::pow(values[j] - view_at(m, i, begin + j), 2);
        wrong += mx_at(m, i, begin + j).scale != exponent + 127 ? 1 : 0;
      }
      if (amax == 0) {
        wrong += found != 0 ? 1 : 0;
        continue;
      }
      const int own = std::ilogb(amax) - 2;
      double best = INFINITY;
      for (int e = own - 1; e <= own + 1; ++e) best = std::min(best, block_error(values, count, e));
      wrong += found <= best * (1 + 1e-5) && std::abs(exponent - own) <= 1 ? 0 : 1;
      other += exponent != own ? 1 : 0;
    }
  }
  CHECK(wrong == 0);
  return other;
}

MiniCheckpoint mini(const std::string& type) {
  OrderedJson config = mini_config();
  config["hidden_size"] = 96;
  config["intermediate_size"] = 64;
  config["moe_intermediate_size"] = 32;
  return MiniBuilder(config, type, type == "F8_E4M3" ? "BF16" : type).build();
}

Result<std::shared_ptr<const Model>> convert(const MiniCheckpoint& checkpoint,
                                             const ConvertOptions& options) {
  static TemporaryFolder folder;
  TemporaryFolder source;
  checkpoint.write(source.path());
  ConvertOptions o = options;
  o.overwrite = true;
  const std::string file = folder.file("m.dsv3");
  DSV3_TRY(convert_checkpoint(source.path(), file, o));
  OpenOptions open;
  open.residency = Residency::kCopy;
  open.verify = true;
  return Model::open(file, open);
}

std::shared_ptr<const Model> converted(const MiniCheckpoint& checkpoint,
                                       const ConvertOptions& options) {
  auto model = convert(checkpoint, options);
  INFO(model.status().message());
  REQUIRE(model.ok());
  return *model;
}

void refused(const MiniCheckpoint& checkpoint, const std::string& field, const std::string& text) {
  const auto model = convert(checkpoint, {});
  REQUIRE(!model.ok());
  INFO(model.status().message());
  CHECK(model.status().field() == field);
  CHECK(model.status().message().find(text) != std::string::npos);
}

// A matrix's values as the checkpoint means them.
double source_at(const MiniCheckpoint& c, const std::string& name, int64_t i, int64_t j) {
  const RawTensor& t = *c.find(name);
  const double v = raw_at(t, i * t.shape[1] + j);
  const RawTensor* scales = c.find(name + "_scale_inv");
  if (scales == nullptr) return v;
  const double s = raw_at(*scales, i / 16 * scales->shape[1] + j / 16);
  return static_cast<double>(static_cast<float>(v) * static_cast<float>(s));
}

// Replaces a matrix by random MXFP4, named as compressed-tensors or as Quark do.
void store_mxfp4(MiniCheckpoint* c, const std::string& name, bool packed_name, Random* random) {
  const std::vector<int64_t> shape = c->at(name).shape;
  c->remove(name + "_scale_inv");
  c->remove(name);
  RawTensor weight{name + (packed_name ? "_packed" : ""), "U8", {shape[0], shape[1] / 2}, ""};
  for (int64_t i = 0; i < weight.count(); ++i) weight.bytes += static_cast<char>(random->next());
  RawTensor scale{name + "_scale", packed_name ? "U8" : "F8_E8M0", {shape[0], shape[1] / 32}, ""};
  for (int64_t i = 0; i < scale.count(); ++i) {
    scale.bytes += static_cast<char>(110 + random->next() % 20);
  }
  c->tensors.push_back(std::move(weight));
  c->tensors.push_back(std::move(scale));
}

void store_experts(MiniCheckpoint* c, bool packed_name) {
  Random random;
  for (const char* layer : {"1", "2"}) {
    for (int e = 0; e < 4; ++e) {
      for (const char* part : {"gate_proj", "up_proj", "down_proj"}) {
        store_mxfp4(c,
                    std::string("model.layers.") + layer + ".mlp.experts." + std::to_string(e) +
                        "." + part + ".weight",
                    packed_name, &random);
      }
    }
  }
}

const std::string kExpert = "model.layers.1.mlp.experts.2.up_proj.weight";

}  // namespace

TEST_CASE("quantise_mx: the nearest elements of the scale with the least error") {
  Random random;
  int blocks = 0, other = 0;
  for (const auto& [n, k] : {std::pair(1, 1), {16, 32}, {33, 70}, {40, 256}}) {
    for (int kind = 0; kind < 3; ++kind) {
      std::vector<float> x(static_cast<size_t>(n * k));
      for (float& v : x) {
        v = random.uniform();
        if (kind == 1) v = v * v * v * std::ldexp(1.0f, static_cast<int>(random.next() % 9));
        if (kind == 2)
          v = static_cast<float>(static_cast<int>(random.next() % 13) - 6) / 2;  // ties
      }
      std::vector<uint8_t> bytes;
      const MatrixView m = quantised(x, n, k, &bytes);
      other += check_quantised(m, [&](int64_t i, int64_t j) {
        return static_cast<double>(x[static_cast<size_t>(i * k + j)]);
      });
      blocks += n * ((k + 31) / 32);
      int padding = 0;  // elements are zero, scales one
      for (int i = 0; i < (n + 15) / 16 * 16; ++i) {
        for (int j = i < n ? k : 0; j < (k + 31) / 32 * 32; ++j) {
          padding += mx_at(m, i, j).value != 0 ? 1 : 0;
          padding += i >= n && mx_at(m, i, j).scale != 127 ? 1 : 0;
        }
      }
      CHECK(padding == 0);
    }
  }
  // It matters: the largest value's exponent is often not the best.
  CHECK(other > blocks / 10);
}

TEST_CASE("quantise_mx: zeros, subnormal and huge values") {
  for (const float v : {0.0f, FLT_TRUE_MIN, FLT_MIN, 1e-39f, FLT_MAX, -FLT_MAX, -0.0f}) {
    std::vector<float> x(32, 0.0f);
    x[5] = v;
    std::vector<uint8_t> bytes;
    const MatrixView m = quantised(x, 1, 32, &bytes);
    CHECK(mx_at(m, 0, 5).scale < 255);
    for (int j = 0; j < 32; ++j) {
      if (j != 5) CHECK(view_at(m, 0, j) == 0);
    }
    // Half a step; the smallest is 2^-128, half of what the smallest scale gives.
    const double error = std::fabs(view_at(m, 0, 5) - static_cast<double>(v));
    CHECK(error <= std::max(std::fabs(static_cast<double>(v)) / 4, std::ldexp(1, -129)));
  }
}

TEST_CASE("experts, feed-forward layers and head in smaller types, from every type") {
  for (const char* type : {"BF16", "F16", "F32", "F8_E4M3"}) {
    CAPTURE(type);
    const MiniCheckpoint checkpoint = mini(type);
    const bool fp8 = std::string(type) == "F8_E4M3";
    const DType kept = fp8                          ? DType::kF8E4M3
                       : std::string(type) == "F32" ? DType::kF32
                       : std::string(type) == "F16" ? DType::kF16
                                                    : DType::kBF16;
    ConvertOptions options;
    options.experts = WeightsMode::kMxfp4;
    const auto experts = converted(checkpoint, options);
    const ModelWeights& w = experts->weights();
    CHECK(w.layers[0].dense.gate.dtype == kept);
    CHECK(w.layers[1].shared.up.dtype == kept);
    CHECK(w.layers[1].o.dtype == kept);
    CHECK(w.mtp[0].layer.experts.experts[3].down.dtype == DType::kMXFP4);
    const FfnView& f = w.layers[1].experts.experts[2];
    CHECK(f.gate.dtype == DType::kMXFP4);
    CHECK(f.down.dtype == DType::kMXFP4);
    CHECK(f.up.scales == nullptr);
    CHECK(w.layers[1].experts.stride % 4096 == 0);
    check_quantised(f.up,
                    [&](int64_t i, int64_t j) { return source_at(checkpoint, kExpert, i, j); });

    options.experts = WeightsMode::kKeep;
    options.ffn = WeightsMode::kMxfp4;
    options.head = WeightsMode::kFp8;
    const auto all = converted(checkpoint, options);
    const ModelWeights& a = all->weights();
    CHECK(a.layers[0].dense.gate.dtype == DType::kMXFP4);
    CHECK(a.layers[1].shared.down.dtype == DType::kMXFP4);
    CHECK(a.layers[1].experts.experts[0].up.dtype == DType::kMXFP4);
    CHECK(a.layers[1].o.dtype == kept);
    CHECK(a.layers[1].w_uk[0].dtype != DType::kMXFP4);
    CHECK(a.layers[1].router.dtype != DType::kMXFP4);
    CHECK(a.embed.dtype == DType::kF8E4M3);
    CHECK(a.embed.layout == kernels::Layout::kRowMajor);
    CHECK(a.head.dtype == DType::kF8E4M3);
    CHECK(a.mtp[0].eh_proj.dtype != DType::kF8E4M3);
    const std::string dense = "model.layers.0.mlp.down_proj.weight";
    check_quantised(a.layers[0].dense.down,
                    [&](int64_t i, int64_t j) { return source_at(checkpoint, dense, i, j); });
    for (int64_t i = 0; i < a.embed.n; ++i) {  // half a step of E4M3
      for (int64_t j = 0; j < a.embed.k; ++j) {
        const double want = source_at(checkpoint, "model.embed_tokens.weight", i, j);
        REQUIRE(std::fabs(view_at(a.embed, i, j) - want) <= std::max(std::fabs(want) / 16, 1e-5));
      }
    }
    CHECK(all->weight_bytes() < experts->weight_bytes());
  }
}

TEST_CASE("a part of the modes: experts in MXFP4, the rest of the feed-forward layers in FP8") {
  ConvertOptions options;
  options.weights = WeightsMode::kFp8;
  options.experts = WeightsMode::kMxfp4;
  const auto model = converted(mini("BF16"), options);
  CHECK(model->weights().layers[0].dense.gate.dtype == DType::kF8E4M3);
  CHECK(model->weights().layers[0].o.dtype == DType::kF8E4M3);
  CHECK(model->weights().layers[1].shared.up.dtype == DType::kF8E4M3);
  CHECK(model->weights().layers[1].experts.experts[1].up.dtype == DType::kMXFP4);
  CHECK(model->weights().embed.dtype == DType::kBF16);
}

TEST_CASE("experts that a checkpoint stores as MXFP4 are kept bit for bit") {
  for (const bool packed_name : {true, false}) {
    CAPTURE(packed_name);
    MiniCheckpoint checkpoint = mini("BF16");
    checkpoint.config["quantization_config"] = {
        {"quant_method", packed_name ? "compressed-tensors" : "quark"}};
    store_experts(&checkpoint, packed_name);
    for (const WeightsMode mode : {WeightsMode::kKeep, WeightsMode::kFp8, WeightsMode::kMxfp4}) {
      ConvertOptions options;
      options.weights = mode == WeightsMode::kFp8 ? mode : WeightsMode::kKeep;
      options.experts = mode;
      const auto model = converted(checkpoint, options);
      const MatrixView& m = model->weights().layers[1].experts.experts[2].up;
      REQUIRE(m.dtype == DType::kMXFP4);
      const RawTensor& weight = checkpoint.at(kExpert + (packed_name ? "_packed" : ""));
      const RawTensor& scale = checkpoint.at(kExpert + "_scale");
      int wrong = 0;
      for (int64_t i = 0; i < m.n; ++i) {
        for (int64_t j = 0; j < m.k; ++j) {
          const auto pair =
              static_cast<uint8_t>(weight.bytes[static_cast<size_t>((i * m.k + j) / 2)]);
          const auto code =
              static_cast<uint8_t>(scale.bytes[static_cast<size_t>((i * m.k + j) / 32)]);
          const MxElement e = mx_at(m, i, j);
          wrong += e.value == e2m1_value(j % 2 == 0 ? pair & 15 : pair >> 4) ? 0 : 1;
          wrong += e.scale == code ? 0 : 1;
        }
      }
      CHECK(wrong == 0);
    }
  }
}

TEST_CASE(
    "what is stored in four bits and is not MXFP4 of a feed-forward layer is refused by name") {
  Random random;
  MiniCheckpoint good = mini("BF16");
  store_experts(&good, true);
  MiniCheckpoint c = good;
  c.at(kExpert + "_scale").bytes[17] = static_cast<char>(255);
  refused(c, kExpert + "_scale", "has NaN at [5, 2]");
  c = good;
  c.remove(kExpert + "_scale");
  refused(c, kExpert + "_packed", "no scales");
  c = good;
  c.at(kExpert + "_scale").dtype = "F8_E4M3";
  refused(c, kExpert + "_packed", "scales of type F8_E4M3");
  c = good;
  c.tensors.push_back({kExpert + "_global_scale", "F32", {1}, std::string(4, '\0')});
  refused(c, kExpert + "_packed", "NVFP4");
  c = good;
  c.at(kExpert + "_scale").shape = {3, 32};
  refused(c, kExpert + "_scale", "config needs [32, 3]");
  c = mini("BF16");
  const std::string o = "model.layers.0.self_attn.o_proj.weight";
  c.at(o).shape = {96, 32};
  store_mxfp4(&c, o, true, &random);
  refused(c, o + "_packed", "is stored as MXFP4");
  c = mini("BF16");  // some experts of a layer only
  store_mxfp4(&c, kExpert, false, &random);
  refused(c, kExpert, "as in expert 0");
  c = mini("BF16");
  c.at(kExpert).dtype = "U8";
  c.at(kExpert).shape = {32, 192};
  refused(c, kExpert, "no scales");
}

TEST_CASE("NaN and infinity are refused on the way to MXFP4") {
  ConvertOptions options;
  options.experts = WeightsMode::kMxfp4;
  MiniCheckpoint c = mini("F32");
  const float infinity = INFINITY;
  std::memcpy(c.at(kExpert).bytes.data() + 4 * (96 * 3 + 7), &infinity, 4);
  auto model = convert(c, options);
  REQUIRE(!model.ok());
  CHECK(model.status().message().find("[3, 7]") != std::string::npos);
  c = mini("F8_E4M3");  // a code times its scale
  c.at(kExpert).bytes[0] = 0x7e;
  const float huge = 1e38f;
  std::memcpy(c.at(kExpert + "_scale_inv").bytes.data(), &huge, 4);
  model = convert(c, options);
  REQUIRE(!model.ok());
  CHECK(model.status().message().find("infinite at [0, ") != std::string::npos);
}

TEST_CASE("a synthetic model with MXFP4 experts and an FP8 head") {
  SyntheticOptions options;
  options.ffn = options.experts = DType::kMXFP4;
  options.head = DType::kF8E4M3;
  const auto small = converted(mini("BF16"), {});
  const auto model = Model::synthesise(small->config(), options);
  REQUIRE(model.ok());
  const ModelWeights& w = model.value()->weights();
  const MatrixView& m = w.layers[1].experts.experts[3].down;
  CHECK(m.dtype == DType::kMXFP4);
  CHECK(w.head.dtype == DType::kF8E4M3);
  double square = 0;
  for (int64_t i = 0; i < m.n; ++i) {
    for (int64_t j = 0; j < m.k; ++j) square += std::pow(view_at(m, i, j), 2);
  }
  // A layer keeps its input's size, within the power of two that a scale is.
  const double gain = std::sqrt(square / static_cast<double>(m.n));
  CHECK(gain > 0.6);
  CHECK(gain < 1.6);
}
