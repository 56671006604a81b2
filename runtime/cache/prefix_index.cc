#include "runtime/cache/prefix_index.h"

#include <xxhash.h>

#include <algorithm>
#include <cassert>

namespace dsv3 {

PrefixIndex::PrefixIndex(PagePool* pool, uint64_t seed, Hash hash)
    : pool_(pool), seed_(seed), hash_(hash), buckets_(64, kNoPage) {}

uint64_t PrefixIndex::hash_tokens(uint64_t parent, PageTokens tokens) {
  return XXH3_64bits_withSeed(tokens.data(), tokens.size_bytes(), parent);
}

uint64_t PrefixIndex::hash_of(PageId parent, PageTokens tokens) const {
  return hash_(parent == kNoPage ? seed_ : node(parent).hash, tokens);
}

PageId PrefixIndex::find(PageId parent, PageTokens tokens, uint64_t hash) const {
  for (PageId p = bucket(hash); p != kNoPage; p = node(p).chained) {
    // The same parent page means the same chain before it: only these tokens remain to compare.
    if (node(p).hash == hash && node(p).parent == parent &&
        std::equal(tokens.begin(), tokens.end(), node(p).tokens.begin())) {
      return p;
    }
  }
  return kNoPage;
}

PageId PrefixIndex::find(PageId parent, PageTokens tokens) const {
  return find(parent, tokens, hash_of(parent, tokens));
}

void PrefixIndex::grow(PageId page) {
  if (static_cast<size_t>(page) < nodes_.size()) return;
  const auto nodes = std::max(static_cast<size_t>(page) + 1, 2 * nodes_.size());
  if (nodes > buckets_.size()) {
    size_t size = buckets_.size();
    while (size < nodes) size *= 2;
    std::vector<PageId> larger(size, kNoPage);
    nodes_.reserve(nodes);
    buckets_.swap(larger);
    for (PageId p = first_; p != kNoPage; p = node(p).next) {
      node(p).chained = bucket(node(p).hash);
      bucket(node(p).hash) = p;
    }
  }
  nodes_.resize(nodes);
}

void PrefixIndex::link_first(PageId page) {
  node(page).previous = kNoPage;
  node(page).next = first_;
  (first_ == kNoPage ? last_ : node(first_).previous) = page;
  first_ = page;
}

void PrefixIndex::unlink(PageId page) {
  Node& n = node(page);
  (n.previous == kNoPage ? first_ : node(n.previous).next) = n.next;
  (n.next == kNoPage ? last_ : node(n.next).previous) = n.previous;
}

PageId PrefixIndex::insert(PageId parent, PageTokens tokens, PageId page) {
  assert(parent == kNoPage || contains(parent));
  assert(!contains(page));
  const uint64_t hash = hash_of(parent, tokens);
  if (const PageId older = find(parent, tokens, hash); older != kNoPage) return older;
  grow(page);
  Node& n = node(page);
  n.used = true;
  n.children = 0;
  n.parent = parent;
  n.hash = hash;
  std::copy(tokens.begin(), tokens.end(), n.tokens.begin());
  n.chained = bucket(hash);
  bucket(hash) = page;
  if (parent != kNoPage) ++node(parent).children;
  link_first(page);
  pool_->retain(page);
  ++size_;
  return page;
}

void PrefixIndex::touch(PageId page) {
  for (; page != kNoPage; page = node(page).parent) {
    unlink(page);
    link_first(page);  // its parent comes before it: leaves are the oldest
  }
}

bool PrefixIndex::evict() {
  for (PageId p = last_; p != kNoPage; p = node(p).previous) {
    if (pool_->references(p) == 1 && erase(p)) return true;
  }
  return false;
}

bool PrefixIndex::erase(PageId page) {
  Node& n = node(page);
  assert(n.used);
  if (n.children > 0) return false;
  PageId* link = &bucket(n.hash);
  while (*link != page) link = &node(*link).chained;
  *link = n.chained;
  if (n.parent != kNoPage) --node(n.parent).children;
  unlink(page);
  n.used = false;
  --size_;
  pool_->release(page);
  return true;
}

int64_t PrefixIndex::unreferenced() const {
  int64_t count = 0;
  for (PageId p = first_; p != kNoPage; p = node(p).next) count += pool_->references(p) == 1;
  return count;
}

bool PrefixIndex::is_valid() const {
  std::vector<int32_t> children(nodes_.size(), 0);
  int64_t linked = 0;
  for (PageId p = first_; p != kNoPage; p = node(p).next) {
    const Node& n = node(p);
    if (!n.used || pool_->references(p) < 1 || ++linked > size_) return false;
    if ((n.next == kNoPage ? last_ : node(n.next).previous) != p) return false;
    if (find(n.parent, PageTokens(n.tokens)) != p) return false;
    if (n.parent == kNoPage) continue;
    if (!contains(n.parent)) return false;
    // Whoever holds a page holds what comes before it.
    if (pool_->references(n.parent) == 1 && pool_->references(p) > 1) return false;
    ++children[static_cast<size_t>(n.parent)];
  }
  for (size_t i = 0; i < nodes_.size(); ++i) {
    if (nodes_[i].used && nodes_[i].children != children[i]) return false;
  }
  return linked == size_ &&
         size_ == std::count_if(nodes_.begin(), nodes_.end(), [](auto& n) { return n.used; });
}

}  // namespace dsv3
