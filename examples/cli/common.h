// What the subcommands of the `dsv3` tool share: handles that free themselves, errors as exceptions
// with an exit code, Ctrl-C, a progress bar, files and JSON. The tool uses dsv3.h alone.
#pragma once

#include <dsv3.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>
#include <vector>

namespace cli {

using Json = nlohmann::ordered_json;

inline constexpr int kExitDone = 0;
inline constexpr int kExitFailed = 1;
inline constexpr int kExitMisused = 2;

// ------------------------------------------------------------------------------------------
// handles

template <auto Free>
struct Freer {
  template <class T>
  void operator()(T* handle) const {
    Free(handle);
  }
};
using Model = std::unique_ptr<dsv3_model, Freer<dsv3_model_free>>;
using Context = std::unique_ptr<dsv3_context, Freer<dsv3_context_free>>;
using Session = std::unique_ptr<dsv3_session, Freer<dsv3_session_free>>;
using Request = std::unique_ptr<dsv3_request, Freer<dsv3_request_free>>;
using Cancel = std::unique_ptr<dsv3_cancel, Freer<dsv3_cancel_free>>;

// -------------------------------------------------------------------------------------------
// errors

// Something failed: exit code 1.
class Failure : public std::runtime_error {
 public:
  explicit Failure(const std::string& message, dsv3_status status = DSV3_OK, std::string field = {},
                   bool retryable = false)
      : std::runtime_error(message),
        status_(status),
        field_(std::move(field)),
        retryable_(retryable) {}
  dsv3_status status() const { return status_; }  // DSV3_OK: the tool's own finding
  const std::string& field() const { return field_; }
  bool retryable() const { return retryable_; }

 private:
  dsv3_status status_;
  std::string field_;
  bool retryable_;
};

// The tool was used wrongly: exit code 2.
class Misuse : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Takes `error` over.
[[noreturn]] void throw_failure(dsv3_status status, dsv3_error* error);

// call([&](dsv3_error** e) { return dsv3_model_open(path, &options, &model, e); });
template <class Function>
void call(Function&& function) {
  dsv3_error* error = nullptr;
  const dsv3_status status = function(&error);
  if (status != DSV3_OK) throw_failure(status, error);
}

// printf into a string.
[[gnu::format(printf, 1, 2)]] std::string format(const char* fmt, ...);

// -------------------------------------------------------------------------------------------
// Ctrl-C

// SIGINT and SIGTERM set the current cancel token; a second one ends the process the usual way.
// Who calls renew() has one thread (the library's block all signals), so that the handler never
// runs beside it.
class Interrupt {
 public:
  Interrupt();
  ~Interrupt();
  Interrupt(const Interrupt&) = delete;
  Interrupt& operator=(const Interrupt&) = delete;
  dsv3_cancel* token() const { return token_.get(); }
  bool is_set() const { return dsv3_cancel_is_set(token_.get()) != 0; }
  // A fresh token, and the handlers armed again: for a chat's next turn, for the session's save.
  void renew();

 private:
  Cancel token_;
};

// -----------------------------------------------------------------------------------------
// terminal

// Opens /dev/null in the place of standard streams that are closed, so that no file that is opened
// later becomes one of them.
void occupy_standard_streams();
bool stdout_is_terminal();
bool stderr_is_terminal();
// Writes to standard output at once; throws Failure when that fails (a full disk, for example).
void write_out(std::string_view text);
// One JSON value and a newline. Bytes that are not UTF-8 become U+FFFD.
void write_json(const Json& value);
void write_err(std::string_view text);

// A bar on stderr while a long call runs; nothing at all where stderr is not a terminal.
class Progress {
 public:
  enum class Unit { kBytes, kTokens };
  Progress(std::string label, Unit unit);
  ~Progress();  // removes the bar
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  static void callback(void* self, uint64_t done, uint64_t total);

 private:
  void draw(uint64_t done, uint64_t total);
  std::string label_;
  Unit unit_;
  bool enabled_;
  bool drawn_ = false;
  std::chrono::steady_clock::time_point begin_, last_;
};

class Stopwatch {
 public:
  double seconds() const {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

std::string human_bytes(uint64_t bytes);    // "15.3 MiB"
std::string human_count(uint64_t number);   // "14,650,000"
std::string human_rate(double per_second);  // "3,912"

// --------------------------------------------------------------------------------------------
// numbers of options

// "--threads: -3 is not in [0, 1024]", both bounds being allowed. CLI11's own checks write the 300
// digits of the largest double where there is no upper bound, and let a NaN pass. Its conversions
// are strtoull()'s: -1 and what is beyond 64 bits become 2^64 - 1, silently.
template <class T>
CLI::Validator in_range(T low, T high) {
  const auto text = [](T bound) {
    if constexpr (std::is_integral_v<T>) return std::to_string(bound);
    return format("%.10g", static_cast<double>(bound));
  };
  const std::string range = "in [" + text(low) + ", " + text(high) + "]";
  const auto check = [=](std::string& input) {
    T value = {};
    errno = 0;
    bool inside = CLI::detail::lexical_cast(input, value) && value >= low && value <= high;
    if constexpr (std::is_unsigned_v<T>) {
      inside = inside && errno != ERANGE && input.find('-') == std::string::npos;
    }
    return inside ? std::string() : input + " is not " + range;
  };
  return CLI::Validator(check, range);
}

// --------------------------------------------------------------------------------------------
// input

// Standard input can be read once; throws Misuse when somebody has. read_input() calls it.
void claim_standard_input();
// The bytes of a file; "-" is standard input.
std::string read_input(const std::string& path);
// The next line of standard input, without its end; false at the end of the input.
bool read_line(std::string* line);
// Text from a user has to be UTF-8; `where` opens the message.
void require_utf8(std::string_view text, const std::string& where);
bool is_utf8(std::string_view text);

// --------------------------------------------------------------------------------- text and tokens

std::vector<int32_t> tokenize(const dsv3_model* model, std::string_view text, uint32_t flags);
std::string detokenize(const dsv3_model* model, const int32_t* tokens, size_t count,
                       uint32_t flags);
dsv3_model_info model_info(const dsv3_model* model);
// A text that the library made; frees it.
std::string take_text(char* text);
// A JSON array of token ids; `where` opens the message of the error.
std::vector<int32_t> parse_ids(const Json& array, const std::string& where);

}  // namespace cli
