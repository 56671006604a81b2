#include <doctest/doctest.h>

#include <map>
#include <memory>
#include <random>
#include <vector>

#include "kernels/kernels.h"
#include "runtime/cache/page_pool.h"
#include "runtime/cache/page_table.h"

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

}  // namespace
}  // namespace dsv3
