// dsv3 perplexity FILE --text T: how well the model predicts a text.
#include <algorithm>
#include <cmath>
#include <memory>
#include <numbers>

#include "commands.h"
#include "common.h"
#include "options.h"

namespace cli {

namespace {

struct Options {
  ModelOptions model;
  ContextOptions context;
  std::string text;
  uint64_t window = 512;
  uint64_t limit = 0;
  bool json = false;
};

// The text is cut into windows of `window` tokens, each evaluated on its own behind a begin token,
// so that every token of the text is predicted exactly once, from at most window - 1 tokens of the
// text. A model without a begin token does not predict the first token of a window.
void run(const Options& o, Main& main) {
  main.json = o.json;
  Interrupt interrupt;
  std::string text = read_input(o.text);
  require_utf8(text, o.text);
  const Model model = o.model.open(interrupt);
  const dsv3_model_info info = model_info(model.get());
  const uint64_t begin_tokens = info.bos_token_id >= 0 ? 1 : 0;
  const uint64_t longest = static_cast<uint64_t>(info.max_position_embeddings) - begin_tokens;
  if (o.window > longest) {
    throw Misuse(format("--window: found %llu, expected at most %llu, the model's longest sequence",
                        static_cast<unsigned long long>(o.window),
                        static_cast<unsigned long long>(longest)));
  }
  std::vector<int32_t> tokens = tokenize(model.get(), text, 0);
  if (o.limit != 0 && tokens.size() > o.limit) {
    tokens.resize(o.limit);
    text = detokenize(model.get(), tokens.data(), tokens.size(), 0);
  }
  if (tokens.size() + begin_tokens < 2) {
    throw Failure(o.text + ": is too short: found " + std::to_string(tokens.size()) + " tokens");
  }
  const Context context = o.context.create(model.get());

  double nats = 0;
  uint64_t predicted = 0, windows = 0;
  const Stopwatch watch;
  {
    Progress progress("evaluating", Progress::Unit::kTokens);
    for (size_t at = 0; at < tokens.size(); at += o.window) {
      const size_t count = std::min<size_t>(o.window, tokens.size() - at);
      std::vector<int32_t> window;
      if (begin_tokens > 0) window.push_back(info.bos_token_id);
      window.insert(window.end(), tokens.begin() + static_cast<ptrdiff_t>(at),
                    tokens.begin() + static_cast<ptrdiff_t>(at + count));
      if (window.size() < 2) break;  // one token and nothing to predict it from
      std::vector<float> logprobs(window.size() - 1);
      dsv3_evaluation evaluation;
      dsv3_evaluation_init(&evaluation, sizeof evaluation);
      evaluation.logprobs = logprobs.data();
      evaluation.cancel = interrupt.token();
      const Session session = create_session(context.get());
      call([&](dsv3_error** e) {
        return dsv3_session_evaluate(session.get(), window.data(), window.size(), &evaluation, e);
      });
      for (const float logprob : logprobs) nats -= static_cast<double>(logprob);
      predicted += logprobs.size();
      ++windows;
      Progress::callback(&progress, at + count, tokens.size());
    }
  }
  const double seconds = watch.seconds();
  const double per_token = nats / static_cast<double>(predicted);
  // Every byte counts, also those of a first token that was not predicted.
  const double bits_per_byte = nats / std::numbers::ln2 / static_cast<double>(text.size());
  const double rate = static_cast<double>(predicted) / seconds;
  if (o.json) {
    write_json({{"tokens", tokens.size()},
                {"predicted_tokens", predicted},
                {"bytes", text.size()},
                {"window", o.window},
                {"windows", windows},
                {"nats_per_token", per_token},
                {"bits_per_byte", bits_per_byte},
                {"perplexity", std::exp(per_token)},
                {"seconds", seconds},
                {"tokens_per_second", rate}});
  } else {
    write_out(
        format("%s: %s tokens, %s bytes, %s windows of %s tokens\n"
               "%.4f nats/token, %.4f bits/byte, perplexity %.3f (%s tokens/s)\n",
               o.text.c_str(), human_count(tokens.size()).c_str(), human_count(text.size()).c_str(),
               human_count(windows).c_str(), human_count(o.window).c_str(), per_token,
               bits_per_byte, std::exp(per_token), human_rate(rate).c_str()));
  }
  o.context.end_trace(context.get());
}

}  // namespace

void add_perplexity(CLI::App& app, Main& main) {
  CLI::App* command = app.add_subcommand("perplexity", "How well the model predicts a text");
  auto o = std::make_shared<Options>();
  o->model.add_to(*command);
  o->context.add_to(*command);
  command->add_option("--text", o->text, "UTF-8 text file; - is standard input")->required();
  command
      ->add_option("--window", o->window,
                   "tokens per window; each window is predicted on its own, behind a begin token")
      ->check(in_range(uint64_t{2}, uint64_t{1} << 40))
      ->capture_default_str();
  command->add_option("--limit", o->limit, "use the first so many tokens alone; 0: all")
      ->check(in_range(uint64_t{0}, uint64_t{1} << 40))
      ->capture_default_str();
  command->add_flag("--json", o->json, "print the result as JSON");
  command->callback([o, &main] { run(*o, main); });
}

}  // namespace cli
