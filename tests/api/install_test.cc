// What a stranger does with an installed library: pkg-config, ten lines of C, CMake's find_package,
// the tool. Everything from a prefix that was moved after installing.
#include <doctest/doctest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "tests/api/process.h"
#include "tests/support/support.h"

namespace dsv3::test {
namespace {

namespace fs = std::filesystem;

Run require(Run result, const std::vector<std::string>& argv) {
  std::string command;
  for (const std::string& word : argv) command += word + " ";
  REQUIRE_MESSAGE(result.code == 0, command, "\n", result.out, result.err);
  return result;
}
Run must(const std::vector<std::string>& argv, const RunOptions& options = {}) {
  return require(run(argv, options), argv);
}

const std::string& prefix() {
  static const std::string path = [] {
    const std::string first = scratch_file("installed"), moved = scratch_file("moved");
    must({DSV3_CMAKE, "--install", DSV3_BUILD_DIR, "--prefix", first});
    fs::rename(first, moved);
    return moved;
  }();
  return path;
}
std::string library_folder() { return prefix() + "/" + DSV3_LIBDIR; }

std::vector<std::string> words(const std::string& text) {
  std::vector<std::string> out;
  std::istringstream in(text);
  for (std::string word; in >> word;) out.push_back(word);
  return out;
}

// The sanitizers of this build, if any: a plain program cannot load a sanitized library.
std::vector<std::string> sanitizer_flags() {
  const std::string sanitizers = DSV3_SANITIZERS;
  if (sanitizers.empty()) return {};
  return {"-fsanitize=" + sanitizers};
}

// Compiles a C example of the repository against the installed library as its comment says.
std::string compile(const std::string& name, const std::string& standard) {
  const RunOptions environment = {
      .environment = {"PKG_CONFIG_PATH=" + library_folder() + "/pkgconfig"}};
  const Run flags = must({"pkg-config", "--cflags", "--libs", "dsv3"}, environment);
  const std::string out = scratch_file(name + "-" + standard);
  std::vector<std::string> command = {DSV3_CC,   "-std=" + standard,
                                      "-Wall",   "-Wextra",
                                      "-Werror", "-o",
                                      out,       source_path("examples/c/" + name + ".c")};
  for (const std::string& word : words(flags.out)) command.push_back(word);
  for (const std::string& word : sanitizer_flags()) command.push_back(word);
  must(command);
  return out;
}

RunOptions with_library(std::string input = {}) {
  return {.input = std::move(input), .environment = {"LD_LIBRARY_PATH=" + library_folder()}};
}

TEST_CASE("what is installed, and nothing else") {
  std::set<std::string> files;
  for (const auto& entry : fs::recursive_directory_iterator(prefix())) {
    if (!entry.is_directory()) files.insert(entry.path().lexically_relative(prefix()).string());
  }
  const std::string lib = DSV3_LIBDIR;
  std::set<std::string> expected = {
      "bin/dsv3",
      "include/dsv3.h",
      lib + "/libdsv3.so",
      lib + "/libdsv3.so.0",
      lib + "/libdsv3.so.0.1.0",
      lib + "/pkgconfig/dsv3.pc",
      lib + "/cmake/dsv3/dsv3-config.cmake",
      lib + "/cmake/dsv3/dsv3-config-version.cmake",
      lib + "/cmake/dsv3/dsv3-targets.cmake",
      "share/doc/dsv3/LICENSE",
  };
  for (const std::string& file : files) {
    const bool per_configuration = file.find("/dsv3-targets-") != std::string::npos;
    CHECK_MESSAGE((expected.count(file) == 1 || per_configuration), file);
  }
  for (const std::string& file : expected) CHECK_MESSAGE(files.count(file) == 1, file);
}

TEST_CASE("the installed tool runs where it lies") {
  const std::vector<std::string> command = {prefix() + "/bin/dsv3", "--version"};
  const Run version = require(run_built(command), command);
  CHECK(version.out == "dsv3 0.1.0\n");
}

TEST_CASE("ten lines of C through pkg-config") {
  const std::string program = compile("complete", "c11");
  const Run done = run_built({program, tiny_coder_file(), "def mean(values):"}, with_library());
  CHECK_MESSAGE(done.code == 0, done.err);
  CHECK(done.out.size() > 10);
  // The tool says the same about the same text.
  const Run tool = dsv3({"generate", tiny_coder_file(), "--prompt", "def mean(values):", "--json"});
  const std::string text = nlohmann::json::parse(tool.out).at("text");
  CHECK(done.out == text + "\n");

  const Run missing = run_built({program, "no-such-model.dsv3", "x"}, with_library());
  CHECK(missing.code == 1);
  CHECK(missing.err.find("no-such-model.dsv3") != std::string::npos);
  CHECK(run_built({program}, with_library()).code == 1);

#if !defined(DSV3_SANITIZED) && !defined(DSV3_EMULATED)  // ldd runs the program's own loader
  const Run ldd = run({"ldd", program}, with_library());
  for (const std::string& word : words(ldd.out)) {
    for (const char* unwanted : {"pcre", "mimalloc", "flatbuffers", "xxhash"}) {
      CHECK_MESSAGE(word.find(unwanted) == std::string::npos, word);
    }
  }
#endif
}

TEST_CASE("the event loop example streams, and stops at a key and at its time") {
  const std::string program = compile("stream", "c11");
  const Run done = run_built({program, tiny_coder_file(), "class Queue:"}, with_library());
  CHECK_MESSAGE(done.code == 0, done.err);
  CHECK(done.out.size() > 10);
  CHECK(done.err.find("tokens]") != std::string::npos);
  const Run key = run_built({program, tiny_coder_file(), "class Queue:"}, with_library("\n"));
  CHECK(key.code == 0);
  CHECK_MESSAGE(key.err.find("[cancelled") != std::string::npos, key.err);
  const Run late = run_built({program, tiny_coder_file(), "class Queue:", "1"}, with_library());
  CHECK(late.code == 0);
  CHECK_MESSAGE(late.err.find("[cancelled") != std::string::npos, late.err);
  CHECK(run_built({program}, with_library()).code == 2);
}

TEST_CASE("CMake's find_package") {
  const std::string project = scratch_file("consumer");
  fs::create_directory(project);
  std::string flags;
  for (const std::string& flag : sanitizer_flags()) flags += " " + flag;
  write_bytes(project + "/CMakeLists.txt",
              "cmake_minimum_required(VERSION 3.20)\n"
              "project(consumer C)\n"
              "find_package(dsv3 0.1 REQUIRED)\n"
              "add_executable(consumer main.c)\n"
              "target_link_libraries(consumer PRIVATE dsv3::dsv3)\n");
  fs::copy(source_path("examples/c/complete.c"), project + "/main.c");
  must({DSV3_CMAKE, "-S", project, "-B", project + "/build", "-G", "Ninja",
        std::string("-DCMAKE_C_COMPILER=") + DSV3_CC, "-DCMAKE_C_FLAGS=" + flags,
        std::string("-DCMAKE_TOOLCHAIN_FILE=") + DSV3_TOOLCHAIN,
        "-DCMAKE_PREFIX_PATH=" + prefix()});
  must({DSV3_CMAKE, "--build", project + "/build"});
  const Run done = run_built({project + "/build/consumer", tiny_coder_file(), "import os"});
  CHECK_MESSAGE(done.code == 0, done.err);
}

TEST_CASE("inside another CMake project the library alone, and nothing of the host's is decided") {
  const std::string project = scratch_file("host");
  fs::create_directory(project);
  write_bytes(project + "/CMakeLists.txt",
              "cmake_minimum_required(VERSION 3.25)\n"
              "project(host C)\n"
              "set(CMAKE_EXPORT_COMPILE_COMMANDS ON)\n"
              "set(CMAKE_UNITY_BUILD ON)\n"
              "list(APPEND CMAKE_MODULE_PATH \"${CMAKE_CURRENT_SOURCE_DIR}\")\n"
              "add_subdirectory(\"" +
                  source_path("") +
                  "\" dsv3)\n"
                  "foreach(target dsv3_tool example_complete dsv3_test_support)\n"
                  "  if(TARGET ${target})\n"
                  "    message(FATAL_ERROR \"unasked: ${target}\")\n"
                  "  endif()\n"
                  "endforeach()\n"
                  "add_executable(host main.c)\n"
                  "set_target_properties(host PROPERTIES UNITY_BUILD OFF)\n"
                  "target_link_libraries(host PRIVATE dsv3::dsv3)\n");
  fs::copy(source_path("examples/c/complete.c"), project + "/main.c");
  // Modules of the host's own that happen to have the names of ours.
  for (const auto& file : fs::directory_iterator(source_path("cmake"))) {
    if (file.path().extension() != ".cmake") continue;
    write_bytes(project + "/" + file.path().filename().string(),
                "message(FATAL_ERROR \"the host's module\")\n");
  }
  must({DSV3_CMAKE, "-S", project, "-B", project + "/build", "-G", "Ninja",
        std::string("-DCMAKE_C_COMPILER=") + DSV3_CC,
        std::string("-DCMAKE_TOOLCHAIN_FILE=") + DSV3_TOOLCHAIN, "-DCMAKE_INSTALL_PREFIX=/some",
        "-DCMAKE_INSTALL_LIBDIR=/some/lib/here"});
  const std::string cache = read_bytes(project + "/build/CMakeCache.txt");
  CHECK(cache.find("CMAKE_BUILD_TYPE:STRING=\n") != std::string::npos);
  CHECK(cache.find("DSV3_CLI11_INCLUDE") == std::string::npos);
  // Without a build type the host's own files have no optimisation; the library's have.
  const auto commands = nlohmann::json::parse(read_bytes(project + "/build/compile_commands.json"));
  for (const auto& entry : commands) {
    const std::string command = entry.at("command");
    CHECK_MESSAGE(command.find("/Unity/") == std::string::npos, command);
    const bool own = entry.at("file") == project + "/main.c";
    CHECK_MESSAGE((command.find(" -O3 ") == std::string::npos) == own, command);
  }
  // Absolute folders are as good as relative ones.
  const std::string pc = read_bytes(project + "/build/dsv3/dsv3.pc");
  CHECK_MESSAGE(pc.find("\nlibdir=${pcfiledir}/..\n") != std::string::npos, pc);
  CHECK_MESSAGE(pc.find("\nincludedir=${pcfiledir}/../../../include\n") != std::string::npos, pc);
}

}  // namespace
}  // namespace dsv3::test
