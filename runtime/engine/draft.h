// What all drafters share: a draft is a guess of the tokens that come next, which the engine
// verifies in one step of several rows. A draft never changes what is generated (request.cc accepts
// a token if and only if it is the position's own sample); a bad one only costs time.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace dsv3 {

inline constexpr int32_t kMaxDraft = 64;  // tokens

enum class DraftSource : uint8_t { kNone, kReference, kLookup, kMtp };
inline constexpr int kDraftSources = 4;

// A draft's confidence is how many tokens before it agree with where it comes from: acceptance is
// measured by classes of it.
inline constexpr int kConfidenceClasses = 6;
constexpr int confidence_class(int64_t agreeing) {
  return agreeing < 2    ? static_cast<int>(agreeing < 0 ? 0 : agreeing)
         : agreeing < 4  ? 2
         : agreeing < 8  ? 3
         : agreeing < 16 ? 4
                         : 5;
}

struct Draft {
  DraftSource source = DraftSource::kNone;
  int64_t confidence = 0;
  std::vector<int32_t> tokens;

  void clear() {
    source = DraftSource::kNone;
    confidence = 0;
    tokens.clear();
  }
};

}  // namespace dsv3
