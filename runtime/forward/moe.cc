// The feed-forward half of a layer: one dense network, or routed experts with shared ones beside
// them (DeepSeekMoE, arXiv 2401.06066; routing of DeepSeek-V3, arXiv 2412.19437, section 2.1.2).
#include "runtime/forward/layer.h"

namespace dsv3 {
namespace {

kernels::GroupScore group_score(TopkMethod method) {
  switch (method) {
    case TopkMethod::kGroupLimitedGreedy:
      return kernels::GroupScore::kMax;
    case TopkMethod::kNoAuxTc:
      return kernels::GroupScore::kTop2Sum;
    case TopkMethod::kGreedy:
      break;
  }
  return kernels::GroupScore::kNone;
}

}  // namespace

void ffn_block(const LayerContext& c, const BoundLayer& layer, uint64_t* load) {
  kernels::Device& device = *c.device;
  const ModelConfig& config = *c.config;
  Activations& a = *c.a;
  const auto hidden = static_cast<int32_t>(config.hidden_size);

  // x [rows, hidden] -> normed [rows, hidden]
  device.rms_norm(a.x.at(), hidden, layer.post_norm, config.rms_norm_eps, c.rows, hidden,
                  a.normed.at(), hidden);

  if (layer.moe) {
    // Which experts each row goes to, and with what weight.
    const auto top_k = static_cast<int32_t>(config.num_experts_per_tok);
    kernels::RouteArgs route;
    route.gate = layer.router;
    route.bias = layer.router_bias;
    route.scoring = config.scoring_func == ScoringFunc::kSigmoid ? kernels::Scoring::kSigmoid
                                                                 : kernels::Scoring::kSoftmax;
    route.group_score = group_score(config.topk_method);
    route.groups = static_cast<int32_t>(config.n_group);
    route.topk_group = static_cast<int32_t>(config.topk_group);
    route.top_k = top_k;
    route.normalise = config.norm_topk_prob;
    route.scaling = config.routed_scaling_factor;
    route.x = a.normed.at();
    route.rows = c.rows;
    route.expert_ids = c.plan->expert_ids();
    route.expert_weights = c.plan->expert_weights();
    device.route(route);
    if (load != nullptr) {
      for (int32_t i = 0; i < c.rows * top_k; ++i) ++load[c.plan->expert_ids()[i]];
    }
    c.plan->build(c.rows, top_k, layer.experts, layer.has_shared ? &layer.shared : nullptr);
  } else {
    c.plan->build_dense(c.rows, &layer.dense);
  }

  // x += the chosen networks' weighted sum
  kernels::FfnArgs ffn;
  ffn.rows = c.rows;
  ffn.hidden = hidden;
  ffn.slots = c.plan->slots();
  ffn.groups = c.plan->groups();
  ffn.slot_weights = c.plan->slot_weights();
  ffn.x = a.normed.at();
  ffn.y = a.x.at();
  device.moe_ffn(ffn);
}

}  // namespace dsv3
