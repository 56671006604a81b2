// Streaming: whole characters, stop strings, reasoning apart from the answer.
#include "runtime/text/stream.h"
#include "runtime/text/utf8.h"
#include "tests/unit/text_support.h"

namespace dsv3 {
namespace {

using test::added_token;
using test::OrderedJson;
using test::small_tokenizer;
using test::TestTokenizer;

std::string lossy(std::string_view bytes) {
  std::string out;
  append_lossy_utf8(bytes, &out);
  return out;
}
std::string streamed(const std::vector<std::string>& pushes) {
  Utf8Stream stream;
  std::string out;
  for (const std::string& bytes : pushes) {
    std::string part;
    stream.push(bytes, &part);
    CHECK(is_valid_utf8(part));
    out += part;
  }
  stream.finish(&out);
  return out;
}

struct Stopped {
  std::string text;
  std::string matched;
  bool operator==(const Stopped&) const = default;
};
// Pushes `text` in pieces of `size` bytes.
Stopped stop_at(const std::vector<std::string>& stops, std::string_view text, size_t size) {
  StopMatcher matcher(stops);
  Stopped result;
  for (size_t i = 0; i < text.size(); i += size) {
    if (matcher.push(text.substr(i, size), &result.text)) {
      result.matched = matcher.matched();
      // Nothing comes after it.
      CHECK(matcher.push("more", &result.text));
      matcher.finish(&result.text);
      return result;
    }
  }
  matcher.finish(&result.text);
  return result;
}
// The definition: the match that ends first, of those the longest.
Stopped stop_by_definition(const std::vector<std::string>& stops, const std::string& text) {
  for (size_t end = 1; end <= text.size(); ++end) {
    std::string best;
    for (const std::string& stop : stops) {
      if (!stop.empty() && stop.size() > best.size() && text.substr(0, end).ends_with(stop)) {
        best = stop;
      }
    }
    if (!best.empty()) return {text.substr(0, end - best.size()), best};
  }
  return {text, ""};
}

}  // namespace

TEST_CASE("characters cut at every place come out whole") {
  const std::string text = "aé中😀\xF4\x8F\xBF\xBFz";
  for (size_t i = 0; i <= text.size(); ++i) {
    for (size_t k = i; k <= text.size(); ++k) {
      CHECK(streamed({text.substr(0, i), text.substr(i, k - i), text.substr(k)}) == text);
    }
  }
  std::vector<std::string> bytes;
  for (const char c : text) bytes.emplace_back(1, c);
  CHECK(streamed(bytes) == text);
}

TEST_CASE("invalid bytes become U+FFFD however they are cut") {
  const std::string fffd(kReplacementCharacter);
  CHECK(streamed({"\xFF"}) == fffd);
  CHECK(streamed({"\xE4\xB8"}) == fffd);
  CHECK(streamed({"\xE4", "\xB8", "a"}) == fffd + "a");
  CHECK(streamed({"\xE4", "\xE4\xB8\xAD"}) == fffd + "中");
  CHECK(streamed({"\xF0\x9F", "\xF0\x9F\x98\x80"}) == fffd + "😀");
  test::Random random(1);
  const uint8_t interesting[] = {0x41, 0x80, 0x9F, 0xA0, 0xBF, 0xC0, 0xC2, 0xDF, 0xE0, 0xE1,
                                 0xED, 0xEF, 0xF0, 0xF1, 0xF4, 0xF5, 0xFF, 0x8F, 0x90, 0x20};
  for (int round = 0; round < 3000; ++round) {
    std::string bytes;
    std::vector<std::string> pushes(1);
    const size_t size = random.below(12);
    for (size_t i = 0; i < size; ++i) {
      const char c = static_cast<char>(interesting[random.below(std::size(interesting))]);
      bytes += c;
      if (random.below(2) == 0) pushes.emplace_back();
      pushes.back() += c;
    }
    REQUIRE(streamed(pushes) == lossy(bytes));
  }
}

TEST_CASE("what can be told is told at once") {
  Utf8Stream stream;
  std::string out;
  stream.push("\xE4\xB8", &out);
  CHECK(out.empty());
  stream.push("\xAD\xE4", &out);
  CHECK(out == "中");
  stream.push("a", &out);
  CHECK(out == "中" + std::string(kReplacementCharacter) + "a");
}

TEST_CASE("stop strings") {
  for (size_t size = 1; size < 12; ++size) {
    CHECK(stop_at({"stop"}, "don't stop here", size) == Stopped{"don't ", "stop"});
    CHECK(stop_at({"stop"}, "stostostop", size) == Stopped{"stosto", "stop"});
    CHECK(stop_at({"stop"}, "no end sto", size) == Stopped{"no end sto", ""});
    CHECK(stop_at({"\n\n"}, "a\nb\n\nc", size) == Stopped{"a\nb", "\n\n"});
    // The earliest to end, of those the longest.
    CHECK(stop_at({"bc", "abcd"}, "xabcd", size) == Stopped{"xa", "bc"});
    CHECK(stop_at({"c", "bc", "abc"}, "xabcd", size) == Stopped{"x", "abc"});
    CHECK(stop_at({"aab"}, "aaab", size) == Stopped{"a", "aab"});
    CHECK(stop_at({"中文"}, "中中文", size) == Stopped{"中", "中文"});
    CHECK(stop_at({"", "x"}, "ax", size) == Stopped{"a", "x"});
    CHECK(stop_at({}, "ax", size) == Stopped{"ax", ""});
    CHECK(stop_at({""}, "ax", size) == Stopped{"ax", ""});
  }
}

TEST_CASE("stop strings that overlap, against the definition") {
  test::Random random(2);
  for (int round = 0; round < 3000; ++round) {
    std::vector<std::string> stops(random.below(4));
    for (std::string& stop : stops) {
      for (size_t i = 1 + random.below(4); i > 0; --i) stop += "ab"[random.below(2)];
    }
    std::string text;
    for (size_t i = random.below(20); i > 0; --i) text += "abc"[random.below(8) == 0 ? 2 : i % 2];
    CAPTURE(text);
    REQUIRE(stop_at(stops, text, 1 + random.below(5)) == stop_by_definition(stops, text));
  }
}

TEST_CASE("only what may still become a stop string is held back") {
  StopMatcher matcher({"<end>"});
  std::string out;
  CHECK(!matcher.push("abc<e", &out));
  CHECK(out == "abc");
  CHECK(!matcher.push("x", &out));
  CHECK(out == "abc<ex");
  CHECK(!matcher.push("<en", &out));
  CHECK(out == "abc<ex");
  CHECK(matcher.push("d> and more", &out));
  CHECK(out == "abc<ex");
}

TEST_CASE("long stop strings take linear time") {
  // Quadratic work here would be 10^11 steps.
  StopMatcher matcher({std::string(100000, 'a') + "b"});
  std::string out;
  for (int i = 0; i < 1000; ++i) CHECK(!matcher.push(std::string(1000, 'a'), &out));
  CHECK(out.size() == 900000);
  matcher.finish(&out);
  CHECK(out.size() == 1000000);
}

namespace {

constexpr int32_t kThink = 256, kEndThink = 257, kEos = 258, kPlain = 259;
OrderedJson thinking_tokenizer() {
  OrderedJson j = small_tokenizer();
  j["added_tokens"] = {added_token(kThink, "<think>"), added_token(kEndThink, "</think>"),
                       added_token(kEos, "<eos>"), added_token(kPlain, "<plain>")};
  j["added_tokens"][3]["special"] = false;
  return j;
}
struct Told {
  std::string reasoning, answer;
  bool stopped = false;
  bool operator==(const Told&) const = default;
};
Told tell(const Tokenizer& t, const std::vector<int32_t>& ids, bool in_reasoning,
          std::vector<std::string> stops = {}) {
  StreamDecoder decoder(&t, std::move(stops), in_reasoning);
  Told told;
  Segments segments;
  for (const int32_t id : ids) {
    if (!decoder.push(id, &segments)) continue;
    told.stopped = true;
    CHECK(!decoder.matched_stop().empty());
    break;
  }
  decoder.finish(&segments);
  for (size_t i = 0; i < segments.size(); ++i) {
    CHECK(!segments[i].text.empty());
    CHECK(is_valid_utf8(segments[i].text));
    if (i > 0) CHECK(segments[i].kind != segments[i - 1].kind);
    (segments[i].kind == SegmentKind::kReasoning ? told.reasoning : told.answer) +=
        segments[i].text;
  }
  return told;
}
std::vector<int32_t> bytes_of(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()),
          reinterpret_cast<const uint8_t*>(text.data()) + text.size()};
}
std::vector<int32_t> join(std::initializer_list<std::vector<int32_t>> parts) {
  std::vector<int32_t> ids;
  for (const auto& part : parts) ids.insert(ids.end(), part.begin(), part.end());
  return ids;
}

}  // namespace

TEST_CASE("reasoning is told apart from the answer") {
  const TestTokenizer t(thinking_tokenizer());
  CHECK(tell(*t, join({bytes_of("why 中"), {kEndThink}, bytes_of("so"), {kEos}}), true) ==
        Told{"why 中", "so"});
  CHECK(tell(*t, join({{kThink}, bytes_of("why"), {kEndThink}, bytes_of("so")}), false) ==
        Told{"why", "so"});
  CHECK(tell(*t, bytes_of("plain"), false) == Told{"", "plain"});
  CHECK(tell(*t, {kEos, kPlain}, false) == Told{"", "<plain>"});
  // Ordinary tokens that spell the tag are text.
  CHECK(tell(*t, bytes_of("</think>x"), true) == Told{"</think>x", ""});
  // A character that the tag cuts in two.
  const std::string fffd(kReplacementCharacter);
  CHECK(tell(*t, join({bytes_of("a\xE4"), {kEndThink}, bytes_of("\xB8z")}), true) ==
        Told{"a" + fffd, fffd + "z"});
  StreamDecoder decoder(&*t.tokenizer, {}, true);
  Segments segments;
  CHECK(decoder.in_reasoning());
  decoder.push(kEndThink, &segments);
  CHECK(!decoder.in_reasoning());
  CHECK(segments.empty());
}

TEST_CASE("a vocabulary without </think> spells it") {
  const TestTokenizer t(small_tokenizer());
  CHECK(tell(*t, bytes_of("why</think>so <think>"), true) == Told{"why", "so <think>"});
  CHECK(tell(*t, bytes_of("why </thin"), true) == Told{"why </thin", ""});
}

TEST_CASE("stop strings count in the answer only") {
  const TestTokenizer t(thinking_tokenizer());
  CHECK(tell(*t, join({bytes_of("a STOP b"), {kEndThink}, bytes_of("c STOP d")}), true, {"STOP"}) ==
        Told{"a STOP b", "c ", true});
  // One that begins before a switch cannot end behind it.
  CHECK(tell(*t, join({bytes_of("xST"), {kThink}, bytes_of("y"), {kEndThink}, bytes_of("OP")}),
             false, {"STOP"}) == Told{"y", "xSTOP"});
  // Special tokens make no text, so they do not interrupt one either.
  CHECK(tell(*t, join({bytes_of("xST"), {kEos}, bytes_of("OPz")}), false, {"STOP"}) ==
        Told{"", "x", true});
  CHECK(tell(*t, bytes_of("中"), false, {"中"}) == Told{"", "", true});
  CHECK(tell(*t, bytes_of("x\xE4"), false, {std::string(kReplacementCharacter)}).answer == "x");
}

}  // namespace dsv3
