#include "kernels/machine.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string_view>

#include "kernels/cpu/peak.h"
#include "runtime/base/alloc.h"
#include "runtime/base/os.h"

namespace dsv3::kernels {
namespace {

constexpr int kPasses = 9;
constexpr size_t kMemoryBytes = size_t{512} << 20;
constexpr size_t kCacheBytes = size_t{256} << 10;  // of one thread: within any L2
constexpr size_t kTaskBytes = size_t{1} << 20;
constexpr int kCachePasses = 64;
constexpr int64_t kPeakRounds = 400'000;

struct Job {
  const Peak* peak = nullptr;
  double (*dot)(int64_t) = nullptr;
  const uint8_t* data = nullptr;
  size_t bytes = 0;
  int streams = 1;
  size_t pass = 0;
  std::atomic<uint64_t> sum{0};
  std::atomic<int64_t> operations{0};
};

void read_memory(void* context, int task, int) {
  Job& job = *static_cast<Job*>(context);
  // Pieces lie evenly all over the memory; each pass takes others than the last one.
  const size_t pieces = job.bytes / kTaskBytes;
  const size_t step = pieces / (kMemoryBytes / kTaskBytes);
  const size_t piece =
      step < 2 ? static_cast<size_t>(task) : static_cast<size_t>(task) * step + job.pass % step;
  job.sum ^= job.peak->read(job.data + piece * kTaskBytes, kTaskBytes, job.streams);
}

void read_cache(void* context, int task, int) {
  Job& job = *static_cast<Job*>(context);
  uint64_t sum = 0;
  for (int pass = 0; pass < kCachePasses; ++pass) {
    sum ^= job.peak->read(job.data + static_cast<size_t>(task) * kCacheBytes, kCacheBytes, 1);
    asm volatile("" : "+r"(sum));
  }
  job.sum ^= sum;
}

void compute(void* context, int, int) {
  Job& job = *static_cast<Job*>(context);
  job.operations += static_cast<int64_t>(job.dot(kPeakRounds));
}

const Peak* peak_of(std::string_view kernels) {
#if defined(__x86_64__)
  if (kernels == "avx512bf16") return peak_avx512bf16();
  if (kernels == "avx512") return peak_avx512();
  if (kernels == "avx2") return peak_avx2();
  if (kernels == "avx2i16") return peak_avx2i16();
#elif defined(__aarch64__)
  if (kernels == "neonbf16") return peak_neonbf16();
  if (kernels == "neon") return peak_neon();
#endif
  return peak_portable();
}

}  // namespace

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct MachineProbe::Impl {
  Device* device = nullptr;
  HostBuffer<uint8_t> buffer;  // where it has memory of its own
  Job job;

  double seconds(void (*body)(void*, int, int), int tasks) {
    job.operations = 0;
    const int64_t begin = monotonic_ns();
    device->run_on_threads(body, &job, tasks);
    return static_cast<double>(monotonic_ns() - begin) * 1e-9;
  }
  double read_rate() {
    const size_t tasks = std::min(job.bytes, kMemoryBytes) / kTaskBytes;
    ++job.pass;
    const double time = seconds(read_memory, static_cast<int>(tasks));
    return static_cast<double>(tasks * kTaskBytes) / time;
  }
  // Four tasks a thread: one that was descheduled for a moment does not set the figure alone.
  double dot_rate(double (*dot)(int64_t)) {
    job.dot = dot;
    const double time = seconds(compute, 4 * device->threads());
    return static_cast<double>(job.operations.load()) / time;
  }
  template <class Rate>
  static double median_of(const Rate& rate) {
    std::vector<double> rates;
    for (int i = 0; i < kPasses; ++i) rates.push_back(rate());
    return median(std::move(rates));
  }
};

MachineProbe::MachineProbe(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
MachineProbe::~MachineProbe() = default;

Result<std::unique_ptr<MachineProbe>> MachineProbe::create(Device* device,
                                                           std::span<const uint8_t> memory) {
  auto impl = std::make_unique<Impl>();
  impl->device = device;
  impl->job.peak = peak_of(device->name());
  impl->job.bytes = memory.size();
  if (memory.size() >= kMemoryBytes) impl->job.data = memory.data();
  for (size_t bytes = kMemoryBytes; impl->job.data == nullptr && bytes >= 64 * kTaskBytes;
       bytes /= 2) {
    impl->buffer.reset(static_cast<uint8_t*>(host_alloc(bytes, kPageAlign)));
    if (impl->buffer == nullptr) continue;
    std::memset(impl->buffer.get(), 1, bytes);
    impl->job.data = impl->buffer.get();
    impl->job.bytes = bytes;
  }
  if (impl->job.data == nullptr) {
    return make_error(Code::kOutOfMemory, "no memory (%zu bytes) to measure reads of",
                      64 * kTaskBytes);
  }
  return std::unique_ptr<MachineProbe>(new MachineProbe(std::move(impl)));
}

double MachineProbe::read_pass() { return impl_->read_rate(); }
double MachineProbe::dot_pass() { return impl_->dot_rate(impl_->job.peak->dot); }

MachineLimits MachineProbe::measure() {
  MachineLimits limits;
  Job& job = impl_->job;
  limits.dot = job.peak->dot_name;
  limits.dot_flops_per_second = Impl::median_of([&] { return dot_pass(); });
  limits.int8_ops_per_second = Impl::median_of([&] { return impl_->dot_rate(job.peak->int8); });
  int best = 1;
  for (const int streams : {1, 2, 4, 8}) {
    job.streams = streams;
    const double rate = Impl::median_of([&] { return read_pass(); });
    if (rate > limits.read_bytes_per_second) {
      limits.read_bytes_per_second = rate;
      best = streams;
    }
  }
  job.streams = best;
  const int threads = impl_->device->threads();
  limits.cache_bytes_per_second =
      static_cast<double>(threads) * kCacheBytes * kCachePasses /
      Impl::median_of([&] { return impl_->seconds(read_cache, threads); });
  return limits;
}

}  // namespace dsv3::kernels
