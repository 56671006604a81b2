// tokenizer.json (and what tokenizer_config.json adds) read into a TokenizerSource. What is not
// implemented is refused by its name and its place in the file.
#include "runtime/text/compile.h"

#include <array>
#include <map>
#include <set>
#include <unordered_map>

#include "runtime/base/json.h"
#include "runtime/base/os.h"
#include "runtime/base/seeded_hash.h"
#include "runtime/text/tokenizer.h"
#include "runtime/text/utf8.h"

namespace dsv3 {
namespace {

constexpr size_t kMaxPatternBytes = 64 * 1024;

// The alphabet of byte-level BPE: a printable character for every byte. Bytes that print stand for
// themselves, the others follow from U+0100 on.
struct ByteAlphabet {
  std::array<char32_t, 256> of_byte{};
  std::array<int16_t, 512> to_byte{};  // -1: not in the alphabet
  ByteAlphabet() {
    to_byte.fill(-1);
    char32_t next = 256;
    for (int b = 0; b < 256; ++b) {
      const bool prints = (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
      of_byte[b] = prints ? static_cast<char32_t>(b) : next++;
      to_byte[of_byte[b]] = static_cast<int16_t>(b);
    }
  }
};

// The bytes that a spelling in the byte-level alphabet stands for; false when it is not in it.
bool spelled_bytes(const ByteAlphabet& alphabet, std::string_view spelling, std::string* out) {
  out->clear();
  for (size_t i = 0; i < spelling.size();) {
    const Utf8Unit unit = utf8_unit(spelling.substr(i));
    if (unit.state != Utf8State::kCharacter || unit.code >= 512) return false;
    const int16_t b = alphabet.to_byte[unit.code];
    if (b < 0) return false;
    out->push_back(static_cast<char>(b));
    i += unit.size;
  }
  return true;
}

std::string kind_of(const Json& j) {
  if (!j.is_object()) return j.type_name();
  const auto it = j.find("type");
  return it != j.end() && it->is_string() ? it->get<std::string>() : "(no type)";
}
// A text as a message can show it.
std::string shown(std::string_view text) {
  std::string out;
  append_lossy_utf8(utf8_prefix(text, 60), &out);
  return text.size() > 60 ? out + "..." : out;
}

class Compiler {
 public:
  // `map`: names tokens that `config` does not.
  Compiler(const Json& root, const Json& config, const Json& map, const std::string& where,
           const std::string& config_where)
      : root_(root), config_(config), map_(map), where_(where), config_where_(config_where) {}

  Result<std::string> run() {
    if (!root_.is_object()) return error(Code::kCorrupt, "holds %s", root_.type_name());
    DSV3_TRY(normalizer(get(root_, "normalizer"), 0));
    DSV3_TRY(pre_tokenizer());
    DSV3_TRY(decoder(get(root_, "decoder")));
    DSV3_TRY(post_processor(get(root_, "post_processor"), 0));
    DSV3_TRY(model());
    DSV3_TRY(added_tokens());
    DSV3_TRY(finish_tokens());
    DSV3_TRY(merges());
    DSV3_TRY(config());
    return build_image(source_, where_);
  }

 private:
  template <class... A>
  Status error(Code code, const char* fmt, A... args) const {
    return make_error(code, "%s: %s", where_.c_str(), format(fmt, args...).c_str());
  }
  Status unsupported(const char* field, const std::string& kind) const {
    return error(Code::kUnsupported, "%s is of kind %s, which is not implemented", field,
                 shown(kind).c_str());
  }
  static const Json& get(const Json& object, const char* key) {
    static const Json kNull;
    if (!object.is_object()) return kNull;
    const auto it = object.find(key);
    return it == object.end() ? kNull : *it;
  }
  // A boolean member; `missing` where there is none.
  Status flag(const Json& object, const char* key, const std::string& of, bool missing, bool* out) {
    const Json& value = get(object, key);
    *out = missing;
    if (value.is_null()) return {};
    if (!value.is_boolean()) {
      return error(Code::kCorrupt, "%s.%s is %s, expected true or false", of.c_str(), key,
                   value.type_name());
    }
    *out = value.get<bool>();
    return {};
  }

  // ---- the pipeline

  Status normalizer(const Json& n, int depth) {
    if (n.is_null()) return {};
    const Json& parts = get(n, "normalizers");
    if (kind_of(n) != "Sequence" || !parts.is_array() || depth > 8) {
      return unsupported("normalizer", kind_of(n));
    }
    for (const Json& part : parts) DSV3_TRY(normalizer(part, depth + 1));
    return {};
  }

  Status pre_tokenizer() {
    const Json& p = get(root_, "pre_tokenizer");
    if (p.is_null()) {
      return error(Code::kUnsupported, "%s", "pre_tokenizer is null, expected one with ByteLevel");
    }
    DSV3_TRY(pre_tokenizer_part(p, "pre_tokenizer", 0));
    if (!byte_level_) {
      return error(Code::kUnsupported, "%s",
                   "pre_tokenizer has no ByteLevel part; only byte-level BPE is implemented");
    }
    return {};
  }
  Status pre_tokenizer_part(const Json& p, const std::string& field, int depth) {
    const std::string kind = kind_of(p);
    if (kind == "Sequence") {
      const Json& parts = get(p, "pretokenizers");
      if (!parts.is_array() || depth > 8) return unsupported(field.c_str(), kind);
      for (size_t i = 0; i < parts.size(); ++i) {
        DSV3_TRY(pre_tokenizer_part(parts[i], format("%s[%zu]", field.c_str(), i), depth + 1));
      }
      return {};
    }
    // ByteLevel maps bytes to its alphabet; a part behind it would see that and not the text.
    if (byte_level_) {
      return error(Code::kUnsupported, "%s (%s) stands behind ByteLevel, which must come last",
                   field.c_str(), shown(kind).c_str());
    }
    if (source_.steps.size() >= kMaxSteps) {
      return error(Code::kUnsupported, "pre_tokenizer has more than %u parts", kMaxSteps);
    }
    if (kind == "Split") return split(p, field);
    if (kind == "Digits") {
      bool individual = false;
      DSV3_TRY(flag(p, "individual_digits", field, false, &individual));
      source_.steps.push_back({individual ? SplitBehavior::kIsolated : SplitBehavior::kContiguous,
                               false, false, "\\p{N}"});
      return {};
    }
    if (kind == "ByteLevel") {
      bool prefix = true, regex = true;
      DSV3_TRY(flag(p, "add_prefix_space", field, true, &prefix));
      DSV3_TRY(flag(p, "use_regex", field, true, &regex));
      if (prefix) source_.flags |= kImagePrefixSpace;
      if (regex) source_.flags |= kImageByteRegex;
      byte_level_ = true;
      return {};
    }
    return unsupported(field.c_str(), kind);
  }
  Status split(const Json& p, const std::string& field) {
    TokenizerSource::Step step;
    const Json& pattern = get(p, "pattern");
    const bool regex = get(pattern, "Regex").is_string();
    step.literal = !regex && get(pattern, "String").is_string();
    if (!regex && !step.literal) {
      return error(Code::kUnsupported, "%s.pattern has neither Regex nor String", field.c_str());
    }
    step.pattern = get(pattern, regex ? "Regex" : "String").get<std::string>();
    if (step.pattern.size() > kMaxPatternBytes) {
      return error(Code::kUnsupported, "%s.pattern has %zu bytes, expected at most %zu",
                   field.c_str(), step.pattern.size(), kMaxPatternBytes);
    }
    const Json& behavior = get(p, "behavior");
    const std::string name = behavior.is_string() ? behavior.get<std::string>() : "";
    constexpr std::array kNames = {"Isolated", "Removed", "MergedWithPrevious", "MergedWithNext",
                                   "Contiguous"};
    size_t k = 0;
    while (k < kNames.size() && name != kNames[k]) ++k;
    if (k == kNames.size()) {
      return error(Code::kUnsupported, "%s.behavior is \"%s\", which is not implemented",
                   field.c_str(), shown(name).c_str());
    }
    step.behavior = static_cast<SplitBehavior>(k);
    DSV3_TRY(flag(p, "invert", field, false, &step.invert));
    source_.steps.push_back(std::move(step));
    return {};
  }

  Status decoder(const Json& d) {
    if (d.is_null() || kind_of(d) == "ByteLevel") return {};
    const Json& parts = get(d, "decoders");
    if (kind_of(d) == "Sequence" && parts.is_array() && parts.size() == 1 &&
        kind_of(parts[0]) == "ByteLevel") {
      return {};
    }
    return unsupported("decoder", kind_of(d));
  }

  // Post-processors only add begin- and end-of-sentence tokens, which encode() never does, or move
  // offsets, which nobody asks for.
  Status post_processor(const Json& p, int depth) {
    const std::string kind = kind_of(p);
    if (p.is_null() || kind == "ByteLevel") return {};
    if (kind == "TemplateProcessing") {
      const Json& single = get(p, "single");
      if (single.is_array() && !single.empty()) {
        const Json& first = get(single[0], "SpecialToken");
        if (get(first, "id").is_string()) template_begin_ = get(first, "id").get<std::string>();
      }
      return {};
    }
    const Json& parts = get(p, "processors");
    if (kind != "Sequence" || !parts.is_array() || depth > 8) {
      return unsupported("post_processor", kind);
    }
    for (const Json& part : parts) DSV3_TRY(post_processor(part, depth + 1));
    return {};
  }

  // ---- the model

  Status model() {
    const Json& m = get(root_, "model");
    if (!m.is_object()) return error(Code::kCorrupt, "model is %s", m.type_name());
    const bool untyped = m.find("type") == m.end() && m.find("merges") != m.end();
    if (!untyped && kind_of(m) != "BPE") return unsupported("model", kind_of(m));
    const Json& dropout = get(m, "dropout");
    if (!dropout.is_null() && !(dropout.is_number() && dropout.get<double>() == 0)) {
      return error(Code::kUnsupported, "%s",
                   "model.dropout is set; encoding at random is not implemented");
    }
    for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      const Json& value = get(m, affix);
      if (!value.is_null() && !(value.is_string() && value.get_ref<const std::string&>().empty())) {
        return error(Code::kUnsupported, "model.%s is set, which is not implemented", affix);
      }
    }
    bool byte_fallback = false, ignore_merges = false;
    DSV3_TRY(flag(m, "byte_fallback", "model", false, &byte_fallback));
    DSV3_TRY(flag(m, "ignore_merges", "model", false, &ignore_merges));
    if (byte_fallback) {
      return error(Code::kUnsupported, "%s",
                   "model.byte_fallback is true, which is not implemented");
    }
    if (ignore_merges) source_.flags |= kImageIgnoreMerges;
    // unk_token needs no look: the vocabulary must have a token for every byte (finish_tokens).
    return vocab(get(m, "vocab"));
  }

  Status vocab(const Json& v) {
    if (!v.is_object()) return error(Code::kCorrupt, "model.vocab is %s", v.type_name());
    if (v.empty() || v.size() > kMaxVocab) {
      return error(Code::kCorrupt, "model.vocab has %zu tokens, expected 1 to %u", v.size(),
                   kMaxVocab);
    }
    model_size_ = static_cast<uint32_t>(v.size());
    spellings_.resize(model_size_);
    ids_.reserve(model_size_);
    std::vector<bool> taken(model_size_);
    for (const auto& [spelling, id_value] : v.items()) {
      uint32_t id = 0;
      DSV3_TRY(token_id(id_value, "model.vocab", spelling, &id));
      DSV3_TRY(check_token(spelling, "model.vocab"));
      if (id >= model_size_) {
        return error(Code::kCorrupt,
                     "model.vocab: token \"%s\" has id %u, expected ids 0 to %u without gaps",
                     shown(spelling).c_str(), id, model_size_ - 1);
      }
      if (taken[id]) {
        return error(Code::kCorrupt, "model.vocab: tokens \"%s\" and \"%s\" both have id %u",
                     shown(spellings_[id]).c_str(), shown(spelling).c_str(), id);
      }
      taken[id] = true;
      spellings_[id] = spelling;
      ids_.emplace(spellings_[id], id);
    }
    return {};
  }
  Status token_id(const Json& value, const char* field, const std::string& spelling,
                  uint32_t* out) {
    if (value.is_number_unsigned() && value.get<uint64_t>() < kMaxVocab) {
      *out = value.get<uint32_t>();
      return {};
    }
    const std::string text = value.is_number() ? value.dump() : value.type_name();
    return error(Code::kCorrupt, "%s: token \"%s\" has id %s, expected an integer from 0 to %u",
                 field, shown(spelling).c_str(), shown(text).c_str(), kMaxVocab - 1);
  }
  Status check_token(const std::string& text, const char* field) {
    if (!text.empty() && text.size() <= kMaxTokenBytes) return {};
    return error(Code::kCorrupt, "%s: token \"%s\" has %zu bytes, expected 1 to %u", field,
                 shown(text).c_str(), text.size(), kMaxTokenBytes);
  }

  Status added_tokens() {
    const Json& list = get(root_, "added_tokens");
    if (list.is_null()) return {};
    if (!list.is_array()) return error(Code::kCorrupt, "added_tokens is %s", list.type_name());
    for (size_t i = 0; i < list.size(); ++i) {
      DSV3_TRY(added_token(list[i], format("added_tokens[%zu]", i)));
    }
    return {};
  }
  Status added_token(const Json& j, const std::string& field) {
    const Json& content = get(j, "content");
    if (!content.is_string()) {
      return error(Code::kCorrupt, "%s.content is %s, expected a string", field.c_str(),
                   content.type_name());
    }
    const auto& text = content.get_ref<const std::string&>();
    DSV3_TRY(check_token(text, field.c_str()));
    if (text.size() > kMaxAddedBytes) {
      return error(Code::kUnsupported, "%s: token \"%s\" has %zu bytes, expected at most %u",
                   field.c_str(), shown(text).c_str(), text.size(), kMaxAddedBytes);
    }
    uint32_t id = 0;
    DSV3_TRY(token_id(get(j, "id"), field.c_str(), text, &id));
    bool special = false, normalized = true, single_word = false, lstrip = false, rstrip = false;
    DSV3_TRY(flag(j, "special", field, false, &special));
    DSV3_TRY(flag(j, "normalized", field, !special, &normalized));
    DSV3_TRY(flag(j, "single_word", field, false, &single_word));
    DSV3_TRY(flag(j, "lstrip", field, false, &lstrip));
    DSV3_TRY(flag(j, "rstrip", field, false, &rstrip));
    // A token that the model has keeps the model's id; the others follow the vocabulary.
    if (const auto it = ids_.find(text); it != ids_.end()) {
      if (it->second != id) {
        return error(Code::kCorrupt, "%s: token \"%s\" has id %u, model.vocab gives it %u",
                     field.c_str(), shown(text).c_str(), id, it->second);
      }
    } else if (id < model_size_) {
      return error(Code::kCorrupt, "%s: token \"%s\" has id %u, which model.vocab gives to \"%s\"",
                   field.c_str(), shown(text).c_str(), id, shown(spellings_[id]).c_str());
    }
    if (const auto [it, fresh] = added_ids_.emplace(id, text); !fresh) {
      return error(Code::kCorrupt, "%s: tokens \"%s\" and \"%s\" both have id %u", field.c_str(),
                   shown(it->second).c_str(), shown(text).c_str(), id);
    }
    if (const auto [it, fresh] = added_texts_.emplace(text, id); !fresh) {
      return error(Code::kCorrupt, "%s: token \"%s\" has id %u here and %u before", field.c_str(),
                   shown(text).c_str(), id, it->second);
    }
    if (special) specials_.insert(id);
    source_.added.push_back({id, (normalized ? kAddedNormalized : 0) |
                                     (single_word ? kAddedSingleWord : 0) |
                                     (lstrip ? kAddedLstrip : 0) | (rstrip ? kAddedRstrip : 0)});
    return {};
  }

  // All tokens by id: the model's, then the added ones behind them without gaps.
  Status finish_tokens() {
    size_t count = model_size_;
    for (const auto& [id, text] : added_ids_) count += id >= model_size_ ? 1 : 0;
    source_.tokens.resize(count);
    std::array<bool, 256> has_byte{};
    for (uint32_t id = 0; id < model_size_; ++id) {
      TokenizerSource::Token& token = source_.tokens[id];
      token.byte_level = spelled_bytes(alphabet_, spellings_[id], &token.bytes);
      if (!token.byte_level) token.bytes = spellings_[id];
      if (token.byte_level && token.bytes.size() == 1) {
        has_byte[static_cast<uint8_t>(token.bytes[0])] = true;
      }
    }
    for (const auto& [id, text] : added_ids_) {
      if (id >= count) {
        return error(Code::kCorrupt,
                     "added_tokens: token \"%s\" has id %u, expected ids up to %zu without gaps",
                     shown(text).c_str(), id, count - 1);
      }
      TokenizerSource::Token& token = source_.tokens[id];
      // An added token is found and written as it is spelled, even where its spelling would stand
      // for other bytes.
      if (token.bytes != text) {
        token.bytes = text;
        token.byte_level = false;
      }
      token.flags = kTokenAdded;
      if (specials_.contains(id)) token.flags |= kTokenSpecial;
    }
    for (int b = 0; b < 256; ++b) {
      const bool needed = b < 0xC0 || (b > 0xC1 && b < 0xF5);
      if (!needed || has_byte[b]) continue;
      std::string spelling;
      append_utf8(alphabet_.of_byte[b], &spelling);
      return error(Code::kUnsupported,
                   "model.vocab has no token \"%s\" for byte 0x%02X; every byte needs one",
                   spelling.c_str(), static_cast<unsigned>(b));
    }
    return {};
  }

  Status merges() {
    const Json& list = get(get(root_, "model"), "merges");
    if (!list.is_array()) return error(Code::kCorrupt, "model.merges is %s", list.type_name());
    if (list.size() >= kNoId / 4) {
      return error(Code::kCorrupt, "model.merges has %zu entries", list.size());
    }
    std::unordered_map<uint64_t, size_t, SeededHash> seen;
    seen.reserve(list.size());
    for (size_t rank = 0; rank < list.size(); ++rank) {
      std::string left, right;
      if (!merge_parts(list[rank], &left, &right)) {
        return error(Code::kCorrupt, "model.merges[%zu] is not a pair of tokens", rank);
      }
      uint32_t ids[3] = {};
      const std::string* const texts[3] = {&left, &right, nullptr};
      const std::string joined = left + right;
      for (int k = 0; k < 3; ++k) {
        const std::string& text = k < 2 ? *texts[k] : joined;
        const auto it = ids_.find(text);
        if (it == ids_.end()) {
          return error(Code::kCorrupt,
                       "model.merges[%zu] (\"%s\" \"%s\"): model.vocab has no "
                       "token \"%s\"",
                       rank, shown(left).c_str(), shown(right).c_str(), shown(text).c_str());
        }
        ids[k] = it->second;
      }
      const auto [it, fresh] = seen.emplace(uint64_t{ids[0]} << 32 | ids[1], rank);
      if (!fresh) {
        return error(Code::kCorrupt, "model.merges[%zu] (\"%s\" \"%s\") repeats model.merges[%zu]",
                     rank, shown(left).c_str(), shown(right).c_str(), it->second);
      }
      // Words begin as single bytes, so tokens outside the byte-level alphabet are never reached.
      if (!source_.tokens[ids[0]].byte_level || !source_.tokens[ids[1]].byte_level) continue;
      if (specials_.contains(ids[2]) || !source_.tokens[ids[2]].byte_level) {
        return error(Code::kUnsupported,
                     "model.merges[%zu] makes the special token \"%s\" out of plain text", rank,
                     shown(joined).c_str());
      }
      source_.merges.push_back({ids[0], ids[1], ids[2], static_cast<uint32_t>(rank)});
    }
    return {};
  }
  // "a b" or ["a", "b"].
  static bool merge_parts(const Json& j, std::string* left, std::string* right) {
    if (j.is_array() && j.size() == 2 && j[0].is_string() && j[1].is_string()) {
      *left = j[0].get<std::string>();
      *right = j[1].get<std::string>();
      return !left->empty() && !right->empty();
    }
    if (!j.is_string()) return false;
    const auto& text = j.get_ref<const std::string&>();
    const size_t space = text.find(' ');
    if (space == std::string::npos || text.find(' ', space + 1) != std::string::npos) return false;
    *left = text.substr(0, space);
    *right = text.substr(space + 1);
    return !left->empty() && !right->empty();
  }

  // ---- tokenizer_config.json

  Status config() {
    if (!config_.is_null() && !config_.is_object()) {
      return make_error(Code::kCorrupt, "%s: holds %s, expected an object", config_where_.c_str(),
                        config_.type_name());
    }
    DSV3_TRY(named_token("bos_token", &source_.bos));
    DSV3_TRY(named_token("eos_token", &source_.eos));
    const Json& add = get(config_, "add_bos_token");
    if (!add.is_null() && !add.is_boolean()) {
      return make_error(Code::kCorrupt, "%s: add_bos_token is %s, expected true or false",
                        config_where_.c_str(), add.type_name());
    }
    // Where the file is silent, the class's default and the post-processor decide.
    bool add_bos = !template_begin_.empty();
    const Json& kind = get(config_, "tokenizer_class");
    if (kind.is_string() && kind.get_ref<const std::string&>().starts_with("LlamaTokenizer")) {
      add_bos = true;
    }
    if (add.is_boolean()) add_bos = add.get<bool>();
    if (add_bos && source_.bos == kNoId) {
      if (add.is_boolean()) {
        return make_error(Code::kCorrupt, "%s: add_bos_token is true and there is no bos_token",
                          config_where_.c_str());
      }
      add_bos = false;
    }
    if (add_bos) source_.flags |= kImageAddBos;
    return {};
  }
  Status named_token(const char* field, uint32_t* out) {
    const Json& value = get(config_.contains(field) ? config_ : map_, field);
    const Json& text = value.is_object() ? get(value, "content") : value;
    if (text.is_null()) return {};
    if (!text.is_string()) {
      return make_error(Code::kCorrupt, "%s: %s is %s, expected a token", config_where_.c_str(),
                        field, text.type_name());
    }
    const auto& name = text.get_ref<const std::string&>();
    if (const auto it = added_texts_.find(name); it != added_texts_.end()) {
      *out = it->second;
    } else if (const auto known = ids_.find(name); known != ids_.end()) {
      *out = known->second;
    } else {
      return make_error(Code::kCorrupt, "%s: %s \"%s\" is not in the vocabulary of %s",
                        config_where_.c_str(), field, shown(name).c_str(), where_.c_str());
    }
    return {};
  }

  const Json& root_;
  const Json& config_;
  const Json& map_;
  const std::string& where_;
  const std::string& config_where_;
  const ByteAlphabet alphabet_;
  TokenizerSource source_;
  bool byte_level_ = false;
  std::string template_begin_;  // the special token that TemplateProcessing puts first
  uint32_t model_size_ = 0;
  std::vector<std::string> spellings_;                              // of model.vocab, by id
  std::unordered_map<std::string_view, uint32_t, SeededHash> ids_;  // the same; views into them
  std::map<uint32_t, std::string> added_ids_;
  std::unordered_map<std::string, uint32_t, SeededHash> added_texts_;
  std::set<uint32_t> specials_;
};

Result<std::string> compile_checked(const Json& root, const Json& config, const Json& map,
                                    const std::string& where, const std::string& config_where) {
  DSV3_ASSIGN(std::string image, Compiler(root, config, map, where, config_where).run());
  // What open() would refuse (a pattern that cannot be used) is refused here, with the file's name.
  DSV3_ASSIGN(
      const Tokenizer opened,
      Tokenizer::open({reinterpret_cast<const uint8_t*>(image.data()), image.size()}, where));
  return image;
}

}  // namespace

Result<std::string> Tokenizer::compile_json(std::string_view tokenizer_json,
                                            std::string_view tokenizer_config_json,
                                            const std::string& where) {
  const std::string config_where = where + " (tokenizer_config.json)";
  DSV3_ASSIGN(const JsonDocument root, parse_json(tokenizer_json, where));
  JsonDocument config;
  if (!tokenizer_config_json.empty()) {
    DSV3_ASSIGN(config, parse_json(tokenizer_config_json, config_where, kSmallFile));
  }
  return compile_checked(*root, *config, Json(), where, config_where);
}

Result<std::string> Tokenizer::compile(const std::string& checkpoint_dir) {
  const std::string path = join_path(checkpoint_dir, "tokenizer.json");
  DSV3_ASSIGN(const bool exists, file_exists(path));
  if (!exists) {
    const std::string tiktoken = join_path(checkpoint_dir, "tiktoken.model");
    DSV3_ASSIGN(const bool has_tiktoken, file_exists(tiktoken));
    if (has_tiktoken) {
      return make_error(Code::kUnsupported,
                        "%s: a checkpoint with only tiktoken.model is not implemented, expected "
                        "tokenizer.json beside it",
                        tiktoken.c_str());
    }
    return make_error(Code::kNotFound, "%s: no such file", path.c_str());
  }
  DSV3_ASSIGN(const JsonDocument root, read_json(path));
  const std::string config_path = join_path(checkpoint_dir, "tokenizer_config.json");
  const std::string map_path = join_path(checkpoint_dir, "special_tokens_map.json");
  JsonDocument config, map;
  DSV3_ASSIGN(const bool has_config, file_exists(config_path));
  if (has_config) {
    DSV3_ASSIGN(config, read_json(config_path, kSmallFile));
  }
  DSV3_ASSIGN(const bool has_map, file_exists(map_path));
  if (has_map && (config->is_null() || config->is_object())) {
    DSV3_ASSIGN(map, read_json(map_path, kSmallFile));
  }
  return compile_checked(*root, *config, *map, path, config_path);
}

}  // namespace dsv3
