// DSV3_PROMPT_EXPANDED: nearly the same numbers as by default, and what of the promises still
// holds.
#include <doctest/doctest.h>

#include <cmath>

#include "tests/api/outcome_support.h"
#include "tests/api/request_support.h"

using namespace dsv3::test;            // NOLINT
using namespace dsv3::test::requests;  // NOLINT

namespace {

ContextHandle expanded(ContextConfig config = {}) {
  config.prompt_attention = DSV3_PROMPT_EXPANDED;
  return make_context(shared().model.get(), config);
}

dsv3_request_options answer(int32_t speculation = DSV3_SPECULATION_OFF) {
  dsv3_request_options options = request_options();
  options.max_tokens = 60;
  options.temperature = 0.8F;
  options.seed = 11;
  options.ignore_eos = 1;
  options.logprobs = 0;
  options.speculation = speculation;
  return options;
}

}  // namespace

TEST_CASE("a context that expands says so, and is as near to the model") {
  dsv3_context_info info;
  info.struct_size = sizeof info;
  const ContextHandle context = expanded();
  REQUIRE(dsv3_context_get_info(context.get(), &info, nullptr) == DSV3_OK);
  CHECK(info.bit_identical == 0);
  // The best token after prompts of some lengths, and its log-probability.
  int differ = 0;
  for (const size_t prompt : {100, 400, 1200}) {
    CAPTURE(prompt);
    dsv3_request_options options = answer();
    options.max_tokens = 1;
    options.temperature = 0;
    const Outcome fast = generate(session_with(prompt, context.get()).get(), options);
    const Outcome exact = generate(session_with(prompt).get(), options);
    CHECK(fast.tokens == exact.tokens);
    REQUIRE(fast.logprobs.size() == 1);
    CHECK(std::abs(fast.logprobs[0] - exact.logprobs[0]) < 0.02F);
    differ += same_bits(fast.logprobs, exact.logprobs) ? 0 : 1;
  }
  CHECK(differ > 0);  // or nothing was expanded
}

TEST_CASE(
    "expanded: any number of threads, and an answer's own speculation, leave every bit as it is") {
  const ContextHandle one = expanded({.threads = 1}), three = expanded({.threads = 3});
  const Outcome plain = generate(session_with(700, one.get()).get(), answer());
  REQUIRE(plain.tokens.size() == 60);
  check_same(generate(session_with(700, three.get()).get(), answer()), plain);
  const ContextHandle fresh = expanded();
  const SessionHandle session = session_with(700, fresh.get());
  dsv3_request_options drafting = answer(DSV3_SPECULATION_ALWAYS);
  drafting.max_draft_tokens = 64;
  drafting.reference_text = plain.text.c_str();
  drafting.reference_text_length = plain.text.size();
  const Outcome drafted = generate(session.get(), drafting);
  check_same(drafted, plain);
  CHECK(drafted.statistics.accepted_tokens >= 32);
}

TEST_CASE("latents of expanded prompts stay among contexts that expand") {
  const TemporaryFolder folder;
  const std::string path = folder.file("a.session");
  const ContextHandle context = expanded();
  const SessionHandle session = session_with(300, context.get());
  (void)generate(session.get(), answer());
  Error error;
  dsv3_session_io io = io_for(path);
  REQUIRE_MESSAGE(dsv3_session_save(session.get(), &io, error.out()) == DSV3_OK, error.message());
  const Outcome next = generate(session.get(), answer());

  dsv3_session* loaded = nullptr;
  const ContextHandle other = make_context(shared().model.get());
  CHECK(dsv3_session_load(other.get(), &io, &loaded, error.out()) == DSV3_E_UNSUPPORTED);
  CHECK(loaded == nullptr);
  CHECK(error.field() == "kernels");
  CHECK(error.message().find("+expanded\"") != std::string::npos);

  const ContextHandle same = expanded();
  REQUIRE_MESSAGE(dsv3_session_load(same.get(), &io, &loaded, error.out()) == DSV3_OK,
                  error.message());
  check_same(generate(SessionHandle(loaded).get(), answer()), next);
}

TEST_CASE("nor do prefixes on disk cross over") {
  const TemporaryFolder folder;
  const std::string path = folder.file("cache");
  const auto cached = [&](int32_t prompt_attention) {
    const ContextHandle context =
        make_context(shared().model.get(),
                     {.disk_cache_dir = path.c_str(), .prompt_attention = prompt_attention});
    return generate(session_with(300, context.get()).get(), answer()).statistics.cached_tokens;
  };
  CHECK(cached(DSV3_PROMPT_EXPANDED) == 0);
  CHECK(cached(DSV3_PROMPT_LATENT) == 0);
  CHECK(cached(DSV3_PROMPT_EXPANDED) == 256);
  CHECK(cached(DSV3_PROMPT_LATENT) == 256);
}
