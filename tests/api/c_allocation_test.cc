// Every allocation of the C library's fails once, also those of what the library calls: PCRE2,
// directories, threads. One clear error or the same result; operator new is in allocation_test.cc.
#include <doctest/doctest.h>
#include <errno.h>

#include <atomic>
#include <cstdint>
#include <functional>

#include "tests/api/api_support.h"

// A sanitizer brings an allocator of its own, and other C libraries name theirs otherwise.
#if !defined(DSV3_SANITIZED) && defined(__GLIBC__)

namespace {

std::atomic<int64_t> made{0};
std::atomic<int64_t> failing{-1};  // the number of the one that fails; negative: none

bool fails() {
  if (made.fetch_add(1, std::memory_order_relaxed) != failing.load(std::memory_order_relaxed)) {
    return false;
  }
  errno = ENOMEM;
  return true;
}

}  // namespace

// The program's own functions stand before the C library's, for the shared libraries it loads too.
extern "C" {
void* __libc_malloc(size_t size);                  // NOLINT: glibc's names
void* __libc_calloc(size_t count, size_t size);    // NOLINT
void* __libc_realloc(void* p, size_t size);        // NOLINT
void* __libc_memalign(size_t align, size_t size);  // NOLINT

void* malloc(size_t size) { return fails() ? nullptr : __libc_malloc(size); }
void* calloc(size_t count, size_t size) { return fails() ? nullptr : __libc_calloc(count, size); }
void* realloc(void* p, size_t size) { return fails() ? nullptr : __libc_realloc(p, size); }
void* memalign(size_t align, size_t size) {
  return fails() ? nullptr : __libc_memalign(align, size);
}
void* aligned_alloc(size_t align, size_t size) { return memalign(align, size); }
int posix_memalign(void** out, size_t align, size_t size) {
  void* p = memalign(align, size);
  if (p == nullptr) return ENOMEM;
  *out = p;
  return 0;
}
}

namespace {

using namespace dsv3::test;  // NOLINT

// Makes each allocation of `call` fail in turn; how often that was an error.
int fail_each(const std::function<dsv3_status(dsv3_error**)>& call) {
  REQUIRE(call(nullptr) == DSV3_OK);  // fills what is made once per process
  made = 0;
  REQUIRE(call(nullptr) == DSV3_OK);
  const int64_t count = made;
  int errors = 0;
  for (int64_t n = 0; n < count; ++n) {
    Error error;
    made = 0;
    failing = n;
    const dsv3_status status = call(error.out());
    failing = -1;
    INFO("allocation " << n << " of " << count << ": " << error.message());
    CHECK(error.status() == status);
    if (status == DSV3_OK) continue;  // it could do without: PCRE2's compiler of machine code
    ++errors;
    CHECK(status == DSV3_E_OUT_OF_MEMORY);
    CHECK(error.retryable());
  }
  CHECK(call(nullptr) == DSV3_OK);
  return errors;
}

}  // namespace

TEST_CASE("opening a model") {
  const std::string& path = tiny_coder();
  const int errors = fail_each([&](dsv3_error** e) {
    dsv3_model* model = nullptr;
    const dsv3_status status = dsv3_model_open(path.c_str(), nullptr, &model, e);
    dsv3_model_free(model);
    return status;
  });
  CHECK(errors > 10);
}

TEST_CASE("tokenizing") {
  const ModelHandle model = open_model(tiny_coder());
  // Long enough for a stack of the machine code's own.
  const std::string text = "def f(x):\n" + std::string(20000, ' ') + "return 中文 1234567";
  std::vector<int32_t> tokens(text.size()), expected;
  const int errors = fail_each([&](dsv3_error** e) {
    uint64_t needed = 0;
    const dsv3_status status = dsv3_model_tokenize(model.get(), text.data(), text.size(), 0,
                                                   tokens.data(), tokens.size(), &needed, e);
    if (status != DSV3_OK) return status;
    if (expected.empty()) expected.assign(tokens.begin(), tokens.begin() + needed);
    CHECK(std::equal(expected.begin(), expected.end(), tokens.begin(), tokens.begin() + needed));
    return status;
  });
  CHECK(errors > 4);
}

TEST_CASE("purging a disk cache") {
  const TemporaryFolder folder;
  CHECK(fail_each([&](dsv3_error** e) {
          return dsv3_disk_cache_purge(folder.path().c_str(), nullptr, e);
        }) > 1);
}

#endif
