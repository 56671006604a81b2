// Chat templates and fill-in-the-middle: what the golden conversations do not reach.
#include <filesystem>

#include "runtime/text/chat.h"
#include "tests/support/support.h"
#include "tests/unit/text_support.h"

namespace dsv3 {
namespace {

using test::added_token;
using test::OrderedJson;
using test::small_tokenizer;
using test::TestTokenizer;

constexpr const char* kConfig =
    R"({"bos_token": "<｜begin▁of▁sentence｜>", "eos_token": "<｜end▁of▁sentence｜>",
        "add_bos_token": true})";

OrderedJson chat_tokenizer() {
  OrderedJson j = small_tokenizer();
  const char* const texts[] = {
      "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>",   "<｜Assistant｜>",
      "<｜fim▁begin｜>",         "<｜fim▁hole｜>",        "<｜fim▁end｜>"};
  int id = 256;
  for (const char* text : texts) j["added_tokens"].push_back(added_token(id++, text));
  return j;
}
ChatMessage message(const std::string& role, const std::string& content) {
  return {role, content, true, {}};
}
ChatMessage call(const std::string& name, const std::string& arguments) {
  return {"assistant", "", false, {{"id", "function", name, arguments}}};
}
std::string render(ChatTemplate t, const std::vector<ChatMessage>& messages,
                   ChatOptions options = {}) {
  const TestTokenizer tokenizer(chat_tokenizer(), kConfig);
  Result<std::vector<ChatPiece>> pieces = render_chat(t, *tokenizer, messages, options);
  REQUIRE_MESSAGE(pieces.ok(), pieces.status().message());
  std::string text;
  for (const ChatPiece& piece : *pieces) text += piece.text;
  return text;
}
Status refusal(ChatTemplate t, const std::vector<ChatMessage>& messages, ChatOptions options = {}) {
  const TestTokenizer tokenizer(chat_tokenizer(), kConfig);
  const Result<std::vector<ChatPiece>> pieces = render_chat(t, *tokenizer, messages, options);
  REQUIRE(!pieces.ok());
  return pieces.status();
}

}  // namespace

TEST_CASE("messages that a template cannot render are refused") {
  const ChatMessage user = message("user", "q");
  CHECK(refusal(ChatTemplate::kV3, {message("User", "q")}).message() ==
        "messages[0].role is \"User\", expected system, user, assistant or tool");
  ChatMessage empty = user;
  empty.has_content = false;
  CHECK(refusal(ChatTemplate::kV3, {user, empty}).message().starts_with("messages[1]: has no"));
  empty.role = "assistant";
  CHECK(refusal(ChatTemplate::kV31, {empty}).code() == Code::kInvalidArgument);
  ChatMessage both = call("f", "{}");
  both.has_content = true;
  CHECK(refusal(ChatTemplate::kV3, {user, both}).code() == Code::kUnsupported);
  ChatMessage caller = call("f", "{}");
  caller.role = "user";
  CHECK(refusal(ChatTemplate::kV3, {caller}).code() == Code::kInvalidArgument);
  CHECK(refusal(ChatTemplate::kV2, {user, message("tool", "1")}).code() == Code::kUnsupported);
  CHECK(refusal(ChatTemplate::kV2, {user, call("f", "{}")}).code() == Code::kUnsupported);
  CHECK(refusal(ChatTemplate::kNone, {user}).message() == "the model has no chat template");
  CHECK(refusal(ChatTemplate::kV3, {user}, {.thinking = true}).field() == "thinking");
  CHECK(refusal(ChatTemplate::kV2, {user}, {.thinking = true}).field() == "thinking");
}

TEST_CASE("which answers begin inside reasoning") {
  const ChatOptions plain, thinking{.thinking = true}, no_prompt{.add_generation_prompt = false};
  const ChatMessage user = message("user", "q");
  const std::vector<ChatMessage> tool = {user, call("f", "{}"), message("tool", "1")};
  const auto starts = [&](ChatTemplate t, const ChatOptions& options,
                          const std::vector<ChatMessage>& messages) {
    const TestTokenizer tokenizer(chat_tokenizer(), kConfig);
    const Result<std::vector<ChatPiece>> pieces = render_chat(t, *tokenizer, messages, options);
    REQUIRE(pieces.ok());
    return starts_in_reasoning(pieces.value());
  };
  CHECK(starts(ChatTemplate::kR1, plain, {user}));
  CHECK(starts(ChatTemplate::kR1Tools, plain, {user}));
  CHECK(starts(ChatTemplate::kV31, thinking, {user}));
  CHECK(starts(ChatTemplate::kV31NoOpen, thinking, {user}));
  CHECK(!starts(ChatTemplate::kR1, no_prompt, {user}));
  CHECK(!starts(ChatTemplate::kR1ToolsNoThink, plain, {user}));
  CHECK(!starts(ChatTemplate::kV31, plain, {user}));
  CHECK(!starts(ChatTemplate::kV31, no_prompt, {user}));
  CHECK(!starts(ChatTemplate::kV3, plain, {user}));
  CHECK(!starts(ChatTemplate::kR1, no_prompt, {message("user", "<think>")}));
  // After a tool's output these templates open nothing: the answer is text from its first token.
  CHECK(!starts(ChatTemplate::kR1, plain, tool));
  CHECK(!starts(ChatTemplate::kR1Tools, plain, tool));
  CHECK(!starts(ChatTemplate::kV31, thinking, tool));
  CHECK(!starts(ChatTemplate::kV31, thinking, {user, message("assistant", "a")}));
}

TEST_CASE("later uploads' templates") {
  const std::vector<ChatMessage> talk = {
      message("system", "a"), message("system", "b"), message("user", "q"),
      message("assistant", "<think>x</think>y"), message("user", "r")};
  const std::string bos = "<｜begin▁of▁sentence｜>", eos = "<｜end▁of▁sentence｜>";
  CHECK(render(ChatTemplate::kV31NoOpen, talk) == bos +
                                                      "a\n\nb<｜User｜>q<｜Assistant｜></think>y" +
                                                      eos + "<｜User｜>r<｜Assistant｜></think>");
  CHECK(render(ChatTemplate::kR1Tools, talk) ==
        bos + "a\n\nb<｜User｜>q<｜Assistant｜>y" + eos + "<｜User｜>r<｜Assistant｜><think>\n");
  CHECK(render(ChatTemplate::kR1NoThink, talk) ==
        bos + "b<｜User｜>q<｜Assistant｜>y" + eos + "<｜User｜>r<｜Assistant｜>");
  ChatMessage both = call("f", "{}");
  both.has_content = true;
  both.content = "see";
  CHECK(render(ChatTemplate::kV3Tools, {both}, {.add_generation_prompt = false}) ==
        bos +
            "<｜Assistant｜>see<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"
            "```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>" +
            eos);
  CHECK(render(ChatTemplate::kV31, {message("user", "q"), both, message("tool", "1")}) ==
        bos +
            "<｜User｜>q<｜Assistant｜><think></think>see<｜tool▁calls▁begin｜>"
            "<｜tool▁call▁begin｜>f<｜tool▁sep｜>{}<｜tool▁call▁end｜><｜tool▁calls▁end｜>" +
            eos + "<｜tool▁output▁begin｜>1<｜tool▁output▁end｜>");
}

TEST_CASE("of several ends of thought, R1 takes the last and V3.1 the first") {
  const std::vector<ChatMessage> talk = {message("user", "q"),
                                         message("assistant", "a</think>b</think>c")};
  const ChatOptions options{.add_generation_prompt = false};
  const std::string end = "<｜end▁of▁sentence｜>";
  CHECK(render(ChatTemplate::kR1, talk, options).ends_with("<｜Assistant｜>c" + end));
  CHECK(render(ChatTemplate::kV31, talk, options).ends_with("</think>b</think>c" + end));
  CHECK(render(ChatTemplate::kV3, talk, options)
            .ends_with("<｜Assistant｜>a</think>b</think>c" + end));
}

TEST_CASE("what a user writes is never control text") {
  const TestTokenizer t(chat_tokenizer(), kConfig);
  const std::vector<ChatMessage> messages = {
      message("system", "<｜User｜>"), message("user", "<｜Assistant｜>"),
      message("assistant", "<｜end▁of▁sentence｜>"), message("user", "<｜begin▁of▁sentence｜>")};
  for (const ChatTemplate id :
       {ChatTemplate::kV2, ChatTemplate::kV3, ChatTemplate::kR1, ChatTemplate::kV31}) {
    Result<std::vector<ChatPiece>> pieces = render_chat(id, *t, messages, {});
    REQUIRE(pieces.ok());
    std::vector<int32_t> ids;
    REQUIRE(encode_chat(*t, *pieces, &ids).ok());
    const auto count = [&](const char* text) {
      return std::count(ids.begin(), ids.end(), *t->token_id(text));
    };
    const bool turns = id != ChatTemplate::kV2;
    CHECK(count("<｜begin▁of▁sentence｜>") == 1);
    CHECK(count("<｜end▁of▁sentence｜>") == 1);
    CHECK(count("<｜User｜>") == (turns ? 2 : 0));
    CHECK(count("<｜Assistant｜>") == (turns ? 2 : 0));
  }
}

TEST_CASE("templates are told by what they contain") {
  test::TemporaryFolder folder;
  CHECK(detect_chat_template(folder.path()).value() == ChatTemplate::kNone);
  const auto config = [&](const OrderedJson& chat_template) {
    test::write_bytes(folder.file("tokenizer_config.json"),
                      OrderedJson{{"chat_template", chat_template}}.dump());
    return detect_chat_template(folder.path());
  };
  const std::string turns =
      "{{'<｜User｜>' + message['content']}}{{'<｜Assistant｜>' + content + "
      "'<｜end▁of▁sentence｜>'}}";
  const std::string joins = "namespace(is_first_sp=true)", strips = "content.split('</think>')[-1]",
                    opens = "{{'<｜Assistant｜><think>\\n'}}", tools = "'tool_calls' in message",
                    v31 = "{% if thinking %}";
  CHECK(config(nullptr).value() == ChatTemplate::kNone);
  CHECK(config("").value() == ChatTemplate::kNone);
  CHECK(config(turns + joins).value() == ChatTemplate::kV3);
  CHECK(config(turns + strips + opens).value() == ChatTemplate::kR1);
  CHECK(config(turns + joins + tools).value() == ChatTemplate::kV3Tools);
  CHECK(config(turns + joins + tools + strips + opens).value() == ChatTemplate::kR1Tools);
  CHECK(config(turns + joins + tools + strips).value() == ChatTemplate::kR1ToolsNoThink);
  CHECK(config(turns + strips).value() == ChatTemplate::kR1NoThink);
  CHECK(config(turns + joins + v31 + "'</think>'").value() == ChatTemplate::kV31NoOpen);
  CHECK(config(turns + joins + v31 + "'<think></think>'").value() == ChatTemplate::kV31);
  const std::string v2 = "{{ 'User: ' + m }}{{ 'Assistant: ' + m }}{{ 'Assistant:' }}";
  CHECK(config(v2).value() == ChatTemplate::kV2);
  CHECK(config({{{"name", "rag"}, {"template", "x"}}, {{"name", "default"}, {"template", v2}}})
            .value() == ChatTemplate::kV2);
  const auto other = config("{{ '<|im_start|>' + role }}");
  REQUIRE(!other.ok());
  CHECK(other.status().code() == Code::kUnsupported);
  CHECK(other.status().message().find("<|im_start|>") != std::string::npos);
  CHECK(other.status().message().find("tokenizer_config.json") != std::string::npos);
  CHECK(config(7).status().code() == Code::kCorrupt);
  test::write_bytes(folder.file("chat_template.json"), "{}");
  CHECK(config(v2).value() == ChatTemplate::kV2);
  std::filesystem::resize_file(folder.file("chat_template.json"), (size_t{16} << 20) + 1);
  CHECK(config(v2).status().message() ==
        folder.file("chat_template.json") + ": has 16777217 bytes, expected at most 16777216");
  test::write_bytes(folder.file("chat_template.jinja"), turns + joins);
  CHECK(config(v2).value() == ChatTemplate::kV3);  // the file of its own comes first
}

TEST_CASE("fill in the middle") {
  const TestTokenizer t(chat_tokenizer(), kConfig);
  std::vector<int32_t> ids = {7};
  REQUIRE(encode_fim(*t, "a<｜User｜>", "b", &ids).ok());
  std::string text;
  REQUIRE(t->decode(ids, false, &text).ok());
  CHECK(text ==
        "\x07<｜begin▁of▁sentence｜><｜fim▁begin｜>a<｜User｜><｜fim▁hole｜>b<｜fim▁end｜>");
  CHECK(std::count(ids.begin(), ids.end(), *t->token_id("<｜User｜>")) == 0);
  CHECK(std::count(ids.begin(), ids.end(), *t->token_id("<｜fim▁hole｜>")) == 1);

  const TestTokenizer plain(small_tokenizer());
  ids = {7};
  const Status status = encode_fim(*plain, "a", "b", &ids);
  CHECK(status.code() == Code::kUnsupported);
  CHECK(status.message().find("<｜fim▁begin｜>") != std::string::npos);
  CHECK(ids == std::vector<int32_t>{7});
}

}  // namespace dsv3
