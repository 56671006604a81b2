// A hash for tables whose keys come from files. Nobody can write a file whose keys collide, which
// with std::hash makes a table quadratic: the seed is drawn once per process. Nothing may depend on
// the order of such a table.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace dsv3 {

struct SeededHash {
  size_t operator()(std::string_view key) const;
  size_t operator()(uint64_t key) const;
};

}  // namespace dsv3
