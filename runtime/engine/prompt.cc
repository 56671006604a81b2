#include "runtime/engine/prompt.h"

#include "runtime/engine/engine.h"

namespace dsv3 {
namespace {

// Adds begin-of-sentence in front, or takes it away, so that it stands at the sequence's beginning
// and nowhere else.
Status place_bos(const Model& model, bool wanted, bool at_begin, std::vector<int32_t>* tokens) {
  const std::optional<int32_t> bos = model.tokenizer().bos_id();
  const bool present = bos && !tokens->empty() && tokens->front() == *bos;
  if (wanted && !bos) {
    return make_field_error(Code::kUnsupported, "flags", "%s has no begin-of-sentence token",
                            model.path().c_str());
  }
  if (wanted && at_begin && !present) tokens->insert(tokens->begin(), *bos);
  if (!at_begin && present) tokens->erase(tokens->begin());
  return {};
}

bool at_begin(const Session& session, const AppendOptions& options) {
  return options.replace || session.length() == 0;
}

}  // namespace

Status require_tokenizer(const Model& model) {
  if (model.has_tokenizer()) return {};
  return make_error(Code::kUnsupported,
                    "%s has no tokenizer (its checkpoint had no tokenizer.json): only calls that "
                    "take token ids work",
                    model.path().c_str());
}

Status append_text(Session* session, std::string_view text, const AppendOptions& options,
                   AppendResult* result) {
  const Model& model = session->engine()->model();
  DSV3_TRY(require_tokenizer(model));
  std::vector<int32_t> tokens;
  DSV3_TRY(model.tokenizer().encode(text, {.parse_special = options.parse_special}, &tokens));
  if (options.add_bos && at_begin(*session, options)) {
    DSV3_TRY(place_bos(model, true, true, &tokens));
  }
  DSV3_TRY(session->append(tokens, options.replace, result));
  session->set_reasoning(false);
  return {};
}

Status append_fim(Session* session, std::string_view prefix, std::string_view suffix,
                  const AppendOptions& options, AppendResult* result) {
  const Model& model = session->engine()->model();
  DSV3_TRY(require_tokenizer(model));
  std::vector<int32_t> tokens;
  DSV3_TRY(encode_fim(model.tokenizer(), prefix, suffix, &tokens));
  DSV3_TRY(place_bos(model, options.add_bos, at_begin(*session, options), &tokens));
  DSV3_TRY(session->append(tokens, options.replace, result));
  session->set_reasoning(false);
  return {};
}

Status append_chat(Session* session, std::span<const ChatMessage> messages, const ChatOptions& chat,
                   const AppendOptions& options, AppendResult* result) {
  const Model& model = session->engine()->model();
  DSV3_TRY(require_tokenizer(model));
  DSV3_ASSIGN(const std::vector<ChatPiece> pieces,
              render_chat(model.chat_template(), model.tokenizer(), messages, chat));
  std::vector<int32_t> tokens;
  DSV3_TRY(encode_chat(model.tokenizer(), pieces, &tokens));
  DSV3_TRY(session->append(tokens, options.replace, result));
  session->set_reasoning(starts_in_reasoning(pieces));
  return {};
}

Status encode_completion(const Model& model, std::string_view prefix,
                         std::optional<std::string_view> suffix, std::vector<int32_t>* out) {
  DSV3_TRY(require_tokenizer(model));
  if (suffix) return encode_fim(model.tokenizer(), prefix, *suffix, out);
  const std::optional<int32_t> bos = model.tokenizer().bos_id();
  if (model.tokenizer().add_bos() && bos) out->push_back(*bos);
  DSV3_TRY(model.tokenizer().encode(prefix, {}, out));
  if (!out->empty()) return {};
  return Status(Code::kInvalidArgument, "prefix is empty and there is no suffix", "prefix");
}

}  // namespace dsv3
