// dsv3 convert HF_DIR OUT.dsv3
#include <memory>
#include <string_view>

#include "commands.h"
#include "common.h"
#include "options.h"

namespace cli {

namespace {

struct Options {
  std::string checkpoint, output;
  WeightOptions weights;
  bool overwrite = false, json = false;
};

void run(const Options& o, Main& main) {
  main.json = o.json;
  Interrupt interrupt;
  dsv3_convert_options options;
  dsv3_convert_options_init(&options, sizeof options);
  options.weights = WeightOptions::value(o.weights.weights);
  options.ffn = WeightOptions::value(o.weights.ffn);
  options.experts = WeightOptions::value(o.weights.experts);
  options.head = WeightOptions::value(o.weights.head);
  options.overwrite = o.overwrite ? 1 : 0;
  options.cancel = interrupt.token();
  const Stopwatch watch;
  {
    Progress progress("converting", Progress::Unit::kBytes);
    options.progress = Progress::callback;
    options.progress_user = &progress;
    call([&](dsv3_error** e) {
      return dsv3_convert(o.checkpoint.c_str(), o.output.c_str(), &options, e);
    });
  }
  const double seconds = watch.seconds();
  // Opening it again shows that the file is whole, and says what is in it.
  dsv3_model* raw = nullptr;
  call([&](dsv3_error** e) { return dsv3_model_open(o.output.c_str(), nullptr, &raw, e); });
  const Model model(raw);
  const dsv3_model_info info = model_info(model.get());
  if (std::string_view(info.chat_template) == "unknown") {
    write_err(
        "dsv3: the checkpoint's chat template is not one of DeepSeek-V2, V3, R1 or V3.1: the file "
        "completes text, but renders no chat\n");
  }
  if (o.json) {
    write_json({{"output", o.output},
                {"model_type", info.model_type},
                {"chat_template", info.chat_template},
                {"parameters", info.parameters},
                {"file_bytes", info.file_bytes},
                {"seconds", seconds}});
    return;
  }
  write_out(format("%s: %s, %s parameters, %s, in %.1f s (%s/s)\n", o.output.c_str(),
                   info.model_type, human_count(info.parameters).c_str(),
                   human_bytes(info.file_bytes).c_str(), seconds,
                   human_bytes(static_cast<uint64_t>(static_cast<double>(info.file_bytes) /
                                                     (seconds > 0 ? seconds : 1)))
                       .c_str()));
}

}  // namespace

void add_convert(CLI::App& app, Main& main) {
  CLI::App* command =
      app.add_subcommand("convert", "Turn a Hugging Face checkpoint into one .dsv3 file");
  auto o = std::make_shared<Options>();
  command
      ->add_option("HF_DIR", o->checkpoint, "folder with config.json, safetensors, tokenizer.json")
      ->required();
  command->add_option("OUT.dsv3", o->output, "the file to write")->required();
  command
      ->add_option("--weights", o->weights.weights,
                   "attention and feed-forward layers: keep the checkpoint's types, or quantise "
                   "BF16, F16 and F32 to fp8")
      ->check(CLI::IsMember({"keep", "fp8"}))
      ->capture_default_str();
  o->weights.add_to(*command);
  command->add_flag("--overwrite", o->overwrite, "replace an existing file");
  command->add_flag("--json", o->json, "print the result as JSON");
  command->callback([o, &main] { run(*o, main); });
}

}  // namespace cli
