// Files whose checksums match and whose weights are no numbers: verify names tensor and place.
#include <doctest/doctest.h>

#include <limits>

#include "runtime/model/model.h"
#include "runtime/model/weight_check.h"
#include "tests/unit/container_support.h"

using namespace dsv3;
using namespace dsv3::test;

namespace {

// A .dsv3 file, to be changed by somebody who sets every checksum right.
struct Forged {
  TemporaryFolder folder;
  std::string path = folder.file("m.dsv3");
  ContainerBytes bytes;
  std::shared_ptr<const Model> model;

  explicit Forged(const MiniCheckpoint& checkpoint, const ConvertOptions& options = {}) {
    checkpoint.write(folder.path());
    REQUIRE(convert_checkpoint(folder.path(), path, options).ok());
    bytes.file = read_bytes(path);
    const auto opened = Model::open(path, {});
    REQUIRE(opened.ok());
    model = opened.value();
  }

  const LayerWeights& layer(size_t i) const { return model->weights().layers[i]; }

  // What verify says of the file with `value` at this address of the weights, in item `item` of a
  // record.
  template <class T>
  Status with(const void* address, T value, const std::string& record, uint32_t item = 0) const {
    ContainerBytes forged = bytes;
    const auto at =
        static_cast<size_t>(static_cast<const uint8_t*>(address) - model->weight_memory().data());
    std::memcpy(&forged.file[forged.data_offset() + at], &value, sizeof value);
    fb::Record* r = forged.record(record);
    const char* begin = &forged.file[forged.data_offset() + r->offset() + item * r->stride()];
    r->mutable_hashes()->Mutate(item, XXH3_64bits(begin, r->bytes()));
    forged.rehash();
    const std::string other = folder.file("forged.dsv3");
    write_bytes(other, forged.file);
    Status status;
    for (const Residency residency : {Residency::kMap, Residency::kCopy}) {
      OpenOptions options;
      options.residency = residency;
      REQUIRE(Model::open(other, options).ok());  // opening does not look
      options.verify = true;
      status = Model::open(other, options).status();
    }
    return status;
  }
};

void refused(const Status& status, const std::string& tensor, const std::string& what) {
  INFO(status.message());
  CHECK(status.code() == Code::kCorrupt);
  CHECK(status.field() == tensor);
  CHECK(status.message().find("tensor " + tensor + " has " + what + ",") != std::string::npos);
  CHECK(status.message().find("forged.dsv3: ") == status.message().rfind('/') + 1);
}

// [ceil(n/16)][ceil(k/2)][16][2]
const uint8_t* tiled(const MatrixView& m, int row, int column) {
  REQUIRE(m.dtype == kernels::DType::kF8E4M3);
  return m.data + (row / 16 * ((m.k + 1) / 2) + column / 2) * 32 + row % 16 * 2 + column % 2;
}

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const std::string kGate = "model.layers.0.mlp.gate_proj.weight";
const std::string kExperts = "model.layers.1.mlp.experts";

}  // namespace

TEST_CASE("FP8 codes that are NaN, and what is next to them") {
  const Forged forged(mini_fp8());
  const MatrixView& gate = forged.layer(0).dense.gate;
  for (const auto& [row, column] : {std::pair{0, 0}, {17, 5}, {gate.n - 1, gate.k - 1}}) {
    const std::string place =
        "NaN at [" + std::to_string(row) + ", " + std::to_string(column) + "]";
    refused(forged.with(tiled(gate, row, column), uint8_t{0x7f}, kGate), kGate, place);
    refused(forged.with(tiled(gate, row, column), uint8_t{0xff}, kGate), kGate, place);
    CHECK(forged.with(tiled(gate, row, column), uint8_t{0x7e}, kGate).ok());
    CHECK(forged.with(tiled(gate, row, column), uint8_t{0xfe}, kGate).ok());
  }
  const MatrixView& down = forged.layer(1).experts.experts[3].down;
  refused(forged.with(tiled(down, 2, 9), uint8_t{0xff}, kExperts, 3),
          kExperts + ".3.down_proj.weight", "NaN at [2, 9]");
}

TEST_CASE("scales, vectors and the embedding") {
  const Forged forged(mini_fp8());
  const MatrixView& gate = forged.layer(0).dense.gate;
  const auto last = static_cast<int>(gate.scale_count()) - 1;
  const int columns = (gate.k + gate.scale_k - 1) / gate.scale_k;
  refused(forged.with(gate.scales + last, -kInfinity, kGate), kGate,
          "a scale that is NaN or infinity at [" + std::to_string(last / columns * gate.scale_n) +
              ", " + std::to_string(last % columns * gate.scale_k) + "]");
  const std::string norm = "model.layers.1.input_layernorm.weight";
  refused(forged.with(forged.layer(1).input_norm.data + 5, kInfinity, norm), norm,
          "NaN or infinity at [5]");
  CHECK(forged.with(forged.layer(1).input_norm.data + 5, 3e38f, norm).ok());
  const MatrixView& embed = forged.model->weights().embed;
  REQUIRE((embed.dtype == kernels::DType::kBF16 && embed.layout == kernels::Layout::kRowMajor));
  refused(forged.with(embed.data + 2 * (3 * embed.k + 7), uint16_t{0xff80},
                      "model.embed_tokens.weight"),
          "model.embed_tokens.weight", "NaN or infinity at [3, 7]");
}

TEST_CASE("the scales of MXFP4 stand among its elements") {
  ConvertOptions options;
  options.ffn = WeightsMode::kMxfp4;
  const Forged forged(mini_fp8(), options);
  const MatrixView& down = forged.layer(0).dense.down;
  REQUIRE(down.dtype == kernels::DType::kMXFP4);
  const std::string name = "model.layers.0.mlp.down_proj.weight";
  int blocks = 0;
  for (int row : {0, 18, down.n - 1}) {
    for (int column = 0; column < down.k; column += kernels::kMxBlock, ++blocks) {
      const auto place = kernels::mx_place(row, column, down.k);
      refused(
          forged.with(down.data + place.scale, uint8_t{255}, name), name,
          "a scale that is NaN at [" + std::to_string(row) + ", " + std::to_string(column) + "]");
      CHECK(forged.with(down.data + place.scale, uint8_t{254}, name).ok());
      CHECK(forged.with(down.data + place.byte, uint8_t{255}, name).ok());  // two of -6
    }
  }
  CHECK(blocks >= 3);
}

TEST_CASE("read in pieces: every bad code is found in its piece alone, and its place is right") {
  Record record;
  record.name = "w";
  record.kind = RecordKind::kLinear;
  record.parts.resize(2);
  for (Part& part : record.parts) {
    part.dtype = kernels::DType::kF8E4M3;
    part.n = 20;
    part.k = 33;
    part.scale_n = part.scale_k = 16;
  }
  std::vector<Record> records{record};
  const uint64_t size = place_records(&records);
  const Record& placed = records[0];
  std::vector<uint8_t> item(size);
  int found = 0;
  for (uint64_t at = 0; at < placed.bytes; ++at) {
    item[at] = 0x7f;  // in a scale: a small number or a large one, but finite
    for (uint64_t begin = 0; begin < placed.bytes; begin += 128) {
      const uint64_t bytes = std::min<uint64_t>(128, placed.bytes - begin);
      const auto bad = first_bad_weight(placed, begin, {item.data() + begin, bytes});
      size_t part = 2;
      std::string what;
      for (size_t p = 0; p < 2; ++p) {
        const Part& q = placed.parts[p];
        if (at < q.data || at >= q.data + q.data_bytes()) continue;
        part = p;
        const uint64_t i = at - q.data, pair = i / 32;  // 17 pairs
        what = "NaN at [" + std::to_string(pair / 17 * 16 + i % 32 / 2) + ", " +
               std::to_string(pair % 17 * 2 + i % 2) + "]";
      }
      const bool here = part < 2 && at >= begin && at < begin + bytes;
      REQUIRE(bad.has_value() == here);
      if (!here) continue;
      REQUIRE((bad->part == part && bad->what == what));
      ++found;
    }
    item[at] = 0;
  }
  CHECK(found == 2 * 32 * 34);
}
