// The wordings are those of DeepSeek's checkpoints (V2, V3, R1 and V3.1) and of their uploads by
// others. They are composed of what TurnFormat says, as the published ones differ in just that.
#include "runtime/text/chat_jinja.h"

#include "runtime/text/chat_format.h"

namespace dsv3 {
namespace {

constexpr std::string_view kSpace = " \t\n\r\f\v";

bool is_word(char c) {
  const auto u = static_cast<unsigned char>(c);
  return (u >= 'a' && u <= 'z') || (u >= 'A' && u <= 'Z') || (u >= '0' && u <= '9') || u == '_' ||
         u >= 0x80;
}

// One pass over a template.
class Squeezer {
 public:
  explicit Squeezer(std::string_view text) : rest_(text) {
    if (rest_.ends_with('\n')) rest_.remove_suffix(1);  // as Jinja does
  }

  std::string run() {
    while (!rest_.empty()) {
      const size_t open = next_open();
      std::string_view between = rest_.substr(0, open);
      if (open == std::string_view::npos) {
        out_ += between;
        break;
      }
      const char kind = rest_[open + 1];
      rest_.remove_prefix(open + 2);
      trim_before(kind, &between);
      out_ += between;
      if (kind == '#') {
        skip_comment();
      } else {
        copy_tag(kind);
      }
    }
    return std::move(out_);
  }

 private:
  size_t next_open() const {
    size_t at = 0;
    while ((at = rest_.find('{', at)) != std::string_view::npos) {
      if (at + 1 < rest_.size() && std::string_view("{%#").find(rest_[at + 1]) < 3) return at;
      ++at;
    }
    return at;
  }

  // A tag that begins with a minus takes the white space before it; one that prints nothing takes
  // the spaces before it when nothing else stands on its line.
  void trim_before(char kind, std::string_view* between) {
    if (rest_.starts_with('-')) {
      rest_.remove_prefix(1);
      between->remove_suffix(between->size() - (between->find_last_not_of(kSpace) + 1));
      return;
    }
    if (kind == '{') return;
    const size_t line = between->rfind('\n') + 1;  // 0: none
    const bool blank = between->find_first_not_of(" \t", line) == std::string_view::npos;
    if (blank && (line > 0 || line_begins_)) between->remove_suffix(between->size() - line);
  }

  // The same on its other side, where a tag that prints nothing takes one line break.
  void trim_after(char kind, bool minus) {
    std::string_view taken = rest_.substr(0, 0);
    if (minus) {
      const size_t kept = rest_.find_first_not_of(kSpace);
      taken = rest_.substr(0, kept);
    } else if (kind != '{' && rest_.starts_with('\n')) {
      taken = rest_.substr(0, 1);
    }
    line_begins_ = taken.ends_with('\n');
    rest_.remove_prefix(taken.size());
  }

  void skip_comment() {
    const size_t end = rest_.find("#}");
    const auto is_last = [&](char c) { return end > 0 && rest_[end - 1] == c; };
    // Without an end it is an error, and a plus keeps the white space beside it.
    if (end == std::string_view::npos || rest_.starts_with('+') || is_last('+')) {
      out_ += "{#";  // part of no known template
      return;
    }
    const bool minus = is_last('-');
    rest_.remove_prefix(end + 2);
    trim_after('#', minus);
  }

  void copy_tag(char kind) {
    const std::string_view close = kind == '{' ? "}}" : "%}";
    out_ += '{';
    out_ += kind;
    while (!rest_.empty()) {
      const size_t blank = rest_.find_first_not_of(kSpace);
      const bool spaced = blank != 0;
      rest_.remove_prefix(blank == std::string_view::npos ? rest_.size() : blank);
      if (rest_.empty()) return;
      const bool minus = rest_[0] == '-' && rest_.substr(1).starts_with(close);
      if (minus || rest_.starts_with(close)) {
        rest_.remove_prefix(close.size() + (minus ? 1 : 0));
        out_ += close;
        trim_after(kind, minus);
        return;
      }
      if (spaced && is_word(out_.back()) && is_word(rest_[0])) out_ += ' ';
      const char c = take();
      if (c == '\'' || c == '"') copy_quoted(c);
    }
  }

  // Up to the closing quote. A line break and \n say the same.
  void copy_quoted(char quote) {
    while (!rest_.empty()) {
      if (rest_[0] == '\n') {
        rest_.remove_prefix(1);
        out_ += "\\n";
        continue;
      }
      const char c = take();
      if (c == '\\' && !rest_.empty()) take();
      if (c == quote) return;
    }
  }

  char take() {
    const char c = rest_[0];
    rest_.remove_prefix(1);
    out_ += c;
    return c;
  }

  std::string_view rest_;
  std::string out_;
  bool line_begins_ = true;
};

constexpr const char* kPrologue =
    "{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}"
    "{% endif %}";
constexpr const char* kLoop = "{% for message in messages %}";
constexpr const char* kIfUser = "{% if message['role'] == 'user' %}{% set ns.is_tool = false %}";
constexpr const char* kIfAssistant = "{% if message['role'] == 'assistant' and ";
constexpr const char* kHasCalls =
    "message['tool_calls'] is defined and message['tool_calls'] is not none %}";
constexpr const char* kHasNoCalls =
    "(message['tool_calls'] is not defined or message['tool_calls'] is none) %}";
constexpr const char* kForCalls = "{% for tool in message['tool_calls'] %}";
constexpr const char* kCloseCalls = "{{ '<｜tool▁calls▁end｜><｜end▁of▁sentence｜>' }}";
constexpr const char* kStrip =
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}";

// Prints the system messages: joined by an empty line, or the last one.
std::string system_part(bool joins) {
  const std::string set = "{% set ns.system_prompt = ";
  std::string t = kLoop;
  t += "{% if message['role'] == 'system' %}";
  if (joins) {
    t += "{% if ns.is_first_sp %}" + set + "ns.system_prompt + message['content'] %}" +
         "{% set ns.is_first_sp = false %}{% else %}" + set +
         "ns.system_prompt + '\\n\\n' + message['content'] %}{% endif %}";
  } else {
    t += set + "message['content'] %}";
  }
  return t + "{% endif %}{% endfor %}{{ bos_token }}{{ ns.system_prompt }}";
}

// The calls of a message. `before` and `content` are what is printed before the first of them.
std::string calls_part(const std::string& before, const char* content, bool closes) {
  const std::string call =
      "<｜tool▁call▁begin｜>' + tool['type'] + '<｜tool▁sep｜>' + tool['function']['name'] + '\\n' "
      "+ '```json' + '\\n' + tool['function']['arguments'] + '\\n' + '```' + "
      "'<｜tool▁call▁end｜>' }}";
  std::string t = kForCalls;
  t += "{% if not ns.is_first %}";
  const std::string first = "{{ '" + before + "<｜tool▁calls▁begin｜>" + call;
  if (closes) {
    t += std::string("{% if ") + content + " is none %}" + first + "{% else %}{{ ";
    if (!before.empty()) t += "'" + before + "' + ";
    t += std::string(content) + " + '<｜tool▁calls▁begin｜>" + call + "{% endif %}";
  } else {
    t += first;
  }
  t += "{% set ns.is_first = true %}{% else %}{{ '\\n' + '" + call;
  if (!closes) t += kCloseCalls;
  t += "{% endif %}{% endfor %}";
  if (closes) t += kCloseCalls;
  return t + "{% endif %}";
}

std::string outputs_part(const char* content, bool breaks) {
  const std::string output =
      std::string("<｜tool▁output▁begin｜>' + ") + content + " + '<｜tool▁output▁end｜>' }}";
  return "{% set ns.is_tool = true %}{% if ns.is_output_first %}{{ '<｜tool▁outputs▁begin｜>" +
         output + "{% set ns.is_output_first = false %}{% else %}{{ '" + (breaks ? "\\n" : "") +
         output +
         "{% endif %}{% endif %}{% endfor %}"
         "{% if ns.is_tool %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}";
}

std::string turns_body(const TurnFormat& f) {
  std::string t = std::string(kIfUser) + "{{ '<｜User｜>' + message['content'] }}{% endif %}";
  t += std::string(kIfAssistant) +
       (f.closes_calls ? "'tool_calls' in message %}" : "message['content'] is none %}") +
       "{% set ns.is_tool = false %}" +
       calls_part("<｜Assistant｜>", "message['content']", f.closes_calls);
  t += std::string(kIfAssistant) +
       (f.closes_calls ? "'tool_calls' not in message %}" : "message['content'] is not none %}") +
       "{% if ns.is_tool %}"
       "{{ '<｜tool▁outputs▁end｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}"
       "{% set ns.is_tool = false %}{% else %}";
  if (f.strips_thought) {
    t += std::string("{% set content = message['content'] %}") + kStrip +
         "{{ '<｜Assistant｜>' + content + '<｜end▁of▁sentence｜>' }}";
  } else {
    t += "{{ '<｜Assistant｜>' + message['content'] + '<｜end▁of▁sentence｜>' }}";
  }
  t += "{% endif %}{% endif %}{% if message['role'] == 'tool' %}" +
       outputs_part("message['content']", !f.closes_calls);
  return t + "{% if add_generation_prompt and not ns.is_tool %}{{ '<｜Assistant｜>" +
         (f.opens_thought ? "<think>\\n" : "") + "' }}{% endif %}";
}

std::string reopening_body(const TurnFormat& f) {
  const char* const content = f.strips_thought ? "content" : "message['content']";
  const std::string set_content = "{% set content = message['content'] %}";
  const std::string not_user = "{% set ns.is_last_user = false %}";
  std::string t = f.strips_thought ? set_content : "";
  t += std::string(kIfUser) + "{% set ns.is_first = false %}{% set ns.is_last_user = true %}" +
       "{{ '<｜User｜>' + " + content + " + '<｜Assistant｜>' }}{% endif %}";
  if (f.strips_thought) {
    t += std::string("{% if message['role'] == 'assistant' %}") + kStrip + "{% endif %}";
  }
  t += std::string(kIfAssistant) + kHasCalls + not_user +
       "{% if ns.is_tool %}{{ '<｜tool▁outputs▁end｜>' }}{% endif %}{% set ns.is_first = false %}"
       "{% set ns.is_tool = false %}{% set ns.is_output_first = true %}" +
       calls_part("", content, true);
  t += std::string(kIfAssistant) + kHasNoCalls + not_user +
       "{% if ns.is_tool %}{{ '<｜tool▁outputs▁end｜>' + " + content +
       " + '<｜end▁of▁sentence｜>' }}{% set ns.is_tool = false %}{% else %}" +
       (f.strips_thought ? "" : set_content) +
       "{{ content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endif %}";
  t += "{% if message['role'] == 'tool' %}" + not_user + outputs_part(content, true);
  return t +
         "{% if add_generation_prompt and not ns.is_last_user and not ns.is_tool %}"
         "{{ '<｜Assistant｜>' }}{% endif %}";
}

std::string turns(const TurnFormat& f) {
  std::string t =
      "{% set ns = namespace(is_first=false, is_tool=false, is_output_first=true, "
      "system_prompt=''";
  if (f.joins_system) t += ", is_first_sp=true";
  if (f.reopens) t += ", is_last_user=false";
  return t + ") %}" + system_part(f.joins_system) + kLoop +
         (f.reopens ? reopening_body(f) : turns_body(f));
}

// V3.1. `thinking` and `strip` are wordings of the same.
std::string thoughts(const char* no_thought, bool prompts, const char* thinking,
                     const char* strip) {
  const std::string none = std::string("{{ '") + no_thought + "' }}";
  const std::string not_user = "{% set ns.is_last_user = false %}";
  const std::string call =
      "<｜tool▁call▁begin｜>' + tool['function']['name'] + '<｜tool▁sep｜>' + "
      "tool['function']['arguments'] + '<｜tool▁call▁end｜>' }}";
  std::string system = system_part(true);
  if (prompts) {
    const std::string_view end = "{% endif %}{% endfor %}";
    system.insert(system.find(end), "{% set ns.is_only_sys = true %}");
  }
  std::string t = std::string(thinking) +
                  "{% set ns = namespace(is_first=false, is_tool=false, system_prompt='', "
                  "is_first_sp=true, is_last_user=false" +
                  (prompts ? ", is_only_sys=false, is_prefix=false" : "") + ") %}" + system + kLoop;
  t += std::string(kIfUser) + "{% set ns.is_first = false %}{% set ns.is_last_user = true %}" +
       "{{ '<｜User｜>' + message['content'] }}{% endif %}";
  t += std::string(kIfAssistant) + kHasCalls + "{% if ns.is_last_user" +
       (prompts ? " or ns.is_only_sys" : "") + " %}{{ '<｜Assistant｜>" + no_thought +
       "' }}{% endif %}" + not_user + "{% set ns.is_first = false %}{% set ns.is_tool = false %}";
  t += std::string(kForCalls) + "{% if not ns.is_first %}{% if message['content'] is none %}" +
       "{{ '<｜tool▁calls▁begin｜>" + call +
       "{% else %}{{ message['content'] + '<｜tool▁calls▁begin｜>" + call +
       "{% endif %}{% set ns.is_first = true %}{% else %}{{ '" + call + "{% endif %}{% endfor %}" +
       kCloseCalls + "{% endif %}";
  t += std::string(kIfAssistant) + kHasNoCalls + "{% if ns.is_last_user %}{{ '<｜Assistant｜>' }}" +
       "{% if message['prefix'] is defined and message['prefix'] and thinking %}" +
       "{{ '<think>' }}{% else %}" + none + "{% endif %}{% endif %}";
  if (prompts) {
    t += "{% if message['prefix'] is defined and message['prefix'] %}"
         "{% set ns.is_prefix = true %}{% endif %}";
  }
  t += not_user +
       "{% if ns.is_tool %}{{ message['content'] + '<｜end▁of▁sentence｜>' }}"
       "{% set ns.is_tool = false %}{% else %}{% set content = message['content'] %}"
       "{% if '</think>' in content %}" +
       strip + "{% endif %}{{ content + '<｜end▁of▁sentence｜>' }}{% endif %}{% endif %}";
  t += "{% if message['role'] == 'tool' %}" + not_user +
       "{% set ns.is_tool = true %}{{ '<｜tool▁output▁begin｜>' + message['content'] + "
       "'<｜tool▁output▁end｜>' }}{% endif %}";
  if (prompts) {
    t += "{% if message['role'] != 'system' %}{% set ns.is_only_sys = false %}{% endif %}";
  }
  t += "{% endfor %}";
  t += prompts ? "{% if add_generation_prompt and not ns.is_tool %}"
                 "{% if ns.is_last_user or ns.is_only_sys or not ns.is_prefix %}"
               : "{% if add_generation_prompt and ns.is_last_user and not ns.is_tool %}";
  t += "{{ '<｜Assistant｜>' }}{% if not thinking %}" + none +
       "{% else %}{{ '<think>' }}{% endif %}{% endif %}";
  return prompts ? t + "{% endif %}" : t;
}

void add_thoughts(std::vector<KnownTemplate>* out) {
  constexpr const char* kThinking[] = {
      "{% if not thinking is defined %}{% set thinking = false %}{% endif %}",
      "{% if not thinking is defined %}{% if enable_thinking is defined %}"
      "{% set thinking = enable_thinking %}{% else %}{% set thinking = false %}{% endif %}"
      "{% endif %}",
      "{% if enable_thinking is defined and enable_thinking is false %}"
      "{% set thinking = false %}"
      "{% elif enable_thinking is defined and enable_thinking is true %}"
      "{% set thinking = true %}"
      "{% elif not thinking is defined %}{% set thinking = false %}{% endif %}"};
  constexpr const char* kSplit[] = {"{% set content = content.split('</think>', 1)[1] %}",
                                    "{% set splitted = content.split('</think>') %}"
                                    "{% set content = splitted[1:] | join('</think>') %}"};
  const auto add = [&](ChatTemplate id, const char* no_thought, bool prompts) {
    for (const char* thinking : kThinking) {
      for (const char* strip : kSplit) {
        out->push_back({id, squeeze_jinja(thoughts(no_thought, prompts, thinking, strip))});
      }
    }
  };
  add(ChatTemplate::kV31, "<think></think>", false);
  add(ChatTemplate::kV31NoOpen, "</think>", false);
  add(ChatTemplate::kV31Prompts, "</think>", true);
}

}  // namespace

std::string squeeze_jinja(std::string_view text) { return Squeezer(text).run(); }

std::string_view without_prologue(std::string_view squeezed) {
  const std::string prologue = squeeze_jinja(kPrologue);
  if (squeezed.starts_with(prologue)) squeezed.remove_prefix(prologue.size());
  return squeezed;
}

std::vector<KnownTemplate> known_templates() {
  std::vector<KnownTemplate> known;
  for (const TurnFormat& f : turn_formats()) known.push_back({f.id, squeeze_jinja(turns(f))});
  add_thoughts(&known);
  known.push_back(
      {ChatTemplate::kV2,
       squeeze_jinja("{{ bos_token }}{% for message in messages %}"
                     "{% if message['role'] == 'user' %}{{ 'User: ' + message['content'] + "
                     "'\\n\\n' }}{% elif message['role'] == 'assistant' %}"
                     "{{ 'Assistant: ' + message['content'] + eos_token }}"
                     "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
                     "{% endif %}{% endfor %}"
                     "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}")});
  return known;
}

}  // namespace dsv3
