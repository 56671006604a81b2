#include "kernels/machine.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <string_view>

#include "kernels/cpu/peak.h"
#include "kernels/cpu/pool.h"
#include "runtime/base/alloc.h"
#include "runtime/base/os.h"

namespace dsv3::kernels {
namespace {

constexpr int kTries = 10;
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
  std::atomic<uint64_t> sum{0};
  std::atomic<int64_t> operations{0};
};

void read_memory(void* context, int task, int) {
  Job& job = *static_cast<Job*>(context);
  const size_t begin = static_cast<size_t>(task) * kTaskBytes;
  job.sum ^= job.peak->read(job.data + begin, std::min(kTaskBytes, job.bytes - begin), job.streams);
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
#endif
  return peak_portable();
}

double best_seconds(Pool* pool, Job* job, void (*run)(void*, int, int), int tasks) {
  const Pool::Phase phase{run, job, tasks};
  double best = 1e9;
  for (int i = 0; i < kTries; ++i) {
    job->operations = 0;
    const int64_t begin = monotonic_ns();
    pool->run({&phase, 1});
    best = std::min(best, static_cast<double>(monotonic_ns() - begin) * 1e-9);
  }
  return best;
}

}  // namespace

MachineLimits measure_machine(const Device* device) {
  MachineLimits limits;
  const int threads = device->threads();
  Result<std::unique_ptr<Pool>> created = Pool::create(threads, false);
  if (!created.ok()) return limits;
  Pool* pool = created->get();
  Job job;
  job.peak = peak_of(device->name());
  limits.dot = job.peak->dot_name;
  // Four tasks a thread: one that was descheduled for a moment does not set the figure alone.
  const auto dot_rate = [&](double (*dot)(int64_t)) {
    job.dot = dot;
    const double seconds = best_seconds(pool, &job, compute, 4 * threads);
    return static_cast<double>(job.operations.load()) / seconds;
  };
  limits.dot_flops_per_second = dot_rate(job.peak->dot);
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vnni")) {
    limits.int8_ops_per_second = dot_rate(int8_peak_avx512vnni);
  }
#endif

  size_t bytes = kMemoryBytes;
  HostBuffer<uint8_t> buffer;
  for (; buffer == nullptr && bytes >= 64 * kTaskBytes; bytes /= 2) {
    buffer.reset(static_cast<uint8_t*>(host_alloc(bytes, kPageAlign)));
    if (buffer != nullptr) break;
  }
  if (buffer == nullptr) return limits;
  std::memset(buffer.get(), 1, bytes);
  job.data = buffer.get();
  job.bytes = bytes;
  for (const int streams : {1, 2, 4, 8}) {
    job.streams = streams;
    const double seconds =
        best_seconds(pool, &job, read_memory, static_cast<int>(bytes / kTaskBytes));
    limits.read_bytes_per_second =
        std::max(limits.read_bytes_per_second, static_cast<double>(bytes) / seconds);
  }
  limits.cache_bytes_per_second = static_cast<double>(threads) * kCacheBytes * kCachePasses /
                                  best_seconds(pool, &job, read_cache, threads);
  return limits;
}

MachineLimits greater(const MachineLimits& a, const MachineLimits& b) {
  MachineLimits limits = a;
  const auto raise = [&](double MachineLimits::*of) { limits.*of = std::max(a.*of, b.*of); };
  raise(&MachineLimits::read_bytes_per_second);
  raise(&MachineLimits::cache_bytes_per_second);
  raise(&MachineLimits::dot_flops_per_second);
  raise(&MachineLimits::int8_ops_per_second);
  return limits;
}

}  // namespace dsv3::kernels
