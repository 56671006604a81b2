#include <doctest/doctest.h>

#include "runtime/base/json.h"
#include "runtime/model/config.h"
#include "tests/support/support.h"
#include "tests/unit/model_support.h"

using namespace dsv3;
using namespace dsv3::test;

namespace {

ModelConfig read(const std::string& text) {
  const auto json = parse_json(text, "config.json");
  REQUIRE(json.ok());
  const auto config = ModelConfig::from_json(json.value(), "config.json");
  INFO(config.status().message());
  REQUIRE(config.ok());
  return config.value();
}

}  // namespace

TEST_CASE("the micro checkpoints' configs") {
  const ModelConfig v3 = read(read_bytes(source_path("tests/data/models/v3-micro/config.json")));
  CHECK(v3.validate("config.json").ok());
  CHECK(v3.model_type == "deepseek_v3");
  CHECK(v3.q_lora_rank == 192);
  CHECK(v3.num_nextn_predict_layers == 1);
  CHECK(v3.cache_layers() == 5);
  CHECK(v3.topk_method == TopkMethod::kNoAuxTc);
  CHECK(v3.scoring_func == ScoringFunc::kSigmoid);
  CHECK(v3.norm_topk_prob);
  CHECK(v3.routed_scaling_factor == 2.5f);
  CHECK(v3.yarn.enabled);
  CHECK(v3.yarn.factor == 8);
  CHECK(v3.yarn.original_max_position_embeddings == 256);
  CHECK_FALSE(v3.is_moe_layer(0));
  CHECK(v3.is_moe_layer(1));
  CHECK(v3.eos_token_ids == std::vector<int32_t>{1});

  const ModelConfig v2 =
      read(read_bytes(source_path("tests/data/models/v2-lite-micro/config.json")));
  CHECK(v2.validate("config.json").ok());
  CHECK(v2.q_lora_rank == 0);  // null
  CHECK(v2.topk_method == TopkMethod::kGreedy);
  CHECK(v2.scoring_func == ScoringFunc::kSoftmax);
  CHECK(v2.yarn.mscale == doctest::Approx(0.707));
}

TEST_CASE("absent fields take the published classes' defaults") {
  const ModelConfig v3 = read(R"({"model_type": "deepseek_v3"})");
  CHECK(v3.validate("config.json").ok());
  CHECK(v3.vocab_size == 129280);
  CHECK(v3.n_routed_experts == 256);
  CHECK(v3.topk_method == TopkMethod::kNoAuxTc);
  CHECK(v3.q_lora_rank == 1536);
  CHECK_FALSE(v3.yarn.enabled);
  CHECK(read(R"({"model_type": "kimi_k2"})").n_group == 8);

  const ModelConfig v2 = read(R"({"model_type": "deepseek_v2"})");
  CHECK(v2.validate("config.json").ok());
  CHECK(v2.vocab_size == 102400);
  CHECK(v2.n_routed_experts == 0);  // None: every layer is dense
  CHECK_FALSE(v2.is_moe_layer(5));
  CHECK(v2.bos_token_id == 100000);
}

TEST_CASE("gates as published: V2 normalises or scales, V3 does both, one expert does neither") {
  const std::string v2 =
      R"({"model_type": "deepseek_v2", "n_routed_experts": 8, "routed_scaling_factor": 16.0,)";
  CHECK(read(v2 + R"("num_experts_per_tok": 2, "norm_topk_prob": false})").routed_scaling_factor ==
        16);
  const ModelConfig both = read(v2 + R"("num_experts_per_tok": 2, "norm_topk_prob": true})");
  CHECK(both.norm_topk_prob);
  CHECK(both.routed_scaling_factor == 1);
  const ModelConfig one = read(v2 + R"("num_experts_per_tok": 1, "norm_topk_prob": true})");
  CHECK_FALSE(one.norm_topk_prob);
  CHECK(one.routed_scaling_factor == 16);
}

TEST_CASE("rope: both spellings of the type, the newer rope_parameters, none") {
  const std::string yarn =
      R"("factor": 40, "original_max_position_embeddings": 4096, "mscale": 1.0})";
  CHECK(read(R"({"model_type": "deepseek_v3", "rope_scaling": {"type": "yarn", )" + yarn + "}")
            .yarn.enabled);
  CHECK(read(R"({"model_type": "deepseek_v3", "rope_scaling": {"rope_type": "yarn", )" + yarn + "}")
            .yarn.mscale_all_dim == 0);
  const ModelConfig newer =
      read(R"({"model_type": "deepseek_v3", "rope_parameters": {"rope_type": "default",
               "rope_theta": 50000}})");
  CHECK_FALSE(newer.yarn.enabled);
  CHECK(newer.rope_theta == 50000);
  // Both: the older one counts, unless it is null or empty.
  for (const char* none : {"null", "{}"}) {
    CHECK(read(R"({"model_type": "deepseek_v3", "rope_parameters": )" + std::string(none) +
               R"(, "rope_scaling": {"type": "yarn", )" + yarn + "}")
              .yarn.enabled);
    CHECK(read(R"({"model_type": "deepseek_v3", "rope_scaling": )" + std::string(none) +
               R"(, "rope_parameters": {"type": "yarn", )" + yarn + "}")
              .yarn.enabled);
  }
  CHECK(read(R"({"model_type": "deepseek_v3", "rope_parameters": {"rope_type": "default"},
               "rope_scaling": {"type": "yarn", )" +
             yarn + "}")
            .yarn.enabled);
}

TEST_CASE("end-of-sequence tokens: an integer, a list, and generation_config.json's") {
  ModelConfig c = read(R"({"model_type": "deepseek_v3", "eos_token_id": [7, 5, 7]})");
  CHECK(c.eos_token_ids == std::vector<int32_t>{7, 5});
  CHECK(c.add_generation_config(parse_json(R"({"eos_token_id": [5, 9]})", "g").value(), "g").ok());
  CHECK(c.eos_token_ids == std::vector<int32_t>{7, 5, 9});
  CHECK(read(R"({"model_type": "deepseek_v3", "eos_token_id": 3})").eos_token_ids ==
        std::vector<int32_t>{3});
  CHECK(read(R"({"model_type": "deepseek_v3", "eos_token_id": null})").eos_token_ids.empty());
  CHECK(read(R"({"model_type": "deepseek_v3", "bos_token_id": null})").bos_token_id == -1);
}

TEST_CASE("V3.1's quantization_config") {
  const ModelConfig c = read(R"({"model_type": "deepseek_v3", "quantization_config":
      {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "scale_fmt": "ue8m0",
       "weight_block_size": [64, 32]}})");
  CHECK(c.weight_block_rows == 64);
  CHECK(c.weight_block_columns == 32);
}
