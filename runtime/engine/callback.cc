#include "runtime/engine/callback.h"

namespace dsv3 {
namespace {
thread_local CallbackScope* current_scope = nullptr;
thread_local bool engine_thread = false;
}  // namespace

CallbackScope::CallbackScope() noexcept : outer_(current_scope) { current_scope = this; }

CallbackScope::~CallbackScope() {
  current_scope = outer_;
  while (first_ != nullptr) {
    Deferred* work = first_;
    first_ = work->next_;
    work->next_ = nullptr;
    // A callback inside a callback hands its frees to the outer one.
    if (!defer(work)) work->run_deferred();
  }
}

bool CallbackScope::active() noexcept { return current_scope != nullptr; }

bool CallbackScope::defer(Deferred* work) noexcept {
  CallbackScope* scope = current_scope;
  if (scope == nullptr) return false;
  *scope->last_ = work;
  scope->last_ = &work->next_;
  return true;
}

bool on_engine_thread() noexcept { return engine_thread; }
void mark_engine_thread() noexcept { engine_thread = true; }

}  // namespace dsv3
