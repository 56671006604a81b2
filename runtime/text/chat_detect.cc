// Which of the family's chat templates a checkpoint carries, told by the whole of its Jinja text.
#include "runtime/base/json.h"
#include "runtime/base/os.h"
#include "runtime/text/chat.h"
#include "runtime/text/chat_jinja.h"

namespace dsv3 {
namespace {

constexpr uint64_t kMaxTemplateBytes = 4 << 20;

struct Found {
  std::string text;    // Jinja; empty: the checkpoint carries none
  std::string where;   // the file
  bool named = false;  // a list of named templates, none of which is the default
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
    found->named = !value.empty();
    return {};
  }
  return make_error(Code::kCorrupt, "%s: chat_template is %s, expected a text or a list",
                    found->where.c_str(), value.type_name());
}

Result<Found> find_template(const std::string& dir) {
  Found found;
  found.where = join_path(dir, "chat_template.jinja");
  DSV3_ASSIGN(const bool has_jinja, file_exists(found.where));
  if (has_jinja) {
    DSV3_ASSIGN(found.text, read_file(found.where, kMaxTemplateBytes));
    return found;
  }
  for (const char* name : {"chat_template.json", "tokenizer_config.json"}) {
    found.where = join_path(dir, name);
    DSV3_ASSIGN(const bool exists, file_exists(found.where));
    if (!exists) continue;
    DSV3_ASSIGN(const JsonDocument document, read_json(found.where, kSmallFile));
    const Json& config = *document;
    if (!config.is_object() || !config.contains("chat_template")) continue;
    DSV3_TRY(from_json(config["chat_template"], &found));
    if (!found.text.empty() || found.named) return found;
  }
  return found;
}

}  // namespace

// A template is known when its whole text, white space aside, is one that render_chat() is written
// after. Telling templates by some of their expressions took one with another test for tool calls
// for V3's and rendered it wrongly.
Result<ChatTemplate> detect_chat_template(const std::string& checkpoint_dir) {
  DSV3_ASSIGN(const Found found, find_template(checkpoint_dir));
  if (found.named) return ChatTemplate::kUnknown;
  if (found.text.empty()) return ChatTemplate::kNone;
  const std::string whole = squeeze_jinja(found.text);
  const std::string_view text = without_prologue(whole);
  for (const KnownTemplate& known : known_templates()) {
    if (text == known.squeezed) return known.id;
  }
  return ChatTemplate::kUnknown;
}

}  // namespace dsv3
