// The library's allocator is mimalloc where it is installed, opened privately: the host's malloc
// must stay the host's.
#include "runtime/base/alloc.h"

#include <dlfcn.h>
#include <doctest/doctest.h>
#include <malloc.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include "runtime/base/os.h"
#include "tests/support/replaced_new.h"

namespace {

bool no_memory = false;  // for operator new

}  // namespace

void* dsv3::test::replaced_new(size_t size, size_t align) {
  if (no_memory) throw std::bad_alloc();
  return plain_new(size, align);
}
void dsv3::test::replaced_delete(void* p) noexcept { std::free(p); }

namespace dsv3 {
namespace {

// The object that provides the malloc which this program's calls reach.
std::string malloc_object() {
  Dl_info info;
  void* found = dlsym(RTLD_DEFAULT, "malloc");
  if (found == nullptr || dladdr(found, &info) == 0) return "";
  return info.dli_fname;
}

TEST_CASE("opening the private allocator leaves the host's malloc alone") {
  const std::string before = malloc_object();
  void* held = std::malloc(1000);
  void* ours = host_alloc(1 << 20);
  REQUIRE(ours != nullptr);
  CHECK(malloc_object() == before);
  // A block of the host's from before is still one of its own, and a new one too.
  CHECK(malloc_usable_size(held) >= 1000);
  std::free(held);
  void* next = std::malloc(1000);
  CHECK(malloc_usable_size(next) >= 1000);
  std::free(next);
  host_free(ours);
  const std::string name = host_allocator_name();
  MESSAGE("allocator: " << name << ", malloc: " << before);
  CHECK((name == "mimalloc" || name == "system"));
  if (name == "mimalloc") CHECK(before.find("mimalloc") == std::string::npos);
}

TEST_CASE("sizes and alignments") {
  for (const size_t align : {size_t{8}, size_t{64}, size_t{4096}}) {
    for (const size_t size : {size_t{0}, size_t{1}, size_t{4097}, size_t{3} << 20}) {
      void* p = host_alloc(size, align);
      REQUIRE(p != nullptr);
      CHECK(reinterpret_cast<uintptr_t>(p) % align == 0);
      std::memset(p, 1, size);
      host_free(p);
    }
  }
  CHECK(host_alloc(SIZE_MAX) == nullptr);
  CHECK(host_alloc(size_t{1} << 48) == nullptr);
  // More than the machine has, though less than some allocators grant.
  if (const uint64_t memory = total_memory(); memory != 0) {
    CHECK(host_alloc(static_cast<size_t>(memory) + 1) == nullptr);
  }
  host_free(nullptr);
  CHECK_THROWS_AS(host_array<double>(SIZE_MAX / 4), std::bad_alloc);
}

TEST_CASE("a large buffer where there is no memory to ask about the machine") {
  no_memory = true;
  void* p = host_alloc(size_t{1} << 30);
  no_memory = false;
  CHECK(p == nullptr);
}

}  // namespace
}  // namespace dsv3
