#include "tests/support/failing_calls.h"

#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstring>

namespace {

std::atomic<const char*> armed{nullptr};
std::atomic<int> calls{0};
int failing = 0, error_number = 0;

bool is_the_one(const char* function) {
  const char* const name = armed.load(std::memory_order_acquire);
  return name != nullptr && strcmp(name, function) == 0 && calls.fetch_add(1) == failing;
}

// What a call does when it is the one: true, with errno, or it goes on with half the size.
bool fails(const char* function, size_t* size = nullptr) {
  if (!is_the_one(function)) return false;
  if (error_number == 0 && size != nullptr) {
    *size = (*size + 1) / 2;
    return false;
  }
  errno = error_number;
  return true;
}

template <class Result, class... Parameters>
Result system_call(const char* function, Parameters... arguments) {
  using Function = Result (*)(Parameters...);
  return reinterpret_cast<Function>(dlsym(RTLD_NEXT, function))(arguments...);
}

}  // namespace

// The C library declares some of them with exceptions ruled out, which a definition has to repeat.
extern "C" {

int open(const char* path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(more, mode_t) : 0;
  va_end(more);
  return fails("open") ? -1 : system_call<int>("open", path, flags, mode);
}
int openat(int directory, const char* path, int flags, ...) {
  va_list more;
  va_start(more, flags);
  const mode_t mode = (flags & O_CREAT) != 0 ? va_arg(more, mode_t) : 0;
  va_end(more);
  return fails("openat") ? -1 : system_call<int>("openat", directory, path, flags, mode);
}
int close(int fd) {
  const int result = system_call<int>("close", fd);  // whatever it says, it is closed
  return fails("close") ? -1 : result;
}
ssize_t read(int fd, void* bytes, size_t size) {
  return fails("read", &size) ? -1 : system_call<ssize_t>("read", fd, bytes, size);
}
ssize_t pread(int fd, void* bytes, size_t size, off_t at) {
  return fails("pread", &size) ? -1 : system_call<ssize_t>("pread", fd, bytes, size, at);
}
ssize_t write(int fd, const void* bytes, size_t size) {
  return fails("write", &size) ? -1 : system_call<ssize_t>("write", fd, bytes, size);
}
ssize_t pwrite(int fd, const void* bytes, size_t size, off_t at) {
  return fails("pwrite", &size) ? -1 : system_call<ssize_t>("pwrite", fd, bytes, size, at);
}
int fsync(int fd) { return fails("fsync") ? -1 : system_call<int>("fsync", fd); }
int flock(int fd, int what) noexcept {
  return fails("flock") ? -1 : system_call<int>("flock", fd, what);
}
int fstat(int fd, struct stat* out) noexcept {
  return fails("fstat") ? -1 : system_call<int>("fstat", fd, out);
}
int lstat(const char* path, struct stat* out) noexcept {
  return fails("lstat") ? -1 : system_call<int>("lstat", path, out);
}
int fstatat(int directory, const char* path, struct stat* out, int flags) noexcept {
  return fails("fstatat") ? -1 : system_call<int>("fstatat", directory, path, out, flags);
}
int rename(const char* from, const char* to) noexcept {
  return fails("rename") ? -1 : system_call<int>("rename", from, to);
}
int renameat(int a, const char* from, int b, const char* to) noexcept {
  return fails("renameat") ? -1 : system_call<int>("renameat", a, from, b, to);
}
int renameat2(int a, const char* from, int b, const char* to, unsigned flags) noexcept {
  return fails("renameat2") ? -1 : system_call<int>("renameat2", a, from, b, to, flags);
}
int unlinkat(int directory, const char* path, int flags) noexcept {
  return fails("unlinkat") ? -1 : system_call<int>("unlinkat", directory, path, flags);
}
dirent* readdir(DIR* directory) {
  return fails("readdir") ? nullptr : system_call<dirent*>("readdir", directory);
}

}  // extern "C"

namespace dsv3::test {

const std::vector<std::string>& failing_calls() {
  static const std::vector<std::string> names = {
      "open",     "openat",    "close",    "read",    "pread",   "write",
      "pwrite",   "fsync",     "flock",    "fstat",   "fstatat", "rename",
      "renameat", "renameat2", "unlinkat", "readdir", "lstat"};
  return names;
}

void fail_call(const std::string& function, int which, int error) {
  failing = which;
  error_number = error;
  calls = 0;
  for (const std::string& name : failing_calls()) {
    if (name == function) armed.store(name.c_str(), std::memory_order_release);
  }
}

int stop_failing() {
  armed.store(nullptr);
  return calls;
}

}  // namespace dsv3::test
