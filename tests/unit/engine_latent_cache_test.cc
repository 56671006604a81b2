// Who gives way when the page budget is spent, and in what order; what is found again.
#include <doctest/doctest.h>

#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include "runtime/engine/engine.h"
#include "runtime/engine/latent_cache.h"
#include "runtime/model/synthetic.h"

namespace dsv3 {
namespace {

constexpr int64_t kPage = kernels::kLatentPageTokens;

// What the cache asks of a task, and nothing more.
class Waiter final : public Task {
 public:
  Waiter(std::shared_ptr<Session> session, Priority priority)
      : Task(std::move(session), priority, nullptr, std::numeric_limits<int64_t>::max()) {}
  bool paused() const override { return paused_ns >= 0; }
  bool paused_for(int64_t ns) const override { return paused_ns >= ns; }
  int64_t first_logits() const override { return 0; }
  int64_t reusable() const override { return 0; }
  Status commit(const StepRun&, Finish*) override { return {}; }
  void finished(Finish*) noexcept override {}

  int64_t paused_ns = -1;  // not
};

// A cache of eight pages. The engine is there for the sessions' sake: it never hears of their
// tokens, and nobody else looks at them.
struct Fixture {
  Fixture() : device(std::move(*kernels::make_device({.kernels = "ref", .threads = 1}))) {
    Result<ModelConfig> config = synthetic_config("tiny", 1);
    REQUIRE(config.ok());
    Result<std::shared_ptr<const Model>> model = Model::synthesise(*config, {});
    REQUIRE(model.ok());
    EngineOptions options;
    options.threads = 1;
    Result<std::shared_ptr<Engine>> made = Engine::create(*model, options);
    REQUIRE(made.ok());
    engine = *made;
    cache = std::make_unique<LatentCache>(device.get(), 256, 8, /*share_prefixes=*/true, 1);
  }
  ~Fixture() {
    const Status status = cache->check();
    CHECK_MESSAGE(status.ok(), status.message());
    tasks.clear();
    while (!sessions.empty()) free(sessions.back());
    engine->shutdown();
  }
  // `length` tokens, all of them `value`, of which the first `computed` are computed.
  std::shared_ptr<Session> session(int64_t length, int32_t value, int64_t computed = 0) {
    auto made = std::make_shared<Session>(engine, PageTable(&cache->pool()));
    made->state().tokens.assign(static_cast<size_t>(length), value);
    cache->add(made.get());
    sessions.push_back(made);
    if (computed > 0) {
      REQUIRE(cache->reserve(made.get(), 0, computed).ok());
      made->state().computed = computed;
      cache->touch(made.get());
    }
    return made;
  }
  void free(const std::shared_ptr<Session>& session) {
    const std::shared_ptr<Session> last = session;
    cache->remove(last.get());
    std::erase(sessions, last);
  }
  // Kept for sessions to come.
  void keep_pages(int64_t count, int32_t value) {
    const auto made = session(count * kPage, value, count * kPage);
    cache->keep(made.get());
    free(made);
  }
  int64_t pages_found(int32_t value) {
    const auto made = session(8 * kPage, value);
    const int64_t found = cache->attach(made.get(), 8 * kPage) / kPage;
    free(made);
    return found;
  }
  Waiter* task(const std::shared_ptr<Session>& session, Priority priority) {
    const auto made = std::make_shared<Waiter>(session, priority);
    made->order = tasks.size() + 1;
    session->state().running = made.get();
    tasks.push_back(made);
    return made.get();
  }
  Status reserve(Task* task, int64_t begin, int64_t least, int64_t* end) {
    return cache->reserve(task, begin, least, end, tasks);
  }
  Status reserve(Task* task, int64_t begin, int64_t end) { return reserve(task, begin, end, &end); }
  static int64_t pages_of(const std::shared_ptr<Session>& s) { return s->state().table.size(); }

  std::unique_ptr<kernels::Device> device;
  std::shared_ptr<Engine> engine;
  std::unique_ptr<LatentCache> cache;
  std::vector<std::shared_ptr<Session>> sessions;
  std::vector<std::shared_ptr<Task>> tasks;
};

TEST_CASE_FIXTURE(Fixture, "kept pages go in the order of their last use") {
  keep_pages(2, 1);
  const auto held = session(2 * kPage, 2, 2 * kPage);
  cache->keep(held.get());
  keep_pages(2, 3);
  int32_t oldest = 1, recent = 2;
  SUBCASE("what was found was used") {
    CHECK(pages_found(1) == 2);
    std::swap(oldest, recent);
  }
  SUBCASE("so was what the session holds that ran last") { cache->touch(held.get()); }
  free(held);
  const auto large = session(5 * kPage, 4, 5 * kPage);  // six are kept, of eight
  CHECK(cache->counters().evictions == 3);
  CHECK(pages_found(oldest) == 0);
  CHECK(pages_found(3) == 1);  // the end of a chain goes before its beginning
  CHECK(pages_found(recent) == 2);
}

TEST_CASE_FIXTURE(Fixture, "nothing is found after a page that is not in the index") {
  const auto own = session(3 * kPage, 1, kPage);
  CHECK(cache->attach(own.get(), 3 * kPage) == 0);
  keep_pages(3, 1);
  CHECK(cache->attach(own.get(), 3 * kPage) == 0);
  CHECK(own->state().computed == kPage);
}

TEST_CASE_FIXTURE(Fixture, "what is found counts as held, in the high-water mark too") {
  keep_pages(2, 1);
  keep_pages(3, 2);
  CHECK(cache->counters().high_water == 3);
  CHECK(cache->in_use() == 0);
  const auto one = session(2 * kPage, 1), two = session(3 * kPage, 2);
  CHECK(cache->attach(one.get(), 2 * kPage - 1) == 2 * kPage - 1);
  CHECK(cache->attach(two.get(), 3 * kPage) == 3 * kPage);
  CHECK(cache->counters().prefix_hits == 5);
  CHECK(cache->in_use() == 5);
  CHECK(cache->counters().high_water == 5);
}

TEST_CASE_FIXTURE(Fixture, "first nobody's pages, then idle sessions', then drafts, then tasks") {
  keep_pages(1, 1);
  const auto old = session(kPage, 2, kPage), recent = session(kPage, 3, kPage);
  const auto pinned = session(kPage, 4, kPage);
  ++pinned->state().pins;
  const auto low = session(2 * kPage, 5, 2 * kPage);
  Waiter* const background = task(low, Priority::kBackground);
  const auto high = session(2 * kPage, 6);
  Waiter* const interactive = task(high, Priority::kInteractive);

  REQUIRE(reserve(interactive, 0, 2 * kPage).ok());  // there are two
  CHECK(cache->counters().evictions == 0);
  REQUIRE(reserve(interactive, 2 * kPage, 3 * kPage).ok());
  CHECK(cache->counters().evictions == 1);
  CHECK(pages_of(old) == 1);
  REQUIRE(reserve(interactive, 3 * kPage, 4 * kPage).ok());
  CHECK(pages_of(old) == 0);
  CHECK(pages_of(recent) == 1);
  int64_t end = 7 * kPage;  // with a draft of two pages
  REQUIRE(reserve(interactive, 4 * kPage, 5 * kPage, &end).ok());
  CHECK(end == 5 * kPage);
  CHECK(pages_of(recent) == 0);
  CHECK(recent->state().computed == 0);
  CHECK(cache->counters().dropped == 2);
  CHECK_FALSE(background->stalled);
  REQUIRE(reserve(interactive, 5 * kPage, 6 * kPage).ok());
  CHECK(background->stalled);
  CHECK(background->preemptions == 1);
  CHECK(cache->counters().preemptions == 1);
  REQUIRE(reserve(interactive, 6 * kPage, 7 * kPage).ok());
  CHECK(interactive->most_pages == 7);
  CHECK(reserve(interactive, 7 * kPage, 8 * kPage).code() == Code::kCapacity);
  CHECK(pages_of(pinned) == 1);
  CHECK(cache->counters().high_water == 8);
}

TEST_CASE_FIXTURE(Fixture, "a page that only the index holds beside its writer is not copied") {
  const auto idle = session(kPage, 1, kPage);
  const auto own = session(7 * kPage, 2, 7 * kPage);
  cache->keep(own.get());
  own->state().computed = 7 * kPage - 1;
  Waiter* const writer = task(own, Priority::kInteractive);
  REQUIRE(reserve(writer, 7 * kPage - 1, 7 * kPage).ok());
  CHECK(pages_of(idle) == 1);
  CHECK(pages_found(2) == 6);
  // One that another session holds as well has to be.
  const auto copy = std::make_shared<Session>(engine, PageTable(own->state().table));
  cache->add(copy.get());
  sessions.push_back(copy);
  copy->state().tokens = own->state().tokens;
  ++copy->state().pins;
  REQUIRE(reserve(writer, 7 * kPage - 1, 7 * kPage).ok());
  CHECK(pages_of(idle) == 0);
  CHECK(copy->state().table.page(6) != own->state().table.page(6));
}

TEST_CASE_FIXTURE(Fixture, "of several tasks the one of the lowest rank gives way") {
  const auto first = session(kPage, 1, kPage), second = session(kPage, 2, kPage);
  const auto third = session(kPage, 3, kPage), fourth = session(kPage, 4, kPage);
  const auto fifth = session(kPage, 5, kPage), last = session(kPage, 6);
  Waiter* const paused = task(first, Priority::kInteractive);
  paused->paused_ns = 0;
  Waiter* const background = task(second, Priority::kBackground);
  Waiter* const idle = task(third, Priority::kIdle);
  Waiter* const older = task(fourth, Priority::kInteractive);
  Waiter* const later = task(fifth, Priority::kBackground);
  Waiter* const taker = task(last, Priority::kInteractive);
  REQUIRE(reserve(taker, 0, 3 * kPage).ok());  // what is free
  int64_t have = 3 * kPage;
  for (const Waiter* next : {paused, idle, later, background}) {
    CHECK_FALSE(next->stalled);
    REQUIRE(reserve(taker, have, have + kPage).ok());
    have += kPage;
    CHECK(next->stalled);
  }
  CHECK(reserve(taker, have, have + kPage).code() == Code::kCapacity);
  CHECK_FALSE(older->stalled);
  CHECK(older->preemptions == 0);
  // Who comes back first: not who is paused, however high.
  CHECK(LatentCache::first_stalled(tasks) == background);
  background->paused_ns = 0;
  CHECK(LatentCache::first_stalled(tasks) == later);
  paused->paused_ns = -1;
  CHECK(LatentCache::first_stalled(tasks) == paused);
  for (Waiter* all : {paused, background, idle, later}) all->paused_ns = 0;
  CHECK(LatentCache::first_stalled(tasks) == nullptr);
}

TEST_CASE_FIXTURE(Fixture, "a spare page is nobody's, or one that was only kept") {
  const auto idle = session(7 * kPage, 1, 7 * kPage);
  keep_pages(1, 2);
  const Result<PageId> kept = cache->take_spare();
  REQUIRE(kept.ok());
  CHECK(kept.value() != kNoPage);
  CHECK(cache->counters().evictions == 1);
  const Result<PageId> none = cache->take_spare();
  REQUIRE(none.ok());
  CHECK(none.value() == kNoPage);
  CHECK(pages_of(idle) == 7);
  cache->pool().release(kept.value());
}

TEST_CASE_FIXTURE(Fixture, "who fits: beside those that need not give way") {
  const auto own = session(5 * kPage - 1, 1);  // five pages with the token that comes next
  Waiter* const wants = task(own, Priority::kBackground);
  CHECK(cache->fits(*wants, tasks, 8));  // alone
  const auto other = session(3 * kPage, 2, 3 * kPage);
  CHECK(cache->fits(*wants, tasks, 8));  // an idle session gives way
  SUBCASE("pages that are being copied") {
    ++other->state().pins;
    CHECK(cache->fits(*wants, tasks, 0));
    CHECK_FALSE(cache->fits(*wants, tasks, 1));
    own->state().tokens.push_back(1);
    CHECK_FALSE(cache->fits(*wants, tasks, 0));
    // What it shares with them it has.
    PageTable shared(other->state().table);
    own->state().table.swap(shared);
    CHECK(cache->fits(*wants, tasks, 2));
    CHECK_FALSE(cache->fits(*wants, tasks, 3));
  }
  SUBCASE("a better one's") {
    Waiter* const better = task(other, Priority::kInteractive);
    CHECK(cache->fits(*wants, tasks, 0));
    CHECK_FALSE(cache->fits(*wants, tasks, 1));
    cache->preempt(better);  // it comes back before anybody else, for four pages
    CHECK_FALSE(cache->fits(*wants, tasks, 0));
  }
  SUBCASE("a worse one's") {
    task(other, Priority::kIdle);
    CHECK(cache->fits(*wants, tasks, 3));
  }
  SUBCASE("a better one's whose consumer is behind") {
    Waiter* const paused = task(other, Priority::kInteractive);
    paused->paused_ns = 0;
    CHECK(cache->fits(*wants, tasks, 3));
    wants->stalled = true;  // not again and again at its cost
    CHECK_FALSE(cache->fits(*wants, tasks, 3));
    paused->paused_ns = LatentCache::kPatienceNs;
    CHECK(cache->fits(*wants, tasks, 3));
  }
}

TEST_CASE_FIXTURE(Fixture, "who waits for room is not alone while pages will be given back") {
  const auto own = session(kPage, 1, kPage), other = session(kPage, 2, kPage);
  Waiter* const waits = task(own, Priority::kInteractive);
  CHECK_FALSE(cache->others_run(*waits, tasks));  // an idle session is none
  ++other->state().pins;
  CHECK(cache->others_run(*waits, tasks));
  --other->state().pins;
  Waiter* const runs = task(other, Priority::kIdle);
  CHECK(cache->others_run(*waits, tasks));
  runs->paused_ns = 0;
  CHECK_FALSE(cache->others_run(*waits, tasks));
}

}  // namespace
}  // namespace dsv3
