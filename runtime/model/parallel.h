// Splitting long work on files over a few threads: conversion, reading a model into memory,
// checking its checksums. (The kernels have a pool of their own; this one lives for one call.)
#pragma once

#include <cstddef>
#include <functional>

#include "runtime/base/status.h"

namespace dsv3 {

// Enough to keep a disk busy beside computing, and no more: the host has other work.
int io_threads();

// Calls body(0 .. count-1), each once, on up to `threads` threads; indices are handed out in
// ascending order. The calling thread calls `tick` (may be empty) now and then and at the end; when
// that returns false, no further index is handed out and the result is kCancelled. After an error
// no further index is handed out either; the error of the lowest index is returned. Exceptions of
// body become errors.
Status parallel_for(size_t count, int threads, const std::function<Status(size_t)>& body,
                    const std::function<bool()>& tick);

}  // namespace dsv3
