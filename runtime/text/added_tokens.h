// Finding the added tokens' texts in a text, as the original does: first the tokens that are not
// normalised, then, in what lies between those, the others; the leftmost match, of those the
// longest. Used by the tokenizer alone.
#pragma once

#include <array>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/status.h"
#include "runtime/text/image.h"
#include "runtime/text/regex.h"

namespace dsv3 {

class AddedTokens {
 public:
  static Result<AddedTokens> create(const TokenizerImage& image, const std::string& where);

  struct Part {
    uint32_t id;            // kNoId: text
    std::string_view text;  // of a part that is no token
  };
  // Splits `text` (valid UTF-8) into tokens and what lies between them.
  Status split(std::string_view text, Regex::Scratch* scratch, std::vector<Part>* out) const;
  // The added token with exactly this text; kNoId: none.
  uint32_t find(std::string_view text) const;

 private:
  struct Token {
    std::string_view text;
    uint32_t id, flags;
  };
  // Tokens that are looked for in one pass, sorted by text.
  struct Set {
    std::vector<Token> tokens;
    std::array<bool, 256> first{};  // bytes that one of them begins with
  };
  Status split_by(const Set& set, std::string_view text, Regex::Scratch* scratch,
                  std::vector<Part>* out) const;
  static const Token* longest_at(const Set& set, std::string_view text);
  Status is_word(std::string_view character, Regex::Scratch* scratch, bool* out) const;

  Set literal_, normalized_;
  std::optional<Regex> word_;  // a word character; where single_word occurs
};

}  // namespace dsv3
