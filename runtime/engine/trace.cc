#include "runtime/engine/trace.h"

#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <utility>

namespace dsv3 {
namespace {

constexpr size_t kBufferBytes = 64 << 10;
constexpr size_t kMaxEventBytes = 512;
constexpr uint64_t kEndBytes = 128;  // for what closes the file
constexpr uint64_t kMinBytes = 512;  // what opens and closes it has room in that
const char* const kClasses[] = {"interactive", "background", "idle"};

// Nanoseconds in a larger unit, to three decimals. Not by printf: in a program with a German locale
// that writes a comma.
constexpr int64_t kMicro = 1'000, kMilli = 1'000'000;
struct Decimal {
  char text[32];
  Decimal(int64_t ns, int64_t unit) noexcept {
    const int64_t thousandths = std::abs(ns) / (unit / 1000);
    std::snprintf(text, sizeof text, "%s%" PRId64 ".%03d", ns < 0 ? "-" : "", thousandths / 1000,
                  static_cast<int>(thousandths % 1000));
  }
};

}  // namespace

Status Trace::check_bytes(uint64_t max_bytes) {
  if (max_bytes >= kMinBytes) return {};
  return make_field_error(Code::kInvalidArgument, "max_bytes",
                          "max_bytes is %" PRIu64 ", expected at least %" PRIu64, max_bytes,
                          kMinBytes);
}

Trace::Trace(std::optional<AtomicFile> file, WriteBytes write, uint64_t max_bytes)
    : file_(std::move(file)),
      write_(std::move(write)),
      max_bytes_(max_bytes),
      start_ns_(monotonic_ns()) {
  buffer_.reserve(kBufferBytes + kMaxEventBytes);
  buffer_ =
      "{\"displayTimeUnit\":\"ms\",\"traceEvents\":[\n"
      "{\"name\":\"process_name\",\"ph\":\"M\",\"pid\":1,\"args\":{\"name\":\"dsv3\"}},\n"
      "{\"name\":\"thread_name\",\"ph\":\"M\",\"pid\":1,\"tid\":1,\"args\":{\"name\":\"steps\"}}";
}

Result<std::unique_ptr<Trace>> Trace::create(const std::string& path, uint64_t max_bytes) {
  DSV3_ASSIGN(AtomicFile file, AtomicFile::create(path, 0600));
  return std::unique_ptr<Trace>(new Trace(std::move(file), {}, max_bytes));
}

std::unique_ptr<Trace> Trace::create(WriteBytes write, uint64_t max_bytes) {
  return std::unique_ptr<Trace>(new Trace(std::nullopt, std::move(write), max_bytes));
}

const Status* Trace::new_error() noexcept {
  return status_.ok() || std::exchange(told_, true) ? nullptr : &status_;
}

void Trace::flush() noexcept {
  if (buffer_.empty() || !status_.ok()) return;
  try {
    status_ = file_ ? file_->write_at(written_, buffer_.data(), buffer_.size())
                    : write_(buffer_.data(), buffer_.size());
  } catch (...) {
    status_ = std::move(no_memory_);
  }
  written_ += buffer_.size();
  buffer_.clear();
}

void Trace::add(const char* fmt, ...) noexcept {
  char event[kMaxEventBytes];
  va_list args;
  va_start(args, fmt);
  const int size = std::vsnprintf(event, sizeof event, fmt, args);
  va_end(args);
  const auto bytes = static_cast<size_t>(size);
  if (!status_.ok() || size < 0 || bytes >= sizeof event ||
      written_ + buffer_.size() + bytes + 2 + kEndBytes > max_bytes_) {
    ++left_out_;
    return;
  }
  buffer_ += ",\n";
  buffer_.append(event, bytes);
  if (buffer_.size() > kBufferBytes - kMaxEventBytes) flush();
}

void Trace::step(const StepPlan& plan, int64_t begin_ns, int64_t end_ns, bool abandoned) noexcept {
  add("{\"name\":\"%s\",\"ph\":\"X\",\"pid\":1,\"tid\":1,\"ts\":%s,\"dur\":%s,"
      "\"args\":{\"rows\":%d,\"tasks\":%zu,\"class\":\"%s\"}}",
      abandoned ? "abandoned step" : "step", Decimal(begin_ns - start_ns_, kMicro).text,
      Decimal(end_ns - begin_ns, kMicro).text, plan.rows, plan.parts.size(),
      kClasses[static_cast<size_t>(plan.best)]);
}

void Trace::request(uint64_t order, Priority priority, const RequestStatistics& s,
                    FinishReason reason, int64_t end_ns) noexcept {
  const auto total_ns = static_cast<int64_t>(s.total_ns);
  add("{\"name\":\"%s\",\"ph\":\"X\",\"pid\":1,\"tid\":%" PRIu64
      ",\"ts\":%s,\"dur\":%s,\"args\":{\"request\":%" PRIu64 ",\"prompt\":%" PRIu64
      ",\"cached\":%" PRIu64 ",\"generated\":%" PRIu64 ",\"drafted\":%" PRIu64
      ",\"accepted\":%" PRIu64 ",\"preemptions\":%" PRIu64
      ",\"queue_ms\":%s,\"first_token_ms\":%s,\"reason\":%d}}",
      kClasses[static_cast<size_t>(priority)], 2 + order,
      Decimal(end_ns - total_ns - start_ns_, kMicro).text, Decimal(total_ns, kMicro).text, order,
      s.prompt_tokens, s.cached_tokens, s.generated_tokens, s.drafted_tokens, s.accepted_tokens,
      s.preemptions, Decimal(static_cast<int64_t>(s.queue_ns), kMilli).text,
      Decimal(static_cast<int64_t>(s.first_token_ns), kMilli).text, static_cast<int>(reason));
}

Status Trace::finish() {
  buffer_ += "\n],\"otherData\":{\"left_out\":" + std::to_string(left_out_) + "}}\n";
  flush();
  DSV3_TRY(status_);
  return file_ ? file_->commit() : Status();
}

}  // namespace dsv3
