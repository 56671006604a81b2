// The pages of one sequence, in order. Copying is O(pages): the copy shares every page, and whoever
// writes to a shared page first gets one of its own.
//
// Not thread-safe: the engine serialises access.
#pragma once

#include <cstdint>
#include <vector>

#include "runtime/cache/page_pool.h"

namespace dsv3 {

class PageTable {
 public:
  explicit PageTable(PagePool* pool) : pool_(pool) {}
  ~PageTable() { truncate(0); }
  PageTable(const PageTable& other);
  PageTable& operator=(const PageTable&) = delete;
  PageTable(PageTable&& other) noexcept;

  // Of two tables of one pool.
  void swap(PageTable& other) noexcept {
    pages_.swap(other.pages_);
    data_.swap(other.data_);
  }

  // Makes positions [begin, end) writable: takes missing pages and replaces shared ones in that
  // range by copies. On failure (kCapacity, kOutOfMemory) the table is as it was.
  Status make_writable(int64_t begin, int64_t end);
  // Gives back the pages that hold no position below `length`.
  void truncate(int64_t length);
  // How many pages make_writable(begin, end) would take from the pool.
  int64_t pages_needed(int64_t begin, int64_t end) const;

  // For pages that are shared with the prefix index.
  PageId page(int64_t index) const { return pages_[static_cast<size_t>(index)]; }
  // Puts `page` in the place of the page at `index`, or behind the last; the table takes a
  // reference of its own. May throw std::bad_alloc when the table grows beyond reserve().
  void share(int64_t index, PageId page);
  void reserve(int64_t pages);

  int64_t size() const { return static_cast<int64_t>(pages_.size()); }
  // For kernels::SequenceRows::pages; valid until the table changes.
  const kernels::Dev<std::byte>* data() const { return data_.data(); }

 private:
  PagePool* pool_;
  std::vector<PageId> pages_;
  std::vector<kernels::Dev<std::byte>> data_;
};

}  // namespace dsv3
