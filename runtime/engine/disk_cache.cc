#include "runtime/engine/disk_cache.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <new>
#include <utility>

#include "runtime/engine/callback.h"
#include "runtime/engine/engine.h"

namespace dsv3 {
namespace {

// Bytes that one errand to the engine's thread copies.
constexpr size_t kCopyBytes = 8 << 20;
constexpr size_t kMaxWrites = 64;

}  // namespace

Result<std::unique_ptr<DiskCache>> DiskCache::open(const std::string& path, uint64_t max_bytes,
                                                   const LatentIdentity& identity) {
  DSV3_ASSIGN(std::unique_ptr<DiskTier> tier, DiskTier::open(path, max_bytes, identity));
  return std::unique_ptr<DiskCache>(new DiskCache(std::move(tier), identity));
}

DiskCache::~DiskCache() = default;

Status DiskCache::start(std::shared_ptr<Engine> engine) {
  buffer_.resize(pages_at_once() * identity_.page_bytes);
  engine_ = std::move(engine);
  // Each holds the other until the thread ends: without one, nobody would let go.
  struct LetGo {
    std::shared_ptr<Engine>* engine;
    ~LetGo() {
      if (engine != nullptr) engine->reset();
    }
  } let_go{&engine_};
  DSV3_ASSIGN(Thread thread, Thread::start("dsv3-disk", thread_main, this));
  let_go.engine = nullptr;
  thread_.emplace(std::move(thread));
  return {};
}

void DiskCache::stop(int64_t wait_ns, bool may_wait) noexcept {
  if (!thread_) return;
  {
    std::unique_lock lock(mutex_);
    stop_ = true;
    detach_ = detach_ || !may_wait;
    work_.notify_all();
    if (may_wait) done_.wait_for(lock, std::chrono::nanoseconds(wait_ns), [&] { return ended_; });
  }
  hurry_.store(true, std::memory_order_relaxed);
  if (may_wait) thread_->join();
}

bool DiskCache::restore(const std::shared_ptr<Task>& task) noexcept {
  try {
    const std::lock_guard lock(mutex_);
    if (stop_) return false;
    reads_.push_back(task);
    task->restoring = true;
    work_.notify_one();
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

void DiskCache::keep(std::span<const int32_t> tokens) noexcept {
  tokens = tokens.first(tokens.size() - tokens.size() % identity_.page_tokens);
  if (tokens.empty()) return;
  try {
    const std::lock_guard lock(mutex_);
    if (stop_) return;
    // One more than that wait where gives_way() put one back.
    while (writes_.size() >= kMaxWrites) writes_.pop_front();
    writes_.emplace_back(tokens.begin(), tokens.end());
    work_.notify_one();
  } catch (const std::bad_alloc&) {
    // It is a cache: this prefix is computed again.
  }
}

// --- The thread.

void DiskCache::thread_main(void* self) {
  auto* cache = static_cast<DiskCache*>(self);
  mark_engine_thread();
  cache->loop();
  std::shared_ptr<Engine> last;  // may be the last reference, and with it this object's
  {
    const std::lock_guard lock(cache->mutex_);
    last.swap(cache->engine_);
    if (cache->detach_) cache->thread_->detach();
    cache->ended_ = true;
    cache->done_.notify_all();
  }
}

void DiskCache::loop() {
  for (;;) {
    std::shared_ptr<Task> task;
    std::vector<int32_t> tokens;
    {
      std::unique_lock lock(mutex_);
      work_.wait(lock, [&] { return stop_ || !reads_.empty() || !writes_.empty(); });
      if (!reads_.empty()) {
        task = std::move(reads_.front());
        reads_.pop_front();
      } else if (!writes_.empty() && !hurry_.load(std::memory_order_relaxed)) {
        tokens = std::move(writes_.front());
        writes_.pop_front();
      } else if (stop_) {
        writes_.clear();
        return;
      }
    }
    try {
      if (task != nullptr) {
        read_for(task.get());
      } else {
        write(std::move(tokens));
      }
    } catch (const std::bad_alloc&) {
      report(engine_->out_of_memory());
    }
    if (task != nullptr) engine_->restored(task.get());
  }
}

size_t DiskCache::pages_at_once() const {
  return std::max<size_t>(1, kCopyBytes / static_cast<size_t>(identity_.page_bytes));
}

void DiskCache::read_for(Task* task) {
  const std::vector<int32_t> tokens = engine_->restorable(task);
  const size_t width = identity_.page_tokens;
  const auto size = static_cast<size_t>(identity_.page_bytes);
  auto begin = static_cast<size_t>(task->session().computed()) / width;
  const size_t pages = tokens.size() / width;
  for (bool more = true; more && begin < pages;) {
    size_t end = begin;
    while (end < pages && end - begin < pages_at_once()) {
      const bool stop = hurry_.load(std::memory_order_relaxed) ||
                        task->stop_reason(monotonic_ns()) != FinishReason::kNone;
      bool found = false, damaged = false;
      if (!stop) {
        const Status status =
            tier_->get(std::span(tokens).first((end + 1) * width), &page_, &found, &damaged);
        if (!status.ok()) report(status);
      }
      if (!found) {
        if (damaged) weed(tokens, end + 1);
        more = false;
        break;
      }
      std::memcpy(buffer_.data() + (end - begin) * size, page_.data(), size);
      ++end;
    }
    if (end == begin) return;
    const Status status = engine_->between_steps([&](kernels::Device* device) -> Status {
      for (size_t i = begin; i < end; ++i) {
        if (engine_->adopt_page(device, task, std::span(tokens).first((i + 1) * width),
                                buffer_.data() + (i - begin) * size)) {
          continue;
        }
        more = false;
        break;
      }
      return {};
    });
    if (!status.ok()) return;
    begin = end;
  }
}

// A directory with one damaged page may have lost more in the same power cut: those that follow go
// too if they are damaged, so that they are written again.
void DiskCache::weed(std::span<const int32_t> tokens, size_t begin) {
  bool found = false;
  for (size_t i = begin; i < tokens.size() / identity_.page_tokens; ++i) {
    if (hurry_.load(std::memory_order_relaxed)) return;
    if (!tier_->get(tokens.first((i + 1) * identity_.page_tokens), &page_, &found).ok()) return;
  }
}

bool DiskCache::gives_way(std::vector<int32_t>* tokens) {
  const std::lock_guard lock(mutex_);
  if (reads_.empty()) return false;
  writes_.push_front(std::move(*tokens));
  return true;
}

void DiskCache::write(std::vector<int32_t> all) {
  const std::span<const int32_t> tokens = all;
  const size_t width = identity_.page_tokens;
  const auto size = static_cast<size_t>(identity_.page_bytes);
  const size_t pages = tokens.size() / width;
  size_t begin = 0;
  while (begin < pages && !hurry_.load(std::memory_order_relaxed)) {
    if (tier_->touch(tokens.first((begin + 1) * width))) {
      ++begin;
      continue;
    }
    const size_t most = std::min(pages_at_once(), pages - begin);
    size_t copied = 0;
    const Status status = engine_->between_steps([&](kernels::Device* device) -> Status {
      copied = engine_->copy_pages(device, tokens, begin, most, buffer_.data());
      return {};
    });
    if (!status.ok() || copied == 0) return;  // the context goes, or the pages are gone already
    for (size_t i = 0; i < copied; ++i) {
      const Status put =
          tier_->put(tokens.first((begin + i + 1) * width), {buffer_.data() + i * size, size});
      if (!put.ok()) return report(put);
      if (gives_way(&all)) return;  // what is there is not written again
    }
    begin += copied;
  }
}

void DiskCache::report(const Status& status) {
  // A full disk says the same for every page.
  if (status.message() == last_error_.message()) return;
  last_error_ = status;
  engine_->log(LogLevel::kWarning, status.message().c_str());
}

}  // namespace dsv3
