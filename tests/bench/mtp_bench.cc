// How often the MTP module's drafts are right: continuations of held-out text, one token per step,
// and beside every step the drafts of depth 1 to 3 that would have been made there. By where the
// hidden state is taken from (before or after its norm) and by how much of the prompt the module
// has seen.
//
// usage: mtp_bench CHECKPOINT_DIR TEXT_FILES...
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/cache/page_pool.h"
#include "runtime/cache/page_table.h"
#include "runtime/engine/sampler.h"
#include "runtime/forward/model.h"
#include "runtime/model/convert.h"
#include "runtime/model/model.h"
#include "tests/support/support.h"

namespace dsv3 {
namespace {

constexpr int64_t kDepth = 3;
constexpr int64_t kGenerated = 96;  // tokens after each prompt
constexpr int64_t kStride = 150;    // tokens between the ends of two prompts of one text
constexpr int64_t kChunk = 2048;

struct Setting {
  bool before_norm = false;
  int64_t seen = 0;  // tokens of the prompt that the module sees
  float temperature = 0;
};

struct Tally {
  int64_t positions = 0;
  int64_t right[kDepth] = {};  // the first n + 1 drafts were right
};

void check(const Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.message().c_str());
  std::exit(1);
}

class Bench {
 public:
  explicit Bench(std::shared_ptr<const Model> model)
      : model_(std::move(model)), logits_(static_cast<size_t>(model_->config().vocab_size)) {
    auto device = kernels::make_device({});
    check(device.status());
    device_ = std::move(*device);
    sampler_.emplace(device_.get(), model_->config().vocab_size);
    auto forward = ForwardModel::create(model_, device_.get(), kChunk, 16);
    check(forward.status());
    forward_ = std::move(*forward);
    pool_ = std::make_unique<PagePool>(device_.get(), forward_->page_bytes(), 64);
  }

  // Continues tokens[0, prompt).
  void run(std::vector<int32_t> tokens, int64_t prompt, const Setting& setting, Tally* tally);

 private:
  // Runs the main model over tokens [begin, tokens.size()) and samples the next one.
  void step(int64_t begin, const Setting& setting, std::vector<int32_t>* tokens);
  // The module's rows at slots [begin, begin + count); hidden states of rows [from, from + count).
  void mtp(const int32_t* tokens, int64_t begin, int64_t count, int32_t from, bool chained,
           const Setting& setting, int64_t first_key);

  const std::shared_ptr<const Model> model_;
  std::unique_ptr<kernels::Device> device_;
  std::optional<Sampler> sampler_;
  std::unique_ptr<ForwardModel> forward_;
  std::unique_ptr<PagePool> pool_;
  std::unique_ptr<PageTable> table_;
  std::vector<float> logits_;
};

void Bench::step(int64_t begin, const Setting& setting, std::vector<int32_t>* tokens) {
  const auto end = static_cast<int64_t>(tokens->size());
  check(table_->make_writable(begin, end + kDepth));
  const kernels::SequenceRows rows = {0, static_cast<int32_t>(end - begin), begin, table_->data()};
  Step main;
  main.tokens = std::span(*tokens).subspan(static_cast<size_t>(begin));
  main.sequences = std::span(&rows, 1);
  check(forward_->run(main));
  const int32_t last[] = {static_cast<int32_t>(end - begin - 1)};
  check(forward_->compute_head(last));
  forward_->copy_logits(0, logits_.data());
  SamplingOptions sampling;
  sampling.temperature = setting.temperature;
  SampledToken sampled;
  check(sampler_->sample(sampling, *tokens, logits_, forward_->logits_row(0), {}, &sampled));
  tokens->push_back(sampled.id);
}

void Bench::mtp(const int32_t* tokens, int64_t begin, int64_t count, int32_t from, bool chained,
                const Setting& setting, int64_t first_key) {
  const kernels::SequenceRows rows = {0, static_cast<int32_t>(count), begin, table_->data()};
  std::vector<int32_t> hidden(static_cast<size_t>(count));
  for (size_t i = 0; i < hidden.size(); ++i) hidden[i] = from + static_cast<int32_t>(i);
  MtpStep module;
  module.tokens = std::span(tokens, static_cast<size_t>(count));
  module.sequences = std::span(&rows, 1);
  module.hidden_rows = hidden;
  module.chained = chained;
  module.before_norm = setting.before_norm;
  module.first_keys = std::span(&first_key, 1);
  check(forward_->run_mtp(module));
}

void Bench::run(std::vector<int32_t> tokens, int64_t prompt, const Setting& setting, Tally* tally) {
  table_ = std::make_unique<PageTable>(pool_.get());
  tokens.resize(static_cast<size_t>(prompt));
  std::vector<std::vector<int32_t>> drafts;  // by step: of the tokens after the one it sampled
  for (int64_t i = 0; i < kGenerated; ++i) {
    const int64_t begin = i == 0 ? 0 : prompt + i - 1;
    step(begin, setting, &tokens);
    const auto slot = static_cast<int64_t>(tokens.size()) - 1;  // of the token just sampled
    const int64_t window = std::max<int64_t>(1, prompt - setting.seen);  // its first slot
    const int64_t first = std::max(begin + 1, window);
    mtp(tokens.data() + first, first, slot - first + 1, static_cast<int32_t>(first - 1 - begin),
        false, setting, window);
    std::vector<int32_t> draft;
    auto row = static_cast<int32_t>(slot - first);
    for (int64_t d = 0; d < kDepth; ++d) {
      ForwardModel::Guess guess;
      check(forward_->mtp_guess(std::span(&row, 1), &guess));
      draft.push_back(guess.token);
      if (d + 1 == kDepth) break;
      mtp(&draft.back(), slot + 1 + d, 1, row, true, setting, window);
      row = 0;
    }
    drafts.push_back(std::move(draft));
  }
  for (size_t i = 0; i + kDepth < drafts.size(); ++i) {
    ++tally->positions;
    for (size_t d = 0; d < kDepth; ++d) {
      if (drafts[i][d] != tokens[static_cast<size_t>(prompt) + i + 1 + d]) break;
      ++tally->right[d];
    }
  }
}

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr, "usage: mtp_bench CHECKPOINT_DIR TEXT_FILES...\n");
    return 2;
  }
  const test::TemporaryFolder folder;
  check(convert_checkpoint(argv[1], folder.file("model.dsv3"), {}));
  auto opened = Model::open(folder.file("model.dsv3"), {});
  check(opened.status());
  const std::shared_ptr<const Model> model = *opened;
  Bench bench(model);
  std::printf("%-10s %-10s %-5s %9s %8s %8s %8s\n", "hidden", "seen", "T", "positions", "depth 1",
              "depth 2", "depth 3");
  for (const float temperature : {0.0F, 0.8F}) {
    for (const bool before : {false, true}) {
      for (const int64_t seen : {kChunk, int64_t{256}, int64_t{64}, int64_t{16}, int64_t{0}}) {
        Tally tally;
        for (int i = 2; i < argc; ++i) {
          std::vector<int32_t> tokens;
          if (model->tokenizer().bos_id()) tokens.push_back(*model->tokenizer().bos_id());
          check(model->tokenizer().encode(test::read_bytes(argv[i]), {}, &tokens));
          const auto length = std::min<int64_t>(static_cast<int64_t>(tokens.size()), kChunk - 200);
          for (int64_t prompt = kStride; prompt < length; prompt += kStride) {
            bench.run(tokens, prompt, {before, seen, temperature}, &tally);
          }
        }
        std::printf("%-10s %-10lld %-5.1f %9lld", before ? "before" : "after",
                    static_cast<long long>(seen), static_cast<double>(temperature),
                    static_cast<long long>(tally.positions));
        for (const int64_t right : tally.right) {
          std::printf(" %6.1f %%",
                      100.0 * static_cast<double>(right) / static_cast<double>(tally.positions));
        }
        std::printf("\n");
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace dsv3

int main(int argc, char** argv) { return dsv3::main(argc, argv); }
