#include "kernels/host_device.h"

#include <cmath>
#include <cstring>
#include <limits>

#include "runtime/base/alloc.h"

namespace dsv3::kernels {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

void score_row(Scoring scoring, int32_t experts, float* s) {
  if (scoring == Scoring::kSigmoid) {
    for (int32_t e = 0; e < experts; ++e) s[e] = 1.0f / (1.0f + std::exp(-s[e]));
    return;
  }
  float max = kMinusInfinity;
  for (int32_t e = 0; e < experts; ++e) max = s[e] > max ? s[e] : max;
  float sum = 0;
  for (int32_t e = 0; e < experts; ++e) {
    s[e] = std::exp(s[e] - max);
    sum += s[e];
  }
  for (int32_t e = 0; e < experts; ++e) s[e] /= sum;
}

// Index of the greatest of values[0..count), the lowest of equals; there is always one.
int32_t best_of(const float* values, int32_t count) {
  int32_t best = 0;
  for (int32_t i = 1; i < count; ++i) {
    if (values[i] > values[best]) best = i;
  }
  return best;
}

float group_score(GroupScore kind, const float* choice, int32_t count) {
  const int32_t first = best_of(choice, count);
  if (kind == GroupScore::kMax || count == 1) return choice[first];
  float second = kMinusInfinity;
  for (int32_t i = 0; i < count; ++i) {
    if (i != first && choice[i] > second) second = choice[i];
  }
  return choice[first] + second;
}

// Sets the experts of all groups but the topk_group best to minus infinity. scores: [groups].
void mask_groups(const RouteArgs& args, float* choice, float* scores) {
  const int32_t size = args.gate.n / args.groups;
  for (int32_t g = 0; g < args.groups; ++g) {
    scores[g] = group_score(args.group_score, choice + g * size, size);
  }
  for (int32_t g = 0; g < args.groups; ++g) {
    int32_t better = 0;
    for (int32_t o = 0; o < args.groups; ++o) {
      better += scores[o] > scores[g] || (scores[o] == scores[g] && o < g) ? 1 : 0;
    }
    if (better < args.topk_group) continue;
    for (int32_t i = 0; i < size; ++i) choice[g * size + i] = kMinusInfinity;
  }
}

}  // namespace

Dev<std::byte> HostDevice::alloc(size_t bytes) {
  void* p = host_alloc(bytes, kPageAlign);
  if (p != nullptr) std::memset(p, 0, bytes);
  return Dev<std::byte>(static_cast<std::byte*>(p));
}

void HostDevice::free(Dev<std::byte> p) { host_free(p.get()); }

void HostDevice::upload(Dev<std::byte> dst, const void* src, size_t bytes) {
  if (bytes > 0) std::memcpy(dst.get(), src, bytes);
}

void HostDevice::download(void* dst, Dev<const std::byte> src, size_t bytes) {
  if (bytes > 0) std::memcpy(dst, src.get(), bytes);
}

void HostDevice::copy(Dev<std::byte> dst, Dev<const std::byte> src, size_t bytes) {
  if (bytes > 0) std::memmove(dst.get(), src.get(), bytes);
}

void HostDevice::zero(Dev<std::byte> dst, size_t bytes) {
  if (bytes > 0) std::memset(dst.get(), 0, bytes);
}

Dev<const std::byte> HostDevice::bind(const void* host, size_t) {
  return Dev<const std::byte>(static_cast<const std::byte*>(host));
}

void HostDevice::unbind(Dev<const std::byte>) {}

Status HostDevice::synchronize() { return ok_status(); }

void HostDevice::run_on_threads(void (*body)(void*, int, int), void* context, int tasks) {
  for (int task = 0; task < tasks; ++task) body(context, task, 0);
}

void route_row(const RouteArgs& args, float* logits, float* scratch, int32_t* ids, float* weights) {
  const int32_t experts = args.gate.n;
  float* choice = scratch;
  score_row(args.scoring, experts, logits);
  const float* bias = args.bias.get();
  for (int32_t e = 0; e < experts; ++e) {
    const float v = bias != nullptr ? logits[e] + bias[e] : logits[e];
    // A row of NaN must still choose experts that exist; its weights carry the NaN on.
    choice[e] = std::isnan(v) ? kMinusInfinity : v;
  }
  if (args.group_score != GroupScore::kNone && args.groups > 1) {
    mask_groups(args, choice, scratch + experts);
  }
  float sum = 0;
  for (int32_t i = 0; i < args.top_k; ++i) {
    int32_t best = -1;
    for (int32_t e = 0; e < experts; ++e) {
      if (std::isnan(choice[e])) continue;  // taken
      if (best < 0 || choice[e] > choice[best]) best = e;
    }
    choice[best] = std::numeric_limits<float>::quiet_NaN();
    ids[i] = best;
    weights[i] = logits[best];
    sum += weights[i];
  }
  for (int32_t i = 0; i < args.top_k; ++i) {
    if (args.normalise) weights[i] /= sum + 1e-20f;
    weights[i] *= args.scaling;
  }
}

RowStats reduce_row(const float* logits, int32_t vocab) {
  RowStats stats;
  stats.argmax = best_of(logits, vocab);
  stats.max = logits[stats.argmax];
  for (int32_t i = 0; i < vocab; ++i) stats.finite = stats.finite && std::isfinite(logits[i]);
  for (int32_t i = 0; i < vocab; ++i) {
    stats.sum_exp += std::exp(static_cast<double>(logits[i]) - static_cast<double>(stats.max));
  }
  return stats;
}

}  // namespace dsv3::kernels
