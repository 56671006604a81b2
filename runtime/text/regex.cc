#include "runtime/text/regex.h"

#include <pcre2.h>

#include "runtime/text/utf8.h"

namespace dsv3 {
namespace {

// Backtracking beyond these is an error and not a hang: `(a+)+b` stops after well under a second.
// The family's own patterns stay below a thousandth of them on any text, because none nests
// repeats.
constexpr uint32_t kMatchLimit = 2'000'000;
constexpr uint32_t kDepthLimit = 200'000;
constexpr uint32_t kHeapLimitKib = 64 * 1024;
// The JIT code first uses 32 KiB of the thread's own stack; only where that does not do is a stack
// of its own made.
constexpr size_t kJitStackStart = 64 * 1024;
constexpr size_t kJitStackMax = size_t{16} << 20;
constexpr size_t kMaxPatternBytes = 64 * 1024;

}  // namespace

struct Regex::Rep {
  pcre2_code* code = nullptr;
  bool jit = false;
  std::string shown;  // the pattern as its file has it
  std::string where;
  ~Rep() { pcre2_code_free(code); }
};

struct Regex::Scratch::Rep {
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = nullptr;
  ~Rep() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    if (stack != nullptr) pcre2_jit_stack_free(stack);
  }
};

Regex::Scratch::Scratch() : rep_(std::make_unique<Rep>()) {
  if (rep_->data == nullptr || rep_->context == nullptr) {
    rep_.reset();
    return;
  }
  pcre2_set_match_limit(rep_->context, kMatchLimit);
  pcre2_set_depth_limit(rep_->context, kDepthLimit);
  pcre2_set_heap_limit(rep_->context, kHeapLimitKib);
}
Regex::Scratch::~Scratch() = default;

Regex::Regex(Regex&&) noexcept = default;
Regex& Regex::operator=(Regex&&) noexcept = default;
Regex::~Regex() = default;

Result<Regex> Regex::compile(std::string_view pattern, const std::string& where) {
  if (pattern.size() > kMaxPatternBytes) {
    return make_error(Code::kUnsupported, "%s: pattern of %zu bytes, expected at most %zu",
                      where.c_str(), pattern.size(), kMaxPatternBytes);
  }
  DSV3_ASSIGN(const std::string translated, translate_pattern(pattern, where));
  return build(translated, pattern, where);
}

Result<Regex> Regex::literal(std::string_view text, const std::string& where) {
  if (text.size() > kMaxPatternBytes || !is_valid_utf8(text)) {
    return make_error(Code::kUnsupported,
                      "%s: a text of %zu bytes to split at, expected UTF-8 of at most %zu",
                      where.c_str(), text.size(), kMaxPatternBytes);
  }
  std::string translated;
  for (const char c : text) {
    if (static_cast<uint8_t>(c) < 0x80) {
      translated += format("\\x{%x}", static_cast<unsigned>(c));
    } else {
      translated += c;
    }
  }
  return build(translated, text, where);
}

Result<Regex> Regex::build(const std::string& translated, std::string_view shown,
                           const std::string& where) {
  Regex regex;
  regex.rep_ = std::make_unique<Rep>();
  regex.rep_->shown = std::string(shown);
  regex.rep_->where = where;
  const std::unique_ptr<pcre2_compile_context, decltype(&pcre2_compile_context_free)> context(
      pcre2_compile_context_create(nullptr), &pcre2_compile_context_free);
  if (context == nullptr) return make_error(Code::kOutOfMemory, "out of memory");
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  // MULTILINE: in Ruby's syntax ^ and $ always mean lines.
  constexpr uint32_t kOptions = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NO_AUTO_CAPTURE |
                                PCRE2_NEVER_BACKSLASH_C | PCRE2_NO_UTF_CHECK;
  int code = 0;
  PCRE2_SIZE offset = 0;
  regex.rep_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()),
                                   translated.size(), kOptions, &code, &offset, context.get());
  if (regex.rep_->code == nullptr) {
    char reason[256] = "";
    pcre2_get_error_message(code, reinterpret_cast<PCRE2_UCHAR*>(reason), sizeof(reason));
    return make_error(Code::kUnsupported, "%s: pattern \"%.200s\" cannot be used: %s",
                      where.c_str(), regex.rep_->shown.c_str(), reason);
  }
  // Systems that forbid memory both writable and executable refuse the JIT; the interpreter works
  // everywhere.
  regex.rep_->jit = pcre2_jit_compile(regex.rep_->code, PCRE2_JIT_COMPLETE) == 0;
  return regex;
}

int Regex::find(std::string_view subject, size_t start, Scratch* scratch, size_t* begin,
                size_t* end) const {
  Scratch::Rep& state = *scratch->rep_;
  int code = PCRE2_ERROR_JIT_BADOPTION;
  if (rep_->jit) {
    code = pcre2_jit_match(rep_->code, reinterpret_cast<PCRE2_SPTR>(subject.data()), subject.size(),
                           start, PCRE2_NO_UTF_CHECK, state.data, state.context);
  }
  if (code == PCRE2_ERROR_JIT_BADOPTION || code == PCRE2_ERROR_JIT_STACKLIMIT) {
    code = find_slowly(subject, start, scratch);
  }
  if (code == PCRE2_ERROR_NOMATCH) return 0;
  if (code < 0) return code;
  const PCRE2_SIZE* span = pcre2_get_ovector_pointer(state.data);
  *begin = span[0];
  *end = span[1];
  return 1;
}

int Regex::find_slowly(std::string_view subject, size_t start, Scratch* scratch) const {
  Scratch::Rep& state = *scratch->rep_;
  const auto* bytes = reinterpret_cast<PCRE2_SPTR>(subject.data());
  if (rep_->jit && state.stack == nullptr) {
    state.stack = pcre2_jit_stack_create(kJitStackStart, kJitStackMax, nullptr);
    if (state.stack != nullptr) {
      pcre2_jit_stack_assign(state.context, nullptr, state.stack);
      const int code = pcre2_jit_match(rep_->code, bytes, subject.size(), start, PCRE2_NO_UTF_CHECK,
                                       state.data, state.context);
      if (code != PCRE2_ERROR_JIT_STACKLIMIT) return code;
    }
  }
  return pcre2_match(rep_->code, bytes, subject.size(), start, PCRE2_NO_UTF_CHECK | PCRE2_NO_JIT,
                     state.data, state.context);
}

Status Regex::error(int code) const {
  char reason[256] = "";
  pcre2_get_error_message(code, reinterpret_cast<PCRE2_UCHAR*>(reason), sizeof(reason));
  return make_error(code == PCRE2_ERROR_NOMEMORY ? Code::kOutOfMemory : Code::kCapacity,
                    "%s: pattern \"%.200s\" needs too much work on this text: %s",
                    rep_->where.c_str(), rep_->shown.c_str(), reason);
}

}  // namespace dsv3
