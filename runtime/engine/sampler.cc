#include "runtime/engine/sampler.h"

#include <algorithm>
#include <cmath>

#include "runtime/engine/random.h"

namespace dsv3 {
namespace {

Status bad_field(const char* field, double value, const char* expected) {
  return make_field_error(Code::kInvalidArgument, field, "%s is %g, expected %s", field, value,
                          expected);
}

// Greater logit first; ties take the lower id.
struct Better {
  std::span<const float> logits;
  bool operator()(int32_t a, int32_t b) const {
    const float x = logits[static_cast<size_t>(a)], y = logits[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  }
};

}  // namespace

Status SamplingOptions::validate(int64_t vocab_size) const {
  // Negated comparisons, so that NaN fails too.
  if (!(temperature >= 0) || std::isinf(temperature)) {
    return bad_field("temperature", temperature, "a finite number >= 0");
  }
  if (!(top_p > 0 && top_p <= 1)) return bad_field("top_p", top_p, "0 < top_p <= 1");
  if (!(min_p >= 0 && min_p < 1)) return bad_field("min_p", min_p, "0 <= min_p < 1");
  if (top_k < 0) return bad_field("top_k", top_k, "0 (off) or more");
  if (!(repetition_penalty > 0) || std::isinf(repetition_penalty)) {
    return bad_field("repetition_penalty", repetition_penalty, "a finite number > 0");
  }
  if (!std::isfinite(presence_penalty)) {
    return bad_field("presence_penalty", presence_penalty, "a finite number");
  }
  if (!std::isfinite(frequency_penalty)) {
    return bad_field("frequency_penalty", frequency_penalty, "a finite number");
  }
  if (penalty_window < -1) return bad_field("penalty_window", penalty_window, "-1 (all) or more");
  if (logprobs < -1 || logprobs > kMaxLogprobs) {
    return bad_field("logprobs", logprobs, "-1 (none) to 64");
  }
  for (const LogitBias& b : logit_bias) {
    if (b.token < 0 || b.token >= vocab_size) {
      return make_field_error(Code::kInvalidArgument, "logit_bias",
                              "logit_bias names token %d, expected 0 to %lld", b.token,
                              static_cast<long long>(vocab_size - 1));
    }
    if (!(b.bias < std::numeric_limits<float>::infinity())) {  // NaN or +infinity
      return make_field_error(Code::kInvalidArgument, "logit_bias",
                              "logit_bias of token %d is %g, expected a finite number or -infinity",
                              b.token, static_cast<double>(b.bias));
    }
  }
  return {};
}

LogSoftmax::LogSoftmax(std::span<const float> logits)
    : max_(static_cast<double>(*std::max_element(logits.begin(), logits.end()))) {
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x) - max_);
  log_sum_ = std::log(sum);
}

Sampler::Sampler(int64_t vocab_size)
    : counts_(static_cast<size_t>(vocab_size)),
      ids_(static_cast<size_t>(vocab_size)),
      weights_(static_cast<size_t>(vocab_size)),
      original_(static_cast<size_t>(vocab_size)) {}

void Sampler::log_probabilities(int32_t count, std::span<const float> logits, SampledToken* out) {
  const Better better{logits};
  const auto n = std::min(static_cast<size_t>(count), logits.size());
  log_softmax_ = LogSoftmax(logits);
  if (n == 0) return;
  // The n best so far stand in order at the front of ids_.
  size_t have = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const auto id = static_cast<int32_t>(i);
    if (have == n && !better(id, ids_[n - 1])) continue;
    size_t at = have < n ? have++ : n - 1;
    for (; at > 0 && better(id, ids_[at - 1]); --at) ids_[at] = ids_[at - 1];
    ids_[at] = id;
  }
  out->top.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    out->top.push_back({ids_[i], log_softmax_(logits[static_cast<size_t>(ids_[i])])});
  }
}

void Sampler::penalise(const SamplingOptions& o, std::span<const int32_t> tokens,
                       std::span<float> logits) {
  if (!o.penalises()) return;
  if (o.penalty_window >= 0 && tokens.size() > static_cast<size_t>(o.penalty_window)) {
    tokens = tokens.last(static_cast<size_t>(o.penalty_window));
  }
  size_t distinct = 0;
  for (const int32_t t : tokens) {
    if (counts_[static_cast<size_t>(t)]++ == 0) ids_[distinct++] = t;
  }
  for (size_t i = 0; i < distinct; ++i) {
    const auto t = static_cast<size_t>(ids_[i]);
    float x = logits[t];
    x = x > 0 ? x / o.repetition_penalty : x * o.repetition_penalty;
    x -= o.presence_penalty + o.frequency_penalty * static_cast<float>(counts_[t]);
    logits[t] = x;
    counts_[t] = 0;
  }
}

int32_t Sampler::draw(const SamplingOptions& o, uint64_t position, std::span<const float> logits,
                      float max) {
  const Better better{logits};
  const auto weigh = [&](int32_t id) {  // relative to the best token's 1
    const double x = logits[static_cast<size_t>(id)];
    return std::exp((x - static_cast<double>(max)) / static_cast<double>(o.temperature));
  };
  size_t count = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] > -std::numeric_limits<float>::infinity()) {
      ids_[count++] = static_cast<int32_t>(i);
    }
  }
  const auto begin = ids_.begin();
  const auto at = [&](size_t i) { return begin + static_cast<std::ptrdiff_t>(i); };
  bool sorted = false;
  if (o.top_k > 0 && static_cast<size_t>(o.top_k) < count) {
    std::nth_element(begin, at(static_cast<size_t>(o.top_k)), at(count), better);
    count = static_cast<size_t>(o.top_k);
    std::sort(begin, at(count), better);
    sorted = true;
  }
  double total = 0;
  for (size_t i = 0; i < count; ++i) total += weights_[i] = weigh(ids_[i]);
  if (o.top_p < 1) {
    // The smallest set of best tokens that reaches top_p. Sorting 129,280 logits costs 10 ms; a
    // heap gives only as many as are needed.
    const auto worse = [&](int32_t a, int32_t b) { return better(b, a); };
    if (!sorted) std::make_heap(begin, at(count), worse);
    const double wanted = static_cast<double>(o.top_p) * total;
    double reached = 0;
    size_t kept = 0;
    while (kept < count && (kept == 0 || reached < wanted)) {
      if (!sorted) std::pop_heap(begin, at(count - kept), worse);
      const int32_t id = sorted ? ids_[kept] : ids_[count - 1 - kept];
      reached += weights_[kept] = weigh(id);
      ++kept;
    }
    if (!sorted) std::reverse(begin, at(count));  // the popped ones stand at the end, worst first
    count = kept;
  }
  if (o.min_p > 0) {
    size_t kept = 0;
    for (size_t i = 0; i < count; ++i) {
      if (weights_[i] < static_cast<double>(o.min_p)) continue;
      ids_[kept] = ids_[i];
      weights_[kept++] = weights_[i];
    }
    count = kept;
  }
  total = 0;
  for (size_t i = 0; i < count; ++i) total += weights_[i];
  const double target = position_uniform(o.seed, position) * total;
  double reached = 0;
  size_t last = 0;  // rounding may leave the sum below the target: then the last possible one
  for (size_t i = 0; i < count; ++i) {
    if (weights_[i] == 0) continue;
    last = i;
    reached += weights_[i];
    if (reached > target) break;
  }
  return ids_[last];
}

Status Sampler::sample(const SamplingOptions& options, std::span<const int32_t> tokens,
                       std::span<float> logits, const LogitsHook& hook, SampledToken* out) {
  out->id = -1;
  out->logprob = std::numeric_limits<float>::quiet_NaN();
  out->top.clear();
  for (size_t i = 0; i < logits.size(); ++i) {
    if (!std::isfinite(logits[i])) {
      return make_error(Code::kNumeric, "the logit of token %zu at position %zu is %g", i,
                        tokens.size(), static_cast<double>(logits[i]));
    }
  }
  const bool changes = options.changes_logits() || hook.fn != nullptr;
  const bool logprobs = options.logprobs >= 0;
  if (logprobs) log_probabilities(options.logprobs, logits, out);
  // The chosen token's own logit is asked for after the changes.
  if (logprobs && changes) std::copy(logits.begin(), logits.end(), original_.begin());

  for (const LogitBias& b : options.logit_bias) logits[static_cast<size_t>(b.token)] += b.bias;
  penalise(options, tokens, logits);
  if (hook.fn != nullptr) DSV3_TRY(hook.fn(hook.self, logits, tokens));

  size_t best = 0;
  if (changes) {
    for (size_t i = 0; i < logits.size(); ++i) {
      if (std::isnan(logits[i]) || logits[i] == std::numeric_limits<float>::infinity()) {
        return make_field_error(Code::kNumeric, hook.fn != nullptr ? "logits_hook" : "",
                                "the logit of token %zu at position %zu is %g after %s", i,
                                tokens.size(), static_cast<double>(logits[i]),
                                hook.fn != nullptr ? "the logits hook" : "bias and penalties");
      }
    }
  }
  for (size_t i = 1; i < logits.size(); ++i) {
    if (logits[i] > logits[best]) best = i;  // ties: the lower id
  }
  if (std::isinf(logits[best])) {
    return make_field_error(Code::kInvalidArgument,
                            hook.fn != nullptr ? "logits_hook" : "logit_bias",
                            "every token is forbidden at position %zu", tokens.size());
  }
  out->id = options.temperature > 0 ? draw(options, tokens.size(), logits, logits[best])
                                    : static_cast<int32_t>(best);
  if (logprobs) {
    const auto id = static_cast<size_t>(out->id);
    out->logprob = log_softmax_(changes ? original_[id] : logits[id]);
  }
  return {};
}

}  // namespace dsv3
