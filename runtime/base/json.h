// Reading JSON that comes from outside: bounded depth, no duplicate keys, no lone surrogates, no
// numbers that do not fit, errors that name the file. The parser (nlohmann-json) is not recursive,
// and neither is this: 100,000 nested brackets are refused on any stack.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "runtime/base/json_fwd.h"
#include "runtime/base/status.h"

namespace dsv3 {

struct JsonLimits {
  int max_depth = 64;
  // Parsed, a file takes up to 25 times its size. Published ones (tokenizer.json, indices of
  // thousands of tensors) have less than 20 MiB.
  size_t max_bytes = size_t{64} << 20;
};
// For files that are always small (config.json and the like): published ones have less than 2 MiB.
inline constexpr JsonLimits kSmallFile = {.max_bytes = size_t{16} << 20};

// Owns a document. A Json that holds others asks for memory when it is destroyed, and ends the
// process where there is none; this takes it apart first, from the inside.
class JsonDocument {
 public:
  JsonDocument() = default;  // NOLINT: a null takes no memory
  explicit JsonDocument(Json root) : root_(std::move(root)) {}
  JsonDocument(JsonDocument&& other) noexcept : root_(std::move(other.root_)) {}
  JsonDocument& operator=(JsonDocument&& other) noexcept {
    root_.swap(other.root_);
    return *this;
  }
  ~JsonDocument();
  operator const Json&() const { return root_; }  // NOLINT: it is one
  Json& operator*() { return root_; }
  const Json& operator*() const { return root_; }
  Json* operator->() { return &root_; }
  const Json* operator->() const { return &root_; }

 private:
  Json root_;
};

// Parses `text`; `where` (a file's name) opens every message.
Result<JsonDocument> parse_json(std::string_view text, const std::string& where,
                                JsonLimits limits = {});
// Reads and parses a file.
Result<JsonDocument> read_json(const std::string& path, JsonLimits limits = {});

// Writes a document piece by piece, as text at once, for the same reason. What is no UTF-8 becomes
// U+FFFD.
class JsonWriter {
 public:
  // '{' and '}', '[' and ']'.
  void open(char bracket);
  void close(char bracket) { text_ += bracket; }
  void key(std::string_view name);
  // A text, number, truth value or null.
  void value(const Json& scalar);
  void field(std::string_view name, const Json& scalar) {
    key(name);
    value(scalar);
  }
  void open_field(std::string_view name, char bracket) {
    key(name);
    open(bracket);
  }
  template <class T>
  void list_field(std::string_view name, const T& values) {
    open_field(name, '[');
    for (const auto& v : values) value(v);
    close(']');
  }
  std::string take() { return std::move(text_); }

 private:
  void separate();
  std::string text_;
};

}  // namespace dsv3
