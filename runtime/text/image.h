// The compiled tokenizer: one flat run of little-endian arrays that is used where it lies (in the
// mapped .dsv3 header), whatever its alignment. ImageBuilder (compile.cc) writes it; TokenizerImage
// checks every size, offset and id once, so that nobody behind it has to.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

#include "runtime/base/status.h"

namespace dsv3 {

static_assert(std::endian::native == std::endian::little, "images are little-endian");

inline constexpr char kImageMagic[8] = {'D', 'S', 'V', '3', 'T', 'O', 'K', '\n'};
inline constexpr uint32_t kImageVersion = 1;

inline constexpr uint32_t kMaxTokenBytes = 1 << 16;
// Of an added token: each is looked for at every byte of a text. Published ones have up to 33
// bytes.
inline constexpr uint32_t kMaxAddedBytes = 1024;
inline constexpr uint32_t kMaxVocab = 1 << 24;
inline constexpr uint32_t kMaxSteps = 64;
inline constexpr uint32_t kNoId = UINT32_MAX;
// Chains of a hash table longer than this come from damage or malice.
inline constexpr uint32_t kMaxChain = 4096;

// Token flags.
inline constexpr uint8_t kTokenAdded = 1;
inline constexpr uint8_t kTokenSpecial = 2;
// Added-token flags.
inline constexpr uint32_t kAddedNormalized = 1;
inline constexpr uint32_t kAddedSingleWord = 2;
inline constexpr uint32_t kAddedLstrip = 4;
inline constexpr uint32_t kAddedRstrip = 8;
// Header flags.
inline constexpr uint32_t kImageAddBos = 1;
inline constexpr uint32_t kImageIgnoreMerges = 2;
inline constexpr uint32_t kImagePrefixSpace = 4;  // the ByteLevel step's add_prefix_space
inline constexpr uint32_t kImageByteRegex = 8;    // the ByteLevel step's use_regex
inline constexpr uint32_t kImageAllFlags = 15;

struct ImageHeader {
  char magic[8];
  uint64_t checksum;  // XXH3 of all that follows this field
  uint32_t version;
  uint32_t flags;
  uint64_t size;         // of the whole image
  uint32_t vocab_size;   // one more than the greatest id
  uint32_t merge_slots;  // a power of two
  uint32_t word_slots;   // a power of two, or 0
  uint32_t added_count;
  uint32_t step_count;
  uint32_t bos, eos;       // kNoId: none
  uint32_t unused;         // 0
  uint64_t token_bytes;    // size of all tokens' bytes
  uint64_t pattern_bytes;  // size of all patterns
};
static_assert(sizeof(ImageHeader) == 80);
inline constexpr size_t kChecksumAt = 8;
inline constexpr size_t kChecksummedFrom = 16;

// A slot of the open-addressing table of merges: pair of tokens -> rank and result. Linear probing
// from merge_slot(). An empty slot has left = kNoId.
struct MergeSlot {
  uint32_t left, right, rank, result;
};
inline uint32_t merge_slot(uint32_t left, uint32_t right, uint32_t slots) {
  uint64_t h = (uint64_t{left} << 32 | right) * 0x9E3779B97F4A7C15u;
  h ^= h >> 32;
  return static_cast<uint32_t>(h) & (slots - 1);
}
struct AddedSlot {  // sorted by the token's bytes
  uint32_t id, flags;
};
enum class SplitBehavior : uint8_t {
  kIsolated,
  kRemoved,
  kMergedWithPrevious,
  kMergedWithNext,
  kContiguous
};
struct StepSlot {
  uint8_t behavior, invert, literal, unused;
  uint32_t pattern_size;  // patterns lie one behind the other
};

// Elements of a plain type at any alignment.
template <class T>
class FlatArray {
 public:
  FlatArray() = default;
  FlatArray(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  size_t size() const { return size_; }
  T operator[](size_t i) const {
    T value;
    std::memcpy(&value, data_ + i * sizeof(T), sizeof(T));
    return value;
  }

 private:
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

class TokenizerImage {
 public:
  // Any bytes are safe. `where` opens every message.
  static Result<TokenizerImage> open(std::span<const uint8_t> image, const std::string& where);

  const ImageHeader& header() const { return header_; }
  uint32_t vocab_size() const { return header_.vocab_size; }
  std::string_view bytes(uint32_t id) const {
    const uint32_t begin = token_offsets_[id];
    return text_.substr(begin, token_offsets_[id + 1] - begin);
  }
  uint8_t token_flags(uint32_t id) const { return token_flags_[id]; }
  // The token of one byte; kNoId for bytes that no valid UTF-8 contains.
  uint32_t byte_token(uint8_t b) const { return byte_tokens_[b]; }
  // The merge of two tokens; rank kNoId: they do not merge.
  MergeSlot find_merge(uint32_t left, uint32_t right) const {
    for (uint32_t i = merge_slot(left, right, header_.merge_slots);;
         i = (i + 1) & (header_.merge_slots - 1)) {
      const MergeSlot slot = merges_[i];
      if (slot.left == left && slot.right == right) return slot;
      if (slot.left == kNoId) return {left, right, kNoId, kNoId};
    }
  }
  // The token whose bytes are exactly `word`, among those that a word may become at once
  // (ignore_merges); kNoId: none.
  uint32_t find_word(std::string_view word) const;
  size_t added_count() const { return header_.added_count; }
  AddedSlot added(size_t i) const { return added_[i]; }
  size_t step_count() const { return header_.step_count; }
  StepSlot step(size_t i) const { return steps_[i]; }
  std::string_view pattern(size_t i) const;

 private:
  Status locate(std::span<const uint8_t> image, const std::string& where);
  Status check_tokens(const std::string& where) const;
  Status check_merges(const std::string& where) const;
  Status check_words(const std::string& where) const;
  Status check_added(const std::string& where) const;
  Status check_steps(const std::string& where) const;

  ImageHeader header_{};
  FlatArray<uint32_t> token_offsets_;  // [vocab_size + 1] into text_
  FlatArray<uint32_t> byte_tokens_;    // [256]
  FlatArray<MergeSlot> merges_;        // [merge_slots]
  FlatArray<uint32_t> words_;          // [word_slots] ids, kNoId: empty
  FlatArray<AddedSlot> added_;         // [added_count]
  FlatArray<StepSlot> steps_;          // [step_count]
  FlatArray<uint8_t> token_flags_;     // [vocab_size]
  std::string_view text_;              // [token_bytes]
  std::string_view patterns_;          // [pattern_bytes]
};

uint32_t word_slot(std::string_view word, uint32_t slots);
// XXH3 of an image's checksummed part; `image` is at least a header long.
uint64_t image_checksum(std::span<const uint8_t> image);

}  // namespace dsv3
