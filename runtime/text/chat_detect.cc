// Which of the family's chat templates a checkpoint carries, told by what its Jinja text contains.
#include "runtime/base/json.h"
#include "runtime/base/os.h"
#include "runtime/text/chat.h"
#include "runtime/text/chat_format.h"

namespace dsv3 {
namespace {

constexpr uint64_t kMaxTemplateBytes = 4 << 20;

struct Found {
  std::string text;   // Jinja; empty: the checkpoint carries none
  std::string where;  // the file
};

// A template as JSON holds it: a string, or a list of named ones of which "default" counts.
Status from_json(const Json& value, Found* found) {
  if (value.is_null()) return {};
  if (value.is_string()) {
    found->text = value.get<std::string>();
    return {};
  }
  if (value.is_array()) {
    for (const Json& entry : value) {
      if (!entry.is_object() || !entry.contains("name") || !entry.contains("template")) continue;
      if (entry["name"] == "default" && entry["template"].is_string()) {
        found->text = entry["template"].get<std::string>();
        return {};
      }
    }
  }
  return make_error(Code::kCorrupt,
                    "%s: chat_template is %s, expected a text or a list with one named default",
                    found->where.c_str(), value.type_name());
}

Result<Found> find_template(const std::string& dir) {
  Found found;
  found.where = join_path(dir, "chat_template.jinja");
  if (file_exists(found.where)) {
    DSV3_ASSIGN(found.text, read_file(found.where, kMaxTemplateBytes));
    return found;
  }
  for (const char* name : {"chat_template.json", "tokenizer_config.json"}) {
    found.where = join_path(dir, name);
    if (!file_exists(found.where)) continue;
    DSV3_ASSIGN(const Json config, read_json(found.where, kSmallFile));
    if (!config.is_object() || !config.contains("chat_template")) continue;
    DSV3_TRY(from_json(config["chat_template"], &found));
    if (!found.text.empty()) return found;
  }
  return found;
}

// Something of an unknown template that lets a reader recognise it: its first marker of a turn, or
// its beginning.
std::string glimpse(const std::string& text) {
  const size_t begin = text.find("<|");
  const size_t end = text.find("|>", begin == std::string::npos ? 0 : begin);
  if (begin != std::string::npos && end != std::string::npos && end - begin < 60) {
    return text.substr(begin, end + 2 - begin);
  }
  return utf8_prefix(text, 60);
}

}  // namespace

Result<ChatTemplate> detect_chat_template(const std::string& checkpoint_dir) {
  DSV3_ASSIGN(const Found found, find_template(checkpoint_dir));
  const std::string& text = found.text;
  if (text.empty()) return ChatTemplate::kNone;
  const auto has = [&](const char* part) { return text.find(part) != std::string::npos; };
  if (has("<｜User｜>") && has("<｜Assistant｜>") && has("<｜end▁of▁sentence｜>")) {
    if (has("thinking") && has("</think>")) {
      return has("<think></think>") ? ChatTemplate::kV31 : ChatTemplate::kV31NoOpen;
    }
    for (const TurnFormat& format : turn_formats()) {
      if (format.joins_system == has("is_first_sp") &&
          format.strips_thought == has("split('</think>')") &&
          format.opens_thought == has("<｜Assistant｜><think>") &&
          format.closes_calls == has("'tool_calls' in message")) {
        return format.id;
      }
    }
  } else if (has("'User: '") && has("'Assistant: '") && has("'Assistant:'")) {
    return ChatTemplate::kV2;
  }
  return make_error(Code::kUnsupported,
                    "%s: the chat template with \"%s\" is not one of DeepSeek-V2, V3, R1 or V3.1",
                    found.where.c_str(), glimpse(text).c_str());
}

}  // namespace dsv3
