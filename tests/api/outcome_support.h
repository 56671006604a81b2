// That two generations gave the same, bit for bit.
#pragma once

#include <doctest/doctest.h>

#include <cstring>
#include <vector>

#include "tests/api/api_support.h"

namespace dsv3::test {

inline bool same_bits(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() &&
         (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
}

inline void check_same(const Outcome& a, const Outcome& b) {
  CHECK(a.tokens == b.tokens);
  CHECK(a.text == b.text);
  CHECK(same_bits(a.logprobs, b.logprobs));
}

}  // namespace dsv3::test
