// dsv3 generate FILE --prompt TEXT|-: goes on where a text ends.
#include <memory>
#include <optional>

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
  std::string prompt;
  std::string load, save;  // sessions' files
  bool parse_special = false, no_bos = false, echo = false;
};

dsv3_session_io session_file(const std::string& path, const Interrupt& interrupt) {
  dsv3_session_io io;
  dsv3_session_io_init(&io, sizeof io);
  io.path = path.c_str();
  io.cancel = interrupt.token();
  return io;
}

Session first_session(const Options& o, dsv3_context* context, const Interrupt& interrupt) {
  if (o.load.empty()) return create_session(context);
  dsv3_session_io io = session_file(o.load, interrupt);
  io.flags = DSV3_SESSION_RECOMPUTE_FOREIGN;
  dsv3_session* session = nullptr;
  call([&](dsv3_error** e) { return dsv3_session_load(context, &io, &session, e); });
  return Session(session);
}

void run(Options& o, Main& main) {
  main.json = o.output.machine();
  Interrupt interrupt;
  const dsv3_request_options options = o.sampling.make(interrupt);
  const bool from_stdin = o.prompt == "-";
  const std::string prompt = from_stdin ? read_input("-") : o.prompt;
  require_utf8(prompt, from_stdin ? "standard input" : "--prompt");
  const Model model = o.model.open(interrupt);
  const Context context = o.context.create(model.get());
  const Session session = first_session(o, context.get(), interrupt);
  // A loaded session that holds anything has its begin-of-sentence token.
  const uint32_t flags =
      (o.parse_special ? DSV3_APPEND_PARSE_SPECIAL : 0) | (o.no_bos ? 0 : DSV3_APPEND_ADD_BOS);
  call([&](dsv3_error** e) {
    return dsv3_session_append_text(session.get(), prompt.data(), prompt.size(), flags, nullptr,
                                    nullptr, e);
  });
  std::optional<Failure> unwritten;  // what came is kept although standard output does not take it
  try {
    if (o.echo && !o.output.machine()) write_out(prompt);
    const Generation result = generate(session.get(), options, o.output);
    if (o.output.json) write_json(to_json(model.get(), result, o.sampling.logprobs));
    if (!o.output.machine()) write_out("\n");
    report(model.get(), context.get(), result, o.output, o.sampling.logprobs);
    main.exit_code = exit_code(result);
  } catch (const Failure& failure) {
    if (failure.status() != DSV3_OK) throw;  // the library's: there is no answer
    unwritten = failure;
  }
  if (!o.save.empty()) {
    // After the answer, which a save that fails leaves alone. What ended the answer does not end
    // the save as well; another Ctrl-C does.
    if (interrupt.is_set()) interrupt.renew();
    const dsv3_session_io io = session_file(o.save, interrupt);
    call([&](dsv3_error** e) { return dsv3_session_save(session.get(), &io, e); });
  }
  if (unwritten) throw *unwritten;
  o.context.end_trace(context.get());
}

}  // namespace

void add_generate(CLI::App& app, Main& main) {
  CLI::App* command = app.add_subcommand("generate", "Go on where a text ends, streamed");
  auto o = std::make_shared<Options>();
  o->model.add_to(*command);
  CLI::Option* prompt =
      command->add_option("--prompt", o->prompt, "the text to go on from; - is standard input");
  command->add_option("--load-session", o->load,
                      "begin with what this file holds, then the prompt");
  command->add_option("--save-session", o->save, "keep tokens and latents in this file afterwards");
  command->add_flag("--parse-special", o->parse_special,
                    "read special tokens' texts in the prompt as those tokens");
  command->add_flag("--no-bos", o->no_bos, "do not begin with the begin-of-sentence token");
  command->add_flag("--echo", o->echo, "print the prompt first");
  o->context.add_to(*command);
  o->sampling.add_to(*command);
  o->output.add_to(*command);
  command->callback([o, prompt, &main] {
    if (prompt->empty() && o->load.empty()) {
      throw Misuse("generate: --prompt is missing, expected it or --load-session");
    }
    run(*o, main);
  });
}

}  // namespace cli
