// dsv3 chat FILE: a conversation, on a terminal or line by line from a program.
#include <unistd.h>

#include <algorithm>
#include <memory>

#include "commands.h"
#include "common.h"
#include "generation.h"
#include "options.h"

namespace cli {

namespace {

struct Options {
  ModelOptions model;
  ContextOptions context;
  SamplingOptions sampling;
  OutputOptions output;
  std::string system;
  bool thinking = false;
};

struct Message {
  const char* role;
  std::string content;
};

class Conversation {
 public:
  Conversation(dsv3_session* session, const Options& options, const dsv3_model_info& info)
      : session_(session), options_(options) {
    longest_ = static_cast<uint64_t>(info.max_position_embeddings);
    // A quarter at most: who allows endless answers still wants a history.
    reserved_ = std::min(options.sampling.max_tokens, longest_ / 4);
    clear();
  }

  void clear() {
    messages_.clear();
    if (!options_.system.empty()) messages_.push_back({"system", options_.system});
    first_turn_ = messages_.size();
    answered_ = messages_;
  }

  // Adds what the user says and makes it the session's sequence. What the conversation so far has
  // in common with the last turn stays computed. The oldest questions and answers are forgotten, as
  // long as there are some, where the model could not read them all and answer.
  void say(const std::string& text) {
    messages_.push_back({"user", text});
    int forgotten = 0;
    for (;; ++forgotten) {
      dsv3_error* error = nullptr;
      const dsv3_status status = append(&error);
      if (status == DSV3_OK && dsv3_session_length(session_) + reserved_ <= longest_) break;
      const bool may_forget = messages_.size() >= first_turn_ + 3;
      if (status == DSV3_OK && !may_forget) break;
      if (status != DSV3_OK && (status != DSV3_E_CAPACITY || !may_forget)) {
        throw_failure(status, error);
      }
      dsv3_error_free(error);
      const auto oldest = messages_.begin() + static_cast<ptrdiff_t>(first_turn_);
      messages_.erase(oldest, oldest + 2);
    }
    if (forgotten == 0) return;
    const std::string turns = forgotten == 1 ? "turn is" : format("%d turns are", forgotten);
    write_err(
        "dsv3: the conversation and an answer are longer than the model can read: the oldest " +
        turns + " forgotten\n");
  }

  // The reasoning is not part of the history: the published templates leave it out as well.
  void answered(const std::string& text) {
    messages_.push_back({"assistant", text});
    answered_ = messages_;
  }

  // As if what has no answer had not been said, and nothing been forgotten for it.
  void take_back() { messages_ = answered_; }

 private:
  dsv3_status append(dsv3_error** error) {
    std::vector<dsv3_message> messages;
    for (const Message& m : messages_) {
      dsv3_message message;
      dsv3_message_init(&message, sizeof message);
      message.role = m.role;
      message.content = m.content.data();
      message.content_length = m.content.size();
      messages.push_back(message);
    }
    dsv3_chat chat;
    dsv3_chat_init(&chat, sizeof chat);
    chat.messages = messages.data();
    chat.message_count = static_cast<uint32_t>(messages.size());
    chat.message_stride = sizeof(dsv3_message);
    chat.thinking = options_.thinking ? 1 : 0;
    return dsv3_session_append_chat(session_, &chat, DSV3_APPEND_REPLACE, nullptr, nullptr, error);
  }

  dsv3_session* session_;
  const Options& options_;
  std::vector<Message> messages_, answered_;  // answered_: up to the last answer
  size_t first_turn_ = 0;
  uint64_t longest_ = 0, reserved_ = 0;  // tokens
};

bool is_blank(const std::string& text) {
  return text.find_first_not_of(" \t\r\n") == std::string::npos;
}

// What the user says next; false at the end of the input. With --json a line is a JSON object
// {"content": TEXT}, otherwise it is the text itself, and a backslash at its end adds the next
// line.
bool read_turn(const Options& o, bool interactive, std::string* text) {
  text->clear();
  std::string line;
  bool more = true;
  for (bool first = true; more; first = false) {
    if (interactive) write_out(first ? "> " : ". ");
    if (!read_line(&line)) return !text->empty();
    if (o.output.machine()) break;
    more = !line.empty() && line.back() == '\\';
    if (more) line.back() = '\n';
    *text += line;
  }
  if (!o.output.machine() || is_blank(line)) return true;
  try {
    const Json value = Json::parse(line);
    *text = value.at("content").get<std::string>();
  } catch (const Json::exception& error) {
    throw Failure("standard input: found " + line.substr(0, 60) +
                  ", expected a JSON object with \"content\", a text: " + error.what());
  }
  return true;
}

void run(Options& o, Main& main) {
  main.json = o.output.machine();
  Interrupt interrupt;
  claim_standard_input();
  // Before the model is opened, which wrong options need not wait for.
  dsv3_request_options options = o.sampling.make(interrupt);
  require_utf8(o.system, "--system");
  const Model model = o.model.open(interrupt);
  const Context context = o.context.create(model.get());
  const Session session = create_session(context.get());
  Conversation conversation(session.get(), o, model_info(model.get()));
  const bool interactive = isatty(STDIN_FILENO) == 1 && stdout_is_terminal() && !o.output.machine();
  const auto turn = [&](const std::string& text) {
    require_utf8(text, "standard input");
    if (interrupt.is_set()) interrupt.renew();
    options.cancel = interrupt.token();
    conversation.say(text);
    const Generation result = generate(session.get(), options, o.output);
    conversation.answered(result.text);
    if (o.output.json) write_json(to_json(model.get(), result, o.sampling.logprobs));
    if (!o.output.machine()) write_out("\n");
    report(model.get(), context.get(), result, o.output, o.sampling.logprobs);
    return exit_code(result);
  };
  if (interactive) {
    write_err(
        format("%s. /clear starts anew, /quit or Ctrl-D ends, Ctrl-C stops an answer, a "
               "backslash at a line's end adds a line.\n",
               o.model.file.c_str()));
  }
  std::string text;
  while (read_turn(o, interactive, &text)) {
    if (is_blank(text)) continue;
    if (interactive && text == "/quit") break;
    if (interactive && text == "/clear") {
      conversation.clear();
      continue;
    }
    int code = kExitDone;
    try {
      code = turn(text);
    } catch (const Failure& failure) {
      if (!interactive) throw;
      // One question does not end the conversation.
      conversation.take_back();
      write_err(std::string("dsv3: ") + failure.what() + "\n");
    }
    if (!interactive && code != kExitDone) {
      main.exit_code = code;
      break;
    }
  }
  if (interactive) write_out("\n");
  o.context.end_trace(context.get());
}

}  // namespace

void add_chat(CLI::App& app, Main& main) {
  CLI::App* command = app.add_subcommand(
      "chat", "Talk to the model: on a terminal, or one line of standard input per turn");
  auto o = std::make_shared<Options>();
  o->sampling.max_tokens = 1024;
  o->model.add_to(*command);
  command->add_option("--system", o->system, "the system message");
  command->add_flag("--thinking", o->thinking, "ask for reasoning where the template can");
  o->context.add_to(*command);
  o->sampling.add_to(*command);
  o->output.add_to(*command);
  command->footer(
      "With --json or --json-events each line of standard input is {\"content\": TEXT}.");
  command->callback([o, &main] { run(*o, main); });
}

}  // namespace cli
