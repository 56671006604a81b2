// dsv3 tokenize FILE, dsv3 detokenize FILE: JSON lines in on stdin, JSON lines out on stdout.
#include <functional>
#include <memory>

#include "commands.h"
#include "common.h"
#include "options.h"

namespace cli {

namespace {

struct Options {
  ModelOptions model;
  bool parse_special = false, add_bos = false, skip_special = false, json = false;
};

// Calls `convert` with every line of stdin that is not blank and prints what it returns.
void for_each_line(const std::function<Json(const Json&)>& convert) {
  std::string line;
  for (size_t number = 1; read_line(&line); ++number) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const std::string where = "standard input, line " + std::to_string(number);
    Json value;
    try {
      value = Json::parse(line);
    } catch (const Json::exception& error) {
      throw Failure(where + ": is not JSON: " + error.what());
    }
    try {
      write_json(convert(value));
    } catch (const Failure& failure) {
      throw Failure(where + ": " + failure.what(), failure.status(), failure.field(),
                    failure.retryable());
    }
  }
}

void run_tokenize(const Options& o) {
  Interrupt interrupt;
  const Model model = o.model.open(interrupt);
  const uint32_t flags =
      (o.parse_special ? DSV3_TOKENIZE_PARSE_SPECIAL : 0) | (o.add_bos ? DSV3_TOKENIZE_ADD_BOS : 0);
  for_each_line([&](const Json& in) -> Json {
    if (interrupt.is_set()) throw Failure("cancelled", DSV3_E_CANCELLED);
    if (!in.is_object() || !in.contains("text") || !in["text"].is_string()) {
      throw Failure("found " + in.dump().substr(0, 60) + ", expected an object with \"text\"");
    }
    return {{"ids", tokenize(model.get(), in["text"].get_ref<const std::string&>(), flags)}};
  });
}

void run_detokenize(const Options& o) {
  Interrupt interrupt;
  const Model model = o.model.open(interrupt);
  const uint32_t flags = o.skip_special ? DSV3_DETOKENIZE_SKIP_SPECIAL : 0;
  for_each_line([&](const Json& in) -> Json {
    if (interrupt.is_set()) throw Failure("cancelled", DSV3_E_CANCELLED);
    if (!in.is_object() || !in.contains("ids") || !in["ids"].is_array()) {
      throw Failure("found " + in.dump().substr(0, 60) +
                    ", expected an object with \"ids\", an array of token ids");
    }
    const std::vector<int32_t> ids = parse_ids(in["ids"], "ids");
    const std::string text = detokenize(model.get(), ids.data(), ids.size(), flags);
    Json out = {{"text", text}};
    if (!is_utf8(text)) {
      // Tokens that end inside a character: JSON cannot hold the bytes, so they come beside.
      std::string hex;
      for (const char c : text) hex += format("%02x", static_cast<unsigned char>(c));
      out["bytes"] = hex;
    }
    return out;
  });
}

}  // namespace

void add_tokenize(CLI::App& app, Main& main) {
  CLI::App* command =
      app.add_subcommand("tokenize", "JSON lines {\"text\"} on stdin to {\"ids\"} on stdout");
  auto o = std::make_shared<Options>();
  o->model.add_to(*command);
  command->add_flag("--parse-special", o->parse_special,
                    "read special tokens' texts as those tokens");
  command->add_flag("--add-bos", o->add_bos, "begin with the begin-of-sentence token");
  command->add_flag("--json", o->json, "accepted for uniformity: the output is JSON lines anyway");
  command->callback([o, &main] {
    main.json = o->json;
    run_tokenize(*o);
  });
}

void add_detokenize(CLI::App& app, Main& main) {
  CLI::App* command =
      app.add_subcommand("detokenize",
                         "JSON lines {\"ids\"} on stdin to {\"text\"} on stdout (\"bytes\", in "
                         "hexadecimal, beside a text that ends inside a character)");
  auto o = std::make_shared<Options>();
  o->model.add_to(*command);
  command->add_flag("--skip-special", o->skip_special, "leave special tokens out");
  // The text of special tokens comes back unless it is skipped; named so that a pipe through
  // tokenize and detokenize takes the same options.
  command->add_flag(
      "--parse-special", o->parse_special,
      "accepted for symmetry with tokenize: special tokens' texts are always written");
  command->add_flag("--json", o->json, "accepted for uniformity: the output is JSON lines anyway");
  command->callback([o, &main] {
    main.json = o->json;
    run_detokenize(*o);
  });
}

}  // namespace cli
