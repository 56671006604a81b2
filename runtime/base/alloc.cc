#include "runtime/base/alloc.h"

#include <dlfcn.h>

#include <cstdint>
#include <cstdlib>

namespace dsv3 {
namespace {

// No machine has more address space; asking an allocator for it is an error in some of them.
constexpr size_t kMaxAllocation = size_t{1} << 47;

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
  return allocator().aligned(size, align);
}

void host_free(void* p) noexcept {
  if (p != nullptr) allocator().release(p);
}

const char* host_allocator_name() noexcept { return allocator().name; }

}  // namespace dsv3
