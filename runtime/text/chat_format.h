// What tells the family's chat templates apart. Between chat.cc, which renders by it, and
// chat_jinja.cc, which has the Jinja texts that say the same.
#pragma once

#include <span>
#include <string_view>

#include "runtime/text/chat.h"

namespace dsv3 {

// How the templates with <｜User｜> and <｜Assistant｜> before V3.1 differ.
struct TurnFormat {
  ChatTemplate id;
  const char* name;
  bool joins_system;    // several system messages are joined; otherwise the last one counts
  bool strips_thought;  // of an earlier answer, what follows the last </think> remains
  bool opens_thought;   // the generation prompt ends in <think> and a line break
  bool closes_calls;    // content may stand beside tool calls, and each list of calls is closed
  bool reopens;         // the assistant's turn opens after each user's message, and its lists of
                        // calls and of outputs anew each time
};
std::span<const TurnFormat> turn_formats();

}  // namespace dsv3
