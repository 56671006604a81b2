// Which lines a benchmark measures, in their order, and which of those asked for have no place in
// this model or this machine.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "runtime/engine/benchmark.h"

namespace dsv3 {

inline constexpr int32_t kMaxBenchmarkBatch = 64;

struct PlannedLine {
  enum class Kind : uint8_t { kFirstToken, kDecode, kPrefill };
  Kind kind = Kind::kFirstToken;
  int32_t batch = 1;
  int64_t context = 0;
  int32_t tokens = 1;  // of one repeat
  bool one_thread = false;
  bool invariance = false;  // of a prompt: in turns with expanded keys and values
  const char* name() const;
  std::string label() const;
  // Left out, because.
  LeftOutLine without(std::string reason) const;
};

// `scaling`: the first decode and the last prefill line on one thread as well, right after. What
// needs more positions than the model has goes to *left_out. Of the lines, those that
// `options.only` names, and the first token; an error where it names none.
Result<std::vector<PlannedLine>> plan_benchmark(const BenchmarkOptions& options, int64_t positions,
                                                bool scaling, std::vector<LeftOutLine>* left_out);

// Why latents of `bytes` bytes find no place; empty: they do.
std::string no_latent_room(const PlannedLine& line, uint64_t bytes,
                           const std::optional<uint64_t>& room);

}  // namespace dsv3
