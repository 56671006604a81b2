// Full pages, found again by the tokens that led to them: a tree whose nodes are pages, each known
// by the hash of its whole chain of tokens and compared token by token. The index holds one
// reference to each of its pages; sessions that share a page hold theirs. A page that only the
// index refers to is a leaf or leads to such pages alone (whoever holds a page holds its chain), so
// leaves can be given up one by one, least recently used first.
//
// A node has the number of its page: memory is bounded by the pool's, and nothing is allocated but
// when the pool has grown. Not thread-safe: the engine serialises access.
#pragma once

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "runtime/cache/page_pool.h"

namespace dsv3 {

inline constexpr PageId kNoPage = -1;
using PageTokens = std::span<const int32_t, kernels::kLatentPageTokens>;

class PrefixIndex {
 public:
  using Hash = uint64_t (*)(uint64_t parent, PageTokens tokens);
  // `seed` stands for everything that latents depend on beside the tokens (model, kernel set, page
  // type). Another hash is for tests.
  PrefixIndex(PagePool* pool, uint64_t seed, Hash hash = &PrefixIndex::hash_tokens);

  // The page that holds these tokens after the chain that ends with `parent` (kNoPage: at the
  // beginning); kNoPage when there is none.
  PageId find(PageId parent, PageTokens tokens) const;
  // Makes `page` findable; `parent` is kNoPage or in the index. Returns the page that stands for
  // these tokens: an older one if there is one (the caller may use that and drop its own).
  // Throws std::bad_alloc, and then nothing has changed.
  PageId insert(PageId parent, PageTokens tokens, PageId page);
  bool contains(PageId page) const {
    return page >= 0 && static_cast<size_t>(page) < nodes_.size() && node(page).used;
  }
  // The page and its chain were used just now.
  void touch(PageId page);
  // Gives up the least recently used page that nobody else refers to; false: there is none.
  bool evict();
  // Forgets a page that no other page in the index follows; false: another one does.
  bool erase(PageId page);

  int64_t size() const { return size_; }
  // Of these, how many nobody else refers to: evict() can give up so many.
  int64_t unreferenced() const;
  // Visits every page with its parent, most recently used first: fn(page, parent, tokens, hash).
  template <class Fn>
  void for_each(Fn fn) const {
    for (PageId p = first_; p != kNoPage; p = node(p).next) {
      fn(p, node(p).parent, PageTokens(node(p).tokens), node(p).hash);
    }
  }
  // Links, counts and references agree.
  bool is_valid() const;

 private:
  struct Node {
    bool used = false;
    int32_t children = 0;
    PageId parent = kNoPage;
    PageId previous = kNoPage, next = kNoPage;  // in order of use, the most recent first
    PageId chained = kNoPage;                   // the next with the same bucket
    uint64_t hash = 0;                          // of the whole chain
    std::array<int32_t, kernels::kLatentPageTokens> tokens;
  };
  static uint64_t hash_tokens(uint64_t parent, PageTokens tokens);
  Node& node(PageId page) { return nodes_[static_cast<size_t>(page)]; }
  const Node& node(PageId page) const { return nodes_[static_cast<size_t>(page)]; }
  uint64_t hash_of(PageId parent, PageTokens tokens) const;
  PageId find(PageId parent, PageTokens tokens, uint64_t hash) const;
  PageId& bucket(uint64_t hash) { return buckets_[hash & (buckets_.size() - 1)]; }
  const PageId& bucket(uint64_t hash) const { return buckets_[hash & (buckets_.size() - 1)]; }
  void grow(PageId page);
  void link_first(PageId page);
  void unlink(PageId page);

  PagePool* const pool_;
  const uint64_t seed_;
  const Hash hash_;
  std::vector<Node> nodes_;      // by page
  std::vector<PageId> buckets_;  // a power of two
  PageId first_ = kNoPage, last_ = kNoPage;
  int64_t size_ = 0;
};

}  // namespace dsv3
