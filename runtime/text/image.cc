#include "runtime/text/image.h"

#include <xxhash.h>

#include "runtime/text/utf8.h"

namespace dsv3 {
namespace {

Status corrupt(const std::string& where, const std::string& what) {
  return make_error(Code::kCorrupt, "%s: tokenizer image: %s", where.c_str(), what.c_str());
}
bool is_slot_count(uint32_t n) { return n != 0 && (n & (n - 1)) == 0; }

}  // namespace

uint32_t word_slot(std::string_view word, uint32_t slots) {
  return static_cast<uint32_t>(XXH3_64bits(word.data(), word.size())) & (slots - 1);
}

uint64_t image_checksum(std::span<const uint8_t> image) {
  return XXH3_64bits(image.data() + kChecksummedFrom, image.size() - kChecksummedFrom);
}

Result<TokenizerImage> TokenizerImage::open(std::span<const uint8_t> image,
                                            const std::string& where) {
  TokenizerImage result;
  DSV3_TRY(result.locate(image, where));
  if (result.header_.checksum != image_checksum(image)) {
    return corrupt(where, "its bytes do not match its checksum");
  }
  DSV3_TRY(result.check_tokens(where));
  DSV3_TRY(result.check_merges(where));
  DSV3_TRY(result.check_words(where));
  DSV3_TRY(result.check_added(where));
  DSV3_TRY(result.check_steps(where));
  return result;
}

Status TokenizerImage::locate(std::span<const uint8_t> image, const std::string& where) {
  if (image.size() < sizeof(ImageHeader)) {
    return corrupt(where,
                   format("%zu bytes, expected at least %zu", image.size(), sizeof(ImageHeader)));
  }
  std::memcpy(&header_, image.data(), sizeof(header_));
  if (std::memcmp(header_.magic, kImageMagic, sizeof(kImageMagic)) != 0) {
    return corrupt(where, "does not begin with its magic bytes");
  }
  if (header_.version != kImageVersion) {
    return make_error(Code::kUnsupported, "%s: tokenizer image has version %u, expected %u",
                      where.c_str(), header_.version, kImageVersion);
  }
  if (header_.size != image.size()) {
    return corrupt(where, format("%zu bytes, its header says %llu", image.size(),
                                 static_cast<unsigned long long>(header_.size)));
  }
  if (header_.vocab_size == 0 || header_.vocab_size > kMaxVocab) {
    return corrupt(where,
                   format("vocab_size is %u, expected 1 to %u", header_.vocab_size, kMaxVocab));
  }
  if (!is_slot_count(header_.merge_slots)) return corrupt(where, "merge_slots is no power of two");
  if (header_.word_slots != 0 && !is_slot_count(header_.word_slots)) {
    return corrupt(where, "word_slots is no power of two");
  }
  if (header_.step_count > kMaxSteps || header_.added_count > header_.vocab_size ||
      (header_.flags & ~kImageAllFlags) != 0 || header_.unused != 0 ||
      (header_.word_slots != 0) != ((header_.flags & kImageIgnoreMerges) != 0) ||
      header_.token_bytes > image.size() || header_.pattern_bytes > image.size()) {
    return corrupt(where, "a field of its header is out of range");
  }
  // None of these sums can overflow: every count is below 2^32 and every element below 32 bytes.
  size_t at = sizeof(ImageHeader);
  const auto place = [&](size_t count, size_t element) {
    const size_t begin = at;
    at += count * element;
    return begin;
  };
  const size_t offsets = place(size_t{header_.vocab_size} + 1, 4);
  const size_t byte_tokens = place(256, 4);
  const size_t merges = place(header_.merge_slots, sizeof(MergeSlot));
  const size_t words = place(header_.word_slots, 4);
  const size_t added = place(header_.added_count, sizeof(AddedSlot));
  const size_t steps = place(header_.step_count, sizeof(StepSlot));
  const size_t flags = place(header_.vocab_size, 1);
  const size_t text = place(header_.token_bytes, 1);
  const size_t patterns = place(header_.pattern_bytes, 1);
  if (at != image.size()) {
    return corrupt(where, format("its arrays take %zu bytes of %zu", at, image.size()));
  }
  const uint8_t* base = image.data();
  token_offsets_ = {base + offsets, size_t{header_.vocab_size} + 1};
  byte_tokens_ = {base + byte_tokens, 256};
  merges_ = {base + merges, header_.merge_slots};
  words_ = {base + words, header_.word_slots};
  added_ = {base + added, header_.added_count};
  steps_ = {base + steps, header_.step_count};
  token_flags_ = {base + flags, header_.vocab_size};
  text_ = {reinterpret_cast<const char*>(base + text), header_.token_bytes};
  patterns_ = {reinterpret_cast<const char*>(base + patterns), header_.pattern_bytes};
  return {};
}

Status TokenizerImage::check_tokens(const std::string& where) const {
  const uint32_t n = header_.vocab_size;
  uint32_t previous = token_offsets_[0];
  if (previous != 0 || token_offsets_[n] != text_.size()) {
    return corrupt(where, "the tokens' offsets do not span their bytes");
  }
  for (uint32_t id = 0; id < n; ++id) {
    const uint32_t next = token_offsets_[id + 1];
    if (next <= previous || next - previous > kMaxTokenBytes) {
      return corrupt(where, format("token %u ends at %u and begins at %u", id, next, previous));
    }
    previous = next;
    if (token_flags_[id] > (kTokenAdded | kTokenSpecial)) {
      return corrupt(where, format("token %u has unknown flags", id));
    }
  }
  for (int b = 0; b < 256; ++b) {
    const uint32_t id = byte_tokens_[b];
    // C0, C1 and F5 to FF occur in no UTF-8, and only them a vocabulary may lack.
    const bool needed = b < 0xC0 || (b > 0xC1 && b < 0xF5);
    if (id == kNoId && !needed) continue;
    if (id >= n || bytes(id) != std::string_view(reinterpret_cast<const char*>(&b), 1)) {
      return corrupt(where, format("the token of byte %d is %u", b, id));
    }
  }
  for (const uint32_t id : {header_.bos, header_.eos}) {
    if (id != kNoId && id >= n) return corrupt(where, format("token %u does not exist", id));
  }
  return {};
}

Status TokenizerImage::check_merges(const std::string& where) const {
  const uint32_t n = header_.vocab_size;
  uint32_t chain = 0;
  bool has_empty = false;
  for (uint32_t i = 0; i < header_.merge_slots; ++i) {
    const MergeSlot slot = merges_[i];
    if (slot.left == kNoId) {
      has_empty = true;
      chain = 0;
      continue;
    }
    if (++chain > kMaxChain) return corrupt(where, "its table of merges is too full");
    if (slot.left >= n || slot.right >= n || slot.result >= n || slot.rank == kNoId) {
      return corrupt(where, format("merge slot %u names tokens that do not exist", i));
    }
    // Lengths that add up cannot go round in circles.
    const auto length = [&](uint32_t id) { return token_offsets_[id + 1] - token_offsets_[id]; };
    if (length(slot.left) + length(slot.right) != length(slot.result)) {
      return corrupt(where, format("merge slot %u does not join its tokens", i));
    }
  }
  if (!has_empty) return corrupt(where, "its table of merges is full");
  return {};
}

Status TokenizerImage::check_words(const std::string& where) const {
  uint32_t chain = 0;
  bool has_empty = header_.word_slots == 0;
  for (uint32_t i = 0; i < header_.word_slots; ++i) {
    const uint32_t id = words_[i];
    if (id == kNoId) {
      has_empty = true;
      chain = 0;
    } else if (id >= header_.vocab_size || ++chain > kMaxChain) {
      return corrupt(where, format("word slot %u is out of range", i));
    }
  }
  return has_empty ? Status() : corrupt(where, "its table of words is full");
}

Status TokenizerImage::check_added(const std::string& where) const {
  std::string_view previous;
  for (uint32_t i = 0; i < header_.added_count; ++i) {
    const AddedSlot slot = added_[i];
    if (slot.id >= header_.vocab_size || slot.flags > 15 ||
        (token_flags_[slot.id] & kTokenAdded) == 0) {
      return corrupt(where, format("added token %u is out of range", i));
    }
    const std::string_view text = bytes(slot.id);
    if ((i > 0 && text <= previous) || !is_valid_utf8(text)) {
      return corrupt(where, format("added token %u is out of order or not UTF-8", i));
    }
    if (text.size() > kMaxAddedBytes) {
      return corrupt(where, format("added token %u has %zu bytes, expected at most %u", i,
                                   text.size(), kMaxAddedBytes));
    }
    previous = text;
  }
  return {};
}

Status TokenizerImage::check_steps(const std::string& where) const {
  uint64_t total = 0;
  for (uint32_t i = 0; i < header_.step_count; ++i) {
    const StepSlot slot = steps_[i];
    if (slot.behavior > static_cast<uint8_t>(SplitBehavior::kContiguous) || slot.invert > 1 ||
        slot.literal > 1 || slot.unused != 0) {
      return corrupt(where, format("step %u has unknown fields", i));
    }
    total += slot.pattern_size;
  }
  if (total != patterns_.size()) return corrupt(where, "its patterns do not span their bytes");
  return {};
}

uint32_t TokenizerImage::find_word(std::string_view word) const {
  if (header_.word_slots == 0) return kNoId;
  for (uint32_t i = word_slot(word, header_.word_slots);; i = (i + 1) & (header_.word_slots - 1)) {
    const uint32_t id = words_[i];
    if (id == kNoId || bytes(id) == word) return id;
  }
}

std::string_view TokenizerImage::pattern(size_t i) const {
  size_t begin = 0;
  for (size_t k = 0; k < i; ++k) begin += steps_[k].pattern_size;
  return patterns_.substr(begin, steps_[i].pattern_size);
}

}  // namespace dsv3
