// The regular expressions of pre-tokenizers. Hugging Face's tokenizers run them with Oniguruma
// (Ruby syntax, UTF-8); here PCRE2 does, with its JIT compiler where the system lets it. A pattern
// is first read and written anew in PCRE2's words (regex_syntax.cc), so that a construct that the
// two understand differently is either expressed exactly or refused by name.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "runtime/base/status.h"

namespace dsv3 {

// Rewrites an Oniguruma pattern for PCRE2; `where` opens every message.
Result<std::string> translate_pattern(std::string_view pattern, const std::string& where);

class Regex {
 public:
  // `pattern` in Oniguruma's syntax.
  static Result<Regex> compile(std::string_view pattern, const std::string& where);
  // Matches exactly `text`.
  static Result<Regex> literal(std::string_view text, const std::string& where);
  Regex(Regex&&) noexcept;
  Regex& operator=(Regex&&) noexcept;
  ~Regex();

  // Where matching keeps its state: one per thread, usable with every Regex.
  class Scratch {
   public:
    Scratch();
    ~Scratch();
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    bool ok() const { return rep_ != nullptr; }  // false: out of memory

   private:
    friend class Regex;
    struct Rep;
    std::unique_ptr<Rep> rep_;
  };

  // The leftmost match at or after `start` in `subject` (valid UTF-8, `start` between characters).
  // 1: found, 0: there is none, negative: error() tells why it could not be searched.
  int find(std::string_view subject, size_t start, Scratch* scratch, size_t* begin,
           size_t* end) const;
  Status error(int code) const;

 private:
  Regex() = default;
  static Result<Regex> build(const std::string& translated, std::string_view shown,
                             const std::string& where);
  int find_slowly(std::string_view subject, size_t start, Scratch* scratch) const;
  struct Rep;
  std::unique_ptr<Rep> rep_;
};

}  // namespace dsv3
