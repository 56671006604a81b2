// The damaged corpus, part one: safetensors files and their index. Every case must be refused with
// an error that names the file and, where there is one, the tensor; nothing may be left half done.
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include "runtime/base/os.h"
#include "runtime/model/convert.h"
#include "runtime/model/safetensors.h"
#include "tests/unit/model_support.h"

using namespace dsv3;
using namespace dsv3::test;

namespace {

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

Status parse(const std::string& file, uint64_t size) {
  const auto result = parse_safetensors(
      {reinterpret_cast<const uint8_t*>(file.data()), file.size()}, size, "x.safetensors");
  return result.status();
}
Status parse(const std::string& file) { return parse(file, file.size()); }

// A header with one tensor "w" described by `entry`, and this much data.
Status parse_entry(const std::string& entry, size_t data = 16) {
  return parse(safetensors_file(R"({"w":)" + entry + "}", std::string(data, '\0')));
}

void refused(const Status& status, const std::string& part, Code code = Code::kCorrupt) {
  INFO(status.message());
  REQUIRE_FALSE(status.ok());
  CHECK(status.code() == code);
  CHECK(contains(status.message(), "x.safetensors"));
  CHECK(contains(status.message(), part));
}

// Converts a mini checkpoint after `damage`; the error must name the file and `part`.
Status convert_damaged(const std::function<void(MiniCheckpoint*)>& damage,
                       WeightsMode mode = WeightsMode::kKeep,
                       MiniCheckpoint checkpoint = mini_fp8()) {
  TemporaryFolder folder;
  damage(&checkpoint);
  checkpoint.write(folder.path());
  ConvertOptions options;
  options.weights = mode;
  const Status status = convert_checkpoint(folder.path(), folder.file("out.dsv3"), options);
  // Neither an output nor a temporary file.
  CHECK(list_directory(folder.path()).value().size() == 2);
  return status;
}
void refused_conversion(const Status& status, const std::string& tensor, const std::string& part,
                        Code code) {
  INFO(status.message());
  REQUIRE_FALSE(status.ok());
  CHECK(status.code() == code);
  CHECK(status.field() == tensor);
  CHECK(contains(status.message(), "model.safetensors"));
  CHECK(contains(status.message(), tensor));
  CHECK(contains(status.message(), part));
}

const std::string kGood = R"({"w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]}})";

}  // namespace

TEST_CASE("the undamaged file is read") {
  CHECK(parse(safetensors_file(kGood, std::string(16, '\0'))).ok());
  CHECK(parse(safetensors_file(kGood + "   ", std::string(16, '\0'))).ok());
  CHECK(parse(safetensors_file("{}", "")).ok());
}

TEST_CASE("1: cut at every byte") {
  const std::string file = safetensors_file(kGood, std::string(16, '\0'));
  for (size_t size = 0; size < file.size(); ++size) {
    refused(parse(file.substr(0, size)), "x.safetensors");
  }
  // And a whole checkpoint, through the converter: at the header's and some tensors' ends.
  const std::string whole = safetensors_file(mini_fp8().tensors);
  const size_t header = 8 + static_cast<uint8_t>(whole[0]) + 256 * static_cast<uint8_t>(whole[1]);
  for (const size_t size : {size_t{0}, size_t{7}, size_t{8}, header - 1, header, header + 1,
                            header + 2560, whole.size() - 1}) {
    TemporaryFolder folder;
    mini_fp8().write(folder.path());
    write_bytes(folder.file("model.safetensors"), whole.substr(0, size));
    const Status status = convert_checkpoint(folder.path(), folder.file("out.dsv3"), {});
    CHECK(status.code() == Code::kCorrupt);
    CHECK(contains(status.message(), "model.safetensors"));
  }
}
TEST_CASE("1: every bit of the header flipped: refused, or another valid header, never a crash") {
  const std::string file = safetensors_file(kGood, std::string(16, '\0'));
  for (size_t bit = 0; bit < (file.size() - 16) * 8; ++bit) {
    std::string flipped = file;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ (1 << bit % 8));
    const Status status = parse(flipped);
    // Only the name can change without a contradiction.
    const size_t byte = bit / 8 - 8;
    if (status.ok()) CHECK((bit / 8 >= 8 && kGood.find("w") == byte));
  }
}
TEST_CASE("2: empty, and under 8 bytes") {
  refused(parse(""), "0 bytes");
  refused(parse("1234567"), "7 bytes");
}
TEST_CASE("3: header lengths near every limit") {
  for (const uint64_t length :
       {UINT64_MAX, uint64_t{1} << 63, uint64_t{100'000'001}, uint64_t{100}, uint64_t{93}}) {
    refused(parse(le64(length) + std::string(92, '{'), 100), "header length is");
  }
  refused(parse(le64(UINT64_MAX) + std::string(92, '{'), UINT64_MAX), "header length is");
}
TEST_CASE("4: header that is not UTF-8, or has a NUL in it") {
  refused(parse(safetensors_file("{\"\xff\":1}", "")), "not valid JSON");
  refused(parse(safetensors_file("{}" + std::string(6, '\0'), "")), "NUL");
  refused(parse(safetensors_file("{\"a\\u0000b\":" + kGood.substr(5), std::string(16, '\0'))),
          "NUL");
}
TEST_CASE("5: JSON plus trailing bytes, or no object") {
  refused(parse(safetensors_file(kGood + "x", std::string(16, '\0'))), "not valid JSON");
  refused(parse(safetensors_file(kGood + "{}", std::string(16, '\0'))), "not valid JSON");
  refused(parse(safetensors_file("[]", "")), "'{'");
  refused(parse(safetensors_file("", "")), "'{'");
  refused(parse(safetensors_file(" {}", "")), "'{'");
}
TEST_CASE("6: the same name twice") {
  const std::string entry = R"("w":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]})";
  const std::string other = R"("w":{"dtype":"F32","shape":[2,2],"data_offsets":[16,32]})";
  refused(parse(safetensors_file("{" + entry + "," + entry + "}", std::string(16, '\0'))), "twice");
  refused(parse(safetensors_file("{" + entry + "," + other + "}", std::string(32, '\0'))), "twice");
}
TEST_CASE("a long name is shown up to where a character ends") {
  std::string name = "a";  // its characters begin at odd places
  for (int i = 0; i < 150; ++i) name += "é";
  const Status status = parse(safetensors_file("{\"" + name + "\":{}}", ""));
  refused(status, "tensor " + name.substr(0, 199) + " has no dtype");
  CHECK(status.field() == name.substr(0, 199));
}
TEST_CASE("7 and 8: overlaps and holes") {
  const auto two = [](const char* range) {
    return parse(safetensors_file(
        std::string(R"({"v":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},)") +
            R"("w":{"dtype":"F32","shape":[2,2],"data_offsets":)" + range + "}}",
        std::string(40, '\0')));
  };
  refused(two("[8,24]"), "overlapping");
  refused(two("[0,16]"), "overlapping");
  refused(two("[20,36]"), "hole");
  refused(parse_entry(R"({"dtype":"F32","shape":[3],"data_offsets":[4,16]})"), "hole");
}
TEST_CASE("9: bytes after the last tensor") {
  refused(parse(safetensors_file(kGood, std::string(17, '\0'))), "1 bytes after the last tensor");
}
TEST_CASE("10 and 11: ranges backwards and past the end") {
  refused(parse_entry(R"({"dtype":"F32","shape":[2,2],"data_offsets":[16,0]})"), "[16, 0]");
  refused(parse_entry(R"({"dtype":"F32","shape":[2,4],"data_offsets":[0,32]})"), "[0, 32]");
  refused(parse_entry(R"({"dtype":"F32","shape":[4],"data_offsets":[18446744073709551600,0]})"),
          "tensor w");
  refused(parse_entry(R"({"dtype":"F32","shape":[4],"data_offsets":[0,18446744073709551615]})"),
          "tensor w");
}
TEST_CASE("12 and 13: shapes whose size overflows or wraps") {
  refused(parse_entry(R"({"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,16]})"),
          "overflows");
  // 2^62 * 4 wraps to 0; (2^62 + 4) * 4 wraps to 16.
  refused(parse_entry(R"({"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]})", 0),
          "overflows");
  refused(parse_entry(R"({"dtype":"F32","shape":[4611686018427387908],"data_offsets":[0,16]})"),
          "overflows");
  refused(
      parse_entry(
          R"({"dtype":"F32","shape":[0,9223372036854775807,9223372036854775807],"data_offsets":[0,16]})"),
      "tensor w");
}
TEST_CASE("14: dimensions that are no sizes") {
  for (const char* dim :
       {"-1", "1.5", "4.0", "1e2", "\"4\"", "null", "true", "[4]", "{}", "18446744073709551615",
        "9223372036854775808", "340282366920938463463374607431768211456"}) {
    refused(parse_entry(std::string(R"({"dtype":"F32","shape":[)") + dim +
                        R"(],"data_offsets":[0,16]})"),
            "shape");
  }
  refused(parse_entry(R"({"dtype":"F32","shape":[1e400],"data_offsets":[0,16]})"), "1e400");
}
TEST_CASE("15: a zero dimension in a required weight") {
  CHECK(parse_entry(R"({"dtype":"F32","shape":[0,4],"data_offsets":[0,0]})", 0).ok());
  const std::string name = "model.layers.0.self_attn.o_proj.weight";
  refused_conversion(convert_damaged([&](MiniCheckpoint* c) {
                       c->at(name).shape = {0, 16};
                       c->at(name).bytes.clear();
                     }),
                     name, "[0, 16]", Code::kCorrupt);
}
TEST_CASE("16: rank 0 and rank 10,000") {
  // A single number is a tensor, but none that a model needs.
  CHECK(parse_entry(R"({"dtype":"F32","shape":[],"data_offsets":[0,4]})", 4).ok());
  refused(parse_entry(R"({"dtype":"F32","shape":[],"data_offsets":[0,8]})", 8), "expected 4");
  const std::string scale = "model.layers.1.self_attn.q_a_proj.weight_scale_inv";
  refused_conversion(convert_damaged([&](MiniCheckpoint* c) {
                       c->at(scale).shape = {};
                       c->at(scale).bytes.resize(4);
                     }),
                     scale, "has type F32 and rank 0, config needs shape [", Code::kUnsupported);
  std::string shape = "1";
  for (int i = 1; i < 10000; ++i) shape += ",1";
  refused(parse_entry(R"({"dtype":"F32","shape":[)" + shape + R"(],"data_offsets":[0,4]})", 4),
          "rank 10000");
}
TEST_CASE("17: length is not shape times type") {
  refused(parse_entry(R"({"dtype":"F32","shape":[2,3],"data_offsets":[0,16]})"), "expected 24");
  refused(parse_entry(R"({"dtype":"BF16","shape":[2,2],"data_offsets":[0,16]})"), "expected 8");
}
TEST_CASE("18: unknown and unexpected types, malformed entries") {
  refused(parse_entry(R"({"dtype":"F31","shape":[2,2],"data_offsets":[0,16]})"), "\"F31\"");
  refused(parse_entry(R"({"dtype":7,"shape":[2,2],"data_offsets":[0,16]})"), "dtype");
  refused(parse_entry(R"({"shape":[2,2],"data_offsets":[0,16]})"), "no dtype");
  refused(parse_entry(R"({"dtype":"F32","data_offsets":[0,16]})"), "no shape");
  refused(parse_entry(R"({"dtype":"F32","shape":[2,2]})"), "no data_offsets");
  refused(parse_entry(R"({"dtype":"F32","shape":[4],"data_offsets":[0,16,16]})"), "data_offsets");
  refused(parse_entry(R"({"dtype":"F32","shape":[4],"data_offsets":[0,-1]})"), "data_offsets");
  refused(parse_entry(R"({"dtype":"F32","shape":[4],"data_offsets":[0,16],"x":1})"), "\"x\"");
  refused(parse_entry("[1,2]"), "not an object");
  refused(parse(safetensors_file(R"({"__metadata__":[]})", "")), "__metadata__");

  // Types of the format that no model here has: read past, and refused where they are needed.
  for (const auto& [type, bits] : {std::pair("F4", 4),
                                   {"F6_E2M3", 6},
                                   {"F6_E3M2", 6},
                                   {"F8_E5M2", 8},
                                   {"F8_E4M3FNUZ", 8},
                                   {"F8_E5M2FNUZ", 8},
                                   {"F8_E8M0", 8},
                                   {"BOOL", 8},
                                   {"I8", 8},
                                   {"I16", 16},
                                   {"U16", 16},
                                   {"I32", 32},
                                   {"U32", 32},
                                   {"I64", 64},
                                   {"U64", 64},
                                   {"F64", 64},
                                   {"C64", 64}}) {
    const auto sized = [&](int count, int bytes) {
      return parse_entry(
          format(R"({"dtype":"%s","shape":[%d,2],"data_offsets":[0,%d]})", type, count, bytes),
          static_cast<size_t>(bytes));
    };
    CHECK_MESSAGE(sized(4, bits).ok(), std::string(type));
    refused(sized(4, bits + 1), format("expected %d for %s [4, 2]", bits, type));
    if (bits % 4 != 0) refused(sized(1, 1), "expected whole bytes");
    const std::string name = "model.layers.1.self_attn.q_a_proj.weight";
    refused_conversion(convert_damaged([&](MiniCheckpoint* c) {
                         RawTensor& t = c->at(name);
                         t.dtype = type;
                         t.bytes.assign(static_cast<size_t>(t.count() * bits / 8), '\0');
                       }),
                       name, format("has type %s, expected", type), Code::kUnsupported);
  }
  const std::string norm = "model.layers.1.self_attn.kv_a_layernorm.weight";
  refused_conversion(convert_damaged([&](MiniCheckpoint* c) { c->at(norm).dtype = "I16"; }), norm,
                     "has type I16, expected BF16, F16 or F32", Code::kUnsupported);
  const std::string q = "model.layers.1.self_attn.q_a_proj.weight";
  refused_conversion(convert_damaged([&](MiniCheckpoint* c) { c->at(q).dtype = "F8_E5M2"; }), q,
                     "has type F8_E5M2, expected F8_E4M3", Code::kUnsupported);
  const std::string router = "model.layers.1.mlp.gate.weight";
  refused_conversion(convert_damaged([&](MiniCheckpoint* c) {
                       c->at(router).dtype = "F8_E4M3";
                       c->at(router).bytes.resize(4 * 32);
                     }),
                     router, "has type F8_E4M3", Code::kUnsupported);
  // One expert in another type than the others of its layer.
  const std::string expert = "model.layers.1.mlp.experts.2.up_proj.weight";
  refused_conversion(convert_damaged([&](MiniCheckpoint* c) {
                       c->at(expert).dtype = "BF16";
                       c->at(expert).bytes = std::string(24 * 32 * 2, '\0');
                       c->remove(expert + "_scale_inv");
                     }),
                     expert, "expected F8_E4M3 as in expert 0", Code::kUnsupported);
}
TEST_CASE("19: missing tensors and shards, shards elsewhere") {
  for (const RawTensor& t : mini_fp8().tensors) {
    // Each in turn; without a bias of the router etc. nothing may be assumed.
    const Status status = convert_damaged([&](MiniCheckpoint* c) { c->remove(t.name); });
    refused_conversion(status, t.name, "is missing", Code::kCorrupt);
  }
  TemporaryFolder folder;
  mini_fp8().write(folder.path());
  std::filesystem::remove(folder.file("model.safetensors"));
  Status status = convert_checkpoint(folder.path(), folder.file("out.dsv3"), {});
  CHECK(status.code() == Code::kNotFound);
  CHECK(contains(status.message(), "neither model.safetensors nor"));

  const auto with_index = [&](const std::string& index) {
    write_bytes(folder.file("model.safetensors.index.json"), index);
    status = convert_checkpoint(folder.path(), folder.file("out.dsv3"), {});
    INFO(status.message());
    CHECK_FALSE(status.ok());
    return status.message();
  };
  CHECK(contains(with_index(R"({"weight_map":{"w":"model-00001-of-00002.safetensors"}})"),
                 "model-00001-of-00002.safetensors: cannot open"));
  for (const char* shard : {"../../x", "/etc/passwd", "..", ".", "", "a/b.safetensors", ".hidden",
                            "a\\\\b", "a\\u0000b"}) {
    CHECK(contains(with_index(std::string(R"({"weight_map":{"w":")") + shard + R"("}})"),
                   "expected the plain name"));
  }
  CHECK(contains(with_index(R"({"weight_map":{"w":7}})"), "weight_map"));
  CHECK(contains(with_index(R"({"weight_map":[]})"), "weight_map"));
  CHECK(contains(with_index(R"({})"), "weight_map"));
  CHECK(contains(with_index(R"([])"), "weight_map"));
  CHECK(contains(with_index(R"({"weight_map":{"w":"a","w":"b"}})"), "twice"));
  CHECK(contains(with_index("{"), "index.json: not valid JSON"));
}
TEST_CASE("20: a tensor in two shards, and an index that names the wrong one") {
  TemporaryFolder folder;
  const MiniCheckpoint checkpoint = mini_fp8();
  checkpoint.write(folder.path());
  std::filesystem::rename(folder.file("model.safetensors"), folder.file("a.safetensors"));
  write_bytes(folder.file("b.safetensors"), safetensors_file({checkpoint.tensors[3]}));
  OrderedJson index;
  for (const RawTensor& t : checkpoint.tensors) index["weight_map"][t.name] = "a.safetensors";
  const auto convert = [&] {
    write_bytes(folder.file("model.safetensors.index.json"), index.dump());
    return convert_checkpoint(folder.path(), folder.file("out.dsv3"), {});
  };
  CHECK(convert().ok());
  std::filesystem::remove(folder.file("out.dsv3"));
  index["weight_map"]["extra"] = "b.safetensors";
  Status status = convert();
  CHECK(status.field() == checkpoint.tensors[3].name);
  CHECK(contains(status.message(), "b.safetensors: tensor"));
  CHECK(contains(status.message(), "is also in"));

  write_bytes(folder.file("b.safetensors"), safetensors_file({{"extra", "F32", {1}, "abcd"}}));
  index["weight_map"][checkpoint.tensors[5].name] = "b.safetensors";
  status = convert();
  CHECK(contains(status.message(), "is in b.safetensors, which does not have it"));
}
TEST_CASE("22: scales NaN, infinite, zero, negative, on the wrong grid, of the wrong type") {
  const std::string name = "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv";
  for (const float bad : {NAN, INFINITY, 0.0f, -0.0f, -1.0f}) {
    refused_conversion(
        convert_damaged([&](MiniCheckpoint* c) { std::memcpy(&c->at(name).bytes[4], &bad, 4); }),
        name, "at [0, 1], expected a positive finite scale", Code::kNumeric);
  }
  refused_conversion(convert_damaged([&](MiniCheckpoint* c) {
                       c->at(name).dtype = "F8_E8M0";
                       c->at(name).bytes = "\x7f\xff\x7f\x7f";
                     }),
                     name, "at [0, 1], expected a positive finite scale", Code::kNumeric);
  refused_conversion(convert_damaged([&](MiniCheckpoint* c) {
                       c->at(name).shape = {4, 1};
                     }),
                     name, "has shape [4, 1], config needs [2, 2]", Code::kCorrupt);
  refused_conversion(convert_damaged([&](MiniCheckpoint* c) {
                       c->config["quantization_config"]["weight_block_size"] = {32, 32};
                     }),
                     "model.layers.0.self_attn.q_a_proj.weight_scale_inv", "config needs",
                     Code::kCorrupt);
  refused_conversion(convert_damaged([&](MiniCheckpoint* c) {
                       c->at(name).dtype = "BF16";
                       c->at(name).bytes.resize(8);
                     }),
                     name, "has type BF16, expected F32 or F8_E8M0", Code::kUnsupported);
  // A head's scales pass another way through the converter.
  const std::string kv = "model.layers.0.self_attn.kv_b_proj.weight_scale_inv";
  const float nan = NAN;
  refused_conversion(
      convert_damaged([&](MiniCheckpoint* c) { std::memcpy(&c->at(kv).bytes[0], &nan, 4); }), kv,
      "at [0, 0]", Code::kNumeric);
}
TEST_CASE("23: NaN and infinity in weights of every type, named with their place") {
  for (const WeightsMode mode : {WeightsMode::kKeep, WeightsMode::kFp8}) {
    const std::string q = "model.layers.0.self_attn.q_b_proj.weight";
    const std::string kv = "model.layers.1.self_attn.kv_b_proj.weight";
    for (const char code : {'\x7f', '\xff'}) {
      refused_conversion(
          convert_damaged([&](MiniCheckpoint* c) { c->at(q).bytes[24 * 3 + 5] = code; }, mode), q,
          "has NaN at [3, 5]", Code::kNumeric);
      refused_conversion(
          convert_damaged([&](MiniCheckpoint* c) { c->at(kv).bytes[20 * 31 + 19] = code; }, mode),
          kv, "has NaN at", Code::kNumeric);
    }
    for (const char* dtype : {"BF16", "F16", "F32"}) {
      const MiniCheckpoint checkpoint = MiniBuilder(mini_config(), dtype, dtype).build();
      const std::string bad = std::string(dtype) == "BF16"  ? std::string("\x80\x7f", 2)
                              : std::string(dtype) == "F16" ? std::string("\x01\xfc", 2)
                                                            : std::string("\x00\x00\x80\xff", 4);
      for (const char* name :
           {"model.embed_tokens.weight", "model.norm.weight", "model.layers.1.mlp.gate.weight",
            "model.layers.1.mlp.experts.1.gate_proj.weight",
            "model.layers.2.self_attn.kv_b_proj.weight", "lm_head.weight"}) {
        refused_conversion(convert_damaged(
                               [&](MiniCheckpoint* c) {
                                 std::string& bytes = c->at(name).bytes;
                                 bytes.replace(bytes.size() - bad.size(), bad.size(), bad);
                               },
                               mode, checkpoint),
                           name, "has NaN or infinity at", Code::kNumeric);
      }
    }
  }
}
TEST_CASE("tensors the config has no place for, copies that are none") {
  const Status unknown = convert_damaged([](MiniCheckpoint* c) {
    c->tensors.push_back({"model.layers.0.self_attn.q_a_proj.bias", "F32", {1}, "abcd"});
    c->tensors.push_back({"zzz", "F32", {1}, "abcd"});
  });
  refused_conversion(unknown, "model.layers.0.self_attn.q_a_proj.bias", "nor for 1 others",
                     Code::kUnsupported);
  // MTP tensors of a checkpoint whose config denies them.
  const Status denied =
      convert_damaged([](MiniCheckpoint* c) { c->config["num_nextn_predict_layers"] = 0; });
  CHECK(contains(denied.message(), "model.layers.2."));
  const Status promised =
      convert_damaged([](MiniCheckpoint* c) { c->config["num_nextn_predict_layers"] = 2; });
  CHECK(contains(promised.message(), "set it to 0"));

  const std::string copy = "model.layers.2.shared_head.head.weight";
  const MiniCheckpoint copies = MiniBuilder(mini_config(), "F8_E4M3").build(true);
  refused_conversion(convert_damaged([&](MiniCheckpoint* c) { c->at(copy).bytes[77] ^= 1; },
                                     WeightsMode::kKeep, copies),
                     copy, "differs from lm_head.weight", Code::kUnsupported);
  refused_conversion(convert_damaged(
                         [&](MiniCheckpoint* c) {
                           c->at(copy).shape = {32, 40};
                         },
                         WeightsMode::kKeep, copies),
                     copy, "expected a copy of lm_head.weight", Code::kUnsupported);
}
TEST_CASE("28: FIFO, directory and device in place of a file, without hanging") {
  TemporaryFolder folder;
  mini_fp8().write(folder.path());
  const std::string path = folder.file("model.safetensors");
  std::filesystem::remove(path);
  REQUIRE(mkfifo(path.c_str(), 0600) == 0);
  Status status = convert_checkpoint(folder.path(), folder.file("out.dsv3"), {});
  CHECK(contains(status.message(), "model.safetensors: is a FIFO"));
  std::filesystem::remove(path);
  std::filesystem::create_directory(path);
  status = convert_checkpoint(folder.path(), folder.file("out.dsv3"), {});
  CHECK(contains(status.message(), "model.safetensors: is a directory"));
  std::filesystem::remove(path);
  std::filesystem::create_symlink("/dev/zero", path);
  status = convert_checkpoint(folder.path(), folder.file("out.dsv3"), {});
  CHECK(contains(status.message(), "model.safetensors: is a device"));
}
TEST_CASE("29: 100,000 nested brackets in header and index, on a small stack") {
  on_small_stack([] {
    const std::string deep(100'000, '[');
    refused(parse(safetensors_file("{\"w\":" + deep, "")), "nested deeper");
    refused(parse(safetensors_file(R"({"w":{"dtype":"F32","shape":)" + deep, "")), "nested deeper");
    refused(parse(safetensors_file(R"({"__metadata__":{"a":)" + deep, "")), "nested deeper");
    CHECK_FALSE(parse_safetensors_index(R"({"other":)" + deep, "x").ok());
    CHECK_FALSE(parse_safetensors_index(R"({"weight_map":{"w":)" + deep, "x").ok());
  });
}
