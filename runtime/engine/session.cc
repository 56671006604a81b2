#include "runtime/engine/session.h"

#include <algorithm>

#include "runtime/engine/engine.h"

namespace dsv3 {

Session::Session(std::shared_ptr<Engine> engine, PageTable table)
    : engine_(std::move(engine)), state_(std::move(table)) {
  const std::lock_guard lock(engine_->mutex());
  engine_->session_made(this);
}

Session::~Session() {
  const std::lock_guard lock(engine_->mutex());
  engine_->session_gone(this);
}

Session::Pin::Pin(Session* session) : session_(session) {
  const std::lock_guard lock(session_->engine_->mutex());
  ++session_->state_.pins;
}
Session::Pin::~Pin() {
  {
    const std::lock_guard lock(session_->engine_->mutex());
    --session_->state_.pins;
  }
  session_->engine_->wake();  // somebody may wait for these pages
}

Status Session::append(std::span<const int32_t> tokens, bool replace, AppendResult* result) {
  std::unique_lock<std::mutex> lock;
  DSV3_TRY(engine_->lock_idle(*this, &lock));
  std::vector<int32_t>& own = state_.tokens;
  const size_t old_length = own.size();
  DSV3_TRY(engine_->check_tokens(tokens, replace ? 0 : static_cast<int64_t>(old_length)));
  size_t kept = old_length;
  if (replace) {
    kept = static_cast<size_t>(
        std::mismatch(own.begin(), own.end(), tokens.begin(), tokens.end()).first - own.begin());
    tokens = tokens.subspan(kept);
  }
  own.reserve(kept + tokens.size());  // the only thing that can fail, before anything is changed
  own.resize(kept);
  own.insert(own.end(), tokens.begin(), tokens.end());
  if (replace) set_reasoning(false);
  state_.computed = std::min(state_.computed, static_cast<int64_t>(kept));
  state_.table.truncate(state_.computed);
  publish();
  *result = {own.size(), kept};
  return {};
}

Status Session::truncate(uint64_t length) {
  std::unique_lock<std::mutex> lock;
  DSV3_TRY(engine_->lock_idle(*this, &lock));
  if (length > state_.tokens.size()) {
    return make_field_error(Code::kInvalidArgument, "length",
                            "length is %llu, expected at most the sequence's %zu tokens",
                            static_cast<unsigned long long>(length), state_.tokens.size());
  }
  state_.tokens.resize(static_cast<size_t>(length));
  if (length == 0) set_reasoning(false);
  state_.computed = std::min(state_.computed, static_cast<int64_t>(length));
  state_.table.truncate(state_.computed);
  publish();
  return {};
}

Result<std::shared_ptr<Session>> Session::fork() const {
  DSV3_TRY(engine_->check_process());
  DSV3_ASSIGN(std::shared_ptr<Session> copy, engine_->create_session());
  const std::lock_guard lock(engine_->mutex());
  copy->state_.tokens = state_.tokens;
  PageTable table(state_.table);
  table.truncate(state_.computed);  // without what a running step has reserved
  copy->state_.table.swap(table);
  copy->state_.computed = state_.computed;
  copy->set_reasoning(reasoning());
  copy->publish();
  engine_->session_used(copy.get());
  return copy;
}

Status Session::copy_tokens(uint64_t begin, std::span<int32_t> out, uint64_t* available) const {
  DSV3_TRY(engine_->check_process());
  const std::lock_guard lock(engine_->mutex());
  const std::vector<int32_t>& own = state_.tokens;
  if (begin > own.size()) {
    return make_field_error(Code::kInvalidArgument, "begin",
                            "begin is %llu, expected at most the sequence's %zu tokens",
                            static_cast<unsigned long long>(begin), own.size());
  }
  *available = own.size() - begin;
  if (*available <= out.size()) {
    std::copy(own.begin() + static_cast<std::ptrdiff_t>(begin), own.end(), out.begin());
  }
  return {};
}

}  // namespace dsv3
