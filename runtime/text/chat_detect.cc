// Which of the family's chat templates a checkpoint carries, told by the whole of its Jinja text.
#include <algorithm>

#include "runtime/base/json.h"
#include "runtime/base/os.h"
#include "runtime/text/chat.h"
#include "runtime/text/chat_jinja.h"

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

// The tag in which a template departs from a known one after `at` bytes, for a message.
std::string departure(std::string_view squeezed, size_t at) {
  if (at == squeezed.size()) return "its end";
  const size_t begin = std::max(squeezed.rfind("{%", at) + 1, squeezed.rfind("{{", at) + 1);
  const size_t end = std::min(squeezed.find("%}", begin), squeezed.find("}}", begin));
  const bool within = begin > 0 && end != std::string_view::npos && at < end + 2;
  const std::string_view tag =
      within ? squeezed.substr(begin - 1, end + 2 - (begin - 1)) : squeezed.substr(at);
  return format("\"%s\"", utf8_prefix(tag, 120).c_str());
}

}  // namespace

// A template is known when its whole text, white space aside, is one that render_chat() is written
// after. Telling templates by some of their expressions took one with another test for tool calls
// for V3's and rendered it wrongly. A hash per text would be shorter, but could not say where an
// unknown template departs from the nearest known one.
Result<ChatTemplate> detect_chat_template(const std::string& checkpoint_dir) {
  DSV3_ASSIGN(const Found found, find_template(checkpoint_dir));
  if (found.text.empty()) return ChatTemplate::kNone;
  const std::string whole = squeeze_jinja(found.text);
  const std::string_view text = without_prologue(whole);
  size_t common = 0;
  for (const KnownTemplate& known : known_templates()) {
    if (text == known.squeezed) return known.id;
    const std::string_view other = known.squeezed;
    const auto differs = std::mismatch(text.begin(), text.end(), other.begin(), other.end()).first;
    common = std::max(common, static_cast<size_t>(differs - text.begin()));
  }
  if (text.find("<｜Assistant｜>") != std::string_view::npos && common > 0) {
    return make_error(Code::kUnsupported,
                      "%s: the chat template has %s where those of DeepSeek-V2, V3, R1 and V3.1 "
                      "go on otherwise; only these are rendered",
                      found.where.c_str(), departure(text, common).c_str());
  }
  return make_error(Code::kUnsupported,
                    "%s: the chat template with \"%s\" is not one of DeepSeek-V2, V3, R1 or V3.1",
                    found.where.c_str(), glimpse(found.text).c_str());
}

}  // namespace dsv3
