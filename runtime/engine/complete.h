// One blocking call for a completion. Calls of one context share a session, so that the next
// completion at almost the same place finds most of its prompt computed; they run one after
// another.
#pragma once

#include <condition_variable>
#include <memory>
#include <mutex>
#include <span>
#include <string>

#include "runtime/engine/engine.h"
#include "runtime/engine/request.h"

namespace dsv3 {

class Completer {
 public:
  explicit Completer(std::shared_ptr<Engine> engine) : engine_(std::move(engine)) {}

  // The answer to the tokens, without its reasoning. kDeadline or kCancelled when one of them hits,
  // also while another call runs. Any thread.
  Status run(std::span<const int32_t> tokens, RequestOptions options, std::string* text);

 private:
  class Turn;
  Status run_in_turn(std::span<const int32_t> tokens, RequestOptions options, int64_t deadline_ns,
                     std::string* text);

  const std::shared_ptr<Engine> engine_;
  std::mutex mutex_;
  std::condition_variable condition_;
  bool busy_ = false;
  std::shared_ptr<Session> session_;  // the owner of the turn's
};

}  // namespace dsv3
