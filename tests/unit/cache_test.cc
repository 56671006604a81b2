#include <doctest/doctest.h>

#include <array>
#include <cstdint>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/cache/page_pool.h"
#include "runtime/cache/page_table.h"
#include "runtime/cache/prefix_index.h"

namespace dsv3 {
namespace {

struct Fixture {
  Fixture() {
    kernels::DeviceOptions options;
    options.kernels = "ref";
    device = std::move(*kernels::make_device(options));
    pool = std::make_unique<PagePool>(device.get(), 4096, 10);
  }
  void write(PageTable* table, int64_t page, int32_t value) {
    device->upload(table->data()[page], &value, sizeof value);
  }
  int32_t read(const PageTable& table, int64_t page) {
    int32_t value = 0;
    device->download(&value, table.data()[page], sizeof value);
    return value;
  }
  std::unique_ptr<kernels::Device> device;
  std::unique_ptr<PagePool> pool;
};

TEST_CASE_FIXTURE(Fixture, "a table takes pages as positions need them and gives them back") {
  {
    PageTable table(pool.get());
    CHECK(table.pages_needed(0, 1) == 1);
    REQUIRE(table.make_writable(0, 64).ok());
    CHECK(table.size() == 1);
    REQUIRE(table.make_writable(64, 65).ok());
    CHECK(table.size() == 2);
    CHECK(table.pages_needed(65, 128) == 0);
    table.truncate(64);
    CHECK(table.size() == 1);
    CHECK(pool->used() == 1);
  }
  CHECK(pool->used() == 0);
  CHECK(pool->is_valid());
}

TEST_CASE_FIXTURE(Fixture, "a copy shares pages until one of the two writes") {
  PageTable table(pool.get());
  REQUIRE(table.make_writable(0, 192).ok());
  for (int64_t page = 0; page < 3; ++page) write(&table, page, 10 + static_cast<int32_t>(page));
  PageTable fork(table);
  CHECK(pool->used() == 3);
  CHECK(fork.pages_needed(130, 140) == 1);
  REQUIRE(fork.make_writable(130, 140).ok());
  CHECK(pool->used() == 4);
  CHECK(read(fork, 2) == 12);  // the copy holds what was shared
  write(&fork, 2, 99);
  CHECK(read(table, 2) == 12);
  CHECK(table.data()[0].get() == fork.data()[0].get());
  table.truncate(0);
  CHECK(read(fork, 0) == 10);
  CHECK(pool->used() == 3);
  CHECK(pool->is_valid());
}

TEST_CASE_FIXTURE(Fixture, "an exhausted pool is a retryable error that changes nothing") {
  PageTable table(pool.get());
  REQUIRE(table.make_writable(0, 8 * 64).ok());
  PageTable fork(table);
  const Status status = fork.make_writable(7 * 64, 11 * 64);
  CHECK(status.code() == Code::kCapacity);
  CHECK(status.retryable());
  CHECK(status.field() == "cache_bytes");
  CHECK(fork.size() == 8);
  CHECK(pool->used() == 8);
  CHECK(fork.data()[7].get() == table.data()[7].get());
  table.truncate(0);
  CHECK(fork.make_writable(7 * 64, 10 * 64).ok());
  CHECK(pool->is_valid());
}

TEST_CASE_FIXTURE(Fixture, "a page that is taken again is zero") {
  {
    PageTable table(pool.get());
    REQUIRE(table.make_writable(0, 1).ok());
    write(&table, 0, -1);
  }
  PageTable table(pool.get());
  REQUIRE(table.make_writable(0, 1).ok());
  CHECK(read(table, 0) == 0);
}

TEST_CASE_FIXTURE(Fixture, "slabs are large enough for huge pages, whatever a page has") {
  for (const size_t bytes : {size_t{143360}, size_t{1990656}, size_t{9} << 20}) {
    PagePool wide(device.get(), bytes, 1000);
    auto page = wide.take();
    REQUIRE(page.ok());
    // host_alloc() lets such a buffer begin on a huge page.
    CHECK(reinterpret_cast<uintptr_t>(wide.data(*page).get()) % (size_t{2} << 20) == 0);
    wide.release(*page);
  }
}

TEST_CASE_FIXTURE(Fixture, "random forks, writes and truncations keep every table's contents") {
  std::mt19937 random(7);
  struct Sequence {
    std::unique_ptr<PageTable> table;
    std::vector<int32_t> contents;  // by page
  };
  std::vector<Sequence> sequences;
  sequences.push_back({std::make_unique<PageTable>(pool.get()), {}});
  for (int step = 0; step < 5000; ++step) {
    Sequence& s = sequences[random() % sequences.size()];
    switch (random() % 4) {
      case 0:
      case 1: {  // write a page, old or next
        const auto page = static_cast<int64_t>(random() % (s.contents.size() + 1));
        if (!s.table->make_writable(page * 64, page * 64 + 1).ok()) break;
        if (page == static_cast<int64_t>(s.contents.size())) s.contents.push_back(0);
        s.contents[static_cast<size_t>(page)] = step;
        write(s.table.get(), page, step);
        break;
      }
      case 2: {
        const size_t keep = random() % (s.contents.size() + 1);
        s.table->truncate(static_cast<int64_t>(keep) * 64);
        s.contents.resize(keep);
        break;
      }
      case 3:
        if (sequences.size() < 6) {
          Sequence fork{std::make_unique<PageTable>(*s.table), s.contents};
          sequences.push_back(std::move(fork));
        } else {
          sequences.erase(sequences.begin() + 1);
        }
        break;
    }
    REQUIRE(pool->is_valid());
    for (const Sequence& q : sequences) {
      REQUIRE(q.table->size() == static_cast<int64_t>(q.contents.size()));
      for (size_t page = 0; page < q.contents.size(); ++page) {
        REQUIRE(read(*q.table, static_cast<int64_t>(page)) == q.contents[page]);
      }
    }
  }
}

// Pages that hold chains of tokens, all in one index.
struct IndexFixture : Fixture {
  explicit IndexFixture(PrefixIndex::Hash hash = nullptr) {
    if (hash == nullptr) {
      index = std::make_unique<PrefixIndex>(pool.get(), 1);
    } else {
      index = std::make_unique<PrefixIndex>(pool.get(), 1, hash);
    }
  }
  static std::array<int32_t, 64> tokens(int32_t value) {
    std::array<int32_t, 64> out;
    out.fill(value);
    return out;
  }
  PageId find(PageId parent, int32_t value) { return index->find(parent, tokens(value)); }
  // A chain of pages with these values; the table keeps them.
  std::vector<PageId> insert(PageTable* table, const std::vector<int32_t>& values) {
    REQUIRE(table->make_writable(0, 64 * static_cast<int64_t>(values.size())).ok());
    std::vector<PageId> pages;
    for (size_t i = 0; i < values.size(); ++i) {
      const PageId parent = i == 0 ? kNoPage : pages.back();
      const auto at = static_cast<int64_t>(i);
      const PageId page = index->insert(parent, tokens(values[i]), table->page(at));
      if (page != table->page(at)) table->share(at, page);
      pages.push_back(page);
    }
    return pages;
  }
  bool valid() { return pool->is_valid() && index->is_valid(); }
  std::unique_ptr<PrefixIndex> index;
};

TEST_CASE_FIXTURE(IndexFixture, "a page is found by its chain, not by its tokens alone") {
  std::vector<PageId> ab, bb;
  {
    PageTable one(pool.get()), two(pool.get());
    ab = insert(&one, {1, 2});
    bb = insert(&two, {2, 2});
    CHECK(ab[1] != bb[1]);
  }
  CHECK(pool->used() == 4);  // the index keeps them
  CHECK(index->unreferenced() == 4);
  CHECK(find(kNoPage, 1) == ab[0]);
  CHECK(find(ab[0], 2) == ab[1]);
  CHECK(find(kNoPage, 2) == bb[0]);
  CHECK(find(bb[0], 2) == bb[1]);
  CHECK(find(ab[1], 2) == kNoPage);
  CHECK(find(kNoPage, 3) == kNoPage);
  CHECK(valid());
}

TEST_CASE_FIXTURE(IndexFixture, "the same chain computed twice becomes one") {
  PageTable one(pool.get()), two(pool.get());
  const auto first = insert(&one, {1, 2, 3});
  CHECK(insert(&two, {1, 2, 4})[1] == first[1]);
  CHECK(pool->used() == 4);
  CHECK(index->size() == 4);
  CHECK(valid());
  // Who writes into a shared page gets its own.
  REQUIRE(two.make_writable(100, 101).ok());
  CHECK(two.page(1) != first[1]);
  CHECK(pool->used() == 5);
  CHECK(find(first[0], 2) == first[1]);
}

TEST_CASE_FIXTURE(IndexFixture, "leaves that nobody uses go first, least recently used") {
  std::vector<PageId> a, b, c;
  PageTable held(pool.get());
  {
    PageTable one(pool.get()), two(pool.get());
    a = insert(&one, {1, 2, 3});
    b = insert(&two, {5, 6});
    c = insert(&held, {7, 8});
  }
  index->touch(a[2]);
  CHECK(index->unreferenced() == 5);
  CHECK(index->evict());
  CHECK_FALSE(index->contains(b[1]));
  CHECK(index->evict());
  CHECK_FALSE(index->contains(b[0]));
  CHECK(index->evict());
  CHECK_FALSE(index->contains(a[2]));
  CHECK(index->contains(a[1]));
  CHECK(index->evict());
  CHECK(index->evict());
  CHECK(valid());
  CHECK_FALSE(index->evict());  // the rest is in use
  CHECK(index->size() == 2);
  CHECK_FALSE(index->erase(c[0]));
  CHECK(index->erase(c[1]));
  CHECK(valid());
  CHECK(held.page(1) == c[1]);
  CHECK(pool->used() == 2);
}

TEST_CASE("hashes that are all the same find the right pages all the same") {
  IndexFixture f(+[](uint64_t, PageTokens) { return uint64_t{42}; });
  std::vector<std::vector<PageId>> chains;
  {
    PageTable one(f.pool.get()), two(f.pool.get()), three(f.pool.get());
    chains.push_back(f.insert(&one, {1, 2, 3}));
    chains.push_back(f.insert(&two, {1, 2, 4}));
    chains.push_back(f.insert(&three, {2, 1, 3}));
  }
  CHECK(f.index->size() == 7);
  CHECK(f.find(kNoPage, 1) == chains[0][0]);
  CHECK(f.find(chains[0][1], 3) == chains[0][2]);
  CHECK(f.find(chains[1][1], 4) == chains[1][2]);
  CHECK(f.find(chains[2][1], 3) == chains[2][2]);
  CHECK(f.find(kNoPage, 3) == kNoPage);
  CHECK(f.find(chains[2][0], 2) == kNoPage);
  CHECK(f.valid());
  while (f.index->evict()) CHECK(f.valid());
  CHECK(f.pool->used() == 0);
}

TEST_CASE_FIXTURE(Fixture, "random chains in the index: nothing is lost, leaked or mixed up") {
  pool = std::make_unique<PagePool>(device.get(), 4096, 40);
  PrefixIndex index(pool.get(), 9);
  std::mt19937 random(3);
  struct Sequence {
    std::unique_ptr<PageTable> table;
    std::vector<std::array<int32_t, 64>> pages;
  };
  std::vector<Sequence> sequences;
  for (int step = 0; step < 4000; ++step) {
    if (sequences.size() < 5 && random() % 3 == 0) {
      sequences.push_back({std::make_unique<PageTable>(pool.get()), {}});
    }
    if (sequences.empty()) continue;
    const size_t at = random() % sequences.size();
    Sequence& s = sequences[at];
    if (random() % 6 == 0) {
      sequences.erase(sequences.begin() + static_cast<std::ptrdiff_t>(at));
      continue;
    }
    const auto size = static_cast<int64_t>(s.pages.size());
    const PageId parent = size == 0 ? kNoPage : s.table->page(size - 1);
    const auto tokens = IndexFixture::tokens(static_cast<int32_t>(random() % 2));
    const int64_t sum = std::accumulate(s.pages.begin(), s.pages.end(), int64_t{1},
                                        [](int64_t a, auto& t) { return a * 3 + t[0]; });
    const auto content = static_cast<int32_t>(sum * 3 + tokens[0]);
    if (size > 6) continue;
    if (const PageId found = index.find(parent, tokens); found != kNoPage) {
      s.table->share(size, found);
      index.touch(found);
    } else {
      while (pool->available() == 0) {
        if (!index.evict()) break;
      }
      if (pool->available() == 0) continue;
      REQUIRE(s.table->make_writable(64 * size, 64 * size + 64).ok());
      write(s.table.get(), size, content);
      CHECK(index.insert(parent, tokens, s.table->page(size)) == s.table->page(size));
    }
    s.pages.push_back(tokens);
    CHECK(read(*s.table, size) == content);
    if (step % 50 == 0) {
      REQUIRE(pool->is_valid());
      REQUIRE(index.is_valid());
    }
  }
  sequences.clear();
  CHECK(index.unreferenced() == pool->used());
}

}  // namespace
}  // namespace dsv3
