#include "common.h"

#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <iterator>

namespace cli {

void throw_failure(dsv3_status status, dsv3_error* error) {
  const std::string message = dsv3_error_message(error);
  Failure failure(message.empty() ? dsv3_status_name(status) : message, status,
                  dsv3_error_field(error), dsv3_error_retryable(error) != 0);
  dsv3_error_free(error);
  throw failure;
}

std::string format(const char* fmt, ...) {
  va_list args;
  va_start(args, fmt);
  va_list again;
  va_copy(again, args);
  const int size = std::vsnprintf(nullptr, 0, fmt, args);
  va_end(args);
  std::string out(size > 0 ? static_cast<size_t>(size) : 0, '\0');
  std::vsnprintf(out.data(), out.size() + 1, fmt, again);
  va_end(again);
  return out;
}

// -------------------------------------------------------------------------------------------
// Ctrl-C

namespace {

std::atomic<dsv3_cancel*> current_token{nullptr};
static_assert(std::atomic<dsv3_cancel*>::is_always_lock_free);

void on_signal(int) { dsv3_cancel_set(current_token.load()); }

void install_handlers() {
  struct sigaction action = {};
  action.sa_handler = on_signal;
  sigemptyset(&action.sa_mask);
  // Reset after the first: a second Ctrl-C ends the process whatever it does. No SA_RESTART: a chat
  // that waits for input wakes up.
  action.sa_flags = static_cast<int>(SA_RESETHAND);
  sigaction(SIGINT, &action, nullptr);
  sigaction(SIGTERM, &action, nullptr);
}

}  // namespace

Interrupt::Interrupt() { renew(); }

Interrupt::~Interrupt() {
  signal(SIGINT, SIG_DFL);
  signal(SIGTERM, SIG_DFL);
  current_token = nullptr;
}

void Interrupt::renew() {
  dsv3_cancel* fresh = nullptr;
  call([&](dsv3_error** e) { return dsv3_cancel_create(&fresh, e); });
  current_token = fresh;
  token_.reset(fresh);
  install_handlers();
}

// -----------------------------------------------------------------------------------------
// terminal

void occupy_standard_streams() {
  for (const int stream : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    // open() takes the lowest free descriptor: this one. Read-only, also for the output: what is
    // written there has to fail, not to vanish.
    if (fcntl(stream, F_GETFD) == -1 && open("/dev/null", O_RDONLY) == -1) {
      throw Failure(std::string("/dev/null: cannot open: ") + std::strerror(errno));
    }
  }
}

bool stdout_is_terminal() { return isatty(STDOUT_FILENO) == 1; }
bool stderr_is_terminal() { return isatty(STDERR_FILENO) == 1; }

void write_out(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size() || std::fflush(stdout) != 0) {
    throw Failure(std::string("cannot write standard output: ") + std::strerror(errno));
  }
}

void write_json(const Json& value) {
  write_out(value.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n");
}

void write_err(std::string_view text) {
  (void)std::fwrite(text.data(), 1, text.size(), stderr);
  (void)std::fflush(stderr);
}

Progress::Progress(std::string label, Unit unit)
    : label_(std::move(label)),
      unit_(unit),
      enabled_(stderr_is_terminal()),
      begin_(std::chrono::steady_clock::now()),
      last_(begin_) {}

Progress::~Progress() {
  if (drawn_) write_err("\r\033[K");
}

void Progress::callback(void* self, uint64_t done, uint64_t total) {
  static_cast<Progress*>(self)->draw(done, total);
}

void Progress::draw(uint64_t done, uint64_t total) {
  if (!enabled_) return;
  const auto now = std::chrono::steady_clock::now();
  // A short call never shows a bar; a long one redraws ten times a second.
  if (now - begin_ < std::chrono::milliseconds(200)) return;
  if (drawn_ && now - last_ < std::chrono::milliseconds(100) && done != total) return;
  last_ = now;
  drawn_ = true;
  const double part = total == 0 ? 0 : static_cast<double>(done) / static_cast<double>(total);
  const double seconds = std::chrono::duration<double>(now - begin_).count();
  constexpr int kWidth = 30;
  const int filled = static_cast<int>(std::clamp(part, 0.0, 1.0) * kWidth);
  const std::string bar = std::string(static_cast<size_t>(filled), '#') +
                          std::string(static_cast<size_t>(kWidth - filled), '.');
  const double rate = static_cast<double>(done) / seconds;
  const std::string amount = unit_ == Unit::kBytes
                                 ? human_bytes(done) + " of " + human_bytes(total)
                                 : human_count(done) + " of " + human_count(total) + " tokens";
  const std::string speed = unit_ == Unit::kBytes ? human_bytes(static_cast<uint64_t>(rate)) + "/s"
                                                  : human_rate(rate) + " tokens/s";
  std::string left;
  if (part > 0.01 && part < 1) left = format(", %.0f s left", seconds * (1 - part) / part);
  write_err(format("\r\033[K%s [%s] %3.0f %%  %s, %s%s", label_.c_str(), bar.c_str(), part * 100,
                   amount.c_str(), speed.c_str(), left.c_str()));
}

std::string human_bytes(uint64_t bytes) {
  static const char* const kUnits[] = {"bytes", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  while (value >= 1024 && unit + 1 < std::size(kUnits)) {
    value /= 1024;
    ++unit;
  }
  return unit == 0 ? human_count(bytes) + " bytes" : format("%.1f %s", value, kUnits[unit]);
}

std::string human_count(uint64_t number) {
  std::string digits = std::to_string(number);
  for (size_t i = digits.size(); i > 3; i -= 3) digits.insert(i - 3, 1, ',');
  return digits;
}

std::string human_rate(double per_second) {
  if (!std::isfinite(per_second)) return "-";
  return per_second < 100 ? format("%.1f", per_second)
                          : human_count(static_cast<uint64_t>(std::llround(per_second)));
}

// --------------------------------------------------------------------------------------------
// input

void claim_standard_input() {
  static bool claimed = false;
  if (claimed) throw Misuse("standard input was already read: only one input can be -");
  claimed = true;
}

namespace {

// Not by std::cin, which takes an error for the end.
std::string read_all(std::FILE* file, const std::string& name) {
  std::string text;
  char buffer[65536];
  size_t got = 0;
  while ((got = std::fread(buffer, 1, sizeof buffer, file)) > 0) text.append(buffer, got);
  if (std::ferror(file) != 0) throw Failure(name + ": cannot read: " + std::strerror(errno));
  return text;
}

}  // namespace

std::string read_input(const std::string& path) {
  if (path == "-") {
    claim_standard_input();
    return read_all(stdin, "standard input");
  }
  struct Closer {
    void operator()(std::FILE* file) const { std::fclose(file); }
  };
  const std::unique_ptr<std::FILE, Closer> file(std::fopen(path.c_str(), "rb"));
  if (file == nullptr) throw Failure(path + ": cannot open: " + std::strerror(errno));
  return read_all(file.get(), path);
}

bool read_line(std::string* line) {
  line->clear();
  int c = 0;
  while ((c = std::getc(stdin)) != EOF && c != '\n') line->push_back(static_cast<char>(c));
  // Ctrl-C wakes a chat that waits for input: the end, as where there is none.
  if (c == EOF && std::ferror(stdin) != 0 && errno != EINTR) {
    throw Failure(std::string("standard input: cannot read: ") + std::strerror(errno));
  }
  return c != EOF || !line->empty();
}

bool is_utf8(std::string_view text) {
  size_t i = 0;
  const auto byte = [&](size_t at) { return static_cast<unsigned char>(text[at]); };
  while (i < text.size()) {
    const unsigned lead = byte(i);
    const size_t length = lead < 0x80    ? 1
                          : lead >= 0xF0 ? 4
                          : lead >= 0xE0 ? 3
                          : lead >= 0xC2 ? 2
                                         : 0;
    if (length == 0 || lead > 0xF4 || i + length > text.size()) return false;
    for (size_t k = 1; k < length; ++k) {
      if ((byte(i + k) & 0xC0) != 0x80) return false;
    }
    // The second byte excludes overlong forms, surrogates and code points above U+10FFFF.
    if (length > 1) {
      const unsigned second = byte(i + 1);
      if ((lead == 0xE0 && second < 0xA0) || (lead == 0xED && second > 0x9F) ||
          (lead == 0xF0 && second < 0x90) || (lead == 0xF4 && second > 0x8F)) {
        return false;
      }
    }
    i += length;
  }
  return true;
}

void require_utf8(std::string_view text, const std::string& where) {
  if (!is_utf8(text)) throw Failure(where + ": is not UTF-8 text");
}

// --------------------------------------------------------------------------------- text and tokens

std::vector<int32_t> tokenize(const dsv3_model* model, std::string_view text, uint32_t flags) {
  // No text has more tokens than bytes (and one for the begin of the sentence).
  std::vector<int32_t> tokens(text.size() + 1);
  uint64_t count = 0;
  call([&](dsv3_error** e) {
    return dsv3_model_tokenize(model, text.data(), text.size(), flags, tokens.data(), tokens.size(),
                               &count, e);
  });
  tokens.resize(count);
  return tokens;
}

std::string detokenize(const dsv3_model* model, const int32_t* tokens, size_t count,
                       uint32_t flags) {
  std::string text(count * 8 + 64, '\0');
  for (;;) {
    uint64_t needed = 0;
    dsv3_error* error = nullptr;
    const dsv3_status status = dsv3_model_detokenize(model, tokens, count, flags, text.data(),
                                                     text.size(), &needed, &error);
    if (status != DSV3_OK && status != DSV3_E_BUFFER_TOO_SMALL) throw_failure(status, error);
    dsv3_error_free(error);
    text.resize(needed);
    if (status == DSV3_OK) return text;
  }
}

dsv3_model_info model_info(const dsv3_model* model) {
  dsv3_model_info info = {};
  info.struct_size = sizeof info;
  call([&](dsv3_error** e) { return dsv3_model_get_info(model, &info, e); });
  return info;
}

std::string take_text(char* text) {
  const std::unique_ptr<char, Freer<dsv3_string_free>> owned(text);
  return text;
}

std::vector<int32_t> parse_ids(const Json& array, const std::string& where) {
  if (!array.is_array()) throw Failure(where + ": expected an array of token ids");
  std::vector<int32_t> ids;
  ids.reserve(array.size());
  for (size_t i = 0; i < array.size(); ++i) {
    const Json& value = array[i];
    // Ids are checked against the vocabulary by the library; here they only have to be int32.
    const bool fits = value.is_number_integer() &&
                      (value.is_number_unsigned() ? value.get<uint64_t>() <= INT32_MAX
                                                  : value.get<int64_t>() >= INT32_MIN);
    if (!fits) {
      throw Failure(where + "[" + std::to_string(i) + "]: found " + value.dump().substr(0, 40) +
                    ", expected a token id");
    }
    ids.push_back(value.get<int32_t>());
  }
  return ids;
}

}  // namespace cli
