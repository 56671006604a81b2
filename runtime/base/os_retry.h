// A call that a signal of the host's interrupts is made again. Files of networks and of user space
// let even open() and fsync() wait. Used by base/ alone.
#pragma once

#include <errno.h>

namespace dsv3 {

// What `call` returns, -1 and errno when it fails.
template <class Call>
auto uninterrupted(Call call) {
  auto result = call();
  while (result == -1 && errno == EINTR) result = call();
  return result;
}

}  // namespace dsv3
