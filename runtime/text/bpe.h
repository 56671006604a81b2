// Byte-pair merging of one word. Used by the tokenizer alone.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "runtime/text/image.h"

namespace dsv3 {

// Buffers of one thread, kept from word to word.
class BpeScratch {
 private:
  friend class Bpe;
  struct Symbol {
    uint32_t id;
    uint32_t previous, next;  // positions; kNoId at the ends
    uint32_t rank;            // of the merge with the next symbol; kNoId: they do not merge
    uint32_t result;          // of that merge
  };
  std::vector<Symbol> symbols_;  // one per byte of the word
  std::vector<uint64_t> queue_;  // a heap of rank << 32 | position, least first
};

class Bpe {
 public:
  // Longer words are refused by the caller.
  static constexpr size_t kMaxWordBytes = size_t{1} << 31;

  explicit Bpe(const TokenizerImage* image) : image_(image) {}
  // Appends the tokens of `word` (not empty, valid UTF-8).
  void encode(std::string_view word, BpeScratch* scratch, std::vector<int32_t>* out) const;

 private:
  void encode_short(std::string_view word, std::vector<int32_t>* out) const;
  void encode_long(std::string_view word, BpeScratch* scratch, std::vector<int32_t>* out) const;

  const TokenizerImage* image_;
};

}  // namespace dsv3
