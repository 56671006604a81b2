#include "tests/api/process.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <filesystem>
#include <sstream>
#include <stdexcept>
#include <thread>

#include "tests/support/support.h"

extern char** environ;

namespace dsv3::test {

namespace {

const TemporaryFolder& scratch() {
  static const TemporaryFolder folder;
  return folder;
}

std::vector<char*> pointers(std::vector<std::string>* texts) {
  std::vector<char*> out;
  for (std::string& text : *texts) out.push_back(text.data());
  out.push_back(nullptr);
  return out;
}

bool has_output(const std::string& path) {
  struct stat info = {};
  return stat(path.c_str(), &info) == 0 && info.st_size > 0;
}

}  // namespace

Run run(const std::vector<std::string>& argv, const RunOptions& options) {
  const TemporaryFolder folder;
  const std::string in = folder.file("in"), err = folder.file("err");
  const std::string out = options.output_path.empty() ? folder.file("out") : options.output_path;
  write_bytes(in, options.input);

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 0, in.c_str(), O_RDONLY, 0);
  posix_spawn_file_actions_addopen(&actions, 1, out.c_str(), O_WRONLY | O_CREAT, 0600);
  posix_spawn_file_actions_addopen(&actions, 2, err.c_str(), O_WRONLY | O_CREAT, 0600);
  std::vector<std::string> arguments = argv;
  std::vector<std::string> variables = options.environment;
  for (char** e = environ; *e != nullptr; ++e) variables.emplace_back(*e);
  pid_t child = 0;
  const int failed = posix_spawnp(&child, arguments[0].c_str(), &actions, nullptr,
                                  pointers(&arguments).data(), pointers(&variables).data());
  posix_spawn_file_actions_destroy(&actions);
  if (failed != 0) throw std::runtime_error(argv[0] + ": " + std::strerror(failed));

  int status = 0;
  bool interrupted = !options.interrupt_on_output;
  while (!interrupted && waitpid(child, &status, WNOHANG) == 0) {
    if (has_output(out)) {
      kill(child, SIGINT);
      interrupted = true;
    } else {
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
  }
  // Already reaped when it ended before it could be interrupted.
  if (interrupted) waitpid(child, &status, 0);

  Run result;
  result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  if (options.output_path.empty()) result.out = read_bytes(out);
  result.err = read_bytes(err);
  return result;
}

Run run_built(std::vector<std::string> argv, const RunOptions& options) {
  std::vector<std::string> command;
  std::istringstream emulator(DSV3_EMULATOR);
  for (std::string word; std::getline(emulator, word, '|');) command.push_back(word);
  command.insert(command.end(), argv.begin(), argv.end());
  return run(command, options);
}

Run dsv3(std::vector<std::string> arguments, const RunOptions& options) {
  arguments.insert(arguments.begin(), DSV3_TOOL);
  return run_built(std::move(arguments), options);
}

std::string scratch_file(const std::string& name) { return scratch().file(name); }

namespace {

std::string convert(const std::string& checkpoint, const std::string& name) {
  const std::string out = scratch_file(name + ".dsv3");
  const Run result = dsv3({"convert", checkpoint, out});
  if (result.code != 0) throw std::runtime_error("convert: " + result.err);
  return out;
}

}  // namespace

const std::string& tiny_coder_file() {
  static const std::string path = convert(source_path("examples/models/tiny-coder"), "tiny-coder");
  return path;
}

std::string chat_model_file(const std::string& name) {
  const std::string path = scratch_file(name + ".dsv3");
  if (std::filesystem::exists(path)) return path;
  const std::string folder = scratch_file(name);
  std::filesystem::copy(source_path("examples/models/tiny-coder"), folder);
  // The pieces by which the published templates are recognised; they are never run.
  std::string jinja = "<｜User｜><｜Assistant｜><｜end▁of▁sentence｜>";
  jinja += name == "v31" ? "thinking </think> <think></think>" : "is_first_sp";
  write_bytes(folder + "/chat_template.jinja", jinja);
  return convert(folder, name);
}

}  // namespace dsv3::test
