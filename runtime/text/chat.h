// Chat templates of the family and DeepSeek's fill-in-the-middle form, written out in code: the
// checkpoints' Jinja templates are recognised when a model is converted and never run.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/status.h"
#include "runtime/text/tokenizer.h"

namespace dsv3 {

// Stored in the .dsv3 header; append-only.
enum class ChatTemplate : uint8_t {
  kNone = 0,
  kV2 = 1,   // DeepSeek-V2, V2-Lite, Coder-V2: "User: ...\n\nAssistant:"
  kV3 = 2,   // V3, V3-0324: <｜User｜>...<｜Assistant｜>, tool calls and outputs
  kR1 = 3,   // R1: V3's with <think>; reasoning of earlier turns is dropped
  kV31 = 4,  // V3.1: thinking and not
  // What later uploads of the same checkpoints carry.
  kV31NoOpen = 5,       // answers without reasoning begin with </think> alone
  kV3Tools = 6,         // content beside tool calls, every list of calls closed
  kR1Tools = 7,         // R1's with that, and system messages joined
  kR1ToolsNoThink = 8,  // 7 without <think> in the prompt: the model opens it itself
  kR1NoThink = 9,       // 3 without <think> in the prompt
  kV3Reopens = 10,      // V3-0324 as others upload it: every list of calls and outputs opened anew
  kR1Reopens = 11,      // R1-0528: 10 with reasoning of earlier turns dropped
  kV31Prompts = 12,     // 5 that prompts after an answer and after system messages alone, too
  kUnknown = 13,        // another one: no chat is rendered
};
inline constexpr ChatTemplate kLastChatTemplate = ChatTemplate::kUnknown;
const char* chat_template_name(ChatTemplate t);  // "none", "deepseek-v2", ...

// Which template a checkpoint carries: recognised by the whole text of its chat_template
// (chat_template.jinja, chat_template.json or tokenizer_config.json). kNone when it carries none;
// kUnknown when it carries one that is not known to be rendered so: the model completes text all
// the same.
Result<ChatTemplate> detect_chat_template(const std::string& checkpoint_dir);

struct ToolCall {
  std::string id, type, name, arguments;  // arguments: JSON text, inserted as it is
};
struct ChatMessage {
  std::string role;  // "system", "user", "assistant", "tool"
  std::string content;
  bool has_content = true;  // false: null content (an assistant message of tool calls alone)
  std::vector<ToolCall> tool_calls;
};
struct ChatOptions {
  bool thinking = false;
  bool add_generation_prompt = true;
};

// One piece of a rendered conversation: control text (parsed with special tokens) or text that came
// from a user (never parsed for them).
struct ChatPiece {
  std::string text;
  bool control = false;
};
// The conversation as pieces; concatenated they are what the Jinja template renders.
Result<std::vector<ChatPiece>> render_chat(ChatTemplate t, const Tokenizer& tokenizer,
                                           std::span<const ChatMessage> messages,
                                           const ChatOptions& options);
// Appends the tokens of a rendered conversation.
Status encode_chat(const Tokenizer& tokenizer, std::span<const ChatPiece> pieces,
                   std::vector<int32_t>* out);
// Whether an answer to this prompt begins inside a reasoning block: its generation prompt ends in
// an open <think>. Not every template writes one after every message.
bool starts_in_reasoning(std::span<const ChatPiece> prompt);

// <｜fim▁begin｜>prefix<｜fim▁hole｜>suffix<｜fim▁end｜>, with begin-of-sentence first where the
// tokenizer adds one. kUnsupported when the vocabulary lacks the tokens.
Status encode_fim(const Tokenizer& tokenizer, std::string_view prefix, std::string_view suffix,
                  std::vector<int32_t>* out);

}  // namespace dsv3
