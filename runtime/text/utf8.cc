#include "runtime/text/utf8.h"

#include <cstring>

namespace dsv3 {
namespace {

// The bytes that may follow a lead byte first, and how many follow in all (Unicode, table 3-7).
struct Lead {
  uint8_t following;  // 0: not a lead byte
  uint8_t low, high;  // range of the first following byte
};
Lead lead_of(uint8_t b) {
  if (b < 0xC2) return {0, 0, 0};
  if (b < 0xE0) return {1, 0x80, 0xBF};
  if (b == 0xE0) return {2, 0xA0, 0xBF};
  if (b == 0xED) return {2, 0x80, 0x9F};
  if (b < 0xF0) return {2, 0x80, 0xBF};
  if (b == 0xF0) return {3, 0x90, 0xBF};
  if (b < 0xF4) return {3, 0x80, 0xBF};
  if (b == 0xF4) return {3, 0x80, 0x8F};
  return {0, 0, 0};
}

}  // namespace

Utf8Unit utf8_unit(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t first = byte(0);
  if (first < 0x80) return {Utf8State::kCharacter, 1, first};
  const Lead lead = lead_of(first);
  if (lead.following == 0) return {Utf8State::kInvalid, 1, 0};
  char32_t code = first & (0x3F >> lead.following);
  uint8_t low = lead.low, high = lead.high;
  for (uint8_t i = 1; i <= lead.following; ++i) {
    if (i == text.size()) return {Utf8State::kIncomplete, i, 0};
    if (byte(i) < low || byte(i) > high) return {Utf8State::kInvalid, i, 0};
    code = code << 6 | (byte(i) & 0x3F);
    low = 0x80;
    high = 0xBF;
  }
  return {Utf8State::kCharacter, static_cast<uint8_t>(lead.following + 1), code};
}

bool is_valid_utf8(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    while (i + 8 <= text.size()) {
      uint64_t eight;
      std::memcpy(&eight, text.data() + i, 8);
      if ((eight & 0x8080808080808080u) != 0) break;
      i += 8;
    }
    if (i == text.size()) break;
    const Utf8Unit unit = utf8_unit(text.substr(i));
    if (unit.state != Utf8State::kCharacter) return false;
    i += unit.size;
  }
  return true;
}

void append_lossy_utf8(std::string_view text, std::string* out) {
  size_t begin = 0;  // of the valid part not yet appended
  size_t i = 0;
  while (i < text.size()) {
    const Utf8Unit unit = utf8_unit(text.substr(i));
    if (unit.state != Utf8State::kCharacter) {
      out->append(text.substr(begin, i - begin));
      out->append(kReplacementCharacter);
      begin = i + unit.size;
    }
    i += unit.size;
  }
  out->append(text.substr(begin));
}

void append_utf8(char32_t code, std::string* out) {
  const auto push = [&](char32_t b) { out->push_back(static_cast<char>(b)); };
  if (code < 0x80) {
    push(code);
  } else if (code < 0x800) {
    push(0xC0 | code >> 6);
    push(0x80 | (code & 0x3F));
  } else if (code < 0x10000) {
    push(0xE0 | code >> 12);
    push(0x80 | (code >> 6 & 0x3F));
    push(0x80 | (code & 0x3F));
  } else {
    push(0xF0 | code >> 18);
    push(0x80 | (code >> 12 & 0x3F));
    push(0x80 | (code >> 6 & 0x3F));
    push(0x80 | (code & 0x3F));
  }
}

}  // namespace dsv3
