// The pre-tokenizer's pipeline and the patterns in it.
#include <doctest/doctest.h>

#include "runtime/text/compile.h"
#include "runtime/text/pretokenize.h"
#include "tests/unit/text_support.h"

namespace dsv3 {
namespace {

using Words = std::vector<std::string>;

class Collect final : public WordSink {
 public:
  Status word(std::string_view word, bool) override {
    words.emplace_back(word);
    return {};
  }
  Words words;
};

struct Pipeline {
  std::vector<TokenizerSource::Step> steps;
  uint32_t flags = 0;

  Result<Words> run(std::string_view text) const {
    TokenizerSource source;
    for (int b = 0; b < 256; ++b) {
      source.tokens.push_back({std::string(1, static_cast<char>(b)), 0, true});
    }
    source.steps = steps;
    source.flags = flags;
    DSV3_ASSIGN(const std::string image, build_image(source, "test"));
    DSV3_ASSIGN(const TokenizerImage view,
                TokenizerImage::open({reinterpret_cast<const uint8_t*>(image.data()), image.size()},
                                     "test"));
    DSV3_ASSIGN(const PreTokenizer pre, PreTokenizer::create(view, "test"));
    Regex::Scratch scratch(text.size());
    Collect collect;
    DSV3_TRY(pre.split(text, &scratch, &collect));
    return std::move(collect.words);
  }
};
Words split(const std::string& pattern, SplitBehavior behavior, std::string_view text,
            bool invert = false, bool literal = false) {
  Result<Words> words = Pipeline{{{behavior, invert, literal, pattern}}}.run(text);
  REQUIRE_MESSAGE(words.ok(), words.status().message());
  return std::move(*words);
}
Words isolated(const std::string& pattern, std::string_view text) {
  return split(pattern, SplitBehavior::kIsolated, text);
}

}  // namespace

TEST_CASE("behaviours, on the example that the original's documentation gives") {
  const char* text = "the-final--countdown";
  for (const bool literal : {false, true}) {
    const auto with = [&](SplitBehavior b) { return split("-", b, text, false, literal); };
    CHECK(with(SplitBehavior::kRemoved) == Words{"the", "final", "countdown"});
    CHECK(with(SplitBehavior::kIsolated) == Words{"the", "-", "final", "-", "-", "countdown"});
    CHECK(with(SplitBehavior::kMergedWithPrevious) == Words{"the-", "final-", "-", "countdown"});
    CHECK(with(SplitBehavior::kMergedWithNext) == Words{"the", "-final", "-", "-countdown"});
    CHECK(with(SplitBehavior::kContiguous) == Words{"the", "-", "final", "--", "countdown"});
  }
}

TEST_CASE("behaviours at the ends of a text") {
  const char* text = "--a-";
  CHECK(split("-", SplitBehavior::kRemoved, text) == Words{"a"});
  CHECK(split("-", SplitBehavior::kMergedWithPrevious, text) == Words{"-", "-", "a-"});
  CHECK(split("-", SplitBehavior::kMergedWithNext, text) == Words{"-", "-a", "-"});
  CHECK(split("-", SplitBehavior::kContiguous, text) == Words{"--", "a", "-"});
}

TEST_CASE("inverted patterns") {
  const char* text = "ab-cd--e";
  CHECK(split("[a-z]+", SplitBehavior::kRemoved, text, true) == Words{"ab", "cd", "e"});
  CHECK(split("[a-z]+", SplitBehavior::kIsolated, text, true) == Words{"ab", "-", "cd", "--", "e"});
  CHECK(split("[a-z]+", SplitBehavior::kMergedWithPrevious, text, true) ==
        Words{"ab-", "cd--", "e"});
  CHECK(split("[a-z]+", SplitBehavior::kMergedWithNext, text, true) == Words{"ab", "-cd", "--e"});
}

TEST_CASE("a text to split at is no pattern") {
  CHECK(split(".*", SplitBehavior::kIsolated, "a.*b.c", false, true) == Words{"a", ".*", "b.c"});
  CHECK(split("é中", SplitBehavior::kRemoved, "aé中b", false, true) == Words{"a", "b"});
}

TEST_CASE("empty matches") {
  CHECK(isolated("x*", "axxb") == Words{"a", "xx", "b"});
  CHECK(isolated("", "aé中") == Words{"a", "é", "中"});
  CHECK(isolated("(?=b)", "abab") == Words{"a", "ba", "b"});
}

TEST_CASE("a search goes on between characters") {
  // The stretches that a long text is searched in end at any byte.
  for (size_t shift = 0; shift < 3; ++shift) {
    std::string text(shift, 'x');
    for (int i = 0; i < 3000; ++i) text += "中";
    const Words words = isolated("(?!中|x).", text + "é");
    CHECK(words == Words{text, "é"});
  }
}

TEST_CASE("parts of a pipeline see only what the one before left together") {
  const Pipeline two{{{SplitBehavior::kIsolated, false, false, "\\p{N}"},
                      {SplitBehavior::kIsolated, false, false, "^a|a$"}}};
  Result<Words> words = two.run("aba1aba");
  REQUIRE(words.ok());
  CHECK(*words == Words{"a", "b", "a", "1", "a", "b", "a"});
}

TEST_CASE("ByteLevel's own pattern and prefix space") {
  Result<Words> words = Pipeline{{}, kImageByteRegex}.run("Hello  world, it's 2024!\n\n");
  REQUIRE(words.ok());
  CHECK(*words == Words{"Hello", " ", " world", ",", " it", "'s", " 2024", "!", "\n\n"});
  words = Pipeline{{{SplitBehavior::kRemoved, false, false, "-"}}, kImagePrefixSpace}.run("a- b-c");
  REQUIRE(words.ok());
  CHECK(*words == Words{" a", " b", " c"});
}

TEST_CASE("nested repeats end in an error, not in a hang") {
  for (const char* pattern : {"(a+)+b", "(a*)*b", "(a|aa)+b", "(.*)*(.*)*x"}) {
    const std::string text = std::string(512 << 10, 'a') + "c";
    const Result<Words> words =
        Pipeline{{{SplitBehavior::kIsolated, false, false, pattern}}}.run(text);
    if (words.ok()) continue;  // found another way round it
    CHECK(words.status().code() == Code::kCapacity);
    CHECK(words.status().message().find(pattern) != std::string::npos);
  }
}

TEST_CASE("work that grows with the square of the text runs out of time") {
  Result<Regex> regex = Regex::compile("(?:a|b)+[cd]", "test");
  REQUIRE(regex.ok());
  const std::string text(100000, 'a');
  Regex::Scratch scratch(Regex::Scratch::Budget{20'000'000});
  size_t begin = 0, end = 0;
  const int found = regex->find(text, 0, &scratch, &begin, &end);
  REQUIRE(found < 0);
  CHECK(regex->error(found).code() == Code::kCapacity);
  CHECK(regex->error(found).message().find("out of time") != std::string::npos);
}

TEST_CASE("places that fail slowly before each match run out of time too") {
  Result<Regex> regex = Regex::compile("(?:a|a){14}c|\n", "test");
  REQUIRE(regex.ok());
  const std::string line = std::string(1000, 'a') + "\n";
  std::string text;
  for (int i = 0; i < 200; ++i) text += line;  // fewer matches than searches go by between looks
  Regex::Scratch scratch(Regex::Scratch::Budget{20'000'000});
  size_t begin = 0, end = 0, searches = 0;
  int found = 1;
  for (; found > 0 && end < text.size(); ++searches) {
    found = regex->find(text, end, &scratch, &begin, &end);
  }
  CHECK(found < 0);
  CHECK(searches < 20);
  CHECK(regex->error(found).message().find("out of time") != std::string::npos);
}

TEST_CASE("many alternatives in a long row need no deep stack") {
  CHECK(isolated("(?:a|b)+", std::string(1000000, 'a') + "c").size() == 2);
}

TEST_CASE("sets and properties mean what they mean in Oniguruma") {
  // U+180E is no white space, U+0085 is.
  CHECK(isolated("\\s+", "a\xE1\xA0\x8E\xC2\x85z") == Words{"a\xE1\xA0\x8E", "\xC2\x85", "z"});
  CHECK(isolated("\\S+", "a\xE1\xA0\x8E z") == Words{"a\xE1\xA0\x8E", " ", "z"});
  CHECK(isolated("[^\\S\\n]+", "a \t\nb") == Words{"a", " \t", "\nb"});
  CHECK(isolated("\\d+", "a1٣²b") == Words{"a", "1٣", "²b"});
  // Marks and connectors are word characters; superscripts and fractions are those of Latin-1, and
  // not inside brackets.
  CHECK(isolated("\\w+", "e\xCC\x81_‿⁴x") == Words{"e\xCC\x81_‿", "⁴", "x"});
  CHECK(isolated("\\w+", "a²³¹¼½¾b·⅓c") == Words{"a²³¹¼½¾b", "·⅓", "c"});
  CHECK(isolated("\\W+", "a²b⁴c") == Words{"a²b", "⁴", "c"});
  CHECK(isolated("[\\w]+", "a²b") == Words{"a", "²", "b"});
  CHECK(isolated("\\p{Han}+", "a中文、b") == Words{"a", "中文", "、b"});
  CHECK(isolated("\\p{^L}+", "a12b") == Words{"a", "12", "b"});
  CHECK(isolated("\\P{L}+", "a12b") == Words{"a", "12", "b"});
  CHECK(isolated("\\p{Decimal_Number}", "a1") == Words{"a", "1"});
  CHECK(isolated("[\\u4e00-\\u9fa5]+", "a中b") == Words{"a", "中", "b"});
  CHECK(isolated("[一-龥\xE0\xA0\x80-\xED\x9F\xBF]+", "a한b") == Words{"a", "한", "b"});
  CHECK(isolated("(?i:'s|'LL)", "it'S i'll") == Words{"it", "'S", " i", "'ll"});
  CHECK(isolated("\\s+(?!\\S)|\\s+", "a   b  ") == Words{"a", "  ", " ", "b", "  "});
  CHECK(isolated("^.", "ab\ncd") == Words{"a", "b\n", "c", "d"});
  CHECK(isolated("[-x]|[x-]|a{,2}b|q{", "q{b-aab") == Words{"q{", "b", "-", "aab"});
}

TEST_CASE("patterns that mean something else there are refused by name") {
  const std::pair<const char*, const char*> cases[] = {
      {"\\h", "\\h"},           {"\\ba", "\\b"},        {"a\\1", "\\1"},
      {"[a&&b]", "intersect"},  {"[[:alpha:]]", "set"}, {"(?m)a", "(?m)"},
      {"a(?i)b", "(?i)"},       {"a{2}+", "suffix"},    {"a**", "repeat of"},
      {"a{3,2}", "least"},      {"(a", "not closed"},   {"a)", "')'"},
      {"[a", "not closed"},     {"[]", "empty"},        {"\\p{Klingon}", "Klingon"},
      {"\\pL", "braces"},       {"\\", "backslash"},    {"\\x{110000}", "U+10FFFF"},
      {"\\ud800", "surrogate"}, {"\\xff", "byte"},      {"[b-a]", "range"},
      {"[\\d-a]", "range"},     {"\\K", "\\K"},         {"(?P<x>a)", "(?P<"},
      {"(*FAIL)", "repeat"},    {"\\C", "\\C"},         {"[\\W]", "\\W"},
      {"(?#c)", "(?#c"},        {"\xFF", "UTF-8"},      {"[\\b]", "\\b"},
      {"\\Q", "\\Q"},           {"(?R)", "(?R)"},       {"a{100000}", "long"}};
  for (const auto& [pattern, expected] : cases) {
    CAPTURE(pattern);
    const Result<std::string> result = translate_pattern(pattern, "f.json");
    REQUIRE(!result.ok());
    CAPTURE(result.status().message());
    CHECK(result.status().code() == Code::kUnsupported);
    CHECK(result.status().message().starts_with("f.json: pattern"));
    CHECK(result.status().message().find(expected) != std::string::npos);
  }
  CHECK(!translate_pattern(std::string(200, '(') + "a" + std::string(200, ')'), "f").ok());
}

TEST_CASE("every word of a random text is whole, and together they are the text") {
  const Pipeline v3{
      {{SplitBehavior::kIsolated, false, false, "\\p{N}{1,3}"},
       {SplitBehavior::kIsolated, false, false, "[一-龥぀-ゟ゠-ヿ]+"},
       {SplitBehavior::kIsolated, false, false,
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\\r\\n\\p{L}\\p{P}\\p{S}]?"
        "[\\p{L}\\p{M}]+| ?[\\p{P}\\p{S}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"}}};
  test::Random random(5);
  for (int round = 0; round < 50; ++round) {
    const std::string text = test::random_text(&random, 300);
    Result<Words> words = v3.run(text);
    REQUIRE(words.ok());
    std::string together;
    for (const std::string& word : *words) together += word;
    CHECK(together == text);
  }
}

}  // namespace dsv3
