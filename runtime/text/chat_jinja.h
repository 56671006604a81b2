// The Jinja texts that chat.cc renders as, for chat_detect.cc to compare a checkpoint's with.
// Nothing runs them.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "runtime/text/chat.h"

namespace dsv3 {

// A template without what does not count: comments, white space within {{ }} and {% %}, and what
// Jinja leaves out between them, as Hugging Face sets it up (trim_blocks, lstrip_blocks). Texts
// that are equal afterwards render the same; white space that would be printed stays.
std::string squeeze_jinja(std::string_view text);

struct KnownTemplate {
  ChatTemplate id;
  std::string squeezed;
};
// Every wording of every template that chat.cc renders.
std::vector<KnownTemplate> known_templates();

// Leaves out a default that changes nothing, with which most published templates begin.
std::string_view without_prologue(std::string_view squeezed);

}  // namespace dsv3
