// Speculation on and off, in turns, over dsv3.h: tokens per second of the decoding, their ratio
// (median of the pairs), steps and acceptance. Workloads from the best to the worst case:
//
//   edit        a renamed identifier in a file, the old text as reference; a hook forces the answer
//   greedy      continuations of held-out text
//   sampled     the same at temperature 0.8
//   misled      temperature 1.2, and a reference text that has nothing to do with the answer
//   sixteen     sixteen "sampled" requests at once
//
// usage: speculation_bench FILE.dsv3 [--rounds N] [--tokens N] [--threads N] [--drafters MASK]
//        [WORKLOAD...]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "tests/api/api_support.h"

namespace dsv3::test {
namespace {

struct Options {
  std::string file;
  int rounds = 9;
  uint64_t tokens = 400;  // of each answer but the edit's
  int32_t threads = 0;
  uint32_t drafters = 0;
  std::vector<std::string> workloads;
};

struct Sum {
  double ns = 0;    // until the last request was done
  double mean = 0;  // of the requests' own times
  uint64_t tokens = 0, steps = 0, drafted = 0, accepted = 0;
  double rate() const { return static_cast<double>(tokens) * 1e9 / ns; }
  double mean_rate() const { return static_cast<double>(tokens) * 1e9 / mean; }
};

struct Forced {
  const std::vector<int32_t>* target = nullptr;
  size_t prompt = 0;
  static void hook(void* user, float* logits, uint64_t vocab, const int32_t*, uint64_t count) {
    const auto* self = static_cast<const Forced*>(user);
    const size_t at = count - self->prompt;
    if (at >= self->target->size()) return;
    std::fill(logits, logits + vocab, -INFINITY);
    logits[(*self->target)[at]] = 0;
  }
};

std::string renamed(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at)) {
    text.replace(at, from.size(), to);
    at += to.size();
  }
  return text;
}

class Bench {
 public:
  explicit Bench(const Options& options)
      : options_(options),
        model_(open_model(options.file)),
        context_(make_context(model_.get(), {.threads = options.threads})) {
    for (const char* name : {"inventory", "graphs", "logs"}) {
      texts_.push_back(read_bytes(source_path(std::string("tests/data/python/") + name + ".py")));
    }
  }

  // One run of a workload; with or without speculation.
  Sum run(const std::string& workload, bool speculate, int round) {
    Sum sum;
    const size_t requests = workload == "sixteen" ? 16 : 1;
    std::vector<SessionHandle> sessions;
    std::vector<RequestHandle> running;
    const std::string& text = texts_[static_cast<size_t>(round) % texts_.size()];
    std::vector<int32_t> prompt = tokenize(model_.get(), text), target, reference;
    prompt.resize(std::min<size_t>(prompt.size(), 200 + 50 * (static_cast<size_t>(round) % 5)));
    Forced forced;
    dsv3_request_options o = request_options();
    o.max_tokens = options_.tokens;
    o.ignore_eos = 1;
    o.max_queued_events = 4096;
    o.speculation = speculate ? DSV3_SPECULATION_AUTO : DSV3_SPECULATION_OFF;
    o.drafters = options_.drafters;
    if (workload == "edit") {
      prompt.resize(8);
      target = tokenize(model_.get(), renamed(text, "self", "the_object"));
      reference = tokenize(model_.get(), text);
      forced = {&target, prompt.size()};
      o.max_tokens = std::min<size_t>(target.size(), 1500);
      o.logits_hook = Forced::hook;
      o.logits_hook_user = &forced;
    } else if (workload == "misled") {
      o.temperature = 1.2F;
      reference = tokenize(model_.get(), texts_[static_cast<size_t>(round + 1) % texts_.size()]);
    } else if (workload != "greedy") {
      o.temperature = 0.8F;
    }
    o.reference_tokens = reference.data();
    o.reference_token_count = reference.size();
    for (size_t i = 0; i < requests; ++i) {
      sessions.push_back(make_session(context_.get()));
      append(sessions.back().get(), prompt);
      o.seed = static_cast<uint64_t>(round) * 100 + i;
      running.push_back(start(sessions.back().get(), o));
    }
    for (const RequestHandle& request : running) {
      const dsv3_request_statistics s = finish(request.get()).statistics;
      sum.ns = std::max(sum.ns, static_cast<double>(s.decode_ns));
      sum.mean += static_cast<double>(s.decode_ns) / static_cast<double>(requests);
      sum.tokens += s.generated_tokens - 1;
      sum.steps += s.decode_steps;
      sum.drafted += s.drafted_tokens;
      sum.accepted += s.accepted_tokens;
    }
    return sum;
  }

  void measure(const std::string& workload) {
    std::vector<double> ratios, means, plain, with;
    Sum all;
    run(workload, false, 0);
    run(workload, true, 0);
    for (int round = 0; round < options_.rounds; ++round) {
      // In turns, the first one by turns: whatever else the machine does hits both.
      const bool first = round % 2 == 0;
      const Sum a = run(workload, first, round), b = run(workload, !first, round);
      const Sum& on = first ? a : b;
      const Sum& off = first ? b : a;
      ratios.push_back(on.rate() / off.rate());
      means.push_back(on.mean_rate() / off.mean_rate());
      plain.push_back(off.rate());
      with.push_back(on.rate());
      all.tokens += on.tokens;
      all.steps += on.steps;
      all.drafted += on.drafted;
      all.accepted += on.accepted;
    }
    std::printf("%-9s %8.0f %8.0f %7.3f %7.3f %8.2f %9llu %9llu %6.1f %%\n", workload.c_str(),
                median(plain), median(with), median(ratios), median(means),
                static_cast<double>(all.tokens) / static_cast<double>(all.steps),
                static_cast<unsigned long long>(all.drafted),
                static_cast<unsigned long long>(all.accepted),
                all.drafted == 0
                    ? 0
                    : 100.0 * static_cast<double>(all.accepted) / static_cast<double>(all.drafted));
    std::fflush(stdout);
  }

 private:
  const Options& options_;
  ModelHandle model_;
  ContextHandle context_;
  std::vector<std::string> texts_;
};

int main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--rounds" && i + 1 < argc) {
      options.rounds = std::max(1, std::atoi(argv[++i]));
    } else if (argument == "--tokens" && i + 1 < argc) {
      options.tokens = std::strtoull(argv[++i], nullptr, 10);
    } else if (argument == "--threads" && i + 1 < argc) {
      options.threads = std::atoi(argv[++i]);
    } else if (argument == "--drafters" && i + 1 < argc) {
      options.drafters = static_cast<uint32_t>(std::atoi(argv[++i]));
    } else if (options.file.empty()) {
      options.file = argument;
    } else {
      options.workloads.push_back(argument);
    }
  }
  const std::vector<std::string> all = {"edit", "greedy", "sampled", "misled", "sixteen"};
  const bool known = std::all_of(
      options.workloads.begin(), options.workloads.end(),
      [&](const std::string& w) { return std::find(all.begin(), all.end(), w) != all.end(); });
  if (options.file.empty() || !known) {
    std::fprintf(stderr,
                 "usage: speculation_bench FILE.dsv3 [--rounds N] [--tokens N] [--threads N] "
                 "[--drafters MASK] [edit|greedy|sampled|misled|sixteen ...]\n");
    return 2;
  }
  if (options.workloads.empty()) options.workloads = all;
  Bench bench(options);
  std::printf("%-9s %8s %8s %7s %7s %8s %9s %9s %8s\n", "workload", "off t/s", "auto t/s", "ratio",
              "each", "tok/step", "drafted", "accepted", "right");
  for (const std::string& workload : options.workloads) bench.measure(workload);
  return 0;
}

}  // namespace
}  // namespace dsv3::test

int main(int argc, char** argv) { return dsv3::test::main(argc, argv); }
