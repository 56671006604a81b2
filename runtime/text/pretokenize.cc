#include "runtime/text/pretokenize.h"

#include "runtime/text/utf8.h"

namespace dsv3 {
namespace {

// What ByteLevel with use_regex splits with: GPT-2's pattern.
constexpr std::string_view kByteLevelPattern =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";

}  // namespace

Result<PreTokenizer> PreTokenizer::create(const TokenizerImage& image, const std::string& where) {
  PreTokenizer result;
  for (size_t i = 0; i < image.step_count(); ++i) {
    const StepSlot slot = image.step(i);
    const std::string step_where = where + format(": pre_tokenizer part %zu", i);
    const std::string_view pattern = image.pattern(i);
    DSV3_ASSIGN(Regex regex, slot.literal != 0 ? Regex::literal(pattern, step_where)
                                               : Regex::compile(pattern, step_where));
    result.steps_.push_back(
        {std::move(regex), static_cast<SplitBehavior>(slot.behavior), slot.invert != 0});
  }
  const uint32_t flags = image.header().flags;
  result.prefix_space_ = (flags & kImagePrefixSpace) != 0;
  if ((flags & kImageByteRegex) != 0) {
    DSV3_ASSIGN(result.byte_regex_, Regex::compile(kByteLevelPattern, where));
  }
  return result;
}

// Calls visit(span, is_match) for the matches and what lies between them, in order, as the
// original's iterator finds them: an empty match right behind the previous match is passed over.
template <class Visit>
Status PreTokenizer::each_span(const Regex& regex, std::string_view piece, Regex::Scratch* scratch,
                               Visit visit) {
  size_t from = 0;  // where the search goes on
  size_t done = 0;  // end of what was visited
  bool matched = false;
  while (from <= piece.size()) {
    size_t begin = 0, end = 0;
    const int found = regex.find(piece, from, scratch, &begin, &end);
    if (found < 0) return regex.error(found);
    if (found == 0) break;
    if (begin == end && matched && end == done) {
      from = end + (end < piece.size() ? utf8_length(piece[end]) : 1);
      continue;
    }
    if (done != begin) DSV3_TRY(visit(piece.substr(done, begin - done), false));
    DSV3_TRY(visit(piece.substr(begin, end - begin), true));
    from = done = end;
    matched = true;
  }
  if (done != piece.size()) DSV3_TRY(visit(piece.substr(done), false));
  return {};
}

Status PreTokenizer::run(size_t step_index, std::string_view piece, Regex::Scratch* scratch,
                         WordSink* sink) const {
  if (piece.empty()) return {};
  if (step_index == steps_.size()) return last_step(piece, scratch, sink);
  const Step& step = steps_[step_index];
  const auto pass_on = [&](std::string_view part) {
    return run(step_index + 1, part, scratch, sink);
  };
  if (step.behavior == SplitBehavior::kIsolated) {
    return each_span(step.regex, piece, scratch,
                     [&](std::string_view part, bool) { return pass_on(part); });
  }
  if (step.behavior == SplitBehavior::kRemoved) {
    return each_span(step.regex, piece, scratch, [&](std::string_view part, bool match) {
      return match != step.invert ? Status() : pass_on(part);
    });
  }
  // The others join neighbours: a part is held back until what follows it is known.
  std::string_view held;
  bool has_held = false;
  bool held_match = false;
  const auto joined = [&](bool match) {
    switch (step.behavior) {
      case SplitBehavior::kContiguous:
        return match == held_match;
      case SplitBehavior::kMergedWithPrevious:
        return match && !held_match;
      default:  // kMergedWithNext
        return held_match && !match;
    }
  };
  DSV3_TRY(each_span(step.regex, piece, scratch, [&](std::string_view part, bool found) {
    const bool match = found != step.invert;
    if (has_held && joined(match)) {
      held = {held.data(), held.size() + part.size()};
    } else {
      Status passed = has_held ? pass_on(held) : Status();
      if (!passed.ok()) return passed;
      held = part;
      has_held = true;
    }
    held_match = match;
    return Status();
  }));
  return has_held ? pass_on(held) : Status();
}

Status PreTokenizer::last_step(std::string_view piece, Regex::Scratch* scratch,
                               WordSink* sink) const {
  std::string prefixed;
  const bool moved = prefix_space_ && piece[0] != ' ';
  if (moved) {
    prefixed.reserve(piece.size() + 1);
    prefixed.push_back(' ');
    prefixed.append(piece);
    piece = prefixed;
  }
  if (!byte_regex_) return sink->word(piece, moved);
  return each_span(*byte_regex_, piece, scratch, [&](std::string_view part, bool) {
    return part.empty() ? Status() : sink->word(part, moved);
  });
}

}  // namespace dsv3
