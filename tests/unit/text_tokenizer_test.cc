#include <atomic>
#include <fstream>
#include <map>
#include <thread>

#include "runtime/text/tokenizer.h"
#include "tests/support/support.h"
#include "tests/unit/text_support.h"

namespace dsv3 {
namespace {

using test::add_merge;
using test::added_token;
using test::OrderedJson;
using test::small_tokenizer;
using test::TestTokenizer;
using Ids = std::vector<int32_t>;

// Byte-pair encoding as its definition reads: merge the leftmost pair of least rank until no pair
// is in the list.
std::vector<std::string> merge_by_definition(
    std::vector<std::string> parts,
    const std::map<std::pair<std::string, std::string>, size_t>& ranks) {
  while (true) {
    size_t best = SIZE_MAX, at = 0;
    for (size_t i = 0; i + 1 < parts.size(); ++i) {
      const auto it = ranks.find({parts[i], parts[i + 1]});
      if (it != ranks.end() && it->second < best) {
        best = it->second;
        at = i;
      }
    }
    if (best == SIZE_MAX) return parts;
    parts[at] += parts[at + 1];
    parts.erase(parts.begin() + static_cast<std::ptrdiff_t>(at) + 1);
  }
}

}  // namespace

TEST_CASE("bytes without merges") {
  const TestTokenizer t(small_tokenizer());
  CHECK(t.encode("") == Ids{});
  CHECK(t.encode("Az é") == Ids{'A', 'z', ' ', 0xC3, 0xA9});
  CHECK(t->vocab_size() == 256);
  CHECK(t->token_bytes(' ') == " ");
  CHECK(t->token_bytes(0xC3) == "\xC3");
  CHECK(t->token_bytes(-1).empty());
  CHECK(t->token_bytes(256).empty());
  CHECK(!t->bos_id());
  CHECK(!t->add_bos());
  CHECK(t.encode(std::string_view("a\0b", 3)) == Ids{'a', 0, 'b'});
}

TEST_CASE("bad UTF-8 becomes U+FFFD, one per maximal invalid part") {
  const TestTokenizer t(small_tokenizer());
  const std::string fffd = "\xEF\xBF\xBD";
  CHECK(t.decode(t.encode("a\xFFz")) == "a" + fffd + "z");
  CHECK(t.decode(t.encode("\xE4\xB8")) == fffd);                    // cut short
  CHECK(t.decode(t.encode("\xE4\xB8z")) == fffd + "z");             // one part of two bytes
  CHECK(t.decode(t.encode("\xED\xA0\x80")) == fffd + fffd + fffd);  // a surrogate
  CHECK(t.decode(t.encode("\xC0\xAF")) == fffd + fffd);             // overlong
  CHECK(t.decode(t.encode("\xF4\x90\x80\x80")) == fffd + fffd + fffd + fffd);
}

TEST_CASE("merges apply in the order of their list, from the left") {
  OrderedJson j = small_tokenizer();
  const int ab = add_merge(j, "a", "b");
  const int bc = add_merge(j, "b", "c");
  const int abc = add_merge(j, "ab", "c");
  const int aa = add_merge(j, "a", "a");
  const TestTokenizer t(j);
  CHECK(t.encode("abc") == Ids{abc});
  CHECK(t.encode("bcab") == Ids{bc, ab});
  CHECK(t.encode("aaa") == Ids{aa, 'a'});
  CHECK(t.encode("aab") == Ids{'a', ab});
  // The same inside a word that is too long for the short way.
  const std::string filler(100, 'x');
  Ids expected(100, 'x');
  expected.insert(expected.end(), {'a', ab});
  CHECK(t.encode(filler + "aab") == expected);
}

TEST_CASE("short and long words follow the definition") {
  // Ranks that fit no training: any two tokens of the alphabet may merge, in random order.
  test::Random random(7);
  OrderedJson j = small_tokenizer();
  std::vector<std::string> tokens = {"a", "b", "c"};
  std::map<std::pair<std::string, std::string>, size_t> ranks;
  while (ranks.size() < 120) {
    const std::string left = tokens[random.below(static_cast<uint32_t>(tokens.size()))];
    const std::string right = tokens[random.below(static_cast<uint32_t>(tokens.size()))];
    if (left.size() + right.size() > 9 || ranks.contains({left, right})) continue;
    ranks.emplace(std::pair(left, right), ranks.size());
    if (!j["model"]["vocab"].contains(left + right)) tokens.push_back(left + right);
    add_merge(j, left, right);
  }
  const TestTokenizer t(j);
  for (int round = 0; round < 400; ++round) {
    std::string word;
    const size_t size = 1 + random.below(round % 2 == 0 ? 48 : 300);
    std::vector<std::string> letters;
    for (size_t i = 0; i < size; ++i) {
      letters.emplace_back(1, "abc"[random.below(3)]);
      word += letters.back();
    }
    Ids expected;
    for (const std::string& part : merge_by_definition(letters, ranks)) {
      expected.push_back(j["model"]["vocab"][part].get<int>());
    }
    CAPTURE(word);
    REQUIRE(t.encode(word) == expected);
  }
}

TEST_CASE("words that repeat within a text come out alike") {
  OrderedJson j = small_tokenizer();
  add_merge(j, "t", "h");
  add_merge(j, "th", "e");
  j["pre_tokenizer"]["use_regex"] = true;
  const TestTokenizer t(j);
  test::Random random(3);
  for (int round = 0; round < 20; ++round) {
    // Long enough for the cache of a call; word by word it is never used.
    const std::string text = test::random_text(&random, 2000) + " the then the";
    Ids ids = t.encode(text);
    CHECK(t.decode(ids) == text);
    Ids again = {1, 2, 3};  // the output's earlier content stays, and nothing is copied from it
    REQUIRE(t->encode(text, {}, &again).ok());
    CHECK(Ids(again.begin() + 3, again.end()) == ids);
  }
}

TEST_CASE("ignore_merges takes whole words from the vocabulary") {
  OrderedJson j = small_tokenizer();
  const int abc = 256;
  j["model"]["vocab"]["abc"] = abc;  // no merge leads here
  j["model"]["vocab"]["<s>"] = 257;
  j["added_tokens"].push_back(added_token(257, "<s>"));
  CHECK(TestTokenizer(j).encode("abc") == Ids{'a', 'b', 'c'});
  j["model"]["ignore_merges"] = true;
  const TestTokenizer t(j);
  CHECK(t.encode("abc") == Ids{abc});
  CHECK(t.encode("abcd") == Ids{'a', 'b', 'c', 'd'});
  // A special token is not a word: what a user types never becomes one.
  CHECK(t.encode("<s>") == Ids{'<', 's', '>'});
  CHECK(t.encode("<s>", true) == Ids{257});
}

TEST_CASE("merges may be pairs") {
  OrderedJson j = small_tokenizer();
  const int ab = add_merge(j, "a", "b");
  j["model"]["merges"] = OrderedJson::array({OrderedJson::array({"a", "b"})});
  CHECK(TestTokenizer(j).encode("ab") == Ids{ab});
}

TEST_CASE("ByteLevel's prefix space and pattern") {
  OrderedJson j = small_tokenizer();
  const int space_a = add_merge(j, "Ġ", "a");
  CHECK(TestTokenizer(j).encode("a a") == Ids{'a', space_a});
  j["pre_tokenizer"]["add_prefix_space"] = true;
  CHECK(TestTokenizer(j).encode("a a") == Ids{space_a, space_a});
  CHECK(TestTokenizer(j).encode(" a") == Ids{space_a});
  CHECK(TestTokenizer(j).encode("") == Ids{});
}

TEST_CASE("tokens added to a text") {
  OrderedJson j = small_tokenizer();
  j["added_tokens"] = {added_token(256, "<s>"), added_token(257, "<s>x"), added_token(258, "<t>")};
  j["added_tokens"][2]["special"] = false;
  const TestTokenizer t(j, R"({"bos_token": {"content": "<s>"}, "eos_token": "<t>",
                               "add_bos_token": true})");
  CHECK(t->bos_id() == 256);
  CHECK(t->eos_id() == 258);
  CHECK(t->add_bos());
  CHECK(t->token_id("<s>") == 256);
  CHECK(!t->token_id("<s"));
  CHECK(!t->token_id("a"));
  CHECK(t->is_special(256));
  CHECK(!t->is_special(258));
  CHECK(t->is_added(258));
  CHECK(!t->is_added('a'));
  CHECK(!t->is_added(-1));
  // The longest at the leftmost place.
  CHECK(t.encode("a<s><s>xx", true) == Ids{'a', 256, 257, 'x'});
  CHECK(t.encode("<<s>", true) == Ids{'<', 256});
  CHECK(t.encode("<s", true) == Ids{'<', 's'});
  CHECK(t.encode("<s>") == Ids{'<', 's', '>'});
  CHECK(t.decode({256, 'a', 258}, false) == "<s>a<t>");
  CHECK(t.decode({256, 'a', 258}, true) == "a<t>");
  std::string text = "kept";
  const Status status = t->decode(Ids{'a', 259}, false, &text);
  CHECK(status.code() == Code::kInvalidArgument);
  CHECK(status.message() == "token id 259, expected 0 to 258");
  CHECK(text == "kept");
}

TEST_CASE("tokens that are normalised come second") {
  OrderedJson j = small_tokenizer();
  j["added_tokens"] = {added_token(256, "abc"), added_token(257, "bc"), added_token(258, "cab")};
  j["added_tokens"][0]["normalized"] = true;
  // "bc" is found first wherever it is; "abc" only in what lies between.
  CHECK(TestTokenizer(j).encode("abc", true) == Ids{'a', 257});
  CHECK(TestTokenizer(j).encode("cabc", true) == Ids{258, 'c'});
  j["added_tokens"][1]["normalized"] = true;
  CHECK(TestTokenizer(j).encode("abc", true) == Ids{256});
}

TEST_CASE("an added token is its text, whatever the byte-level alphabet makes of it") {
  OrderedJson j = small_tokenizer();
  j["model"]["vocab"]["Ġé"] = 256;
  j["added_tokens"].push_back(added_token(256, "Ġé"));
  const TestTokenizer t(j);
  CHECK(t.encode("Ġé", true) == Ids{256});
  CHECK(t.decode({256}) == "Ġé");
  CHECK(t.encode(" \xE9", true) == Ids{' ', 0xEF, 0xBF, 0xBD});
}

TEST_CASE("tokens that take white space, and whole words") {
  OrderedJson j = small_tokenizer();
  j["added_tokens"] = {added_token(256, "<l>"), added_token(257, "<r>"), added_token(258, "is")};
  j["added_tokens"][0]["lstrip"] = true;
  j["added_tokens"][1]["rstrip"] = true;
  j["added_tokens"][2]["single_word"] = true;
  const TestTokenizer t(j);
  CHECK(t.encode("a \n\xE3\x80\x80<l> b", true) == Ids{'a', 256, ' ', 'b'});
  CHECK(t.encode("a <r> \t b", true) == Ids{'a', ' ', 257, 'b'});
  CHECK(t.encode(" <l> <l>", true) == Ids{256, 256});
  CHECK(t.encode("<r>  <l>", true) == Ids{257, 256});
  CHECK(t.encode("is this is, 'is'", true) ==
        Ids{258, ' ', 't', 'h', 'i', 's', ' ', 258, ',', ' ', '\'', 258, '\''});
  CHECK(t.encode("éis is_ is1 is", true) ==
        Ids{0xC3, 0xA9, 'i', 's', ' ', 'i', 's', '_', ' ', 'i', 's', '1', ' ', 258});
}

TEST_CASE("parts are encoded as one text") {
  OrderedJson j = small_tokenizer();
  const int ab = add_merge(j, "a", "b");
  j["added_tokens"].push_back(added_token(257, "<s>"));
  const TestTokenizer t(j);
  Ids ids;
  const TextPart parts[] = {{"<s>a", true}, {"b<s>a", false}, {"", false}, {"b", true}};
  REQUIRE(t->encode_parts(parts, &ids).ok());
  CHECK(ids == Ids{257, ab, '<', 's', '>', ab});
  // A token's text does not reach across a seam.
  ids.clear();
  const TextPart cut[] = {{"<s", true}, {">", true}};
  REQUIRE(t->encode_parts(cut, &ids).ok());
  CHECK(ids == Ids{'<', 's', '>'});
}

TEST_CASE("words of a million characters") {
  OrderedJson j = small_tokenizer();
  std::string token = "x";
  for (int i = 0; i < 6; ++i) {
    add_merge(j, token, token);
    token += token;
  }
  const TestTokenizer t(j);
  CHECK(t.encode(std::string(512 << 10, 'x')) == Ids((512 << 10) / 64, 261));
  CHECK(t.encode(std::string(1000001, 'x')).size() == 1000001 / 64 + 1);
  CHECK(t.encode(std::string(1000000, '^')) == Ids(1000000, '^'));
  std::string chinese;
  for (int i = 0; i < 100000; ++i) chinese += "中";
  CHECK(t.decode(t.encode(chinese)) == chinese);
}

TEST_CASE("many threads use one tokenizer") {
  OrderedJson j = small_tokenizer();
  add_merge(j, "f", "o");
  j["pre_tokenizer"]["use_regex"] = true;
  const TestTokenizer t(j);
  test::Random random(11);
  const std::string text = test::random_text(&random, 5000);
  const Ids expected = t.encode(text);
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int round = 0; round < 5; ++round) {
        Ids ids;
        if (!t->encode(text, {.parse_special = true}, &ids).ok() || ids != expected) ++wrong;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(wrong == 0);
}

}  // namespace dsv3
