// Reading UTF-8 that may be broken: what is whole, what can never become whole, what may still.
// Parts that can never become a character are "maximal invalid parts" as Unicode recommends
// (chapter 3.9) and as Rust's from_utf8_lossy replaces them, each by one U+FFFD.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace dsv3 {

inline constexpr std::string_view kReplacementCharacter = "\xEF\xBF\xBD";

enum class Utf8State : uint8_t {
  kCharacter,   // a whole character
  kInvalid,     // a maximal invalid part
  kIncomplete,  // the text ends inside a character
};
struct Utf8Unit {
  Utf8State state;
  uint8_t size;   // bytes of it, at least 1
  char32_t code;  // kCharacter only
};
// The unit at the beginning of `text`, which is not empty.
Utf8Unit utf8_unit(std::string_view text);

bool is_valid_utf8(std::string_view text);
// Appends `text` with every invalid or unfinished part replaced by U+FFFD.
void append_lossy_utf8(std::string_view text, std::string* out);

// Bytes of the character that starts with `lead`, in valid UTF-8.
inline size_t utf8_length(char lead) {
  const auto b = static_cast<uint8_t>(lead);
  return b < 0x80 ? 1 : b < 0xE0 ? 2 : b < 0xF0 ? 3 : 4;
}
// Appends the character; `code` is a Unicode scalar value.
void append_utf8(char32_t code, std::string* out);

}  // namespace dsv3
