// Oniguruma's Ruby syntax read and written anew for PCRE2. Only constructs whose meaning is known
// to be the same, or can be written out so that it is, pass; everything else is refused by name: a
// tokenizer that splits almost like the original is worse than none.
//
// What is written out, because the two disagree
//   \s \S  the property White_Space (PCRE2 adds U+180E)
//   \w \W  Alphabetic, marks, decimal digits and connector punctuation (PCRE2: L, N and _); outside
//          brackets, where Oniguruma looks Latin-1 up in a table of its own, superscripts and
//          fractions of it too
//   \p{Han} ...  the script itself (PCRE2: script extensions)
//   {,n}   at most n (PCRE2 10.42: literal text)
// and what both understand alike: alternation, groups, look-around, greedy, lazy and (after ? * +)
// possessive repeats, ^ and $ at lines, \A \Z \z, general categories.
#include <array>
#include <optional>
#include <vector>

#include "runtime/text/regex.h"
#include "runtime/text/utf8.h"

namespace dsv3 {
namespace {

constexpr size_t kMaxGroups = 100;  // nested

struct Named {
  std::string_view name, written;
};
// General categories under both of their names, lower case without '_', ' ' and '-'.
constexpr std::array kCategories = std::to_array<Named>({
    {"l", "L"},
    {"letter", "L"},
    {"lc", "L&"},
    {"casedletter", "L&"},
    {"lu", "Lu"},
    {"uppercaseletter", "Lu"},
    {"ll", "Ll"},
    {"lowercaseletter", "Ll"},
    {"lt", "Lt"},
    {"titlecaseletter", "Lt"},
    {"lm", "Lm"},
    {"modifierletter", "Lm"},
    {"lo", "Lo"},
    {"otherletter", "Lo"},
    {"m", "M"},
    {"mark", "M"},
    {"combiningmark", "M"},
    {"mn", "Mn"},
    {"nonspacingmark", "Mn"},
    {"mc", "Mc"},
    {"spacingmark", "Mc"},
    {"me", "Me"},
    {"enclosingmark", "Me"},
    {"n", "N"},
    {"number", "N"},
    {"nd", "Nd"},
    {"decimalnumber", "Nd"},
    {"digit", "Nd"},
    {"nl", "Nl"},
    {"letternumber", "Nl"},
    {"no", "No"},
    {"othernumber", "No"},
    {"p", "P"},
    {"punctuation", "P"},
    {"pc", "Pc"},
    {"connectorpunctuation", "Pc"},
    {"pd", "Pd"},
    {"dashpunctuation", "Pd"},
    {"ps", "Ps"},
    {"openpunctuation", "Ps"},
    {"pe", "Pe"},
    {"closepunctuation", "Pe"},
    {"pi", "Pi"},
    {"initialpunctuation", "Pi"},
    {"pf", "Pf"},
    {"finalpunctuation", "Pf"},
    {"po", "Po"},
    {"otherpunctuation", "Po"},
    {"s", "S"},
    {"symbol", "S"},
    {"sm", "Sm"},
    {"mathsymbol", "Sm"},
    {"sc", "Sc"},
    {"currencysymbol", "Sc"},
    {"sk", "Sk"},
    {"modifiersymbol", "Sk"},
    {"so", "So"},
    {"othersymbol", "So"},
    {"z", "Z"},
    {"separator", "Z"},
    {"zs", "Zs"},
    {"spaceseparator", "Zs"},
    {"zl", "Zl"},
    {"lineseparator", "Zl"},
    {"zp", "Zp"},
    {"paragraphseparator", "Zp"},
    {"cc", "Cc"},
    {"control", "Cc"},
    {"cf", "Cf"},
    {"format", "Cf"},
    {"alphabetic", "Alphabetic"},
    {"alpha", "Alphabetic"},
    {"uppercase", "Uppercase"},
    {"upper", "Uppercase"},
    {"lowercase", "Lowercase"},
    {"lower", "Lowercase"},
    {"whitespace", "White_Space"},
    {"space", "White_Space"},
});
constexpr std::array kScripts = std::to_array<Named>({
    {"han", "Han"},         {"hiragana", "Hiragana"},   {"katakana", "Katakana"},
    {"hangul", "Hangul"},   {"bopomofo", "Bopomofo"},   {"latin", "Latin"},
    {"greek", "Greek"},     {"cyrillic", "Cyrillic"},   {"armenian", "Armenian"},
    {"hebrew", "Hebrew"},   {"arabic", "Arabic"},       {"devanagari", "Devanagari"},
    {"bengali", "Bengali"}, {"tamil", "Tamil"},         {"thai", "Thai"},
    {"lao", "Lao"},         {"tibetan", "Tibetan"},     {"georgian", "Georgian"},
    {"khmer", "Khmer"},     {"mongolian", "Mongolian"},
});

constexpr std::string_view kSpaceSet =
    "\\t-\\r\\x20\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}"
    "\\x{3000}";
constexpr std::string_view kWordSet = "\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}";
constexpr std::string_view kLatinNumbers = "\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}";

bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_alnum(char c) { return is_digit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z'); }

class Translator {
 public:
  Translator(std::string_view pattern, const std::string& where) : in_(pattern), where_(where) {}

  Result<std::string> run() {
    if (!is_valid_utf8(in_)) return refuse("bytes that are not UTF-8");
    // (?i) counts for the whole pattern when it opens it; elsewhere Ruby and Perl disagree about
    // how it meets alternation.
    if (in_.starts_with("(?i)")) {
      out_ = "(?i)";
      at_ = 4;
    }
    while (at_ < in_.size()) DSV3_TRY(element());
    if (depth_ > 0) return refuse("a group that is not closed");
    return std::move(out_);
  }

 private:
  Status refuse(const std::string& what) const {
    return make_error(Code::kUnsupported,
                      "%s: pattern \"%s\" contains %s at byte %zu, which is not implemented",
                      where_.c_str(), utf8_prefix(in_, 200).c_str(), what.c_str(), at_);
  }
  bool next_is(std::string_view text) const { return in_.substr(at_).starts_with(text); }
  bool more() const { return at_ < in_.size(); }

  Status element() {
    const char c = in_[at_];
    switch (c) {
      case '(':
        return open_group();
      case ')':
        if (depth_ == 0) return refuse("')' without '('");
        --depth_;
        return emit(1, ")", true);
      case '|':
        return emit(1, "|", false);
      case '^':
        return emit(1, "^", false);
      case '$':
        return emit(1, "$", false);
      case '.':
        return emit(1, ".", true);
      case '[':
        return char_class();
      case '?':
      case '*':
      case '+':
        return repeat();
      case '{':
        if (const auto interval = read_interval()) return bounded_repeat(*interval);
        return emit(1, "\\{", true);
      case '\\':
        return escape();
      default: {
        const size_t size = utf8_length(c);
        const std::string_view text = in_.substr(at_, size);
        if (size == 1 && !is_alnum(c)) return emit(1, format("\\x{%x}", unsigned(c)), true);
        return emit(size, std::string(text), true);
      }
    }
  }

  Status emit(size_t consumed, const std::string& text, bool repeatable) {
    at_ += consumed;
    out_ += text;
    repeatable_ = repeatable;
    return {};
  }

  Status open_group() {
    if (++depth_ > kMaxGroups) return refuse("groups nested too deeply");
    if (!next_is("(?")) return emit(1, "(?:", false);
    for (const std::string_view kind : {"(?:", "(?=", "(?!", "(?>", "(?<=", "(?<!", "(?i:"}) {
      if (next_is(kind)) return emit(kind.size(), std::string(kind), false);
    }
    if (next_is("(?<")) {  // a named group: the name has no use here
      size_t end = at_ + 3;
      while (end < in_.size() && (is_alnum(in_[end]) || in_[end] == '_')) ++end;
      if (end > at_ + 3 && end < in_.size() && in_[end] == '>') {
        return emit(end + 1 - at_, "(?:", false);
      }
    }
    return refuse("the group \"" + std::string(in_.substr(at_, 4)) + "\"");
  }

  Status repeat() {
    if (!repeatable_) return refuse("a repeat of nothing or of a repeat");
    std::string text(1, in_[at_]);
    ++at_;
    if (more() && (in_[at_] == '?' || in_[at_] == '+')) {
      text += in_[at_];
      ++at_;
    }
    return emit(0, text, false);
  }

  struct Interval {
    size_t size;  // of its text
    std::string low, high;
    bool exact;
  };
  // "{n}", "{n,}", "{,m}" or "{n,m}" here; anything else that begins with a brace is a brace.
  std::optional<Interval> read_interval() const {
    size_t i = at_ + 1;
    const auto digits = [&] {
      const size_t begin = i;
      while (i < in_.size() && is_digit(in_[i])) ++i;
      return std::string(in_.substr(begin, i - begin));
    };
    Interval result{0, digits(), "", true};
    if (i < in_.size() && in_[i] == ',') {
      ++i;
      result.exact = false;
      result.high = digits();
    }
    if (i >= in_.size() || in_[i] != '}') return std::nullopt;
    if (result.low.empty() && result.high.empty()) return std::nullopt;
    result.size = i + 1 - at_;
    return result;
  }
  Status bounded_repeat(const Interval& interval) {
    if (!repeatable_) return refuse("a repeat of nothing or of a repeat");
    if (interval.low.size() > 5 || interval.high.size() > 5) return refuse("a repeat this long");
    const std::string low = interval.low.empty() ? "0" : interval.low;
    if (!interval.high.empty() && std::stoi(interval.high) < std::stoi(low)) {
      return refuse("a repeat whose least exceeds its most");
    }
    const size_t after = at_ + interval.size;
    const char suffix = after < in_.size() ? in_[after] : '\0';
    // Ruby reads X{n}? as (?:X{n})? and X{n,m}+ as (?:X{n,m})+, unlike Perl.
    if (suffix == '+' || (suffix == '?' && interval.exact)) {
      return refuse("a suffix behind a counted repeat");
    }
    std::string text = "{" + low + (interval.exact ? "" : "," + interval.high) + "}";
    if (suffix == '?') text += "?";
    return emit(interval.size + (suffix == '?' ? 1 : 0), text, false);
  }

  // ---- escapes

  // A single character written as an escape at at_ (which is at the backslash), or nothing. Moves
  // at_.
  Result<std::optional<char32_t>> escaped_character() {
    if (at_ + 1 >= in_.size()) return refuse("a backslash at the end");
    const char c = in_[at_ + 1];
    const auto take = [&](size_t size, char32_t code) -> std::optional<char32_t> {
      at_ += size;
      return code;
    };
    switch (c) {
      case 't':
        return take(2, '\t');
      case 'n':
        return take(2, '\n');
      case 'r':
        return take(2, '\r');
      case 'f':
        return take(2, '\f');
      case 'v':
        return take(2, '\v');
      case 'a':
        return take(2, '\a');
      case 'e':
        return take(2, 0x1B);
      case 'u':
        return hex_character(at_ + 2, 4, 4, 0);
      case 'x':
        if (at_ + 2 < in_.size() && in_[at_ + 2] == '{') return hex_character(at_ + 3, 1, 8, '}');
        return hex_character(at_ + 2, 1, 2, 0);
      default:
        break;
    }
    if (is_alnum(c)) return std::optional<char32_t>();
    const Utf8Unit unit = utf8_unit(in_.substr(at_ + 1));
    return take(1 + unit.size, unit.code);
  }
  Result<std::optional<char32_t>> hex_character(size_t begin, size_t least, size_t most,
                                                char closing) {
    char32_t code = 0;
    size_t i = begin;
    for (; i < in_.size() && i - begin < most; ++i) {
      const char c = in_[i];
      const int digit = is_digit(c)              ? c - '0'
                        : (c >= 'a' && c <= 'f') ? c - 'a' + 10
                        : (c >= 'A' && c <= 'F') ? c - 'A' + 10
                                                 : -1;
      if (digit < 0) break;
      code = code * 16 + static_cast<char32_t>(digit);
      if (code > 0x10FFFF) return refuse("a code point beyond U+10FFFF");
    }
    if (i - begin < least) return refuse("an unfinished hexadecimal escape");
    if (closing != 0 && (i >= in_.size() || in_[i] != closing)) {
      return refuse("an unfinished hexadecimal escape");
    }
    if (code >= 0xD800 && code <= 0xDFFF) return refuse("a surrogate");
    // \xHH is a byte there and a character here; below 0x80 they are the same.
    if (closing == 0 && most == 2 && code >= 0x80) return refuse("a byte above \\x7F");
    at_ = i + (closing != 0 ? 1 : 0);
    return std::optional<char32_t>(code);
  }

  // A set escape (\s, \p{L}, ...) at at_: what stands inside brackets for it, or nothing when there
  // is no such set. Moves at_ on success.
  struct Set {
    std::string inside;   // inside [...]; empty: cannot be written there
    std::string outside;  // on its own
  };
  Result<std::optional<Set>> set_escape() {
    const char c = in_[at_ + 1];
    const auto take = [&](std::string inside, std::string outside) -> std::optional<Set> {
      at_ += 2;
      return Set{std::move(inside), std::move(outside)};
    };
    const std::string space(kSpaceSet), word(kWordSet), alone = word + std::string(kLatinNumbers);
    switch (c) {
      case 's':
        return take(space, "[" + space + "]");
      case 'S':
        return take("\\P{White_Space}", "[^" + space + "]");
      case 'w':
        return take(word, "[" + alone + "]");
      case 'W':
        return take("", "[^" + alone + "]");
      case 'd':
        return take("\\p{Nd}", "\\p{Nd}");
      case 'D':
        return take("\\P{Nd}", "\\P{Nd}");
      case 'p':
      case 'P':
        return property(c == 'P');
      default:
        return std::optional<Set>();
    }
  }
  Result<std::optional<Set>> property(bool negated) {
    const size_t close = in_.find('}', at_);
    if (at_ + 2 >= in_.size() || in_[at_ + 2] != '{' || close == std::string_view::npos) {
      return refuse("a property without braces");
    }
    std::string_view name = in_.substr(at_ + 3, close - at_ - 3);
    const std::string whole(in_.substr(at_, close + 1 - at_));
    if (name.starts_with('^')) {
      negated = !negated;
      name.remove_prefix(1);
    }
    std::string plain;
    for (const char c : name) {
      if (c == ' ' || c == '_' || c == '-') continue;
      plain += c >= 'A' && c <= 'Z' ? static_cast<char>(c + ('a' - 'A')) : c;
    }
    std::string written;
    for (const Named& n : kCategories) {
      if (n.name == plain) written = n.written;
    }
    for (const Named& n : kScripts) {
      if (n.name == plain) written = "sc:" + std::string(n.written);
    }
    if (written.empty()) return refuse("the property " + whole);
    at_ = close + 1;
    const std::string text = (negated ? "\\P{" : "\\p{") + written + "}";
    return std::optional<Set>(Set{text, text});
  }

  Status escape() {
    DSV3_ASSIGN(const std::optional<char32_t> code, escaped_character());
    if (code) return emit(0, format("\\x{%x}", static_cast<unsigned>(*code)), true);
    DSV3_ASSIGN(const std::optional<Set> set, set_escape());
    if (set) return emit(0, set->outside, true);
    const char c = in_[at_ + 1];
    if (c == 'A' || c == 'Z' || c == 'z') return emit(2, std::string("\\") + c, false);
    return refuse(std::string("the escape \\") + c);
  }

  // ---- [...]

  struct Item {
    bool is_set = false;
    char32_t code = 0;  // of a single character
    std::string set;
  };
  Result<Item> class_item() {
    Item item;
    if (in_[at_] == '\\') {
      DSV3_ASSIGN(const std::optional<char32_t> code, escaped_character());
      if (code) {
        item.code = *code;
        return item;
      }
      DSV3_ASSIGN(const std::optional<Set> set, set_escape());
      if (!set || set->inside.empty()) {
        return refuse("the escape \\" + std::string(1, set ? 'W' : in_[at_ + 1]) +
                      " inside brackets");
      }
      item.is_set = true;
      item.set = set->inside;
      return item;
    }
    if (in_[at_] == '[') return refuse("a set inside a set");
    if (next_is("&&")) return refuse("an intersection of sets");
    const Utf8Unit unit = utf8_unit(in_.substr(at_));
    item.code = unit.code;
    at_ += unit.size;
    return item;
  }
  Status char_class() {
    std::string text = "[";
    ++at_;
    if (next_is("^")) {
      text += '^';
      ++at_;
    }
    if (next_is("]")) return refuse("an empty set");
    const auto character = [](char32_t code) {
      return format("\\x{%x}", static_cast<unsigned>(code));
    };
    while (true) {
      if (!more()) return refuse("a set that is not closed");
      if (in_[at_] == ']') break;
      DSV3_ASSIGN(const Item first, class_item());
      text += first.is_set ? first.set : character(first.code);
      // A hyphen is itself at the end of a set and makes a range everywhere else.
      if (!next_is("-") || at_ + 1 >= in_.size() || in_[at_ + 1] == ']') continue;
      if (first.is_set) return refuse("a range that begins with a set");
      ++at_;
      DSV3_ASSIGN(const Item last, class_item());
      if (last.is_set) return refuse("a range that ends with a set");
      if (last.code < first.code) return refuse("a range whose end lies before its beginning");
      text.append("-").append(character(last.code));
    }
    return emit(1, text + "]", true);
  }

  const std::string_view in_;
  const std::string& where_;
  size_t at_ = 0;
  std::string out_;
  size_t depth_ = 0;
  bool repeatable_ = false;  // whether the last element may be repeated
};

}  // namespace

Result<std::string> translate_pattern(std::string_view pattern, const std::string& where) {
  return Translator(pattern, where).run();
}

}  // namespace dsv3
