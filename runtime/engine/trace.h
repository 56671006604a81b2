// What an engine does over time, as Chrome trace events: JSON that opens in Perfetto and in
// chrome://tracing. A line for steps and one for each request, from its start to its end.
//
// The engine's thread writes; who starts and stops it holds the object while the engine does not.
// The text goes to a file, or to a function as it comes. After an error nothing more is written.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "runtime/base/os.h"
#include "runtime/base/status.h"
#include "runtime/cache/snapshot.h"
#include "runtime/engine/events.h"
#include "runtime/engine/scheduler.h"

namespace dsv3 {

class Trace {
 public:
  // Whether a trace has room in so many: kInvalidArgument if not.
  static Status check_bytes(uint64_t max_bytes);
  // The file appears under its name when finish() succeeds. At most `max_bytes` are written: what
  // happens later is left out.
  static Result<std::unique_ptr<Trace>> create(const std::string& path, uint64_t max_bytes);
  static std::unique_ptr<Trace> create(WriteBytes write, uint64_t max_bytes);

  // Neither fails: an error is kept for finish().
  void step(const StepPlan& plan, int64_t begin_ns, int64_t end_ns, bool abandoned) noexcept;
  void request(uint64_t order, Priority priority, const RequestStatistics& statistics,
               FinishReason reason, int64_t end_ns) noexcept;
  Status finish();
  // Writing's error, the first time that this is asked after it; for the log.
  const Status* new_error() noexcept;

 private:
  Trace(std::optional<AtomicFile> file, WriteBytes write, uint64_t max_bytes);
  [[gnu::format(printf, 2, 3)]] void add(const char* fmt, ...) noexcept;
  void flush() noexcept;

  std::optional<AtomicFile> file_;
  const WriteBytes write_;  // without a file
  const uint64_t max_bytes_;
  const int64_t start_ns_;
  std::string buffer_;  // never grows beyond what was reserved
  uint64_t written_ = 0;
  uint64_t left_out_ = 0;
  Status status_;
  Status no_memory_{Code::kOutOfMemory, "out of memory while a trace was written"};
  bool told_ = false;  // new_error() gave it
};

}  // namespace dsv3
