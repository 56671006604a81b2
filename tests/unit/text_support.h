// Small tokenizers for tests: every byte a token, then whatever a test adds.
#pragma once

#include <doctest/doctest.h>

#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "runtime/text/tokenizer.h"

namespace dsv3::test {

using OrderedJson = nlohmann::ordered_json;

// The spelling of a byte in the byte-level alphabet.
inline std::string spelling(int byte) {
  int code = byte;
  if (!((byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174)) {
    int before = 0;
    for (int b = 0; b < byte; ++b) {
      if (!((b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174)) ++before;
    }
    code = 256 + before;
  }
  if (code < 0x80) return std::string(1, static_cast<char>(code));
  return {static_cast<char>(0xC0 | code >> 6), static_cast<char>(0x80 | (code & 0x3F))};
}

// A tokenizer.json whose token of byte b is b, without merges and added tokens.
inline OrderedJson small_tokenizer() {
  OrderedJson j;
  j["normalizer"] = nullptr;
  j["pre_tokenizer"] = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  j["post_processor"] = nullptr;
  j["decoder"] = {{"type", "ByteLevel"}};
  j["added_tokens"] = OrderedJson::array();
  j["model"] = {
      {"type", "BPE"}, {"vocab", OrderedJson::object()}, {"merges", OrderedJson::array()}};
  for (int b = 0; b < 256; ++b) j["model"]["vocab"][spelling(b)] = b;
  return j;
}
// Adds a token to the model and the merge of its parts; its id.
inline int add_merge(OrderedJson& j, const std::string& left, const std::string& right) {
  auto& vocab = j["model"]["vocab"];
  const int id = vocab.contains(left + right) ? vocab[left + right].get<int>()
                                              : static_cast<int>(vocab.size());
  vocab[left + right] = id;
  j["model"]["merges"].push_back(left + " " + right);
  return id;
}
inline OrderedJson added_token(int id, const std::string& content) {
  return {{"id", id},        {"content", content},  {"single_word", false}, {"lstrip", false},
          {"rstrip", false}, {"normalized", false}, {"special", true}};
}

// A tokenizer with its image.
struct TestTokenizer {
  std::string image;
  std::optional<Tokenizer> tokenizer;

  explicit TestTokenizer(const OrderedJson& j, const std::string& config = "") {
    Result<std::string> compiled = Tokenizer::compile_json(j.dump(), config, "test.json");
    REQUIRE_MESSAGE(compiled.ok(), compiled.status().message());
    image = std::move(*compiled);
    Result<Tokenizer> opened = Tokenizer::open(
        {reinterpret_cast<const uint8_t*>(image.data()), image.size()}, "test image");
    REQUIRE_MESSAGE(opened.ok(), opened.status().message());
    tokenizer.emplace(std::move(*opened));
  }
  TestTokenizer(const TestTokenizer&) = delete;
  const Tokenizer* operator->() const { return &*tokenizer; }
  const Tokenizer& operator*() const { return *tokenizer; }

  std::vector<int32_t> encode(std::string_view text, bool parse_special = false) const {
    std::vector<int32_t> ids;
    const Status status = tokenizer->encode(text, {.parse_special = parse_special}, &ids);
    REQUIRE_MESSAGE(status.ok(), status.message());
    return ids;
  }
  std::string decode(const std::vector<int32_t>& ids, bool skip_special = false) const {
    std::string text;
    const Status status = tokenizer->decode(ids, skip_special, &text);
    REQUIRE_MESSAGE(status.ok(), status.message());
    return text;
  }
};

// A small generator of numbers, the same everywhere.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint32_t next() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33);
  }
  uint32_t below(uint32_t n) { return next() % n; }

 private:
  uint64_t state_;
};

// Text of the sorts that pre-tokenizers tell apart, in no order.
inline std::string random_text(Random* random, size_t units) {
  static const char* const kUnits[] = {"a",
                                       "B",
                                       "z",
                                       "foo",
                                       "é",
                                       "ß",
                                       "中",
                                       "文",
                                       "の",
                                       "ア",
                                       "한",
                                       "1",
                                       "23",
                                       "4567",
                                       "٣",
                                       "²",
                                       "Ⅷ",
                                       " ",
                                       "  ",
                                       "\t",
                                       "\n",
                                       "\r\n",
                                       "\n\n",
                                       ".",
                                       ",",
                                       "!?",
                                       "_",
                                       "-",
                                       "'s",
                                       "'ll",
                                       "(",
                                       ")",
                                       "「",
                                       "€",
                                       "+",
                                       "^",
                                       "<｜",
                                       "｜>",
                                       "😀",
                                       "👩‍👩‍👧",
                                       "\xCC\x81",
                                       "\xC2\xA0",
                                       "\xE3\x80\x80",
                                       "\xE2\x80\x8B",
                                       "\xE1\xA0\x8E",
                                       "\x01",
                                       "\x7F",
                                       "\xEF\xBF\xBD"};
  std::string text;
  for (size_t i = 0; i < units; ++i) text += kUnits[random->below(std::size(kUnits))];
  return text;
}

}  // namespace dsv3::test
