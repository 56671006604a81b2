// Chat templates against what the checkpoints' own Jinja templates rendered: jinja.jsonl has their
// texts, chat.jsonl what Jinja2 made of them (and of V3.1's first one) with trim_blocks and
// lstrip_blocks, as Hugging Face's transformers sets it up.
#include <doctest/doctest.h>

#include <algorithm>
#include <fstream>
#include <nlohmann/json.hpp>

#include "runtime/text/chat.h"
#include "tests/support/support.h"

namespace dsv3 {
namespace {

struct Opened {
  std::string image;
  std::optional<Tokenizer> tokenizer;
};
Opened open_tokenizer(const std::string& dir) {
  Opened result;
  Result<std::string> compiled = Tokenizer::compile(dir);
  REQUIRE_MESSAGE(compiled.ok(), compiled.status().message());
  result.image = std::move(*compiled);
  Result<Tokenizer> opened = Tokenizer::open(
      {reinterpret_cast<const uint8_t*>(result.image.data()), result.image.size()}, dir);
  REQUIRE_MESSAGE(opened.ok(), opened.status().message());
  result.tokenizer.emplace(std::move(*opened));
  return result;
}
std::string deepseek_v3() { return std::string(DSV3_TOKENIZER_DATA) + "/deepseek-v3"; }

ChatTemplate by_name(const std::string& name) {
  for (int t = 1; t <= static_cast<int>(kLastChatTemplate); ++t) {
    const auto id = static_cast<ChatTemplate>(t);
    if (name == chat_template_name(id)) return id;
  }
  return ChatTemplate::kNone;
}

std::vector<ChatMessage> messages_of(const nlohmann::json& list) {
  std::vector<ChatMessage> messages;
  for (const auto& m : list) {
    ChatMessage message;
    message.role = m["role"];
    message.has_content = !m["content"].is_null();
    if (message.has_content) message.content = m["content"];
    for (const auto& call : m.value("tool_calls", nlohmann::json::array())) {
      message.tool_calls.push_back(
          {call["id"], call["type"], call["function"]["name"], call["function"]["arguments"]});
    }
    messages.push_back(std::move(message));
  }
  return messages;
}

}  // namespace

TEST_CASE("every conversation renders as the checkpoints' templates render it") {
  const Opened opened = open_tokenizer(deepseek_v3());
  const Tokenizer& tokenizer = *opened.tokenizer;
  std::ifstream in(test::source_path("tests/data/templates/chat.jsonl"));
  size_t lines = 0;
  for (std::string line; std::getline(in, line); ++lines) {
    const auto j = nlohmann::json::parse(line);
    CAPTURE(lines + 1);
    const ChatTemplate id = by_name(j["template"]);
    REQUIRE(id != ChatTemplate::kNone);
    const ChatOptions options{.thinking = j["thinking"],
                              .add_generation_prompt = j["add_generation_prompt"]};
    auto pieces = render_chat(id, tokenizer, messages_of(j["messages"]), options);
    REQUIRE_MESSAGE(pieces.ok(), pieces.status().message());
    std::string text;
    for (const ChatPiece& piece : *pieces) text += piece.text;
    const std::string expected = j["text"];
    CHECK(text == expected);

    // The tokens are those of the whole text, but for what a user wrote in special tokens' words.
    std::vector<int32_t> ids, whole;
    REQUIRE(encode_chat(tokenizer, *pieces, &ids).ok());
    REQUIRE(tokenizer.encode(expected, {.parse_special = true}, &whole).ok());
    std::string decoded;
    REQUIRE(tokenizer.decode(ids, false, &decoded).ok());
    CHECK(decoded == expected);
    const bool injected = expected.find("injected") != std::string::npos;
    CHECK((ids == whole) == !injected);
    if (injected) {
      const int32_t user = *tokenizer.token_id("<｜User｜>");
      const auto count = [&](const std::vector<int32_t>& v) {
        return std::count(v.begin(), v.end(), user);
      };
      CHECK(count(ids) == count(whole) - 1);
    }
  }
  CHECK(lines == 330);
}

TEST_CASE("every published template is recognised") {
  const test::TemporaryFolder folder;
  std::ifstream in(test::source_path("tests/data/templates/jinja.jsonl"));
  size_t lines = 0;
  for (std::string line; std::getline(in, line); ++lines) {
    const auto j = nlohmann::json::parse(line);
    CAPTURE(std::string(j["from"]));
    test::write_bytes(folder.file("chat_template.jinja"), j["jinja"]);
    auto found = detect_chat_template(folder.path());
    REQUIRE_MESSAGE(found.ok(), found.status().message());
    CHECK(chat_template_name(*found) == std::string(j["template"]));
  }
  CHECK(lines == 10);
}

TEST_CASE("DeepSeek-V3's own template is recognised") {
  auto found = detect_chat_template(deepseek_v3());
  REQUIRE_MESSAGE(found.ok(), found.status().message());
  CHECK(*found == ChatTemplate::kV3);
}

}  // namespace dsv3
