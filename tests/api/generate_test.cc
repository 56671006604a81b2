// Generation through dsv3.h: what comes out, in which pieces, and that it is the same bits however
// it was computed.
#include <doctest/doctest.h>

#include <algorithm>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <thread>

#include "tests/api/api_support.h"
#include "tests/api/outcome_support.h"

using namespace dsv3::test;  // NOLINT

namespace {

// One model and one context for all cases; the kernel set is the machine's best.
struct Fixture {
  ModelHandle model = open_model();
  // What is compared has been computed, not found (sessions that find are in prefix_test.cc).
  ContextHandle context = make_context(model.get(), {.prefix_cache = 0});
};
Fixture& shared() {
  static Fixture fixture;
  return fixture;
}

std::vector<int32_t> prompt_tokens(size_t count) {
  std::vector<int32_t> tokens = tokenize(shared().model.get(), python_text());
  REQUIRE(tokens.size() >= count);
  tokens.resize(count);
  return tokens;
}

// Sampled, with log-probabilities: what must be the same bits.
dsv3_request_options sampled(uint64_t max_tokens = 24) {
  dsv3_request_options options = request_options();
  options.max_tokens = max_tokens;
  options.temperature = 0.8F;
  options.top_p = 0.95F;
  options.seed = 7;
  options.logprobs = 3;
  options.ignore_eos = 1;
  return options;
}

}  // namespace

TEST_CASE("greedy continuations are the published code's") {
  const auto golden = read_golden(source_path("tests/data/golden/tiny-coder.golden.safetensors"));
  const ContextHandle context = make_context(shared().model.get(), {.kernels = "ref"});
  int prompts = 0;
  for (; golden.count(std::to_string(prompts) + ".greedy") > 0; ++prompts) {
    const std::vector<int32_t>& prompt = golden.at(std::to_string(prompts) + ".tokens").i32;
    const std::vector<int32_t>& expected = golden.at(std::to_string(prompts) + ".greedy").i32;
    CAPTURE(prompts);
    const SessionHandle session = make_session(context.get());
    append(session.get(), prompt);
    dsv3_request_options options = request_options();
    options.max_tokens = expected.size();
    options.ignore_eos = 1;
    const Outcome outcome = generate(session.get(), options);
    CHECK(outcome.tokens == expected);
    CHECK(outcome.reason == DSV3_FINISH_MAX_TOKENS);
    CHECK(outcome.statistics.generated_tokens == expected.size());
    CHECK(outcome.statistics.prompt_tokens == prompt.size());
    CHECK(outcome.progress_done == prompt.size());
    CHECK(outcome.progress_total == prompt.size());
  }
  CHECK(prompts == 4);
}

TEST_CASE("a prompt in chunks of 1, 7 and 64 gives the same bits as in one") {
  const std::vector<int32_t> prompt = prompt_tokens(150);
  std::vector<Outcome> outcomes;
  for (const int32_t chunk : {0, 1, 7, 64}) {
    const ContextHandle context = make_context(shared().model.get(), {.prefill_chunk = chunk});
    const SessionHandle session = make_session(context.get());
    append(session.get(), prompt);
    outcomes.push_back(generate(session.get(), sampled()));
    CAPTURE(chunk);
    REQUIRE(outcomes.back().tokens.size() == 24);
    check_same(outcomes.back(), outcomes.front());
  }
}

TEST_CASE("the host's rounding mode does not matter") {
  const auto answer = [](dsv3_context* context) {
    const SessionHandle session = make_session(context);
    append(session.get(), prompt_tokens(100));
    return generate(session.get(), sampled());
  };
  const Outcome usual = answer(shared().context.get());
  for (const int mode : {FE_TOWARDZERO, FE_UPWARD}) {
    std::fesetround(mode);
    const ContextHandle context = make_context(shared().model.get());
    CHECK(std::fegetround() == mode);
    std::fesetround(FE_TONEAREST);
    check_same(answer(context.get()), usual);
  }
}

TEST_CASE("a forked and truncated session gives the same bits as a fresh one") {
  const std::vector<int32_t> prompt = prompt_tokens(200);
  const SessionHandle used = make_session(shared().context.get());
  append(used.get(), prompt);
  generate(used.get(), sampled());  // fills pages with what must not show later
  const SessionHandle copy = fork_session(used.get());
  Error error;
  REQUIRE(dsv3_session_truncate(copy.get(), 130, error.out()) == DSV3_OK);
  CHECK(dsv3_session_computed(copy.get()) == 130);
  append(copy.get(), prompt_tokens(40));

  std::vector<int32_t> expected_tokens = prompt_tokens(130);
  for (const int32_t t : prompt_tokens(40)) expected_tokens.push_back(t);
  CHECK(tokens_of(copy.get()) == expected_tokens);
  const SessionHandle fresh = make_session(shared().context.get());
  append(fresh.get(), expected_tokens);

  const Outcome a = generate(copy.get(), sampled());
  const Outcome b = generate(fresh.get(), sampled());
  check_same(a, b);
  CHECK(a.statistics.cached_tokens == 130);
  CHECK(b.statistics.cached_tokens == 0);
  // The original did not notice: its last token is computed again, the rest is still there.
  const Outcome c = generate(used.get(), sampled(4));
  CHECK(c.statistics.cached_tokens == 200 + 24 - 1);
  const SessionHandle again = make_session(shared().context.get());
  std::vector<int32_t> whole = tokens_of(used.get());
  whole.resize(224);
  append(again.get(), whole);
  check_same(generate(again.get(), sampled(4)), c);
}

TEST_CASE("a request among others gives the same bits as alone") {
  constexpr int kSessions = 5;
  std::vector<Outcome> alone;
  for (int i = 0; i < kSessions; ++i) {
    const SessionHandle session = make_session(shared().context.get());
    append(session.get(), prompt_tokens(40 + 30 * static_cast<size_t>(i)));
    alone.push_back(generate(session.get(), sampled(32)));
  }
  std::vector<SessionHandle> sessions;
  std::vector<RequestHandle> requests;
  for (int i = 0; i < kSessions; ++i) {
    sessions.push_back(make_session(shared().context.get()));
    append(sessions.back().get(), prompt_tokens(40 + 30 * static_cast<size_t>(i)));
    requests.push_back(start(sessions.back().get(), sampled(32)));
  }
  for (size_t i = 0; i < kSessions; ++i) check_same(finish(requests[i].get()), alone[i]);
}

// Greedy requests that ask for nothing else never see their logits; others of the same step do.
TEST_CASE("greedy with and without a look at the logits, side by side") {
  const std::vector<int32_t> prompt = prompt_tokens(50);
  const auto begin = [&](const SessionHandle& session, const dsv3_request_options& options) {
    append(session.get(), prompt);
    return start(session.get(), options);
  };
  dsv3_request_options plain = request_options();
  plain.max_tokens = 24;
  plain.ignore_eos = 1;
  dsv3_request_options with_logprobs = plain;
  with_logprobs.logprobs = 0;
  const SessionHandle alone = make_session(shared().context.get());
  const Outcome expected = finish(begin(alone, with_logprobs).get());

  const dsv3_logit_bias forbidden = {expected.tokens[0], -INFINITY};
  dsv3_request_options biased = plain;
  biased.logit_bias = &forbidden;
  biased.logit_bias_count = 1;
  dsv3_request_options penalised = plain;
  penalised.frequency_penalty = 100;  // no token twice
  const dsv3_request_options all[] = {plain, biased, with_logprobs, sampled(), penalised, plain};
  std::vector<SessionHandle> sessions;
  std::vector<RequestHandle> requests;
  for (const dsv3_request_options& options : all) {
    sessions.push_back(make_session(shared().context.get()));
    requests.push_back(begin(sessions.back(), options));
  }
  std::vector<Outcome> outcomes;
  for (const RequestHandle& request : requests) outcomes.push_back(finish(request.get()));
  CHECK(outcomes[0].tokens == expected.tokens);
  CHECK(outcomes[5].tokens == expected.tokens);
  CHECK(outcomes[2].tokens == expected.tokens);
  CHECK(same_bits(outcomes[2].logprobs, expected.logprobs));
  for (const int32_t token : outcomes[1].tokens) CHECK(token != forbidden.token);
  std::vector<int32_t> distinct = outcomes[4].tokens;
  std::sort(distinct.begin(), distinct.end());
  CHECK(std::adjacent_find(distinct.begin(), distinct.end()) == distinct.end());
}

TEST_CASE("the seed decides, and only for its own positions") {
  const std::vector<int32_t> prompt = prompt_tokens(60);
  const auto run = [&](uint64_t seed) {
    const SessionHandle session = make_session(shared().context.get());
    append(session.get(), prompt);
    dsv3_request_options options = sampled(32);
    options.temperature = 1.5F;
    options.seed = seed;
    return generate(session.get(), options);
  };
  const Outcome a = run(1), b = run(1), c = run(2);
  check_same(a, b);
  CHECK(a.tokens != c.tokens);
}

TEST_CASE("stopping and going on gives what one request gives") {
  const std::vector<int32_t> prompt = prompt_tokens(90);
  const SessionHandle whole = make_session(shared().context.get());
  append(whole.get(), prompt);
  const Outcome once = generate(whole.get(), sampled(20));
  const SessionHandle parts = make_session(shared().context.get());
  append(parts.get(), prompt);
  Outcome first = generate(parts.get(), sampled(7));
  const Outcome second = generate(parts.get(), sampled(13));
  first.tokens.insert(first.tokens.end(), second.tokens.begin(), second.tokens.end());
  first.logprobs.insert(first.logprobs.end(), second.logprobs.begin(), second.logprobs.end());
  CHECK(first.tokens == once.tokens);
  CHECK(same_bits(first.logprobs, once.logprobs));
}

TEST_CASE("log-probabilities are those of an evaluation") {
  const std::vector<int32_t> prompt = prompt_tokens(70);
  const SessionHandle session = make_session(shared().context.get());
  append(session.get(), prompt);
  dsv3_request_options options = sampled(16);
  options.logit_bias = nullptr;
  options.presence_penalty = 0.5F;  // changes the choice, not what is reported
  const Outcome outcome = generate(session.get(), options);
  REQUIRE(outcome.tokens.size() == 16);

  const std::vector<int32_t> all = tokens_of(session.get());
  const SessionHandle fresh = make_session(shared().context.get());
  std::vector<float> logprobs(all.size() - 1);
  std::vector<float> logits(all.size() * 4096);
  dsv3_evaluation evaluation;
  dsv3_evaluation_init(&evaluation, sizeof evaluation);
  evaluation.logprobs = logprobs.data();
  evaluation.logits = logits.data();
  Error error;
  REQUIRE(dsv3_session_evaluate(fresh.get(), all.data(), all.size(), &evaluation, error.out()) ==
          DSV3_OK);
  CHECK(dsv3_session_length(fresh.get()) == all.size());
  CHECK(dsv3_session_computed(fresh.get()) == all.size());
  const std::vector<float> tail(logprobs.end() - 16, logprobs.end());
  CHECK(same_bits(tail, outcome.logprobs));
  for (size_t i = 0; i < 16; ++i) {
    REQUIRE(outcome.top[i].size() == 3);
    CHECK(outcome.top[i][0].logprob >= outcome.top[i][1].logprob);
    CHECK(outcome.top[i][1].logprob >= outcome.top[i][2].logprob);
    // An independent look: the best of the evaluation's logits.
    const float* row = logits.data() + (prompt.size() + i - 1) * 4096;
    int32_t best = 0;
    double sum = 0;
    for (int32_t t = 0; t < 4096; ++t) {
      if (row[t] > row[best]) best = t;
      sum += std::exp(static_cast<double>(row[t]));
    }
    CHECK(outcome.top[i][0].id == best);
    CHECK(outcome.top[i][0].logprob == doctest::Approx(row[best] - std::log(sum)).epsilon(1e-5));
  }
}

TEST_CASE("evaluation in chunks, hidden states and the MTP module") {
  const std::vector<int32_t> tokens = prompt_tokens(100);
  std::vector<std::vector<float>> results;
  for (const int32_t chunk : {0, 9, 64}) {
    const ContextHandle context = make_context(shared().model.get(), {.prefill_chunk = chunk});
    const SessionHandle session = make_session(context.get());
    std::vector<float> logits(100 * 4096), hidden(100 * 256), mtp(99 * 4096);
    dsv3_evaluation e;
    dsv3_evaluation_init(&e, sizeof e);
    e.logits = logits.data();
    e.hidden = hidden.data();
    e.mtp_logits = mtp.data();
    std::vector<uint64_t> seen;
    e.progress_user = &seen;
    e.progress = [](void* user, uint64_t done, uint64_t total) {
      CHECK(total == 100);
      static_cast<std::vector<uint64_t>*>(user)->push_back(done);
    };
    Error error;
    REQUIRE(dsv3_session_evaluate(session.get(), tokens.data(), tokens.size(), &e, error.out()) ==
            DSV3_OK);
    for (size_t i = 1; i < seen.size(); ++i) CHECK(seen[i] > seen[i - 1]);
    logits.insert(logits.end(), hidden.begin(), hidden.end());
    logits.insert(logits.end(), mtp.begin(), mtp.end());
    results.push_back(std::move(logits));
    CHECK(same_bits(results.back(), results.front()));
  }
}

TEST_CASE("the MTP module's logits do not depend on what the prefix cache has") {
  const std::vector<int32_t> tokens = prompt_tokens(200);
  std::vector<float> first;
  for (const bool warm : {false, true}) {
    for (const int32_t chunk : {0, 50}) {  // a page's rows come with two chunks
      CAPTURE(warm);
      CAPTURE(chunk);
      const ContextHandle context = make_context(shared().model.get(), {.prefill_chunk = chunk});
      if (warm) {
        dsv3_request_options options = request_options();
        options.max_tokens = 0;
        const SessionHandle other = make_session(context.get());
        append(other.get(), tokens);
        generate(other.get(), options);
      }
      const SessionHandle session = make_session(context.get());
      std::vector<float> mtp(199 * 4096);
      dsv3_evaluation e;
      dsv3_evaluation_init(&e, sizeof e);
      e.mtp_logits = mtp.data();
      Error error;
      REQUIRE(dsv3_session_evaluate(session.get(), tokens.data(), tokens.size(), &e, error.out()) ==
              DSV3_OK);
      if (first.empty()) first = mtp;
      CHECK(same_bits(mtp, first));
    }
  }
}

TEST_CASE("every token is in exactly one event and the text is theirs") {
  const SessionHandle session = make_session(shared().context.get());
  append(session.get(), prompt_tokens(50));
  const Outcome outcome = generate(session.get(), sampled(60));
  const std::vector<int32_t> all = tokens_of(session.get());
  CHECK(std::vector<int32_t>(all.begin() + 50, all.end()) == outcome.tokens);
  std::string text(4096, '\0');
  uint64_t needed = 0;
  Error error;
  REQUIRE(dsv3_model_detokenize(shared().model.get(), outcome.tokens.data(), outcome.tokens.size(),
                                DSV3_DETOKENIZE_SKIP_SPECIAL, text.data(), text.size(), &needed,
                                error.out()) == DSV3_OK);
  text.resize(needed);
  CHECK(outcome.text == text);
}

TEST_CASE("stop strings end the text before themselves, also across tokens") {
  const std::vector<int32_t> prompt = prompt_tokens(80);
  const SessionHandle plain = make_session(shared().context.get());
  append(plain.get(), prompt);
  dsv3_request_options options = request_options();
  options.max_tokens = 40;
  options.ignore_eos = 1;
  const Outcome whole = generate(plain.get(), options);
  REQUIRE(whole.text.size() > 30);
  // A piece from the middle: it begins and ends inside tokens more often than not.
  for (const size_t at : {size_t{5}, size_t{9}, size_t{14}, size_t{20}}) {
    const std::string stop = whole.text.substr(at, 7);
    CAPTURE(stop);
    const char* const stops[] = {"never in there", stop.c_str()};
    options.stop_strings = stops;
    options.stop_string_count = 2;
    const SessionHandle session = make_session(shared().context.get());
    append(session.get(), prompt);
    const Outcome outcome = generate(session.get(), options);
    CHECK(outcome.reason == DSV3_FINISH_STOP_STRING);
    CHECK(outcome.stop_string == stop);
    CHECK(outcome.text == whole.text.substr(0, whole.text.find(stop)));
    CHECK(outcome.tokens.size() < whole.tokens.size());
    CHECK(dsv3_session_length(session.get()) == 80 + outcome.tokens.size());
  }
}

TEST_CASE("stop tokens, max_tokens 0, and the end of the context") {
  const std::vector<int32_t> prompt = prompt_tokens(80);
  dsv3_request_options options = request_options();
  options.max_tokens = 30;
  options.ignore_eos = 1;
  const SessionHandle plain = make_session(shared().context.get());
  append(plain.get(), prompt);
  const Outcome whole = generate(plain.get(), options);

  SUBCASE("a stop token is part of the session and not of the text") {
    const int32_t stop = whole.tokens[12];
    const int32_t others[] = {stop, 9, 8, 7, 6, 5};  // in any order
    REQUIRE(stop > 9);
    options.stop_tokens = others;
    options.stop_token_count = 6;
    const SessionHandle session = make_session(shared().context.get());
    append(session.get(), prompt);
    const Outcome outcome = generate(session.get(), options);
    CHECK(outcome.reason == DSV3_FINISH_STOP_TOKEN);
    CHECK(outcome.stop_token == stop);
    REQUIRE(!outcome.tokens.empty());
    CHECK(outcome.tokens.back() == stop);
    CHECK(whole.text.compare(0, outcome.text.size(), outcome.text) == 0);
    CHECK(tokens_of(session.get()).back() == stop);
  }
  SUBCASE("the end-of-sentence token stops unless ignored") {
    dsv3_model_info info;
    info.struct_size = sizeof info;
    Error error;
    REQUIRE(dsv3_model_get_info(shared().model.get(), &info, error.out()) == DSV3_OK);
    const dsv3_logit_bias force = {info.eos_token_id, 1000};
    options.ignore_eos = 0;
    options.logit_bias = &force;
    options.logit_bias_count = 1;
    const SessionHandle session = make_session(shared().context.get());
    append(session.get(), prompt);
    const Outcome outcome = generate(session.get(), options);
    CHECK(outcome.reason == DSV3_FINISH_STOP_TOKEN);
    CHECK(outcome.tokens == std::vector<int32_t>{info.eos_token_id});
    CHECK(outcome.text.empty());
  }
  SUBCASE("max_tokens 0 warms up") {
    options.max_tokens = 0;
    const SessionHandle session = make_session(shared().context.get());
    append(session.get(), prompt);
    const Outcome outcome = generate(session.get(), options);
    CHECK(outcome.reason == DSV3_FINISH_MAX_TOKENS);
    CHECK(outcome.tokens.empty());
    CHECK(dsv3_session_computed(session.get()) == 80);
    CHECK(outcome.statistics.cached_tokens == 0);
    CHECK(generate(session.get(), options).statistics.cached_tokens == 79);  // all but the last
  }
  SUBCASE("the longest sequence") {
    std::vector<int32_t> longest(2045);
    for (size_t i = 0; i < longest.size(); ++i) longest[i] = prompt[i % prompt.size()];
    const SessionHandle session = make_session(shared().context.get());
    append(session.get(), longest);
    const Outcome outcome = generate(session.get(), options);
    CHECK(outcome.reason == DSV3_FINISH_CONTEXT_LENGTH);
    CHECK(outcome.tokens.size() == 3);
    CHECK(dsv3_session_length(session.get()) == 2048);
    const Outcome none = generate(session.get(), options);
    CHECK(none.reason == DSV3_FINISH_CONTEXT_LENGTH);
    CHECK(none.tokens.empty());
  }
}

TEST_CASE("a logits hook forces tokens and sees the sequence") {
  struct Forcer {
    std::vector<int32_t> script;
    size_t prompt = 0;
    bool wrong = false;
  } forcer{tokenize(shared().model.get(), "def forced(): pass\n"), 30, false};
  const SessionHandle session = make_session(shared().context.get());
  append(session.get(), prompt_tokens(30));
  dsv3_request_options options = sampled(forcer.script.size());
  options.logits_hook_user = &forcer;
  options.logits_hook = [](void* user, float* logits, uint64_t vocab, const int32_t* tokens,
                           uint64_t count) {
    auto* f = static_cast<Forcer*>(user);
    const size_t at = count - f->prompt;
    f->wrong = f->wrong || vocab != 4096 || at >= f->script.size() ||
               (at > 0 && tokens[count - 1] != f->script[at - 1]);
    for (uint64_t i = 0; i < vocab; ++i) {
      if (static_cast<int32_t>(i) != f->script[at]) logits[i] = -INFINITY;
    }
  };
  const Outcome outcome = generate(session.get(), options);
  CHECK(outcome.tokens == forcer.script);
  CHECK_FALSE(forcer.wrong);
  // Reported is the model's own probability, not the forced one.
  for (const float p : outcome.logprobs) CHECK(p < 0);
}

TEST_CASE("replace keeps the common prefix") {
  const SessionHandle session = make_session(shared().context.get());
  append(session.get(), prompt_tokens(150));
  dsv3_request_options warm = request_options();
  warm.max_tokens = 0;
  generate(session.get(), warm);
  std::vector<int32_t> changed = prompt_tokens(150);
  changed[100] ^= 1;
  uint64_t length = 0, kept = 0;
  Error error;
  REQUIRE(dsv3_session_append_tokens(session.get(), changed.data(), 120, DSV3_APPEND_REPLACE,
                                     &length, &kept, error.out()) == DSV3_OK);
  CHECK(length == 120);
  CHECK(kept == 100);
  CHECK(dsv3_session_computed(session.get()) == 100);
  changed.resize(120);
  CHECK(tokens_of(session.get()) == changed);
  const Outcome replaced = generate(session.get(), sampled());
  CHECK(replaced.statistics.cached_tokens == 100);
  const SessionHandle fresh = make_session(shared().context.get());
  append(fresh.get(), changed);
  check_same(generate(fresh.get(), sampled()), replaced);
}

TEST_CASE("complete: one call, the same as its parts") {
  const std::string source = python_text().substr(0, 600);
  const std::string prefix = source.substr(0, 400), suffix = source.substr(400);
  dsv3_request_options options = request_options();
  options.max_tokens = 24;
  char* text = nullptr;
  uint64_t length = 0;
  Error error;
  REQUIRE(dsv3_complete(shared().context.get(), prefix.data(), prefix.size(), suffix.data(),
                        suffix.size(), &options, &text, &length, error.out()) == DSV3_OK);
  const std::string completed(text, length);
  CHECK(std::strlen(text) == length);
  dsv3_string_free(text);

  const SessionHandle session = make_session(shared().context.get());
  REQUIRE(dsv3_session_append_fim(session.get(), prefix.data(), prefix.size(), suffix.data(),
                                  suffix.size(), 0, nullptr, nullptr, error.out()) == DSV3_OK);
  CHECK(generate(session.get(), options).text == completed);
  // Again from the shared session's cache, and from several threads at once.
  std::vector<std::thread> threads;
  std::vector<std::string> answers(4);
  for (size_t i = 0; i < answers.size(); ++i) {
    threads.emplace_back([&, i] {
      char* own = nullptr;
      if (dsv3_complete(shared().context.get(), prefix.c_str(), DSV3_NUL_TERMINATED, suffix.c_str(),
                        DSV3_NUL_TERMINATED, &options, &own, nullptr, nullptr) == DSV3_OK) {
        answers[i] = own;
      }
      dsv3_string_free(own);
    });
  }
  for (std::thread& t : threads) t.join();
  for (const std::string& answer : answers) CHECK(answer == completed);
  // Without a suffix: plain continuation.
  REQUIRE(dsv3_complete(shared().context.get(), "def add(a, b):\n", DSV3_NUL_TERMINATED, nullptr, 0,
                        &options, &text, nullptr, error.out()) == DSV3_OK);
  CHECK(std::strlen(text) > 0);
  dsv3_string_free(text);
}
