// Errors as values. Status is what every fallible function inside the library returns; Result<T> is
// a Status or a T. A message names the file, tensor or field, what was found and what was expected.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

namespace dsv3 {

// The numbers are those of DSV3_... in dsv3.h (checked there by static_assert) and are append-only.
enum class Code : int32_t {
  kOk = 0,
  kInvalidArgument = 1,  // the caller's argument is wrong; error.field names it
  kNotFound = 2,         // no such file, tensor or token
  kIo = 3,               // the operating system said no
  kCorrupt = 4,          // a file does not hold what its format promises
  kUnsupported = 5,      // well-formed, but this build cannot do it
  kOutOfMemory = 6,
  kCapacity = 7,  // a budget (pages, context length, queue) is exhausted
  kBusy = 8,      // a request runs on this session
  kCancelled = 9,
  kDeadline = 10,
  kNumeric = 11,      // NaN or infinity in logits
  kFileChanged = 12,  // a mapped model file was changed after it was opened
  kTimeout = 13,      // nothing happened within the given time
  kInternal = 14,     // a bug of the library
  kBufferTooSmall = 15,
  kForked = 16,  // a handle made before fork() was used in the child
};

class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message, std::string field = {}, bool retryable = false)
      : rep_(std::make_shared<Rep>(Rep{code, retryable, std::move(message), std::move(field)})) {}

  bool ok() const { return rep_ == nullptr; }
  Code code() const { return rep_ ? rep_->code : Code::kOk; }
  bool retryable() const { return rep_ && rep_->retryable; }
  const std::string& message() const { return rep_ ? rep_->message : empty(); }
  // The struct field, config key or tensor the error is about; may be empty.
  const std::string& field() const { return rep_ ? rep_->field : empty(); }

 private:
  struct Rep {
    Code code;
    bool retryable;
    std::string message;
    std::string field;
  };
  static const std::string& empty() {
    static const std::string nothing;
    return nothing;
  }
  std::shared_ptr<const Rep> rep_;
};

inline Status ok_status() { return {}; }

// printf-style constructors: `return invalid("top_p", "top_p is %g, expected 0 < top_p <= 1", p);`
[[gnu::format(printf, 1, 2)]] std::string format(const char* fmt, ...);
[[gnu::format(printf, 2, 3)]] Status make_error(Code code, const char* fmt, ...);
// kOutOfMemory for an allocation that failed; retryable, since what is short now may be freed.
[[gnu::format(printf, 1, 2)]] Status make_memory_error(const char* fmt, ...);
[[gnu::format(printf, 3, 4)]] Status make_field_error(Code code, const char* field, const char* fmt,
                                                      ...);

// The beginning of a text, at most `max_bytes` of it, that ends where a UTF-8 character does: what
// a message shows of a name that may be long.
std::string utf8_prefix(std::string_view text, size_t max_bytes);

template <class T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}          // NOLINT: implicit on purpose
  Result(Status status) : status_(std::move(status)) {}  // NOLINT: implicit on purpose

  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  T& value() { return *value_; }
  const T& value() const { return *value_; }
  T& operator*() { return *value_; }
  T* operator->() { return &*value_; }

 private:
  std::optional<T> value_;
  Status status_;
};

#define DSV3_CONCAT_(a, b) a##b
#define DSV3_CONCAT(a, b) DSV3_CONCAT_(a, b)
// Returns from the enclosing function when the expression (a Status) is an error.
#define DSV3_TRY(expr)                           \
  do {                                           \
    ::dsv3::Status dsv3_status_ = (expr);        \
    if (!dsv3_status_.ok()) return dsv3_status_; \
  } while (0)
// DSV3_ASSIGN(auto x, f()): x gets the value of a Result, or the enclosing function returns its
// error.
#define DSV3_ASSIGN(lhs, expr) DSV3_ASSIGN_(DSV3_CONCAT(dsv3_result_, __LINE__), lhs, expr)
#define DSV3_ASSIGN_(tmp, lhs, expr)  \
  auto tmp = (expr);                  \
  if (!tmp.ok()) return tmp.status(); \
  lhs = std::move(tmp.value())

}  // namespace dsv3
