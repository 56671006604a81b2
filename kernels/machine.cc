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

constexpr int kTries = 7;
constexpr size_t kMemoryBytes = size_t{512} << 20;
constexpr size_t kCacheBytes = size_t{256} << 10;  // of one thread: within any L2
constexpr size_t kTaskBytes = size_t{1} << 20;
constexpr int64_t kPeakRounds = 400'000;

struct Job {
  const uint8_t* data = nullptr;
  size_t bytes = 0;
  double (*peak)(int64_t) = nullptr;
  std::atomic<uint64_t> sum{0};
  std::atomic<int64_t> operations{0};
};

// Reads every byte; the sum is there so that nothing is left out.
uint64_t read_all(const uint8_t* data, size_t bytes) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i + 64 <= bytes; i += 64) {
    uint64_t words[8];
    std::memcpy(words, data + i, 64);
    __builtin_prefetch(data + i + 4096);
    for (int w = 0; w < 8; ++w) sums[w] += words[w];
  }
  uint64_t sum = 0;
  for (const uint64_t s : sums) sum += s;
  return sum;
}

void read_memory(void* context, int task, int) {
  Job& job = *static_cast<Job*>(context);
  const size_t begin = static_cast<size_t>(task) * kTaskBytes;
  job.sum += read_all(job.data + begin, std::min(kTaskBytes, job.bytes - begin));
}

constexpr int kCachePasses = 64;

void read_cache(void* context, int task, int) {
  Job& job = *static_cast<Job*>(context);
  uint64_t sum = 0;
  for (int pass = 0; pass < kCachePasses; ++pass) {
    sum += read_all(job.data + static_cast<size_t>(task) * kCacheBytes, kCacheBytes);
    asm volatile("" : "+r"(sum));
  }
  job.sum += sum;
}

void compute(void* context, int, int) {
  Job& job = *static_cast<Job*>(context);
  job.operations += static_cast<int64_t>(job.peak(kPeakRounds));
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
  const std::string_view name = device->name();
  limits.dot = "f32";
  job.peak = dot_peak_portable;
#if defined(__x86_64__)
  if (name == "avx512bf16") {
    limits.dot = "bf16";
    job.peak = dot_peak_avx512bf16;
  } else if (name == "avx2") {
    job.peak = dot_peak_avx2;
  }
#endif
  // Four tasks a thread: one that was descheduled for a moment does not set the figure alone.
  const double seconds = best_seconds(pool, &job, compute, 4 * threads);
  limits.dot_flops_per_second = static_cast<double>(job.operations.load()) / seconds;

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
  limits.read_bytes_per_second =
      static_cast<double>(bytes) /
      best_seconds(pool, &job, read_memory, static_cast<int>(bytes / kTaskBytes));
  limits.cache_bytes_per_second = static_cast<double>(threads) * kCacheBytes * kCachePasses /
                                  best_seconds(pool, &job, read_cache, threads);
  return limits;
}

}  // namespace dsv3::kernels
