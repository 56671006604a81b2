// dsv3 bench: how fast a model runs on this machine, beside what the machine could do.
#include <algorithm>
#include <fstream>
#include <memory>
#include <utility>

#include "commands.h"
#include "common.h"
#include "options.h"

namespace cli {
namespace {

struct Options {
  std::string file, shape, plot, only;
  ContextOptions context;
  WeightOptions weights;
  int32_t layers = 0, repeats = 5;
  bool quick = false, profile = false, scaling = false, invariance = false, json = false;
};

std::string label(const Json& line) { return line["label"]; }

double spread(const Json& line) {
  const double fastest = line["fastest_seconds"], slowest = line["slowest_seconds"];
  return (slowest - fastest) / line["seconds"].get<double>();
}

// Where one repeat of a line went. Times of operations that no thread shares overlap with nothing,
// so they add up to the repeat.
std::string profile_of(const Json& line) {
  std::string out = format("\n%s, one repeat of %.3f ms\n", label(line).c_str(),
                           line["profile_seconds"].get<double>() * 1e3);
  double rest = line["profile_seconds"];
  for (const Json& p : line["profile"]) {
    rest -= p["seconds"].get<double>();
    const double share = 100 * p["share"].get<double>();
    if (share < 0.05) continue;
    out += format(
        "  %-44s %6lld calls %10.3f ms %6.1f %% %8.1f GB/s %8.1f GFLOP/s\n",
        p["name"].get<std::string>().c_str(), static_cast<long long>(p["calls"].get<int64_t>()),
        p["seconds"].get<double>() * 1e3, share, p["bytes_per_second"].get<double>() / 1e9,
        p["flops_per_second"].get<double>() / 1e9);
  }
  return out + format("  %-44s %19.3f ms\n", "between them", rest * 1e3);
}

std::string scaling_of(const Json& scaling) {
  // A model whose context is shorter than every prompt has only the first and the third.
  constexpr std::pair<const char*, const char*> kNames[] = {
      {"read_bytes_per_second", "reads"},
      {"dot_flops_per_second", "multiply-adds"},
      {"decode", "decode"},
      {"prefill", "prefill"}};
  std::string figures;
  for (const auto& [field, name] : kNames) {
    if (!scaling.contains(field)) continue;
    figures +=
        format("%s%s %.2fx", figures.empty() ? "" : ", ", name, scaling[field].get<double>());
  }
  return format("\n%d threads against one: %s\n", scaling["threads"].get<int>(), figures.c_str());
}

// What it costs that a prompt's attention gives the same bits however it is computed.
std::string invariance_of(const Json& result) {
  std::string figures;
  for (const Json& line : result["lines"]) {
    if (!line.contains("times_as_fast")) continue;
    figures += format("%s%d", figures.empty() ? "" : ", ", line["tokens"].get<int>());
    const auto context = line["context"].get<int64_t>();
    if (context > 0) figures += format(" after %lld", static_cast<long long>(context));
    figures += format(": %.2fx", line["times_as_fast"].get<double>());
  }
  if (figures.empty()) return {};
  return "\nWithout bit-identical results (--prompt-attention expanded), prompts of " + figures +
         "\n";
}

void print_human(const Json& result) {
  const Json& machine = result["machine"];
  const Json& model = result["model"];
  std::string out = format(
      "machine   %d threads, kernels %s; reads %.1f GB/s (L2 %.0f GB/s), multiply-adds %s %.0f "
      "GFLOP/s, int8 %.0f GOP/s\n",
      machine["threads"].get<int>(), machine["kernels"].get<std::string>().c_str(),
      machine["read_bytes_per_second"].get<double>() / 1e9,
      machine["cache_bytes_per_second"].get<double>() / 1e9,
      machine["dot"].get<std::string>().c_str(),
      machine["dot_flops_per_second"].get<double>() / 1e9,
      machine["int8_ops_per_second"].get<double>() / 1e9);
  out += format(
      "model     %s, %d layers, %s parameters, weights %s (%s per token), ready in %.3f s, "
      "resident %s (%s without the file)\n\n",
      model["model_type"].get<std::string>().c_str(), model["num_hidden_layers"].get<int>(),
      human_count(model["parameters"]).c_str(), human_bytes(model["weight_bytes"]).c_str(),
      human_bytes(model["active_bytes_per_token"]).c_str(), model["load_seconds"].get<double>(),
      human_bytes(model["resident_bytes"]).c_str(),
      human_bytes(model["resident_anonymous_bytes"]).c_str());
  out += format("%-38s %10s %9s %9s %10s %7s  %-21s %s\n", "", "tokens/s", "ms", "GB/s", "GFLOP/s",
                "spread", "of the limit", "by operation");
  double widest = 0;
  for (const Json& line : result["lines"]) {
    widest = std::max(widest, spread(line));
    out += format("%-38s %10.1f %9.3f %9.1f %10.1f %6.0f%%  %5.1f %% %-13s %5.1f %%\n",
                  label(line).c_str(), line["tokens_per_second"].get<double>(),
                  line["seconds"].get<double>() * 1e3, line["bytes_per_second"].get<double>() / 1e9,
                  line["flops_per_second"].get<double>() / 1e9, 100 * spread(line),
                  line["percent_of_limit"].get<double>(),
                  ("(" + line["limit"].get<std::string>() + ")").c_str(),
                  line["percent_by_operation"].get<double>());
  }
  for (const Json& line : result["left_out"]) {
    out += format("%-38s left out: %s\n", label(line).c_str(),
                  line["reason"].get<std::string>().c_str());
  }
  for (const Json& line : result["lines"]) {
    if (line.contains("page_faults")) {
      out += format("\nThe first token met %llu page faults.\n",
                    static_cast<unsigned long long>(line["page_faults"].get<uint64_t>()));
    }
  }
  if (result.contains("scaling")) out += scaling_of(result["scaling"]);
  out += invariance_of(result);
  for (const Json& line : result["lines"]) {
    if (line.contains("profile")) out += profile_of(line);
  }
  if (widest > 0.2) {
    out += "\nThe machine was noisy: repeats of a line lie more than 20 % apart. Run it again.\n";
  }
  const double drift = machine["drift"];
  if (drift > 0.1) {
    out += format(
        "\nThe machine was noisy: some line met limits %.0f %% off those above. Every line stands "
        "beside the limits between its own repeats.\n",
        100 * drift);
  }
  write_out(out);
}

// A bar a line, as long as its percentage of the machine's limit.
std::string plot_of(const Json& result) {
  const Json &lines = result["lines"], &machine = result["machine"];
  const int row = 26, left = 280, width = 400, top = 82;
  const int height = top + 16 + row * static_cast<int>(lines.size());
  const auto colour_of = [](bool compute) { return compute ? "#c8793a" : "#3a7bc8"; };
  std::string svg = format(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" "
      "font-family=\"sans-serif\" font-size=\"13\">\n"
      "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n"
      "<text x=\"10\" y=\"24\" font-size=\"15\">Percent of the machine's limit</text>\n",
      left + width + 190, height);
  svg += format(
      "<text x=\"10\" y=\"46\" fill=\"#555\">%d layers, weights %s; %d threads, %s: %.1f GB/s, %s "
      "%.0f GFLOP/s</text>\n",
      result["model"]["num_hidden_layers"].get<int>(),
      human_bytes(result["model"]["weight_bytes"]).c_str(), machine["threads"].get<int>(),
      machine["kernels"].get<std::string>().c_str(),
      machine["read_bytes_per_second"].get<double>() / 1e9,
      machine["dot"].get<std::string>().c_str(),
      machine["dot_flops_per_second"].get<double>() / 1e9);
  int x = left;
  for (const bool compute : {false, true}) {
    svg += format(
        "<rect x=\"%d\" y=\"57\" width=\"12\" height=\"12\" fill=\"%s\"/>"
        "<text x=\"%d\" y=\"68\">%s</text>\n",
        x, colour_of(compute), x + 18, compute ? "multiply-adds" : "bandwidth");
    x += 110;
  }
  svg += format("<text x=\"%d\" y=\"%d\" text-anchor=\"middle\">100 %%</text>\n", left + width,
                top - 12);
  int y = top;
  for (const Json& line : lines) {
    const double percent = line["percent_of_limit"];
    const char* colour = colour_of(line["limit"] == "compute");
    svg += format("<text x=\"10\" y=\"%d\">%s</text>\n", y + 14, label(line).c_str());
    svg += format("<rect x=\"%d\" y=\"%d\" width=\"%.1f\" height=\"18\" fill=\"%s\"/>\n", left, y,
                  std::min(percent, 100.0) * width / 100, colour);
    svg += format("<text x=\"%.1f\" y=\"%d\">%.1f %%, %.1f tokens/s</text>\n",
                  left + std::min(percent, 100.0) * width / 100 + 6, y + 14, percent,
                  line["tokens_per_second"].get<double>());
    y += row;
  }
  svg += format("<line x1=\"%d\" y1=\"%d\" x2=\"%d\" y2=\"%d\" stroke=\"#888\"/>\n", left + width,
                top - 6, left + width, y);
  return svg + "</svg>\n";
}

void run(const Options& o, Main& main) {
  main.json = o.json;
  if (o.file.empty() == o.shape.empty()) {
    throw Misuse("give either a FILE or --shape tiny, v2-lite or v3");
  }
  // Minutes later would be too late to say so.
  if (!o.plot.empty() && !std::ofstream(o.plot, std::ios::binary | std::ios::app)) {
    throw Failure(o.plot + ": cannot write the plot");
  }
  Interrupt interrupt;
  const dsv3_context_options context = o.context.make();
  dsv3_benchmark_options options;
  dsv3_benchmark_options_init(&options, sizeof options);
  options.repeats = o.repeats;
  options.model_path = o.file.empty() ? nullptr : o.file.c_str();
  options.shape = o.shape.empty() ? nullptr : o.shape.c_str();
  options.layers = o.layers;
  options.ffn = WeightOptions::value(o.weights.ffn);
  options.experts = WeightOptions::value(o.weights.experts);
  options.head = WeightOptions::value(o.weights.head);
  options.only = o.only.empty() ? nullptr : o.only.c_str();
  options.quick = o.quick ? 1 : 0;
  options.profile = o.profile ? 1 : 0;
  options.scaling = o.scaling ? 1 : 0;
  options.invariance = o.invariance ? 1 : 0;
  options.context = &context;
  options.cancel = interrupt.token();
  char* text = nullptr;
  call([&](dsv3_error** e) { return dsv3_benchmark(&options, &text, e); });
  const Json result = Json::parse(take_text(text));
  if (o.json) {
    write_json(result);
  } else {
    print_human(result);
  }
  if (!o.plot.empty()) {
    std::ofstream file(o.plot, std::ios::binary | std::ios::trunc);
    file << plot_of(result);
    file.close();
    if (!file) throw Failure(o.plot + ": cannot write the plot");
  }
}

}  // namespace

void add_bench(CLI::App& app, Main& main) {
  CLI::App* command =
      app.add_subcommand("bench", "Measure decoding and prefill beside the machine's own limits");
  auto o = std::make_shared<Options>();
  command->add_option("FILE", o->file, "a .dsv3 file");
  command->add_option("--shape", o->shape, "a synthetic model instead: random weights in memory")
      ->check(CLI::IsMember({"tiny", "v2-lite", "v3"}));
  command->add_option("--layers", o->layers, "layers of the synthetic model; 0: all")
      ->check(in_range(0, 1024));
  o->weights.add_to(*command);
  command->add_option("--repeats", o->repeats, "repeats of every line, at least; the median counts")
      ->check(in_range(1, 100))
      ->capture_default_str();
  command->add_flag("--quick", o->quick, "the short lines only");
  command->add_option("--only", o->only,
                      "only lines whose name has this text, such as \"prefill 512\"");
  command->add_flag("--profile", o->profile, "show where each line's time goes, by operation");
  command->add_flag("--invariance", o->invariance,
                    "prompts without bit-identical results as well, in turns, and the ratios");
  command->add_flag("--scaling", o->scaling, "some lines on one thread as well, and the ratios");
  command->add_option("--plot", o->plot, "write the percentages as an SVG picture");
  command->add_flag("--json", o->json, "print the result as JSON");
  o->context.add_compute_to(*command);
  command->callback([o, &main] { run(*o, main); });
}

}  // namespace cli
