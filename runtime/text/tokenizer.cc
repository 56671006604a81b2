#include "runtime/text/tokenizer.h"

#include <xxhash.h>

#include <algorithm>
#include <deque>

#include "runtime/text/added_tokens.h"
#include "runtime/text/bpe.h"
#include "runtime/text/image.h"
#include "runtime/text/pretokenize.h"
#include "runtime/text/utf8.h"

namespace dsv3 {

struct Tokenizer::Impl {
  TokenizerImage image;
  PreTokenizer pre_tokenizer;
  AddedTokens added;
};

namespace {

// Words repeat: source code of a megabyte has a quarter of a million words and some thousands of
// different ones. The tokens of a word that the same call has seen are copied from its output.
class WordCache {
 public:
  WordCache(std::string_view text, size_t out_begin) : text_(text), out_begin_(out_begin) {
    if (text.size() < kLeastText || text.size() > UINT32_MAX) return;
    entries_.resize(std::bit_ceil(std::min(text.size() / 8, kMostEntries)));
  }
  // Appends the tokens of `word` if they are known.
  bool copy(std::string_view word, uint32_t slot, std::vector<int32_t>* out) const {
    const Entry& e = entries_[slot];
    if (e.word_size != word.size() || text_.substr(e.word, e.word_size) != word) return false;
    const size_t begin = out_begin_ + e.tokens;
    for (size_t i = begin; i < begin + e.token_count; ++i) out->push_back((*out)[i]);
    return true;
  }
  void remember(std::string_view word, uint32_t slot, size_t begin, size_t end) {
    if (end - out_begin_ > UINT32_MAX) return;
    entries_[slot] = {static_cast<uint32_t>(word.data() - text_.data()),
                      static_cast<uint32_t>(word.size()), static_cast<uint32_t>(begin - out_begin_),
                      static_cast<uint32_t>(end - begin)};
  }
  bool worth_it(std::string_view word) const {
    return !entries_.empty() && word.size() > 1 && word.size() <= kLongestWord;
  }
  uint32_t slot(std::string_view word) const {
    return static_cast<uint32_t>(XXH3_64bits(word.data(), word.size())) &
           static_cast<uint32_t>(entries_.size() - 1);
  }

 private:
  static constexpr size_t kLeastText = 256;
  static constexpr size_t kMostEntries = 8192;
  static constexpr size_t kLongestWord = 256;
  struct Entry {
    uint32_t word = 0, word_size = 0;      // in text_
    uint32_t tokens = 0, token_count = 0;  // in the output, from out_begin_ on
  };
  const std::string_view text_;
  const size_t out_begin_;
  std::vector<Entry> entries_;
};

// One call of encode().
class Encoder final : public WordSink {
 public:
  Encoder(const TokenizerImage& image, std::string_view text, std::vector<int32_t>* out)
      : bpe_(&image), cache_(text, out->size()), out_(out) {}

  Status word(std::string_view word, bool moved) override {
    if (word.size() > Bpe::kMaxWordBytes) {
      return make_error(Code::kCapacity, "text: a word of %zu bytes, expected at most %zu",
                        word.size(), Bpe::kMaxWordBytes);
    }
    if (moved || !cache_.worth_it(word)) {
      bpe_.encode(word, &scratch_, out_);
      return {};
    }
    const uint32_t slot = cache_.slot(word);
    if (cache_.copy(word, slot, out_)) return {};
    const size_t begin = out_->size();
    bpe_.encode(word, &scratch_, out_);
    cache_.remember(word, slot, begin, out_->size());
    return {};
  }

 private:
  Bpe bpe_;
  BpeScratch scratch_;
  WordCache cache_;
  std::vector<int32_t>* const out_;
};

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

Result<Tokenizer> Tokenizer::open(std::span<const uint8_t> bytes, const std::string& where) {
  DSV3_ASSIGN(const TokenizerImage image, TokenizerImage::open(bytes, where));
  DSV3_ASSIGN(PreTokenizer pre_tokenizer, PreTokenizer::create(image, where));
  DSV3_ASSIGN(AddedTokens added, AddedTokens::create(image, where));
  return Tokenizer(std::make_unique<Impl>(Impl{image, std::move(pre_tokenizer), std::move(added)}));
}

Status Tokenizer::encode(std::string_view text, const EncodeOptions& options,
                         std::vector<int32_t>* out) const {
  const TextPart part{text, options.parse_special};
  return encode_parts({&part, 1}, out);
}

Status Tokenizer::encode_parts(std::span<const TextPart> parts, std::vector<int32_t>* out) const {
  size_t text_size = 0;
  for (const TextPart& part : parts) text_size += part.text.size();
  Regex::Scratch scratch(text_size);
  if (!scratch.ok()) return make_memory_error("out of memory");
  std::deque<std::string> repaired;  // what parts that are not UTF-8 became
  // Alternating texts and tokens; neighbouring texts are joined before they are encoded.
  std::vector<AddedTokens::Part> pieces;
  for (const TextPart& part : parts) {
    std::string_view text = part.text;
    if (!is_valid_utf8(text)) {
      repaired.emplace_back();
      append_lossy_utf8(text, &repaired.back());
      text = repaired.back();
    }
    if (part.parse_special) {
      DSV3_TRY(impl_->added.split(text, &scratch, &pieces));
    } else {
      pieces.push_back({kNoId, text});
    }
  }
  const size_t begin = out->size();
  for (size_t i = 0; i < pieces.size();) {
    if (pieces[i].id != kNoId) {
      out->push_back(static_cast<int32_t>(pieces[i++].id));
      continue;
    }
    std::string joined;
    std::string_view text = pieces[i++].text;
    if (i < pieces.size() && pieces[i].id == kNoId) {
      joined = text;
      for (; i < pieces.size() && pieces[i].id == kNoId; ++i) joined += pieces[i].text;
      text = joined;
    }
    Encoder encoder(impl_->image, text, out);
    Status status = impl_->pre_tokenizer.split(text, &scratch, &encoder);
    if (!status.ok()) {
      out->resize(begin);
      return status;
    }
  }
  return {};
}

std::string_view Tokenizer::token_bytes(int32_t id) const {
  if (id < 0 || id >= vocab_size()) return {};
  return impl_->image.bytes(static_cast<uint32_t>(id));
}

Status Tokenizer::decode(std::span<const int32_t> ids, bool skip_special, std::string* out) const {
  const size_t begin = out->size();
  for (const int32_t id : ids) {
    if (id < 0 || id >= vocab_size()) {
      out->resize(begin);
      return make_field_error(Code::kInvalidArgument, "ids", "token id %d, expected 0 to %d", id,
                              vocab_size() - 1);
    }
    if (skip_special && is_special(id)) continue;
    out->append(token_bytes(id));
  }
  return {};
}

int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(impl_->image.vocab_size()); }

std::optional<int32_t> Tokenizer::token_id(std::string_view text) const {
  const uint32_t id = impl_->added.find(text);
  return id == kNoId ? std::nullopt : std::optional<int32_t>(static_cast<int32_t>(id));
}
bool Tokenizer::is_special(int32_t id) const {
  return id >= 0 && id < vocab_size() &&
         (impl_->image.token_flags(static_cast<uint32_t>(id)) & kTokenSpecial) != 0;
}
bool Tokenizer::is_added(int32_t id) const {
  return id >= 0 && id < vocab_size() &&
         (impl_->image.token_flags(static_cast<uint32_t>(id)) & kTokenAdded) != 0;
}
std::optional<int32_t> Tokenizer::bos_id() const {
  const uint32_t id = impl_->image.header().bos;
  return id == kNoId ? std::nullopt : std::optional<int32_t>(static_cast<int32_t>(id));
}
std::optional<int32_t> Tokenizer::eos_id() const {
  const uint32_t id = impl_->image.header().eos;
  return id == kNoId ? std::nullopt : std::optional<int32_t>(static_cast<int32_t>(id));
}
bool Tokenizer::add_bos() const { return (impl_->image.header().flags & kImageAddBos) != 0; }

}  // namespace dsv3
