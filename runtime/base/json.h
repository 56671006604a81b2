// Reading JSON that comes from outside: bounded depth, no duplicate keys, no lone surrogates, no
// numbers that do not fit, errors that name the file. The parser (nlohmann-json) is not recursive,
// and neither is this: 100,000 nested brackets are refused on any stack.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "runtime/base/json_fwd.h"
#include "runtime/base/status.h"

namespace dsv3 {

struct JsonLimits {
  int max_depth = 64;
  // Parsed, a file takes up to 25 times its size. Published ones (tokenizer.json, indices of
  // thousands of tensors) have less than 20 MiB.
  size_t max_bytes = size_t{64} << 20;
};
// For files that are always small (config.json and the like): published ones have less than 2 MiB.
inline constexpr JsonLimits kSmallFile = {.max_bytes = size_t{16} << 20};

// Parses `text`; `where` (a file's name) opens every message.
Result<Json> parse_json(std::string_view text, const std::string& where, JsonLimits limits = {});
// Reads and parses a file.
Result<Json> read_json(const std::string& path, JsonLimits limits = {});

}  // namespace dsv3
