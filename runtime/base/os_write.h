// Writing to files as a guest: beyond the host's limit of file size (`ulimit -f`) the system does
// not only fail a write, it sends SIGXFSZ, which ends a process that has no handler. Here that is
// an error like any other, EFBIG, and the host's signals are as they were. Used by base/ alone.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsv3 {

// As write(2) and pwrite(2): the bytes written, or -1 and errno.
int64_t write_file(int fd, const void* bytes, size_t size);
int64_t write_file_at(int fd, const void* bytes, size_t size, uint64_t offset);

}  // namespace dsv3
