// dsv3 complete FILE: what belongs at a cursor, streamed.
#include <algorithm>
#include <memory>

#include "commands.h"
#include "common.h"
#include "cursor.h"
#include "generation.h"
#include "options.h"

namespace cli {

namespace {

struct Options {
  ModelOptions model;
  ContextOptions context;
  SamplingOptions sampling;
  OutputOptions output;
  std::string file, prefix_file, suffix_file;
  uint64_t line = 0, column = 0, context_tokens = 0, show = 0;
};

constexpr uint64_t kTemplateTokens =
    4;  // begin of sentence and the three fill-in-the-middle tokens

Cursor read_cursor(const Options& o) {
  if (!o.file.empty()) {
    if (o.line == 0) throw Misuse("complete: --file needs --line");
    const std::string text = read_input(o.file);
    require_utf8(text, o.file);
    return split_at(text, o.file, o.line, o.column);
  }
  if (o.prefix_file.empty()) throw Misuse("complete: give --file and --line, or --prefix-file");
  Cursor cursor;
  cursor.prefix = read_input(o.prefix_file);
  require_utf8(cursor.prefix, o.prefix_file);
  if (!o.suffix_file.empty()) {
    cursor.suffix = read_input(o.suffix_file);
    require_utf8(cursor.suffix, o.suffix_file);
  }
  return cursor;
}

// The tokens that the prompt may have so that the answer still fits behind it.
uint64_t prompt_budget(const Options& o, const dsv3_model_info& info) {
  const auto longest = static_cast<uint64_t>(info.max_position_embeddings);
  const uint64_t reserved = kTemplateTokens + o.sampling.max_tokens;
  if (reserved >= longest) {
    throw Misuse(
        format("--max-tokens: found %llu, expected less than %llu: the model's longest "
               "sequence is %llu tokens, prompt included",
               static_cast<unsigned long long>(o.sampling.max_tokens),
               static_cast<unsigned long long>(longest - kTemplateTokens),
               static_cast<unsigned long long>(longest)));
  }
  const uint64_t room = longest - reserved;
  return o.context_tokens == 0 ? room : std::min(room, o.context_tokens);
}

std::string_view last_lines(std::string_view text, uint64_t count) {
  size_t at = text.size();
  while (count > 0 && at > 0) {
    const size_t newline = text.rfind('\n', at - 1);
    if (newline == std::string_view::npos) return text;
    at = newline;
    --count;
  }
  return at == text.size() ? text.substr(at) : text.substr(at + 1);
}

std::string_view first_lines(std::string_view text, uint64_t count) {
  size_t at = 0;
  while (count > 0 && at < text.size()) {
    at = std::min(text.find('\n', at), text.size() - 1) + 1;
    --count;
  }
  return text.substr(0, at);
}

// The surroundings of the completion, dimmed where that can be seen.
void show_context(const Options& o, std::string_view text) {
  if (o.show == 0 || o.output.machine() || text.empty()) return;
  const bool dim = stdout_is_terminal();
  write_out((dim ? "\033[2m" : "") + std::string(text) + (dim ? "\033[0m" : ""));
}

void run(Options& o, Main& main) {
  main.json = o.output.machine();
  Interrupt interrupt;
  const dsv3_request_options options = o.sampling.make(interrupt);
  const Cursor cursor = read_cursor(o);
  const Model model = o.model.open(interrupt);
  const dsv3_model_info info = model_info(model.get());
  const Fitted fitted = fit(model.get(), cursor, prompt_budget(o, info));
  if (fitted.dropped_before + fitted.dropped_after > 0) {
    write_err(format(
        "dsv3: the text around the cursor is longer than the prompt may be: left out "
        "%s at the beginning and %s at the end\n",
        human_bytes(fitted.dropped_before).c_str(), human_bytes(fitted.dropped_after).c_str()));
  }
  const Context context = o.context.create(model.get());
  const Session session = create_session(context.get());
  const std::string& prefix = fitted.cursor.prefix;
  const std::string& suffix = fitted.cursor.suffix;
  const bool plain = o.file.empty() && o.suffix_file.empty();
  call([&](dsv3_error** e) {
    return plain ? dsv3_session_append_text(session.get(), prefix.data(), prefix.size(),
                                            DSV3_APPEND_ADD_BOS, nullptr, nullptr, e)
                 : dsv3_session_append_fim(session.get(), prefix.data(), prefix.size(),
                                           suffix.data(), suffix.size(), 0, nullptr, nullptr, e);
  });
  show_context(o, last_lines(prefix, o.show));
  const Generation result = generate(session.get(), options, o.output);
  show_context(o, first_lines(suffix, o.show));
  if (o.output.json) {
    Json out = to_json(model.get(), result, o.sampling.logprobs);
    out["prompt"] = {{"prefix_tokens", fitted.prefix_tokens},
                     {"suffix_tokens", fitted.suffix_tokens},
                     {"dropped_bytes_before", fitted.dropped_before},
                     {"dropped_bytes_after", fitted.dropped_after}};
    write_json(out);
  }
  if (!o.output.machine() && stdout_is_terminal()) write_out("\n");
  report(model.get(), context.get(), result, o.output, o.sampling.logprobs);
  main.exit_code = exit_code(result);
  o.context.end_trace(context.get());
}

}  // namespace

void add_complete(CLI::App& app, Main& main) {
  CLI::App* command = app.add_subcommand("complete", "Fill in what belongs at a cursor, streamed");
  auto o = std::make_shared<Options>();
  o->sampling.max_tokens = 128;
  o->model.add_to(*command);
  CLI::Option* file = command->add_option("--file", o->file, "source file to complete in");
  command->add_option("--line", o->line, "the cursor's line, from 1")
      ->check(in_range(uint64_t{1}, uint64_t{1'000'000'000}))
      ->needs(file);
  command
      ->add_option(
          "--column", o->column,
          "the cursor's column, from 1, in characters (Unicode code points): the cursor is "
          "before that character; default: the line's end")
      ->check(in_range(uint64_t{1}, uint64_t{1'000'000'000}))
      ->needs(file);
  CLI::Option* prefix =
      command->add_option("--prefix-file", o->prefix_file, "the text before the cursor");
  command
      ->add_option("--suffix-file", o->suffix_file,
                   "the text behind the cursor; without it the prefix is simply continued")
      ->needs(prefix);
  prefix->excludes(file);
  command
      ->add_option("--context", o->context_tokens,
                   "use at most so many tokens around the cursor; 0: what the model can read")
      ->check(in_range(uint64_t{0}, uint64_t{1} << 40))
      ->capture_default_str();
  command->add_option("--show", o->show, "show so many lines before and behind the completion too")
      ->check(in_range(uint64_t{0}, uint64_t{1'000'000'000}))
      ->capture_default_str();
  o->context.add_to(*command);
  o->sampling.add_to(*command);
  o->output.add_to(*command);
  command->callback([o, &main] { run(*o, main); });
}

}  // namespace cli
