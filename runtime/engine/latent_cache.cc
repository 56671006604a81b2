#include "runtime/engine/latent_cache.h"

#include <algorithm>
#include <new>

#include "runtime/base/checked.h"

namespace dsv3 {
namespace {

constexpr int64_t kPageTokens = kernels::kLatentPageTokens;

int64_t pages_of(const Task& task) {
  const auto length = static_cast<int64_t>(task.session().state().tokens.size());
  return ceil_div(length + 1, kPageTokens);
}

PageTokens page_tokens(const Session::State& s, int64_t page) {
  return PageTokens(s.tokens.data() + page * kPageTokens, static_cast<size_t>(kPageTokens));
}

// Where neither is paused.
bool goes_first(const Task& a, const Task& b) {
  return a.priority() != b.priority() ? a.priority() < b.priority() : a.order < b.order;
}

void drop_pages(Session* session) noexcept {
  Session::State& s = session->state();
  s.computed = 0;
  s.table.truncate(0);
  session->publish();
}

}  // namespace

LatentCache::LatentCache(kernels::Device* device, size_t page_bytes, int64_t pages,
                         bool share_prefixes, uint64_t seed)
    : pool_(device, page_bytes, pages), share_(share_prefixes), index_(&pool_, seed) {
  marks_.reserve(static_cast<size_t>(pages));
}

void LatentCache::add(Session* session) { sessions_.push_back(session); }

void LatentCache::remove(Session* session) noexcept {
  session->state().table.truncate(0);
  std::erase(sessions_, session);
}

int64_t LatentCache::attach(Session* session, int64_t limit) {
  Session::State& s = session->state();
  const int64_t before = s.computed;
  const auto length = static_cast<int64_t>(s.tokens.size());
  int64_t at = s.computed / kPageTokens;
  if (!share_ || at * kPageTokens >= limit) return 0;
  PageId page = at == 0 ? kNoPage : s.table.page(at - 1);
  if (at > 0 && !index_.contains(page)) return 0;
  for (; at * kPageTokens < limit && (at + 1) * kPageTokens <= length; ++at) {
    const PageId found = index_.find(page, page_tokens(s, at));
    if (found == kNoPage) break;
    page = found;
    const int64_t end = std::min((at + 1) * kPageTokens, limit);
    if (end <= s.computed) continue;
    s.table.share(at, page);
    s.computed = end;
    ++counters_.prefix_hits;
  }
  if (s.computed == before) return 0;
  mark_high_water();
  index_.touch(page);
  session->publish();
  return s.computed - before;
}

void LatentCache::keep(Session* session) noexcept {
  Session::State& s = session->state();
  const int64_t full = s.computed / kPageTokens;
  if (!share_ || full == 0 || index_.contains(s.table.page(full - 1))) return;
  int64_t at = full - 1;
  while (at > 0 && !index_.contains(s.table.page(at - 1))) --at;
  try {
    for (; at < full; ++at) {
      const PageId parent = at == 0 ? kNoPage : s.table.page(at - 1);
      const PageId own = s.table.page(at);
      const PageId kept = index_.insert(parent, page_tokens(s, at), own);
      if (kept != own) s.table.share(at, kept);  // computed twice at once: one suffices
    }
  } catch (const std::bad_alloc&) {
    // Not found again, then.
  }
}

Result<PageId> LatentCache::take_spare() {
  for (;;) {
    Result<PageId> page = pool_.take();
    if (page.ok() || page.status().code() != Code::kCapacity) return page;
    if (!index_.evict()) return kNoPage;
    ++counters_.evictions;
  }
}

void LatentCache::touch(Session* session) noexcept {
  Session::State& s = session->state();
  s.last_used = ++clock_;
  const int64_t full = s.computed / kPageTokens;
  if (full > 0 && index_.contains(s.table.page(full - 1))) index_.touch(s.table.page(full - 1));
}

bool LatentCache::outranks(const Task& a, const Task& b) {
  const bool a_paused = a.paused(), b_paused = b.paused();
  return a_paused != b_paused ? b_paused : goes_first(a, b);
}

// When `task` wants to begin or to come back.
bool LatentCache::keeps_pages(const Task& other, const Task& task) {
  if (outranks(other, task)) return true;
  return task.stalled && goes_first(other, task) && !other.paused_for(kPatienceNs);
}

// Marks the table's pages; returns how many were not marked before.
int64_t LatentCache::mark(const PageTable& table) {
  int64_t count = 0;
  for (int64_t i = 0; i < table.size(); ++i) {
    uint8_t& mark = marks_[static_cast<size_t>(table.page(i))];
    count += mark == 0 ? 1 : 0;
    mark = 1;
  }
  return count;
}

bool LatentCache::fits(const Task& task, Tasks tasks, int64_t spare) {
  marks_.assign(static_cast<size_t>(pool_.capacity()), 0);
  int64_t held = 0;  // by who does not give way to the task
  bool alone = true;
  for (const Session* session : sessions_) {
    if (session->state().pins == 0) continue;
    alone = false;
    held += mark(session->state().table);
  }
  for (const auto& other : tasks) {
    if (other.get() == &task || !keeps_pages(*other, task)) continue;
    alone = false;
    // Who waits in front of it takes its pages first.
    held += other->stalled ? pages_of(*other) : mark(other->session().state().table);
  }
  if (alone) return true;
  int64_t needed = pages_of(task) + spare;
  const PageTable& table = task.session().state().table;
  for (int64_t i = 0; i < table.size(); ++i) needed -= marks_[static_cast<size_t>(table.page(i))];
  return needed <= pool_.capacity() - held;
}

// A page that the task writes to and that only the index knows beside it need not be copied.
bool LatentCache::forget_own(const PageTable& table, int64_t begin, int64_t end) {
  const int64_t last = std::min(ceil_div(end, kPageTokens), table.size());
  for (int64_t i = last; i-- > begin / kPageTokens;) {
    const PageId page = table.page(i);
    if (pool_.references(page) == 2 && index_.contains(page) && index_.erase(page)) return true;
  }
  return false;
}

bool LatentCache::drop_idle() noexcept {
  Session* oldest = nullptr;
  for (Session* session : sessions_) {
    const Session::State& s = session->state();
    if (s.running != nullptr || s.pins > 0 || s.table.size() == 0) continue;
    if (oldest == nullptr || s.last_used < oldest->state().last_used) oldest = session;
  }
  if (oldest == nullptr) return false;
  drop_pages(oldest);
  ++counters_.dropped;
  return true;
}

void LatentCache::preempt(Task* task) noexcept {
  drop_pages(&task->session());
  task->stalled = true;
  ++task->preemptions;
  ++counters_.preemptions;
}

bool LatentCache::preempt_below(const Task& task, Tasks tasks) noexcept {
  Task* lowest = nullptr;
  for (const auto& other : tasks) {
    if (other.get() == &task || other->session().state().table.size() == 0) continue;
    if (!outranks(task, *other)) continue;
    if (lowest == nullptr || outranks(*lowest, *other)) lowest = other.get();
  }
  if (lowest == nullptr) return false;
  preempt(lowest);
  return true;
}

// One step of it, at nobody's cost who works; false: there is none left.
bool LatentCache::make_room(const PageTable& table, int64_t begin, int64_t end) noexcept {
  if (index_.evict()) {
    ++counters_.evictions;
    return true;
  }
  return forget_own(table, begin, end) || drop_idle();
}

Status LatentCache::take(PageTable* table, int64_t begin, int64_t end) {
  const bool takes_pages = table->pages_needed(begin, end) > 0;
  DSV3_TRY(table->make_writable(begin, end));
  if (takes_pages) mark_high_water();
  return {};
}

// Walks the index: not for steps that take no pages.
void LatentCache::mark_high_water() {
  counters_.high_water = std::max(counters_.high_water, in_use());
}

Status LatentCache::reserve_free(Session* session, int64_t begin, int64_t end) {
  return take(&session->state().table, begin, end);
}

Status LatentCache::reserve(Session* session, int64_t begin, int64_t end) {
  PageTable& table = session->state().table;
  while (table.pages_needed(begin, end) > pool_.available()) {
    if (!make_room(table, begin, end)) break;
  }
  return take(&table, begin, end);
}

Status LatentCache::reserve(Task* task, int64_t begin, int64_t least, int64_t* end, Tasks tasks) {
  PageTable& table = task->session().state().table;
  while (table.pages_needed(begin, *end) > pool_.available()) {
    if (make_room(table, begin, *end)) continue;
    if (*end > least) {
      *end = least;
    } else if (!preempt_below(*task, tasks)) {
      break;  // take() says what is missing
    }
  }
  DSV3_TRY(take(&table, begin, *end));
  task->most_pages = std::max(task->most_pages, static_cast<uint64_t>(table.size()));
  return {};
}

Task* LatentCache::first_stalled(Tasks tasks) {
  Task* first = nullptr;
  for (const auto& task : tasks) {
    if (!task->stalled || task->paused()) continue;
    if (first == nullptr || outranks(*task, *first)) first = task.get();
  }
  return first;
}

bool LatentCache::others_run(const Task& task, Tasks tasks) const {
  const bool pinned = std::any_of(sessions_.begin(), sessions_.end(),
                                  [](const Session* s) { return s->state().pins > 0; });
  return pinned || std::any_of(tasks.begin(), tasks.end(), [&](const auto& other) {
           return other.get() != &task && !other->stalled && !other->paused() &&
                  other->session().state().table.size() > 0;
         });
}

Status LatentCache::check() const {
  if (!pool_.is_valid()) return Status(Code::kInternal, "the page pool is not valid");
  if (!index_.is_valid()) return Status(Code::kInternal, "the prefix index is not valid");
  std::vector<int32_t> references(static_cast<size_t>(pool_.capacity()), 0);
  index_.for_each(
      [&](PageId page, PageId, PageTokens, uint64_t) { ++references[static_cast<size_t>(page)]; });
  int64_t used = 0;
  for (const Session* session : sessions_) {
    const Session::State& s = session->state();
    if (s.computed > static_cast<int64_t>(s.tokens.size()) ||
        ceil_div(s.computed, kPageTokens) > s.table.size()) {
      return make_error(Code::kInternal, "a session of %zu tokens and %lld pages has %lld computed",
                        s.tokens.size(), static_cast<long long>(s.table.size()),
                        static_cast<long long>(s.computed));
    }
    for (int64_t i = 0; i < s.table.size(); ++i) {
      ++references[static_cast<size_t>(s.table.page(i))];
    }
  }
  for (size_t page = 0; page < references.size(); ++page) {
    if (references[page] == 0) continue;
    ++used;
    const int32_t counted = pool_.references(static_cast<PageId>(page));
    if (counted != references[page]) {
      return make_error(Code::kInternal, "page %zu counts %d references, %d are there", page,
                        counted, references[page]);
    }
  }
  if (used != pool_.used() || used > pool_.capacity()) {
    return make_error(Code::kInternal, "%lld pages are held, the pool counts %lld of %lld",
                      static_cast<long long>(used), static_cast<long long>(pool_.used()),
                      static_cast<long long>(pool_.capacity()));
  }
  return {};
}

}  // namespace dsv3
