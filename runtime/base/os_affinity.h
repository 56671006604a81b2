// Which CPUs threads may use, however many the machine has: a cpu_set_t alone ends at 1,024, and
// the system refuses to fill one that is smaller than its own.
#pragma once

#include <cstddef>
#include <memory>

namespace dsv3 {

class CpuMask {
 public:
  // Fills a mask (a cpu_set_t) of so many bytes; 0, or an error of the system.
  using Get = int (*)(size_t bytes, void* mask);
  static int of_system(size_t bytes, void* mask);  // that of the calling thread

  // The CPUs that the calling thread may use; none where the system does not say. Room for `cpus`
  // is doubled until it suffices.
  static CpuMask of_this_thread(Get get = of_system, int cpus = 1024);
  static CpuMask only(int cpu);

  int count() const;         // of CPUs in the mask
  int nth(int index) const;  // the CPU that `index` others in the mask come before; -1: none
  int room() const;          // CPUs that the mask has bits for
  bool set_this_thread() const;

 private:
  struct Free {
    void operator()(void* set) const;
  };
  explicit CpuMask(int cpus);  // empty; without room where there is no memory

  std::unique_ptr<void, Free> set_;
  size_t bytes_ = 0;
};

}  // namespace dsv3
