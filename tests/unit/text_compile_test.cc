// What is not a tokenizer, or not one that is implemented, is refused with the file's and the
// field's name.
#include <bit>
#include <filesystem>

#include "runtime/text/compile.h"
#include "runtime/text/image.h"
#include "runtime/text/tokenizer.h"
#include "tests/support/support.h"
#include "tests/unit/text_support.h"

namespace dsv3 {
namespace {

using test::add_merge;
using test::added_token;
using test::OrderedJson;
using test::small_tokenizer;

void check_refused(const std::string& json, Code code, const std::string& expected,
                   const std::string& config = "") {
  CAPTURE(expected);
  const Result<std::string> result = Tokenizer::compile_json(json, config, "t.json");
  REQUIRE(!result.ok());
  CAPTURE(result.status().message());
  CHECK(result.status().code() == code);
  CHECK(result.status().message().starts_with("t.json"));
  CHECK(result.status().message().find(expected) != std::string::npos);
}
void check_refused(const OrderedJson& j, Code code, const std::string& expected,
                   const std::string& config = "") {
  check_refused(j.dump(), code, expected, config);
}
// The small tokenizer with one member replaced ("a.b" goes into objects).
OrderedJson with(const std::string& path, const OrderedJson& value) {
  OrderedJson j = small_tokenizer();
  std::string pointer = "/" + path;
  for (char& c : pointer) {
    if (c == '.') c = '/';
  }
  j[OrderedJson::json_pointer(pointer)] = value;
  return j;
}
OrderedJson split(const OrderedJson& pattern, const std::string& behavior) {
  return {{"type", "Sequence"},
          {"pretokenizers",
           {{{"type", "Split"}, {"pattern", pattern}, {"behavior", behavior}, {"invert", false}},
            {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}}}}};
}

}  // namespace

TEST_CASE("broken JSON") {
  check_refused(std::string(), Code::kCorrupt, "not valid JSON");
  check_refused(std::string("[]"), Code::kCorrupt, "holds array");
  check_refused(std::string(100000, '['), Code::kCorrupt, "nested deeper");
  check_refused(std::string(R"({"model": {"vocab": {"a": 1, "a": 2}}})"), Code::kCorrupt, "twice");
}

TEST_CASE("kinds that are not implemented are named") {
  const Code no = Code::kUnsupported;
  check_refused(with("normalizer", {{"type", "NFC"}}), no, "normalizer is of kind NFC");
  check_refused(with("normalizer", {{"type", "Sequence"},
                                    {"normalizers", OrderedJson::array({{{"type", "Prepend"}}})}}),
                no, "Prepend");
  check_refused(with("pre_tokenizer", {{"type", "Metaspace"}}), no,
                "pre_tokenizer is of kind Metaspace");
  check_refused(with("pre_tokenizer", nullptr), no, "pre_tokenizer is null");
  check_refused(with("pre_tokenizer", {{"type", "Digits"}, {"individual_digits", true}}), no,
                "no ByteLevel part");
  check_refused(with("decoder", {{"type", "Metaspace"}}), no, "decoder is of kind Metaspace");
  check_refused(with("post_processor", {{"type", "BertProcessing"}}), no, "BertProcessing");
  check_refused(with("model.type", "Unigram"), no, "model is of kind Unigram");
  check_refused(with("model.dropout", 0.1), no, "model.dropout");
  check_refused(with("model.byte_fallback", true), no, "model.byte_fallback");
  check_refused(with("model.continuing_subword_prefix", "##"), no, "continuing_subword_prefix");
  check_refused(with("model.end_of_word_suffix", "</w>"), no, "end_of_word_suffix");
  check_refused(with("pre_tokenizer", split({{"Regex", "a"}}, "Sideways")), no,
                "pre_tokenizer[0].behavior is \"Sideways\"");
  check_refused(with("pre_tokenizer", split({{"Glob", "a"}}, "Isolated")), no,
                "neither Regex nor String");
  check_refused(with("pre_tokenizer", split({{"Regex", "(a"}}, "Isolated")), no, "not closed");
  check_refused(with("pre_tokenizer", split({{"Regex", "\\ba"}}, "Isolated")), no, "\\b");
  OrderedJson j = small_tokenizer();
  j["pre_tokenizer"] = split({{"Regex", "a"}}, "Isolated");
  std::swap(j["pre_tokenizer"]["pretokenizers"][0], j["pre_tokenizer"]["pretokenizers"][1]);
  check_refused(j, no, "behind ByteLevel");
}

TEST_CASE("what changes nothing is accepted") {
  for (const OrderedJson& j :
       {with("normalizer", {{"type", "Sequence"}, {"normalizers", OrderedJson::array()}}),
        with("post_processor", {{"type", "TemplateProcessing"}}),
        with("post_processor", {{"type", "ByteLevel"}}), with("decoder", nullptr),
        with("model.dropout", nullptr), with("model.dropout", 0.0),
        with("model.unk_token", "<unk>"), with("model.continuing_subword_prefix", ""),
        with("truncation", nullptr)}) {
    const Result<std::string> result = Tokenizer::compile_json(j.dump(), "", "t.json");
    CHECK_MESSAGE(result.ok(), result.status().message());
  }
}

TEST_CASE("vocabularies that do not hold together") {
  const Code bad = Code::kCorrupt;
  check_refused(with("model.vocab", OrderedJson::object()), bad, "model.vocab has 0 tokens");
  check_refused(with("model.vocab", 3), bad, "model.vocab is number");
  check_refused(with("model.vocab.a", 98), bad, "tokens \"a\" and \"b\" both have id 98");
  check_refused(with("model.vocab.extra", 257), bad, "without gaps");
  check_refused(with("model.vocab.a", uint64_t{1} << 31), bad, "id 2147483648");
  check_refused(with("model.vocab.a", -1), bad, "id -1");
  check_refused(with("model.vocab.a", 1.5), bad, "id 1.5");
  check_refused(with("model.vocab.a", "x"), bad, "id string");
  OrderedJson j = small_tokenizer();
  j["model"]["vocab"][""] = 256;
  check_refused(j, bad, "has 0 bytes");
  j = small_tokenizer();
  j["model"]["vocab"][std::string(70000, 'a')] = 256;
  check_refused(j, bad, "has 70000 bytes");
  j = small_tokenizer();
  j["model"]["vocab"].erase("a");
  j["model"]["vocab"]["aa"] = 'a';
  check_refused(j, Code::kUnsupported, "no token \"a\" for byte 0x61");
}

TEST_CASE("bytes that no UTF-8 contains may have no token") {
  OrderedJson j = small_tokenizer();
  j["model"]["vocab"].erase(test::spelling(0xFF));
  j["model"]["vocab"]["aa"] = 0xFF;
  CHECK(Tokenizer::compile_json(j.dump(), "", "t.json").ok());
}

TEST_CASE("merges that do not hold together") {
  const Code bad = Code::kCorrupt;
  OrderedJson good = small_tokenizer();
  add_merge(good, "a", "b");
  OrderedJson j = good;
  j["model"]["merges"].push_back("a c");
  check_refused(j, bad, "model.merges[1] (\"a\" \"c\"): model.vocab has no token \"ac\"");
  j["model"]["merges"][1] = "q1 a";
  check_refused(j, bad, "no token \"q1\"");
  j["model"]["merges"][1] = "a b";
  check_refused(j, bad, "repeats model.merges[0]");
  for (const OrderedJson& wrong :
       {OrderedJson("ab"), OrderedJson("a b c"), OrderedJson(" b"), OrderedJson("a "),
        OrderedJson(7), OrderedJson({"a"}), OrderedJson({"a", "b", "c"}), OrderedJson({"a", 1})}) {
    j["model"]["merges"][1] = wrong;
    check_refused(j, bad, "model.merges[1] is not a pair of tokens");
  }
  // Merges in a circle cannot be written down: each result is longer than its parts.
  j["model"]["merges"][1] = OrderedJson::array({"", "ab"});
  check_refused(j, bad, "model.merges[1] is not a pair of tokens");
  check_refused(with("model.merges", nullptr), bad, "model.merges is null");
  j = good;
  j["added_tokens"].push_back(added_token(256, "ab"));
  check_refused(j, Code::kUnsupported, "makes the special token \"ab\" out of plain text");
}

TEST_CASE("merges chosen to collide in the table are refused before they take time") {
  // Tokens "aa" to "a" * 1300: enough pairs for 5,000 that want one of 128 neighbouring slots.
  constexpr int kLongest = 1300, kMerges = 5000;
  OrderedJson j = small_tokenizer();
  const auto id = [](int length) {
    return length == 1 ? 97u : static_cast<uint32_t>(254 + length);
  };
  const auto text = [](int length) { return std::string(static_cast<size_t>(length), 'a'); };
  OrderedJson vocab = j["model"]["vocab"];
  for (int k = 2; k <= kLongest; ++k) vocab.push_back({text(k), id(k)});
  j["model"]["vocab"] = std::move(vocab);
  auto& merges = j["model"]["merges"];
  const uint32_t slots = std::bit_ceil(2u * kMerges);
  for (int left = 1; left < kLongest; ++left) {
    for (int right = 1; left + right <= kLongest && merges.size() < kMerges; ++right) {
      if (merge_slot(id(left), id(right), slots) >= 128) continue;
      merges.push_back(text(left) + " " + text(right));
    }
  }
  REQUIRE(merges.size() == kMerges);
  check_refused(j, Code::kCorrupt, "model.merges fills a hash table");
}

TEST_CASE("added tokens that do not hold together") {
  const Code bad = Code::kCorrupt;
  const auto added = [](std::vector<OrderedJson> tokens) {
    OrderedJson j = small_tokenizer();
    for (OrderedJson& t : tokens) j["added_tokens"].push_back(std::move(t));
    return j;
  };
  check_refused(added({added_token(257, "<s>")}), bad, "without gaps");
  check_refused(added({added_token(256, "<s>"), added_token(256, "<t>")}), bad,
                "tokens \"<s>\" and \"<t>\" both have id 256");
  check_refused(added({added_token(256, "<s>"), added_token(257, "<s>")}), bad,
                "added_tokens[1]: token \"<s>\" has id 257 here and 256 before");
  check_refused(added({added_token('b', "<s>")}), bad, "model.vocab gives to \"b\"");
  check_refused(added({added_token('b', "a")}), bad, "model.vocab gives it 97");
  check_refused(added({added_token(256, "")}), bad, "has 0 bytes");
  check_refused(added({added_token(256, std::string(1025, 'x'))}), Code::kUnsupported,
                "added_tokens[0]: token \"" + std::string(60, 'x') +
                    "...\" has 1025 bytes, expected at most 1024");
  CHECK(Tokenizer::compile_json(added({added_token(256, std::string(1024, 'x'))}).dump(), "",
                                "t.json")
            .ok());
  OrderedJson token = added_token(256, "<s>");
  token["id"] = uint64_t{1} << 31;
  check_refused(added({token}), bad, "added_tokens[0]: token \"<s>\" has id 2147483648");
  token = added_token(256, "<s>");
  token["special"] = "yes";
  check_refused(added({token}), bad, "added_tokens[0].special is string");
  token.erase("content");
  check_refused(added({token}), bad, "added_tokens[0].content is null");
  check_refused(with("added_tokens", 5), bad, "added_tokens is number");
}

TEST_CASE("tokenizer_config.json") {
  const OrderedJson j = small_tokenizer();
  const Code bad = Code::kCorrupt;
  check_refused(j, bad, "not valid JSON", "{");
  check_refused(j, bad, "holds array", "[]");
  check_refused(j, bad, "bos_token \"<s>\" is not in the vocabulary", R"({"bos_token": "<s>"})");
  check_refused(j, bad, "eos_token is number", R"({"eos_token": 3})");
  check_refused(j, bad, "add_bos_token is string", R"({"add_bos_token": "yes"})");
  check_refused(j, bad, "there is no bos_token", R"({"add_bos_token": true})");
}

TEST_CASE("a checkpoint's folder") {
  test::TemporaryFolder folder;
  Result<std::string> result = Tokenizer::compile(folder.path());
  REQUIRE(!result.ok());
  CHECK(result.status().code() == Code::kNotFound);
  CHECK(result.status().message().find("tokenizer.json: no such file") != std::string::npos);

  test::write_bytes(folder.file("tiktoken.model"), "IQ== 0\n");
  result = Tokenizer::compile(folder.path());
  REQUIRE(!result.ok());
  CHECK(result.status().code() == Code::kUnsupported);
  CHECK(result.status().message().find("only tiktoken.model") != std::string::npos);

  OrderedJson j = small_tokenizer();
  j["added_tokens"] = {added_token(256, "<s>"), added_token(257, "</s>")};
  test::write_bytes(folder.file("tokenizer.json"), j.dump());
  test::write_bytes(folder.file("tokenizer_config.json"), R"({"bos_token": "<s>"})");
  test::write_bytes(folder.file("special_tokens_map.json"),
                    R"({"bos_token": "</s>", "eos_token": {"content": "</s>"}})");
  result = Tokenizer::compile(folder.path());
  REQUIRE_MESSAGE(result.ok(), result.status().message());
  const auto opened =
      Tokenizer::open({reinterpret_cast<const uint8_t*>(result->data()), result->size()}, "image");
  REQUIRE(opened.ok());
  CHECK(opened.value().bos_id() == 256);  // tokenizer_config.json comes first
  CHECK(opened.value().eos_id() == 257);

  for (const char* name : {"special_tokens_map.json", "tokenizer_config.json"}) {
    std::filesystem::resize_file(folder.file(name), (size_t{16} << 20) + 1);
    result = Tokenizer::compile(folder.path());
    REQUIRE(!result.ok());
    CHECK(result.status().code() == Code::kCorrupt);
    CHECK(result.status().message() ==
          folder.file(name) + ": has 16777217 bytes, expected at most 16777216");
  }

  test::write_bytes(folder.file("tokenizer.json"), "{\"model\": 5, \"pre_tokenizer\"");
  result = Tokenizer::compile(folder.path());
  REQUIRE(!result.ok());
  CHECK(result.status().message().starts_with(folder.file("tokenizer.json")));
}

TEST_CASE("damaged images") {
  OrderedJson j = small_tokenizer();
  add_merge(j, "a", "b");
  j["added_tokens"].push_back(added_token(257, "<s>"));
  j["model"]["ignore_merges"] = true;
  j["pre_tokenizer"] = split({{"Regex", "\\s+"}}, "Isolated");
  Result<std::string> image = Tokenizer::compile_json(j.dump(), "", "t.json");
  REQUIRE(image.ok());
  const auto opens = [](const std::string& bytes) {
    const auto result =
        Tokenizer::open({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()}, "x.dsv3");
    if (!result.ok()) CHECK(result.status().message().starts_with("x.dsv3: tokenizer image"));
    return result.ok();
  };
  CHECK(opens(*image));
  CHECK(opens(" " + *image) == false);
  for (size_t size = 0; size < image->size(); size += size < 200 ? 1 : 97) {
    CHECK(!opens(image->substr(0, size)));
  }
  CHECK(!opens(*image + "x"));
  // Every bit of the header, some of the rest.
  for (size_t bit = 0; bit < image->size() * 8; bit += bit < 800 ? 1 : 421) {
    std::string flipped = *image;
    flipped[bit / 8] = static_cast<char>(flipped[bit / 8] ^ 1 << (bit % 8));
    CHECK_MESSAGE(!opens(flipped), "bit ", bit, " flipped");
  }
}

TEST_CASE("an image with a long added token") {
  for (const size_t size : {1024, 1025}) {
    TokenizerSource source;
    for (int b = 0; b < 256; ++b) {
      source.tokens.push_back({.bytes = std::string(1, static_cast<char>(b)), .byte_level = true});
    }
    source.tokens.push_back({.bytes = std::string(size, 'x'), .flags = kTokenAdded});
    source.added.push_back({256, 0});
    const Result<std::string> image = build_image(source, "t.json");
    REQUIRE(image.ok());
    const auto opened = TokenizerImage::open(
        {reinterpret_cast<const uint8_t*>(image.value().data()), image.value().size()}, "x.dsv3");
    CHECK(opened.ok() == (size == 1024));
    if (opened.ok()) continue;
    CHECK(opened.status().code() == Code::kCorrupt);
    CHECK(opened.status().message() ==
          "x.dsv3: tokenizer image: added token 0 has 1025 bytes, expected at most 1024");
  }
}

TEST_CASE("an image works at any alignment") {
  OrderedJson j = small_tokenizer();
  const int ab = add_merge(j, "a", "b");
  Result<std::string> image = Tokenizer::compile_json(j.dump(), "", "t.json");
  REQUIRE(image.ok());
  for (size_t shift = 0; shift < 8; ++shift) {
    const std::string moved = std::string(shift, '\0') + *image;
    const auto opened = Tokenizer::open(
        {reinterpret_cast<const uint8_t*>(moved.data()) + shift, image->size()}, "image");
    REQUIRE(opened.ok());
    std::vector<int32_t> ids;
    REQUIRE(opened.value().encode("ab", {}, &ids).ok());
    CHECK(ids == std::vector<int32_t>{ab});
  }
}

}  // namespace dsv3
