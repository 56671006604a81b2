// Failures of system calls. A call that a signal of the host's interrupts is made again:
// files of networks and of user space let even open() and fsync() wait. Used by base/ alone.
#pragma once

#include <errno.h>

#include <string>

#include "runtime/base/status.h"

namespace dsv3 {

// What `call` returns, -1 and errno when it fails.
template <class Call>
auto uninterrupted(Call call) {
  auto result = call();
  while (result == -1 && errno == EINTR) result = call();
  return result;
}

// May the same call succeed later, without a change of it? What is short now may be freed.
inline bool may_pass(int error) {
  switch (error) {
    case EAGAIN:
    case EDQUOT:
    case EMFILE:
    case ENFILE:
    case ENOMEM:
    case ENOSPC:
      return true;
    default:
      return false;
  }
}

// "PATH: cannot ACTION: " and what errno's value `error` means.
Status io_error(const std::string& path, const char* action, int error);

}  // namespace dsv3
