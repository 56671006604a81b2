// The program's operator new and delete, through two functions that the test defines. For tests
// that name replaced_new.cc among their sources.
#pragma once

#include <cstddef>

namespace dsv3::test {

// align 0: what any object needs. Throws std::bad_alloc.
void* replaced_new(size_t size, size_t align);
void replaced_delete(void* p) noexcept;  // p may be null

// For the first of them: from malloc, to be given back by free.
void* plain_new(size_t size, size_t align);

}  // namespace dsv3::test
