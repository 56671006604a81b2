// The tokenizer's three ways in: an image from a file, a tokenizer.json, a text. The input's first
// byte chooses. Images and JSON are valid ones with the input's changes written over them, because
// bytes at random would never get past the first check.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "runtime/text/image.h"
#include "runtime/text/tokenizer.h"
#include "runtime/text/utf8.h"

namespace {

// A small tokenizer.json: every byte, some merges, added tokens of all sorts.
std::string small_json() {
  std::string vocab, merges;
  for (int b = 0; b < 256; ++b) {
    std::string spelling;
    int before = 0;
    const auto prints = [](int c) {
      return (c >= 33 && c <= 126) || (c >= 161 && c <= 172) || c >= 174;
    };
    for (int c = 0; c < b; ++c) before += prints(c) ? 0 : 1;
    dsv3::append_utf8(static_cast<char32_t>(prints(b) ? b : 256 + before), &spelling);
    if (spelling == "\"" || spelling == "\\") spelling = "\\" + spelling;
    vocab += (b > 0 ? ",\"" : "\"") + spelling + "\":" + std::to_string(b);
  }
  vocab += ",\"ab\":256,\"abc\":257,\"aa\":258,\"aaaa\":259";
  merges = R"("a b","ab c",["a","a"],"aa aa")";
  return R"({"added_tokens":[)"
         R"({"id":260,"content":"<s>","special":true,"normalized":false},)"
         R"({"id":261,"content":"<w>","single_word":true,"normalized":true},)"
         R"({"id":262,"content":" l","lstrip":true,"normalized":false},)"
         R"({"id":263,"content":"r ","rstrip":true,"normalized":false}],)"
         R"("normalizer":{"type":"Sequence","normalizers":[]},)"
         R"("pre_tokenizer":{"type":"Sequence","pretokenizers":[)"
         R"j({"type":"Split","pattern":{"Regex":)j"
         R"j("\\p{N}{1,3}|[^\\r\\n\\p{L}]?\\p{L}+|\\s+(?!\\S)"},)j"
         R"("behavior":"Isolated","invert":false},)"
         R"({"type":"Split","pattern":{"String":"b"},"behavior":"MergedWithNext"},)"
         R"({"type":"Digits","individual_digits":false},)"
         R"({"type":"ByteLevel","add_prefix_space":false,"use_regex":true}]},)"
         R"("model":{"type":"BPE","vocab":{)" +
         vocab + R"(},"merges":[)" + merges + "]}}";
}

std::span<const uint8_t> view(const std::string& bytes) {
  return {reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()};
}

// Overwrites bytes: three of position and one of value each; what is left over is returned.
std::string_view apply_changes(std::string_view changes, std::string* bytes) {
  size_t count = changes.empty() ? 0 : static_cast<uint8_t>(changes[0]) % 8;
  changes.remove_prefix(changes.empty() ? 0 : 1);
  for (; count > 0 && changes.size() >= 4; --count, changes.remove_prefix(4)) {
    const auto at = [&](size_t i) { return size_t{static_cast<uint8_t>(changes[i])}; };
    (*bytes)[(at(0) | at(1) << 8 | at(2) << 16) % bytes->size()] = changes[3];
  }
  return changes;
}

void check_text(const dsv3::Tokenizer& tokenizer, std::string_view text, bool exact) {
  for (const bool parse_special : {false, true}) {
    std::vector<int32_t> ids;
    if (!tokenizer.encode(text, {.parse_special = parse_special}, &ids).ok()) continue;
    std::string decoded, expected;
    if (!tokenizer.decode(ids, false, &decoded).ok()) std::abort();
    if (!exact || parse_special) continue;
    dsv3::append_lossy_utf8(text, &expected);
    if (decoded != expected) std::abort();
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string json = small_json();
  static const std::string image = [] {
    auto compiled = dsv3::Tokenizer::compile_json(json, "", "small");
    if (!compiled.ok()) std::abort();
    return std::move(*compiled);
  }();
  static const auto tokenizer = dsv3::Tokenizer::open(view(image), "small");
  if (!tokenizer.ok()) std::abort();
  if (size == 0) return 0;
  std::string_view input(reinterpret_cast<const char*>(data) + 1, size - 1);

  if (data[0] % 3 == 0) {
    check_text(tokenizer.value(), input, true);
  } else if (data[0] % 3 == 1) {
    std::string changed = image;
    input = apply_changes(input, &changed);
    const uint64_t checksum = dsv3::image_checksum(view(changed));
    std::memcpy(changed.data() + dsv3::kChecksumAt, &checksum, sizeof(checksum));
    const auto opened = dsv3::Tokenizer::open(view(changed), "changed");
    if (opened.ok()) check_text(opened.value(), input, false);
  } else {
    std::string changed = json;
    input = apply_changes(input, &changed);
    const auto compiled = dsv3::Tokenizer::compile_json(changed, "", "changed");
    if (!compiled.ok()) return 0;
    const auto opened = dsv3::Tokenizer::open(view(compiled.value()), "changed");
    if (!opened.ok()) std::abort();  // what compiles, opens
    check_text(opened.value(), input, false);
  }
  return 0;
}
