// From tokens to what a caller sees: whole UTF-8 characters only, stop strings held back while they
// may still match, reasoning told apart from the answer.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "runtime/base/status.h"
#include "runtime/text/tokenizer.h"

namespace dsv3 {

// What buffers for one token's text begin with; few tokens are longer.
inline constexpr size_t kTokenTextBytes = 256;

// Turns a stream of bytes into complete UTF-8 characters. Bytes that can never become valid turn
// into U+FFFD (one per maximal invalid part).
class Utf8Stream {
 public:
  // Appends what is complete after `bytes` to *out.
  void push(std::string_view bytes, std::string* out);
  // Ends the stream: an unfinished character becomes U+FFFD.
  void finish(std::string* out);

 private:
  std::string pending_;
};

// Searches a stream of text for any of several stop strings, holding back only what may still
// become one. Linear time whatever the strings.
class StopMatcher {
 public:
  explicit StopMatcher(std::vector<std::string> stops);  // empty strings are ignored
  // Appends text that is certainly not part of a stop string to *out; true when one matched (the
  // earliest to end; of those the longest); nothing after it, nor it itself, is emitted. `consumed`
  // receives how many bytes of `text` were looked at: all of them, or those up to the match's end.
  bool push(std::string_view text, std::string* out, size_t* consumed = nullptr);
  // Emits what was held back.
  void finish(std::string* out);
  const std::string& matched() const { return matched_; }

 private:
  // A node of the automaton of Aho and Corasick. Its edges are in edges_, because a table of 256
  // per node takes a kilobyte for every byte of the stop strings.
  struct Node {
    int32_t fail = 0;
    int32_t match = -1;  // index of the longest stop string that ends here, or -1
    int32_t depth = 0;
  };
  int32_t step(int32_t state, uint8_t byte) const;
  int32_t edge(int32_t node, uint8_t byte) const;  // -1: none

  std::vector<std::string> stops_;
  std::vector<Node> nodes_;
  std::unordered_map<int64_t, int32_t> edges_;  // node * 256 + byte -> node
  int32_t state_ = 0;
  bool done_ = false;
  std::string held_;  // the last nodes_[state_].depth bytes of the text, and the next text's
  std::string matched_;
};

enum class SegmentKind : uint8_t { kAnswer, kReasoning };
struct Segment {
  SegmentKind kind;
  std::string_view text;  // valid until the Segments change
};

// Pieces of text, adjacent ones of one kind merged. Reused: clear() keeps the memory, so that a
// token costs no allocation.
class Segments {
 public:
  void clear() {
    text_.clear();
    pieces_.clear();
  }
  void add(SegmentKind kind, std::string_view text);  // nothing if it is empty
  void reserve(size_t pieces, size_t bytes);
  bool empty() const { return pieces_.empty(); }
  size_t size() const { return pieces_.size(); }
  Segment operator[](size_t i) const;

 private:
  struct Piece {
    SegmentKind kind;
    size_t end;  // in text_
  };
  std::string text_;
  std::vector<Piece> pieces_;
};

// The decoder of one request: tokens in, segments out. Special tokens produce no text; <think> and
// </think> switch the segment kind. Stop strings are looked for in the answer only.
class StreamDecoder {
 public:
  StreamDecoder(const Tokenizer* tokenizer, std::vector<std::string> stops, bool in_reasoning);
  ~StreamDecoder();
  StreamDecoder(StreamDecoder&&) noexcept;
  // Appends finished pieces to *out; true when a stop string matched and the request is over.
  bool push(int32_t token, Segments* out);
  void finish(Segments* out);
  bool in_reasoning() const;
  const std::string& matched_stop() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace dsv3
