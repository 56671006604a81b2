// Byte-level BPE as Hugging Face's `tokenizer.json` describes it, identical to the Rust tokenizers.
//
// The converter compiles a checkpoint's tokenizer files into an image (flat little-endian arrays
// and strings) that lies in the .dsv3 header; opening a model validates the image and uses it in
// place. A Tokenizer is immutable: any number of threads may use one.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/status.h"

namespace dsv3 {

struct EncodeOptions {
  // Matches added tokens' texts ("<｜User｜>") in the input, as the original does. Off: their text
  // is encoded as plain text, so that what a user typed can never become a control token.
  bool parse_special = false;
};

// A stretch of a text of which only some stretches are read for special tokens.
struct TextPart {
  std::string_view text;
  bool parse_special = false;
};

class Tokenizer {
 public:
  // Compiles tokenizer.json (+ tokenizer_config.json, special_tokens_map.json where present) of a
  // checkpoint folder into an image. A kind of normaliser, pre-tokenizer, model or decoder that is
  // not implemented is refused by name, as is a folder that has only tiktoken.model.
  static Result<std::string> compile(const std::string& checkpoint_dir);
  // The same from the text of a tokenizer.json; `where` names it in errors.
  static Result<std::string> compile_json(std::string_view tokenizer_json,
                                          std::string_view tokenizer_config_json,
                                          const std::string& where);
  // Validates an image (any bytes are safe) and uses it in place: it must outlive the tokenizer.
  static Result<Tokenizer> open(std::span<const uint8_t> image, const std::string& where);

  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Appends the tokens of `text` to *out. Never adds begin- or end-of-sentence tokens. Invalid
  // UTF-8 is encoded as U+FFFD per maximal invalid part (as Rust's from_utf8_lossy does).
  Status encode(std::string_view text, const EncodeOptions& options,
                std::vector<int32_t>* out) const;
  // The same for a text in parts. Tokens are those of the whole text, as if it had not been cut:
  // words reach across the seams, added tokens' texts do not.
  Status encode_parts(std::span<const TextPart> parts, std::vector<int32_t>* out) const;
  // Bytes of a token as they appear in text (an added token: its text). Empty for ids that no token
  // has. The view lives as long as the image or the tokenizer.
  std::string_view token_bytes(int32_t id) const;
  // Appends the bytes of the tokens; special tokens are left out when skip_special is set. An id
  // out of range is an error.
  Status decode(std::span<const int32_t> ids, bool skip_special, std::string* out) const;

  // One more than the greatest id.
  int32_t vocab_size() const;
  std::optional<int32_t> token_id(std::string_view text) const;  // exact text of an added token
  bool is_special(int32_t id) const;                             // an added token marked special
  bool is_added(int32_t id) const;
  std::optional<int32_t> bos_id() const;
  std::optional<int32_t> eos_id() const;
  bool add_bos() const;  // tokenizer_config.json's add_bos_token

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsv3
