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

namespace {

// Finds the template of a folder whose tokenizer_config.json has one.
class Detector {
 public:
  Result<ChatTemplate> operator()(const OrderedJson& chat_template) const {
    test::write_bytes(folder_.file("tokenizer_config.json"),
                      OrderedJson{{"chat_template", chat_template}}.dump());
    return detect_chat_template(folder_.path());
  }
  const test::TemporaryFolder& folder() const { return folder_; }

 private:
  test::TemporaryFolder folder_;
};

// `text` with every `from` become `to`, of which there is one at least.
std::string with(std::string text, const std::string& from, const std::string& to) {
  size_t at = text.find(from);
  REQUIRE(at != std::string::npos);
  for (; at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
  return text;
}

}  // namespace

TEST_CASE("where a checkpoint's template is looked for") {
  const Detector config;
  const test::TemporaryFolder& folder = config.folder();
  const std::string v2 = test::published_template("deepseek-v2");
  CHECK(detect_chat_template(folder.path()).value() == ChatTemplate::kNone);
  CHECK(config(nullptr).value() == ChatTemplate::kNone);
  CHECK(config("").value() == ChatTemplate::kNone);
  CHECK(config(v2).value() == ChatTemplate::kV2);
  CHECK(config({{{"name", "rag"}, {"template", "x"}}, {{"name", "default"}, {"template", v2}}})
            .value() == ChatTemplate::kV2);
  CHECK(config({{{"name", "rag"}, {"template", v2}}}).value() == ChatTemplate::kUnknown);
  CHECK(config(nlohmann::json::array()).value() == ChatTemplate::kNone);
  CHECK(config(7).status().code() == Code::kCorrupt);
  test::write_bytes(folder.file("chat_template.json"), "{}");
  CHECK(config(v2).value() == ChatTemplate::kV2);
  std::filesystem::resize_file(folder.file("chat_template.json"), (size_t{16} << 20) + 1);
  CHECK(config(v2).status().message() ==
        folder.file("chat_template.json") + ": has 16777217 bytes, expected at most 16777216");
  test::write_bytes(folder.file("chat_template.jinja"), test::published_template("deepseek-v3"));
  CHECK(config(v2).value() == ChatTemplate::kV3);  // the file of its own comes first
}

TEST_CASE("templates that were not published, but say what others say") {
  const Detector config;
  const std::string v3 = test::published_template("deepseek-v3");
  // White space, comments and what is the default anyway.
  CHECK(config(with(v3, "%}{%-", "%}\n\n  {%-") + "\n").value() == ChatTemplate::kV3);
  CHECK(config(with(v3, " %}{% set", "   -%}\n {% set")).value() == ChatTemplate::kV3);
  CHECK(config(with(v3, "{{bos_token}}", "{# first #}{{-  bos_token\n-}}\n")).value() ==
        ChatTemplate::kV3);
  CHECK(config(v3.substr(v3.find("{% set ns"))).value() == ChatTemplate::kV3);
  CHECK(config(v3 + "{#- a note -#}\n").value() == ChatTemplate::kV3);
  // R1's without thought.
  const std::string strip =
      "{% set content = message['content'] %}{% if '</think>' in content %}"
      "{% set content = content.split('</think>')[-1] %}{% endif %}{{'<｜Assistant｜>' + content";
  const std::string r1 = test::published_template("deepseek-r1-tools-no-think");
  CHECK(config(with(r1, strip, "{{'<｜Assistant｜>' + message['content']")).value() ==
        ChatTemplate::kV3Tools);
  const std::string v31 = test::published_template("deepseek-v3.1-no-open");
  CHECK(config(with(v31, "</think>'}}", "<think></think>'}}")).value() == ChatTemplate::kV31);
}

TEST_CASE("a template that departs from the known ones is unknown") {
  const Detector config;
  const auto unknown = [&](const std::string& text) {
    CAPTURE(text);
    CHECK(config(text).value() == ChatTemplate::kUnknown);
  };
  const std::string v3 = test::published_template("deepseek-v3");
  const std::string has_calls =
      "message['tool_calls'] is defined and message['tool_calls'] is not none";
  const std::string none = "and message['content'] is none", close = "<｜tool▁calls▁end｜>";
  // Other tests for tool calls.
  unknown(with(v3, none, "and " + has_calls));
  unknown(with(v3, none, "and message.content is none"));
  const std::string tools = test::published_template("deepseek-r1-tools");
  unknown(with(tools, "'tool_calls' in message", has_calls));
  unknown(
      with(test::published_template("deepseek-v3-reopens"), has_calls, "message['tool_calls']"));
  // The same pieces elsewhere.
  const std::string end = "{{'" + close + "<｜end▁of▁sentence｜>'}}";
  unknown(with(v3, end + "{%- endif %}{%- endfor %}", "{%- endif %}{%- endfor %}" + end));
  unknown(with(tools, "{%- endfor %}" + end, end + "{%- endfor %}"));
  // Other texts, and what is printed between tags.
  unknown(with(tools, "'<｜tool▁output▁begin｜>'", "'\\n<｜tool▁output▁begin｜>'"));
  unknown(with(v3, close, ""));
  unknown(
      with(v3, "'<｜User｜>' + message['content']", "'<｜User｜>' + message['content'] | trim"));
  unknown(with(v3, "{{bos_token}}", "{{bos_token}} "));
  unknown(with(v3, "{{bos_token}}", "{{bos_token}}\n"));
  unknown(with(v3, "{{bos_token}}", "{{bos_token}}{% if tools %}{{tools}}{% endif %}"));
  // A plus keeps a line break or spaces that Jinja leaves out otherwise.
  unknown(with(v3, "{{bos_token}}", "{{bos_token}}{# first +#}\n"));
  unknown("  {#+ first #}" + v3);
  unknown(v3 + v3);
  unknown(v3.substr(0, v3.size() - 1));
  unknown(with(test::published_template("deepseek-v2"), "{{ 'Assistant:' }}", "{{ 'AI:' }}"));
  unknown("<｜User｜><｜Assistant｜><｜end▁of▁sentence｜>is_first_sp");
  for (const char* broken :
       {"{", "{{", "{%", "{#", "{{-", "{{'", "{{'\\", "{# #", "-}}", "{{-}}"}) {
    unknown(broken);
    unknown(v3 + broken);
  }
  unknown("{{ '<|im_start|>' + role }}");
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
