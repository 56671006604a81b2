// dsv3 logits FILE --tokens T.json --out OUT.safetensors: the model's own numbers for a sequence.
#include <memory>

#include "commands.h"
#include "common.h"
#include "options.h"
#include "safetensors.h"

namespace cli {

namespace {

struct Options {
  ModelOptions model;
  ContextOptions context;
  std::string tokens, out;
  bool hidden = false, mtp = false, json = false;
};

std::vector<int32_t> read_tokens(const std::string& path) {
  const std::string text = read_input(path);
  Json value;
  try {
    value = Json::parse(text);
  } catch (const Json::exception& error) {
    throw Failure(path + ": is not JSON: " + error.what());
  }
  if (value.is_object() && value.contains("tokens")) value = Json(value["tokens"]);
  if (!value.is_array()) {
    throw Failure(path + ": expected an array of token ids or {\"tokens\": [...]}");
  }
  std::vector<int32_t> ids = parse_ids(value, path);
  if (ids.empty()) throw Failure(path + ": holds no tokens, expected at least one");
  return ids;
}

void run(const Options& o, Main& main) {
  main.json = o.json;
  Interrupt interrupt;
  const std::vector<int32_t> tokens = read_tokens(o.tokens);
  const Model model = o.model.open(interrupt);
  const dsv3_model_info info = model_info(model.get());
  const Context context = o.context.create(model.get());
  const Session session = create_session(context.get());

  const size_t n = tokens.size();
  const auto vocab = static_cast<size_t>(info.vocab_size);
  const auto width = static_cast<size_t>(info.hidden_size);
  std::vector<float> logits(n * vocab);  // [n, vocab]
  std::vector<float> hidden;             // [n, hidden]
  std::vector<float> mtp;                // [n - 1, vocab]
  if (o.hidden) hidden.resize(n * width);
  if (o.mtp) mtp.resize((n - 1) * vocab);

  dsv3_evaluation evaluation;
  dsv3_evaluation_init(&evaluation, sizeof evaluation);
  evaluation.logits = logits.data();
  evaluation.hidden = o.hidden ? hidden.data() : nullptr;
  // A single token has no MTP row; the tensor is there all the same, with no rows.
  evaluation.mtp_logits = o.mtp && n > 1 ? mtp.data() : nullptr;
  evaluation.cancel = interrupt.token();
  const Stopwatch watch;
  {
    Progress progress("evaluating", Progress::Unit::kTokens);
    evaluation.progress = Progress::callback;
    evaluation.progress_user = &progress;
    call([&](dsv3_error** e) {
      return dsv3_session_evaluate(session.get(), tokens.data(), n, &evaluation, e);
    });
  }
  const double seconds = watch.seconds();

  std::vector<NamedTensor> tensors = {{"logits", {n, vocab}, &logits}};
  if (o.hidden) tensors.push_back({"hidden", {n, width}, &hidden});
  if (o.mtp) tensors.push_back({"mtp_logits", {n - 1, vocab}, &mtp});
  write_safetensors(o.out, tensors);

  const double rate = static_cast<double>(n) / seconds;
  if (o.json) {
    Json shapes = Json::object();
    for (const NamedTensor& tensor : tensors) shapes[tensor.name] = tensor.shape;
    write_json({{"output", o.out},
                {"tokens", n},
                {"tensors", shapes},
                {"seconds", seconds},
                {"tokens_per_second", rate}});
  } else {
    write_out(format("%s: %s tokens at %s tokens/s\n", o.out.c_str(), human_count(n).c_str(),
                     human_rate(rate).c_str()));
  }
  o.context.end_trace(context.get());
}

}  // namespace

void add_logits(CLI::App& app, Main& main) {
  CLI::App* command =
      app.add_subcommand("logits", "Run the model over given tokens and write its logits");
  auto o = std::make_shared<Options>();
  o->model.add_to(*command);
  o->context.add_to(*command);
  command
      ->add_option("--tokens", o->tokens,
                   "JSON file: an array of token ids or {\"tokens\": [...]}; - is standard input")
      ->required();
  command
      ->add_option("--out", o->out,
                   "safetensors file to write: logits F32 [n, vocab], and with the options below "
                   "hidden F32 [n, hidden], mtp_logits F32 [n - 1, vocab]")
      ->required();
  command->add_flag("--hidden", o->hidden, "also the hidden states after the final norm");
  command->add_flag("--mtp", o->mtp, "also the MTP module's logits (row i predicts token i + 2)");
  command->add_flag("--json", o->json, "print the result as JSON");
  command->callback([o, &main] { run(*o, main); });
}

}  // namespace cli
