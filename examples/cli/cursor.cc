#include "cursor.h"

#include <algorithm>

namespace cli {

namespace {

bool begins_character(char c) { return (static_cast<unsigned char>(c) & 0xC0) != 0x80; }

// Where a text should begin if it may not begin before `at`: behind the next line break, or at the
// next character where no line break follows.
size_t line_begin(std::string_view text, size_t at) {
  if (at == 0 || at >= text.size()) return std::min(at, text.size());
  const size_t newline = text.find('\n', at - 1);
  if (newline != std::string_view::npos && newline + 1 < text.size()) return newline + 1;
  while (at < text.size() && !begins_character(text[at])) ++at;
  return at;
}

// Where a text should end if it may not end behind `at`: behind the last line break, or between two
// characters where no line break comes before.
size_t line_end(std::string_view text, size_t at) {
  if (at == 0 || at >= text.size()) return std::min(at, text.size());
  const size_t newline = text.rfind('\n', at - 1);
  if (newline != std::string_view::npos) return newline + 1;
  while (at > 0 && !begins_character(text[at])) --at;
  return at;
}

// No token of a real text is longer on average than this: texts beyond it need not be tokenized
// to know that they are too long.
constexpr size_t kMostBytesPerToken = 128;

// The last lines of `text` that have at most `budget` tokens; *count receives how many.
std::string_view keep_end(const dsv3_model* model, std::string_view text, uint64_t budget,
                          uint64_t* count) {
  size_t begin = 0;
  if (text.size() > budget * kMostBytesPerToken) {
    begin = line_begin(text, text.size() - budget * kMostBytesPerToken);
  }
  for (;;) {
    const std::string_view rest = text.substr(begin);
    const std::vector<int32_t> tokens = tokenize(model, rest, 0);
    *count = tokens.size();
    if (*count <= budget) return rest;
    // The last `budget` tokens show where to cut; the cut may change the tokens beside it, so that
    // the result is counted again.
    const size_t extra = tokens.size() - budget;
    const size_t dropped = detokenize(model, tokens.data(), extra, 0).size();
    begin = line_begin(text, std::min(text.size(), begin + std::max<size_t>(dropped, 1)));
  }
}

// The first lines of `text` that have at most `budget` tokens.
std::string_view keep_begin(const dsv3_model* model, std::string_view text, uint64_t budget,
                            uint64_t* count) {
  size_t end = text.size();
  if (text.size() > budget * kMostBytesPerToken) {
    end = line_end(text, budget * kMostBytesPerToken);
  }
  for (;;) {
    const std::string_view rest = text.substr(0, end);
    const std::vector<int32_t> tokens = tokenize(model, rest, 0);
    *count = tokens.size();
    if (*count <= budget) return rest;
    const size_t extra = tokens.size() - budget;
    const size_t dropped = detokenize(model, tokens.data() + budget, extra, 0).size();
    end = line_end(text, end - std::min(end, std::max<size_t>(dropped, 1)));
  }
}

}  // namespace

Cursor split_at(const std::string& text, const std::string& path, uint64_t line, uint64_t column) {
  size_t begin = 0;
  uint64_t number = 1;
  for (; number < line; ++number) {
    const size_t newline = text.find('\n', begin);
    if (newline == std::string::npos) break;
    begin = newline + 1;
  }
  if (number < line) {
    throw Misuse(format("%s: has no line %llu, its last line is %llu", path.c_str(),
                        static_cast<unsigned long long>(line),
                        static_cast<unsigned long long>(number)));
  }
  size_t end = std::min(text.find('\n', begin), text.size());
  if (end > begin && text[end - 1] == '\r') --end;
  if (column == 0) return {text.substr(0, end), text.substr(end)};
  size_t at = begin;
  uint64_t here = 1;
  for (; here < column && at < end; ++here) {
    ++at;
    while (at < end && !begins_character(text[at])) ++at;
  }
  if (here < column) {
    throw Misuse(format("%s: line %llu has no column %llu, its end is column %llu", path.c_str(),
                        static_cast<unsigned long long>(line),
                        static_cast<unsigned long long>(column),
                        static_cast<unsigned long long>(here)));
  }
  return {text.substr(0, at), text.substr(at)};
}

Fitted fit(const dsv3_model* model, const Cursor& cursor, uint64_t budget) {
  Fitted out;
  const uint64_t quarter = budget / 4;
  // First the suffix in its quarter, then the prefix in the rest, then the suffix again in what the
  // prefix has left over.
  std::string_view suffix = keep_begin(model, cursor.suffix, quarter, &out.suffix_tokens);
  const std::string_view prefix =
      keep_end(model, cursor.prefix, budget - out.suffix_tokens, &out.prefix_tokens);
  if (suffix.size() < cursor.suffix.size() && out.prefix_tokens + out.suffix_tokens < budget) {
    suffix = keep_begin(model, cursor.suffix, budget - out.prefix_tokens, &out.suffix_tokens);
  }
  out.dropped_before = cursor.prefix.size() - prefix.size();
  out.dropped_after = cursor.suffix.size() - suffix.size();
  out.cursor = {std::string(prefix), std::string(suffix)};
  return out;
}

}  // namespace cli
