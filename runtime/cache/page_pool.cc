#include "runtime/cache/page_pool.h"

#include <algorithm>
#include <cassert>

namespace dsv3 {
namespace {

// Pages are allocated in slabs, so that a large budget costs nothing until it is used. A slab has
// at least so many bytes, of which host memory makes huge pages (host_alloc): with small ones the
// latents of sixteen sessions and a small model's weights have more pages than a CPU remembers.
constexpr size_t kSlabBytes = size_t{8} << 20;

// Doubles what there is: reserve() alone would make every slab pay for all lists.
template <class T>
void reserve_more(std::vector<T>* list, size_t size) {
  if (size > list->capacity()) list->reserve(std::max(size, 2 * list->capacity()));
}

}  // namespace

PagePool::PagePool(kernels::Device* device, size_t page_bytes, int64_t capacity)
    : device_(device), page_bytes_(page_bytes), capacity_(capacity) {}

PagePool::~PagePool() {
  for (const auto& slab : slabs_) device_->free(slab);
}

Status PagePool::grow() {
  const auto allocated = static_cast<int64_t>(data_.size());
  int64_t pages = static_cast<int64_t>((kSlabBytes + page_bytes_ - 1) / page_bytes_);
  pages = std::min(pages, capacity_ - allocated);
  if (pages <= 0) {
    return Status(Code::kCapacity,
                  format("the latent cache's budget of %lld pages is used up",
                         static_cast<long long>(capacity_)),
                  "cache_bytes", /*retryable=*/true);
  }
  reserve_more(&slabs_, slabs_.size() + 1);
  const auto total = static_cast<size_t>(allocated + pages);
  reserve_more(&data_, total);
  reserve_more(&references_, total);
  reserve_more(&free_, total);
  const kernels::Dev<std::byte> slab = device_->alloc(static_cast<size_t>(pages) * page_bytes_);
  if (!slab) {
    return make_memory_error("no memory for %lld cache pages of %zu bytes",
                             static_cast<long long>(pages), page_bytes_);
  }
  slabs_.push_back(slab);
  for (int64_t i = 0; i < pages; ++i) {
    data_.push_back(slab + static_cast<size_t>(i) * page_bytes_);
    references_.push_back(0);
  }
  for (int64_t i = pages; i-- > 0;) free_.push_back(static_cast<PageId>(allocated + i));
  return {};
}

Status PagePool::prepare(int64_t pages) {
  while (static_cast<int64_t>(free_.size()) < pages) DSV3_TRY(grow());
  return {};
}

Result<PageId> PagePool::take() {
  if (free_.empty()) DSV3_TRY(grow());
  const PageId page = free_.back();
  free_.pop_back();
  references_[static_cast<size_t>(page)] = 1;
  ++used_;
  // What an earlier owner left could be NaN, which even a masked key must not meet.
  device_->zero(data(page), page_bytes_);
  return page;
}

void PagePool::retain(PageId page) {
  assert(references(page) > 0);
  ++references_[static_cast<size_t>(page)];
}

void PagePool::release(PageId page) {
  assert(references(page) > 0);
  if (--references_[static_cast<size_t>(page)] > 0) return;
  free_.push_back(page);  // never allocates: grow() reserved for every page
  --used_;
}

void PagePool::copy(PageId to, PageId from) { device_->copy(data(to), data(from), page_bytes_); }

bool PagePool::is_valid() const {
  std::vector<bool> is_free(data_.size(), false);
  for (const PageId page : free_) {
    if (page < 0 || static_cast<size_t>(page) >= data_.size()) return false;
    if (is_free[static_cast<size_t>(page)]) return false;  // twice in the list
    is_free[static_cast<size_t>(page)] = true;
  }
  for (size_t page = 0; page < data_.size(); ++page) {
    if (is_free[page] != (references_[page] == 0) || references_[page] < 0) return false;
  }
  return used_ == static_cast<int64_t>(data_.size() - free_.size()) && used_ <= capacity_;
}

}  // namespace dsv3
