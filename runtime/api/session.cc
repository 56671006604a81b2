#include "runtime/api/handles.h"
#include "runtime/engine/evaluation.h"
#include "runtime/engine/prompt.h"
#include "runtime/engine/session_io.h"

using namespace dsv3;       // NOLINT: the C boundary translates between the two
using namespace dsv3::api;  // NOLINT

bool dsv3_session::close() noexcept {
  if (session == nullptr) return true;
  if (session->engine()->forked()) return false;
  session->engine()->cancel_running(*session);
  return true;
}

namespace {

constexpr dsv3_evaluation kEvaluationDefaults = {.struct_size = sizeof(dsv3_evaluation),
                                                 .reserved = 0,
                                                 .logits = nullptr,
                                                 .hidden = nullptr,
                                                 .mtp_logits = nullptr,
                                                 .logprobs = nullptr,
                                                 .progress = nullptr,
                                                 .progress_user = nullptr,
                                                 .cancel = nullptr};

constexpr dsv3_session_io kSessionIoDefaults = {.struct_size = sizeof(dsv3_session_io),
                                                .flags = 0,
                                                .path = nullptr,
                                                .write = nullptr,
                                                .read = nullptr,
                                                .user = nullptr,
                                                .progress = nullptr,
                                                .progress_user = nullptr,
                                                .cancel = nullptr};

Status read_session_io(const dsv3_session_io* io, bool saving, dsv3_session_io* out,
                       SessionIoOptions* options) {
  *out = kSessionIoDefaults;
  DSV3_TRY(read_struct(io, "dsv3_session_io", out));
  DSV3_TRY(check_flags(out->flags, saving ? 0 : DSV3_SESSION_RECOMPUTE_FOREIGN));
  const bool function = saving ? out->write != nullptr : out->read != nullptr;
  if (out->path == nullptr && !function) {
    return invalid("path", saving ? "path and write are NULL, expected one of them"
                                  : "path and read are NULL, expected one of them");
  }
  if (out->path != nullptr && function) {
    return invalid("path", saving ? "path and write are both given, expected one of them"
                                  : "path and read are both given, expected one of them");
  }
  options->recompute_foreign = (out->flags & DSV3_SESSION_RECOMPUTE_FOREIGN) != 0;
  return read_cancel(out->cancel, &options->cancel);
}

AppendOptions append_options(uint32_t flags) {
  AppendOptions o;
  o.replace = (flags & DSV3_APPEND_REPLACE) != 0;
  o.parse_special = (flags & DSV3_APPEND_PARSE_SPECIAL) != 0;
  o.add_bos = (flags & DSV3_APPEND_ADD_BOS) != 0;
  return o;
}

// The part that all ways of appending share.
template <class Append>
dsv3_status append(dsv3_session* session, uint32_t flags, uint32_t known, uint64_t* length,
                   uint64_t* kept, dsv3_error** error, Append body) noexcept {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(session, "session"));
    DSV3_TRY(check_flags(flags, known));
    DSV3_TRY(session->session->engine()->check_process());
    AppendResult result;
    DSV3_TRY(body(session->session.get(), append_options(flags), &result));
    if (length != nullptr) *length = result.length;
    if (kept != nullptr) *kept = result.kept;
    return {};
  });
}

}  // namespace

extern "C" {

dsv3_status dsv3_session_create(dsv3_context* context, dsv3_session** out, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(context, "context"));
    DSV3_TRY(check_out(out, "out"));
    DSV3_TRY(context->engine->check_process());
    auto handle = std::make_unique<dsv3_session>();
    DSV3_ASSIGN(handle->session, context->engine->create_session());
    *out = handle.release();
    return {};
  });
}

void dsv3_session_free(dsv3_session* session) { free_handle(session, dsv3_session::kMagic); }

dsv3_status dsv3_session_append_tokens(dsv3_session* session, const int32_t* tokens, uint64_t count,
                                       uint32_t flags, uint64_t* length, uint64_t* kept,
                                       dsv3_error** error) {
  return append(session, flags, DSV3_APPEND_REPLACE, length, kept, error,
                [&](Session* s, const AppendOptions& o, AppendResult* result) -> Status {
                  DSV3_TRY(read_tokens_argument(tokens, count, "tokens"));
                  return s->append({tokens, static_cast<size_t>(count)}, o.replace, result);
                });
}

dsv3_status dsv3_session_append_text(dsv3_session* session, const char* text, uint64_t text_length,
                                     uint32_t flags, uint64_t* length, uint64_t* kept,
                                     dsv3_error** error) {
  return append(session, flags,
                DSV3_APPEND_REPLACE | DSV3_APPEND_PARSE_SPECIAL | DSV3_APPEND_ADD_BOS, length, kept,
                error, [&](Session* s, const AppendOptions& o, AppendResult* result) -> Status {
                  std::string_view view;
                  DSV3_TRY(read_text(text, text_length, "text", &view));
                  return append_text(s, view, o, result);
                });
}

dsv3_status dsv3_session_append_fim(dsv3_session* session, const char* prefix,
                                    uint64_t prefix_length, const char* suffix,
                                    uint64_t suffix_length, uint32_t flags, uint64_t* length,
                                    uint64_t* kept, dsv3_error** error) {
  return append(session, flags, DSV3_APPEND_REPLACE | DSV3_APPEND_ADD_BOS, length, kept, error,
                [&](Session* s, const AppendOptions& o, AppendResult* result) -> Status {
                  std::string_view before, after;
                  DSV3_TRY(read_text(prefix, prefix_length, "prefix", &before));
                  DSV3_TRY(read_text(suffix, suffix_length, "suffix", &after));
                  return append_fim(s, before, after, o, result);
                });
}

dsv3_status dsv3_session_append_chat(dsv3_session* session, const dsv3_chat* chat, uint32_t flags,
                                     uint64_t* length, uint64_t* kept, dsv3_error** error) {
  return append(session, flags, DSV3_APPEND_REPLACE, length, kept, error,
                [&](Session* s, const AppendOptions& o, AppendResult* result) -> Status {
                  std::vector<ChatMessage> messages;
                  ChatOptions options;
                  DSV3_TRY(read_chat(chat, &messages, &options));
                  return append_chat(s, messages, options, o, result);
                });
}

dsv3_status dsv3_session_truncate(dsv3_session* session, uint64_t length, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(session, "session"));
    return session->session->truncate(length);
  });
}

dsv3_status dsv3_session_fork(const dsv3_session* session, dsv3_session** out, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(session, "session"));
    DSV3_TRY(check_out(out, "out"));
    auto handle = std::make_unique<dsv3_session>();
    DSV3_ASSIGN(handle->session, session->session->fork());
    *out = handle.release();
    return {};
  });
}

uint64_t dsv3_session_length(const dsv3_session* session) {
  return is_live(session) ? session->session->length() : 0;
}

uint64_t dsv3_session_computed(const dsv3_session* session) {
  return is_live(session) ? session->session->computed() : 0;
}

dsv3_status dsv3_session_get_tokens(const dsv3_session* session, uint64_t begin, int32_t* tokens,
                                    uint64_t capacity, uint64_t* needed, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(session, "session"));
    DSV3_TRY(check_buffer(tokens, capacity, needed));
    uint64_t available = 0;
    // No sequence is longer: a garbage capacity does not become a garbage span.
    const auto room = static_cast<size_t>(std::min<uint64_t>(capacity, INT32_MAX));
    DSV3_TRY(session->session->copy_tokens(begin, {tokens, room}, &available));
    if (needed != nullptr) *needed = available;
    return capacity == 0 || capacity >= available ? Status()
                                                  : buffer_too_small(available, capacity);
  });
}

void dsv3_session_io_init(dsv3_session_io* io, uint32_t struct_size) {
  init_struct(io, struct_size, kSessionIoDefaults);
}

dsv3_status dsv3_session_save(const dsv3_session* session, const dsv3_session_io* io,
                              dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(session, "session"));
    dsv3_session_io value;
    SessionIoOptions options;
    DSV3_TRY(read_session_io(io, /*saving=*/true, &value, &options));
    const std::shared_ptr<const Session> kept = session->session;  // a callback may free the handle
    ProgressCall progress(value.progress, value.progress_user, options.cancel);
    options.progress = progress.progress();
    if (value.path != nullptr) {
      return progress.result(save_session_file(*kept, value.path, options));
    }
    const WriteBytes write = [&](const void* bytes, size_t size) -> Status {
      return call_function([&] { return value.write(value.user, bytes, size); }, "write");
    };
    return progress.result(save_session(*kept, write, options));
  });
}

dsv3_status dsv3_session_load(dsv3_context* context, const dsv3_session_io* io, dsv3_session** out,
                              dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(context, "context"));
    DSV3_TRY(check_out(out, "out"));
    dsv3_session_io value;
    SessionIoOptions options;
    DSV3_TRY(read_session_io(io, /*saving=*/false, &value, &options));
    ProgressCall progress(value.progress, value.progress_user, options.cancel);
    options.progress = progress.progress();
    const std::shared_ptr<Engine> engine = context->engine;  // a callback may free the handle
    const ReadBytes read = [&](void* bytes, size_t size) -> Status {
      return call_function([&] { return value.read(value.user, bytes, size); }, "read");
    };
    auto handle = std::make_unique<dsv3_session>();
    Result<std::shared_ptr<Session>> loaded =
        value.path != nullptr ? load_session_file(engine, value.path, options)
                              : load_session(engine, "the saved session", read, options);
    if (!loaded.ok()) return progress.result(loaded.status());
    handle->session = std::move(*loaded);
    *out = handle.release();
    return {};
  });
}

void dsv3_evaluation_init(dsv3_evaluation* evaluation, uint32_t struct_size) {
  init_struct(evaluation, struct_size, kEvaluationDefaults);
}

dsv3_status dsv3_session_evaluate(dsv3_session* session, const int32_t* tokens, uint64_t count,
                                  const dsv3_evaluation* evaluation, dsv3_error** error) {
  return guarded(error, [&]() -> Status {
    DSV3_TRY(check_handle(session, "session"));
    DSV3_TRY(read_tokens_argument(tokens, count, "tokens"));
    dsv3_evaluation e = kEvaluationDefaults;
    if (evaluation != nullptr) DSV3_TRY(read_struct(evaluation, "dsv3_evaluation", &e));
    DSV3_TRY(check_reserved(e, "dsv3_evaluation"));
    EvaluateOptions o;
    o.logits = e.logits;
    o.hidden = e.hidden;
    o.mtp_logits = e.mtp_logits;
    o.logprobs = e.logprobs;
    if (e.progress != nullptr) {
      o.progress = [&e](uint64_t done, uint64_t total) {
        e.progress(e.progress_user, done, total);
      };
    }
    DSV3_TRY(read_cancel(e.cancel, &o.cancel));
    return evaluate(session->session, {tokens, static_cast<size_t>(count)}, o);
  });
}

}  // extern "C"
