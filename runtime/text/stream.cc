#include "runtime/text/stream.h"

#include "runtime/text/utf8.h"

namespace dsv3 {
void Utf8Stream::push(std::string_view bytes, std::string* out) {
  if (!pending_.empty()) {
    pending_.append(bytes);
    bytes = pending_;
  }
  size_t begin = 0;  // of what was not put out yet
  size_t i = 0;
  while (i < bytes.size()) {
    const Utf8Unit unit = utf8_unit(bytes.substr(i));
    if (unit.state == Utf8State::kIncomplete) break;
    if (unit.state == Utf8State::kInvalid) {
      out->append(bytes.substr(begin, i - begin));
      out->append(kReplacementCharacter);
      begin = i + unit.size;
    }
    i += unit.size;
  }
  out->append(bytes.substr(begin, i - begin));
  const std::string rest(bytes.substr(i));  // at most three bytes; may be pending_'s own
  pending_ = rest;
}

void Utf8Stream::finish(std::string* out) {
  if (!pending_.empty()) out->append(kReplacementCharacter);
  pending_.clear();
}

void Segments::add(SegmentKind kind, std::string_view text) {
  if (text.empty()) return;
  text_.append(text);
  if (pieces_.empty() || pieces_.back().kind != kind) pieces_.push_back({kind, 0});
  pieces_.back().end = text_.size();
}

void Segments::reserve(size_t pieces, size_t bytes) {
  pieces_.reserve(pieces);
  text_.reserve(bytes);
}

Segment Segments::operator[](size_t i) const {
  const size_t begin = i == 0 ? 0 : pieces_[i - 1].end;
  return {pieces_[i].kind, std::string_view(text_).substr(begin, pieces_[i].end - begin)};
}

struct StreamDecoder::Impl {
  const Tokenizer* tokenizer;
  std::vector<std::string> stops;
  StopMatcher answer_stop;
  // Where the vocabulary has no token </think>, its text ends the reasoning.
  StopMatcher reasoning_end;
  Utf8Stream utf8;
  int32_t think_begin, think_end;  // token ids, -1: none
  bool in_reasoning;
  bool stopped = false;
  std::string whole, certain;  // of one call; members, so that they keep their memory

  Impl(const Tokenizer* t, std::vector<std::string> s, bool reasoning)
      : tokenizer(t),
        stops(std::move(s)),
        answer_stop(stops),
        reasoning_end({}),
        think_begin(t->token_id("<think>").value_or(-1)),
        think_end(t->token_id("</think>").value_or(-1)),
        in_reasoning(reasoning) {
    restart_reasoning();
    whole.reserve(kTokenTextBytes);
    certain.reserve(kTokenTextBytes);
  }

  void restart_reasoning() {
    reasoning_end = StopMatcher(think_end < 0 ? std::vector<std::string>{"</think>"}
                                              : std::vector<std::string>{});
  }

  // Takes whole characters.
  void put_text(std::string_view text, Segments* out) {
    certain.clear();
    if (in_reasoning) {
      size_t consumed = 0;
      const bool ended = reasoning_end.push(text, &certain, &consumed);
      out->add(SegmentKind::kReasoning, certain);
      if (!ended) return;
      in_reasoning = false;
      restart_reasoning();
      text.remove_prefix(consumed);
      certain.clear();
    }
    if (text.empty()) return;
    stopped = answer_stop.push(text, &certain);
    out->add(SegmentKind::kAnswer, certain);
  }

  // Puts out what is held back: nothing that follows can belong to it.
  void flush(Segments* out) {
    whole.clear();
    utf8.finish(&whole);
    if (!whole.empty()) put_text(whole, out);
    if (stopped) return;
    certain.clear();
    (in_reasoning ? reasoning_end : answer_stop).finish(&certain);
    out->add(in_reasoning ? SegmentKind::kReasoning : SegmentKind::kAnswer, certain);
  }
};

StreamDecoder::StreamDecoder(const Tokenizer* tokenizer, std::vector<std::string> stops,
                             bool in_reasoning)
    : impl_(std::make_unique<Impl>(tokenizer, std::move(stops), in_reasoning)) {}
StreamDecoder::~StreamDecoder() = default;
StreamDecoder::StreamDecoder(StreamDecoder&&) noexcept = default;

bool StreamDecoder::push(int32_t token, Segments* out) {
  Impl& s = *impl_;
  if (s.stopped) return true;
  const bool begins = token >= 0 && token == s.think_begin;
  const bool ends = token >= 0 && token == s.think_end;
  if (begins || ends) {
    s.flush(out);
    s.in_reasoning = begins;
    return s.stopped;
  }
  if (s.tokenizer->is_special(token)) return false;
  s.whole.clear();
  s.utf8.push(s.tokenizer->token_bytes(token), &s.whole);
  if (!s.whole.empty()) s.put_text(s.whole, out);
  return s.stopped;
}

void StreamDecoder::finish(Segments* out) {
  if (!impl_->stopped) impl_->flush(out);
}
bool StreamDecoder::in_reasoning() const { return impl_->in_reasoning; }
const std::string& StreamDecoder::matched_stop() const { return impl_->answer_stop.matched(); }

}  // namespace dsv3
