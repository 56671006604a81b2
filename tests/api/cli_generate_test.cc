// The `dsv3` tool where it generates: complete, generate and chat.
#include <doctest/doctest.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <thread>

#include "tests/api/process.h"
#include "tests/support/support.h"

namespace dsv3::test {
namespace {

using Json = nlohmann::json;

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

std::vector<Json> json_lines(const std::string& text) {
  std::vector<Json> out;
  std::istringstream in(text);
  for (std::string line; std::getline(in, line);) out.push_back(Json::parse(line));
  return out;
}

std::vector<std::string> generate(std::vector<std::string> more) {
  std::vector<std::string> out = {"generate", tiny_coder_file(), "--prompt", "def mean(values):"};
  out.insert(out.end(), more.begin(), more.end());
  return out;
}

constexpr const char* kSource =
    "import math\n"
    "\n"
    "def area(radius):\n"
    "    return math.pi * radius ** 2\n"
    "\n"
    "def perimeter(radius):\n"
    "    return \n"
    "\n"
    "# é 🦀 end\n";

TEST_CASE("speculation changes the steps and not the answer") {
  const auto run = [](std::vector<std::string> more) {
    more.insert(more.end(), {"-n", "80", "--ignore-eos", "--json", "-q"});
    const Run out = dsv3(generate(more));
    REQUIRE_MESSAGE(out.code == 0, out.err);
    return Json::parse(out.out);
  };
  const Json plain = run({"--speculate", "off"});
  CHECK(plain.at("statistics").at("drafted_tokens") == 0);
  CHECK(plain.at("statistics").at("decode_steps") == 80);
  const TemporaryFolder folder;
  write_bytes(folder.file("old.py"), plain.at("text").get<std::string>());
  const Json drafted = run({"--speculate", "always", "--draft", "reference,lookup", "--max-draft",
                            "20", "--reference", folder.file("old.py")});
  CHECK(drafted.at("text") == plain.at("text"));
  CHECK(drafted.at("tokens") == plain.at("tokens"));
  CHECK(drafted.at("statistics").at("decode_steps") < 30);
  CHECK(drafted.at("statistics").at("accepted_tokens") > 50);
  CHECK(run({}).at("tokens") == plain.at("tokens"));
  CHECK(dsv3(generate({"--speculate", "maybe"})).code == 2);
  CHECK(dsv3(generate({"--reference", folder.file("none.py")})).code != 0);
}

TEST_CASE("generate: text for people, JSON for programs, the same answer") {
  const Run human = dsv3(generate({"-n", "12", "--stats"}));
  REQUIRE_MESSAGE(human.code == 0, human.err);
  CHECK(contains(human.err, "tokens/s"));
  CHECK(contains(human.err, "bit-identical"));
  const Run machine = dsv3(generate({"-n", "12", "--json", "-q"}));
  CHECK(machine.err.empty());
  const Json said = Json::parse(machine.out);
  CHECK(said.at("text").get<std::string>() + "\n" == human.out);
  CHECK(said.at("tokens").size() == 12);
  CHECK(said.at("finish_reason") == "max_tokens");
  CHECK(said.at("statistics").at("generated_tokens") == 12);
  CHECK(said.at("statistics").at("prompt_tokens") > 3);

  const Run events = dsv3(generate({"-n", "12", "--json-events"}));
  std::string text;
  size_t tokens = 0;
  const std::vector<Json> lines = json_lines(events.out);
  for (const Json& line : lines) {
    if (line.at("event") != "text") continue;
    text += line.at("text").get<std::string>();
    tokens += line.at("tokens").size();
  }
  CHECK(text == said.at("text"));
  CHECK(tokens == 12);
  CHECK(lines.back().at("event") == "finished");

  const Run piped = dsv3({"generate", tiny_coder_file(), "--prompt", "-", "-n", "12", "--json"},
                         {.input = "def mean(values):"});
  CHECK(Json::parse(piped.out).at("tokens") == said.at("tokens"));
  const Run echoed = dsv3(generate({"-n", "12", "--echo"}));
  CHECK(echoed.out == "def mean(values):" + human.out);
}

TEST_CASE("generate: sampling options arrive") {
  const auto ids = [](std::vector<std::string> more) {
    more.insert(more.end(), {"-n", "8", "--json"});
    const Run result = dsv3(generate(more));
    REQUIRE_MESSAGE(result.code == 0, result.err);
    return Json::parse(result.out).at("tokens");
  };
  const Json greedy = ids({});
  CHECK(ids({"--temperature", "2", "--seed", "7"}) == ids({"--temperature", "2", "--seed", "7"}));
  CHECK(ids({"--temperature", "2", "--seed", "7"}) != ids({"--temperature", "2", "--seed", "8"}));
  CHECK(ids({"--temperature", "2", "--top-k", "1"}) == greedy);
  CHECK(ids({"--temperature", "2", "--top-p", "1e-9"}) == greedy);
  CHECK(ids({"--temperature", "2", "--min-p", "0.999999"}) == greedy);
  CHECK(ids({"--residency", "copy", "--threads", "1"}) == greedy);
  const int32_t first = greedy.at(0);
  CHECK(ids({"--logit-bias", std::to_string(first) + "=-inf"}).at(0) != first);
  CHECK(ids({"--logit-bias", "9=1000", "--logit-bias", "10=-5"}) == Json(std::vector<int>(8, 9)));
  // The model repeats itself soon, and the penalty forbids that.
  const auto distinct = [&](std::vector<std::string> more) {
    more.insert(more.end(), {"-n", "60", "--ignore-eos", "--json"});
    const Json tokens = Json::parse(dsv3(generate(more)).out).at("tokens");
    return std::set<int>(tokens.begin(), tokens.end()).size();
  };
  CHECK(distinct({}) < 60);
  CHECK(distinct({"--presence-penalty", "1000"}) == 60);
  CHECK(distinct({"--frequency-penalty", "1000"}) == 60);
  CHECK(distinct({"--repetition-penalty", "1000"}) == 60);

  const Run stop_token = dsv3(generate({"--stop-token", std::to_string(first), "--json"}));
  const Json stopped = Json::parse(stop_token.out);
  CHECK(stopped.at("finish_reason") == "stop_token");
  CHECK(stopped.at("stop_token") == first);
  CHECK(stopped.at("tokens").size() == 1);
}

TEST_CASE("generate: stop strings end the text before them") {
  const Run whole = dsv3(generate({"-n", "16", "--json"}));
  const std::string text = Json::parse(whole.out).at("text");
  const std::string stop = text.substr(text.size() / 2, 4);
  const Run result = dsv3(generate({"-n", "16", "--json", "--stop", "never ever", "--stop", stop}));
  const Json said = Json::parse(result.out);
  CHECK(said.at("finish_reason") == "stop_string");
  CHECK(said.at("stop_string") == stop);
  CHECK(said.at("text") == text.substr(0, text.find(stop)));
}

TEST_CASE("generate: log-probabilities") {
  const Run machine = dsv3(generate({"-n", "3", "--logprobs", "2", "--json"}));
  const Json answer = Json::parse(machine.out);  // a range over a temporary's part would outlive it
  for (const Json& token : answer.at("tokens")) {
    CHECK(token.at("logprob") <= 0);
    REQUIRE(token.at("top").size() == 2);
    CHECK(token.at("top").at(0).at("id") == token.at("id"));  // greedy
    CHECK(token.at("top").at(0).at("logprob") == token.at("logprob"));
    CHECK(token.at("top").at(0).at("logprob") >= token.at("top").at(1).at("logprob"));
  }
  const Run human = dsv3(generate({"-n", "3", "--logprobs", "2"}));
  CHECK(contains(human.err, "logprob"));
}

TEST_CASE("a padded vocabulary: ids without text are shown as such") {
  const std::string folder = scratch_file("padded"), file = scratch_file("padded.dsv3");
  copy_padded_checkpoint(folder);
  REQUIRE(dsv3({"convert", folder, file}).code == 0);
  const std::vector<std::string> padding = {"generate",  file,         "--prompt", "x",
                                            "-n",        "2",          "-q",       "--logit-bias",
                                            "4094=1000", "--logprobs", "1"};
  std::vector<std::string> with_json = padding;
  with_json.push_back("--json");
  const Run machine = dsv3(with_json);
  REQUIRE_MESSAGE(machine.code == 0, machine.err);
  const Json answer = Json::parse(machine.out);
  REQUIRE(answer.at("tokens").size() == 2);
  CHECK(answer.at("tokens").at(1).at("id") == 4094);
  CHECK(answer.at("tokens").at(1).at("text") == "");
  const Run human = dsv3(padding);
  CHECK_MESSAGE(human.code == 0, human.err);
  CHECK(contains(human.err, "   4094  "));
  const Run inspected = dsv3({"inspect", file});
  REQUIRE_MESSAGE(inspected.code == 0, inspected.err);
  CHECK(contains(inspected.out, ", 4095"));
}

TEST_CASE("generate: what is refused is named, with 2") {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"--top-p", "1.5"}, "top_p"},
      {{"--temperature", "-1"}, "temperature"},
      {{"--min-p", "1"}, "min_p"},
      {{"--repetition-penalty", "0"}, "repetition_penalty"},
      {{"--stop-token", "70000"}, "stop_tokens"},
  };
  for (const auto& [more, field] : cases) {
    const Run result = dsv3(generate(more));
    CAPTURE(field);
    CAPTURE(result.err);
    CHECK(result.code == 2);
    CHECK(contains(result.err, field));
    CHECK(result.out.empty());
  }
  const Run kernels = dsv3(generate({"--kernels", "avx9000"}));
  CHECK(kernels.code == 1);  // well-formed, and maybe another machine can
  CHECK_MESSAGE(contains(kernels.err, "portable, ref"), kernels.err);
  const Run binary = dsv3({"generate", tiny_coder_file(), "--prompt", "-"}, {.input = "\xff\xfe"});
  CHECK(binary.code == 1);
  CHECK(contains(binary.err, "UTF-8"));
}

TEST_CASE("standard input is one input") {
  const std::string& model = tiny_coder_file();
  for (const std::vector<std::string>& arguments : std::vector<std::vector<std::string>>{
           {"generate", model, "--prompt", "-", "--reference", "-"},
           {"complete", model, "--prefix-file", "-", "--suffix-file", "-"},
           {"complete", model, "--file", "-", "--line", "1", "--reference", "-"},
           {"chat", chat_model_file("v3"), "--reference", "-"}}) {
    const Run result = dsv3(arguments, {.input = "def f(x):\n"});
    CAPTURE(arguments[0]);
    CHECK(result.code == 2);
    CHECK_MESSAGE(contains(result.err, "standard input was already read"), result.err);
    CHECK(result.out.empty());
  }
}

TEST_CASE("generate: a saved session goes on as if it had never stopped") {
  const TemporaryFolder folder;
  const std::string path = folder.file("s.session");
  const Run all = dsv3(generate({"-n", "16", "-q"}));
  const Run first = dsv3(generate({"-n", "6", "-q", "--save-session", path}));
  REQUIRE_MESSAGE(first.code == 0, first.err);
  const Run rest = dsv3({"generate", tiny_coder_file(), "--load-session", path, "-n", "10", "-q"});
  REQUIRE_MESSAGE(rest.code == 0, rest.err);
  const auto without_end = [](std::string text) { return text.substr(0, text.size() - 1); };
  CHECK(without_end(first.out) + rest.out == all.out);
  write_bytes(path, "no session");
  const Run bad = dsv3({"generate", tiny_coder_file(), "--load-session", path});
  CHECK(bad.code == 1);
  CHECK(contains(bad.err, path));
  CHECK(dsv3({"generate", tiny_coder_file()}).code == 2);
}

TEST_CASE("generate: a new process starts warm from a disk cache that several share") {
  const TemporaryFolder folder;
  const std::string dir = folder.file("cache");
  std::string prompt;
  for (int i = 0; i < 60; ++i) prompt += "def f" + std::to_string(i) + "(x):\n    return x\n";
  const auto ask = [&]() -> Json {
    const Run out = dsv3({"generate", tiny_coder_file(), "--prompt", prompt, "-n", "4", "--json",
                          "--ignore-eos", "--disk-cache", dir});
    if (out.code != 0) return {{"error", out.err}};
    return Json::parse(out.out);
  };
  const auto cached = [](const Json& answer) -> int64_t {
    return answer.at("statistics").at("cached_tokens");
  };
  const Json cold = ask();
  REQUIRE_MESSAGE(!cold.contains("error"), cold.dump());
  CHECK(cached(cold) == 0);
  Json answers[3];
  std::vector<std::thread> processes;
  for (Json& answer : answers) processes.emplace_back([&] { answer = ask(); });
  for (std::thread& process : processes) process.join();
  for (const Json& answer : answers) {
    REQUIRE_MESSAGE(!answer.contains("error"), answer.dump());
    CHECK(cached(answer) >= 256);
    CHECK(answer.at("tokens") == cold.at("tokens"));
  }
  const Run purged = dsv3({"purge-cache", dir, "--json"});
  REQUIRE_MESSAGE(purged.code == 0, purged.err);
  CHECK(Json::parse(purged.out).at("bytes") > 0);
  const Json again = ask();
  CHECK(cached(again) == 0);
  CHECK(again.at("tokens") == cold.at("tokens"));
}

TEST_CASE("generate: Ctrl-C and a deadline end it with 1 and what came so far") {
  const Run stopped =
      dsv3(generate({"-n", "2000", "--ignore-eos", "--json-events", "--kernels", "ref"}),
           {.interrupt_on_output = true});
  CHECK(stopped.code == 1);
  CHECK(json_lines(stopped.out).back().at("finish_reason") == "cancelled");
  const Run late = dsv3(generate(
      {"-n", "2000", "--ignore-eos", "--json", "--kernels", "ref", "--deadline-ms", "30"}));
  CHECK(late.code == 1);
  CHECK(Json::parse(late.out).at("finish_reason") == "deadline");
}

TEST_CASE("generate: a session that was saved after Ctrl-C goes on where it was") {
  const TemporaryFolder folder;
  const std::string path = folder.file("s.session");
  const Run stopped = dsv3(generate({"-n", "2000", "--ignore-eos", "--json-events", "--kernels",
                                     "ref", "--save-session", path}),
                           {.interrupt_on_output = true});
  CHECK(stopped.code == 1);
  REQUIRE_MESSAGE(std::filesystem::exists(path), stopped.err);
  Json tokens = Json::array();
  for (const Json& line : json_lines(stopped.out)) {
    REQUIRE_MESSAGE(!line.contains("error"), stopped.out);
    if (line.at("event") != "text") continue;
    tokens.insert(tokens.end(), line.at("tokens").begin(), line.at("tokens").end());
  }
  const Run rest = dsv3({"generate", tiny_coder_file(), "--load-session", path, "-n", "5",
                         "--ignore-eos", "--json", "--kernels", "ref"});
  REQUIRE_MESSAGE(rest.code == 0, rest.err);
  const Json more = Json::parse(rest.out).at("tokens");
  tokens.insert(tokens.end(), more.begin(), more.end());
  const Run all = dsv3(generate(
      {"-n", std::to_string(tokens.size()), "--ignore-eos", "--json", "--kernels", "ref"}));
  CHECK(Json::parse(all.out).at("tokens") == tokens);
}

TEST_CASE("generate: a session that cannot be saved does not take the answer with it") {
  const std::string path = scratch_file("no/such/folder.session");
  const Run machine = dsv3(generate({"-n", "3", "--json", "--save-session", path}));
  CHECK(machine.code == 1);
  const std::vector<Json> lines = json_lines(machine.out);
  REQUIRE(lines.size() == 2);
  CHECK(lines[0].at("tokens").size() == 3);
  CHECK(contains(lines[1].at("error").at("message"), path));
  const Run human = dsv3(generate({"-n", "3", "--save-session", path}));
  CHECK(human.code == 1);
  CHECK(contains(human.err, path));
  CHECK(human.out == lines[0].at("text").get<std::string>() + "\n");
}

TEST_CASE("a full disk is an error, not silence") {
  const Run result = dsv3(generate({"-n", "3"}), {.output_path = "/dev/full"});
  CHECK(result.code == 1);
  CHECK(contains(result.err, "cannot write standard output"));
}

TEST_CASE("generate: a session is saved though nobody takes the answer") {
  const std::string path = scratch_file("unread.session");
  const std::vector<std::string> arguments = generate({"-n", "3", "-q", "--save-session", path});
  for (const RunOptions& options :
       {RunOptions{.output_path = "/dev/full"}, RunOptions{.no_reader = true}}) {
    std::filesystem::remove(path);
    const Run result = dsv3(arguments, options);
    CHECK(result.code == 1);
    CHECK_MESSAGE(contains(result.err, "cannot write standard output"), result.err);
    CHECK(dsv3({"generate", tiny_coder_file(), "--load-session", path, "-n", "1"}).code == 0);
  }
}

TEST_CASE("an input that cannot be read is an error, not its end") {
  for (const std::vector<std::string>& arguments : std::vector<std::vector<std::string>>{
           {"generate", tiny_coder_file(), "-n", "1", "--prompt", "-"},
           {"tokenize", tiny_coder_file()},
           {"chat", chat_model_file("v3"), "-n", "1"}}) {
    const Run result = dsv3(arguments, {.input_path = "/"});
    CHECK(result.code == 1);
    CHECK_MESSAGE(contains(result.err, "standard input: cannot read: Is a directory"), result.err);
  }
}

#ifndef DSV3_EMULATED  // the shell starts the tool itself
TEST_CASE("a trace that cannot be written is an error, after the answer") {
  const std::filesystem::path here = std::filesystem::read_symlink("/proc/self/exe").parent_path();
  const std::string tool = here / "../../examples/cli/dsv3";
  std::vector<std::string> command = {"sh", "-c", "ulimit -f 1; exec \"$@\"", "sh", tool};
  const std::vector<std::string> arguments =
      generate({"-n", "20", "-q", "--trace", scratch_file("long.json")});
  command.insert(command.end(), arguments.begin(), arguments.end());
  const Run result = run(command);
  CHECK(result.code == 1);
  CHECK(result.out == dsv3(generate({"-n", "20"})).out);
  CHECK_MESSAGE(contains(result.err, "long.json: cannot write: File too large"), result.err);
}

TEST_CASE("what was closed does not become another file: the trace holds a trace alone") {
  const std::filesystem::path here = std::filesystem::read_symlink("/proc/self/exe").parent_path();
  const std::string tool = here / "../../examples/cli/dsv3";
  const std::string trace = scratch_file("closed.json");
  const auto without = [&](const std::string& closed) {
    std::filesystem::remove(trace);
    std::vector<std::string> command = {"sh", "-c", "exec \"$@\" " + closed, "sh", tool};
    const std::vector<std::string> arguments = generate({"-n", "3", "--trace", trace});
    command.insert(command.end(), arguments.begin(), arguments.end());
    const Run result = run(command);
    CAPTURE(closed);
    CHECK(Json::accept(read_bytes(trace)));
    return result;
  };
  const Run output = without(">&-");
  CHECK(output.code == 1);
  CHECK_MESSAGE(contains(output.err, "cannot write standard output"), output.err);
  CHECK(without("<&- >&- 2>&-").code == 1);
  const Run others = without("<&- 2>&-");
  CHECK(others.code == 0);
  CHECK(others.out == dsv3(generate({"-n", "3"})).out);
}
#endif

TEST_CASE("complete: a cursor in a file, or two files") {
  const std::string file = scratch_file("circle.py");
  write_bytes(file, kSource);
  const std::vector<std::string> base = {"complete", tiny_coder_file(), "-n", "10", "--json"};
  const auto at = [&](std::vector<std::string> more) {
    more.insert(more.begin(), base.begin(), base.end());
    return dsv3(more);
  };
  const Run cursor = at({"--file", file, "--line", "7", "--column", "12"});
  REQUIRE_MESSAGE(cursor.code == 0, cursor.err);
  const Json said = Json::parse(cursor.out);
  CHECK(said.at("prompt").at("dropped_bytes_before") == 0);
  const Run end = at({"--file", file, "--line", "7"});
  CHECK(Json::parse(end.out).at("tokens") == said.at("tokens"));

  const std::string source = kSource;
  const size_t split = source.find("return \n") + 7;
  const std::string prefix = scratch_file("prefix"), suffix = scratch_file("suffix");
  write_bytes(prefix, source.substr(0, split));
  write_bytes(suffix, source.substr(split));
  const Run files = at({"--prefix-file", prefix, "--suffix-file", suffix});
  CHECK(Json::parse(files.out).at("tokens") == said.at("tokens"));
  const Run plain = at({"--prefix-file", prefix});
  CHECK(Json::parse(plain.out).at("tokens") != said.at("tokens"));

  const Run shown = dsv3(
      {"complete", tiny_coder_file(), "-n", "10", "--file", file, "--line", "7", "--show", "2"});
  CHECK(shown.out ==
        "def perimeter(radius):\n    return " + said.at("text").get<std::string>() + "\n\n");
}

TEST_CASE("complete: columns are characters, and a place that is not there is refused") {
  const std::string file = scratch_file("columns.py");
  write_bytes(file, kSource);
  // "# é 🦀 end": nine characters in thirteen bytes.
  const auto code = [&](const char* line, const char* column) {
    return dsv3({"complete", tiny_coder_file(), "-n", "1", "--json", "--file", file, "--line", line,
                 "--column", column});
  };
  CHECK(code("9", "10").code == 0);
  const Run beyond = code("9", "11");
  CHECK(beyond.code == 2);
  CHECK_MESSAGE(contains(beyond.err, "its end is column 10"), beyond.err);
  CHECK(code("10", "1").code == 0);  // the empty line behind the last line break
  const Run below = code("11", "1");
  CHECK(below.code == 2);
  CHECK_MESSAGE(contains(below.err, "its last line is 10"), below.err);
  const Run missing = dsv3({"complete", tiny_coder_file(), "--file", file + ".no", "--line", "1"});
  CHECK(missing.code == 1);
  CHECK(contains(missing.err, "columns.py.no"));
}

TEST_CASE("complete: a text that is too long is cut far from the cursor, and that is said") {
  std::string before, after;
  for (int i = 0; i < 400; ++i)
    before += "value_" + std::to_string(i) + " = compute(" + std::to_string(i) + ")\n";
  for (int i = 0; i < 400; ++i)
    after += "\nresult_" + std::to_string(i) + " = value_" + std::to_string(i);
  const std::string file = scratch_file("long.py");
  write_bytes(file, before + "total = " + after + "\n");
  const Run result = dsv3({"complete", tiny_coder_file(), "-n", "4", "--json", "--file", file,
                           "--line", "401", "--context", "300"});
  REQUIRE_MESSAGE(result.code == 0, result.err);
  CHECK(contains(result.err, "left out"));
  const Json prompt = Json::parse(result.out).at("prompt");
  const int kept_before = prompt.at("prefix_tokens"), kept_after = prompt.at("suffix_tokens");
  CHECK(kept_before + kept_after <= 300);
  CHECK(kept_before > 200);
  CHECK(kept_after > 40);
  // Without --context: as much as the model reads.
  const Run most = dsv3({"complete", tiny_coder_file(), "-n", "40", "--json", "--file", file,
                         "--line", "401", "--kernels", "portable"});
  REQUIRE_MESSAGE(most.code == 0, most.err);
  const uint64_t prompt_tokens = Json::parse(most.out).at("statistics").at("prompt_tokens");
  CHECK(prompt_tokens <= 2048 - 40);
  CHECK(prompt_tokens > 1800);
  const Run all =
      dsv3({"complete", tiny_coder_file(), "-n", "2048", "--file", file, "--line", "1"});
  CHECK(all.code == 2);
  CHECK(contains(all.err, "--max-tokens"));
}

TEST_CASE("chat: turns from standard input, with and without reasoning") {
  const std::string file = chat_model_file("v31");
  CHECK(contains(dsv3({"inspect", file}).out, "deepseek-v3.1"));
  const Run human =
      dsv3({"chat", file, "--system", "Be short.", "-n", "6"}, {.input = "Hello\nAnd\\\nmore\n"});
  REQUIRE_MESSAGE(human.code == 0, human.err);
  const Run machine = dsv3({"chat", file, "--system", "Be short.", "-n", "6", "--json"},
                           {.input = "{\"content\":\"Hello\"}\n{\"content\":\"And\\nmore\"}\n"});
  REQUIRE_MESSAGE(machine.code == 0, machine.err);
  const std::vector<Json> turns = json_lines(machine.out);
  REQUIRE(turns.size() == 2);
  CHECK(human.out == turns[0].at("text").get<std::string>() + "\n" +
                         turns[1].at("text").get<std::string>() + "\n");
  // The second turn finds the first one in the cache.
  CHECK(turns[1].at("statistics").at("cached_tokens") > 5);

  const Run thinking = dsv3({"chat", file, "--thinking", "-n", "6", "--json"},
                            {.input = "{\"content\":\"Hello\"}\n"});
  const Json thought = Json::parse(thinking.out);
  CHECK(thought.at("text") == "");
  CHECK(thought.at("reasoning").get<std::string>().size() > 0);
  const Run seen = dsv3({"chat", file, "--thinking", "-n", "6"}, {.input = "Hello\n"});
  CHECK(contains(seen.out, "<think>\n" + thought.at("reasoning").get<std::string>()));
}

TEST_CASE("chat: a long conversation forgets its oldest turns and goes on") {
  std::string words;
  for (int i = 0; i < 250; ++i) words += "word" + std::to_string(i) + " ";
  std::string input;
  for (int i = 0; i < 4; ++i) input += Json{{"content", words}}.dump() + "\n";
  const Run result = dsv3({"chat", chat_model_file("v3"), "-n", "2", "--json"}, {.input = input});
  REQUIRE_MESSAGE(result.code == 0, result.err);
  CHECK(json_lines(result.out).size() == 4);
  CHECK(contains(result.err, "oldest turn is forgotten"));
  const Run too_long =
      dsv3({"chat", chat_model_file("v3"), "--json"},
           {.input = Json{{"content", words + words + words + words + words}}.dump() + "\n"});
  CHECK(too_long.code == 1);
  CHECK(contains(too_long.out, "DSV3_E_CAPACITY"));
}

TEST_CASE("chat: what is forgotten leaves room for the answer") {
  std::string input;
  for (int i = 0; i < 12; ++i) input += "{\"content\":\"Hello\"}\n";
  const Run result = dsv3({"chat", chat_model_file("v3"), "-n", "200", "--ignore-eos", "--json"},
                          {.input = input});
  REQUIRE_MESSAGE(result.code == 0, result.err);
  const std::vector<Json> turns = json_lines(result.out);
  CHECK(turns.size() == 12);
  for (const Json& turn : turns) CHECK(turn.at("finish_reason") == "max_tokens");
  CHECK(contains(result.err, "oldest turn is forgotten"));
  // A quarter of the model at most is kept for an answer: this history stays.
  std::string words, two;
  for (int i = 0; i < 200; ++i) words += "word" + std::to_string(i) + " ";
  for (int i = 0; i < 2; ++i) two += Json{{"content", words}}.dump() + "\n";
  const Run kept =
      dsv3({"chat", chat_model_file("v3"), "-n", "1024", "--logit-bias", "1=1000", "--json"},
           {.input = two});
  REQUIRE_MESSAGE(kept.code == 0, kept.err);
  CHECK(json_lines(kept.out).at(1).at("statistics").at("prompt_tokens") > 1024);
  CHECK_FALSE(contains(kept.err, "forgotten"));
}

TEST_CASE("chat: on a terminal a question that fails is one question") {
  const std::vector<std::string> chat = {"chat", chat_model_file("v3"), "-q", "-n",
                                         "12",   "--ignore-eos"};
  std::vector<std::string> with_json = chat;
  with_json.push_back("--json");
  const Run two =
      dsv3(with_json, {.input = "{\"content\":\"Hello\"}\n{\"content\":\"And more\"}\n"});
  REQUIRE_MESSAGE(two.code == 0, two.err);
  std::vector<std::string> answers;
  for (const Json& turn : json_lines(two.out)) answers.push_back(turn.at("text"));
  REQUIRE(answers.size() == 2);
  std::string endless;
  for (int i = 0; i < 2048; ++i) endless += std::to_string(i) + " ";
  const std::string input = "Hello\n\xff\xfe\n" + endless + "\nAnd more\n/quit\n";
  const Run result = dsv3(chat, {.input = input, .terminal = true});
  CHECK_MESSAGE(result.code == 0, result.err);
  CHECK(contains(result.err, "dsv3: standard input: is not UTF-8"));
  CHECK(contains(result.err, "max_position_embeddings"));
  CHECK_FALSE(contains(result.err, "forgotten"));
  // The answers are those of a conversation without them.
  CHECK(result.out == "> " + answers[0] + "\n> > > " + answers[1] + "\n> \n");
}

TEST_CASE("chat: blank lines between a program's turns") {
  const Run result = dsv3({"chat", chat_model_file("v3"), "-n", "2", "--json"},
                          {.input = "\n{\"content\":\"Hello\"}\n \t\r\n{\"content\":\"x\"}\n\n"});
  CHECK_MESSAGE(result.code == 0, result.err);
  CHECK(json_lines(result.out).size() == 2);
}

TEST_CASE("chat: a model without a template says so") {
  const Run result = dsv3({"chat", tiny_coder_file()}, {.input = "Hello\n"});
  CHECK(result.code == 1);
  CHECK(contains(result.err, "chat template"));
  const Run line = dsv3({"chat", chat_model_file("v31"), "--json"}, {.input = "Hello\n"});
  CHECK(line.code == 1);
  CHECK(contains(line.err, "\"content\""));
}

}  // namespace
}  // namespace dsv3::test
