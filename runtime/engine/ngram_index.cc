#include "runtime/engine/ngram_index.h"

#include <algorithm>
#include <bit>

namespace dsv3 {

NgramIndex::NgramIndex(int32_t n, int64_t positions) : n_(n) {
  const auto size = std::bit_ceil(static_cast<uint64_t>(std::max<int64_t>(positions, 64)));
  mask_ = static_cast<int64_t>(size) - 1;
  head_.assign(size, -1);
  previous_.assign(size, -1);
}

size_t NgramIndex::slot(std::span<const int32_t> gram) const {
  uint64_t h = 0x9E3779B97F4A7C15u;
  for (const int32_t t : gram) h = (h ^ static_cast<uint32_t>(t)) * 0xD6E8FEB86659FD93u;
  return static_cast<size_t>((h ^ (h >> 32)) & static_cast<uint64_t>(mask_));
}

int64_t NgramIndex::match_length(std::span<const int32_t> a, std::span<const int32_t> b) {
  const auto most = std::min({a.size(), b.size(), static_cast<size_t>(kMaxMatch)});
  size_t length = 0;
  while (length < most && a[a.size() - 1 - length] == b[b.size() - 1 - length]) ++length;
  return static_cast<int64_t>(length);
}

void NgramIndex::extend(std::span<const int32_t> text, int64_t end) {
  // What would be forgotten at once is not added.
  for (int64_t at = std::max({newest_ + 1, n_, end - mask_}); at <= end; ++at) {
    int32_t& head =
        head_[slot(text.subspan(static_cast<size_t>(at - n_), static_cast<size_t>(n_)))];
    previous_[static_cast<size_t>(at & mask_)] = head;
    head = static_cast<int32_t>(at);
  }
  newest_ = std::max(newest_, end);
}

}  // namespace dsv3
