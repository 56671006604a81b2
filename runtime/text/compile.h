// What a checkpoint's tokenizer files say, in plain form, and the image made of it. Between the
// reader of tokenizer.json (compile.cc) and the writer of the image (image_build.cc).
#pragma once

#include <string>
#include <vector>

#include "runtime/base/status.h"
#include "runtime/text/image.h"

namespace dsv3 {

struct TokenizerSource {
  struct Token {
    std::string bytes;  // as it appears in text
    uint8_t flags = 0;
    // False for tokens whose spelling is not in the byte-level alphabet: no merge can reach them.
    bool byte_level = false;
  };
  struct Merge {
    uint32_t left, right, result, rank;
  };
  struct Added {
    uint32_t id, flags;
  };
  struct Step {
    SplitBehavior behavior = SplitBehavior::kIsolated;
    bool invert = false;
    bool literal = false;  // the pattern is a text, not a regular expression
    std::string pattern;
  };
  std::vector<Token> tokens;  // by id
  std::vector<Merge> merges;
  std::vector<Added> added;
  std::vector<Step> steps;
  uint32_t bos = kNoId, eos = kNoId;
  uint32_t flags = 0;  // of the image
};

// `where` (the file's name) opens every message.
Result<std::string> build_image(const TokenizerSource& source, const std::string& where);

}  // namespace dsv3
