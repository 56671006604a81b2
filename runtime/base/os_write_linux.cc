#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

#include "runtime/base/os_write.h"

namespace dsv3 {
namespace {

constexpr size_t kMostAtOnce = size_t{1} << 30;  // what every system takes in one call

// Keeps SIGXFSZ from this thread, to which the system directs it, while one call writes. A signal
// of the call's own is taken away, unless one waited before, which is the host's and stays. Not by
// ignoring the signal: its disposition belongs to the whole process.
class SizeSignalBlock {
 public:
  SizeSignalBlock() {
    sigemptyset(&signal_);
    sigaddset(&signal_, SIGXFSZ);
    pthread_sigmask(SIG_BLOCK, &signal_, &before_);
    sigset_t pending;
    waited_ = sigpending(&pending) != 0 || sigismember(&pending, SIGXFSZ) == 1;
    errno = 0;  // tells whether the call failed
  }
  SizeSignalBlock(const SizeSignalBlock&) = delete;
  ~SizeSignalBlock() {
    const int error = errno;
    const timespec none = {0, 0};
    if (error == EFBIG && !waited_) {
      while (sigtimedwait(&signal_, nullptr, &none) < 0 && errno == EINTR) {
      }
    }
    pthread_sigmask(SIG_SETMASK, &before_, nullptr);
    errno = error == 0 ? hosts_error_ : error;
  }

 private:
  const int hosts_error_ = errno;
  sigset_t signal_, before_;
  bool waited_ = false;
};

}  // namespace

int64_t write_file(int fd, const void* bytes, size_t size) {
  const SizeSignalBlock block;
  return ::write(fd, bytes, std::min(size, kMostAtOnce));
}

int64_t write_file_at(int fd, const void* bytes, size_t size, uint64_t offset) {
  const SizeSignalBlock block;
  return ::pwrite(fd, bytes, std::min(size, kMostAtOnce), static_cast<off_t>(offset));
}

}  // namespace dsv3
