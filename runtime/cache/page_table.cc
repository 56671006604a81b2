#include "runtime/cache/page_table.h"

#include <algorithm>
#include <cassert>
#include <utility>

#include "runtime/base/checked.h"

namespace dsv3 {
namespace {

constexpr int64_t kTokens = kernels::kLatentPageTokens;

}  // namespace

PageTable::PageTable(const PageTable& other)
    : pool_(other.pool_), pages_(other.pages_), data_(other.data_) {
  for (const PageId page : pages_) pool_->retain(page);
}

PageTable::PageTable(PageTable&& other) noexcept
    : pool_(other.pool_), pages_(std::move(other.pages_)), data_(std::move(other.data_)) {
  other.pages_.clear();
  other.data_.clear();
}

int64_t PageTable::pages_needed(int64_t begin, int64_t end) const {
  if (begin >= end) return 0;
  const int64_t last = ceil_div(end, kTokens);
  int64_t needed = std::max<int64_t>(0, last - size());
  for (int64_t i = begin / kTokens; i < std::min(last, size()); ++i) {
    if (pool_->references(pages_[static_cast<size_t>(i)]) > 1) ++needed;
  }
  return needed;
}

Status PageTable::make_writable(int64_t begin, int64_t end) {
  if (begin >= end) return {};
  const int64_t last = ceil_div(end, kTokens);
  const int64_t old_size = size();
  // Everything that can fail comes first.
  assert(begin / kTokens <= old_size);
  const int64_t needed = pages_needed(begin, end);
  pages_.reserve(static_cast<size_t>(std::max(last, old_size)));
  data_.reserve(static_cast<size_t>(std::max(last, old_size)));
  DSV3_TRY(pool_->prepare(needed));
  for (int64_t i = begin / kTokens; i < last; ++i) {
    const auto at = static_cast<size_t>(i);
    if (i >= old_size) {
      DSV3_ASSIGN(const PageId page, pool_->take());
      pages_.push_back(page);
      data_.push_back(pool_->data(page));
    } else if (pool_->references(pages_[at]) > 1) {
      DSV3_ASSIGN(const PageId page, pool_->take());
      pool_->copy(page, pages_[at]);
      pool_->release(pages_[at]);
      pages_[at] = page;
      data_[at] = pool_->data(page);
    }
  }
  return {};
}

void PageTable::share(int64_t index, PageId page) {
  assert(index <= size());
  if (index == size()) {
    reserve(index + 1);
    pages_.push_back(page);
    data_.push_back(pool_->data(page));
    pool_->retain(page);
    return;
  }
  const auto at = static_cast<size_t>(index);
  pool_->retain(page);
  pool_->release(pages_[at]);
  pages_[at] = page;
  data_[at] = pool_->data(page);
}

void PageTable::reserve(int64_t pages) {
  pages_.reserve(static_cast<size_t>(pages));
  data_.reserve(static_cast<size_t>(pages));
}

void PageTable::truncate(int64_t length) {
  const auto keep = static_cast<size_t>(ceil_div<int64_t>(length, kTokens));
  while (pages_.size() > keep) {
    pool_->release(pages_.back());
    pages_.pop_back();
    data_.pop_back();
  }
}

}  // namespace dsv3
