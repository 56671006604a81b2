// The context's latent pages: what sessions hold, what the prefix index keeps for later, and who
// gives way when the budget is spent. In this order: pages that only the index holds (least
// recently used first), pages of idle sessions (they stay valid and are computed again), rows of
// drafts, then tasks of lower rank than the one that needs pages. A task that gave way keeps its
// tokens and computes its latents again when there is room, to the same bits (unless prompts
// expand); its consumer sees a delay.
//
// Rank: who is paused by its consumer comes last; then the priority class; then who came first. The
// task of the highest rank can take every page there is, so someone always gets on. A task that
// gave way comes back at the cost of one that is paused only when that has lasted for kPatienceNs:
// consumers that are a little slower than the engine pause it again and again, and two of them
// would have their latents computed anew for every token.
//
// Everything here is called under the engine's mutex; reserve() by the engine's thread alone.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "runtime/base/status.h"
#include "runtime/cache/page_pool.h"
#include "runtime/cache/prefix_index.h"
#include "runtime/engine/session.h"
#include "runtime/engine/task.h"

namespace dsv3 {

using Tasks = std::span<const std::shared_ptr<Task>>;

class LatentCache {
 public:
  struct Counters {
    uint64_t evictions = 0;    // pages that the prefix index gave up
    uint64_t dropped = 0;      // idle sessions that lost their pages
    uint64_t preemptions = 0;  // tasks that lost theirs
    uint64_t refusals = 0;     // tasks that found no room to begin
    uint64_t prefix_hits = 0;  // pages taken from the index
    int64_t high_water = 0;    // pages in use
  };

  // Without `share_prefixes` sessions share pages by forking only. `seed`: see PrefixIndex.
  LatentCache(kernels::Device* device, size_t page_bytes, int64_t pages, bool share_prefixes,
              uint64_t seed);

  PagePool& pool() { return pool_; }
  const PagePool& pool() const { return pool_; }
  PrefixIndex& prefixes() { return index_; }
  const Counters& counters() const { return counters_; }
  // Pages that sessions hold: all but those that wait in the index to be found or evicted.
  int64_t in_use() const { return pool_.used() - index_.unreferenced(); }

  void add(Session* session);  // may throw std::bad_alloc
  void remove(Session* session) noexcept;

  // Takes pages of the session's tokens from the index, up to position `limit`. Returns how many
  // tokens became computed.
  int64_t attach(Session* session, int64_t limit);
  // Makes the session's full computed pages findable.
  void keep(Session* session) noexcept;
  // The session was used just now.
  void touch(Session* session) noexcept;

  static constexpr int64_t kPatienceNs = 1'000'000'000;
  // Whether the task could have pages for its sequence, one token more, and `spare` further ones,
  // if everyone gave way who has to.
  bool fits(const Task& task, Tasks tasks, int64_t spare);
  // Makes positions [begin, *end) of the task's session writable, by making others give way;
  // shortens the range to `least` if that helps. A task that gave way is marked as stalled.
  Status reserve(Task* task, int64_t begin, int64_t least, int64_t* end, Tasks tasks);
  // The same for a session without a task: no task gives way.
  Status reserve(Session* session, int64_t begin, int64_t end);
  // The same of what is free: nobody gives way.
  Status reserve_free(Session* session, int64_t begin, int64_t end);
  // A page with one reference, free or given up by the index; kNoPage: neither. Takes nothing from
  // sessions.
  Result<PageId> take_spare();
  void count_refusal() { ++counters_.refusals; }
  // The task gives up its pages and waits until there is room.
  void preempt(Task* task) noexcept;
  // Of the stalled tasks that are not paused, the one of the highest rank.
  static Task* first_stalled(Tasks tasks);
  // Whether a task of those that can run holds pages, beside this one, or a session is pinned: room
  // will be made without anyone's doing.
  bool others_run(const Task& task, Tasks tasks) const;

  // Pool, tables and index agree; names what does not. For tests and debug builds.
  Status check() const;

 private:
  static bool outranks(const Task& a, const Task& b);
  static bool keeps_pages(const Task& other, const Task& task);
  bool make_room(const PageTable& table, int64_t begin, int64_t end) noexcept;
  Status take(PageTable* table, int64_t begin, int64_t end);
  int64_t mark(const PageTable& table);
  bool forget_own(const PageTable& table, int64_t begin, int64_t end);
  bool drop_idle() noexcept;
  bool preempt_below(const Task& task, Tasks tasks) noexcept;
  void mark_high_water();

  PagePool pool_;
  const bool share_;
  PrefixIndex index_;
  std::vector<Session*> sessions_;
  std::vector<uint8_t> marks_;  // by page, scratch of fits()
  uint64_t clock_ = 0;
  Counters counters_;
};

}  // namespace dsv3
