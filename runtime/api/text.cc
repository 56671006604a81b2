#include "runtime/api/handles.h"
#include "runtime/engine/prompt.h"

using namespace dsv3;       // NOLINT: the C boundary translates between the two
using namespace dsv3::api;  // NOLINT

namespace {

constexpr dsv3_tool_call kToolCallDefaults = {.struct_size = sizeof(dsv3_tool_call),
                                              .reserved = 0,
                                              .id = nullptr,
                                              .type = nullptr,
                                              .name = nullptr,
                                              .arguments = nullptr};
constexpr dsv3_message kMessageDefaults = {.struct_size = sizeof(dsv3_message),
                                           .tool_call_count = 0,
                                           .role = nullptr,
                                           .content = nullptr,
                                           .content_length = DSV3_NUL_TERMINATED,
                                           .tool_calls = nullptr,
                                           .tool_call_stride = 0,
                                           .reserved = 0};
constexpr dsv3_chat kChatDefaults = {.struct_size = sizeof(dsv3_chat),
                                     .message_count = 0,
                                     .messages = nullptr,
                                     .message_stride = 0,
                                     .thinking = 0,
                                     .add_generation_prompt = 1,
                                     .reserved = 0};

constexpr uint32_t kMaxMessages = 1 << 20;
constexpr uint32_t kMaxToolCalls = 1 << 16;

Status read_tool_call(const dsv3_tool_call* in, ToolCall* out) {
  dsv3_tool_call c = kToolCallDefaults;
  DSV3_TRY(read_struct(in, "dsv3_tool_call", &c));
  DSV3_TRY(check_reserved(c, "dsv3_tool_call"));
  if (c.name == nullptr) return invalid("name", "dsv3_tool_call.name is NULL");
  if (c.arguments == nullptr) return invalid("arguments", "dsv3_tool_call.arguments is NULL");
  out->id = c.id == nullptr ? "" : c.id;
  out->type = c.type == nullptr ? "function" : c.type;
  out->name = c.name;
  out->arguments = c.arguments;
  return {};
}

Status read_message(const dsv3_message* in, ChatMessage* out) {
  dsv3_message m = kMessageDefaults;
  DSV3_TRY(read_struct(in, "dsv3_message", &m));
  DSV3_TRY(check_reserved(m, "dsv3_message"));
  if (m.role == nullptr) return invalid("role", "dsv3_message.role is NULL");
  out->role = m.role;
  out->has_content = m.content != nullptr;
  if (out->has_content) {
    std::string_view content;
    DSV3_TRY(read_text(m.content, m.content_length, "content", &content));
    out->content = content;
  }
  if (m.tool_call_count > kMaxToolCalls) {
    return invalid("tool_call_count", format("tool_call_count is %u, expected at most %u",
                                             m.tool_call_count, kMaxToolCalls));
  }
  DSV3_TRY(check_array(m.tool_calls, m.tool_call_count, m.tool_call_stride, 2 * sizeof(uint32_t),
                       alignof(dsv3_tool_call), "tool_calls"));
  for (uint32_t i = 0; i < m.tool_call_count; ++i) {
    ToolCall call;
    DSV3_TRY(read_tool_call(element(m.tool_calls, m.tool_call_stride, i), &call));
    out->tool_calls.push_back(std::move(call));
  }
  return {};
}

}  // namespace

namespace dsv3::api {

Status read_chat(const dsv3_chat* chat, std::vector<ChatMessage>* messages, ChatOptions* options) {
  dsv3_chat c = kChatDefaults;
  DSV3_TRY(read_struct(chat, "dsv3_chat", &c));
  DSV3_TRY(check_reserved(c, "dsv3_chat"));
  DSV3_TRY(check_flag_value(c.thinking, "thinking"));
  DSV3_TRY(check_flag_value(c.add_generation_prompt, "add_generation_prompt"));
  if (c.message_count == 0 || c.message_count > kMaxMessages) {
    return invalid("message_count",
                   format("message_count is %u, expected 1 to %u", c.message_count, kMaxMessages));
  }
  DSV3_TRY(check_array(c.messages, c.message_count, c.message_stride, 2 * sizeof(uint32_t),
                       alignof(dsv3_message), "messages"));
  for (uint32_t i = 0; i < c.message_count; ++i) {
    ChatMessage message;
    const Status status = read_message(element(c.messages, c.message_stride, i), &message);
    if (!status.ok()) {
      return Status(status.code(), format("messages[%u]: %s", i, status.message().c_str()),
                    status.field());
    }
    messages->push_back(std::move(message));
  }
  options->thinking = c.thinking == 1;
  options->add_generation_prompt = c.add_generation_prompt == 1;
  return {};
}

}  // namespace dsv3::api

extern "C" {

void dsv3_tool_call_init(dsv3_tool_call* call, uint32_t struct_size) {
  init_struct(call, struct_size, kToolCallDefaults);
}
void dsv3_message_init(dsv3_message* message, uint32_t struct_size) {
  init_struct(message, struct_size, kMessageDefaults);
}
void dsv3_chat_init(dsv3_chat* chat, uint32_t struct_size) {
  init_struct(chat, struct_size, kChatDefaults);
}

dsv3_status dsv3_model_tokenize(const dsv3_model* model, const char* text, uint64_t text_length,
                                uint32_t flags, int32_t* tokens, uint64_t capacity,
                                uint64_t* needed, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(model, "model"));
    DSV3_TRY(check_flags(flags, DSV3_TOKENIZE_PARSE_SPECIAL | DSV3_TOKENIZE_ADD_BOS));
    DSV3_TRY(check_buffer(tokens, capacity, needed));
    std::string_view view;
    DSV3_TRY(read_text(text, text_length, "text", &view));
    const Model& m = *model->model;
    DSV3_TRY(require_tokenizer(m));
    std::vector<int32_t> ids;
    if ((flags & DSV3_TOKENIZE_ADD_BOS) != 0) {
      const std::optional<int32_t> bos = m.tokenizer().bos_id();
      if (!bos) {
        return Status(Code::kUnsupported, m.path() + " has no begin-of-sentence token", "flags");
      }
      ids.push_back(*bos);
    }
    EncodeOptions options;
    options.parse_special = (flags & DSV3_TOKENIZE_PARSE_SPECIAL) != 0;
    DSV3_TRY(m.tokenizer().encode(view, options, &ids));
    if (needed != nullptr) *needed = ids.size();
    if (capacity == 0) return {};
    if (capacity < ids.size()) return buffer_too_small(ids.size(), capacity);
    std::copy(ids.begin(), ids.end(), tokens);
    return {};
  });
}

dsv3_status dsv3_model_detokenize(const dsv3_model* model, const int32_t* tokens, uint64_t count,
                                  uint32_t flags, char* buffer, uint64_t capacity, uint64_t* needed,
                                  dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(model, "model"));
    DSV3_TRY(check_flags(flags, DSV3_DETOKENIZE_SKIP_SPECIAL));
    DSV3_TRY(read_tokens_argument(tokens, count, "tokens"));
    DSV3_TRY(check_buffer(buffer, capacity, needed));
    const Model& m = *model->model;
    DSV3_TRY(require_tokenizer(m));
    // A model's vocabulary may be padded: what it can generate there has no text, as in a stream.
    const int64_t vocab_size = m.config().vocab_size;
    std::vector<int32_t> ids;
    for (uint64_t i = 0; i < count; ++i) {
      if (tokens[i] < 0 || tokens[i] >= vocab_size) {
        return make_field_error(
            Code::kInvalidArgument, "tokens", "tokens[%llu] is %d, expected 0 to %lld",
            static_cast<unsigned long long>(i), tokens[i], static_cast<long long>(vocab_size - 1));
      }
      if (tokens[i] < m.tokenizer().vocab_size()) ids.push_back(tokens[i]);
    }
    std::string text;
    DSV3_TRY(m.tokenizer().decode(ids, (flags & DSV3_DETOKENIZE_SKIP_SPECIAL) != 0, &text));
    return fill_text(text, buffer, capacity, needed);
  });
}

dsv3_status dsv3_model_token_id(const dsv3_model* model, const char* text, uint64_t text_length,
                                int32_t* id, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(model, "model"));
    DSV3_TRY(check_out(id, "id"));
    std::string_view view;
    DSV3_TRY(read_text(text, text_length, "text", &view));
    const Model& m = *model->model;
    DSV3_TRY(require_tokenizer(m));
    const std::optional<int32_t> found = m.tokenizer().token_id(view);
    if (!found) {
      return make_field_error(Code::kNotFound, "text",
                              "text is \"%s\", which is not an added token of %s",
                              utf8_prefix(view, 64).c_str(), m.path().c_str());
    }
    *id = *found;
    return {};
  });
}

dsv3_status dsv3_model_render_chat(const dsv3_model* model, const dsv3_chat* chat, char* buffer,
                                   uint64_t capacity, uint64_t* needed, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(model, "model"));
    DSV3_TRY(check_buffer(buffer, capacity, needed));
    std::vector<ChatMessage> messages;
    ChatOptions options;
    DSV3_TRY(read_chat(chat, &messages, &options));
    const Model& m = *model->model;
    DSV3_TRY(require_tokenizer(m));
    DSV3_ASSIGN(const std::vector<ChatPiece> pieces,
                render_chat(m.chat_template(), m.tokenizer(), messages, options));
    std::string text;
    for (const ChatPiece& piece : pieces) text += piece.text;
    return fill_text(text, buffer, capacity, needed);
  });
}

}  // extern "C"
