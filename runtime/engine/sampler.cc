#include "runtime/engine/sampler.h"

#include <algorithm>
#include <cmath>
#include <functional>

#include "runtime/base/checked.h"
#include "runtime/engine/random.h"

namespace dsv3 {
namespace {

constexpr auto kBlock = static_cast<size_t>(kernels::kWeighBlock);
// A block's sum may be rounded to less than one of its weights.
constexpr double kRounding = 0.999;

Status bad_field(const char* field, float value, const char* expected) {
  return make_field_error(Code::kInvalidArgument, field, "%s is %g, expected %s", field,
                          static_cast<double>(value), expected);
}
Status bad_field(const char* field, int32_t value, const char* expected) {
  return make_field_error(Code::kInvalidArgument, field, "%s is %d, expected %s", field, value,
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

LogSoftmax::LogSoftmax(const kernels::RowStats& row)
    : max_(static_cast<double>(row.max)), log_sum_(std::log(row.sum_exp)) {}

Sampler::Sampler(kernels::Device* device, int64_t vocab_size)
    : device_(device),
      counts_(static_cast<size_t>(vocab_size)),
      ids_(static_cast<size_t>(vocab_size)),
      weights_(static_cast<size_t>(vocab_size)),
      sums_(ceil_div(static_cast<size_t>(vocab_size), kBlock)),
      greatest_(sums_.size()),
      original_(static_cast<size_t>(vocab_size)) {}

void Sampler::best_tokens(int32_t count, std::span<const float> logits, SampledToken* out) {
  const Better better{logits};
  const auto n = std::min(static_cast<size_t>(count), logits.size());
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
  for (size_t i = 0; i < n; ++i)
    out->top.push_back({ids_[i], logits[static_cast<size_t>(ids_[i])]});
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

size_t Sampler::at_least(float weight) {
  size_t count = 0;
  for (size_t block = 0; block < sums_.size(); ++block) {
    if (sums_[block] < static_cast<double>(weight) * kRounding || sums_[block] == 0) continue;
    const size_t end = std::min((block + 1) * kBlock, weights_.size());
    for (size_t i = block * kBlock; i < end; ++i) {
      if (weights_[i] >= weight && weights_[i] > 0) ids_[count++] = static_cast<int32_t>(i);
    }
  }
  return count;
}

// Where `count` blocks have a token of at least some logit, so many tokens have.
size_t Sampler::may_be_top(size_t count, std::span<const float> logits) {
  float bound = std::numeric_limits<float>::lowest();  // forbidden tokens are never drawn
  if (count <= greatest_.size()) {
    for (size_t block = 0; block < greatest_.size(); ++block) {
      const auto begin = logits.begin() + static_cast<std::ptrdiff_t>(block * kBlock);
      const size_t length = std::min(kBlock, logits.size() - block * kBlock);
      greatest_[block] = *std::max_element(begin, begin + static_cast<std::ptrdiff_t>(length));
    }
    const auto nth = greatest_.begin() + static_cast<std::ptrdiff_t>(count - 1);
    std::nth_element(greatest_.begin(), nth, greatest_.end(), std::greater<>());
    bound = std::max(bound, *nth);
  }
  size_t found = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (logits[i] >= bound) ids_[found++] = static_cast<int32_t>(i);
  }
  return found;
}

size_t Sampler::keep_top_k(size_t count, size_t top_k, std::span<const float> logits) {
  const auto at = [&](size_t i) { return ids_.begin() + static_cast<std::ptrdiff_t>(i); };
  const size_t kept = std::min(count, top_k);
  const Better better{logits};
  if (kept < count) std::nth_element(at(0), at(kept), at(count), better);
  std::sort(at(0), at(kept), better);
  return kept;
}

// The smallest set of best tokens that reaches `wanted`. Sorting 129,280 logits costs 10 ms; a heap
// gives only as many as are needed.
size_t Sampler::keep_top_p(size_t count, double wanted, bool sorted,
                           std::span<const float> logits) {
  const auto at = [&](size_t i) { return ids_.begin() + static_cast<std::ptrdiff_t>(i); };
  const Better better{logits};
  const auto worse = [&](int32_t a, int32_t b) { return better(b, a); };
  if (!sorted) std::make_heap(at(0), at(count), worse);
  double reached = 0;
  size_t kept = 0;
  while (kept < count && (kept == 0 || reached < wanted)) {
    if (!sorted) std::pop_heap(at(0), at(count - kept), worse);
    reached += weight(sorted ? ids_[kept] : ids_[count - 1 - kept]);
    ++kept;
  }
  if (!sorted) std::reverse(at(0), at(count));  // the popped ones stand at the end, worst first
  return kept;
}

int32_t Sampler::draw_any(double uniform, double total) const {
  const double target = uniform * total;
  double reached = 0;
  size_t block = 0, possible = 0;  // rounding may leave a sum below the target: the last possible
  for (size_t i = 0; i < sums_.size(); ++i) {
    if (sums_[i] == 0) continue;
    block = i;
    if (reached + sums_[i] > target) break;
    if (i + 1 < sums_.size()) reached += sums_[i];
  }
  const size_t end = std::min((block + 1) * kBlock, weights_.size());
  for (size_t i = block * kBlock; i < end; ++i) {
    if (weights_[i] == 0) continue;
    possible = i;
    reached += static_cast<double>(weights_[i]);
    if (reached > target) break;
  }
  return static_cast<int32_t>(possible);
}

int32_t Sampler::draw_kept(double uniform, size_t count) const {
  double total = 0;
  for (size_t i = 0; i < count; ++i) total += weight(ids_[i]);
  const double target = uniform * total;
  double reached = 0;
  size_t possible = 0;
  for (size_t i = 0; i < count; ++i) {
    if (weight(ids_[i]) == 0) continue;
    possible = i;
    reached += weight(ids_[i]);
    if (reached > target) break;
  }
  return ids_[possible];
}

int32_t Sampler::draw(const SamplingOptions& o, uint64_t position, std::span<const float> logits,
                      float max) {
  const float scale = std::min(1 / o.temperature, std::numeric_limits<float>::max());
  device_->weigh(logits, max, scale, weights_.data(), sums_.data());
  const double uniform = position_uniform(o.seed, position);
  const bool top_k = o.top_k > 0 && static_cast<size_t>(o.top_k) < logits.size();
  double total = 0;
  for (const double sum : sums_) total += sum;
  if (!top_k && o.top_p >= 1 && o.min_p == 0) return draw_any(uniform, total);

  size_t count = 0;
  if (top_k) {
    const auto most = static_cast<size_t>(o.top_k);
    count = keep_top_k(may_be_top(most, logits), most, logits);
    total = 0;
    for (size_t i = 0; i < count; ++i) total += weight(ids_[i]);
  } else if (o.top_p < 1) {
    // All tokens of less than this together are less than half of what top_p leaves out.
    const double rest = (1 - static_cast<double>(o.top_p)) * total;
    count = at_least(static_cast<float>(rest / 2 / static_cast<double>(logits.size())));
  } else {
    count = at_least(o.min_p);
  }
  if (o.top_p < 1) count = keep_top_p(count, static_cast<double>(o.top_p) * total, top_k, logits);
  if (o.min_p > 0) {
    const auto begin = ids_.begin(), end = begin + static_cast<std::ptrdiff_t>(count);
    const auto unlikely = [&](int32_t id) { return weight(id) < static_cast<double>(o.min_p); };
    count = static_cast<size_t>(std::remove_if(begin, end, unlikely) - begin);
  }
  return draw_kept(uniform, count);
}

Status Sampler::best_changed(std::span<const float> logits, size_t position, const LogitsHook& hook,
                             Best* out) {
  *out = {0, logits[0]};
  for (size_t i = 0; i < logits.size(); ++i) {
    const float x = logits[i];
    if (!(x < std::numeric_limits<float>::infinity())) {  // NaN too
      return make_field_error(Code::kNumeric, hook.fn != nullptr ? "logits_hook" : "",
                              "the logit of token %zu at position %zu is %g after %s", i, position,
                              static_cast<double>(x),
                              hook.fn != nullptr ? "the logits hook" : "bias and penalties");
    }
    if (x > out->logit) *out = {i, x};  // ties: the lower id
  }
  if (!std::isinf(out->logit)) return {};
  return make_field_error(Code::kInvalidArgument, hook.fn != nullptr ? "logits_hook" : "logit_bias",
                          "every token is forbidden at position %zu", position);
}

Status Sampler::sample(const SamplingOptions& options, std::span<const int32_t> tokens,
                       std::span<float> logits, const kernels::RowStats& row,
                       const LogitsHook& hook, SampledToken* out) {
  out->id = -1;
  out->logprob = std::numeric_limits<float>::quiet_NaN();
  out->top.clear();
  if (!row.finite) {
    const auto bad =
        std::find_if(logits.begin(), logits.end(), [](float x) { return !std::isfinite(x); });
    return make_error(Code::kNumeric, "the logit of token %zu at position %zu is %g",
                      static_cast<size_t>(bad - logits.begin()), tokens.size(),
                      static_cast<double>(*bad));
  }
  const bool changes = options.changes_logits() || hook.fn != nullptr;
  const bool logprobs = options.logprobs >= 0;
  const LogSoftmax log_softmax(row);
  if (logprobs) {
    best_tokens(options.logprobs, logits, out);
    for (TopToken& token : out->top) token.logprob = log_softmax(token.logprob);
    // The chosen token's own logit is asked for after the changes.
    if (changes) std::copy(logits.begin(), logits.end(), original_.begin());
  }

  Best best = {static_cast<size_t>(row.argmax), row.max};
  if (changes) {
    for (const LogitBias& b : options.logit_bias) logits[static_cast<size_t>(b.token)] += b.bias;
    penalise(options, tokens, logits);
    if (hook.fn != nullptr) DSV3_TRY(hook.fn(hook.self, logits, tokens));
    DSV3_TRY(best_changed(logits, tokens.size(), hook, &best));
  }
  out->id = options.temperature > 0 ? draw(options, tokens.size(), logits, best.logit)
                                    : static_cast<int32_t>(best.id);
  if (logprobs) {
    const auto id = static_cast<size_t>(out->id);
    out->logprob = log_softmax(changes ? original_[id] : logits[id]);
  }
  return {};
}

}  // namespace dsv3
