// From what a caller has (text, a cursor in a file, a conversation) to the tokens of a session.
#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string_view>
#include <vector>

#include "runtime/base/status.h"
#include "runtime/engine/session.h"
#include "runtime/model/model.h"
#include "runtime/text/chat.h"

namespace dsv3 {

struct AppendOptions {
  bool replace = false;        // see Session::append
  bool parse_special = false;  // text only
  bool add_bos = false;        // begin-of-sentence first, if the sequence is empty (or replaced)
};

// kUnsupported, naming the file, for a model without a tokenizer.
Status require_tokenizer(const Model& model);

Status append_text(Session* session, std::string_view text, const AppendOptions& options,
                   AppendResult* result);
Status append_fim(Session* session, std::string_view prefix, std::string_view suffix,
                  const AppendOptions& options, AppendResult* result);
Status append_chat(Session* session, std::span<const ChatMessage> messages, const ChatOptions& chat,
                   const AppendOptions& options, AppendResult* result);

// The prompt of a completion at a cursor: fill-in-the-middle with a suffix, else the text before
// the cursor, after begin-of-sentence where the tokenizer adds one.
Status encode_completion(const Model& model, std::string_view prefix,
                         std::optional<std::string_view> suffix, std::vector<int32_t>* out);

}  // namespace dsv3
