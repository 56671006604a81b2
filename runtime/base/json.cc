#include "runtime/base/json.h"

#include <cmath>
#include <unordered_set>
#include <vector>

#include "runtime/base/os.h"
#include "runtime/base/seeded_hash.h"

namespace dsv3 {
namespace {

// Builds the document while the parser reads, so that a limit is hit before memory is spent on what
// lies beyond it.
class Builder : public nlohmann::json_sax<Json> {
 public:
  Builder(const std::string& where, const JsonLimits& limits) : where_(where), limits_(limits) {}

  Json take() { return std::move(root_); }
  const Status& status() const { return status_; }

  bool null() override { return add(Json(nullptr)); }
  bool boolean(bool v) override { return add(Json(v)); }
  bool number_integer(number_integer_t v) override { return add(Json(v)); }
  bool number_unsigned(number_unsigned_t v) override { return add(Json(v)); }
  bool number_float(number_float_t v, const string_t& text) override {
    if (!std::isfinite(v)) return fail("number %.60s does not fit a double", text.c_str());
    return add(Json(v));
  }
  bool string(string_t& v) override { return add(Json(std::move(v))); }
  bool binary(binary_t&) override { return fail("binary value"); }
  bool start_object(size_t) override { return open(Json::object()); }
  bool start_array(size_t) override { return open(Json::array()); }
  bool end_object() override {
    keys_.pop_back();
    return close();
  }
  bool end_array() override {
    keys_.pop_back();
    return close();
  }
  bool key(string_t& v) override {
    if (!keys_.back().insert(v).second)
      return fail("key \"%s\" occurs twice", utf8_prefix(v, 200).c_str());
    key_ = std::move(v);
    return true;
  }
  bool parse_error(size_t position, const std::string&,
                   const nlohmann::detail::exception& e) override {
    if (!status_.ok()) return false;
    // The parser's own text, from its reason on; its prefix names the library.
    std::string reason = e.what();
    const size_t cut = reason.find("syntax error");
    if (cut != std::string::npos) reason = reason.substr(cut);
    status_ = make_error(Code::kCorrupt, "%s: not valid JSON at byte %zu: %s", where_.c_str(),
                         position, utf8_prefix(reason, 300).c_str());
    return false;
  }

 private:
  template <class... A>
  bool fail(const char* fmt, A... args) {
    status_ = make_error(Code::kCorrupt, "%s: %s", where_.c_str(), format(fmt, args...).c_str());
    return false;
  }
  bool fail(const char* text) { return fail("%s", text); }

  Json* place(Json value) {
    if (stack_.empty()) {
      root_ = std::move(value);
      return &root_;
    }
    Json& parent = *stack_.back();
    if (parent.is_array()) {
      parent.push_back(std::move(value));
      return &parent.back();
    }
    // ordered_json's object is a vector of pairs; push_back instead of operator[] because the key
    // is known to be new, and a look-up would make large objects quadratic.
    auto& object = parent.get_ref<Json::object_t&>();
    object.push_back({std::move(key_), std::move(value)});
    return &object.back().second;
  }
  bool add(Json value) {
    place(std::move(value));
    return true;
  }
  bool open(Json value) {
    if (static_cast<int>(stack_.size()) >= limits_.max_depth) {
      return fail("nested deeper than %d levels", limits_.max_depth);
    }
    stack_.push_back(place(std::move(value)));
    keys_.emplace_back();
    return true;
  }
  bool close() {
    stack_.pop_back();
    return true;
  }

  const std::string& where_;
  const JsonLimits limits_;
  Json root_;
  // Pointers stay valid: only the innermost container grows, and it is the last element of its
  // parent.
  std::vector<Json*> stack_;
  std::vector<std::unordered_set<std::string, SeededHash>> keys_;
  std::string key_;
  Status status_;
};

}  // namespace

Result<Json> parse_json(std::string_view text, const std::string& where, JsonLimits limits) {
  if (text.size() > limits.max_bytes) {
    return make_error(Code::kCorrupt, "%s: %zu bytes of JSON, expected at most %zu", where.c_str(),
                      text.size(), limits.max_bytes);
  }
  // The parser takes a NUL byte for the end of its input and would never see what follows.
  const size_t nul = text.find('\0');
  if (nul != std::string_view::npos) {
    return make_error(Code::kCorrupt, "%s: not valid JSON at byte %zu: a NUL byte", where.c_str(),
                      nul + 1);
  }
  Builder builder(where, limits);
  const bool ok = Json::sax_parse(text.begin(), text.end(), &builder);
  if (!ok) {
    if (builder.status().ok())
      return make_error(Code::kCorrupt, "%s: not valid JSON", where.c_str());
    return builder.status();
  }
  return builder.take();
}

Result<Json> read_json(const std::string& path, JsonLimits limits) {
  DSV3_ASSIGN(const std::string text, read_file(path, limits.max_bytes));
  return parse_json(text, path, limits);
}

}  // namespace dsv3
