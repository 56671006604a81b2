// Drafters and the control of their depth: pure classes, no model.
#include <doctest/doctest.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <map>
#include <numeric>

#include "runtime/engine/draft_control.h"
#include "runtime/engine/draft_lookup.h"
#include "runtime/engine/draft_reference.h"
#include "runtime/engine/speculator.h"
#include "tests/support/support.h"

using namespace dsv3;        // NOLINT
using namespace dsv3::test;  // NOLINT

namespace {

using Tokens = std::vector<int32_t>;

// A stand-in for a tokenizer: words with the blank before them, cut into pieces of at most `piece`
// characters, and single other characters.
class Words {
 public:
  explicit Words(size_t piece = 6) : piece_(piece) {}
  Tokens operator()(const std::string& text) {
    Tokens out;
    const auto word = [](char c) { return std::isalnum(static_cast<uint8_t>(c)) != 0 || c == '_'; };
    for (size_t i = 0; i < text.size();) {
      size_t end = i + 1;
      if (word(text[i]) || (text[i] == ' ' && end < text.size() && word(text[end]))) {
        while (end < text.size() && end - i < piece_ && word(text[end])) ++end;
      } else if (text[i] == ' ') {
        while (end < text.size() && text[end] == ' ') ++end;
      }
      const auto known = ids_.emplace(text.substr(i, end - i), static_cast<int32_t>(ids_.size()));
      out.push_back(known.first->second);
      i = end;
    }
    return out;
  }

 private:
  size_t piece_;
  std::map<std::string, int32_t> ids_;
};

int32_t right_tokens(const Draft& draft, const Tokens& target, size_t from) {
  int32_t right = 0;
  for (const int32_t t : draft.tokens) {
    const size_t at = from + static_cast<size_t>(right);
    if (at >= target.size() || target[at] != t) break;
    ++right;
  }
  return right;
}

// Steps to write `target` when every step verifies a draft along `reference`.
size_t steps_with_reference(const Tokens& reference, const Tokens& target, int32_t most = 48) {
  ReferenceText drafter(reference);
  Draft draft;
  size_t done = 0, steps = 0;
  while (done < target.size()) {
    drafter.propose(std::span(target).first(done), most, &draft);
    done += static_cast<size_t>(right_tokens(draft, target, done)) + 1;
    ++steps;
  }
  return steps;
}

std::string replace_all(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at)) {
    text.replace(at, from.size(), to);
    at += to.size();
  }
  return text;
}

std::string sample() { return read_bytes(source_path("tests/data/python/inventory.py")); }

Tokens random_tokens(size_t count, uint32_t seed, int32_t vocab) {
  Tokens out(count);
  for (int32_t& t : out) {
    seed = seed * 1664525 + 1013904223;
    t = static_cast<int32_t>((seed >> 8) % static_cast<uint32_t>(vocab));
  }
  return out;
}

}  // namespace

TEST_CASE("lookup: the longest match wins, of equals the most recent") {
  PromptLookup lookup(100);
  Draft draft;
  //                     0  1  2  3  4  5  6  7  8  9 10 11 12 13 14 15 16
  const Tokens tokens = {1, 2, 3, 4, 5, 9, 2, 3, 4, 6, 9, 8, 3, 4, 7, 3, 4};
  lookup.propose(tokens, 2, &draft);
  CHECK(draft.tokens == Tokens{7, 3});  // after 3 4 at 12
  CHECK(draft.source == DraftSource::kLookup);
  CHECK(draft.confidence == 2);
  const Tokens longer = {1, 2, 3, 4, 5, 9, 2, 3, 4, 6, 9, 8, 3, 4, 7, 3, 4, 1, 2, 3, 4};
  lookup.propose(longer, 3, &draft);
  CHECK(draft.confidence == 4);
  CHECK(draft.tokens == Tokens{5, 9, 2});
}

TEST_CASE("lookup: nothing where nothing matches; a period goes on") {
  PromptLookup lookup(100);
  Draft draft;
  lookup.propose(Tokens{1}, 8, &draft);
  CHECK(draft.tokens.empty());
  lookup.propose(Tokens{1, 2, 3, 4}, 8, &draft);
  CHECK(draft.tokens.empty());
  CHECK(draft.source == DraftSource::kNone);
  lookup.propose(Tokens{1, 2, 3, 4, 1, 2, 3, 4}, 6, &draft);
  CHECK(draft.tokens == Tokens{1, 2, 3, 4, 1, 2});
}

TEST_CASE("lookup: what it finds is there, whatever the text and however it grew") {
  for (const uint32_t seed : {1U, 2U, 3U}) {
    const Tokens tokens = random_tokens(3000, seed, 6);
    PromptLookup lookup(3000);
    Draft draft;
    for (size_t length = 10; length < tokens.size(); length += 1 + length % 7) {
      const std::span<const int32_t> text(tokens.data(), length);
      lookup.propose(text, 4, &draft);
      if (draft.tokens.empty()) continue;
      const auto n = static_cast<size_t>(draft.confidence);
      REQUIRE(n >= 2);
      REQUIRE(n <= 32);
      // The last n tokens stand somewhere before the draft's first token.
      Tokens pattern(text.end() - static_cast<std::ptrdiff_t>(n), text.end());
      pattern.push_back(draft.tokens[0]);
      REQUIRE(std::search(text.begin(), text.end(), pattern.begin(), pattern.end()) != text.end());
    }
  }
}

TEST_CASE("lookup: a text longer than the window is no harm") {
  constexpr size_t kLength = PromptLookup::kMaxWindow * 2 + 77;
  Tokens tokens(kLength);
  std::iota(tokens.begin(), tokens.end(), 0);
  for (size_t i = kLength - 4; i < kLength; ++i) tokens[i] -= 100;
  PromptLookup lookup(static_cast<int64_t>(kLength));
  Draft draft;
  lookup.propose(tokens, 3, &draft);
  const int32_t last = tokens.back();
  CHECK(draft.tokens == Tokens{last + 1, last + 2, last + 3});
  // What left the window is forgotten.
  for (int32_t i = 0; i < 4; ++i) tokens.push_back(50 + i);
  lookup.propose(tokens, 3, &draft);
  CHECK(draft.tokens.empty());
}

TEST_CASE("reference: an unchanged text is copied in long drafts") {
  Words words;
  const Tokens text = words(sample());
  REQUIRE(text.size() > 900);
  CHECK(steps_with_reference(text, text, 48) <= text.size() / 49 + 1);
}

TEST_CASE("reference: insertion, deletion and replacement cost a few steps each") {
  const Tokens text = random_tokens(600, 5, 200);
  const size_t plain = steps_with_reference(text, text);
  Tokens inserted = text, deleted = text, replaced = text, moved = text;
  const Tokens fresh = {1001, 1002, 1003, 1004, 1005};
  inserted.insert(inserted.begin() + 300, fresh.begin(), fresh.end());
  CHECK(steps_with_reference(text, inserted) <= plain + fresh.size() + 2);
  deleted.erase(deleted.begin() + 300, deleted.begin() + 340);
  CHECK(steps_with_reference(text, deleted) <= plain + 3);
  replaced[300] = 1001;
  CHECK(steps_with_reference(text, replaced) <= plain + 2);
  // The last third comes first: found far away.
  std::rotate(moved.begin(), moved.begin() + 400, moved.end());
  CHECK(steps_with_reference(text, moved) <= plain + 10);
}

TEST_CASE("reference: a renamed identifier is expected after the first time") {
  Words words(100);
  Words pieces(5);
  for (Words* w : {&words, &pieces}) {
    const std::string old = sample();
    REQUIRE(old.find("quantity") != std::string::npos);
    const std::string renamed = replace_all(old, "quantity", "number_of_pieces");
    const Tokens from = (*w)(old), to = (*w)(renamed);
    const size_t steps = steps_with_reference(from, to);
    CAPTURE(steps);
    CAPTURE(to.size());
    CHECK(steps * 10 <= to.size());
  }
}

TEST_CASE("reference: an answer that begins with something else is found all the same") {
  Words words;
  const std::string old = sample();
  const Tokens from = words(old);
  const Tokens to = words("Sure, here is the whole file after the change:\n\n```python\n" + old);
  CHECK(steps_with_reference(from, to) <= from.size() / 49 + 30);
}

TEST_CASE("reference: any place of a long one is found again") {
  const Tokens reference = random_tokens(100'000, 3, 3000);
  for (const std::ptrdiff_t at : {0, 20'000, 50'000, 99'000}) {
    CAPTURE(at);
    // Something else first, so that the place is not found for being the beginning.
    Tokens answer = random_tokens(5, 8, 3000);
    answer.insert(answer.end(), reference.begin() + at, reference.begin() + at + 500);
    // Five tokens must agree before a place so far away is believed.
    CHECK(steps_with_reference(reference, answer) <= 5 + 5 + 500 / 49 + 1);
  }
}

TEST_CASE("reference: cut into other tokens at the seam") {
  Words words(6), other(6);
  const std::string old = sample();
  // The reference begins in the middle of a word of the answer's.
  const Tokens to = words(old);
  const Tokens from = words(old.substr(2));
  CHECK(steps_with_reference(from, to) <= to.size() / 49 + 8);
}

TEST_CASE("reference: any answer is safe") {
  for (uint32_t seed = 1; seed < 200; ++seed) {
    const Tokens reference = random_tokens(seed * 3 % 91, seed, 4 + static_cast<int32_t>(seed % 9));
    const Tokens answer = random_tokens(150, seed + 1000, 4 + static_cast<int32_t>(seed % 9));
    ReferenceText drafter(reference);
    Draft draft;
    for (size_t i = 0; i < answer.size(); i += 1 + seed % 3) {
      const auto most = static_cast<int32_t>(i % 17);
      drafter.propose(std::span(answer).first(i), most, &draft);
      REQUIRE(draft.tokens.size() <= static_cast<size_t>(most));
    }
  }
}

TEST_CASE("costs: measured where measured, between in a line, beyond with caution") {
  StepCosts costs;
  CHECK(costs.of(1) == 0);
  costs.record(1, 1000);
  CHECK(costs.of(1) == doctest::Approx(1000));
  CHECK(costs.of(3) == doctest::Approx(2000));  // kUnknownRow
  costs.record(5, 2000);
  CHECK(costs.of(3) == doctest::Approx(1500).epsilon(0.01));
  for (int i = 0; i < 200; ++i) costs.record(1, 1200);
  CHECK(costs.of(1) == doctest::Approx(1200).epsilon(0.01));
  CHECK(costs.of(5) > 2040);   // the machine became slower: wider steps too
  costs.record(1, 1'000'000);  // an outlier counts as twice the mean
  CHECK(costs.of(1) < 1300);
  for (int i = 0; i < 20; ++i) costs.record(1, 1000);
  CHECK(costs.of(1) == doctest::Approx(1000).epsilon(0.01));
  int64_t last = 0;
  for (int64_t rows = 1; rows < 2000; rows += 3) {
    costs.record(rows, 1000 + rows * 10);
    last = rows;
  }
  CHECK(costs.of(last) > costs.of(1));
}

TEST_CASE("costs: wide steps do not become dearer while only narrow ones are measured") {
  StepCosts costs;
  uint32_t seed = 3;
  // Most steps take their time, some are interrupted.
  const auto noise = [&] {
    seed = seed * 1664525 + 1013904223;
    const uint32_t kind = seed >> 24;
    return kind < 25 ? 3.0 : kind < 100 ? 1.2 : 1.0;
  };
  for (int i = 0; i < 50; ++i) {
    costs.record(1, static_cast<int64_t>(1000 * noise()));
    costs.record(16, static_cast<int64_t>(4000 * noise()));
  }
  const double before = costs.of(16) / costs.of(1);
  CHECK(before > 3);
  CHECK(before < 5);
  for (int i = 0; i < 20000; ++i) {
    costs.record(1, static_cast<int64_t>(1000 * noise()));
    const double ratio = costs.of(16) / costs.of(1);
    REQUIRE(ratio < before * 1.3);
    REQUIRE(ratio > before / 1.3);
  }
}

TEST_CASE("costs: what two widths cost beside each other is measured, whatever was before") {
  for (const int64_t before : {400'000, 100'000, 25'000}) {
    CAPTURE(before);
    StepCosts costs;
    for (int i = 0; i < 60; ++i) costs.record(1, before);
    for (int i = 0; i < 200; ++i) {
      costs.record(2, 150'000);
      costs.record(1, 100'000);
    }
    CHECK(costs.of(1) == doctest::Approx(100'000).epsilon(0.05));
    CHECK(costs.of(2) == doctest::Approx(150'000).epsilon(0.05));
  }
}

TEST_CASE("costs: a slow wide step is not believed for ever") {
  StepCosts costs;
  for (int i = 0; i < 100; ++i) costs.record(1, 1000);
  for (int i = 0; i < 8; ++i) costs.record(33, 90'000);
  CHECK(costs.of(33) > 50'000);
  for (int i = 0; i < 2000; ++i) costs.record(1, 1000);
  CHECK(costs.of(33) < 20'000);  // as little as if it had never been measured
  // What speaks for it stays.
  for (int i = 0; i < 8; ++i) costs.record(33, 3000);
  for (int i = 0; i < 2000; ++i) costs.record(1, 1000);
  CHECK(costs.of(33) < 3500);
}

namespace {

// A request of many steps with drafts that are right with some chance, on a machine where a step of
// n rows takes 1000 + slope * (n - 1), one of `tasks` like it. Where the machine is unsteady, steps
// take up to a quarter longer, and after some hundred of them the machine becomes slower, or faster
// again. Returns time with speculation over time without.
double relative_time(double chance, double slope, DraftSource source, double draft_ns = 0,
                     int steps = 4000, int64_t tasks = 1, bool unsteady = false,
                     uint32_t seed = 7) {
  DraftExperience shared;
  std::vector<DraftControl> controls(static_cast<size_t>(tasks));
  std::vector<int32_t> lengths(controls.size());
  const auto uniform = [&] {
    seed = seed * 1664525 + 1013904223;
    return static_cast<double>(seed >> 8) / (1 << 24);
  };
  double state = 1, noise = 1;
  const auto time = [&](int64_t rows) {
    return (1000 + slope * static_cast<double>(rows - 1)) * state * noise;
  };
  double spent = 0, alone = 0;
  for (int i = 0; i < steps; ++i) {
    if (unsteady) {
      if (uniform() < 0.005) state = state > 1 ? 1 : 1.6;
      noise = 1 + 0.25 * uniform() * uniform();
    }
    int64_t rows = tasks;
    for (size_t t = 0; t < controls.size(); ++t) {
      lengths[t] = controls[t].plan(&shared, source, 5, 16, tasks - 1, draft_ns).length;
      rows += lengths[t];
      spent += lengths[t] > 0 ? draft_ns : 0;
    }
    spent += time(rows);
    for (size_t t = 0; t < controls.size(); ++t) {
      int32_t right = 0;
      while (right < 16 && uniform() < chance) ++right;
      const int32_t accepted = std::min(right, lengths[t]);
      controls[t].record_step(&shared, lengths[t], accepted + 1, tasks - 1,
                              lengths[t] > 0 ? draft_ns : 0);
      if (lengths[t] > 0) {
        controls[t].record_draft(&shared, source, 5, accepted, accepted < lengths[t]);
      } else if (draft_ns == 0) {
        controls[t].record_draft(&shared, source, 5, right > 0 ? 1 : 0, right == 0);
      }
      alone += (1 + accepted) * time(tasks) / static_cast<double>(tasks);
    }
    shared.end_step(tasks, rows, static_cast<int64_t>(time(rows)));
  }
  return spent / alone;
}

}  // namespace

TEST_CASE("control: drafts that fail cost at most three hundredths") {
  for (const double chance : {0.0, 0.1, 0.3, 0.5}) {
    for (const double slope : {50.0, 300.0, 500.0, 1000.0}) {
      for (const DraftSource source :
           {DraftSource::kLookup, DraftSource::kReference, DraftSource::kMtp}) {
        CAPTURE(chance);
        CAPTURE(slope);
        CAPTURE(static_cast<int>(source));
        CHECK(relative_time(chance, slope, source) < 1.03);
        CHECK(relative_time(chance, slope, source, 200) < 1.03);
        CHECK(relative_time(chance, slope, source, 0, 300) < 1.03);
        CHECK(relative_time(chance, slope, source, 0, 2000, 16) < 1.03);
      }
    }
  }
}

TEST_CASE("control: requests that share the steps of an unsteady machine lose next to nothing") {
  for (const double slope : {50.0, 100.0, 300.0, 900.0}) {
    for (const double chance : {0.2, 0.4, 0.8}) {
      CAPTURE(slope);
      CAPTURE(chance);
      constexpr uint32_t kRuns = 20;
      double mean = 0;
      for (uint32_t seed = 1; seed <= kRuns; ++seed) {
        const double relative = relative_time(chance, slope, DraftSource::kLookup, 0, 1500, 16,
                                              /*unsteady=*/true, seed);
        CHECK(relative < 1.06);
        mean += relative / kRuns;
      }
      CHECK(mean < 1.01);
    }
  }
}

TEST_CASE("control: a further row that looks free is not believed to be") {
  DraftExperience shared;
  for (int i = 0; i < 30; ++i) {
    shared.costs.record(4, 40'000);
    shared.costs.record(16, 160'000);
    shared.costs.record(17, 160'000);  // by chance
  }
  CHECK(shared.costs.least_row(16) == doctest::Approx(5000).epsilon(0.05));
  CHECK(shared.costs.least_row(4) == 0);  // nothing narrower is known
  shared.began = true;
  shared.credit_ns = 1e6;
  const DraftControl control;
  // Right as often as not: worth 5,000 of the step's 160,000.
  for (int i = 0; i < 200; ++i) {
    shared.rates.record(DraftSource::kLookup, 1, i % 2, /*wrong=*/i % 2 == 0);
  }
  CHECK(control.plan(&shared, DraftSource::kLookup, 1, 1, 15, 0).length == 0);
  for (int i = 0; i < 200; ++i) shared.rates.record(DraftSource::kLookup, 1, 1, /*wrong=*/false);
  CHECK(control.plan(&shared, DraftSource::kLookup, 1, 1, 15, 0).length == 1);
}

TEST_CASE("control: where drafts bring little, what a plain step takes is measured now and then") {
  DraftExperience shared;
  for (int i = 0; i < 30; ++i) {
    shared.costs.record(1, 100'000);
    shared.costs.record(2, 150'000);
  }
  shared.began = true;
  shared.credit_ns = 1e6;
  for (int i = 0; i < 200; ++i)
    shared.rates.record(DraftSource::kLookup, 1, i % 4 != 0, i % 4 == 0);
  const DraftControl control;
  int plain = 0;
  for (int step = 0; step < 250; ++step) {
    const int32_t length = control.plan(&shared, DraftSource::kLookup, 1, 1, 0, 0).length;
    plain += length == 0 ? 1 : 0;
    shared.committed = {1, length, length, 0};
    shared.end_step(1, 1 + length, 100'000 + 50'000 * length);
  }
  CHECK(plain >= 9);
  CHECK(plain <= 11);
}

TEST_CASE("control: drafts that are right are verified at length") {
  CHECK(relative_time(0.95, 50, DraftSource::kReference) < 0.2);
  CHECK(relative_time(0.95, 400, DraftSource::kReference) < 0.62);
  CHECK(relative_time(0.8, 100, DraftSource::kLookup) < 0.5);
  CHECK(relative_time(0.8, 50, DraftSource::kMtp, 100) < 0.5);
}

TEST_CASE("rates: a few long runs do not make first tokens look better than they are") {
  DraftRates rates;
  for (int i = 0; i < 200; ++i) {
    rates.record(DraftSource::kLookup, 5, i % 2 == 0 ? 16 : 0, /*wrong=*/true);
  }
  const DraftRates::Chances chances = rates.chances(DraftSource::kLookup, 5);
  CHECK(chances.first == doctest::Approx(0.5).epsilon(0.1));
  CHECK(chances.next > 0.9);
}

TEST_CASE("control: a step is paid for with what it took, not with what it was thought to cost") {
  DraftExperience shared;
  DraftControl control;
  for (int i = 0; i < 30; ++i) shared.costs.record(16, 100'000);
  for (int i = 0; i < 30; ++i) shared.costs.record(18, 105'000);
  control.record_step(&shared, 0, 1, 15, 0);
  shared.end_step(16, 16, 100'000);
  const double before = shared.credit_ns;
  control.record_step(&shared, 2, 2, 15, 0);
  shared.end_step(16, 18, 150'000);
  CHECK(shared.credit_ns < before - 40'000);
  CHECK(shared.credit_ns > before - 50'000);
}

TEST_CASE("control: requests that share a step do not all try in the same one") {
  DraftExperience shared;
  std::vector<DraftControl> controls(16);
  int tries = 0;
  for (int step = 0; step < 2000; ++step) {
    int now = 0;
    int64_t rows = 16;
    std::array<int32_t, 16> lengths;
    for (size_t i = 0; i < controls.size(); ++i) {
      lengths[i] = controls[i].plan(&shared, DraftSource::kLookup, 1, 16, 15, 0).length;
      rows += lengths[i];
      now += lengths[i] > 0 ? 1 : 0;
    }
    REQUIRE(now <= 1);
    tries += now;
    for (size_t i = 0; i < controls.size(); ++i) {
      controls[i].record_step(&shared, lengths[i], 1, 15, 0);
    }
    shared.end_step(16, rows, 100'000 + 8000 * (rows - 16));
  }
  CHECK(tries > 3);
  CHECK(tries < 40);
}

TEST_CASE("control: nothing is drafted before a plain step was measured") {
  const DraftControl control;
  DraftExperience nothing;
  CHECK(control.plan(&nothing, DraftSource::kReference, 20, 16, 0, 0).length == 0);
}

namespace {

// Steps of one request with no repetition in its answer, on a machine where a step of n rows takes
// 1000 + slope * (n - 1) and a guess of the MTP module `mtp_ns`; guesses are right with a chance of
// 0.7. Returns the share of steps with an MTP draft.
double share_with_mtp(bool named, double slope, double mtp_ns) {
  SpeculationOptions options;
  options.require_mtp = named;
  DraftExperience shared;
  Speculator speculator(options, 4000, /*has_mtp=*/true);
  Tokens tokens = {0};
  speculator.begin(1);
  uint32_t seed = 11;
  int steps = 0, with = 0;
  while (tokens.size() < 4000) {
    const auto time = [&](size_t rows) { return 1000 + slope * (static_cast<double>(rows) - 1); };
    const Tokens draft(speculator.draft().begin(), speculator.draft().end());
    size_t right = 0;
    while (right < draft.size() && draft[right] == static_cast<int32_t>(tokens.size())) {
      tokens.push_back(draft[right++]);
    }
    tokens.push_back(static_cast<int32_t>(tokens.size()));
    speculator.learn(&shared, tokens, static_cast<int32_t>(right + 1),
                     static_cast<int32_t>(draft.size()), 0);
    shared.end_step(1, static_cast<int64_t>(draft.size() + 1),
                    static_cast<int64_t>(time(draft.size() + 1)));
    speculator.propose(&shared, tokens, 0, 1000);
    ++steps;
    const int32_t depth = speculator.mtp_depth();
    if (depth == 0) continue;
    ++with;
    MtpGuesses guesses;
    for (guesses.count = 0; guesses.count < depth; ++guesses.count) {
      seed = seed * 1664525 + 1013904223;
      const bool good = seed >> 8 < (7u << 24) / 10;
      const auto next = static_cast<int32_t>(tokens.size()) + guesses.count;
      guesses.guesses[static_cast<size_t>(guesses.count)] = {good ? next : -1, 0.8F};
    }
    shared.mtp_ns[static_cast<size_t>(depth - 1)] = mtp_ns * depth;
    speculator.mtp_drafted(shared, guesses, mtp_ns * depth, 0);
  }
  return static_cast<double>(with) / steps;
}

}  // namespace

TEST_CASE("MTP drafts unasked where they pay clearly, and nearly nowhere else") {
  CHECK(share_with_mtp(/*named=*/false, 150, 40) > 0.8);   // a large model
  CHECK(share_with_mtp(/*named=*/false, 400, 300) < 0.1);  // a small one: a gain of nothing
  CHECK(share_with_mtp(/*named=*/false, 900, 300) < 0.05);
  CHECK(share_with_mtp(/*named=*/true, 300, 250) > 0.5);  // a gain of a tenth
}
