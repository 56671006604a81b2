// The pre-tokenizer's pipeline: splits a text into words, each of which byte-pair merging turns
// into tokens on its own. Used by the tokenizer alone.
#pragma once

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/status.h"
#include "runtime/text/image.h"
#include "runtime/text/regex.h"

namespace dsv3 {

// Receives the words in order. A word lies inside the text unless `moved` is set (a space was put
// in front of it); then it lives until the call returns.
class WordSink {
 public:
  virtual ~WordSink() = default;
  virtual Status word(std::string_view word, bool moved) = 0;
};

class PreTokenizer {
 public:
  static Result<PreTokenizer> create(const TokenizerImage& image, const std::string& where);
  // `text`: valid UTF-8.
  Status split(std::string_view text, Regex::Scratch* scratch, WordSink* sink) const {
    return run(0, text, scratch, sink);
  }

 private:
  struct Step {
    Regex regex;
    SplitBehavior behavior;
    bool invert;
  };
  // Runs steps_[step...] on a piece. Calls itself once per step, of which there are at most
  // kMaxSteps, whatever the text.
  Status run(size_t step, std::string_view piece, Regex::Scratch* scratch, WordSink* sink) const;
  Status last_step(std::string_view piece, Regex::Scratch* scratch, WordSink* sink) const;
  template <class Visit>
  static Status each_span(const Regex& regex, std::string_view piece, Regex::Scratch* scratch,
                          Visit visit);

  std::vector<Step> steps_;
  bool prefix_space_ = false;
  std::optional<Regex> byte_regex_;  // ByteLevel's own, where it uses one
};

}  // namespace dsv3
