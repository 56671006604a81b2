#include <algorithm>

#include "runtime/text/compile.h"

namespace dsv3 {
namespace {

uint32_t slots_for(size_t count) {
  return std::bit_ceil(static_cast<uint32_t>(std::max<size_t>(count * 2, 2)));
}

template <class T>
void append_array(std::string* out, const std::vector<T>& values) {
  out->append(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

// The tables' hashes have no seed, since an image must be the same each time: keys can be chosen so
// that they collide. That ends here, before it takes time, and not only when the image is opened.
Status too_full(const std::string& where, const char* field) {
  return make_error(Code::kCorrupt, "%s: %s fills a hash table so that a look-up takes %u steps",
                    where.c_str(), field, kMaxChain);
}

Result<std::vector<MergeSlot>> merge_table(const TokenizerSource& source,
                                           const std::string& where) {
  const uint32_t slots = slots_for(source.merges.size());
  std::vector<MergeSlot> table(slots, {kNoId, kNoId, kNoId, kNoId});
  for (const TokenizerSource::Merge& m : source.merges) {
    uint32_t i = merge_slot(m.left, m.right, slots);
    uint32_t steps = 0;
    while (table[i].left != kNoId) {
      if (++steps == kMaxChain) return too_full(where, "model.merges");
      i = (i + 1) & (slots - 1);
    }
    table[i] = {m.left, m.right, m.rank, m.result};
  }
  return table;
}

// Words that become one token without any merging. Special tokens are left out: with special
// parsing off, nothing that a user writes becomes one.
Result<std::vector<uint32_t>> word_table(const TokenizerSource& source, const std::string& where) {
  if ((source.flags & kImageIgnoreMerges) == 0) return std::vector<uint32_t>();
  const uint32_t slots = slots_for(source.tokens.size());
  std::vector<uint32_t> table(slots, kNoId);
  for (uint32_t id = 0; id < source.tokens.size(); ++id) {
    const TokenizerSource::Token& token = source.tokens[id];
    if (!token.byte_level || (token.flags & kTokenSpecial) != 0) continue;
    uint32_t i = word_slot(token.bytes, slots);
    uint32_t steps = 0;
    while (table[i] != kNoId) {
      if (++steps == kMaxChain) return too_full(where, "model.vocab");
      i = (i + 1) & (slots - 1);
    }
    table[i] = id;
  }
  return table;
}

}  // namespace

Result<std::string> build_image(const TokenizerSource& source, const std::string& where) {
  const auto vocab_size = static_cast<uint32_t>(source.tokens.size());
  std::vector<uint32_t> offsets(1, 0);
  std::vector<uint32_t> byte_tokens(256, kNoId);
  std::vector<uint8_t> flags;
  std::string text, patterns;
  for (uint32_t id = 0; id < vocab_size; ++id) {
    const TokenizerSource::Token& token = source.tokens[id];
    text += token.bytes;
    if (text.size() > UINT32_MAX) {
      return make_error(Code::kUnsupported, "%s: the tokens' texts take more than 4 GiB",
                        where.c_str());
    }
    offsets.push_back(static_cast<uint32_t>(text.size()));
    flags.push_back(token.flags);
    if (token.byte_level && token.bytes.size() == 1) {
      byte_tokens[static_cast<uint8_t>(token.bytes[0])] = id;
    }
  }
  std::vector<AddedSlot> added;
  for (const TokenizerSource::Added& a : source.added) added.push_back({a.id, a.flags});
  std::sort(added.begin(), added.end(), [&](const AddedSlot& a, const AddedSlot& b) {
    return source.tokens[a.id].bytes < source.tokens[b.id].bytes;
  });
  std::vector<StepSlot> steps;
  for (const TokenizerSource::Step& step : source.steps) {
    steps.push_back({static_cast<uint8_t>(step.behavior), step.invert, step.literal, 0,
                     static_cast<uint32_t>(step.pattern.size())});
    patterns += step.pattern;
  }
  DSV3_ASSIGN(const std::vector<MergeSlot> merges, merge_table(source, where));
  DSV3_ASSIGN(const std::vector<uint32_t> words, word_table(source, where));

  ImageHeader header{};
  std::memcpy(header.magic, kImageMagic, sizeof(kImageMagic));
  header.version = kImageVersion;
  header.flags = source.flags;
  header.vocab_size = vocab_size;
  header.merge_slots = static_cast<uint32_t>(merges.size());
  header.word_slots = static_cast<uint32_t>(words.size());
  header.added_count = static_cast<uint32_t>(added.size());
  header.step_count = static_cast<uint32_t>(steps.size());
  header.bos = source.bos;
  header.eos = source.eos;
  header.token_bytes = text.size();
  header.pattern_bytes = patterns.size();
  std::string image(sizeof(header), '\0');
  append_array(&image, offsets);
  append_array(&image, byte_tokens);
  append_array(&image, merges);
  append_array(&image, words);
  append_array(&image, added);
  append_array(&image, steps);
  append_array(&image, flags);
  image += text;
  image += patterns;
  header.size = image.size();
  std::memcpy(image.data(), &header, sizeof(header));
  header.checksum = image_checksum({reinterpret_cast<const uint8_t*>(image.data()), image.size()});
  std::memcpy(image.data(), &header, sizeof(header));
  return image;
}

}  // namespace dsv3
