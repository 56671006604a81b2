#include "runtime/text/regex.h"

#include <pcre2.h>

#include <algorithm>

#include "runtime/base/os.h"
#include "runtime/text/utf8.h"

namespace dsv3 {
namespace {

// Backtracking beyond these from one place is an error and not a hang: `(a+)+b` stops after some
// milliseconds.
constexpr uint32_t kMatchLimit = 2'000'000;
constexpr uint32_t kDepthLimit = 2'000'000;
constexpr uint32_t kHeapLimitKib = 64 * 1024;
// The limits above count anew at every place, so the places are tried in stretches with a look at
// the clock between them. Each is twice as long as the one before: PCRE2 may look through the whole
// rest of the text once per stretch.
constexpr size_t kFirstStretch = 1024;
constexpr uint32_t kSearchesPerLook = 256;
constexpr int64_t kBudgetNs = 5'000'000'000;
constexpr int64_t kBudgetNsPerByte = 10'000;  // 100 KB/s; the family's patterns run at 20 MB/s
constexpr size_t kMostCounted = INT64_MAX / 2 / kBudgetNsPerByte;
constexpr int kOutOfTime = -100'000;  // beside PCRE2's own codes
// The JIT code first uses 32 KiB of the thread's own stack; only where that does not do is a stack
// of its own made, whose untouched pages take no memory.
constexpr size_t kJitStackStart = 64 * 1024;
constexpr size_t kJitStackMax = size_t{64} << 20;
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
  int64_t budget_ns = 0;
  int64_t deadline = 0;  // set by the first look at the clock, so that short texts need none
  uint32_t searches = 0;
  size_t tried = 0;  // places at which nothing began, since the last look at the clock

  bool out_of_time() {
    const int64_t now = monotonic_ns();
    if (deadline == 0) deadline = now + budget_ns;
    return now > deadline;
  }
  ~Rep() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    if (stack != nullptr) pcre2_jit_stack_free(stack);
  }
};

Regex::Scratch::Scratch(size_t text_size)
    : Scratch(Budget{kBudgetNs +
                     static_cast<int64_t>(std::min(text_size, kMostCounted)) * kBudgetNsPerByte}) {}

Regex::Scratch::Scratch(Budget budget) : rep_(std::make_unique<Rep>()) {
  if (rep_->data == nullptr || rep_->context == nullptr) {
    rep_.reset();
    return;
  }
  pcre2_set_match_limit(rep_->context, kMatchLimit);
  pcre2_set_depth_limit(rep_->context, kDepthLimit);
  pcre2_set_heap_limit(rep_->context, kHeapLimitKib);
  rep_->budget_ns = budget.ns;
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
  if (context == nullptr) return make_memory_error("out of memory");
  pcre2_set_newline(context.get(), PCRE2_NEWLINE_LF);
  // MULTILINE: in Ruby's syntax ^ and $ always mean lines.
  constexpr uint32_t kOptions = PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE | PCRE2_NO_AUTO_CAPTURE |
                                PCRE2_NEVER_BACKSLASH_C | PCRE2_NO_UTF_CHECK |
                                PCRE2_USE_OFFSET_LIMIT;
  int code = 0;
  PCRE2_SIZE offset = 0;
  regex.rep_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()),
                                   translated.size(), kOptions, &code, &offset, context.get());
  if (code == PCRE2_ERROR_HEAP_FAILED) return make_memory_error("out of memory");
  if (regex.rep_->code == nullptr) {
    char reason[256] = "";
    pcre2_get_error_message(code, reinterpret_cast<PCRE2_UCHAR*>(reason), sizeof(reason));
    return make_error(Code::kUnsupported, "%s: pattern \"%s\" cannot be used: %s", where.c_str(),
                      utf8_prefix(regex.rep_->shown, 200).c_str(), reason);
  }
  // Systems that forbid memory both writable and executable refuse the JIT; the interpreter works
  // everywhere.
  regex.rep_->jit = pcre2_jit_compile(regex.rep_->code, PCRE2_JIT_COMPLETE) == 0;
  return regex;
}

int Regex::find(std::string_view subject, size_t start, Scratch* scratch, size_t* begin,
                size_t* end) const {
  Scratch::Rep& state = *scratch->rep_;
  const size_t first = start;
  if (++state.searches % kSearchesPerLook == 0 && state.out_of_time()) return kOutOfTime;
  for (size_t stretch = kFirstStretch;; stretch *= 2) {
    const size_t last = subject.size() - start <= stretch ? subject.size() : start + stretch;
    const int code = find_window(subject, start, last, scratch);
    if (code > 0) {
      const PCRE2_SIZE* span = pcre2_get_ovector_pointer(state.data);
      *begin = span[0];
      *end = span[1];
      // Places that were tried in vain count too, however few a search finds in its way.
      state.tried += *begin - first;
      if (state.tried < kFirstStretch) return 1;
      state.tried = 0;
      return state.out_of_time() ? kOutOfTime : 1;
    }
    if (code != PCRE2_ERROR_NOMATCH) return code;
    if (last == subject.size()) return 0;
    if (state.out_of_time()) return kOutOfTime;
    start = last + 1;
    while (start < subject.size() && (static_cast<uint8_t>(subject[start]) & 0xC0) == 0x80) ++start;
  }
}

// The leftmost match that begins in [start, last].
int Regex::find_window(std::string_view subject, size_t start, size_t last,
                       Scratch* scratch) const {
  Scratch::Rep& state = *scratch->rep_;
  pcre2_set_offset_limit(state.context, last);
  int code = PCRE2_ERROR_JIT_BADOPTION;
  if (rep_->jit) {
    code = pcre2_jit_match(rep_->code, reinterpret_cast<PCRE2_SPTR>(subject.data()), subject.size(),
                           start, PCRE2_NO_UTF_CHECK, state.data, state.context);
  }
  if (code == PCRE2_ERROR_JIT_BADOPTION || code == PCRE2_ERROR_JIT_STACKLIMIT) {
    code = find_slowly(subject, start, scratch);
  }
  return code;
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
  if (code == PCRE2_ERROR_NOMEMORY) return make_memory_error("out of memory");
  char reason[256] = "out of time";
  if (code != kOutOfTime) {
    pcre2_get_error_message(code, reinterpret_cast<PCRE2_UCHAR*>(reason), sizeof(reason));
  }
  return make_error(Code::kCapacity, "%s: pattern \"%s\" needs too much work on this text: %s",
                    rep_->where.c_str(), utf8_prefix(rep_->shown, 200).c_str(), reason);
}

}  // namespace dsv3
