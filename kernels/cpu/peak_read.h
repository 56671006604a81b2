// The reading loop of the peak_*.cc files, a template over a type local to each of them (see
// micro.h for why).
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsv3::kernels::peak {

// S::V: a vector of uint64_t as wide as the set loads.
template <class S, int kStreams>
uint64_t read_streams(const uint8_t* data, size_t bytes) {
  using V = typename S::V;
  constexpr int kVectors = 128 / sizeof(V);  // two cache lines of each stream in a round
  V sums[kVectors] = {};
  const size_t part = bytes / kStreams;
  for (size_t i = 0; i + 128 <= part; i += 128) {
#pragma GCC unroll 8
    for (int s = 0; s < kStreams; ++s) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) {
        V word;
        __builtin_memcpy(&word, data + static_cast<size_t>(s) * part + i + v * sizeof(V),
                         sizeof(V));
        sums[v] ^= word;
      }
    }
  }
  uint64_t sum = 0;
  for (const V& v : sums) {
    for (size_t lane = 0; lane < sizeof(V) / sizeof(uint64_t); ++lane) sum ^= v[lane];
  }
  return sum;
}

template <class S>
uint64_t read(const uint8_t* data, size_t bytes, int streams) {
  switch (streams) {
    case 1:
      return read_streams<S, 1>(data, bytes);
    case 2:
      return read_streams<S, 2>(data, bytes);
    case 4:
      return read_streams<S, 4>(data, bytes);
    default:
      return read_streams<S, 8>(data, bytes);
  }
}

}  // namespace dsv3::kernels::peak
