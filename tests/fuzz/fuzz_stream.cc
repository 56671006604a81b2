// Streaming: however the bytes are cut, the characters and the stop string found are the same.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <vector>

#include "runtime/text/stream.h"
#include "runtime/text/utf8.h"

namespace {

void check_utf8(std::string_view text, size_t step) {
  dsv3::Utf8Stream stream;
  std::string streamed, whole;
  for (size_t i = 0; i < text.size(); i += step) {
    std::string part;
    stream.push(text.substr(i, step), &part);
    if (!dsv3::is_valid_utf8(part)) std::abort();
    streamed += part;
  }
  stream.finish(&streamed);
  dsv3::append_lossy_utf8(text, &whole);
  if (streamed != whole || !dsv3::is_valid_utf8(whole)) std::abort();
}

void check_stops(const std::vector<std::string>& stops, const std::string& text, size_t step) {
  std::string expected = text;  // by definition: the first to end, of those the longest
  for (size_t end = 1; end <= text.size() && expected.size() == text.size(); ++end) {
    size_t best = 0;
    for (const std::string& stop : stops) {
      if (stop.size() > best && end >= stop.size() &&
          text.compare(end - stop.size(), stop.size(), stop) == 0) {
        best = stop.size();
      }
    }
    if (best > 0) expected.resize(end - best);
  }
  dsv3::StopMatcher matcher(stops);
  std::string out;
  for (size_t i = 0; i < text.size(); i += step) {
    if (matcher.push(std::string_view(text).substr(i, step), &out)) break;
  }
  matcher.finish(&out);
  if (out != expected) std::abort();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  if (size < 2 || size > 4096) return 0;
  const size_t step = 1 + data[0] % 7;
  size_t stop_count = data[1] % 4;
  std::string_view input(reinterpret_cast<const char*>(data) + 2, size - 2);
  check_utf8(input, step);
  std::vector<std::string> stops;
  for (; stop_count > 0 && !input.empty(); --stop_count) {
    const size_t length = std::min<size_t>(static_cast<uint8_t>(input[0]) % 6, input.size() - 1);
    stops.emplace_back(input.substr(1, length));
    input.remove_prefix(1 + length);
  }
  check_stops(stops, std::string(input), step);
  return 0;
}
