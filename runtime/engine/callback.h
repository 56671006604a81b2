// What surrounds a call into the embedder's code. Callbacks run on a thread of ours (notify, the
// logits hook) or inside a call of theirs (progress); in both, frees are put off until the callback
// has returned, and every other call into the library is refused (the API boundary asks active()).
#pragma once

#include <atomic>

namespace dsv3 {

// Set once, never reset: what dsv3_cancel holds.
struct CancelToken {
  std::atomic<bool> cancelled{false};
};

// Something whose destruction a callback asked for. Intrusive: putting it off cannot fail.
class Deferred {
 public:
  virtual void run_deferred() noexcept = 0;

 protected:
  ~Deferred() = default;

 private:
  friend class CallbackScope;
  Deferred* next_ = nullptr;
};

class CallbackScope {
 public:
  CallbackScope() noexcept;
  // Carries out what was deferred, in order. No lock may be held here.
  ~CallbackScope();
  CallbackScope(const CallbackScope&) = delete;
  CallbackScope& operator=(const CallbackScope&) = delete;

  // Whether the calling thread is inside a callback.
  static bool active() noexcept;
  // Inside a callback: keeps `work` for later and returns true.
  static bool defer(Deferred* work) noexcept;

 private:
  CallbackScope* outer_;
  Deferred* first_ = nullptr;
  Deferred** last_ = &first_;
};

// Marks a thread as one of an engine's. Such a thread must not wait for any engine, or two engines
// whose callbacks free each other's handles would wait for each other.
bool on_engine_thread() noexcept;
void mark_engine_thread() noexcept;

}  // namespace dsv3
