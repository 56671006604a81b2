#include "runtime/text/added_tokens.h"

#include <algorithm>

#include "runtime/text/utf8.h"

namespace dsv3 {
namespace {

bool is_white_space(char32_t c) {
  return (c >= 9 && c <= 13) || c == ' ' || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}
// Where the last character of `text` begins.
size_t last_character(std::string_view text) {
  size_t i = text.size() - 1;
  while (i > 0 && (static_cast<uint8_t>(text[i]) & 0xC0) == 0x80) --i;
  return i;
}
size_t white_space_at_start(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    const Utf8Unit unit = utf8_unit(text.substr(i));
    if (!is_white_space(unit.code)) break;
    i += unit.size;
  }
  return i;
}
// Where the white space that ends `text` begins.
size_t white_space_at_end(std::string_view text) {
  size_t end = text.size();
  while (end > 0) {
    const size_t i = last_character(text.substr(0, end));
    if (!is_white_space(utf8_unit(text.substr(i)).code)) break;
    end = i;
  }
  return end;
}

}  // namespace

Result<AddedTokens> AddedTokens::create(const TokenizerImage& image, const std::string& where) {
  AddedTokens result;
  bool has_single_word = false;
  for (size_t i = 0; i < image.added_count(); ++i) {
    const AddedSlot slot = image.added(i);
    const std::string_view text = image.bytes(slot.id);
    Set& set = (slot.flags & kAddedNormalized) != 0 ? result.normalized_ : result.literal_;
    set.tokens.push_back({text, slot.id, slot.flags});
    set.first[static_cast<uint8_t>(text[0])] = true;
    has_single_word |= (slot.flags & kAddedSingleWord) != 0;
  }
  if (has_single_word) {
    // Word characters as the original's library for this step has them: those of \w and the two
    // joiners.
    DSV3_ASSIGN(result.word_, Regex::compile("\\A[\\w\\u200C\\u200D]", where));
  }
  return result;
}

Status AddedTokens::split(std::string_view text, Regex::Scratch* scratch,
                          std::vector<Part>* out) const {
  if (normalized_.tokens.empty()) return split_by(literal_, text, scratch, out);
  std::vector<Part> parts;
  DSV3_TRY(split_by(literal_, text, scratch, &parts));
  for (const Part& part : parts) {
    if (part.id != kNoId) {
      out->push_back(part);
    } else {
      DSV3_TRY(split_by(normalized_, part.text, scratch, out));
    }
  }
  return {};
}

Status AddedTokens::split_by(const Set& set, std::string_view text, Regex::Scratch* scratch,
                             std::vector<Part>* out) const {
  size_t done = 0;  // end of what was put out; a token that takes white space reaches beyond `i`
  size_t space_end = 0;  // of the white space last looked at, so that no stretch is read twice
  for (size_t i = 0; i < text.size();) {
    if (!set.first[static_cast<uint8_t>(text[i])]) {
      ++i;
      continue;
    }
    const Token* token = longest_at(set, text.substr(i));
    if (token == nullptr) {
      ++i;
      continue;
    }
    size_t begin = i, end = i + token->text.size();
    i = end;
    if ((token->flags & kAddedSingleWord) != 0) {
      bool before = false, after = false;
      if (begin > 0) {
        const size_t last = last_character(text.substr(0, begin));
        DSV3_TRY(is_word(text.substr(last, begin - last), scratch, &before));
      }
      if (end < text.size()) {
        DSV3_TRY(is_word(text.substr(end, utf8_length(text[end])), scratch, &after));
      }
      if (before || after) continue;
    }
    if ((token->flags & kAddedLstrip) != 0) {
      begin = std::max(begin, done);
      begin = done + white_space_at_end(text.substr(done, begin - done));
    }
    if ((token->flags & kAddedRstrip) != 0) {
      if (end >= space_end) space_end = end + white_space_at_start(text.substr(end));
      end = space_end;
    }
    if (done < begin) out->push_back({kNoId, text.substr(done, begin - done)});
    out->push_back({token->id, {}});
    done = end;
  }
  if (done < text.size()) out->push_back({kNoId, text.substr(done)});
  return {};
}

// The tokens that begin with the first k bytes of the text are neighbours in the sorted list; their
// range narrows with every byte.
const AddedTokens::Token* AddedTokens::longest_at(const Set& set, std::string_view text) {
  auto low = set.tokens.begin();
  auto high = set.tokens.end();
  const Token* longest = nullptr;
  for (size_t k = 0; k < text.size() && low != high; ++k) {
    const auto b = static_cast<uint8_t>(text[k]);
    // Within the range, a token that ends here stands first.
    const auto byte_of = [k](const Token& t) { return static_cast<uint8_t>(t.text[k]); };
    if (low->text.size() == k) ++low;
    low = std::partition_point(low, high, [&](const Token& t) { return byte_of(t) < b; });
    high = std::partition_point(low, high, [&](const Token& t) { return byte_of(t) == b; });
    if (low != high && low->text.size() == k + 1) longest = &*low;
  }
  return longest;
}

Status AddedTokens::is_word(std::string_view character, Regex::Scratch* scratch, bool* out) const {
  size_t begin = 0, end = 0;
  const int found = word_->find(character, 0, scratch, &begin, &end);
  if (found < 0) return word_->error(found);
  *out = found > 0;
  return {};
}

uint32_t AddedTokens::find(std::string_view text) const {
  for (const Set* set : {&literal_, &normalized_}) {
    const auto it = std::lower_bound(set->tokens.begin(), set->tokens.end(), text,
                                     [](const Token& t, std::string_view s) { return t.text < s; });
    if (it != set->tokens.end() && it->text == text) return it->id;
  }
  return kNoId;
}

}  // namespace dsv3
