// The `dsv3` tool: everything a user does with a model from a shell, over dsv3.h alone.
#include <signal.h>

#include <algorithm>
#include <new>
#include <sstream>

#include "commands.h"
#include "common.h"

namespace {

// Main::json as long as no command has read its options: what is wrong with them is reported too.
bool asks_for_json(int argc, char** argv) {
  return std::any_of(argv, argv + argc, [](std::string_view argument) {
    return argument == "--json" || argument == "--json-events";
  });
}

// `text` is what people read on stderr.
int report(const cli::Failure& failure, const std::string& text, bool json) {
  // A wrong argument is the user's to mend; everything else is a failure.
  const bool misuse = failure.status() == DSV3_E_INVALID_ARGUMENT;
  cli::write_err(text);
  if (json) {
    cli::Json error = {
        {"status", failure.status() == DSV3_OK ? "tool" : dsv3_status_name(failure.status())},
        {"message", failure.what()},
        {"field", failure.field()},
        {"retryable", failure.retryable()}};
    try {
      cli::write_json({{"error", std::move(error)}});
    } catch (const cli::Failure&) {
      // Standard output is what failed; stderr has the message.
    }
  }
  return misuse ? cli::kExitMisused : cli::kExitFailed;
}

int report_failure(const cli::Failure& failure, bool json) {
  return report(failure, std::string("dsv3: ") + failure.what() + "\n", json);
}

// Parses the command line, which runs the command.
int execute(const cli::Main& state, CLI::App& app, int argc, char** argv) {
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    std::ostringstream out, err;  // so that write_out() sees what cannot be written
    const bool asked = app.exit(error, out, err) == 0;  // for --help or --version
    if (!asked) {
      return report(cli::Failure(error.what(), DSV3_E_INVALID_ARGUMENT), err.str(), state.json);
    }
    cli::write_out(out.str());
    return cli::kExitDone;
  }
  // Not require_subcommand(): that would hide what is wrong with a command that is misspelt.
  if (app.get_subcommands().empty()) {
    throw cli::Misuse("a subcommand is required, see dsv3 --help");
  }
  return state.exit_code;
}

int run(int argc, char** argv) {
  cli::Main state;
  state.json = asks_for_json(argc, argv);
  CLI::App app("Models of the DeepSeek-V3 family on this machine", "dsv3");
  app.set_version_flag("--version", std::string("dsv3 ") + dsv3_version_string());
  app.failure_message(CLI::FailureMessage::simple);
  app.footer("Exit codes: 0 done, 1 failed, 2 used wrongly. `dsv3 COMMAND --help` has the rest.");
  cli::add_convert(app, state);
  cli::add_inspect(app, state);
  cli::add_tokenize(app, state);
  cli::add_detokenize(app, state);
  cli::add_logits(app, state);
  cli::add_complete(app, state);
  cli::add_generate(app, state);
  cli::add_purge_cache(app, state);
  cli::add_chat(app, state);
  cli::add_perplexity(app, state);
  cli::add_bench(app, state);
  cli::add_serve_bench(app, state);
  try {
    cli::occupy_standard_streams();
    return execute(state, app, argc, argv);
  } catch (const cli::Misuse& misuse) {
    return report_failure(cli::Failure(misuse.what(), DSV3_E_INVALID_ARGUMENT), state.json);
  } catch (const cli::Failure& failure) {
    return report_failure(failure, state.json);
  } catch (const std::bad_alloc&) {
    return report_failure(cli::Failure("out of memory", DSV3_E_OUT_OF_MEMORY), state.json);
  } catch (const std::exception& error) {
    return report_failure(cli::Failure(error.what()), state.json);
  }
}

}  // namespace

int main(int argc, char** argv) {
  // A reader that goes away, and a file that may not grow further, are errors of the write: what
  // else there is to do, such as saving a session, is done.
  signal(SIGPIPE, SIG_IGN);
  signal(SIGXFSZ, SIG_IGN);
  try {
    return run(argc, argv);
  } catch (...) {  // what not even the report of a failure survived
    return cli::kExitFailed;
  }
}
