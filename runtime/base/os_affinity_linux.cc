#include <errno.h>
#include <pthread.h>
#include <sched.h>

#include "runtime/base/os.h"
#include "runtime/base/os_affinity.h"

namespace dsv3 {
namespace {

constexpr int kMostCpus = 1 << 20;  // far more than Linux can be built for

cpu_set_t* bits(void* set) { return static_cast<cpu_set_t*>(set); }

}  // namespace

void CpuMask::Free::operator()(void* set) const { CPU_FREE(bits(set)); }

int CpuMask::of_system(size_t bytes, void* mask) {
  return sched_getaffinity(0, bytes, bits(mask)) == 0 ? 0 : errno;
}

CpuMask::CpuMask(int cpus) : set_(CPU_ALLOC(static_cast<size_t>(cpus))) {
  if (set_ == nullptr) return;
  bytes_ = CPU_ALLOC_SIZE(static_cast<size_t>(cpus));
  CPU_ZERO_S(bytes_, bits(set_.get()));
}

CpuMask CpuMask::of_this_thread(Get get, int cpus) {
  for (;; cpus *= 2) {
    CpuMask mask(cpus);
    const int error = mask.bytes_ == 0 ? 0 : get(mask.bytes_, mask.set_.get());
    if (error == 0) return mask;
    if (error != EINVAL || cpus >= kMostCpus) return CpuMask(1);
  }
}

CpuMask CpuMask::only(int cpu) {
  CpuMask mask(cpu + 1);
  if (mask.bytes_ != 0) CPU_SET_S(static_cast<size_t>(cpu), mask.bytes_, bits(mask.set_.get()));
  return mask;
}

int CpuMask::count() const { return bytes_ == 0 ? 0 : CPU_COUNT_S(bytes_, bits(set_.get())); }

int CpuMask::room() const { return static_cast<int>(bytes_ * 8); }

int CpuMask::nth(int index) const {
  for (int cpu = 0; cpu < room(); ++cpu) {
    if (CPU_ISSET_S(static_cast<size_t>(cpu), bytes_, bits(set_.get())) && index-- == 0) return cpu;
  }
  return -1;
}

bool CpuMask::set_this_thread() const {
  return bytes_ != 0 && pthread_setaffinity_np(pthread_self(), bytes_, bits(set_.get())) == 0;
}

void pin_this_thread(int index) {
  const CpuMask mask = CpuMask::of_this_thread();
  const int count = mask.count();
  if (count > 0) CpuMask::only(mask.nth(index % count)).set_this_thread();
}

}  // namespace dsv3
