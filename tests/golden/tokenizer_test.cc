// The tokenizer against the ids that Hugging Face's Rust tokenizers gave for the same files.
#include "runtime/text/tokenizer.h"

#include <doctest/doctest.h>

#include <chrono>
#include <fstream>
#include <nlohmann/json.hpp>

#include "tests/support/support.h"

namespace dsv3 {
namespace {

// An image must outlive its tokenizer.
struct Opened {
  std::string image;
  std::optional<Tokenizer> tokenizer;

  explicit Opened(const std::string& dir) {
    Result<std::string> compiled = Tokenizer::compile(dir);
    REQUIRE_MESSAGE(compiled.ok(), compiled.status().message());
    image = std::move(*compiled);
    const auto begin = std::chrono::steady_clock::now();
    Result<Tokenizer> opened =
        Tokenizer::open({reinterpret_cast<const uint8_t*>(image.data()), image.size()}, dir);
    const std::chrono::duration<double, std::milli> took = std::chrono::steady_clock::now() - begin;
    REQUIRE_MESSAGE(opened.ok(), opened.status().message());
    MESSAGE("image of ", image.size(), " bytes opened in ", took.count(), " ms");
    tokenizer.emplace(std::move(*opened));
  }
};

std::vector<int32_t> encode(const Tokenizer& t, std::string_view text, bool parse_special) {
  std::vector<int32_t> ids;
  const Status status = t.encode(text, {.parse_special = parse_special}, &ids);
  REQUIRE_MESSAGE(status.ok(), status.message());
  return ids;
}
std::string decode(const Tokenizer& t, const std::vector<int32_t>& ids) {
  std::string text;
  const Status status = t.decode(ids, false, &text);
  REQUIRE_MESSAGE(status.ok(), status.message());
  return text;
}

void check_lines(const Tokenizer& t, const std::string& golden, size_t expected_lines) {
  std::ifstream in(test::source_path("tests/data/tokenizer/" + golden));
  size_t lines = 0;
  for (std::string line; std::getline(in, line); ++lines) {
    const auto j = nlohmann::json::parse(line);
    const std::string text = j["text"];
    const auto expected = j["ids"].get<std::vector<int32_t>>();
    CAPTURE(lines + 1);
    CAPTURE(text);
    CHECK(encode(t, text, true) == expected);
    CHECK(decode(t, expected) == text);
    // Without special parsing no control token appears, and the text survives all the same.
    const std::vector<int32_t> plain = encode(t, text, false);
    CHECK(decode(t, plain) == text);
    for (const int32_t id : plain) {
      if (t.is_added(id)) FAIL_CHECK("added token ", id, " out of plain text");
    }
  }
  CHECK(lines == expected_lines);
}

}  // namespace

TEST_CASE("tiny-coder's tokenizer") {
  const Opened opened(test::source_path("examples/models/tiny-coder"));
  check_lines(*opened.tokenizer, "tiny-coder.jsonl", 300);
  CHECK(opened.tokenizer->vocab_size() == 4096);
  CHECK(opened.tokenizer->bos_id() == 0);
  CHECK(opened.tokenizer->eos_id() == 1);
  CHECK(opened.tokenizer->add_bos());
}

TEST_CASE("the V2 models' pre-tokenizer") {
  const Opened opened(test::source_path("tests/data/tokenizer/v2-style"));
  check_lines(*opened.tokenizer, "v2-style.jsonl", 250);
}

TEST_CASE("DeepSeek-V3's tokenizer") {
  const Opened opened(std::string(DSV3_TOKENIZER_DATA) + "/deepseek-v3");
  check_lines(*opened.tokenizer, "deepseek-v3.jsonl", 500);
  const Tokenizer& t = *opened.tokenizer;
  CHECK(t.vocab_size() == 128815);
  CHECK(t.token_id("<｜User｜>") == 128803);
  CHECK(!t.is_special(128803));
  CHECK(t.is_added(128803));
  CHECK(t.is_special(0));
}

}  // namespace dsv3
