#include "runtime/forward/lanes.h"

#include <algorithm>
#include <bit>
#include <new>

namespace dsv3 {
namespace {

// Weights of all layers at most: a few caches full. Above, lanes that read them once more each
// would have to get them from memory.
constexpr double kMostWeights = 64 << 20;
// How much longer than the mean the longest lane may be.
constexpr double kUneven = 1.25;
// Ways that take about the same do not change places all the time.
constexpr double kPreference = 1.03;

// Weights of one layer's attention, and of its feed-forward networks.
double attention_weights(const ModelConfig& c) {
  const auto hidden = static_cast<double>(c.hidden_size);
  const auto rank = static_cast<double>(c.q_lora_rank);
  const auto heads = static_cast<double>(c.num_attention_heads);
  const double q = heads * static_cast<double>(c.qk_head_dim());
  return (rank > 0 ? rank * (hidden + q) : hidden * q) +
         hidden * (static_cast<double>(c.latent_dim()) + heads * static_cast<double>(c.v_head_dim));
}

double expert_weights(const ModelConfig& c, int64_t experts) {
  const double width = static_cast<double>(experts) * static_cast<double>(c.moe_intermediate_size) +
                       static_cast<double>(c.shared_width());
  return 3 * static_cast<double>(c.hidden_size) * width;
}

bool suits(const ModelConfig& c, int threads) {
  const int64_t dense_layers = std::min(c.first_k_dense_replace, c.num_hidden_layers);
  const auto dense = static_cast<double>(dense_layers);
  const auto moe = static_cast<double>(c.num_hidden_layers - dense_layers);
  const double dense_ffn =
      3 * static_cast<double>(c.hidden_size) * static_cast<double>(c.intermediate_size);
  const double weights = (dense + moe) * attention_weights(c) + dense * dense_ffn +
                         moe * expert_weights(c, c.n_routed_experts);
  return threads > 1 && weights <= kMostWeights;
}

}  // namespace

FasterWay::Times& FasterWay::times_of(int32_t rows) {
  const auto log = static_cast<size_t>(std::bit_width(static_cast<uint32_t>(rows)));
  return times_[std::min(log, times_.size() - 1)];
}

int FasterWay::choose(int32_t rows) {
  Times& t = times_of(rows);
  for (const int way : {kSecond, kFirst}) {
    if (t.ns_per_row[static_cast<size_t>(way)] == 0) return way;
  }
  t.faster = t.ns_per_row[kSecond] * kPreference < t.ns_per_row[kFirst] ? kSecond : kFirst;
  t.choices = (t.choices + 1) % kLookEvery;
  return t.choices == 0 ? 1 - t.faster : t.faster;
}

void FasterWay::record(int32_t rows, int way, int64_t ns) {
  Times& t = times_of(rows);
  double& known = t.ns_per_row[static_cast<size_t>(way)];
  const double now = std::max(1.0, static_cast<double>(ns) / rows);
  // What took far longer was disturbed. The way that is seldom taken has few chances to tell.
  known = known == 0 ? now : known + (std::min(now, 2 * known) - known) / (way == t.faster ? 8 : 2);
}

Status Lanes::create(kernels::Device* device, const ModelConfig& config, int32_t max_rows) try {
  if (!suits(config, device->threads())) return {};
  device_ = device;
  config_ = &config;
  row_work_ = attention_weights(config) + expert_weights(config, config.num_experts_per_tok);
  most_rows_ = std::min<int64_t>(kRows, max_rows / (device->threads() * config.num_hidden_layers));
  std::vector<Lane> lanes(static_cast<size_t>(std::min(device->threads(), max_rows)));
  for (Lane& lane : lanes) {
    DSV3_ASSIGN(lane.device, device->make_lane());
    if (lane.device == nullptr) return {};
    DSV3_TRY(lane.device->reserve(device_limits(config, kRows)));
    lane.plan.reserve(kRows, static_cast<int32_t>(config.num_experts_per_tok),
                      static_cast<int32_t>(config.n_routed_experts));
    lane.sequences.reserve(kRows);
    lane.load.resize(static_cast<size_t>(config.cache_layers() * config.n_routed_experts));
  }
  lanes_ = std::move(lanes);
  return {};
} catch (const std::bad_alloc&) {
  return make_memory_error("no memory for %d lanes of %d rows", device->threads(), kRows);
}

uint64_t Lanes::bytes(const kernels::Device& device, const ModelConfig& config, int threads) {
  if (!suits(config, threads)) return 0;
  return static_cast<uint64_t>(threads) * device.scratch_bytes(device_limits(config, kRows), 1);
}

void Lanes::add(Lane* lane, const kernels::SequenceRows& sequence, int32_t first_row) {
  lane->sequences.push_back(sequence);
  lane->sequences.back().row_begin -= first_row;
  lane->rows += sequence.rows;
}

bool Lanes::cut(const Step& step, const Activations& a) {
  const size_t count = std::min(lanes_.size(), step.sequences.size());
  if (count == 0 || step.first_layer > 0) return false;
  if (device_->threads_in_use() < device_->threads()) return false;

  const kernels::MlaShape shape = mla_shape(*config_);
  const auto work = [&](const kernels::SequenceRows& s) {
    return s.rows * row_work_ + kernels::attention_work(shape, s, /*expanded=*/false);
  };
  double total = 0;
  for (const kernels::SequenceRows& s : step.sequences) {
    if (s.rows > kSequenceRows) return false;
    total += work(s);
  }
  in_use_ = count;
  const double mean = total / static_cast<double>(count);
  auto sequence = step.sequences.begin();
  int32_t first_row = 0;
  double before = 0;  // work of the lanes that are full
  for (size_t i = 0; i < count; ++i) {
    Lane& lane = lanes_[i];
    lane.rows = 0;
    lane.sequences.clear();
    const double begin = before;
    const double end = mean * static_cast<double>(i + 1);
    const auto left = static_cast<std::ptrdiff_t>(count - i - 1);  // lanes that want one, too
    while (step.sequences.end() - sequence > left && lane.rows + sequence->rows <= most_rows_ &&
           (lane.rows == 0 || i + 1 == count || before + work(*sequence) / 2 < end)) {
      before += work(*sequence);
      add(&lane, *sequence++, first_row);
    }
    if (before - begin > kUneven * mean) return false;
    lane.a.view(a, *config_, first_row);
    first_row += lane.rows;
  }
  return sequence == step.sequences.end();
}

}  // namespace dsv3
