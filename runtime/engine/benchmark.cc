#include "runtime/engine/benchmark.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "runtime/base/os.h"
#include "runtime/cache/page_pool.h"
#include "runtime/cache/page_table.h"
#include "runtime/forward/activations.h"
#include "runtime/forward/model.h"

namespace dsv3 {
namespace {

constexpr int32_t kChunk = 512;  // rows of a prefill step
constexpr int32_t kMaxBatch = 64;

double matrix_bytes(const MatrixView& m) {
  return static_cast<double>(m.bytes) + static_cast<double>(m.scale_count() * sizeof(float));
}
double matrix_weights(const MatrixView& m) { return static_cast<double>(m.n) * m.k; }

double ffn_sum(const FfnView& f, double (*of)(const MatrixView&)) {
  return of(f.gate) + of(f.up) + of(f.down);
}

// What one step reads and multiplies, in bytes or in weights.
struct Work {
  double every_row = 0;  // of all layers but routed experts; the head is apart
  double head = 0;
  double expert = 0;  // of one routed expert
};

Work work_of(const ModelWeights& w, double (*of)(const MatrixView&)) {
  Work work;
  for (const LayerWeights& layer : w.layers) {
    work.every_row += of(layer.q_a) + of(layer.q_b) + of(layer.kv_a) + of(layer.o);
    for (const MatrixView& m : layer.w_uk) work.every_row += of(m);
    for (const MatrixView& m : layer.w_uv) work.every_row += of(m);
    if (!layer.moe) {
      work.every_row += ffn_sum(layer.dense, of);
      continue;
    }
    work.every_row += of(layer.router) + ffn_sum(layer.shared, of);
    work.expert = ffn_sum(layer.experts.experts[0], of);
  }
  work.head = of(w.head);
  return work;
}

class Runner {
 public:
  Runner(std::shared_ptr<const Model> model, const BenchmarkOptions& options)
      : model_(std::move(model)),
        options_(options),
        bytes_(work_of(model_->weights(), matrix_bytes)),
        weights_(work_of(model_->weights(), matrix_weights)) {}

  Status start(BenchmarkResult* result) {
    DSV3_ASSIGN(device_, kernels::make_device({options_.kernels, options_.threads, false}));
    result->kernels = device_->name();
    result->threads = device_->threads();
    result->limits = kernels::measure_machine(device_.get());
    if (options_.profile) profiler_.emplace(device_.get());
    kernels::Device* device = profiler_ ? &*profiler_ : device_.get();
    DSV3_ASSIGN(forward_, ForwardModel::create(model_, device, kChunk, kMaxBatch));
    logits_.resize(static_cast<size_t>(kMaxBatch) *
                   static_cast<size_t>(model_->config().vocab_size));
    return {};
  }

  // The limits once more: a machine that others use gives now more, now less, and what it can do is
  // the larger. Percentages stand beside that.
  void finish(BenchmarkResult* result) {
    const kernels::MachineLimits before = result->limits;
    const kernels::MachineLimits after = kernels::measure_machine(device_.get());
    const auto drift = [](double a, double b) { return std::abs(a - b) / std::max({a, b, 1.0}); };
    result->limits_drift =
        std::max(drift(before.read_bytes_per_second, after.read_bytes_per_second),
                 drift(before.dot_flops_per_second, after.dot_flops_per_second));
    result->limits = kernels::greater(before, after);
    for (BenchmarkLine& line : result->lines) bound(result->limits, &line);
  }

  // Rows at the end of `batch` sequences of `context` zeroed latents each, in one step, with
  // logits.
  Result<BenchmarkLine> decode(int32_t batch, int64_t context) {
    BenchmarkLine line;
    line.name = "decode";
    line.batch = batch;
    line.context = context;
    line.tokens = batch;
    PagePool pool(device_.get(), forward_->page_bytes(), batch * (context / 64 + 2));
    std::vector<PageTable> tables;
    tables.reserve(static_cast<size_t>(batch));
    for (int32_t i = 0; i < batch; ++i) {
      tables.emplace_back(&pool);
      DSV3_TRY(tables.back().make_writable(0, context + 1));
    }
    const auto step = [&]() -> Status {
      std::vector<kernels::SequenceRows> sequences;
      for (int32_t i = 0; i < batch; ++i) {
        sequences.push_back({i, 1, context, tables[static_cast<size_t>(i)].data()});
      }
      return run_step(batch, sequences, batch);
    };
    DSV3_TRY(measure(step, &line));
    return line;
  }

  // One prompt from nothing, in chunks, with the last row's logits.
  Result<BenchmarkLine> prefill(int32_t tokens) {
    BenchmarkLine line;
    line.name = "prefill";
    line.tokens = tokens;
    PagePool pool(device_.get(), forward_->page_bytes(), tokens / 64 + 2);
    const auto prompt = [&]() -> Status {
      PageTable table(&pool);
      DSV3_TRY(table.make_writable(0, tokens));
      for (int32_t begin = 0; begin < tokens; begin += kChunk) {
        const int32_t rows = std::min(kChunk, tokens - begin);
        const kernels::SequenceRows sequence{0, rows, begin, table.data()};
        DSV3_TRY(run_step(rows, {&sequence, 1}, begin + rows == tokens ? 1 : 0));
      }
      return {};
    };
    DSV3_TRY(measure(prompt, &line));
    return line;
  }

 private:
  // Runs a step over random tokens and counts what it had to read and multiply.
  Status run_step(int32_t rows, std::span<const kernels::SequenceRows> sequences,
                  int32_t head_rows) {
    const ModelConfig& c = model_->config();
    tokens_.resize(static_cast<size_t>(rows));
    for (int32_t& token : tokens_) {
      random_ = random_ * 6364136223846793005u + 1442695040888963407u;
      token = static_cast<int32_t>((random_ >> 33) % static_cast<uint64_t>(c.vocab_size));
    }
    load_before_ = forward_->expert_load();
    Step step;
    step.tokens = tokens_;
    step.sequences = sequences;
    DSV3_TRY(forward_->run(step));
    if (head_rows > 0) {
      std::vector<int32_t> which(static_cast<size_t>(head_rows));
      std::iota(which.begin(), which.end(), rows - head_rows);
      DSV3_TRY(forward_->head(which, logits_.data()));
    }
    const std::vector<uint64_t>& load = forward_->expert_load();
    double distinct = 0, chosen = 0;
    for (size_t i = 0; i < load.size(); ++i) {
      distinct += load[i] > load_before_[i] ? 1 : 0;
      chosen += static_cast<double>(load[i] - load_before_[i]);
    }
    step_bytes_ += bytes_.every_row + distinct * bytes_.expert + (head_rows > 0 ? bytes_.head : 0);
    step_flops_ +=
        2 * (rows * weights_.every_row + chosen * weights_.expert + head_rows * weights_.head);
    // Attention in latent space: scores and sums over the latents, for every head.
    const double key_flops =
        2.0 * static_cast<double>(c.num_attention_heads * (c.latent_dim() + c.kv_lora_rank));
    const double latent_bytes =
        static_cast<double>(device_->latent_page_bytes(mla_shape(c))) / kernels::kLatentPageTokens;
    const auto layers = static_cast<double>(c.num_hidden_layers);
    for (const kernels::SequenceRows& s : sequences) {
      const auto first = static_cast<double>(s.first_position);
      attention_flops_ += layers * key_flops * s.rows * (first + (s.rows + 1) / 2.0);
      step_bytes_ += layers * latent_bytes * (first + s.rows);
    }
    return {};
  }

  template <class Body>
  Status measure(const Body& body, BenchmarkLine* line) {
    DSV3_TRY(body());  // warm: pages, caches, threads
    struct Repeat {
      double seconds, bytes, weight_flops, attention_flops;
    };
    std::vector<Repeat> repeats;
    for (int32_t i = 0; i < options_.repeats; ++i) {
      step_bytes_ = step_flops_ = attention_flops_ = 0;
      // A step of a small model is shorter than the clock is worth: several make one repeat.
      int32_t times = 0;
      const int64_t begin = monotonic_ns();
      int64_t now = begin;
      do {
        DSV3_TRY(body());
        ++times;
        now = monotonic_ns();
      } while (now - begin < 20'000'000);
      repeats.push_back({static_cast<double>(now - begin) * 1e-9 / times, step_bytes_ / times,
                         step_flops_ / times, attention_flops_ / times});
    }
    std::sort(repeats.begin(), repeats.end(),
              [](const Repeat& a, const Repeat& b) { return a.seconds < b.seconds; });
    const Repeat& median = repeats[repeats.size() / 2];
    line->seconds = median.seconds;
    line->bytes = median.bytes;
    line->weight_flops = median.weight_flops;
    line->attention_flops = median.attention_flops;
    line->fastest = repeats.front().seconds;
    line->slowest = repeats.back().seconds;
    if (!profiler_) return {};
    profiler_->clear();
    const int64_t begin = monotonic_ns();
    DSV3_TRY(body());
    line->profile_seconds = static_cast<double>(monotonic_ns() - begin) * 1e-9;
    line->profile = profiler_->profile();
    return {};
  }

  static void bound(const kernels::MachineLimits& limits, BenchmarkLine* line) {
    const double reading = line->bytes / limits.read_bytes_per_second;
    const double computing =
        (line->weight_flops + line->attention_flops) / limits.dot_flops_per_second;
    line->bound = reading > computing ? "bandwidth" : "compute";
    line->bound_seconds = std::max(reading, computing);
  }

  std::shared_ptr<const Model> model_;
  const BenchmarkOptions& options_;
  const Work bytes_, weights_;
  std::unique_ptr<kernels::Device> device_;
  std::optional<kernels::ProfilingDevice> profiler_;
  std::unique_ptr<ForwardModel> forward_;
  std::vector<int32_t> tokens_;
  std::vector<uint64_t> load_before_;
  std::vector<float> logits_;
  uint64_t random_ = 1;
  double step_bytes_ = 0, step_flops_ = 0, attention_flops_ = 0;
};

}  // namespace

Result<BenchmarkResult> run_benchmark(const std::shared_ptr<const Model>& model,
                                      const BenchmarkOptions& options) {
  BenchmarkResult result;
  const int64_t longest = model->config().max_position_embeddings;
  Runner runner(model, options);
  DSV3_TRY(runner.start(&result));
  const auto total =
      static_cast<int>(options.batches.size() + options.contexts.size() + options.prefills.size());
  int done = 0;
  const auto go_on = [&]() -> Status {
    if (options.progress && !options.progress(done++, total)) {
      return Status(Code::kCancelled, "the benchmark was cancelled");
    }
    return {};
  };
  for (const int32_t batch : options.batches) {
    DSV3_TRY(go_on());
    DSV3_ASSIGN(BenchmarkLine line, runner.decode(std::clamp(batch, 1, kMaxBatch), 0));
    result.lines.push_back(line);
  }
  for (const int64_t context : options.contexts) {
    DSV3_TRY(go_on());
    if (context >= longest) continue;
    DSV3_ASSIGN(BenchmarkLine line, runner.decode(1, context));
    result.lines.push_back(line);
  }
  for (const int32_t tokens : options.prefills) {
    DSV3_TRY(go_on());
    if (tokens > longest) continue;
    DSV3_ASSIGN(BenchmarkLine line, runner.prefill(tokens));
    result.lines.push_back(line);
  }
  runner.finish(&result);
  result.resident_bytes = resident_anonymous_bytes();
  return result;
}

}  // namespace dsv3
