#include "runtime/base/json.h"

#include <doctest/doctest.h>
#include <pthread.h>

#include <algorithm>
#include <functional>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "runtime/base/seeded_hash.h"

namespace dsv3 {
namespace {

std::string message_of(const std::string& text) {
  const auto json = parse_json(text, "file.json");
  REQUIRE(!json.ok());
  CHECK(json.status().code() == Code::kCorrupt);
  CHECK(json.status().message().find("file.json") == 0);
  return json.status().message();
}

bool contains(const std::string& text, const std::string& part) {
  return text.find(part) != std::string::npos;
}

TEST_CASE("documents keep order and values") {
  const auto json =
      parse_json(R"({"b": [1, -2, 3.5, null, true], "a": "\u00e9\ud83d\ude00"})", "x");
  REQUIRE(json.ok());
  CHECK(json.value()->begin().key() == "b");
  CHECK((*json.value())["b"][1] == -2);
  CHECK((*json.value())["a"] == "é😀");
}

TEST_CASE("a written document reads as one") {
  JsonWriter out;
  out.open('{');
  out.field("text", "a\"\n\xff");
  out.open_field("empty", '[');
  out.close(']');
  out.list_field("numbers", std::vector<double>{1, -0.5});
  out.open_field("list", '[');
  for (int i = 0; i < 2; ++i) {
    out.open('{');
    out.field("i", i);
    out.field("none", nullptr);
    out.close('}');
  }
  out.close(']');
  out.field("last", true);
  out.close('}');
  CHECK(out.take() == R"({"text":"a\"\n�","empty":[],"numbers":[1.0,-0.5],)"
                      R"("list":[{"i":0,"none":null},{"i":1,"none":null}],"last":true})");
}

TEST_CASE("what is not JSON is refused with its place") {
  CHECK(contains(message_of(""), "not valid JSON"));
  CHECK(contains(message_of("{\"a\": 1"), "byte 8"));
  CHECK(contains(message_of("{} {}"), "not valid JSON"));
  CHECK(contains(message_of("[1e999]"), "not valid JSON"));
  CHECK(contains(message_of("\"\\ud800\""), "not valid JSON"));
  CHECK(contains(message_of("\"\xff\xfe\""), "not valid JSON"));
  CHECK(contains(message_of(std::string("[1]\0", 4)), "not valid JSON"));
}

TEST_CASE("duplicate keys are refused by name, in any object") {
  CHECK(contains(message_of(R"({"a": {"key": 1, "key": 2}})"), "\"key\" occurs twice"));
  // A long key is cut where a character ends: 199 bytes here, 200 there.
  for (const std::string& start : {std::string("a"), std::string()}) {
    std::string key = start;
    for (int i = 0; i < 150; ++i) key += "é";
    const std::string shown = key.substr(0, 200 - start.size());
    CHECK(contains(message_of("{\"" + key + "\": 1, \"" + key + "\": 2}"),
                   "key \"" + shown + "\" occurs twice"));
  }
  CHECK(parse_json(R"({"a": {"k": 1}, "b": {"k": 2}})", "x").ok());
}

// Keys of 16 printable bytes to which libstdc++'s std::hash, MurmurHash64A with a known seed, gives
// one value: whatever the first eight bytes are, some other eight lead to the same state.
std::vector<std::string> colliding_keys(size_t count) {
  constexpr uint64_t kMul = 0xC6A4A7935BD1E995u, kSeed = 0xC70F6907u, kTarget = 1;
  uint64_t inverse = 1;  // of kMul, by Newton's iteration
  for (int i = 0; i < 6; ++i) inverse *= 2 - kMul * inverse;
  const auto mix = [](uint64_t v) { return v ^ v >> 47; };  // its own inverse
  std::vector<std::string> keys;
  for (uint64_t n = 0; keys.size() < count; ++n) {
    uint64_t block[2] = {};  // the number in hexadecimal digits of another alphabet
    for (int i = 0; i < 8; ++i) block[0] = block[0] << 8 | ('a' + (n >> 4 * i & 15));
    const uint64_t state = ((kSeed ^ 16 * kMul) ^ mix(block[0] * kMul) * kMul) * kMul;
    block[1] = mix((state ^ kTarget) * inverse) * inverse;
    const std::string_view key(reinterpret_cast<const char*>(block), sizeof block);
    const auto plain = [](char c) { return c >= ' ' && c < 127 && c != '"' && c != '\\'; };
    if (std::all_of(key.begin(), key.end(), plain)) keys.emplace_back(key);
  }
  return keys;
}

TEST_CASE("keys chosen so that std::hash gives one value get values of their own") {
  constexpr size_t kKeys = 10000;
  const std::vector<std::string> keys = colliding_keys(kKeys);
  std::unordered_set<size_t> hashes;
  std::string object;
  for (const std::string& key : keys) {
#ifdef __GLIBCXX__
    REQUIRE(std::hash<std::string>()(key) == std::hash<std::string>()(keys[0]));
#endif
    hashes.insert(SeededHash()(key));
    object += (object.empty() ? "{\"" : ",\"") + key + "\":0";
  }
  CHECK(hashes.size() == kKeys);
  CHECK(parse_json(object + "}", "x").ok());
}

TEST_CASE("depth is bounded, and a deep document needs no stack") {
  struct Work {
    bool ok = false;
    static void* run(void* self) {
      const std::string deep(100000, '[');
      const auto json = parse_json(deep, "deep.json");
      const auto object = parse_json(
          [] {
            std::string s;
            for (int i = 0; i < 100000; ++i) s += "{\"a\":";
            return s;
          }(),
          "deep.json");
      static_cast<Work*>(self)->ok =
          contains(json.status().message(), "nested deeper than 64 levels") &&
          contains(object.status().message(), "nested deeper than 64 levels");
      return nullptr;
    }
  } work;
  pthread_attr_t attributes;
  pthread_attr_init(&attributes);
  pthread_attr_setstacksize(&attributes, 256 * 1024);
  pthread_t thread;
  REQUIRE(pthread_create(&thread, &attributes, Work::run, &work) == 0);
  pthread_join(thread, nullptr);
  CHECK(work.ok);
  CHECK(parse_json(std::string(64, '[') + std::string(64, ']'), "x").ok());
  CHECK(!parse_json(std::string(65, '[') + std::string(65, ']'), "x").ok());
}

TEST_CASE("size is bounded") { CHECK(!parse_json("[1, 2, 3]", "x", {64, 4}).ok()); }

}  // namespace
}  // namespace dsv3
