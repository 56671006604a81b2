// kernels_bench [--kernels SET] [--threads N] [--only TEXT] [--seconds S] [--clock wall|cpu]
//
// Measures this machine's limits as `dsv3 bench` does (kernels/machine.h) and then the
// operations of the table on the shapes of V2-Lite, V3 and the shipped model, in the same run, and
// prints each as a fraction of the limit that binds it. Weights of the linear and feed-forward
// cases rotate through far more memory than the caches hold, as they do when a model decodes.
// With --threads 1 --clock cpu times are CPU times, which other processes on the machine disturb
// less (through caches and memory they still do).
#include <time.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "kernels/machine.h"
#include "runtime/base/os.h"

namespace dsv3 {
namespace {

namespace k = kernels;

struct Options {
  std::string set;
  std::string only;
  int threads = 0;
  double seconds = 0.4;  // per case
};

bool use_cpu_clock = false;

double now() {
  if (!use_cpu_clock) return static_cast<double>(monotonic_ns()) * 1e-9;
  timespec t;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
  return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_nsec) * 1e-9;
}

// --- inputs

uint64_t random_state = 88172645463325252u;
uint64_t random_bits() {
  random_state ^= random_state << 13;
  random_state ^= random_state >> 7;
  random_state ^= random_state << 17;
  return random_state;
}

std::vector<float> random_floats(size_t n) {
  std::vector<float> v(n);
  for (float& f : v)
    f = static_cast<float>(static_cast<int64_t>(random_bits() >> 40)) * 0x1p-23f - 1;
  return v;
}

// A device's random weights: FP8 codes without NaN, or small BF16 values.
class Weights {
 public:
  Weights(k::Device* device, k::DType dtype, int32_t n, int32_t inner) : device_(device) {
    const bool mx = dtype == k::DType::kMXFP4;
    const auto layout = mx ? k::Layout::kTileMx : k::Layout::kTile16x2;
    const size_t bytes = k::matrix_bytes(dtype, layout, n, inner);
    data_ = device->alloc(bytes);
    if (!data_) std::abort();
    auto* p = reinterpret_cast<uint64_t*>(data_.get());
    const uint64_t mask = mx                           ? ~uint64_t{0}
                          : dtype == k::DType::kF8E4M3 ? 0xb7b7b7b7b7b7b7b7u
                                                       : 0xbf7fbf7fbf7fbf7fu;
    for (size_t i = 0; i < bytes / 8; ++i) p[i] = random_bits() & mask;
    if (mx) {  // scales of 2^-8: random ones would be subnormal numbers, which take their time
      for (int64_t row = 0; row < n; row += k::kTileN) {
        for (int64_t column = 0; column < inner; column += 4 * k::kMxBlock) {
          auto* at = reinterpret_cast<std::byte*>(data_.get());
          std::memset(at + k::mx_place(row, column, inner).scale, 119, 64);
        }
      }
    }
    const size_t scales = static_cast<size_t>((n + 127) / 128 * ((inner + 127) / 128));
    scales_ = device->alloc(scales * sizeof(float));
    for (size_t i = 0; i < scales; ++i) reinterpret_cast<float*>(scales_.get())[i] = 0.01f;
    m.dtype = dtype;
    m.layout = layout;
    m.n = n;
    m.k = inner;
    m.data = data_;
    m.scales = k::Dev<const float>(reinterpret_cast<const float*>(scales_.get()));
  }
  ~Weights() {
    device_->free(data_);
    device_->free(scales_);
  }
  Weights(const Weights&) = delete;
  k::Matrix m;
  double bytes() const { return static_cast<double>(k::matrix_bytes(m.dtype, m.layout, m.n, m.k)); }

 private:
  k::Device* device_;
  k::Dev<std::byte> data_, scales_;
};

// --- measuring

class Bench {
 public:
  explicit Bench(const Options& options) : options_(options) {
    k::DeviceOptions device_options;
    device_options.kernels = options.set;
    device_options.threads = options.threads;
    auto made = k::make_device(device_options);
    if (!made.ok()) {
      std::fprintf(stderr, "%s\n", made.status().message().c_str());
      std::exit(1);
    }
    device = std::move(*made);
    auto probe = k::MachineProbe::create(device.get());
    if (!probe.ok()) {
      std::fprintf(stderr, "%s\n", probe.status().message().c_str());
      std::exit(1);
    }
    machine_ = (*probe)->measure();
    std::printf("%s, %d threads: reads %.1f GB/s (L2 %.0f), %s multiply-adds %.0f GFLOP/s\n",
                device->name(), device->threads(), machine_.read_bytes_per_second * 1e-9,
                machine_.cache_bytes_per_second * 1e-9, machine_.dot,
                machine_.dot_flops_per_second * 1e-9);
    std::printf("%-44s %10s %8s %9s %7s %7s\n", "", "us", "GB/s", "GFLOP/s", "% read", "% dot");
  }

  bool wanted(const std::string& name) const {
    return name.find(options_.only) != std::string::npos;
  }

  // fn(i) is one call; i counts calls, so that cases can rotate their weights.
  void report(const std::string& name, double bytes, double flops,
              const std::function<void(size_t)>& fn) {
    std::vector<double> times;
    const double end = now() + options_.seconds;
    size_t i = 0;
    for (fn(i++); now() < end || times.size() < 5;) {
      const double start = now();
      fn(i++);
      times.push_back(now() - start);
    }
    std::sort(times.begin(), times.end());
    const double s = times[times.size() / 2];
    std::printf("%-44s %10.1f %8.1f %9.1f %6.0f%% %6.0f%%\n", name.c_str(), s * 1e6,
                bytes * 1e-9 / s, flops * 1e-9 / s,
                100 * bytes / s / machine_.read_bytes_per_second,
                100 * flops / s / machine_.dot_flops_per_second);
    std::fflush(stdout);
  }

  std::unique_ptr<k::Device> device;

 private:
  Options options_;
  k::MachineLimits machine_;
};

struct LinearShape {
  const char* name;
  int32_t n, inner;
};

void bench_linear(Bench& bench, const LinearShape& shape, k::DType dtype,
                  const std::vector<int32_t>& row_counts, bool cached) {
  std::string prefix = std::string("linear ") + shape.name + " " + k::dtype_name(dtype);
  if (cached) prefix += " cached";
  if (!bench.wanted(prefix)) return;
  std::vector<std::unique_ptr<Weights>> weights;
  double total = 0;
  do {
    weights.push_back(std::make_unique<Weights>(bench.device.get(), dtype, shape.n, shape.inner));
    total += weights.back()->bytes();
  } while (!cached && total < 300e6);
  const int32_t most = *std::max_element(row_counts.begin(), row_counts.end());
  k::Limits l;
  l.rows = most;
  l.hidden = l.linear_k = shape.inner;
  l.linear_n = shape.n;
  if (!bench.device->reserve(l).ok()) std::abort();
  const auto x = random_floats(static_cast<size_t>(most) * static_cast<size_t>(shape.inner));
  std::vector<float> y(static_cast<size_t>(most) * static_cast<size_t>(shape.n));
  for (const int32_t rows : row_counts) {
    bench.report(prefix + " x" + std::to_string(rows), weights[0]->bytes(),
                 2.0 * rows * shape.n * shape.inner, [&](size_t i) {
                   k::LinearArgs a;
                   a.w = weights[i % weights.size()]->m;
                   a.x = k::Dev<const float>(x.data());
                   a.x_stride = shape.inner;
                   a.y = k::Dev<float>(y.data());
                   a.y_stride = shape.n;
                   a.rows = rows;
                   bench.device->linear({&a, 1});
                 });
  }
}

struct MoeShape {
  const char* name;
  int32_t hidden, width, experts, top_k, shared_width;
  k::DType dtype = k::DType::kF8E4M3;
};

void bench_moe(Bench& bench, const MoeShape& shape, const std::vector<int32_t>& row_counts) {
  const std::string prefix = std::string("moe_ffn ") + shape.name;
  if (!bench.wanted(prefix)) return;
  struct Expert {
    Weights gate, up, down;
    k::FfnWeights weights;
    Expert(k::Device* d, k::DType dtype, int32_t hidden, int32_t width)
        : gate(d, dtype, width, hidden),
          up(d, dtype, width, hidden),
          down(d, dtype, hidden, width),
          weights{gate.m, up.m, down.m} {}
    double bytes() const { return gate.bytes() + up.bytes() + down.bytes(); }
    double values() const { return 3.0 * gate.m.n * gate.m.k; }
  };
  std::vector<std::unique_ptr<Expert>> experts;
  for (int32_t e = 0; e < shape.experts; ++e) {
    experts.push_back(
        std::make_unique<Expert>(bench.device.get(), shape.dtype, shape.hidden, shape.width));
  }
  Expert shared(bench.device.get(), shape.dtype, shape.hidden, shape.shared_width);
  const int32_t slots = shape.top_k + 1;
  const int32_t most = *std::max_element(row_counts.begin(), row_counts.end());
  k::Limits l;
  l.rows = most;
  l.hidden = l.linear_k = shape.hidden;
  l.ffn_slots = slots;
  l.ffn_width = std::max(shape.width, shape.shared_width);
  l.ffn_slot_width = int64_t{shape.top_k} * shape.width + shape.shared_width;
  l.experts = shape.experts;
  if (!bench.device->reserve(l).ok()) std::abort();
  const auto x = random_floats(static_cast<size_t>(most) * static_cast<size_t>(shape.hidden));
  std::vector<float> y(x.size());
  const std::vector<float> slot_weights(static_cast<size_t>(most * slots), 0.3f);
  for (const int32_t rows : row_counts) {
    // Several plans with different experts, so that one row does not keep its own in the cache.
    struct Plan {
      std::vector<std::vector<int32_t>> tokens, slots;
      std::vector<k::FfnGroup> groups;
      double bytes = 0, flops = 0;
    };
    std::vector<Plan> plans(8);
    for (Plan& p : plans) {
      p.tokens.resize(experts.size() + 1);
      p.slots.resize(experts.size() + 1);
      for (int32_t t = 0; t < rows; ++t) {
        std::vector<size_t> order(experts.size());
        for (size_t e = 0; e < order.size(); ++e) order[e] = e;
        for (int32_t s = 0; s < slots; ++s) {
          const auto at = static_cast<size_t>(s);
          std::swap(order[at % order.size()], order[at + random_bits() % (order.size() - at)]);
          const size_t e = s == shape.top_k ? experts.size() : order[at];
          p.tokens[e].push_back(t);
          p.slots[e].push_back(s);
        }
      }
      for (size_t e = 0; e <= experts.size(); ++e) {
        if (p.tokens[e].empty()) continue;
        const Expert& expert = e < experts.size() ? *experts[e] : shared;
        const auto count = static_cast<int32_t>(p.tokens[e].size());
        p.groups.push_back({&expert.weights, p.tokens[e].data(), p.slots[e].data(), count});
        p.bytes += expert.bytes();
        p.flops += 2 * expert.values() * count;
      }
    }
    double bytes = 0, flops = 0;  // of a call in the mean
    for (const Plan& p : plans) {
      bytes += p.bytes / static_cast<double>(plans.size());
      flops += p.flops / static_cast<double>(plans.size());
    }
    bench.report(prefix + " x" + std::to_string(rows), bytes, flops, [&](size_t i) {
      k::FfnArgs a;
      a.rows = rows;
      a.hidden = shape.hidden;
      a.slots = slots;
      a.groups = plans[i % plans.size()].groups;
      a.slot_weights = slot_weights.data();
      a.x = k::Dev<const float>(x.data());
      a.y = k::Dev<float>(y.data());
      bench.device->moe_ffn(a);
    });
  }
}

// `rows` rows of each of `sequences` sequences after `context` keys. Calls take turns at the pages
// of `layers` layers, as steps do: several sequences come from L3 or memory.
void bench_attention(Bench& bench, const char* name, k::MlaShape shape, int32_t rows,
                     int64_t context, int32_t sequences = 1, int32_t layers = 1) {
  std::string title = std::string("mla_attention ") + name + " x" + std::to_string(rows) +
                      " after " + std::to_string(context);
  if (sequences > 1) title += ", " + std::to_string(sequences) + " times";
  if (!bench.wanted(title)) return;
  const int32_t all_rows = rows * sequences;
  k::Limits l;
  l.rows = all_rows;
  l.hidden = l.linear_k = 64;
  l.mla = shape;
  if (!bench.device->reserve(l).ok()) std::abort();
  std::vector<std::unique_ptr<Weights>> weights;
  std::vector<k::Matrix> uk, uv;
  double weight_values = 0;
  for (int32_t h = 0; h < shape.heads; ++h) {
    weights.push_back(std::make_unique<Weights>(bench.device.get(), k::DType::kF8E4M3,
                                                shape.kv_lora_rank, shape.qk_nope_head_dim));
    uk.push_back(weights.back()->m);
    weights.push_back(std::make_unique<Weights>(bench.device.get(), k::DType::kF8E4M3,
                                                shape.v_head_dim, shape.kv_lora_rank));
    uv.push_back(weights.back()->m);
    weight_values +=
        static_cast<double>(shape.kv_lora_rank) * (shape.qk_nope_head_dim + shape.v_head_dim);
  }
  const size_t layer_bytes = bench.device->latent_page_bytes(shape);
  const size_t page_bytes = layer_bytes * static_cast<size_t>(layers);
  const int64_t pages = (context + rows + 63) / 64;
  const auto all_pages = static_cast<size_t>(pages * sequences);
  const auto memory = bench.device->alloc(page_bytes * all_pages);
  std::vector<k::Dev<std::byte>> table;
  for (size_t i = 0; i < all_pages; ++i) table.push_back(memory + page_bytes * i);
  auto* bits = reinterpret_cast<uint16_t*>(memory.get());
  for (size_t i = 0; i < page_bytes * all_pages / 2; ++i) {
    bits[i] = static_cast<uint16_t>(random_bits() & 0xbfff);
  }
  auto q = random_floats(static_cast<size_t>(all_rows * shape.heads * shape.qk_head_dim()));
  std::vector<float> out(static_cast<size_t>(all_rows * shape.heads * shape.v_head_dim));
  std::vector<k::SequenceRows> batch;
  for (int32_t i = 0; i < sequences; ++i) {
    batch.push_back({i * rows, rows, context, table.data() + i * pages});
  }
  const double keys = static_cast<double>(context) + (rows + 1) / 2.0;
  const double flops =
      2.0 * all_rows *
      (weight_values + shape.heads * keys * (shape.latent_dim() + shape.kv_lora_rank));
  bench.report(title, weight_values + static_cast<double>(layer_bytes * all_pages), flops,
               [&](size_t i) {
                 k::MlaAttentionArgs a;
                 a.shape = shape;
                 a.sequences = batch;
                 a.page_offset = layer_bytes * (i % static_cast<size_t>(layers));
                 a.softmax_scale = 0.07f;
                 a.q = k::Dev<const float>(q.data());
                 a.w_uk = uk;
                 a.w_uv = uv;
                 a.out = k::Dev<float>(out.data());
                 bench.device->mla_attention(a);
               });
  bench.device->free(memory);
}

void bench_small(Bench& bench) {
  const int32_t hidden = 2048;
  k::Limits l;
  l.rows = 1;
  l.hidden = l.linear_k = hidden;
  l.experts = 64;
  l.linear_n = 102400;
  if (!bench.device->reserve(l).ok()) std::abort();
  const auto x = random_floats(102400);
  std::vector<float> y(102400);
  if (bench.wanted("rms_norm")) {
    bench.report("rms_norm 2048", hidden * 4.0, 0, [&](size_t) {
      bench.device->rms_norm(k::Dev<const float>(x.data()), hidden, k::Dev<const float>(x.data()),
                             1e-6f, 1, hidden, k::Dev<float>(y.data()), hidden);
    });
  }
  if (bench.wanted("route")) {
    Weights gate(bench.device.get(), k::DType::kBF16, 64, hidden);
    int32_t ids[6];
    float expert_weights[6];
    bench.report("route 64 experts of 2048", gate.bytes(), 0, [&](size_t) {
      k::RouteArgs a;
      a.gate = gate.m;
      a.scoring = k::Scoring::kSoftmax;
      a.top_k = 6;
      a.x = k::Dev<const float>(x.data());
      a.rows = 1;
      a.expert_ids = ids;
      a.expert_weights = expert_weights;
      bench.device->route(a);
    });
  }
  if (bench.wanted("reduce_logits")) {
    k::RowStats stats;
    bench.report("reduce_logits 102400", 102400 * 4.0, 0, [&](size_t) {
      bench.device->reduce_logits(k::Dev<const float>(x.data()), 102400, 1, 102400, &stats);
    });
  }
}

void bench_all(Bench& bench) {
  const std::vector<int32_t> rows = {1, 2, 4, 8, 16, 64, 128, 512};
  const auto f8 = k::DType::kF8E4M3;
  const auto bf16 = k::DType::kBF16;
  const auto mx = k::DType::kMXFP4;
  bench_linear(bench, {"v2-lite o", 2048, 2048}, f8, rows, false);
  bench_linear(bench, {"v2-lite o", 2048, 2048}, bf16, rows, false);
  bench_linear(bench, {"v2-lite o", 2048, 2048}, mx, rows, false);
  bench_linear(bench, {"v3 o", 7168, 16384}, f8, rows, false);
  bench_linear(bench, {"v3 q_b", 24576, 1536}, f8, {1, 4, 512}, false);
  bench_linear(bench, {"v2-lite head", 102400, 2048}, bf16, {1, 4}, false);
  bench_linear(bench, {"in L2", 512, 1024}, f8, rows, true);
  bench_linear(bench, {"in L2", 512, 1024}, mx, rows, true);
  bench_linear(bench, {"tiny q_b", 384, 128}, f8, {1, 4, 64}, true);
  bench_linear(bench, {"tiny o", 256, 256}, f8, {1, 4, 64}, true);
  bench_linear(bench, {"tiny head", 4096, 256}, bf16, {1, 4}, true);
  bench_moe(bench, {"v2-lite", 2048, 1408, 64, 6, 2816}, {1, 4, 16, 128, 512});
  bench_moe(bench, {"v2-lite MXFP4", 2048, 1408, 64, 6, 2816, mx}, {1, 4, 16, 128, 512});
  bench_moe(bench, {"v2-lite BF16", 2048, 1408, 64, 6, 2816, bf16}, {1, 4, 16});
  bench_moe(bench, {"v3, 24 experts", 7168, 2048, 24, 8, 2048}, {1, 4, 64});
  bench_moe(bench, {"tiny", 256, 128, 16, 4, 128}, {1, 4, 16, 64});
  const k::MlaShape lite{16, 512, 128, 64, 128};
  const k::MlaShape v3{128, 512, 128, 64, 128};
  const k::MlaShape tiny{4, 128, 64, 32, 64};
  for (const int64_t context : {128, 512, 1024, 2048, 4096, 16384}) {
    bench_attention(bench, "v2-lite", lite, 1, context);
    bench_attention(bench, "v2-lite", lite, 4, context);
  }
  bench_attention(bench, "v3", v3, 1, 4096);
  bench_attention(bench, "v2-lite", lite, 512, 0);
  bench_attention(bench, "v2-lite", lite, 512, 2048);
  bench_attention(bench, "v3", v3, 128, 1024);
  bench_attention(bench, "tiny", tiny, 1, 100);
  bench_attention(bench, "tiny", tiny, 1, 1500);
  bench_attention(bench, "tiny", tiny, 256, 0);
  bench_attention(bench, "v2-lite", lite, 1, 1000, 16, 4);
  bench_attention(bench, "tiny", tiny, 1, 232, 16, 6);
  bench_small(bench);
}

int run(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; i += 2) {
    const std::string name = i + 1 < argc ? argv[i] : "";  // an option without a value is none
    const char* value = argv[i + 1];
    if (name == "--kernels") {
      options.set = value;
    } else if (name == "--threads") {
      options.threads = std::atoi(value);
    } else if (name == "--only") {
      options.only = value;
    } else if (name == "--seconds") {
      options.seconds = std::atof(value);
    } else if (name == "--clock") {
      use_cpu_clock = std::string(value) == "cpu";
    } else {
      std::fprintf(stderr,
                   "kernels_bench: found %s\nusage: kernels_bench [--kernels SET] [--threads N] "
                   "[--only TEXT] [--seconds S] [--clock wall|cpu]\n",
                   argv[i]);
      return 2;
    }
  }
  Bench bench(options);
  bench_all(bench);
  return 0;
}

}  // namespace
}  // namespace dsv3

int main(int argc, char** argv) { return dsv3::run(argc, argv); }
