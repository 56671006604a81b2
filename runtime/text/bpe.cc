#include "runtime/text/bpe.h"

#include <algorithm>
#include <functional>

namespace dsv3 {
namespace {

// Up to here looking through all pairs for the least rank beats keeping a heap.
constexpr size_t kShortWord = 48;

}  // namespace

void Bpe::encode(std::string_view word, BpeScratch* scratch, std::vector<int32_t>* out) const {
  if ((image_->header().flags & kImageIgnoreMerges) != 0) {
    const uint32_t id = image_->find_word(word);
    if (id != kNoId) {
      out->push_back(static_cast<int32_t>(id));
      return;
    }
  }
  if (word.size() <= kShortWord) {
    encode_short(word, out);
  } else {
    encode_long(word, scratch, out);
  }
}

void Bpe::encode_short(std::string_view word, std::vector<int32_t>* out) const {
  uint32_t ids[kShortWord];
  uint32_t ranks[kShortWord];    // of the merge of symbol i and i + 1
  uint32_t results[kShortWord];  // of that merge
  size_t n = word.size();
  for (size_t i = 0; i < n; ++i) ids[i] = image_->byte_token(static_cast<uint8_t>(word[i]));
  const auto look_up = [&](size_t i) {
    const MergeSlot merge = image_->find_merge(ids[i], ids[i + 1]);
    ranks[i] = merge.rank;
    results[i] = merge.result;
  };
  for (size_t i = 0; i + 1 < n; ++i) look_up(i);
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) {
      if (ranks[i] < ranks[best]) best = i;
    }
    if (ranks[best] == kNoId) break;
    ids[best] = results[best];
    --n;
    for (size_t i = best + 1; i < n; ++i) {
      ids[i] = ids[i + 1];
      ranks[i] = ranks[i + 1];
      results[i] = results[i + 1];
    }
    if (best > 0) look_up(best - 1);
    if (best + 1 < n) look_up(best);
  }
  for (size_t i = 0; i < n; ++i) out->push_back(static_cast<int32_t>(ids[i]));
}

void Bpe::encode_long(std::string_view word, BpeScratch* scratch, std::vector<int32_t>* out) const {
  std::vector<BpeScratch::Symbol>& symbols = scratch->symbols_;
  std::vector<uint64_t>& queue = scratch->queue_;
  const auto n = static_cast<uint32_t>(word.size());
  symbols.resize(n);
  queue.clear();
  for (uint32_t i = 0; i < n; ++i) {
    symbols[i] = {image_->byte_token(static_cast<uint8_t>(word[i])), i == 0 ? kNoId : i - 1,
                  i + 1 == n ? kNoId : i + 1, kNoId, kNoId};
  }
  // Finds the merge of the symbol at `at` with its next one; true when there is one.
  const auto look_up = [&](uint32_t at) {
    BpeScratch::Symbol& s = symbols[at];
    s.rank = kNoId;
    if (s.next == kNoId) return false;
    const MergeSlot merge = image_->find_merge(s.id, symbols[s.next].id);
    s.rank = merge.rank;
    s.result = merge.result;
    return merge.rank != kNoId;
  };
  const auto entry = [&](uint32_t at) { return uint64_t{symbols[at].rank} << 32 | at; };
  for (uint32_t i = 0; i < n; ++i) {
    if (look_up(i)) queue.push_back(entry(i));
  }
  std::make_heap(queue.begin(), queue.end(), std::greater<>());
  while (!queue.empty()) {
    std::pop_heap(queue.begin(), queue.end(), std::greater<>());
    const uint64_t top = queue.back();
    queue.pop_back();
    const auto at = static_cast<uint32_t>(top);
    BpeScratch::Symbol& s = symbols[at];
    // Left over from before one of the pair was merged otherwise (a rank belongs to one pair).
    if (s.rank != top >> 32) continue;
    BpeScratch::Symbol& eaten = symbols[s.next];
    s.id = s.result;
    s.next = eaten.next;
    eaten.rank = kNoId;
    if (s.next != kNoId) symbols[s.next].previous = at;
    if (look_up(at)) {
      queue.push_back(entry(at));
      std::push_heap(queue.begin(), queue.end(), std::greater<>());
    }
    if (s.previous != kNoId && look_up(s.previous)) {
      queue.push_back(entry(s.previous));
      std::push_heap(queue.begin(), queue.end(), std::greater<>());
    }
  }
  for (uint32_t at = 0; at != kNoId; at = symbols[at].next) {
    out->push_back(static_cast<int32_t>(symbols[at].id));
  }
}

}  // namespace dsv3
