// Sessions that find what others have computed, and requests that give up their pages and resume:
// the same tokens and log-probabilities, to the bit, as one that computed everything alone.
#include <doctest/doctest.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "runtime/api/handles.h"
#include "tests/api/outcome_support.h"
#include "tests/api/request_support.h"

using namespace dsv3::test;            // NOLINT
using namespace dsv3::test::requests;  // NOLINT

namespace {

dsv3_request_options sampled(uint64_t max_tokens) {
  dsv3_request_options options = request_options();
  options.max_tokens = max_tokens;
  options.temperature = 0.8F;
  options.seed = 7;
  options.logprobs = 2;
  options.ignore_eos = 1;
  return options;
}

// Alone, without any cache.
Outcome reference(const std::vector<int32_t>& prompt, uint64_t max_tokens) {
  const SessionHandle session = make_session(shared().context.get());
  append(session.get(), prompt);
  return generate(session.get(), sampled(max_tokens));
}

uint64_t page_bytes() {
  dsv3_context_info info;
  info.struct_size = sizeof info;
  REQUIRE(dsv3_context_get_info(shared().context.get(), &info, nullptr) == DSV3_OK);
  return info.page_bytes;
}

void check_pages(dsv3_context* context) {
  const dsv3::Status status = context->engine->check_pages();
  CHECK_MESSAGE(status.ok(), status.message());
}

}  // namespace

TEST_CASE("a second session finds whole pages of the first, whoever it was") {
  const ContextHandle context = make_context(shared().model.get(), {.prefill_chunk = 100});
  const std::vector<int32_t> prompt = prompt_tokens(400);
  SessionHandle first = make_session(context.get());
  append(first.get(), prompt);
  const Outcome a = generate(first.get(), sampled(40));
  CHECK(a.statistics.cached_tokens == 0);
  first.reset();  // its pages stay
  check_same(a, reference(prompt, 40));

  // Of every length: nothing, whole pages, whole pages and the beginning of one, everything.
  for (const size_t length : {63, 64, 65, 128, 200, 384, 399, 400}) {
    CAPTURE(length);
    const std::vector<int32_t> part(prompt.begin(), prompt.begin() + static_cast<int64_t>(length));
    const SessionHandle session = make_session(context.get());
    append(session.get(), part);
    const Outcome b = generate(session.get(), sampled(70));
    // The last token's hidden state is computed again.
    CHECK(b.statistics.cached_tokens == std::min(length / 64 * 64, length - 1));
    check_same(b, reference(part, 70));
    check_pages(context.get());
  }
  // The same tokens after another beginning are other latents.
  std::vector<int32_t> changed = prompt;
  changed[70] ^= 1;
  const SessionHandle session = make_session(context.get());
  append(session.get(), changed);
  const Outcome c = generate(session.get(), sampled(40));
  CHECK(c.statistics.cached_tokens == 64);
  check_same(c, reference(changed, 40));
  check_pages(context.get());
}

TEST_CASE("writing into a page that others use") {
  const ContextHandle context = make_context(shared().model.get());
  const std::vector<int32_t> prompt = prompt_tokens(300);
  const SessionHandle one = make_session(context.get()), two = make_session(context.get());
  append(one.get(), prompt);
  append(two.get(), prompt);
  generate(one.get(), sampled(10));
  generate(two.get(), sampled(10));
  // Both share pages; one goes back into the middle of a page and goes on differently.
  REQUIRE(dsv3_session_truncate(one.get(), 100, nullptr) == DSV3_OK);
  append(one.get(), {5, 6, 7});
  std::vector<int32_t> other(prompt.begin(), prompt.begin() + 100);
  other.insert(other.end(), {5, 6, 7});
  check_same(generate(one.get(), sampled(60)), reference(other, 60));
  std::vector<int32_t> rest = tokens_of(two.get());
  check_same(generate(two.get(), sampled(60)), reference(rest, 60));
  check_pages(context.get());
}

TEST_CASE("a warm-up by an idle request serves an interactive one") {
  const ContextHandle context = make_context(shared().model.get());
  const std::vector<int32_t> prompt = prompt_tokens(500);
  const SessionHandle warm = make_session(context.get()), session = make_session(context.get());
  append(warm.get(), prompt);
  dsv3_request_options options = request_options();
  options.max_tokens = 0;
  options.priority = DSV3_PRIORITY_IDLE;
  CHECK(generate(warm.get(), options).reason == DSV3_FINISH_MAX_TOKENS);
  append(session.get(), prompt);
  const Outcome outcome = generate(session.get(), sampled(20));
  CHECK(outcome.statistics.cached_tokens == 448);
  check_same(outcome, reference(prompt, 20));
}

TEST_CASE("requests with the same prompt at the same time compute it once") {
  const ContextHandle context = make_context(shared().model.get(), {.prefill_chunk = 64});
  const std::vector<int32_t> prompt = prompt_tokens(1280);
  std::vector<SessionHandle> sessions;
  std::vector<RequestHandle> requests;
  for (int i = 0; i < 4; ++i) {
    sessions.push_back(make_session(context.get()));
    append(sessions.back().get(), prompt);
  }
  for (const SessionHandle& s : sessions) requests.push_back(start(s.get(), sampled(20)));
  const Outcome expected = reference(prompt, 20);
  uint64_t cached = 0;
  for (const RequestHandle& r : requests) {
    const Outcome outcome = finish(r.get());
    check_same(outcome, expected);
    cached += outcome.statistics.cached_tokens;
  }
  CHECK(cached > 2 * 1280);
  check_pages(context.get());
  dsv3_context_info info;
  info.struct_size = sizeof info;
  REQUIRE(dsv3_context_get_info(context.get(), &info, nullptr) == DSV3_OK);
  CHECK(info.pages_used <= 20 + 4);  // shared, but for the pages that are not full
}

TEST_CASE("the check of pages finds a session that lies and a page that is held for nobody") {
  const ContextHandle context = make_context(shared().model.get());
  const SessionHandle session = make_session(context.get());
  append(session.get(), prompt_tokens(200));
  generate(session.get(), sampled(2));
  const dsv3::Engine& engine = *context->engine;
  check_pages(context.get());
  dsv3::Session::State& state = session->session->state();
  const int64_t computed = state.computed;
  for (const int64_t wrong : {computed + 2, computed + 64}) {  // than it has tokens, pages
    state.computed = wrong;
    CHECK(engine.check_pages().code() == dsv3::Code::kInternal);
  }
  state.computed = computed;
  check_pages(context.get());
  {
    const dsv3::PageTable nobodys(state.table);  // holds the same pages once more
    const dsv3::Status status = engine.check_pages();
    CHECK(status.code() == dsv3::Code::kInternal);
    CHECK(status.message().find("references") != std::string::npos);
  }
  check_pages(context.get());
}

TEST_CASE("a lower class gives up its pages and resumes to the same bits") {
  const ContextHandle context =
      make_context(shared().model.get(), {.prefill_chunk = 64, .cache_bytes = 8 * page_bytes()});
  const std::vector<int32_t> prompt = prompt_tokens(300);
  std::vector<int32_t> other = prompt;
  other[0] ^= 1;
  const Outcome expected = reference(prompt, 150), expected_other = reference(other, 150);
  const SessionHandle low = make_session(context.get()), high = make_session(context.get());
  append(low.get(), prompt);
  append(high.get(), other);
  dsv3_request_options options = sampled(150);
  options.priority = DSV3_PRIORITY_BACKGROUND;
  const RequestHandle background = start(low.get(), options);
  // Until it generates.
  while (dsv3_session_length(low.get()) < 320) std::this_thread::yield();
  const Outcome b = generate(high.get(), sampled(150));  // 8 pages for it alone
  CHECK(b.reason == DSV3_FINISH_MAX_TOKENS);
  check_same(b, expected_other);
  check_pages(context.get());
  const Outcome a = finish(background.get());
  CHECK(a.reason == DSV3_FINISH_MAX_TOKENS);
  check_same(a, expected);
  check_pages(context.get());
}

TEST_CASE("equals: the last to come waits, and a newcomer without room is refused") {
  const ContextHandle context =
      make_context(shared().model.get(), {.prefill_chunk = 64, .cache_bytes = 8 * page_bytes()});
  std::vector<std::vector<int32_t>> prompts;
  std::vector<SessionHandle> sessions;
  for (int i = 0; i < 3; ++i) {
    prompts.push_back(prompt_tokens(i == 2 ? 300 : 100));
    prompts.back()[0] ^= i + 1;
    sessions.push_back(make_session(context.get()));
    append(sessions.back().get(), prompts.back());
  }
  // Together they need ten pages in the end.
  const RequestHandle first = start(sessions[0].get(), sampled(220));
  const RequestHandle second = start(sessions[1].get(), sampled(220));
  while (dsv3_session_length(sessions[1].get()) < 200) std::this_thread::yield();
  const Outcome refused = generate(sessions[2].get(), sampled(10));
  CHECK(refused.reason == DSV3_FINISH_ERROR);
  CHECK(refused.status == DSV3_E_CAPACITY);
  CHECK(refused.error_field == "cache_bytes");
  CHECK(refused.error_retryable);
  CHECK(refused.tokens.empty());
  CHECK(dsv3_session_length(sessions[2].get()) == 300);
  dsv3_context_statistics s;
  s.struct_size = sizeof s;
  REQUIRE(dsv3_context_get_statistics(context.get(), &s, nullptr) == DSV3_OK);
  CHECK(s.refusals == 1);
  check_same(finish(second.get()), reference(prompts[1], 220));
  check_same(finish(first.get()), reference(prompts[0], 220));
  check_same(generate(sessions[2].get(), sampled(10)), reference(prompts[2], 10));
  check_pages(context.get());
}

TEST_CASE("who does not read its events cannot block others out of the cache") {
  const ContextHandle context =
      make_context(shared().model.get(), {.prefill_chunk = 64, .cache_bytes = 6 * page_bytes()});
  const std::vector<int32_t> prompt = prompt_tokens(100);
  std::vector<int32_t> other = prompt;
  other[0] ^= 1;
  const SessionHandle slow = make_session(context.get()), quick = make_session(context.get());
  append(slow.get(), prompt);
  append(quick.get(), other);
  dsv3_request_options options = sampled(200);
  options.max_queued_events = 150;
  const RequestHandle paused = start(slow.get(), options);
  while (dsv3_session_length(slow.get()) < 230) std::this_thread::yield();
  check_same(generate(quick.get(), sampled(220)), reference(other, 220));
  check_same(finish(paused.get()), reference(prompt, 200));
  check_pages(context.get());
}
