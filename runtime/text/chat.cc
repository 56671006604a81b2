#include "runtime/text/chat.h"

#include <algorithm>

#include "runtime/text/chat_format.h"

namespace dsv3 {
namespace {

constexpr TurnFormat kTurnFormats[] = {
    {ChatTemplate::kV3, "deepseek-v3", true, false, false, false, false},
    {ChatTemplate::kV3Tools, "deepseek-v3-tools", true, false, false, true, false},
    {ChatTemplate::kR1, "deepseek-r1", false, true, true, false, false},
    {ChatTemplate::kR1Tools, "deepseek-r1-tools", true, true, true, true, false},
    {ChatTemplate::kR1ToolsNoThink, "deepseek-r1-tools-no-think", true, true, false, true, false},
    {ChatTemplate::kR1NoThink, "deepseek-r1-no-think", false, true, false, false, false},
    {ChatTemplate::kV3Reopens, "deepseek-v3-reopens", true, false, false, true, true},
    {ChatTemplate::kR1Reopens, "deepseek-r1-reopens", true, true, false, true, true},
};
const TurnFormat* turn_format(ChatTemplate t) {
  for (const TurnFormat& format : kTurnFormats) {
    if (format.id == t) return &format;
  }
  return nullptr;
}

constexpr const char* kUser = "<｜User｜>";
constexpr const char* kAssistant = "<｜Assistant｜>";
constexpr const char* kEndOfSentence = "<｜end▁of▁sentence｜>";
constexpr const char* kOutputsEnd = "<｜tool▁outputs▁end｜>";
constexpr std::string_view kEndOfThought = "</think>";

// Collects pieces; neighbours of one sort become one.
class Pieces {
 public:
  void control(std::string_view text) { add(text, true); }
  void content(std::string_view text) { add(text, false); }
  std::vector<ChatPiece> take() { return std::move(pieces_); }

 private:
  void add(std::string_view text, bool control) {
    if (text.empty()) return;
    if (pieces_.empty() || pieces_.back().control != control) pieces_.push_back({{}, control});
    pieces_.back().text.append(text);
  }
  std::vector<ChatPiece> pieces_;
};

Status message_error(Code code, size_t i, const char* what) {
  return make_field_error(code, "messages", "messages[%zu]: %s", i, what);
}

// What every template needs of a message.
Status check_message(const ChatMessage& m, size_t i) {
  const bool assistant = m.role == "assistant";
  if (!assistant && m.role != "system" && m.role != "user" && m.role != "tool") {
    return make_field_error(
        Code::kInvalidArgument, "role",
        "messages[%zu].role is \"%s\", expected system, user, assistant or tool", i,
        utf8_prefix(m.role, 60).c_str());
  }
  if (!assistant && !m.tool_calls.empty()) {
    return message_error(Code::kInvalidArgument, i, "only an assistant calls tools");
  }
  if (!m.has_content && m.tool_calls.empty()) {
    return message_error(Code::kInvalidArgument, i,
                         "has no content; only an assistant's that calls tools may have none");
  }
  return {};
}

void begin(const Tokenizer& tokenizer, Pieces* out) {
  if (tokenizer.bos_id()) out->control(tokenizer.token_bytes(*tokenizer.bos_id()));
}

// The system messages stand first, wherever they came in the conversation.
void render_system(std::span<const ChatMessage> messages, bool joins, Pieces* out) {
  bool first = true;
  const ChatMessage* last = nullptr;
  for (const ChatMessage& m : messages) {
    if (m.role != "system") continue;
    last = &m;
    if (!joins) continue;
    if (!first) out->content("\n\n");
    out->content(m.content);
    first = false;
  }
  if (!joins && last != nullptr) out->content(last->content);
}

// ---- V2, Coder-V2

Status render_v2(const Tokenizer& tokenizer, std::span<const ChatMessage> messages,
                 const ChatOptions& options, Pieces* out) {
  for (size_t i = 0; i < messages.size(); ++i) {
    const ChatMessage& m = messages[i];
    if (m.role == "tool" || !m.tool_calls.empty()) {
      return message_error(Code::kUnsupported, i, "the template deepseek-v2 has no tools");
    }
    if (m.role == "user") {
      out->content("User: " + m.content + "\n\n");
    } else if (m.role == "system") {
      out->content(m.content + "\n\n");
    } else {
      out->content("Assistant: " + m.content);
      if (tokenizer.eos_id()) out->control(tokenizer.token_bytes(*tokenizer.eos_id()));
    }
  }
  if (options.add_generation_prompt) out->content("Assistant:");
  return {};
}

// ---- V3, R1

class TurnRenderer {
 public:
  TurnRenderer(const TurnFormat& format, Pieces* out) : format_(format), out_(out) {}

  Status run(std::span<const ChatMessage> messages, const ChatOptions& options) {
    for (size_t i = 0; i < messages.size(); ++i) {
      const ChatMessage& m = messages[i];
      if (m.role == "user") {
        in_tools_ = false;
        out_->control(kUser);
        out_->content(m.content);
        if (format_.reopens) out_->control(kAssistant);
      } else if (m.role == "tool") {
        tool_output(m);
      } else if (m.role == "assistant" && !m.tool_calls.empty()) {
        if (m.has_content && !format_.closes_calls) {
          return message_error(Code::kUnsupported, i,
                               "has content and tool calls; the model's template renders one of "
                               "them");
        }
        tool_calls(m);
      } else if (m.role == "assistant") {
        answer(m.content);
      }
      if (m.role != "system") after_user_ = m.role == "user";
    }
    if (in_tools_) out_->control(kOutputsEnd);
    const bool open = format_.reopens && after_user_;
    if (options.add_generation_prompt && !in_tools_ && !open) {
      out_->control(kAssistant);
      if (format_.opens_thought) out_->control("<think>\n");
    }
    return {};
  }

 private:
  // Most templates open the list of calls once in a conversation, and where they do not close each
  // list, they close after every call but the first: so it is published, and so it was trained.
  void tool_calls(const ChatMessage& m) {
    if (format_.reopens) {
      if (in_tools_) out_->control(kOutputsEnd);
      called_ = had_output_ = false;
    }
    in_tools_ = false;
    for (const ToolCall& call : m.tool_calls) {
      const bool first = !called_;
      if (first) {
        if (!format_.reopens) out_->control(kAssistant);
        if (m.has_content) {
          out_->content(format_.reopens ? without_thought(m.content) : m.content);
        }
        out_->control("<｜tool▁calls▁begin｜>");
      } else {
        out_->control("\n");
      }
      called_ = true;
      out_->control("<｜tool▁call▁begin｜>");
      out_->content(call.type.empty() ? "function" : std::string_view(call.type));
      out_->control("<｜tool▁sep｜>");
      out_->content(call.name + "\n```json\n" + call.arguments + "\n```");
      out_->control("<｜tool▁call▁end｜>");
      if (!first && !format_.closes_calls) close_calls();
    }
    if (format_.closes_calls) close_calls();
  }
  void close_calls() {
    out_->control("<｜tool▁calls▁end｜>");
    out_->control(kEndOfSentence);
  }
  // The templates that close each list of calls have no line break between outputs, but for those
  // that open each list anew.
  void tool_output(const ChatMessage& m) {
    in_tools_ = true;
    if (!had_output_) {
      out_->control("<｜tool▁outputs▁begin｜>");
    } else if (!format_.closes_calls || format_.reopens) {
      out_->control("\n");
    }
    had_output_ = true;
    out_->control("<｜tool▁output▁begin｜>");
    out_->content(m.content);
    out_->control("<｜tool▁output▁end｜>");
  }
  void answer(std::string_view text) {
    if (in_tools_) {
      out_->control(kOutputsEnd);
      if (format_.reopens) text = without_thought(text);
    } else {
      if (!format_.reopens) out_->control(kAssistant);
      text = without_thought(text);
    }
    in_tools_ = false;
    out_->content(text);
    out_->control(kEndOfSentence);
  }
  std::string_view without_thought(std::string_view text) const {
    const size_t thought = text.rfind(kEndOfThought);
    if (format_.strips_thought && thought != std::string_view::npos) {
      text.remove_prefix(thought + kEndOfThought.size());
    }
    return text;
  }

  const TurnFormat& format_;
  Pieces* const out_;
  bool in_tools_ = false;  // the last message was a tool's
  bool after_user_ = false;
  bool called_ = false;
  bool had_output_ = false;
};

// ---- V3.1

void render_v31_calls(const ChatMessage& m, Pieces* out) {
  bool first = true;
  for (const ToolCall& call : m.tool_calls) {
    if (first) {
      if (m.has_content) out->content(m.content);
      out->control("<｜tool▁calls▁begin｜>");
    }
    first = false;
    out->control("<｜tool▁call▁begin｜>");
    out->content(call.name);
    out->control("<｜tool▁sep｜>");
    out->content(call.arguments);
    out->control("<｜tool▁call▁end｜>");
  }
  out->control("<｜tool▁calls▁end｜>");
  out->control(kEndOfSentence);
}

struct ThoughtFormat {
  std::string_view no_thought;  // what an answer without reasoning begins with
  bool prompts;  // after an answer, and system messages alone are followed as a user's message is
};
const ThoughtFormat* thought_format(ChatTemplate t) {
  static constexpr ThoughtFormat kV31{"<think></think>", false}, kNoOpen{"</think>", false},
      kPrompts{"</think>", true};
  if (t == ChatTemplate::kV31) return &kV31;
  if (t == ChatTemplate::kV31NoOpen) return &kNoOpen;
  return t == ChatTemplate::kV31Prompts ? &kPrompts : nullptr;
}

void render_v31(const ThoughtFormat& format, std::span<const ChatMessage> messages,
                const ChatOptions& options, Pieces* out) {
  const std::string_view no_thought = format.no_thought;
  bool after_user = false;
  bool after_tool = false;
  const auto is_system = [](const ChatMessage& m) { return m.role == "system"; };
  bool after_system = format.prompts && std::any_of(messages.begin(), messages.end(), is_system);
  for (const ChatMessage& m : messages) {
    if (m.role == "user") {
      after_user = true;
      after_system = after_tool = false;
      out->control(kUser);
      out->content(m.content);
    } else if (m.role == "tool") {
      after_user = after_system = false;
      after_tool = true;
      out->control("<｜tool▁output▁begin｜>");
      out->content(m.content);
      out->control("<｜tool▁output▁end｜>");
    } else if (m.role == "assistant") {
      if (after_user || (after_system && !m.tool_calls.empty())) {
        out->control(kAssistant);
        out->control(no_thought);
      }
      after_user = false;
      after_system = false;
      if (!m.tool_calls.empty()) {
        after_tool = false;
        render_v31_calls(m, out);
        continue;
      }
      std::string_view text = m.content;
      const size_t thought = text.find(kEndOfThought);
      if (!after_tool && thought != std::string_view::npos) {
        text.remove_prefix(thought + kEndOfThought.size());
      }
      after_tool = false;
      out->content(text);
      out->control(kEndOfSentence);
    }
  }
  if (options.add_generation_prompt && (after_user || format.prompts) && !after_tool) {
    out->control(kAssistant);
    out->control(options.thinking ? "<think>" : no_thought);
  }
}

}  // namespace

std::span<const TurnFormat> turn_formats() { return kTurnFormats; }

const char* chat_template_name(ChatTemplate t) {
  if (const TurnFormat* format = turn_format(t)) return format->name;
  switch (t) {
    case ChatTemplate::kNone:
      return "none";
    case ChatTemplate::kV2:
      return "deepseek-v2";
    case ChatTemplate::kV31:
      return "deepseek-v3.1";
    case ChatTemplate::kV31NoOpen:
      return "deepseek-v3.1-no-open";
    case ChatTemplate::kV31Prompts:
      return "deepseek-v3.1-prompts";
    default:
      return "unknown";
  }
}

Result<std::vector<ChatPiece>> render_chat(ChatTemplate t, const Tokenizer& tokenizer,
                                           std::span<const ChatMessage> messages,
                                           const ChatOptions& options) {
  for (size_t i = 0; i < messages.size(); ++i) DSV3_TRY(check_message(messages[i], i));
  if (t == ChatTemplate::kUnknown) {
    return make_error(Code::kUnsupported,
                      "the model's chat template is none of those that are rendered, which are "
                      "DeepSeek-V2's, V3's, R1's and V3.1's");
  }
  const ThoughtFormat* thoughts = thought_format(t);
  const TurnFormat* turns = turn_format(t);
  if (options.thinking && thoughts == nullptr && (turns == nullptr || !turns->strips_thought)) {
    return make_field_error(Code::kUnsupported, "thinking",
                            "the model's chat template (%s) cannot make it think",
                            chat_template_name(t));
  }
  Pieces out;
  begin(tokenizer, &out);
  if (t == ChatTemplate::kV2) {
    DSV3_TRY(render_v2(tokenizer, messages, options, &out));
    return out.take();
  }
  if (thoughts != nullptr) {
    render_system(messages, true, &out);
    render_v31(*thoughts, messages, options, &out);
    return out.take();
  }
  if (turns == nullptr) return make_error(Code::kUnsupported, "the model has no chat template");
  render_system(messages, turns->joins_system, &out);
  DSV3_TRY(TurnRenderer(*turns, &out).run(messages, options));
  return out.take();
}

Status encode_chat(const Tokenizer& tokenizer, std::span<const ChatPiece> pieces,
                   std::vector<int32_t>* out) {
  std::vector<TextPart> parts;
  parts.reserve(pieces.size());
  for (const ChatPiece& piece : pieces) parts.push_back({piece.text, piece.control});
  return tokenizer.encode_parts(parts, out);
}

bool starts_in_reasoning(std::span<const ChatPiece> prompt) {
  if (prompt.empty() || !prompt.back().control) return false;
  const std::string_view end = prompt.back().text;
  return end.ends_with("<think>") || end.ends_with("<think>\n");
}

Status encode_fim(const Tokenizer& tokenizer, std::string_view prefix, std::string_view suffix,
                  std::vector<int32_t>* out) {
  constexpr const char* kNames[] = {"<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"};
  int32_t ids[3] = {};
  for (int i = 0; i < 3; ++i) {
    const std::optional<int32_t> id = tokenizer.token_id(kNames[i]);
    if (!id) {
      return make_error(Code::kUnsupported,
                        "the model's vocabulary has no token %s, so it cannot fill in the middle",
                        kNames[i]);
    }
    ids[i] = *id;
  }
  const size_t begin_size = out->size();
  if (tokenizer.add_bos() && tokenizer.bos_id()) out->push_back(*tokenizer.bos_id());
  out->push_back(ids[0]);
  Status status = tokenizer.encode(prefix, {}, out);
  out->push_back(ids[1]);
  if (status.ok()) status = tokenizer.encode(suffix, {}, out);
  out->push_back(ids[2]);
  if (!status.ok()) out->resize(begin_size);
  return status;
}

}  // namespace dsv3
