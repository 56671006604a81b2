// The subcommands: each adds itself to the tool's command line. A command's callback throws
// Failure or Misuse, or sets *exit_code.
#pragma once

#include <CLI/CLI.hpp>

namespace cli {

struct Main {
  int exit_code = 0;
  bool json = false;  // errors are reported on stdout as JSON as well
};

void add_convert(CLI::App& app, Main& main);
void add_inspect(CLI::App& app, Main& main);
void add_tokenize(CLI::App& app, Main& main);
void add_detokenize(CLI::App& app, Main& main);
void add_logits(CLI::App& app, Main& main);
void add_complete(CLI::App& app, Main& main);
void add_generate(CLI::App& app, Main& main);
void add_bench(CLI::App& app, Main& main);
void add_serve_bench(CLI::App& app, Main& main);
void add_purge_cache(CLI::App& app, Main& main);
void add_chat(CLI::App& app, Main& main);
void add_perplexity(CLI::App& app, Main& main);

}  // namespace cli
