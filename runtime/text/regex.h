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

  // Where matching keeps its state: one per thread and text, usable with every Regex. Searching in
  // `text_size` bytes ends in an error when it takes longer than a hundred times what any pattern
  // in use takes: patterns can be written whose work grows with the square of the text or worse.
  class Scratch {
   public:
    explicit Scratch(size_t text_size);
    struct Budget {
      int64_t ns;
    };
    explicit Scratch(Budget budget);  // with a time of its own
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
  int find_window(std::string_view subject, size_t start, size_t last, Scratch* scratch) const;
  int find_slowly(std::string_view subject, size_t start, Scratch* scratch) const;
  struct Rep;
  std::unique_ptr<Rep> rep_;
};

}  // namespace dsv3
