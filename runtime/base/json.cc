#include "runtime/base/json.h"

#include <cmath>
#include <unordered_set>
#include <vector>

#include "runtime/base/os.h"
#include "runtime/base/seeded_hash.h"

namespace dsv3 {
namespace {

// As deep as the parser's limit lets a document be.
void take_apart(Json* json) noexcept {
  if (auto* items = json->get_ptr<Json::array_t*>(); items != nullptr) {
    for (Json& item : *items) take_apart(&item);
    items->clear();
  } else if (auto* members = json->get_ptr<Json::object_t*>(); members != nullptr) {
    for (auto& member : *members) take_apart(&member.second);
    members->clear();
  }
}

// Builds the document while the parser reads, so that a limit is hit before memory is spent on what
// lies beyond it. An object or list is a Json when it is whole: one that grows copies what it
// holds, and destroys it, which may fail.
class Builder : public nlohmann::json_sax<Json> {
 public:
  Builder(const std::string& where, const JsonLimits& limits) : where_(where), limits_(limits) {
    open_.reserve(static_cast<size_t>(limits.max_depth));
  }
  ~Builder() override {
    for (Container& container : open_) {
      for (auto& member : container.members) take_apart(&member.second);
      for (Json& item : container.items) take_apart(&item);
    }
  }

  JsonDocument take() { return std::move(root_); }
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
  bool start_object(size_t) override { return open(/*is_object=*/true); }
  bool start_array(size_t) override { return open(/*is_object=*/false); }
  bool end_object() override {
    Json made = Json::object();
    auto& members = made.get_ref<Json::object_t&>();
    members.reserve(open_.back().members.size());
    for (auto& [name, value] : open_.back().members) {
      members.emplace_back(std::move(name), std::move(value));
    }
    return close(std::move(made));
  }
  bool end_array() override {
    Json made = Json::array();
    made.get_ref<Json::array_t&>() = std::move(open_.back().items);
    return close(std::move(made));
  }
  bool key(string_t& v) override {
    if (!open_.back().keys.insert(v).second)
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

  // Where the next value goes. The only step of adding one that may fail.
  Json* place() {
    if (open_.empty()) return &*root_;
    Container& container = open_.back();
    if (container.is_object) return &container.members.emplace_back(std::move(key_), Json()).second;
    return &container.items.emplace_back();
  }
  bool add(Json scalar) {
    *place() = std::move(scalar);
    return true;
  }
  bool open(bool is_object) {
    if (static_cast<int>(open_.size()) >= limits_.max_depth) {
      return fail("nested deeper than %d levels", limits_.max_depth);
    }
    Json* const place_of_it = place();
    open_.emplace_back().is_object = is_object;
    open_.back().place = place_of_it;
    return true;
  }
  bool close(Json made) {
    *open_.back().place = std::move(made);
    open_.pop_back();
    return true;
  }

  struct Container {
    bool is_object = false;
    Json* place = nullptr;  // stays: what is around it does not grow meanwhile
    std::vector<std::pair<std::string, Json>> members;
    std::vector<Json> items;
    std::unordered_set<std::string, SeededHash> keys;
  };

  const std::string& where_;
  const JsonLimits limits_;
  JsonDocument root_;
  std::vector<Container> open_;  // the innermost last
  std::string key_;
  Status status_;
};

}  // namespace

JsonDocument::~JsonDocument() { take_apart(&root_); }

void JsonWriter::separate() {
  if (!text_.empty() && std::string_view("{[:").find(text_.back()) == std::string_view::npos) {
    text_ += ',';
  }
}

void JsonWriter::open(char bracket) {
  separate();
  text_ += bracket;
}

void JsonWriter::key(std::string_view name) {
  value(Json(name));
  text_ += ':';
}

void JsonWriter::value(const Json& scalar) {
  separate();
  text_ += scalar.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Result<JsonDocument> parse_json(std::string_view text, const std::string& where,
                                JsonLimits limits) {
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

Result<JsonDocument> read_json(const std::string& path, JsonLimits limits) {
  DSV3_ASSIGN(const std::string text, read_file(path, limits.max_bytes));
  return parse_json(text, path, limits);
}

}  // namespace dsv3
