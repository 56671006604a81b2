// The engine's loop, on a device that tells what it is asked to do: steps that fail, that are
// interrupted, and whose requests give up their pages.
#include <doctest/doctest.h>

#include <algorithm>
#include <chrono>
#include <functional>
#include <thread>

#include "runtime/engine/engine.h"
#include "runtime/engine/evaluation.h"
#include "runtime/engine/request.h"
#include "tests/golden/runner.h"
#include "tests/support/forwarding_device.h"

namespace dsv3 {
namespace {

class ProbedDevice final : public test::ForwardingDevice {
 public:
  using ForwardingDevice::ForwardingDevice;
  // Lanes' operations would not pass here.
  Result<std::unique_ptr<kernels::Device>> make_lane() const override {
    return std::unique_ptr<kernels::Device>();
  }
  void embed(const kernels::Matrix& table, std::span<const int32_t> ids, Dev<float> out,
             int64_t out_stride) override {
    at_layer_ = true;
    fails_ = begins && !begins(ids);
    inner_->embed(table, ids, out, out_stride);
  }
  void upload(Dev<std::byte> dst, const void* src, size_t bytes) override {
    if (!at_layer_ && goes_on) goes_on();
    at_layer_ = true;
    inner_->upload(dst, src, bytes);
  }
  void mla_attention(const kernels::MlaAttentionArgs& args) override {
    at_layer_ = false;
    if (attends) attends();
    inner_->mla_attention(args);
  }
  Status synchronize() override {
    if (std::exchange(fails_, false)) return Status(Code::kInternal, "the device failed");
    return inner_->synchronize();
  }

  // On the engine's thread; set before it has something to do.
  std::function<bool(std::span<const int32_t>)> begins;  // a step of these; false: it will fail
  std::function<void()> goes_on;  // an interrupted step, before its next layer
  std::function<void()> attends;  // in every layer

 private:
  bool fails_ = false;
  bool at_layer_ = true;  // nothing of a layer was computed since the step began or went on
};

struct Answer {
  std::vector<int32_t> tokens;
  Event last;
};

// One thread, so that every operation is called by the engine's.
struct Probed {
  explicit Probed(EngineOptions options = {}) {
    options.threads = 1;
    auto owned = std::make_unique<ProbedDevice>(test::device_of("", 1));
    device = owned.get();
    static const std::shared_ptr<const Model> model = test::open_model("tiny-coder");
    auto made = Engine::create(model, options, std::move(owned));
    REQUIRE_MESSAGE(made.ok(), made.status().message());
    engine = *made;
  }
  ~Probed() { engine->shutdown(); }

  // Prompts of different seeds have no page in common.
  std::shared_ptr<Session> session(size_t length, int32_t seed) const {
    std::vector<int32_t> tokens;
    for (size_t i = 0; i < length; ++i) {
      tokens.push_back(static_cast<int32_t>((i * 37 + i * i * 11) % 4000) + seed);
    }
    auto made = engine->create_session();
    REQUIRE(made.ok());
    AppendResult result;
    REQUIRE((*made)->append(tokens, /*replace=*/false, &result).ok());
    return *made;
  }
  static RequestOptions options(uint64_t max_tokens) {
    RequestOptions options;
    options.max_tokens = max_tokens;
    options.ignore_eos = true;
    options.speculation.mode = SpeculationMode::kOff;
    return options;
  }
  static std::shared_ptr<Request> start(const std::shared_ptr<Session>& session,
                                        const RequestOptions& options) {
    auto made = Request::start(session, options);
    REQUIRE_MESSAGE(made.ok(), made.status().message());
    return *made;
  }
  // What it starts, the engine plans at the same time.
  void between_steps(const std::function<void()>& work) const {
    REQUIRE(engine
                ->between_steps([&](kernels::Device*) -> Status {
                  work();
                  return {};
                })
                .ok());
  }
  static Answer finish(Request* request) {
    Answer answer;
    for (;;) {
      REQUIRE(request->next(std::numeric_limits<int64_t>::max(), &answer.last) ==
              EventQueue::Outcome::kEvent);
      if (answer.last.kind == EventKind::kFinished) return answer;
      for (const EventToken& token : answer.last.tokens) answer.tokens.push_back(token.id);
    }
  }

  std::shared_ptr<Engine> engine;
  ProbedDevice* device = nullptr;
};

TEST_CASE("of several requests whose step fails, those fail that do so alone") {
  constexpr int kRequests = 3;
  std::vector<Answer> expected;
  {
    const Probed f;
    for (int i = 0; i < kRequests; ++i) {
      const auto request = Probed::start(f.session(20, i), Probed::options(3));
      expected.push_back(Probed::finish(request.get()));
    }
  }
  const Probed f;
  std::vector<std::shared_ptr<Session>> sessions;
  std::vector<int32_t> firsts;  // tokens, that tell the prompts apart
  for (int i = 0; i < kRequests; ++i) {
    sessions.push_back(f.session(20, i));
    firsts.push_back(sessions.back()->state().tokens.front());
  }
  int guilty = -1;  // none: only the step of them all fails
  SUBCASE("none") {}
  SUBCASE("the first") { guilty = 0; }
  SUBCASE("the second") { guilty = 1; }
  SUBCASE("the last") { guilty = 2; }
  std::vector<size_t> prompts;  // rows of the steps with prompts
  f.device->begins = [&](std::span<const int32_t> ids) {
    if (ids.size() < 20) return true;
    prompts.push_back(ids.size());
    if (guilty < 0) return ids.size() == 20;
    return std::find(ids.begin(), ids.end(), firsts[static_cast<size_t>(guilty)]) == ids.end();
  };
  std::vector<std::shared_ptr<Request>> requests;
  f.between_steps([&] {
    for (const auto& session : sessions) {
      requests.push_back(Probed::start(session, Probed::options(3)));
    }
  });
  for (size_t i = 0; i < kRequests; ++i) {
    CAPTURE(i);
    const Answer answer = Probed::finish(requests[i].get());
    if (static_cast<int>(i) == guilty) {
      CHECK(answer.last.reason == FinishReason::kError);
      CHECK(answer.last.status.code() == Code::kInternal);
      CHECK(answer.last.status.message() == "the device failed");
      CHECK(sessions[i]->length() == 20);
      CHECK(sessions[i]->computed() == 0);
    } else {
      CHECK(answer.last.reason == FinishReason::kMaxTokens);
      CHECK(answer.tokens == expected[i].tokens);
      CHECK(sessions[i]->length() == 23);
    }
  }
  CHECK(prompts == std::vector<size_t>{60, 20, 20, 20});
  CHECK(f.engine->check_pages().ok());
}

// A moment in every layer: without it a whole step may be too short to be interrupted.
void take_time() { std::this_thread::sleep_for(std::chrono::milliseconds(1)); }

TEST_CASE("a step that goes on gets on by a layer however soon a better request comes") {
  const Probed f;
  const auto layers = static_cast<uint64_t>(f.engine->model().config().num_hidden_layers);
  f.device->attends = [&] {
    take_time();
    f.engine->wake_for(Priority::kInteractive);
  };
  uint64_t went_on = 0;
  f.device->goes_on = [&] {
    if (++went_on < 50) f.engine->wake_for(Priority::kInteractive);
  };
  RequestOptions options = Probed::options(0);
  options.priority = Priority::kBackground;
  const auto request = Probed::start(f.session(20, 1), options);
  CHECK(Probed::finish(request.get()).last.reason == FinishReason::kMaxTokens);
  const EngineStatistics s = f.engine->statistics();
  CHECK(s.steps == layers);
  CHECK(s.steps_abandoned == layers - 1);
  CHECK(s.rows == 20);
}

TEST_CASE("a slow consumer that makes room interrupts worse work like a new request") {
  const Probed f;
  const auto layers = static_cast<uint64_t>(f.engine->model().config().num_hidden_layers);
  RequestOptions slow = Probed::options(100), worse = Probed::options(0);
  slow.max_queued_events = 1;
  worse.priority = Priority::kBackground;
  const auto first = f.session(20, 1), second = f.session(20, 2);
  std::shared_ptr<Request> request, other;
  // The slow one's queue is full whenever the other one is computed.
  f.device->attends = [&] {
    take_time();
    Event event;
    while (request->next(1, &event) == EventQueue::Outcome::kEvent) {
    }
  };
  f.between_steps([&] {
    request = Probed::start(first, slow);
    other = Probed::start(second, worse);
  });
  CHECK(Probed::finish(other.get()).last.reason == FinishReason::kMaxTokens);
  CHECK(f.engine->statistics().steps_abandoned == layers - 1);
  request->cancel_now();  // its last step may still run, which uses what goes here
  CHECK(Probed::finish(request.get()).last.reason == FinishReason::kCancelled);
}

// Two prompts of ten pages each in fifteen pages, which are computed in turns: the second one gives
// up its pages in the middle of its prompt.
struct Crowded {
  explicit Crowded(bool prefix_cache) {
    EngineOptions options;
    options.prefill_chunk = 64;
    options.prefix_cache = prefix_cache;
    options.cache_bytes = 15 * Probed().engine->info().page_bytes;
    f.emplace(options);
    first = f->session(600, 1);
    second = f->session(600, 2);
  }
  std::optional<Probed> f;
  std::shared_ptr<Session> first, second;
};

TEST_CASE("what a request computed before it gave up its pages does not count as cached") {
  const Crowded c(/*prefix_cache=*/true);
  uint64_t rows = 0;
  c.f->device->begins = [&](std::span<const int32_t> ids) {
    rows += ids.size();
    return true;
  };
  std::shared_ptr<Request> one, two;
  c.f->between_steps([&] {
    one = Probed::start(c.first, Probed::options(0));
    two = Probed::start(c.second, Probed::options(0));
  });
  CHECK(Probed::finish(one.get()).last.statistics.preemptions == 0);
  const RequestStatistics s = Probed::finish(two.get()).last.statistics;
  CHECK(s.preemptions == 1);
  CHECK(s.prompt_tokens == 600);
  CHECK(s.cached_tokens == 0);
  CHECK(rows > 1200);
  CHECK(rows < 1600);  // it found most of it again
}

struct Watched {
  std::shared_ptr<Request> request;
  std::vector<uint64_t> done;
  // After each step, on the engine's thread: nothing is skipped.
  static void notify(void* user) {
    auto* self = static_cast<Watched*>(user);
    Event event;
    while (self->request->next(1, &event) == EventQueue::Outcome::kEvent) {
      if (event.kind == EventKind::kProgress) self->done.push_back(event.prompt_done);
    }
  }
};

TEST_CASE("a prompt's progress never goes back") {
  const Crowded c(/*prefix_cache=*/false);
  SUBCASE("of a request") {
    Watched two;
    RequestOptions options = Probed::options(2);
    options.notify = Watched::notify;
    options.notify_user = &two;
    std::shared_ptr<Request> one;
    c.f->between_steps([&] {
      one = Probed::start(c.first, Probed::options(0));
      two.request = Probed::start(c.second, options);
    });
    (void)Probed::finish(one.get());
    while (two.request->statistics().generated_tokens < 2) std::this_thread::yield();
    two.request->release();  // no call from here on
    CHECK(c.f->engine->statistics().cache.preemptions == 1);
    CHECK(two.done.size() > 10);
    CHECK(std::is_sorted(two.done.begin(), two.done.end()));
    CHECK(two.done.back() == 600);
  }
  SUBCASE("of an evaluation") {
    // The caller sees it after nearly every step.
    c.f->device->begins = [](std::span<const int32_t>) {
      take_time();
      return true;
    };
    const std::vector<int32_t> tokens = c.second->state().tokens;
    REQUIRE(c.second->truncate(0).ok());
    std::vector<uint64_t> done;
    EvaluateOptions options;
    options.progress = [&](uint64_t count, uint64_t) { done.push_back(count); };
    Status status;
    std::shared_ptr<Request> one;
    std::thread caller;
    c.f->between_steps([&] {
      one = Probed::start(c.first, Probed::options(0));
      caller = std::thread([&] { status = evaluate(c.second, tokens, options); });
      for (int i = 0; i < 10'000 && c.f->engine->info().requests_waiting < 2; ++i) take_time();
    });
    (void)Probed::finish(one.get());
    caller.join();
    CHECK(status.ok());
    CHECK(c.f->engine->statistics().cache.preemptions == 1);
    CHECK(std::is_sorted(done.begin(), done.end()));
    CHECK(done.back() == 600);
  }
}

TEST_CASE("decoding takes as long as all its tokens do") {
  const Probed f;
  RequestOptions options = Probed::options(10);
  options.logits_hook = [](void*, float*, uint64_t, const int32_t*, uint64_t) {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
  };
  const auto request = Probed::start(f.session(20, 1), options);
  const RequestStatistics s = Probed::finish(request.get()).last.statistics;
  CHECK(s.decode_ns >= 9 * 3'000'000);
  CHECK(s.total_ns >= s.first_token_ns + s.decode_ns);
}

}  // namespace
}  // namespace dsv3
