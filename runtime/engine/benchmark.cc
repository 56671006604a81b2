#include "runtime/engine/benchmark.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "runtime/base/checked.h"
#include "runtime/base/os.h"
#include "runtime/cache/page_pool.h"
#include "runtime/cache/page_table.h"
#include "runtime/engine/benchmark_plan.h"
#include "runtime/forward/activations.h"
#include "runtime/forward/model.h"

namespace dsv3 {
namespace {

constexpr int32_t kChunk = 2048;  // rows of a prefill step

double matrix_bytes(const MatrixView& m) {
  return static_cast<double>(m.bytes) + static_cast<double>(m.scale_count() * sizeof(float));
}
double matrix_weights(const MatrixView& m) { return static_cast<double>(m.n) * m.k; }
double four_bit_weights(const MatrixView& m) {
  return m.dtype == kernels::DType::kMXFP4 ? matrix_weights(m) : 0;
}

double ffn_sum(const FfnView& f, double (*of)(const MatrixView&)) {
  return of(f.gate) + of(f.up) + of(f.down);
}

// Or the same in weights.
StepBytes work_of(const ModelWeights& w, double (*of)(const MatrixView&)) {
  StepBytes work;
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
        weights_(work_of(model_->weights(), matrix_weights)),
        four_bit_(work_of(model_->weights(), four_bit_weights)) {}

  Status start(int32_t threads) {
    DSV3_ASSIGN(device_, kernels::make_device({options_.kernels, threads, options_.pin_threads}));
    if (options_.profile) profiler_.emplace(device_.get());
    kernels::Device* device = profiler_ ? &*profiler_ : device_.get();
    DSV3_ASSIGN(forward_, ForwardModel::create(model_, device, kChunk, kMaxBenchmarkBatch,
                                               options_.invariance));
    return {};
  }

  bool started() const { return forward_ != nullptr; }
  const kernels::MachineLimits& limits() const { return limits_; }
  void release_probe() { probe_.reset(); }
  const kernels::Device& device() const { return *device_; }

  // Not before the first token: reading the weights would meet its page faults.
  Status measure_limits() {
    std::span<const uint8_t> weights = model_->weight_memory();
    if (weights.size() > total_memory()) weights = {};
    DSV3_ASSIGN(probe_, kernels::MachineProbe::create(device_.get(), weights));
    limits_ = probe_->measure();
    return {};
  }

  // Of all pages that the line needs.
  uint64_t latent_bytes(const PlannedLine& line) const {
    return static_cast<uint64_t>(pages_of(line.context + line.tokens / line.batch) * line.batch) *
           forward_->page_bytes();
  }

  // Appends what it measured: one line, or two in turns.
  Status measure_line(const PlannedLine& line, std::vector<BenchmarkLine>* out) {
    switch (line.kind) {
      case PlannedLine::Kind::kDecode:
        return decode(line.batch, line.context, out);
      case PlannedLine::Kind::kPrefill:
        return prefill(line.tokens, line.context, line.invariance, out);
      case PlannedLine::Kind::kFirstToken:
        break;
    }
    return first_token(out);
  }

 private:
  static int64_t pages_of(int64_t tokens) {
    return ceil_div<int64_t>(tokens, kernels::kLatentPageTokens);
  }

  // The first step after opening: what it costs more than a later one is mostly page faults of
  // mapped weights.
  Status first_token(std::vector<BenchmarkLine>* out) {
    BenchmarkLine line = new_line("first token", 1);
    PagePool pool(device_.get(), forward_->page_bytes(), 2);
    PageTable table(&pool);
    DSV3_TRY(table.make_writable(0, 1));
    const kernels::SequenceRows sequence{0, 1, 0, table.data()};
    work_.clear();
    const uint64_t faults = page_faults();
    const int64_t begin = monotonic_ns();
    DSV3_TRY(run_step(1, {&sequence, 1}, 1));
    const double seconds = static_cast<double>(monotonic_ns() - begin) * 1e-9;
    line.page_faults = page_faults() - faults;
    DSV3_TRY(measure_limits());
    std::vector<Repeat> one = {{seconds, work_, probe_limits(), 1}};
    take_medians(one, &line);
    out->push_back(std::move(line));
    return {};
  }

  // Rows at the end of `batch` sequences of `context` zeroed latents each, in pages of their own,
  // in one step, with logits. Computing the contexts would take minutes and give the same times.
  Status decode(int32_t batch, int64_t context, std::vector<BenchmarkLine>* out) {
    BenchmarkLine line = new_line("decode", batch);
    line.batch = batch;
    line.context = context;
    PagePool pool(device_.get(), forward_->page_bytes(), batch * pages_of(context + 1));
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
    return measure([&](const BenchmarkLine&) { return step(); }, {&line, 1}, out);
  }

  // One prompt after `context` zeroed latents, in chunks, with the last row's logits; with
  // `invariance` in turns as it is and with keys and values expanded.
  Status prefill(int32_t tokens, int64_t context, bool invariance,
                 std::vector<BenchmarkLine>* out) {
    BenchmarkLine lines[2] = {new_line("prefill", tokens), new_line("prefill", tokens)};
    for (BenchmarkLine& line : lines) line.context = context;
    lines[1].expanded = true;
    PagePool pool(device_.get(), forward_->page_bytes(), pages_of(context + tokens));
    const auto prompt = [&](const BenchmarkLine& line) -> Status {
      PageTable table(&pool);
      DSV3_TRY(table.make_writable(0, context + tokens));
      for (int32_t begin = 0; begin < tokens; begin += kChunk) {
        const int32_t rows = std::min(kChunk, tokens - begin);
        const kernels::SequenceRows sequence{0, rows, context + begin, table.data(), line.expanded};
        DSV3_TRY(run_step(rows, {&sequence, 1}, begin + rows == tokens ? 1 : 0));
      }
      return {};
    };
    return measure(prompt, std::span(lines).first(invariance ? 2 : 1), out);
  }

  struct Limits {
    double read, dot, four_bit;  // bytes and operations per second
  };
  // What steps had to do: by kind of operation, and experts by how many rows one had, for with few
  // rows they wait for memory and with many for arithmetic.
  struct Work {
    struct Part {
      double bytes = 0, flops = 0;
      double four_bit = 0;  // of the flops: those of four-bit weights
      double computing(const Limits& limits) const {
        return (flops - four_bit) / limits.dot + four_bit / limits.four_bit;
      }
    };
    enum : size_t { kAttention, kDense, kHead, kExperts };  // kExperts + rows - 1
    std::vector<Part> parts;

    void clear() { parts.clear(); }
    void add(size_t part, double bytes, double flops, double four_bit = 0) {
      if (parts.size() <= part) parts.resize(part + 1);
      parts[part].bytes += bytes;
      parts[part].flops += flops;
      parts[part].four_bit += four_bit;
    }
    double bytes() const {
      double sum = 0;
      for (const Part& p : parts) sum += p.bytes;
      return sum;
    }
    double flops() const {
      double sum = 0;
      for (const Part& p : parts) sum += p.flops;
      return sum;
    }
  };
  struct Repeat {
    double seconds;
    Work work;
    Limits limits;  // of the moments before and after
    int32_t times;  // that the work was done in those seconds
    double once() const { return seconds / times; }
    double reading() const { return work.bytes() / limits.read; }
    double computing() const {
      double sum = 0;
      for (const Work::Part& p : work.parts) sum += p.computing(limits);
      return sum;
    }
    double by_operation() const {
      double sum = 0;
      for (const Work::Part& p : work.parts) {
        sum += std::max(p.bytes / limits.read, p.computing(limits));
      }
      return sum;
    }
  };

  // What multiplies four-bit weights is as many times as fast as before.
  Limits probe_limits() {
    const double read = probe_->read_pass(), dot = probe_->dot_pass();
    return {read, dot, dot * limits_.int8_ops_per_second / limits_.dot_flops_per_second};
  }

  // A machine that others use may halve its speed for a second and give it back: the percentage is
  // the median of the repeats', each beside the limits of its own moment.
  static void take_medians(std::vector<Repeat> repeats, BenchmarkLine* line) {
    const auto median_of = [&](auto value) {
      std::vector<double> values;
      for (const Repeat& r : repeats) values.push_back(value(r));
      return kernels::median(std::move(values));
    };
    line->read_bytes_per_second = median_of([](const Repeat& r) { return r.limits.read; });
    line->dot_flops_per_second = median_of([](const Repeat& r) { return r.limits.dot; });
    std::sort(repeats.begin(), repeats.end(),
              [](const Repeat& a, const Repeat& b) { return a.once() < b.once(); });
    const Repeat& median = repeats[repeats.size() / 2];
    line->seconds = median.once();
    line->bytes = median.work.bytes() / median.times;
    const double attention = median.work.parts[Work::kAttention].flops;
    line->attention_flops = attention / median.times;
    line->weight_flops = (median.work.flops() - attention) / median.times;
    line->fastest = repeats.front().once();
    line->slowest = repeats.back().once();
    line->bound = median.reading() > median.computing() ? "bandwidth" : "compute";
    line->bound_seconds = line->seconds * median_of([](const Repeat& r) {
                            return std::max(r.reading(), r.computing()) / r.seconds;
                          });
    line->operations_seconds =
        line->seconds * median_of([](const Repeat& r) { return r.by_operation() / r.seconds; });
  }

  BenchmarkLine new_line(const char* name, int32_t tokens) const {
    BenchmarkLine line;
    line.name = name;
    line.threads = device_->threads();
    line.tokens = tokens;
    return line;
  }

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
    // A step of a long prompt takes seconds: a line is left between two layers.
    if (options_.cancel != nullptr) {
      step.should_stop = [](void* token) {
        return static_cast<CancelToken*>(token)->cancelled.load();
      };
      step.should_stop_user = options_.cancel.get();
    }
    DSV3_TRY(forward_->run(step));
    if (head_rows > 0) {
      std::vector<int32_t> which(static_cast<size_t>(head_rows));
      std::iota(which.begin(), which.end(), rows - head_rows);
      DSV3_TRY(forward_->compute_head(which));
    }
    work_.add(Work::kDense, bytes_.every_row, 2 * rows * weights_.every_row,
              2 * rows * four_bit_.every_row);
    if (head_rows > 0) work_.add(Work::kHead, bytes_.head, 2 * head_rows * weights_.head);
    const std::vector<uint64_t>& load = forward_->expert_load();
    for (size_t i = 0; i < load.size(); ++i) {
      const uint64_t chosen = load[i] - load_before_[i];
      if (chosen == 0) continue;
      work_.add(Work::kExperts + chosen - 1, bytes_.expert,
                2 * static_cast<double>(chosen) * weights_.expert,
                2 * static_cast<double>(chosen) * four_bit_.expert);
    }
    // Attention without W_UK and W_UV of every row, which are among the weights: for every head
    // scores and sums over latents or, expanded, over keys and values, and those of earlier
    // positions.
    const kernels::MlaShape shape = mla_shape(c);
    const double latent_bytes =
        static_cast<double>(device_->latent_page_bytes(shape)) / kernels::kLatentPageTokens;
    const auto layers = static_cast<double>(c.num_hidden_layers);
    for (const kernels::SequenceRows& s : sequences) {
      const double projections = double{1} * s.rows * shape.heads * shape.kv_lora_rank *
                                 (shape.qk_nope_head_dim + shape.v_head_dim);
      const double work = kernels::attention_work(shape, s, kernels::expands(shape, s));
      work_.add(Work::kAttention,
                layers * latent_bytes * (static_cast<double>(s.first_position) + s.rows),
                layers * 2 * (work - projections));
    }
    return {};
  }

  // A step of a small model is shorter than the clock is worth: several make one repeat. *before:
  // the limits measured last.
  template <class Body>
  Result<Repeat> repeat(const Body& body, const BenchmarkLine& line, Limits* before) {
    work_.clear();
    int32_t times = 0;
    const int64_t begin = monotonic_ns();
    int64_t now = begin;
    do {
      DSV3_TRY(body(line));
      ++times;
      now = monotonic_ns();
    } while (now - begin < 20'000'000);
    const Limits after = probe_limits();
    const Limits between = {(before->read + after.read) / 2, (before->dot + after.dot) / 2,
                            (before->four_bit + after.four_bit) / 2};
    *before = after;
    return Repeat{static_cast<double>(now - begin) * 1e-9, work_, between, times};
  }

  // Several lines take turns.
  template <class Body>
  Status measure(const Body& body, std::span<BenchmarkLine> lines,
                 std::vector<BenchmarkLine>* out) {
    for (const BenchmarkLine& line : lines) DSV3_TRY(body(line));  // warm: pages, caches, threads
    std::vector<std::vector<Repeat>> repeats(lines.size());
    Limits before = probe_limits();
    const int64_t enough = monotonic_ns() + static_cast<int64_t>(options_.least_seconds * 1e9);
    for (int32_t i = 0; i < options_.repeats || monotonic_ns() < enough; ++i) {
      for (size_t l = 0; l < lines.size(); ++l) {
        DSV3_ASSIGN(Repeat one, repeat(body, lines[l], &before));
        repeats[l].push_back(std::move(one));
      }
    }
    for (size_t l = 1; l < lines.size(); ++l) {
      std::vector<double> ratios;
      for (size_t i = 0; i < repeats[l].size(); ++i) {
        ratios.push_back(repeats[l - 1][i].once() / repeats[l][i].once());
      }
      lines[l].times_as_fast = kernels::median(std::move(ratios));
    }
    for (size_t l = 0; l < lines.size(); ++l) {
      take_medians(std::move(repeats[l]), &lines[l]);
      if (profiler_) DSV3_TRY(profile(body, &lines[l]));
      out->push_back(std::move(lines[l]));
    }
    return {};
  }

  template <class Body>
  Status profile(const Body& body, BenchmarkLine* line) {
    profiler_->clear();
    const int64_t begin = monotonic_ns();
    DSV3_TRY(body(*line));
    line->profile_seconds = static_cast<double>(monotonic_ns() - begin) * 1e-9;
    line->profile = profiler_->profile();
    return {};
  }

  std::shared_ptr<const Model> model_;
  const BenchmarkOptions& options_;
  const StepBytes bytes_, weights_, four_bit_;
  std::unique_ptr<kernels::Device> device_;
  std::unique_ptr<kernels::MachineProbe> probe_;
  kernels::MachineLimits limits_;
  std::optional<kernels::ProfilingDevice> profiler_;
  std::unique_ptr<ForwardModel> forward_;
  std::vector<int32_t> tokens_;
  std::vector<uint64_t> load_before_;
  uint64_t random_ = 1;
  Work work_;  // of the current repeat
};

}  // namespace

StepBytes step_bytes(const Model& model) { return work_of(model.weights(), matrix_bytes); }

Result<BenchmarkResult> run_benchmark(const std::shared_ptr<const Model>& model,
                                      const BenchmarkOptions& options) {
  BenchmarkResult result;
  Runner runner(model, options);
  DSV3_TRY(runner.start(options.threads));
  result.kernels = runner.device().name();
  result.threads = runner.device().threads();
  Runner one(model, options);
  DSV3_ASSIGN(const std::vector<PlannedLine> lines,
              plan_benchmark(options, model->config().max_position_embeddings,
                             options.scaling && result.threads > 1, &result.left_out));
  for (size_t i = 0; i < lines.size(); ++i) {
    if (options.progress &&
        !options.progress(static_cast<int>(i), static_cast<int>(lines.size()))) {
      return Status(Code::kCancelled, "the benchmark was cancelled");
    }
    const PlannedLine& line = lines[i];
    std::string reason = no_latent_room(line, runner.latent_bytes(line), options.latent_room);
    if (!reason.empty()) {
      result.left_out.push_back(line.without(std::move(reason)));
      continue;
    }
    if (line.one_thread && !one.started()) {
      DSV3_TRY(one.start(1));
      DSV3_TRY(one.measure_limits());
    }
    DSV3_TRY((line.one_thread ? one : runner).measure_line(line, &result.lines));
  }
  result.limits = runner.limits();
  for (const BenchmarkLine& line : result.lines) {
    if (line.threads != result.threads) continue;
    const auto drift = [](double a, double b) { return std::abs(a - b) / std::max({a, b, 1.0}); };
    result.limits_drift =
        std::max({result.limits_drift,
                  drift(line.read_bytes_per_second, result.limits.read_bytes_per_second),
                  drift(line.dot_flops_per_second, result.limits.dot_flops_per_second)});
  }
  runner.release_probe();
  one.release_probe();
  result.resident_bytes = resident_bytes();
  result.resident_anonymous_bytes = resident_anonymous_bytes();
  return result;
}

}  // namespace dsv3
