// Speculation through dsv3.h: whatever is drafted, what comes out is what decoding one by one
// gives, bit for bit; and drafts that are right save steps.
#include <doctest/doctest.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <thread>
#include <utility>

#include "tests/api/api_support.h"
#include "tests/api/outcome_support.h"

using namespace dsv3::test;  // NOLINT

namespace {

struct Fixture {
  ModelHandle model = open_model();
  ContextHandle context = make_context(model.get());
};
Fixture& shared() {
  static Fixture fixture;
  return fixture;
}

void check_same_end(const Outcome& a, const Outcome& b) {
  check_same(a, b);
  CHECK(a.reason == b.reason);
  CHECK(a.stop_token == b.stop_token);
  CHECK(a.stop_string == b.stop_string);
  REQUIRE(a.top.size() == b.top.size());
  for (size_t i = 0; i < a.top.size(); ++i) {
    REQUIRE(a.top[i].size() == b.top[i].size());
    for (size_t j = 0; j < a.top[i].size(); ++j) {
      CHECK(a.top[i][j].id == b.top[i][j].id);
      CHECK(a.top[i][j].logprob == b.top[i][j].logprob);
    }
  }
}

std::vector<int32_t> prompt_tokens(size_t count) {
  std::vector<int32_t> tokens = tokenize(shared().model.get(), python_text());
  REQUIRE(tokens.size() >= count);
  tokens.resize(count);
  return tokens;
}

Outcome run(dsv3_context* context, const std::vector<int32_t>& prompt,
            const dsv3_request_options& options) {
  const SessionHandle session = make_session(context);
  append(session.get(), prompt);
  const Outcome outcome = generate(session.get(), options);
  // Nothing of a rejected draft is left in the session.
  std::vector<int32_t> expected = prompt;
  expected.insert(expected.end(), outcome.tokens.begin(), outcome.tokens.end());
  CHECK(tokens_of(session.get()) == expected);
  CHECK(dsv3_session_computed(session.get()) <= expected.size());
  return outcome;
}

// A hook that lets nothing but the tokens of a list come, one after another.
struct Forced {
  std::vector<int32_t> target;
  size_t prompt = 0;
  size_t calls = 0;
  bool in_order = true;
  static void hook(void* user, float* logits, uint64_t vocab, const int32_t* tokens,
                   uint64_t count) {
    auto* self = static_cast<Forced*>(user);
    const size_t at = count - self->prompt;
    self->in_order = self->in_order && at == self->calls++ &&
                     std::equal(tokens + self->prompt, tokens + count, self->target.begin());
    if (at >= self->target.size()) return;
    std::fill(logits, logits + vocab, -INFINITY);
    logits[self->target[at]] = 0;
  }
};

struct Drafters {
  const char* name;
  int32_t mode;
  uint32_t drafters;
};
constexpr Drafters kDrafters[] = {
    {"lookup", DSV3_SPECULATION_ALWAYS, DSV3_DRAFT_LOOKUP},
    {"reference", DSV3_SPECULATION_ALWAYS, DSV3_DRAFT_REFERENCE},
    {"mtp", DSV3_SPECULATION_ALWAYS, DSV3_DRAFT_MTP},
    {"all", DSV3_SPECULATION_ALWAYS, 7},
    {"auto", DSV3_SPECULATION_AUTO, 0},
    {"auto, all", DSV3_SPECULATION_AUTO, 7},
};

// Requests that differ in everything that looks at tokens; the last one's name.
std::map<std::string, dsv3_request_options> variants() {
  static const dsv3_logit_bias bias[] = {{300, 2.5F}, {17, -INFINITY}, {42, -1}};
  static const char* const stops[] = {"self.", "return x"};
  std::map<std::string, dsv3_request_options> out;
  dsv3_request_options o = request_options();
  o.speculation = DSV3_SPECULATION_OFF;
  o.max_tokens = 160;
  o.ignore_eos = 1;
  out["greedy"] = o;
  o.logprobs = 4;
  out["greedy, log-probabilities"] = o;
  o.repetition_penalty = 1.3F;
  o.frequency_penalty = 0.1F;
  o.presence_penalty = 0.2F;
  o.penalty_window = 40;
  out["penalties"] = o;
  o.temperature = 0.7F;
  o.top_p = 0.9F;
  o.seed = 5;
  o.logit_bias = bias;
  o.logit_bias_count = 3;
  o.logit_bias_stride = sizeof bias[0];
  out["sampled, bias, penalties"] = o;
  o = out["greedy"];
  o.temperature = 0.4F;
  o.top_k = 20;
  o.min_p = 0.02F;
  o.logprobs = 0;
  o.ignore_eos = 0;
  out["sampled"] = o;
  o.stop_strings = stops;
  o.stop_string_count = 2;
  out["stop strings"] = o;
  o = out["greedy"];
  o.max_tokens = 7;
  out["few tokens"] = o;
  return out;
}

}  // namespace

TEST_CASE("the same bits with every drafter as without") {
  dsv3_context* context = shared().context.get();
  const std::vector<int32_t> prompt = prompt_tokens(300);
  uint64_t accepted[std::size(kDrafters)] = {};
  for (const auto& [name, plain] : variants()) {
    const Outcome expected = run(context, prompt, plain);
    CHECK(expected.statistics.drafted_tokens == 0);
    CHECK(expected.statistics.decode_steps == expected.tokens.size());
    for (size_t i = 0; i < std::size(kDrafters); ++i) {
      CAPTURE(name);
      CAPTURE(kDrafters[i].name);
      dsv3_request_options options = plain;
      options.speculation = kDrafters[i].mode;
      options.drafters = kDrafters[i].drafters;
      // A reference that is right here and there.
      std::vector<int32_t> reference = expected.tokens;
      for (size_t at = 5; at < reference.size(); at += 9) reference[at] = 100;
      options.reference_tokens = reference.data();
      options.reference_token_count = reference.size();
      const Outcome outcome = run(context, prompt, options);
      check_same_end(outcome, expected);
      CHECK(outcome.statistics.accepted_tokens <= outcome.statistics.drafted_tokens);
      CHECK(outcome.statistics.decode_steps + outcome.statistics.accepted_tokens ==
            outcome.tokens.size());
      accepted[i] += outcome.statistics.accepted_tokens;
    }
  }
  CHECK(accepted[0] > 20);   // lookup
  CHECK(accepted[1] > 300);  // reference
  CHECK(accepted[2] > 200);  // MTP
  CHECK(accepted[3] > 300);  // all
}

TEST_CASE("a reference that is not among the drafters drafts nothing") {
  dsv3_context* context = shared().context.get();
  const std::vector<int32_t> prompt = prompt_tokens(60);
  dsv3_request_options options = request_options();
  options.max_tokens = 40;
  options.ignore_eos = 1;
  options.speculation = DSV3_SPECULATION_ALWAYS;
  options.drafters = DSV3_DRAFT_LOOKUP;
  const Outcome without = run(context, prompt, options);
  options.reference_tokens = without.tokens.data();
  options.reference_token_count = without.tokens.size();
  const Outcome with = run(context, prompt, options);
  CHECK(with.statistics.drafted_tokens == without.statistics.drafted_tokens);
  CHECK(with.statistics.decode_steps == without.statistics.decode_steps);
  options.drafters = DSV3_DRAFT_REFERENCE;
  CHECK(run(context, prompt, options).statistics.decode_steps < 10);
}

TEST_CASE("MTP drafts are as good for several sequences at once as for one") {
  constexpr size_t kSessions = 5;
  dsv3_context* context = shared().context.get();
  dsv3_request_options options = request_options();
  options.max_tokens = 120;
  options.ignore_eos = 1;
  options.speculation = DSV3_SPECULATION_ALWAYS;
  options.drafters = DSV3_DRAFT_MTP;
  uint64_t alone = 0, together = 0, drafted = 0;
  std::vector<SessionHandle> sessions;
  std::vector<RequestHandle> requests;
  std::vector<Outcome> outcomes;
  for (size_t i = 0; i < kSessions; ++i) {
    outcomes.push_back(run(context, prompt_tokens(70 + 40 * i), options));
    alone += outcomes.back().statistics.accepted_tokens;
    drafted += outcomes.back().statistics.drafted_tokens;
  }
  for (size_t i = 0; i < kSessions; ++i) {
    sessions.push_back(make_session(context));
    append(sessions[i].get(), prompt_tokens(70 + 40 * i));
    requests.push_back(start(sessions[i].get(), options));
  }
  for (size_t i = 0; i < kSessions; ++i) {
    const Outcome outcome = finish(requests[i].get());
    CHECK(outcome.tokens == outcomes[i].tokens);
    together += outcome.statistics.accepted_tokens;
  }
  CAPTURE(alone);
  CAPTURE(together);
  CHECK(alone * 5 > drafted * 2);
  // Prompts are cut otherwise among others, so the module may have seen a little less of them.
  CHECK(together * 10 > alone * 9);
}

TEST_CASE("the same bits among other requests, whatever each of them drafts") {
  constexpr size_t kSessions = 6;
  dsv3_context* context = shared().context.get();
  dsv3_request_options plain = request_options();
  plain.max_tokens = 80;
  plain.ignore_eos = 1;
  plain.logprobs = 2;
  plain.temperature = 0.6F;
  std::vector<Outcome> alone;
  std::vector<std::vector<int32_t>> prompts;
  for (size_t i = 0; i < kSessions; ++i) {
    prompts.push_back(prompt_tokens(60 + 45 * i));
    plain.seed = i;
    plain.speculation = DSV3_SPECULATION_OFF;
    alone.push_back(run(context, prompts[i], plain));
  }
  std::vector<SessionHandle> sessions;
  std::vector<RequestHandle> requests;
  for (size_t i = 0; i < kSessions; ++i) {
    sessions.push_back(make_session(context));
    append(sessions[i].get(), prompts[i]);
    plain.seed = i;
    plain.speculation = kDrafters[i % std::size(kDrafters)].mode;
    plain.drafters = kDrafters[i % std::size(kDrafters)].drafters;
    plain.reference_tokens = alone[i].tokens.data();
    plain.reference_token_count = alone[i].tokens.size();
    requests.push_back(start(sessions[i].get(), plain));
  }
  for (size_t i = 0; i < kSessions; ++i) {
    CAPTURE(i);
    check_same_end(finish(requests[i].get()), alone[i]);
  }
}

TEST_CASE("what follows a session after speculation is the same bits") {
  dsv3_context* context = shared().context.get();
  dsv3_request_options options = request_options();
  options.max_tokens = 50;
  options.ignore_eos = 1;
  options.logprobs = 0;
  options.speculation = DSV3_SPECULATION_OFF;
  const SessionHandle a = make_session(context);
  const SessionHandle b = make_session(context);
  append(a.get(), prompt_tokens(250));
  append(b.get(), prompt_tokens(250));
  const Outcome plain = generate(a.get(), options);
  std::vector<int32_t> wrong = plain.tokens;
  for (size_t i = 3; i < wrong.size(); i += 4) wrong[i] = 7;
  dsv3_request_options drafted = options;
  drafted.speculation = DSV3_SPECULATION_ALWAYS;
  drafted.reference_tokens = wrong.data();
  drafted.reference_token_count = wrong.size();
  check_same_end(generate(b.get(), drafted), plain);
  append(a.get(), prompt_tokens(90));
  append(b.get(), prompt_tokens(90));
  check_same_end(generate(b.get(), options), generate(a.get(), options));
}

TEST_CASE("the logits hook is called once for every position, in order") {
  dsv3_context* context = shared().context.get();
  const std::vector<int32_t> prompt = prompt_tokens(20);
  Forced forced;
  forced.prompt = prompt.size();
  forced.target = tokenize(shared().model.get(), python_text().substr(3000, 700));
  std::vector<int32_t> reference = forced.target;
  reference[30] = 5;
  reference.erase(reference.begin() + 60, reference.begin() + 70);
  dsv3_request_options options = request_options();
  options.max_tokens = forced.target.size();
  options.ignore_eos = 1;
  options.logits_hook = Forced::hook;
  options.logits_hook_user = &forced;
  options.reference_tokens = reference.data();
  options.reference_token_count = reference.size();
  options.speculation = DSV3_SPECULATION_ALWAYS;
  const Outcome outcome = run(context, prompt, options);
  CHECK(outcome.tokens == forced.target);
  CHECK(forced.in_order);
  CHECK(forced.calls == forced.target.size());
  CHECK(outcome.statistics.decode_steps * 5 < forced.target.size());
}

TEST_CASE("a small event queue bounds the draft, and nothing is lost") {
  dsv3_context* context = shared().context.get();
  const std::vector<int32_t> prompt = prompt_tokens(120);
  dsv3_request_options options = request_options();
  options.max_tokens = 60;
  options.ignore_eos = 1;
  options.speculation = DSV3_SPECULATION_OFF;
  const Outcome expected = run(context, prompt, options);
  options.speculation = DSV3_SPECULATION_ALWAYS;
  options.reference_tokens = expected.tokens.data();
  options.reference_token_count = expected.tokens.size();
  for (const uint32_t events : {1U, 2U, 5U}) {
    options.max_queued_events = events;
    const Outcome outcome = run(context, prompt, options);
    check_same_end(outcome, expected);
    CHECK(outcome.statistics.decode_steps * events >= outcome.tokens.size());
  }
}

TEST_CASE("max_draft_tokens bounds a draft; the end of the context too") {
  dsv3_context* context = shared().context.get();
  std::vector<int32_t> prompt;
  while (prompt.size() < 2000) {
    const std::vector<int32_t> more = prompt_tokens(500);
    prompt.insert(prompt.end(), more.begin(), more.end());
  }
  dsv3_request_options options = request_options();
  options.ignore_eos = 1;
  options.max_tokens = 1000;
  options.speculation = DSV3_SPECULATION_OFF;
  const Outcome expected = run(context, prompt, options);
  CHECK(expected.reason == DSV3_FINISH_CONTEXT_LENGTH);
  CHECK(expected.tokens.size() == 2048 - prompt.size());
  options.speculation = DSV3_SPECULATION_ALWAYS;
  options.reference_tokens = expected.tokens.data();
  options.reference_token_count = expected.tokens.size();
  check_same_end(run(context, prompt, options), expected);
  options.max_draft_tokens = 3;
  const Outcome outcome = run(context, prompt, options);
  check_same_end(outcome, expected);
  CHECK(outcome.statistics.decode_steps * 4 >= outcome.tokens.size());
}

TEST_CASE("cancel and deadline between drafts leave a valid session") {
  dsv3_context* context = shared().context.get();
  const std::vector<int32_t> prompt = prompt_tokens(100);
  dsv3_request_options options = request_options();
  options.max_tokens = 1500;
  options.ignore_eos = 1;
  options.speculation = DSV3_SPECULATION_ALWAYS;
  const SessionHandle session = make_session(context);
  append(session.get(), prompt);
  const CancelHandle cancel = make_cancel();
  options.cancel = cancel.get();
  const RequestHandle request = start(session.get(), options);
  for (int i = 0; i < 20; ++i) {
    dsv3_event event = {};
    event.struct_size = sizeof event;
    Error error;
    REQUIRE(dsv3_request_next(request.get(), 5000, &event, error.out()) == DSV3_OK);
  }
  dsv3_cancel_set(cancel.get());
  const Outcome rest = finish(request.get());
  CHECK(rest.reason == DSV3_FINISH_CANCELLED);
  std::vector<int32_t> tokens = tokens_of(session.get());
  CHECK(tokens.size() == dsv3_session_length(session.get()));
  CHECK(dsv3_session_computed(session.get()) <= tokens.size());
  // What stands there is what decoding one by one gives, and it goes on.
  dsv3_request_options plain = request_options();
  plain.max_tokens = tokens.size() - prompt.size() + 10;
  plain.ignore_eos = 1;
  plain.speculation = DSV3_SPECULATION_OFF;
  const Outcome expected = run(context, prompt, plain);
  std::vector<int32_t> whole = prompt;
  whole.insert(whole.end(), expected.tokens.begin(), expected.tokens.end());
  plain.max_tokens = 10;
  generate(session.get(), plain);
  CHECK(tokens_of(session.get()) == whole);
}

TEST_CASE("a deadline that passes while a draft is verified") {
  dsv3_context* context = shared().context.get();
  const std::vector<int32_t> prompt = prompt_tokens(60);
  dsv3_request_options options = request_options();
  options.max_tokens = 400;
  options.ignore_eos = 1;
  options.logprobs = 0;
  options.speculation = DSV3_SPECULATION_OFF;
  const Outcome expected = run(context, prompt, options);
  struct Sleeper {
    int calls = 0;
    static void hook(void* user, float*, uint64_t, const int32_t*, uint64_t) {
      if (++static_cast<Sleeper*>(user)->calls == 100) {
        std::this_thread::sleep_for(std::chrono::milliseconds(1200));
      }
    }
  } sleeper;
  options.speculation = DSV3_SPECULATION_ALWAYS;
  options.reference_tokens = expected.tokens.data();
  options.reference_token_count = expected.tokens.size();
  options.max_draft_tokens = 16;
  options.deadline_ms = 1000;
  options.logits_hook = Sleeper::hook;
  options.logits_hook_user = &sleeper;
  const SessionHandle session = make_session(context);
  append(session.get(), prompt);
  const Outcome outcome = generate(session.get(), options);
  CHECK(outcome.reason == DSV3_FINISH_DEADLINE);
  CHECK(outcome.statistics.accepted_tokens > 50);
  // The step is committed; the next one does not begin.
  REQUIRE(outcome.tokens.size() >= 100);
  CHECK(outcome.tokens.size() <= 100 + 17);
  CHECK(tokens_of(session.get()).size() == prompt.size() + outcome.tokens.size());
  CHECK(std::equal(outcome.tokens.begin(), outcome.tokens.end(), expected.tokens.begin()));
  // It goes on as if nothing had been drafted.
  dsv3_request_options plain = request_options();
  plain.max_tokens = 20;
  plain.ignore_eos = 1;
  plain.logprobs = 0;
  plain.speculation = DSV3_SPECULATION_OFF;
  const Outcome rest = generate(session.get(), plain);
  const auto at = expected.tokens.begin() + static_cast<std::ptrdiff_t>(outcome.tokens.size());
  CHECK(std::equal(rest.tokens.begin(), rest.tokens.end(), at));
}

TEST_CASE("sampled tokens have the model's distribution with drafts as without") {
  // The position after a short prompt, drawn with many seeds: the draft is the most likely token.
  dsv3_context* context = shared().context.get();
  const std::vector<int32_t> prompt = prompt_tokens(40);
  dsv3_request_options options = request_options();
  options.max_tokens = 1;
  options.logprobs = 1;
  const Outcome greedy = run(context, prompt, options);
  const int32_t best = greedy.tokens[0];
  // Two tokens: the second one is verified as a draft when the first one is `best`.
  std::map<int32_t, int> plain, drafted;
  uint64_t verified = 0, accepted = 0;
  constexpr int kSeeds = 600;
  const std::vector<int32_t> reference(4, best);
  for (const bool speculate : {false, true}) {
    for (int seed = 0; seed < kSeeds; ++seed) {
      dsv3_request_options o = request_options();
      o.max_tokens = 3;
      o.temperature = 1;
      o.seed = static_cast<uint64_t>(seed + (speculate ? 1000000 : 0));  // independent draws
      o.ignore_eos = 1;
      o.speculation = speculate ? DSV3_SPECULATION_ALWAYS : DSV3_SPECULATION_OFF;
      if (speculate) {
        o.reference_tokens = reference.data();
        o.reference_token_count = reference.size();
      }
      const SessionHandle session = make_session(context);
      append(session.get(), prompt);
      const Outcome outcome = generate(session.get(), o);
      ++(speculate ? drafted : plain)[outcome.tokens[1]];
      if (speculate) verified += outcome.statistics.drafted_tokens;
      if (speculate) accepted += outcome.statistics.accepted_tokens;
    }
  }
  CHECK(accepted > 0);
  CHECK(accepted < verified);
  // Two samples of one distribution: chi-squared over the tokens that came at least ten times; a
  // degree of freedom contributes 1 on average, and twice that is far beyond chance.
  double chi = 0;
  int kinds = 0;
  for (const auto& [token, count] : plain) {
    const int other = drafted.count(token) > 0 ? drafted.at(token) : 0;
    if (count + other < 10) continue;
    chi += static_cast<double>((count - other) * (count - other)) / (count + other);
    ++kinds;
  }
  CAPTURE(chi);
  CAPTURE(kinds);
  REQUIRE(kinds >= 4);
  CHECK(chi < kinds + 4 * std::sqrt(2.0 * kinds));
}

// ------------------------------------------------------------------------------------------ edits

namespace {

std::string replace_all(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at)) {
    text.replace(at, from.size(), to);
    at += to.size();
  }
  return text;
}

// The identifier of at least five letters that stands in the text most often.
std::string frequent_identifier(const std::string& text) {
  std::map<std::string, int> counts;
  std::string word;
  for (const char c : text + " ") {
    if (std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_') {
      word += c;
    } else {
      if (word.size() >= 5 && std::isalpha(static_cast<unsigned char>(word[0])) != 0)
        ++counts[word];
      word.clear();
    }
  }
  return std::max_element(counts.begin(), counts.end(),
                          [](const auto& a, const auto& b) { return a.second < b.second; })
      ->first;
}

std::string indented_by_four(const std::string& text) {
  std::string out;
  bool line_start = true;
  for (const char c : text) {
    out += c;
    if (line_start && c == ' ') out += ' ';
    line_start = c == '\n' || (line_start && c == ' ');
  }
  return out;
}

std::vector<std::string> source_files() {
  std::vector<std::string> files;
  for (const char* folder :
       {"runtime/text", "runtime/engine", "runtime/model", "tests/data/python", "examples/cli"}) {
    for (const auto& entry : std::filesystem::directory_iterator(source_path(folder))) {
      const std::string extension = entry.path().extension().string();
      if (extension != ".cc" && extension != ".py") continue;
      if (std::filesystem::file_size(entry.path()) < 2500) continue;
      files.push_back(entry.path().string());
    }
  }
  std::sort(files.begin(), files.end());
  return files;
}

}  // namespace

namespace {

struct Edits {
  uint64_t steps = 0, tokens = 0;
  int worst_percent = 0;  // steps of tokens
};

// Edits [begin, end) of thirty, each of a file of this repository: a renamed identifier, or other
// indentation. The reference is the old text, and a hook forces the new one.
Edits make_edits(dsv3_context* context, size_t begin, size_t end, int32_t speculation) {
  const std::vector<std::string> files = source_files();
  REQUIRE(files.size() >= 30);
  const std::vector<int32_t> prompt = prompt_tokens(8);
  Edits sum;
  for (size_t i = begin; i < end; ++i) {
    const std::string& file = files[i * files.size() / 30];
    const std::string before = read_bytes(file).substr(0, 2400);
    const std::string after = i % 3 == 2
                                  ? indented_by_four(before)
                                  : replace_all(before, frequent_identifier(before), "renamed_it");
    REQUIRE(after != before);
    Forced forced;
    forced.prompt = prompt.size();
    forced.target = tokenize(shared().model.get(), after);
    dsv3_request_options options = request_options();
    options.max_tokens = forced.target.size();
    options.ignore_eos = 1;
    options.max_queued_events = 4096;
    options.logits_hook = Forced::hook;
    options.logits_hook_user = &forced;
    options.reference_text = before.data();
    options.reference_text_length = before.size();
    options.speculation = speculation;
    const Outcome outcome = run(context, prompt, options);
    CAPTURE(file);
    REQUIRE(outcome.tokens == forced.target);
    CHECK(forced.in_order);
    const uint64_t steps = outcome.statistics.decode_steps, tokens = outcome.tokens.size();
    sum.steps += steps;
    sum.tokens += tokens;
    sum.worst_percent = std::max(sum.worst_percent, static_cast<int>(steps * 100 / tokens));
    MESSAGE(file << ": " << steps << " steps for " << tokens << " tokens");
  }
  MESSAGE("edits: " << sum.steps << " steps for " << sum.tokens << " tokens");
  return sum;
}

}  // namespace

TEST_CASE("edits along a reference take at most a fifth of the steps") {
  const Edits edits = make_edits(shared().context.get(), 0, 30, DSV3_SPECULATION_ALWAYS);
  CHECK(edits.steps * 5 <= edits.tokens);
  CHECK(edits.worst_percent <= 33);
}

TEST_CASE("edits in a context that has served other requests are drafted at length too") {
  const ContextHandle context = make_context(shared().model.get());
  dsv3_request_options options = request_options();
  options.max_tokens = 700;
  options.ignore_eos = 1;
  options.max_queued_events = 4096;
  for (uint64_t i = 0; i < 8; ++i) {
    options.temperature = i % 2 == 0 ? 0 : 0.9F;
    options.seed = i;
    options.speculation = i < 5 ? DSV3_SPECULATION_OFF : DSV3_SPECULATION_AUTO;
    run(context.get(), prompt_tokens(200 + 100 * i), options);
  }
  make_edits(context.get(), 0, 5, DSV3_SPECULATION_AUTO);
  const Edits edits = make_edits(context.get(), 5, 30, DSV3_SPECULATION_AUTO);
  // How much AUTO drafts follows from what steps took here: six to seven tokens a step on an idle
  // machine, three to four on a busy one or under a sanitizer. So this asks for no more than that
  // it drafts at all; that no stale price keeps it from doing so is tested in unit.engine_draft.
  CHECK(edits.steps * 3 <= edits.tokens * 2);
}

// A hook comes once for every token, drafted or not, and only its own request has it: what steps
// cost, and with it what drafts are worth, is measured without.
TEST_CASE("what a logits hook takes is no cost of a step") {
  struct Slow {
    Forced forced;
    std::chrono::nanoseconds time{0};
    static void hook(void* user, float* logits, uint64_t vocab, const int32_t* tokens,
                     uint64_t count) {
      auto* self = static_cast<Slow*>(user);
      std::this_thread::sleep_for(self->time);
      Forced::hook(&self->forced, logits, vocab, tokens, count);
    }
  };
  const std::vector<int32_t> text = prompt_tokens(140), prompt(text.begin(), text.begin() + 40);
  Slow slow;
  slow.forced.target.assign(text.begin() + 40, text.end());
  slow.forced.prompt = prompt.size();
  dsv3_request_options options = request_options();
  options.ignore_eos = 1;
  options.speculation = DSV3_SPECULATION_OFF;
  options.max_tokens = 30;
  const Outcome plain = run(make_context(shared().model.get()).get(), prompt, options);
  slow.time = std::chrono::milliseconds(5) +
              10 * std::chrono::nanoseconds(plain.statistics.decode_ns / options.max_tokens);

  const ContextHandle context = make_context(shared().model.get());
  options.logits_hook = Slow::hook;
  options.logits_hook_user = &slow;
  run(context.get(), prompt, options);
  options.speculation = DSV3_SPECULATION_ALWAYS;
  options.max_tokens = slow.forced.target.size();
  options.reference_tokens = text.data();
  options.reference_token_count = text.size();
  slow.forced.calls = 0;
  const int64_t hook_ns = std::exchange(slow.time, {}).count();
  const Outcome outcome = run(context.get(), prompt, options);
  CHECK(outcome.tokens == slow.forced.target);
  const int64_t saved = outcome.statistics.speculation_saved_ns;
  CHECK(saved / static_cast<int64_t>(outcome.tokens.size()) < hook_ns / 2);
}
