#include "tests/api/process.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <termios.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
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

// The user's end of a terminal; no echo, no line editing (whose lines have an end).
int open_terminal() {
  const int user = posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
  termios settings = {};
  if (user == -1 || grantpt(user) != 0 || unlockpt(user) != 0 || tcgetattr(user, &settings) != 0) {
    throw std::runtime_error(std::string("a terminal: ") + std::strerror(errno));
  }
  cfmakeraw(&settings);
  tcsetattr(user, TCSANOW, &settings);
  return user;
}

// Types `input` and returns what came until the program left the terminal.
std::string use_terminal(int user, std::string_view input) {
  std::string out;
  char buffer[4096];
  for (;;) {
    pollfd ready = {user, static_cast<short>(input.empty() ? POLLIN : POLLIN | POLLOUT), 0};
    if (poll(&ready, 1, -1) < 0 && errno != EINTR) return out;
    if ((ready.revents & POLLIN) != 0) {
      const ssize_t got = read(user, buffer, sizeof buffer);
      if (got <= 0) return out;
      out.append(buffer, static_cast<size_t>(got));
    } else if ((ready.revents & (POLLHUP | POLLERR)) != 0) {
      return out;
    } else if ((ready.revents & POLLOUT) != 0) {
      const ssize_t put = write(user, input.data(), input.size());
      if (put > 0) input.remove_prefix(static_cast<size_t>(put));
    }
  }
}

}  // namespace

Run run(const std::vector<std::string>& argv, const RunOptions& options) {
  const TemporaryFolder folder;
  const std::string in = folder.file("in"), err = folder.file("err");
  const std::string out = options.output_path.empty() ? folder.file("out") : options.output_path;
  write_bytes(in, options.input);
  int pipe_ends[2] = {-1, -1};
  if (options.no_reader) {
    if (pipe2(pipe_ends, O_CLOEXEC) != 0) throw std::runtime_error("a pipe");
    close(pipe_ends[0]);
  }

  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  const int user = options.terminal ? open_terminal() : -1;
  if (options.terminal) {
    posix_spawn_file_actions_addopen(&actions, 0, ptsname(user), O_RDWR | O_NOCTTY, 0);
    posix_spawn_file_actions_adddup2(&actions, 0, 1);
  } else {
    const std::string& input = options.input_path.empty() ? in : options.input_path;
    posix_spawn_file_actions_addopen(&actions, 0, input.c_str(), O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, 1, out.c_str(), O_WRONLY | O_CREAT, 0600);
    if (options.no_reader) posix_spawn_file_actions_adddup2(&actions, pipe_ends[1], 1);
  }
  posix_spawn_file_actions_addopen(&actions, 2, err.c_str(), O_WRONLY | O_CREAT, 0600);
  std::vector<std::string> arguments = argv;
  std::vector<std::string> variables = options.environment;
  for (char** e = environ; *e != nullptr; ++e) variables.emplace_back(*e);
  pid_t child = 0;
  const int failed = posix_spawnp(&child, arguments[0].c_str(), &actions, nullptr,
                                  pointers(&arguments).data(), pointers(&variables).data());
  posix_spawn_file_actions_destroy(&actions);
  if (options.no_reader) close(pipe_ends[1]);
  if (failed != 0) throw std::runtime_error(argv[0] + ": " + std::strerror(failed));

  Run result;
  if (options.terminal) {
    result.out = use_terminal(user, options.input);
    close(user);
  }
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

  result.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  if (options.output_path.empty() && !options.terminal) result.out = read_bytes(out);
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
  write_bytes(folder + "/chat_template.jinja",
              published_template(name == "v31" ? "deepseek-v3.1-no-open" : "deepseek-v3"));
  return convert(folder, name);
}

}  // namespace dsv3::test
