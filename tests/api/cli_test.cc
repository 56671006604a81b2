// The `dsv3` tool as a user and as a program meet it: exit codes, messages, JSON, golden values
// through convert, tokenize, detokenize, inspect and logits.
#include <doctest/doctest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

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

Run check_usage_error(const std::vector<std::string>& arguments, const std::string& expected) {
  const Run result = dsv3(arguments);
  CAPTURE(expected);
  CAPTURE(result.err);
  CHECK(result.code == 2);
  CHECK(contains(result.err, expected));
  CHECK(result.out.empty());
  return result;
}

TEST_CASE("used wrongly is 2, with a word about what is wrong") {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{}, "subcommand"},
      {{"frobnicate"}, "frobnicate"},
      {{"inspect"}, "FILE"},
      {{"inspect", "x.dsv3", "--colour"}, "--colour"},
      {{"convert", "only-one"}, "OUT.dsv3"},
      {{"convert", "a", "b", "--weights", "int3"}, "--weights"},
      {{"convert", "a", "b", "--head", "mxfp4"}, "--head"},
      {{"bench", "a", "--experts", "mxfp4"}, "experts"},
      {{"bench", "a", "--layers", "2"}, "layers"},
      {{"bench", "a", "--cache-mb", "5"}, "--cache-mb"},
      {{"generate", "x.dsv3"}, "--prompt"},
      {{"generate", "x.dsv3", "--prompt", "a", "--residency", "cloud"}, "--residency"},
      {{"generate", "x.dsv3", "--prompt", "a", "--threads", "-1"}, "--threads"},
      {{"generate", "x.dsv3", "--prompt", "a", "--logprobs", "65"}, "--logprobs"},
      {{"generate", "x.dsv3", "--prompt", "a", "--logit-bias", "5"}, "ID=BIAS"},
      {{"generate", "x.dsv3", "--prompt", "a", "--logit-bias", "x=1"}, "ID=BIAS"},
      {{"complete", "x.dsv3"}, "--prefix-file"},
      {{"complete", "x.dsv3", "--line", "3"}, "--file"},
      {{"complete", "x.dsv3", "--file", "a.py", "--line", "0"}, "--line"},
      {{"logits", "x.dsv3", "--tokens", "t.json"}, "--out"},
      {{"perplexity", "x.dsv3", "--text", "t", "--window", "1"}, "--window"},
  };
  for (const auto& [arguments, expected] : cases) check_usage_error(arguments, expected);
}

// Both bounds can be read, and what was found; the tests need no file, for options come first.
TEST_CASE("a number out of its range: the option, the number, the range") {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"generate", "x", "--prompt", "a", "--threads", "-3"}, "--threads: -3 is not in [0, 1024]"},
      {{"generate", "x", "--prompt", "a", "--logprobs", "65"}, "--logprobs: 65 is not in [0, 64]"},
      {{"generate", "x", "--prompt", "a", "--cache-mb", "-1"},
       "--cache-mb: -1 is not in [0, 1099511627776]"},
      // What strtoull() would make 1 of.
      {{"generate", "x", "--prompt", "a", "--cache-mb", "-18446744073709551615"},
       "--cache-mb: -18446744073709551615 is not in [0, 1099511627776]"},
      {{"generate", "x", "--prompt", "a", "-n", "-1"},
       "--max-tokens: -1 is not in [0, 2147483647]"},
      {{"generate", "x", "--prompt", "a", "-n", "2147483648"},
       "--max-tokens: 2147483648 is not in [0, 2147483647]"},
      {{"generate", "x", "--prompt", "a", "-n", "99999999999999999999"},
       "--max-tokens: 99999999999999999999 is not in [0, 2147483647]"},
      {{"generate", "x", "--prompt", "a", "--deadline-ms", "-1"},
       "--deadline-ms: -1 is not in [0, 1099511627776]"},
      {{"generate", "x", "--prompt", "a", "--seed", "-1"},
       "--seed: -1 is not in [0, 18446744073709551615]"},
      {{"generate", "x", "--prompt", "a", "--seed", "18446744073709551616"},
       "--seed: 18446744073709551616 is not in [0, 18446744073709551615]"},
      {{"complete", "x", "--context", "-1"}, "--context: -1 is not in [0, 1099511627776]"},
      {{"complete", "x", "--show", "-1"}, "--show: -1 is not in [0, 1000000000]"},
      {{"perplexity", "x", "--text", "t", "--limit", "-1"},
       "--limit: -1 is not in [0, 1099511627776]"},
      {{"serve-bench", "x", "--seed", "-1"}, "--seed: -1 is not in [0, 18446744073709551615]"},
      {{"bench", "--shape", "tiny", "--layers", "-3"}, "--layers: -3 is not in [0, 1024]"},
      {{"bench", "--shape", "tiny", "--repeats", "101"}, "--repeats: 101 is not in [1, 100]"},
      {{"complete", "x", "--file", "a", "--line", "0"}, "--line: 0 is not in [1, 1000000000]"},
      {{"complete", "x", "--file", "a", "--line", "1", "--column", "-5"},
       "--column: -5 is not in [1, 1000000000]"},
      {{"perplexity", "x", "--text", "t", "--window", "1"},
       "--window: 1 is not in [2, 1099511627776]"},
      {{"serve-bench", "x", "--seconds", "0.05"}, "--seconds: 0.05 is not in [0.1, 1000000]"},
      {{"serve-bench", "x", "--seconds", "nan"}, "--seconds: nan is not in [0.1, 1000000]"},
      {{"serve-bench", "x", "--clients", "many"}, "--clients: many is not in [0, 256]"},
      {{"serve-bench", "x", "--clients", "99999999999"},
       "--clients: 99999999999 is not in [0, 256]"},
  };
  for (const auto& [arguments, expected] : cases) {
    CHECK(check_usage_error(arguments, expected).err.size() < 200);
  }
  CHECK(contains(dsv3({"bench", "--help"}).out, "in [0, 1024]"));
  const Run ends = dsv3({"complete", "x", "--file", "a", "--line", "1000000000"});
  CHECK(ends.code == 1);  // allowed: what is missing is the file
  CHECK_FALSE(contains(ends.err, "--line"));
  const Run largest = dsv3({"generate", "x", "--prompt", "a", "-n", "2147483647", "--seed",
                            "18446744073709551615", "--deadline-ms", "1099511627776"});
  CHECK_MESSAGE(largest.code == 1, largest.err);
}

TEST_CASE("used wrongly, and a program asks: the same message as JSON") {
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"--json"}, "--json"},
      {{"frobnicate", "--json"}, "frobnicate"},
      {{"inspect", "--json"}, "FILE"},
      {{"generate", "x.dsv3", "--json"}, "--prompt"},
      {{"generate", "x.dsv3", "--json-events"}, "--prompt"},
      {{"generate", "x.dsv3", "--prompt", "a", "--temperature", "abc", "--json"}, "--temperature"},
      {{"generate", "x.dsv3", "--json-events", "--prompt", "a", "--threads", "-1"}, "--threads"},
      {{"generate", "x.dsv3", "--prompt", "a", "--colour", "--json"}, "--colour"},
      {{"generate", "x.dsv3", "--prompt", "a", "--json", "--json-events"}, "--json"},
  };
  for (const auto& [arguments, expected] : cases) {
    const Run result = dsv3(arguments);
    CAPTURE(expected);
    CAPTURE(result.err);
    CHECK(result.code == 2);
    CHECK(contains(result.err, expected));
    REQUIRE(json_lines(result.out).size() == 1);
    const Json error = Json::parse(result.out).at("error");
    CHECK(error.at("status") == "DSV3_E_INVALID_ARGUMENT");
    const std::string message = error.at("message");
    CHECK_MESSAGE(contains(message, expected), message);
    CHECK(contains(result.err, message));
    CHECK(error.at("retryable") == false);
  }
}

TEST_CASE("help and version are 0") {
  for (const char* command : {"convert", "inspect", "tokenize", "detokenize", "logits", "complete",
                              "generate", "chat", "perplexity"}) {
    const Run result = dsv3({command, "--help"});
    CHECK(result.code == 0);
    CHECK(contains(result.out, "FILE") != (std::string(command) == "convert"));
  }
  const Run version = dsv3({"--version"});
  CHECK(version.code == 0);
  CHECK(version.out == "dsv3 0.1.0\n");
  for (const std::vector<std::string>& arguments :
       std::vector<std::vector<std::string>>{{"--help"}, {"generate", "--help"}, {"--version"}}) {
    const Run full = dsv3(arguments, {.output_path = "/dev/full"});
    CHECK(full.code == 1);
    CHECK_MESSAGE(contains(full.err, "cannot write standard output"), full.err);
  }
}

TEST_CASE("a file that is not there, and one that is no model, are 1 and named") {
  const std::string missing = scratch_file("missing.dsv3");
  const std::string text = scratch_file("text.dsv3");
  write_bytes(text, "no model at all\n");
  for (const std::string& path : {missing, text}) {
    for (const std::vector<std::string>& arguments :
         std::vector<std::vector<std::string>>{{"inspect", path, "--json"},
                                               {"generate", path, "--prompt", "x", "--json"},
                                               {"chat", path, "--json"}}) {
      const Run result = dsv3(arguments);
      CHECK(result.code == 1);
      CHECK(contains(result.err, path));
      const Json error = Json::parse(result.out).at("error");
      CHECK(error.at("status") == (path == missing ? "DSV3_E_NOT_FOUND" : "DSV3_E_CORRUPT"));
      CHECK(contains(error.at("message"), path));
    }
  }
}

TEST_CASE("convert: a chat template that is not known costs the chat alone") {
  const std::string folder = scratch_file("unknown-chat"), out = folder + ".dsv3";
  std::filesystem::copy(source_path("examples/models/tiny-coder"), folder);
  write_bytes(folder + "/chat_template.jinja", "{{ messages[0].content }}");
  const Run converted = dsv3({"convert", folder, out, "--json"});
  REQUIRE_MESSAGE(converted.code == 0, converted.err);
  CHECK(Json::parse(converted.out).at("chat_template") == "unknown");
  CHECK(contains(converted.err, "renders no chat"));
  CHECK(dsv3({"generate", out, "--prompt", "import", "-n", "2", "--ignore-eos"}).code == 0);
  RunOptions said;
  said.input = "hello\n";
  for (const std::vector<std::string>& chat :
       std::vector<std::vector<std::string>>{{"chat", out}, {"chat", out, "--thinking"}}) {
    const Run answer = dsv3(chat, said);
    CHECK(answer.code == 1);
    CHECK(contains(answer.err, "none of those that are rendered"));
  }
}

TEST_CASE("convert: what it says, what it refuses") {
  const std::string out = scratch_file("convert.dsv3");
  const std::string checkpoint = source_path("tests/data/models/v2-lite-micro");
  const Run first = dsv3({"convert", checkpoint, out, "--json"});
  REQUIRE_MESSAGE(first.code == 0, first.err);
  const Json said = Json::parse(first.out);
  CHECK(said.at("model_type") == "deepseek_v2");
  CHECK(said.at("file_bytes") == std::filesystem::file_size(out));
  CHECK(first.err.empty());  // no progress bar where there is no terminal

  const Run again = dsv3({"convert", checkpoint, out});
  CHECK(again.code == 2);  // --overwrite was forgotten
  CHECK(contains(again.err, out));
  CHECK(contains(again.err, "exist"));
  const Run fp8 = dsv3({"convert", checkpoint, out, "--overwrite", "--weights", "fp8"});
  CHECK(fp8.code == 0);
  CHECK(std::filesystem::file_size(out) < said.at("file_bytes").get<uint64_t>());
  const Run four =
      dsv3({"convert", checkpoint, out, "--overwrite", "--ffn", "mxfp4", "--head", "fp8"});
  CHECK(four.code == 0);
  const Run inside = dsv3({"inspect", out, "--tensors"});
  CHECK(contains(inside.out, "MXFP4"));
  CHECK(contains(inside.out, "F8_E4M3"));  // the head

  const Run nothing = dsv3({"convert", scratch_file("nowhere"), scratch_file("x.dsv3")});
  CHECK(nothing.code == 1);
  CHECK(contains(nothing.err, "nowhere"));
  CHECK_FALSE(std::filesystem::exists(scratch_file("x.dsv3")));
}

TEST_CASE("inspect: people and programs see the same model") {
  const std::string& file = tiny_coder_file();
  const Run human = dsv3({"inspect", file, "--verify", "--tensors"});
  CHECK(human.code == 0);
  for (const char* part : {"deepseek_v3", "4,096", "2,048", "model.layers.1.mlp.gate.weight"}) {
    CHECK_MESSAGE(contains(human.out, part), part);
  }
  CHECK(contains(human.out, "all match"));
  // Every tensor's line ends in its bytes.
  const size_t head = human.out.find("\nlm_head.weight ") + 1;
  REQUIRE(head != 0);
  const std::string line = human.out.substr(head, human.out.find('\n', head) - head);
  CHECK_MESSAGE(line.ends_with("[4096,256]           " + std::to_string(4096 * 256 * 2)), line);
  const Run machine = dsv3({"inspect", file, "--verify", "--json"});
  CHECK(machine.code == 0);
  const Json model = Json::parse(machine.out);
  CHECK(model.at("config").at("vocab_size") == 4096);
  CHECK(model.at("verified") == true);
  CHECK(model.at("memory").at("weight_bytes") > 16'000'000);
  CHECK(model.at("tensors").size() > 50);
}

TEST_CASE("inspect --verify finds a flipped byte and names the tensor") {
  const std::string damaged = scratch_file("damaged.dsv3");
  std::string bytes = read_bytes(tiny_coder_file());
  bytes[bytes.size() - 5000] = static_cast<char>(bytes[bytes.size() - 5000] ^ 1);
  write_bytes(damaged, bytes);
  CHECK(dsv3({"inspect", damaged}).code == 0);
  const Run result = dsv3({"inspect", damaged, "--verify", "--json"});
  CHECK(result.code == 1);
  const Json error = Json::parse(result.out).at("error");
  CHECK(error.at("status") == "DSV3_E_CORRUPT");
  CHECK(contains(error.at("message"), "model."));
}

TEST_CASE("tokenize and detokenize: every golden line, through a pipe and back") {
  std::ifstream in(source_path("tests/data/tokenizer/tiny-coder.jsonl"));
  std::string texts;
  std::vector<Json> golden;
  for (std::string line; std::getline(in, line);) {
    golden.push_back(Json::parse(line));
    texts += Json{{"text", golden.back()["text"]}}.dump() + "\n";
  }
  REQUIRE(golden.size() == 300);
  const Run there = dsv3({"tokenize", tiny_coder_file(), "--parse-special"}, {.input = texts});
  REQUIRE_MESSAGE(there.code == 0, there.err);
  const std::vector<Json> ids = json_lines(there.out);
  REQUIRE(ids.size() == golden.size());
  for (size_t i = 0; i < ids.size(); ++i) CHECK(ids[i].at("ids") == golden[i].at("ids"));
  const Run back = dsv3({"detokenize", tiny_coder_file()}, {.input = there.out});
  REQUIRE_MESSAGE(back.code == 0, back.err);
  const std::vector<Json> again = json_lines(back.out);
  REQUIRE(again.size() == golden.size());
  for (size_t i = 0; i < again.size(); ++i) CHECK(again[i].at("text") == golden[i].at("text"));
}

TEST_CASE("tokenize: special tokens only on request; a wrong line is named") {
  const std::string line = Json{{"text", "<｜fim▁hole｜>"}}.dump() + "\n\n";
  const Run plain = dsv3({"tokenize", tiny_coder_file()}, {.input = line});
  const Run special = dsv3({"tokenize", tiny_coder_file(), "--parse-special"}, {.input = line});
  CHECK(json_lines(plain.out).at(0).at("ids").size() > 1);
  CHECK(json_lines(special.out).at(0).at("ids").size() == 1);
  const Run bos =
      dsv3({"tokenize", tiny_coder_file(), "--add-bos"}, {.input = "{\"text\":\"\"}\n"});
  CHECK(json_lines(bos.out).at(0).at("ids") == Json({0}));

  for (const char* wrong : {"{\"text\":1}", "[]", "{", "{\"text\":\"\xff\"}"}) {
    const Run result = dsv3({"tokenize", tiny_coder_file()},
                            {.input = "{\"text\":\"a\"}\n" + std::string(wrong) + "\n"});
    CHECK(result.code == 1);
    CHECK_MESSAGE(contains(result.err, "line 2"), result.err);
    CHECK(json_lines(result.out).size() == 1);
  }
  const Run range = dsv3({"detokenize", tiny_coder_file()}, {.input = "{\"ids\":[4096]}\n"});
  CHECK(range.code == 2);
  CHECK(contains(range.err, "4096"));
  const Run half = dsv3({"detokenize", tiny_coder_file()}, {.input = "{\"ids\":[1.5]}\n"});
  CHECK(half.code == 1);
  CHECK(contains(half.err, "ids[0]"));
}

TEST_CASE("detokenize: a text that ends inside a character comes with its bytes") {
  const Run there =
      dsv3({"tokenize", tiny_coder_file()}, {.input = "{\"text\":\"\\ud83e\\udd80\"}\n"});
  const Json ids = json_lines(there.out).at(0).at("ids");
  REQUIRE(ids.size() > 1);  // the vocabulary has no token for a crab
  const Run part =
      dsv3({"detokenize", tiny_coder_file()}, {.input = Json{{"ids", {ids[0]}}}.dump() + "\n"});
  CHECK(part.code == 0);
  const Json out = json_lines(part.out).at(0);
  CHECK(contains("f09fa680", out.at("bytes").get<std::string>()));
}

// ||a - b|| / ||b|| of rows `positions` of a, which has a row for every token.
double worst_row(const GoldenTensor& a, const GoldenTensor& b,
                 const std::vector<int32_t>& positions) {
  const auto width = static_cast<size_t>(b.shape[1]);
  double worst = 0;
  for (size_t i = 0; i < static_cast<size_t>(b.shape[0]); ++i) {
    const float* row = a.f32.data() + static_cast<size_t>(positions[i]) * width;
    worst = std::max(worst, relative_error(row, b.f32.data() + i * width, width));
  }
  return worst;
}

TEST_CASE("logits: what cannot be written leaves what was there") {
  const TemporaryFolder folder;
  const std::string tokens = folder.file("tokens.json"), out = folder.file("out");
  write_bytes(tokens, "[1, 2, 3]");
  std::filesystem::create_symlink("/dev/full", out);
  const Run full = dsv3({"logits", tiny_coder_file(), "--tokens", tokens, "--out", out});
  CHECK(full.code == 1);
  CHECK_MESSAGE(contains(full.err, out + ": cannot write: No space left on device"), full.err);
  CHECK(std::filesystem::exists(out));
#ifndef DSV3_EMULATED  // the shell starts the tool itself
  const std::filesystem::path here = std::filesystem::read_symlink("/proc/self/exe").parent_path();
  const std::string tool = here / "../../examples/cli/dsv3", old = folder.file("old");
  write_bytes(old, "old");
  const Run limited = run({"sh", "-c", "ulimit -f 1; exec \"$@\"", "sh", tool, "logits",
                           tiny_coder_file(), "--tokens", tokens, "--out", old});
  CHECK(limited.code == 1);
  CHECK_MESSAGE(contains(limited.err, old + ": cannot write: File too large"), limited.err);
  CHECK(read_bytes(old) == "old");
  size_t files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder.path())) {
    (void)entry;
    ++files;
  }
  CHECK(files == 3);
#endif
}

TEST_CASE("logits: the published code's values, through the whole library") {
  const std::string out = scratch_file("logits.safetensors");
  const auto golden = read_golden(source_path("tests/data/golden/tiny-coder.golden.safetensors"));
  const std::vector<int32_t>& tokens = golden.at("1.tokens").i32;
  const std::vector<int32_t>& positions = golden.at("1.positions").i32;
  const Run result = dsv3({"logits", tiny_coder_file(), "--tokens", "-", "--out", out, "--hidden",
                           "--mtp", "--kernels", "ref", "--json"},
                          {.input = Json{{"tokens", tokens}}.dump()});
  REQUIRE_MESSAGE(result.code == 0, result.err);
  CHECK(Json::parse(result.out).at("tensors").at("logits") == Json({tokens.size(), 4096}));
  const auto ours = read_golden(out);
  CHECK(ours.at("logits").shape == std::vector<int64_t>{65, 4096});
  CHECK(ours.at("hidden").shape == std::vector<int64_t>{65, 256});
  CHECK(ours.at("mtp_logits").shape == std::vector<int64_t>{64, 4096});
  CHECK(worst_row(ours.at("logits"), golden.at("1.logits"), positions) < 1e-4);
  CHECK(worst_row(ours.at("hidden"), golden.at("1.hidden"), positions) < 1e-4);
  CHECK(worst_row(ours.at("mtp_logits"), golden.at("1.mtp_logits"), positions) < 1e-4);
}

TEST_CASE("logits: a model without a tokenizer, one token, wrong tokens") {
  const std::string model = scratch_file("v3-micro.dsv3");
  REQUIRE(dsv3({"convert", source_path("tests/data/models/v3-micro"), model}).code == 0);
  CHECK(contains(dsv3({"inspect", model}).out, "tokenizer          no"));
  const std::string out = scratch_file("micro.safetensors");
  const std::string file = scratch_file("tokens.json");
  write_bytes(file, "[3]");
  const Run one = dsv3({"logits", model, "--tokens", file, "--out", out, "--mtp"});
  REQUIRE_MESSAGE(one.code == 0, one.err);
  CHECK(read_golden(out).at("mtp_logits").shape.at(0) == 0);
  std::filesystem::remove(out);
  for (const char* wrong :
       {"[]", "{}", "[1,", "[\"a\"]", "{\"tokens\":3}", "[2.5]", "[99999999999]"}) {
    write_bytes(file, wrong);
    const Run result = dsv3({"logits", model, "--tokens", file, "--out", out});
    CHECK(result.code == 1);
    CHECK_MESSAGE(contains(result.err, file), result.err);
  }
  write_bytes(file, "[1, 1000000]");
  const Run vocabulary = dsv3({"logits", model, "--tokens", file, "--out", out});
  CHECK(vocabulary.code == 2);
  CHECK(contains(vocabulary.err, "1000000"));
  CHECK_FALSE(std::filesystem::exists(out));
  write_bytes(file, "[1, 2]");
  const Run nowhere =
      dsv3({"logits", model, "--tokens", file, "--out", scratch_file("no/such/folder")});
  CHECK(nowhere.code == 1);
  CHECK(contains(nowhere.err, "no/such/folder"));
  // A tokenizer is needed here, and its absence is said.
  const Run text = dsv3({"generate", model, "--prompt", "x"});
  CHECK(text.code == 1);
  CHECK_MESSAGE(contains(text.err, "tokenizer"), text.err);
}

TEST_CASE("perplexity: the same number as from the logits") {
  const std::string text = "def mean(values):\n    return sum(values) / len(values)\n";
  const std::string file = scratch_file("text.py"), out = scratch_file("p.safetensors");
  write_bytes(file, text);
  const Run said =
      dsv3({"perplexity", tiny_coder_file(), "--text", file, "--kernels", "ref", "--json"});
  REQUIRE_MESSAGE(said.code == 0, said.err);
  const Json p = Json::parse(said.out);

  const Run tokenized = dsv3({"tokenize", tiny_coder_file(), "--add-bos"},
                             {.input = Json{{"text", text}}.dump() + "\n"});
  const auto ids = json_lines(tokenized.out).at(0).at("ids").get<std::vector<int32_t>>();
  REQUIRE(dsv3({"logits", tiny_coder_file(), "--tokens", "-", "--out", out, "--kernels", "ref"},
               {.input = Json(ids).dump()})
              .code == 0);
  const auto logits = read_golden(out).at("logits");
  double nats = 0;
  for (size_t i = 0; i + 1 < ids.size(); ++i) {
    const float* row = logits.f32.data() + i * 4096;
    double sum = 0;
    for (size_t j = 0; j < 4096; ++j) sum += std::exp(static_cast<double>(row[j]));
    nats += std::log(sum) - static_cast<double>(row[ids[i + 1]]);
  }
  const double per_token = nats / static_cast<double>(ids.size() - 1);
  CHECK(p.at("nats_per_token").get<double>() == doctest::Approx(per_token).epsilon(1e-5));
  CHECK(p.at("perplexity").get<double>() == doctest::Approx(std::exp(per_token)).epsilon(1e-4));
  CHECK(p.at("bits_per_byte").get<double>() ==
        doctest::Approx(nats / std::log(2.0) / static_cast<double>(text.size())).epsilon(1e-5));
  CHECK(p.at("predicted_tokens") == ids.size() - 1);

  const Run windows =
      dsv3({"perplexity", tiny_coder_file(), "--text", file, "--window", "8", "--json"});
  CHECK(Json::parse(windows.out).at("windows") == (ids.size() - 1 + 7) / 8);
  CHECK(Json::parse(windows.out).at("predicted_tokens") == ids.size() - 1);
  write_bytes(file, "");
  CHECK(dsv3({"perplexity", tiny_coder_file(), "--text", file}).code == 1);
  write_bytes(file, "\xff\xfe");
  CHECK(contains(dsv3({"perplexity", tiny_coder_file(), "--text", file}).err, "UTF-8"));
}

TEST_CASE("bench: lines, profile and picture") {
  const TemporaryFolder folder;
  const std::string plot = folder.file("plot.svg");
  const Run run = dsv3({"bench", "--shape", "tiny", "--layers", "2", "--quick", "--repeats", "1",
                        "--profile", "--json", "--plot", plot});
  REQUIRE_MESSAGE(run.code == 0, run.err);
  const Json said = Json::parse(run.out);
  CHECK(said.at("machine").at("read_bytes_per_second") > 0);
  const Json& lines = said.at("lines");
  REQUIRE(lines.size() == 5);
  for (const Json& line : lines) {
    CHECK(line.at("tokens_per_second") > 0);
    CHECK(line.at("percent_of_limit") > 0);
    if (line.at("name") != "first token") CHECK(line.at("profile").size() > 0);
  }
  const std::string picture = read_bytes(plot);
  CHECK(picture.starts_with("<svg"));
  CHECK(contains(picture, "</svg>"));
  for (const char* text : {"decode, batch 1", "decode, batch 4", "prefill 128"}) {
    CHECK_MESSAGE(contains(picture, text), text);
  }
  const Run human = dsv3({"bench", "--shape", "tiny", "--layers", "2", "--quick", "--repeats", "1",
                          "--only", "batch 4"});
  REQUIRE_MESSAGE(human.code == 0, human.err);
  for (const char* text : {"of the limit", "\nfirst token ", "\ndecode, batch 4 "}) {
    CHECK_MESSAGE(contains(human.out, text), text);
  }
  CHECK(!contains(human.out, "batch 1"));
  CHECK(!contains(human.out, "prefill"));
}

#ifndef DSV3_EMULATED  // which serves nobody within three seconds
TEST_CASE("serve-bench: both phases, their percentiles, and what does not fit") {
  const Run run =
      dsv3({"serve-bench", tiny_coder_file(), "--seconds", "3", "--think", "1", "--prefix", "64",
            "--job", "64", "--clients", "1", "--answer", "4", "--json"});
  REQUIRE_MESSAGE(run.code == 0, run.err);
  const Json said = Json::parse(run.out);
  for (const char* phase : {"idle", "loaded"}) {
    const Json& p = said.at(phase);
    CHECK(p.at("first_token_ms").at("count") > 0);
    CHECK(p.at("first_token_ms").at("p50") <= p.at("first_token_ms").at("p99"));
    CHECK(p.at("cached_tokens") > 0);
    CHECK(p.at("pages_high_water") > 0);
    CHECK(p.at("pages_high_water") <= p.at("pages"));
  }
  CHECK(said.at("idle").at("background_tokens_per_second") == 0);
  CHECK(said.at("loaded").at("background_tokens_per_second") > 0);
  CHECK(dsv3({"serve-bench", tiny_coder_file(), "--prefix", "2048"}).code == 2);
}

TEST_CASE("serve-bench: what was not done, or found a cold cache, is not counted") {
  const std::vector<std::string> common = {"serve-bench", tiny_coder_file(), "--json", "--cancel",
                                           "0"};
  const auto load = [&](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = common;
    arguments.insert(arguments.end(), more.begin(), more.end());
    const Run run = dsv3(arguments);
    REQUIRE_MESSAGE(run.code == 0, run.err);
    return Json::parse(run.out);
  };
  // Jobs of 400 tokens in a cache for two at once: most are refused.
  const Json jobs = load({"--clients", "0", "--background", "16", "--job", "400", "--cache-mb", "2",
                          "--prefix", "64", "--seconds", "1"})
                        .at("loaded");
  CHECK(jobs.at("refused") > 0);
  CHECK(jobs.at("jobs").get<double>() * 400 <=
        jobs.at("background_tokens_per_second").get<double>() * jobs.at("seconds").get<double>() *
            1.01);
  // Who thinks for long after the first question has asked none that counts.
  const Json idle = load({"--clients", "2", "--background", "0", "--prefix", "64", "--think",
                          "600000", "--seconds", "1"})
                        .at("idle");
  CHECK(idle.at("questions") == 0);
  CHECK(idle.at("first_token_ms").at("count") == 0);
  // Both phases ask questions that nobody has asked before.
  const Json both = load({"--clients", "1", "--background", "1", "--job", "64", "--prefix", "64",
                          "--tail", "640", "--answer", "2", "--think", "1", "--seconds", "2"});
  for (const char* phase : {"idle", "loaded"}) {
    const Json& p = both.at(phase);
    CHECK(p.at("questions") > 0);
    CHECK(p.at("cached_tokens").get<double>() < 0.2 * p.at("prompt_tokens").get<double>());
  }
}
#endif

}  // namespace
}  // namespace dsv3::test
