// The library's big buffers: pages, arenas, weights copied into memory. They come from mimalloc
// where its shared library is installed and from the system allocator elsewhere. mimalloc is opened
// privately (dlopen, RTLD_LOCAL), so that the host's malloc stays the host's.
#pragma once

#include <cstddef>
#include <memory>

namespace dsv3 {

inline constexpr size_t kCacheLine = 64;
inline constexpr size_t kPageAlign = 4096;

// `size` bytes aligned to `align` (a power of two), not zeroed; nullptr when there is no memory.
void* host_alloc(size_t size, size_t align = kCacheLine) noexcept;
void host_free(void* p) noexcept;
// "mimalloc" or "system".
const char* host_allocator_name() noexcept;

struct HostFree {
  void operator()(void* p) const noexcept { host_free(p); }
};
template <class T>
using HostBuffer = std::unique_ptr<T[], HostFree>;

// `count` objects of a trivial T, uninitialised; throws std::bad_alloc (caught at the API
// boundary).
template <class T>
HostBuffer<T> host_array(size_t count, size_t align = kCacheLine) {
  void* p = count > SIZE_MAX / sizeof(T) ? nullptr : host_alloc(count * sizeof(T), align);
  if (p == nullptr) throw std::bad_alloc();
  return HostBuffer<T>(static_cast<T*>(p));
}

}  // namespace dsv3
