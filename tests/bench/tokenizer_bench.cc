// MB/s of the tokenizer: tokenizer_bench CHECKPOINT_DIR FILE... (or nothing: tiny-coder's on the
// Python of the tests). One thread; the best of several runs.
#include <chrono>
#include <cstdio>
#include <string>
#include <vector>

#include "runtime/text/tokenizer.h"
#include "tests/support/support.h"

namespace {

double seconds_of(const dsv3::Tokenizer& tokenizer, const std::vector<std::string>& texts,
                  size_t* tokens) {
  const auto begin = std::chrono::steady_clock::now();
  *tokens = 0;
  std::vector<int32_t> ids;
  for (const std::string& text : texts) {
    ids.clear();
    if (!tokenizer.encode(text, {}, &ids).ok()) return -1;
    *tokens += ids.size();
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void measure(const dsv3::Tokenizer& tokenizer, const char* name,
             const std::vector<std::string>& texts) {
  size_t bytes = 0, tokens = 0;
  for (const std::string& text : texts) bytes += text.size();
  double best = 1e30;
  for (int run = 0; run < 7; ++run) best = std::min(best, seconds_of(tokenizer, texts, &tokens));
  std::printf("%-28s %8zu texts %9zu bytes %9zu tokens %8.2f MB/s %9.2f us/text\n", name,
              texts.size(), bytes, tokens, static_cast<double>(bytes) / best / 1e6,
              best * 1e6 / static_cast<double>(texts.size()));
}

}  // namespace

int main(int argc, char** argv) {
  using dsv3::test::source_path;
  const std::string dir = argc > 1 ? argv[1] : source_path("examples/models/tiny-coder");
  std::vector<std::string> files;
  for (int i = 2; i < argc; ++i) files.push_back(argv[i]);
  if (files.empty()) {
    for (const char* name : {"graphs.py", "inventory.py", "logs.py"}) {
      files.push_back(source_path(std::string("tests/data/python/") + name));
    }
  }
  auto image = dsv3::Tokenizer::compile(dir);
  if (!image.ok()) {
    std::fprintf(stderr, "%s\n", image.status().message().c_str());
    return 1;
  }
  auto tokenizer =
      dsv3::Tokenizer::open({reinterpret_cast<const uint8_t*>(image->data()), image->size()}, dir);
  if (!tokenizer.ok()) {
    std::fprintf(stderr, "%s\n", tokenizer.status().message().c_str());
    return 1;
  }
  std::vector<std::string> texts, lines;
  std::string all;
  for (const std::string& file : files) {
    texts.push_back(dsv3::test::read_bytes(file));
    all += texts.back();
  }
  for (size_t begin = 0; begin < all.size() && lines.size() < 20000;) {
    const size_t end = std::min(all.find('\n', begin), all.size());
    lines.push_back(all.substr(begin, end - begin));
    begin = end + 1;
  }
  measure(*tokenizer, "file by file", texts);
  measure(*tokenizer, "all in one text", {all});
  measure(*tokenizer, "line by line", lines);
  measure(*tokenizer, "512 KiB of x", {std::string(512 << 10, 'x')});
  measure(*tokenizer, "10^6 ^", {std::string(1000000, '^')});
  measure(*tokenizer, "10^6 spaces", {std::string(1000000, ' ')});
  measure(*tokenizer, "10^6 line breaks", {std::string(1000000, '\n')});
  measure(*tokenizer, "10^6 digits", {std::string(1000000, '7')});
  std::string chinese;
  for (int i = 0; i < 100000; ++i) chinese += i % 3 == 0 ? "中" : i % 3 == 1 ? "文" : "测";
  measure(*tokenizer, "10^5 CJK characters", {chinese});
  return 0;
}
