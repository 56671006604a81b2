// What a checksum that matches cannot tell: whether the weights are numbers. The converter writes
// finite ones alone and kernels rely on that (kernels::Matrix: some sets read the NaN of FP8 as
// 480), but a file can be made by others. Called by Model::verify(), which reads every byte anyway.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>

#include "runtime/model/schema.h"

namespace dsv3 {

struct BadWeight {
  size_t part = 0;
  std::string what;  // "NaN at [3, 17]"
};

// The first weight or scale that is not finite among the `bytes` of an item of this record that
// begin at `at`. `at` is a multiple of 64.
std::optional<BadWeight> first_bad_weight(const Record& record, uint64_t at,
                                          std::span<const uint8_t> bytes);

}  // namespace dsv3
