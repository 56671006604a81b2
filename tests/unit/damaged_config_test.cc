// The damaged corpus, part two: config.json (and the configs of .dsv3 files, which pass the same
// rules). Every error names the file and the field.
#include <doctest/doctest.h>

#include <filesystem>

#include "runtime/base/json.h"
#include "runtime/model/convert.h"
#include "tests/unit/model_support.h"

using namespace dsv3;
using namespace dsv3::test;

namespace {

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

Status check_text(const std::string& text) {
  const auto json = parse_json(text, "config.json");
  if (!json.ok()) return json.status();
  const auto config = ModelConfig::from_json(json.value(), "config.json");
  if (!config.ok()) return config.status();
  return config.value().validate("config.json");
}

// The mini config with one field (or a nested one) replaced.
Status check_with(const std::function<void(OrderedJson*)>& change) {
  OrderedJson config = mini_config();
  change(&config);
  return check_text(config.dump());
}
Status check_field(const char* field, const OrderedJson& value) {
  return check_with([&](OrderedJson* c) { (*c)[field] = value; });
}

void refused(const Status& status, const std::string& field, const std::string& part = "") {
  INFO(field << ": " << status.message());
  REQUIRE_FALSE(status.ok());
  CHECK(contains(status.message(), "config.json: "));
  CHECK(contains(status.message(), field));
  CHECK(contains(status.field(), field));
  CHECK(contains(status.message(), part));
}

const char* const kSizes[] = {
    "vocab_size",        "hidden_size",         "intermediate_size",      "moe_intermediate_size",
    "num_hidden_layers", "num_attention_heads", "kv_lora_rank",           "qk_nope_head_dim",
    "qk_rope_head_dim",  "v_head_dim",          "num_experts_per_tok",    "n_group",
    "topk_group",        "moe_layer_freq",      "max_position_embeddings"};

OrderedJson yarn() {
  return {{"type", "yarn"},       {"factor", 8},    {"original_max_position_embeddings", 64},
          {"beta_fast", 32},      {"beta_slow", 1}, {"mscale", 1.0},
          {"mscale_all_dim", 1.0}};
}

}  // namespace

TEST_CASE("the undamaged config is read") { CHECK(check_text(mini_config().dump()).ok()); }

TEST_CASE("29: 100,000 nested brackets, also in fields nobody reads, on a small stack") {
  on_small_stack([] {
    const std::string deep(100'000, '[');
    CHECK(contains(check_text(deep).message(), "nested deeper"));
    CHECK(contains(check_text(R"({"model_type":"deepseek_v3","other":)" + deep).message(),
                   "nested deeper"));
    std::string objects;
    for (int i = 0; i < 100'000; ++i) objects += R"({"a":)";
    CHECK(contains(check_text(objects).message(), "nested deeper"));
  });
}
TEST_CASE("30: duplicate keys, numbers out of range, lone surrogates, not JSON") {
  for (const char* text :
       {R"({"model_type":"deepseek_v3","hidden_size":8,"hidden_size":16})",
        R"({"model_type":"deepseek_v3","rope_theta":1e999})",
        R"({"model_type":"deepseek_v3","x":"\ud800"})", "{\"model_type\":\"\xff\xfe\"}", "", "{",
        R"({"model_type":"deepseek_v3"}x)", R"({"model_type":"deepseek_v3",})",
        R"({'model_type':'deepseek_v3'})", R"({"model_type":"deepseek_v3","rope_theta":NaN})"}) {
    const Status status = check_text(text);
    INFO(text);
    CHECK(status.code() == Code::kCorrupt);
    CHECK(contains(status.message(), "config.json: "));
  }
  CHECK(contains(check_text(std::string("{\"model_type\":\"deepseek_v3\"}\0x", 30)).message(),
                 "config.json: "));
  CHECK(contains(check_text("[]").message(), "expected an object"));
  CHECK(contains(check_text("7").message(), "expected an object"));
}
TEST_CASE("30: what a message shows of a long text ends where a character does") {
  std::string text = "a";  // its characters begin at odd places
  for (int i = 0; i < 100; ++i) text += "é";
  refused(check_field("hidden_size", text), "hidden_size",
          "hidden_size is \"" + text.substr(0, 55) + "..., expected an integer");
  refused(check_field("hidden_act", text), "hidden_act",
          "hidden_act is \"" + text.substr(0, 59) + "\", expected \"silu\"");
}
TEST_CASE("30: config.json and generation_config.json of more than 16 MiB") {
  for (const char* name : {"config.json", "generation_config.json"}) {
    TemporaryFolder folder;
    mini_fp8().write(folder.path());
    write_bytes(folder.file("generation_config.json"), "{}");
    std::filesystem::resize_file(folder.file(name), (size_t{16} << 20) + 1);
    const Status status = convert_checkpoint(folder.path(), folder.file("out.dsv3"), {});
    CHECK(status.code() == Code::kCorrupt);
    CHECK(status.message() ==
          folder.file(name) + ": has 16777217 bytes, expected at most 16777216");
  }
}
TEST_CASE("31: sizes zero, negative, 2^31, 2^63, and no integers") {
  for (const char* field : kSizes) {
    for (const OrderedJson& value :
         {OrderedJson(0), OrderedJson(-1), OrderedJson(int64_t{1} << 31), OrderedJson(INT64_MAX),
          OrderedJson(INT64_MIN), OrderedJson(UINT64_MAX), OrderedJson(1.5), OrderedJson("8"),
          OrderedJson(true), OrderedJson::array(), OrderedJson::object()}) {
      refused(check_field(field, value), field);
    }
  }
  for (const char* field : {"n_routed_experts", "n_shared_experts", "num_nextn_predict_layers",
                            "first_k_dense_replace", "q_lora_rank"}) {
    for (const OrderedJson& value : {OrderedJson(-1), OrderedJson(int64_t{1} << 31),
                                     OrderedJson(INT64_MAX), OrderedJson("1")}) {
      refused(check_field(field, value), field);
    }
  }
  refused(check_field("q_lora_rank", 0), "q_lora_rank");
  // Each in range, their product is not.
  refused(check_with([](OrderedJson* c) {
            (*c)["num_attention_heads"] = 16384;
            (*c)["qk_nope_head_dim"] = 1 << 20;
          }),
          "qk_nope_head_dim");
  // Buffers are sized by what a model without experts does not use, too.
  refused(check_with([](OrderedJson* c) {
            (*c)["n_routed_experts"] = nullptr;
            (*c)["n_shared_experts"] = 16384;
            (*c)["moe_intermediate_size"] = 262144;
          }),
          "n_shared_experts * moe_intermediate_size");
  for (const int64_t value : {int64_t{-2}, int64_t{INT32_MAX}}) {
    refused(check_with([&](OrderedJson* c) {
              (*c)["n_routed_experts"] = nullptr;
              (*c)["num_experts_per_tok"] = value;
            }),
            "num_experts_per_tok");
  }
}
TEST_CASE("32 to 34: experts against groups and choices") {
  refused(check_field("n_group", 3), "n_routed_experts", "multiple of n_group, which is 3");
  refused(check_field("topk_group", 3), "topk_group", "at most n_group, which is 2");
  refused(check_field("num_experts_per_tok", 3), "num_experts_per_tok", "which is 2");
  refused(check_field("num_experts_per_tok", 5), "num_experts_per_tok", "which is 4");
  refused(check_with([](OrderedJson* c) {
            (*c)["n_group"] = 4;
            (*c)["topk_group"] = 2;
          }),
          "n_group", "1 expert per group");
  // Without groups nothing limits the choice but the number of experts.
  CHECK(check_with([](OrderedJson* c) {
          (*c)["topk_method"] = "greedy";
          (*c)["num_experts_per_tok"] = 4;
        }).ok());
}
TEST_CASE("35: kv_lora_rank 0, odd rotary dimension") {
  refused(check_field("kv_lora_rank", 0), "kv_lora_rank");
  refused(check_field("qk_rope_head_dim", 5), "qk_rope_head_dim", "even");
}
TEST_CASE("36: vocab_size unlike the embedding's rows") {
  TemporaryFolder folder;
  MiniCheckpoint checkpoint = mini_fp8();
  checkpoint.config["vocab_size"] = 41;
  checkpoint.write(folder.path());
  const Status status = convert_checkpoint(folder.path(), folder.file("out.dsv3"), {});
  CHECK(status.field() == "model.embed_tokens.weight");
  CHECK(contains(status.message(), "has shape [40, 32], config needs [41, 32]"));
}
TEST_CASE("36: a tokenizer with more ids than vocab_size") {
  TemporaryFolder folder;
  mini_fp8().write(folder.path());
  for (const char* name : {"tokenizer.json", "tokenizer_config.json"}) {
    std::filesystem::copy(source_path(std::string("examples/models/tiny-coder/") + name),
                          folder.file(name));
  }
  const Status status = convert_checkpoint(folder.path(), folder.file("out.dsv3"), {});
  CHECK(status.field() == "vocab_size");
  CHECK(contains(status.message(), "tokenizer.json: has token ids up to 4095"));
}
TEST_CASE("37: begin- and end-of-sequence tokens out of range") {
  for (const OrderedJson& value : {OrderedJson(40), OrderedJson(-1), OrderedJson(int64_t{1} << 31),
                                   OrderedJson(1.5), OrderedJson("1")}) {
    refused(check_field("bos_token_id", value), "bos_token_id");
    refused(check_field("eos_token_id", value), "eos_token_id");
    refused(check_field("eos_token_id", OrderedJson::array({1, value})), "eos_token_id");
  }
  refused(check_field("eos_token_id", OrderedJson(std::vector<int>(1000, 1))), "eos_token_id");
  TemporaryFolder folder;
  mini_fp8().write(folder.path());
  write_bytes(folder.file("generation_config.json"), R"({"eos_token_id": [1, "x"]})");
  Status status = convert_checkpoint(folder.path(), folder.file("out.dsv3"), {});
  CHECK(contains(status.message(), "generation_config.json: eos_token_id"));
  write_bytes(folder.file("generation_config.json"), R"({"eos_token_id": 40})");
  status = convert_checkpoint(folder.path(), folder.file("out.dsv3"), {});
  CHECK(status.field() == "eos_token_id");
}
TEST_CASE("38: rope theta and factors that are no numbers to divide by") {
  for (const OrderedJson& value : {OrderedJson(0), OrderedJson(-10000), OrderedJson(1e300),
                                   OrderedJson("10000"), OrderedJson(1)}) {
    refused(check_field("rope_theta", value), "rope_theta");
  }
  CHECK(check_field("rope_scaling", yarn()).ok());
  for (const char* field : {"factor", "original_max_position_embeddings", "beta_slow"}) {
    for (const OrderedJson& value :
         {OrderedJson(0), OrderedJson(-1), OrderedJson(1e300), OrderedJson("1")}) {
      OrderedJson scaling = yarn();
      scaling[field] = value;
      refused(check_field("rope_scaling", scaling), std::string("rope_scaling.") + field);
    }
  }
  for (const char* field : {"beta_fast", "mscale", "mscale_all_dim"}) {
    OrderedJson scaling = yarn();
    scaling[field] = -0.5;
    refused(check_field("rope_scaling", scaling), std::string("rope_scaling.") + field);
  }
  OrderedJson no_factor = yarn();
  no_factor.erase("factor");
  refused(check_field("rope_scaling", no_factor), "rope_scaling.factor");
  refused(check_field("rope_scaling", "yarn"), "rope_scaling");
  for (const OrderedJson& value : {OrderedJson(0), OrderedJson(-1e-6), OrderedJson(2)}) {
    refused(check_field("rms_norm_eps", value), "rms_norm_eps");
  }
  refused(check_field("routed_scaling_factor", 0), "routed_scaling_factor");
}
TEST_CASE("39: more dense layers than layers, block size 0") {
  refused(check_field("first_k_dense_replace", 3), "first_k_dense_replace",
          "at most num_hidden_layers, which is 2");
  for (const OrderedJson& block :
       {OrderedJson{0, 128}, OrderedJson{128, 0}, OrderedJson{-128, 128}, OrderedJson{128, 7},
        OrderedJson{128, 9}, OrderedJson{128}, OrderedJson{128, 128, 128}, OrderedJson("128"),
        OrderedJson{"128", 128}, OrderedJson{int64_t{1} << 62, 128}}) {
    refused(
        check_field("quantization_config", {{"quant_method", "fp8"}, {"weight_block_size", block}}),
        "weight_block_size");
  }
}
TEST_CASE("40: consistent but a petabyte: refused before anything is allocated") {
  const Status status = check_with([](OrderedJson* c) {
    (*c)["hidden_size"] = 1 << 20;
    (*c)["moe_intermediate_size"] = 1 << 18;
    (*c)["n_routed_experts"] = 1024;
    (*c)["num_hidden_layers"] = 1000;
  });
  CHECK_FALSE(status.ok());
  CHECK(contains(status.message(), "parameters"));
  // Within the limits of numbers, but not in the file: the first tensor says so.
  TemporaryFolder folder;
  MiniCheckpoint checkpoint = mini_fp8();
  checkpoint.config["num_hidden_layers"] = 1000;
  checkpoint.config["n_routed_experts"] = 16384;
  checkpoint.write(folder.path());
  CHECK_FALSE(convert_checkpoint(folder.path(), folder.file("out.dsv3"), {}).ok());
}
TEST_CASE("what this build cannot compute is refused by name") {
  const auto unsupported = [](const Status& status, const std::string& field,
                              const std::string& found) {
    refused(status, field, found);
    CHECK(status.code() == Code::kUnsupported);
  };
  unsupported(check_field("model_type", "llama"), "model_type", "\"llama\"");
  unsupported(check_text("{}"), "model_type", "deepseek_v3");
  unsupported(check_field("hidden_act", "gelu"), "hidden_act", "\"gelu\"");
  unsupported(check_field("attention_bias", true), "attention_bias", "true");
  unsupported(check_field("rope_interleave", false), "rope_interleave", "false");
  unsupported(check_field("topk_method", "random"), "topk_method", "\"random\"");
  unsupported(check_field("scoring_func", "relu"), "scoring_func", "\"relu\"");
  for (const char* type : {"linear", "dynamic", "longrope", "llama3", ""}) {
    unsupported(check_field("rope_scaling", {{"type", type}, {"factor", 2}}), "rope_scaling.type",
                type);
  }
  const auto quantized = [](const char* key, const char* value) {
    OrderedJson q = {{"quant_method", "fp8"},
                     {"fmt", "e4m3"},
                     {"activation_scheme", "dynamic"},
                     {"weight_block_size", {128, 128}}};
    q[key] = value;
    return check_field("quantization_config", q);
  };
  CHECK(quantized("scale_fmt", "ue8m0").ok());
  unsupported(quantized("quant_method", "awq"), "quantization_config.quant_method", "\"awq\"");
  unsupported(quantized("fmt", "e5m2"), "quantization_config.fmt", "\"e5m2\"");
  unsupported(quantized("activation_scheme", "static"), "quantization_config.activation_scheme",
              "static");
  unsupported(quantized("scale_fmt", "other"), "quantization_config.scale_fmt", "other");
  unsupported(check_field("quantization_config", {{"quant_method", "fp8"}}),
              "quantization_config.weight_block_size", "absent");
}
