#include "runtime/base/alloc.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "runtime/base/os.h"

namespace dsv3 {
namespace {

// No machine has more address space; asking an allocator for it is an error in some of them.
constexpr size_t kMaxAllocation = size_t{1} << 47;

// Buffers of this size and more begin on a huge page, and ask for more of them.
constexpr size_t kHugeSize = size_t{8} << 20;
constexpr size_t kHugePage = size_t{2} << 20;

// From this size on it is worth asking whether the machine has that much: mimalloc grants what no
// machine has, and the process would end when it touches it.
constexpr size_t kAskSize = size_t{1} << 30;

// Finding out reads some small files, which takes memory: a machine that does not have even that
// has not.
bool machine_has(size_t size) noexcept {
  try {
    const uint64_t memory = total_memory();
    return memory == 0 || size <= memory;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

struct Allocator {
  void* (*aligned)(size_t size, size_t align);
  void (*release)(void*);
  const char* name;
};

void* system_aligned(size_t size, size_t align) {
  void* p = nullptr;
  return posix_memalign(&p, align, size) == 0 ? p : nullptr;
}

Allocator choose() {
  const Allocator system{system_aligned, std::free, "system"};
#ifdef DSV3_SANITIZED
  return system;  // the sanitizers must see every allocation
#else
  void* lib = dlopen("libmimalloc.so.2", RTLD_NOW | RTLD_LOCAL);
  if (lib == nullptr) return system;
  auto aligned = reinterpret_cast<void* (*)(size_t, size_t)>(dlsym(lib, "mi_malloc_aligned"));
  auto release = reinterpret_cast<void (*)(void*)>(dlsym(lib, "mi_free"));
  if (aligned == nullptr || release == nullptr) {
    dlclose(lib);
    return system;
  }
  return {aligned, release, "mimalloc"};
#endif
}

const Allocator& allocator() {
  static const Allocator chosen = choose();
  return chosen;
}

}  // namespace

void* host_alloc(size_t size, size_t align) noexcept {
  if (size == 0) size = 1;
  if (size > kMaxAllocation) return nullptr;
  if (align < sizeof(void*)) align = sizeof(void*);
  if (size < kHugeSize) return allocator().aligned(size, align);
  if (size >= kAskSize && !machine_has(size)) return nullptr;
  // Weights are read at memory speed from end to end: with 4 KiB pages one Zen 4 core reads 23 to
  // 26 GB/s, with 2 MiB pages 30 to 31.
  void* p = allocator().aligned(size, align < kHugePage ? kHugePage : align);
  if (p != nullptr) advise_huge_pages(p, size);
  return p;
}

void host_free(void* p) noexcept {
  if (p != nullptr) allocator().release(p);
}

const char* host_allocator_name() noexcept { return allocator().name; }

}  // namespace dsv3
