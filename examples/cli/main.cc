// The `dsv3` tool: everything a user does with a model from a shell, over dsv3.h alone.
#include <new>

#include "commands.h"
#include "common.h"

namespace {

int report_failure(const cli::Failure& failure, bool json) {
  // A wrong argument is the user's to mend; everything else is a failure.
  const bool misuse = failure.status() == DSV3_E_INVALID_ARGUMENT;
  cli::write_err(std::string("dsv3: ") + failure.what() + "\n");
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

int run(int argc, char** argv) {
  cli::Main state;
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
    app.parse(argc, argv);
    // Not require_subcommand(): that would hide what is wrong with a command that is misspelt.
    if (app.get_subcommands().empty())
      throw cli::Misuse("a subcommand is required, see dsv3 --help");
    return state.exit_code;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? cli::kExitDone : cli::kExitMisused;
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
  try {
    return run(argc, argv);
  } catch (...) {  // what not even the report of a failure survived
    return cli::kExitFailed;
  }
}
