// The pool of latent pages of one context, under a hard budget. A page holds kLatentPageTokens
// consecutive positions of one sequence for every layer (MTP modules included). Pages are
// reference- counted: sessions share them after a fork until one writes.
//
// Not thread-safe: the engine serialises access.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/base/status.h"

namespace dsv3 {

using PageId = int32_t;

class PagePool {
 public:
  // `page_bytes` covers all layers; `capacity` pages at most are ever allocated.
  PagePool(kernels::Device* device, size_t page_bytes, int64_t capacity);
  ~PagePool();
  PagePool(const PagePool&) = delete;
  PagePool& operator=(const PagePool&) = delete;

  // A zeroed page with one reference. kCapacity (retryable) when the budget is spent, kOutOfMemory
  // when the device has no memory.
  Result<PageId> take();
  // Makes sure that the next `pages` calls of take() succeed; errors as take()'s.
  Status prepare(int64_t pages);
  void retain(PageId page);
  void release(PageId page);
  int32_t references(PageId page) const { return references_[static_cast<size_t>(page)]; }
  kernels::Dev<std::byte> data(PageId page) const { return data_[static_cast<size_t>(page)]; }
  void copy(PageId to, PageId from);

  int64_t capacity() const { return capacity_; }
  int64_t used() const { return used_; }
  int64_t available() const { return capacity_ - used_; }
  size_t page_bytes() const { return page_bytes_; }
  // Every page is either free with no reference, or used with at least one.
  bool is_valid() const;

 private:
  Status grow();

  kernels::Device* device_;
  const size_t page_bytes_;
  const int64_t capacity_;
  int64_t used_ = 0;
  std::vector<kernels::Dev<std::byte>> slabs_;
  std::vector<kernels::Dev<std::byte>> data_;  // by page
  std::vector<int32_t> references_;            // by page
  std::vector<PageId> free_;
};

}  // namespace dsv3
