#include "tests/support/replaced_new.h"

#include <cstdlib>
#include <new>

void* dsv3::test::plain_new(size_t size, size_t align) {
  void* p = align <= alignof(std::max_align_t)
                ? std::malloc(size == 0 ? 1 : size)
                : std::aligned_alloc(align, (size + align - 1) / align * align);
  if (p == nullptr) throw std::bad_alloc();
  return p;
}

using dsv3::test::replaced_delete;
using dsv3::test::replaced_new;

void* operator new(size_t size) { return replaced_new(size, 0); }
void* operator new[](size_t size) { return replaced_new(size, 0); }
void* operator new(size_t size, std::align_val_t a) {
  return replaced_new(size, static_cast<size_t>(a));
}
void* operator new[](size_t size, std::align_val_t a) {
  return replaced_new(size, static_cast<size_t>(a));
}
// The sanitizers bring nothrow forms of their own, which would not come through the two above.
void* operator new(size_t size, const std::nothrow_t&) noexcept {
  try {
    return replaced_new(size, 0);
  } catch (...) {
    return nullptr;
  }
}
void* operator new[](size_t size, const std::nothrow_t& tag) noexcept {
  return operator new(size, tag);
}
void operator delete(void* p) noexcept { replaced_delete(p); }
void operator delete[](void* p) noexcept { replaced_delete(p); }
void operator delete(void* p, size_t) noexcept { replaced_delete(p); }
void operator delete[](void* p, size_t) noexcept { replaced_delete(p); }
void operator delete(void* p, std::align_val_t) noexcept { replaced_delete(p); }
void operator delete[](void* p, std::align_val_t) noexcept { replaced_delete(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { replaced_delete(p); }
void operator delete[](void* p, size_t, std::align_val_t) noexcept { replaced_delete(p); }
