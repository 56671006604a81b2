#include "runtime/engine/benchmark_plan.h"

#include <algorithm>
#include <limits>

#include "runtime/base/os.h"
#include "runtime/base/status.h"

namespace dsv3 {
namespace {

using Kind = PlannedLine::Kind;

constexpr int32_t kPrefillAfterContext = 512;  // tokens

// What is available less what is mapped of a file, which counts as that but whose loss would spoil
// the line, and less what others should keep. That much is always there for a line.
uint64_t latent_room() {
  const uint64_t spare = total_memory() / 32;
  const uint64_t available = available_memory();
  if (available == 0) return std::numeric_limits<uint64_t>::max();
  const uint64_t anonymous = resident_anonymous_bytes();
  const uint64_t taken = std::max(resident_bytes(), anonymous) - anonymous + spare;
  return std::max(spare, available > taken ? available - taken : 0);
}

}  // namespace

std::string line_label(const std::string& name, int32_t batch, int64_t context, int32_t tokens) {
  std::string label = name;
  if (name == "prefill") label += format(" %d", tokens);
  if (name == "decode") label += format(", batch %d", batch);
  if (context > 0) label += format(", context %lld", static_cast<long long>(context));
  return label;
}

const char* PlannedLine::name() const {
  return kind == Kind::kDecode ? "decode" : kind == Kind::kPrefill ? "prefill" : "first token";
}

std::string PlannedLine::label() const { return line_label(name(), batch, context, tokens); }

LeftOutLine PlannedLine::without(std::string reason) const {
  return {name(), batch, context, tokens, std::move(reason)};
}

Result<std::vector<PlannedLine>> plan_benchmark(const BenchmarkOptions& options, int64_t positions,
                                                bool scaling, std::vector<LeftOutLine>* left_out) {
  std::vector<PlannedLine> lines = {{}};
  std::string labels = lines[0].label();
  bool named = lines[0].label().find(options.only) != std::string::npos;
  // Whether it became a line.
  const auto add = [&](const PlannedLine& line, int64_t needed) {
    labels += "; " + line.label();
    if (line.label().find(options.only) == std::string::npos) return false;
    named = true;
    if (needed <= positions) {
      lines.push_back(line);
      return true;
    }
    left_out->push_back(
        line.without(format("the model has %lld positions, %lld are needed",
                            static_cast<long long>(positions), static_cast<long long>(needed))));
    return false;
  };
  const auto decode = [&](int32_t batch, int64_t context) {
    const int32_t rows = std::clamp(batch, 1, kMaxBenchmarkBatch);
    return add({Kind::kDecode, rows, context, rows, false, false}, context + 1);
  };
  // The last line so far, right after itself.
  const auto add_one_thread = [&] {
    lines.push_back(lines.back());
    lines.back().one_thread = true;
  };
  bool scale_decode = scaling;
  for (const int32_t batch : options.batches) {
    if (!decode(batch, 0) || !scale_decode) continue;
    add_one_thread();
    scale_decode = false;
  }
  for (const int64_t context : options.contexts) {
    for (const int32_t batch : options.context_batches) decode(batch, context);
  }
  for (const int32_t tokens : options.prefills) {
    add({Kind::kPrefill, 1, 0, tokens, false, options.invariance}, tokens);
  }
  if (scaling && lines.back().kind == Kind::kPrefill) {
    add_one_thread();
    lines.back().invariance = false;
  }
  if (options.invariance && options.prefill_context > 0) {
    add({Kind::kPrefill, 1, options.prefill_context, kPrefillAfterContext, false, true},
        options.prefill_context + kPrefillAfterContext);
  }
  if (!named) {
    return make_field_error(Code::kInvalidArgument, "only",
                            "only is \"%s\", expected a part of the name of a line: %s",
                            options.only.c_str(), labels.c_str());
  }
  return lines;
}

std::string no_latent_room(const PlannedLine& line, uint64_t bytes,
                           const std::optional<uint64_t>& room) {
  const uint64_t most = room ? *room : latent_room();
  if (bytes <= most) return {};
  const int64_t each = line.context + line.tokens / line.batch;
  return format("latents of %d x %lld tokens take %.2f GB, memory has room for %.2f GB", line.batch,
                static_cast<long long>(each), static_cast<double>(bytes) / 1e9,
                static_cast<double>(most) / 1e9);
}

}  // namespace dsv3
