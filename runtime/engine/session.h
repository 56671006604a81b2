// A token sequence and its cached latents. Everything here may be called from any thread while the
// engine works on other sessions; while a task runs on this one, changes return kBusy.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include "runtime/base/status.h"
#include "runtime/cache/page_table.h"

namespace dsv3 {

class Engine;
class Task;

struct AppendResult {
  uint64_t length = 0;  // of the sequence now
  uint64_t kept = 0;    // how many of the old tokens stayed
};

class Session {
 public:
  Session(std::shared_ptr<Engine> engine, PageTable table);
  ~Session();
  Session(const Session&) = delete;

  const std::shared_ptr<Engine>& engine() const { return engine_; }

  // Adds tokens, or with `replace` makes the sequence exactly these: what both have in common at
  // the beginning stays computed. Ids outside the vocabulary are kInvalidArgument, too long a
  // sequence is kCapacity, and the session is unchanged then.
  Status append(std::span<const int32_t> tokens, bool replace, AppendResult* result);
  Status truncate(uint64_t length);
  // The same sequence; pages are shared until one of the two writes. Allowed while a task runs: the
  // copy has what was committed by then.
  Result<std::shared_ptr<Session>> fork() const;

  uint64_t length() const { return length_.load(std::memory_order_acquire); }
  uint64_t computed() const { return computed_.load(std::memory_order_acquire); }
  // Copies tokens from `begin` on into `out` if all of them fit; *available: how many there are.
  Status copy_tokens(uint64_t begin, std::span<int32_t> out, uint64_t* available) const;

  // Whether an answer to the sequence begins inside a reasoning block (as the chat that was
  // appended last left it).
  bool reasoning() const { return reasoning_.load(std::memory_order_relaxed); }
  void set_reasoning(bool value) { reasoning_.store(value, std::memory_order_relaxed); }

  // --- Engine, tasks and scheduler only. Guarded by the engine's mutex; the engine's thread may
  // also read them without it while its task runs (nobody else changes them then).
  struct State {
    explicit State(PageTable t) : table(std::move(t)) {}
    std::vector<int32_t> tokens;
    PageTable table;
    int64_t computed = 0;
    Task* running = nullptr;
    uint64_t last_used = 0;  // the latent cache's
    int32_t pins = 0;        // > 0: its pages stay, whatever the pool is short of
  };
  // Pins a session that nobody else knows while its pages are copied.
  class Pin {
   public:
    explicit Pin(Session* session);
    ~Pin();
    Pin(const Pin&) = delete;

   private:
    Session* session_;
  };
  State& state() { return state_; }
  const State& state() const { return state_; }
  // After every change of state().tokens or computed, under the mutex.
  void publish() {
    length_.store(state_.tokens.size(), std::memory_order_release);
    computed_.store(static_cast<uint64_t>(state_.computed), std::memory_order_release);
  }

 private:
  const std::shared_ptr<Engine> engine_;
  State state_;
  std::atomic<uint64_t> length_{0}, computed_{0};  // copies for readers without the mutex
  std::atomic<bool> reasoning_{false};
};

}  // namespace dsv3
