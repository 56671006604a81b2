// Where a completion goes: the text before and after a cursor, cut to what the model can read.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "common.h"

namespace cli {

struct Cursor {
  std::string prefix;
  std::string suffix;
};

// The text before and after a position. Lines are separated by '\n' and counted from 1. Columns are
// counted from 1 in characters (Unicode code points, a tab is one): column C is the place before
// the C-th character, and one behind the last is the line's end. column 0: the line's end. Throws
// Misuse for a place that is not in the text.
Cursor split_at(const std::string& text, const std::string& path, uint64_t line, uint64_t column);

struct Fitted {
  Cursor cursor;
  uint64_t prefix_tokens = 0, suffix_tokens = 0;  // kept
  uint64_t dropped_before = 0;                    // bytes cut off the prefix's beginning
  uint64_t dropped_after = 0;                     // bytes cut off the suffix's end
};

// Cuts whole lines far from the cursor until both sides together have at most `budget` tokens. The
// suffix gets a quarter, and what a short prefix leaves over.
Fitted fit(const dsv3_model* model, const Cursor& cursor, uint64_t budget);

}  // namespace cli
