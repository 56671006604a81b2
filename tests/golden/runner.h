// What the golden tests share: the checkpoints, converted once per program, and one sequence run
// through a model by hand (the engine's work in small).
#pragma once

#include <doctest/doctest.h>

#include <algorithm>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/cache/page_pool.h"
#include "runtime/cache/page_table.h"
#include "runtime/forward/model.h"
#include "runtime/model/convert.h"
#include "runtime/model/model.h"
#include "tests/support/emulated.h"
#include "tests/support/support.h"

namespace dsv3::test {

inline constexpr const char* kModels[] = {"v3-micro", "v2-lite-micro", "tiny-coder"};

inline std::string checkpoint_dir(const std::string& name) {
  return name == "tiny-coder" ? source_path("examples/models/tiny-coder")
                              : source_path("tests/data/models/" + name);
}

// Converted once per test program.
inline std::shared_ptr<const Model> open_model(const std::string& name,
                                               WeightsMode weights = WeightsMode::kKeep) {
  static TemporaryFolder folder;
  const std::string file =
      folder.file(name + (weights == WeightsMode::kFp8 ? "-fp8.dsv3" : ".dsv3"));
  ConvertOptions convert;
  convert.weights = weights;
  convert.overwrite = true;
  const Status converted = convert_checkpoint(checkpoint_dir(name), file, convert);
  REQUIRE_MESSAGE(converted.ok(), converted.message());
  auto model = Model::open(file, {});
  REQUIRE_MESSAGE(model.ok(), model.status().message());
  return *model;
}

inline std::unique_ptr<kernels::Device> device_of(const std::string& kernel_set, int threads = 2) {
  kernels::DeviceOptions options;
  options.kernels = kernel_set;
  options.threads = threads;
  auto device = kernels::make_device(options);
  REQUIRE_MESSAGE(device.ok(), device.status().message());
  return std::move(*device);
}

// One sequence through a model, the engine's work in small.
struct Runner {
  Runner(std::shared_ptr<const Model> m, kernels::Device* d, int32_t max_rows = 1024,
         bool expand_prompts = false)
      : device(d), config(m->config()), expand(expand_prompts) {
    auto created = ForwardModel::create(std::move(m), device, max_rows, 64, expand);
    REQUIRE_MESSAGE(created.ok(), created.status().message());
    forward = std::move(*created);
    pool = std::make_unique<PagePool>(device, forward->page_bytes(), 64);
  }

  struct Rows {
    std::vector<float> hidden, logits, mtp_logits;  // [n, ..]; mtp row i predicts token i + 2
  };

  // Runs `tokens` after position `start` of `table` in chunks and returns all rows.
  Rows run(PageTable* table, const std::vector<int32_t>& tokens, int64_t start, size_t chunk,
           bool mtp = false) {
    Rows rows;
    const auto hidden = static_cast<size_t>(config.hidden_size);
    const auto vocab = static_cast<size_t>(config.vocab_size);
    std::vector<float> previous;
    for (size_t begin = 0; begin < tokens.size(); begin += chunk) {
      const size_t count = std::min(chunk, tokens.size() - begin);
      const int64_t first = start + static_cast<int64_t>(begin);
      REQUIRE(table->make_writable(first, first + static_cast<int64_t>(count)).ok());
      kernels::SequenceRows sequence;
      sequence.rows = static_cast<int32_t>(count);
      sequence.first_position = first;
      sequence.pages = table->data();
      sequence.may_expand = expand;
      Step step;
      step.tokens = std::span(tokens).subspan(begin, count);
      step.sequences = std::span(&sequence, 1);
      REQUIRE(forward->run(step).ok());
      const size_t at = rows.hidden.size();
      rows.hidden.resize(at + count * hidden);
      forward->copy_hidden(0, static_cast<int32_t>(count), rows.hidden.data() + at);
      append_logits(count, 0, vocab, false, &rows.logits);
      if (mtp) {
        REQUIRE(forward->run_mtp(step, previous.empty() ? nullptr : previous.data()).ok());
        append_logits(count, first == 0 ? 1 : 0, vocab, true, &rows.mtp_logits);
        previous.assign(rows.hidden.end() - static_cast<std::ptrdiff_t>(hidden), rows.hidden.end());
      }
    }
    return rows;
  }

  void append_logits(size_t count, size_t from, size_t vocab, bool mtp, std::vector<float>* out) {
    for (size_t r = from; r < count; r += 64) {
      std::vector<int32_t> which;
      for (size_t i = r; i < std::min(count, r + 64); ++i) which.push_back(static_cast<int32_t>(i));
      const size_t at = out->size();
      out->resize(at + which.size() * vocab);
      const Status status =
          mtp ? forward->mtp_head(which, out->data() + at) : forward->head(which, out->data() + at);
      REQUIRE_MESSAGE(status.ok(), status.message());
    }
  }

  kernels::Device* device;
  ModelConfig config;
  bool expand;
  std::unique_ptr<ForwardModel> forward;
  std::unique_ptr<PagePool> pool;
};

inline std::map<std::string, GoldenTensor> golden_of(const std::string& name) {
  return read_golden(source_path("tests/data/golden/" + name + ".golden.safetensors"));
}

}  // namespace dsv3::test
