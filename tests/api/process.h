// Runs programs the way a shell would and keeps what they wrote: for the tests of the `dsv3` tool
// and of the installed library.
#pragma once

#include <string>
#include <vector>

namespace dsv3::test {

struct Run {
  int code = -1;  // exit code; 128 + signal when a signal ended it
  std::string out, err;
};

struct RunOptions {
  std::string input = {};  // on standard input
  bool terminal = false;   // standard input and output are one terminal, which does not echo
  bool interrupt_on_output = false;  // SIGINT once something came on standard output
  std::string output_path = {};      // standard output goes there instead (out stays empty)
  bool no_reader = false;       // standard output is a pipe that nobody reads (out stays empty)
  std::string input_path = {};  // standard input is this, a folder for example
  std::vector<std::string> environment = {};  // "NAME=value", beside this process's own
};

// argv[0] is searched in PATH. Throws std::runtime_error when it cannot be started.
Run run(const std::vector<std::string>& argv, const RunOptions& options = {});

// A program that this build's compiler made: through the emulator when it is another machine's.
Run run_built(std::vector<std::string> argv, const RunOptions& options = {});

// The `dsv3` tool of this build.
Run dsv3(std::vector<std::string> arguments, const RunOptions& options = {});

// tiny-coder as a .dsv3 file, converted by the tool on first use.
const std::string& tiny_coder_file();
// tiny-coder with one of the family's chat templates ("v3", "v31"), converted on first use.
std::string chat_model_file(const std::string& name);
// A folder that lives as long as the program.
std::string scratch_file(const std::string& name);

}  // namespace dsv3::test
