// Saved sessions as a stream: what was written comes back, and nothing that was damaged, cut or
// made by somebody else does.
#include <doctest/doctest.h>

#include <cstring>

#include "runtime/cache/snapshot.h"

namespace dsv3 {
namespace {

LatentIdentity identity() {
  LatentIdentity id;
  for (size_t i = 0; i < id.fingerprint.size(); ++i) id.fingerprint[i] = static_cast<uint8_t>(i);
  id.kernels = "avx512bf16";
  id.numeric_revision = 3;
  id.page_tokens = 4;
  id.page_bytes = 40;
  return id;
}

SnapshotContent content(size_t tokens, uint64_t computed) {
  SnapshotContent c;
  for (size_t i = 0; i < tokens; ++i) c.tokens.push_back(static_cast<int32_t>(i * 7 % 31));
  c.computed = computed;
  c.reasoning = true;
  return c;
}

std::vector<std::byte> page_of(uint64_t index) {
  return std::vector<std::byte>(40, static_cast<std::byte>(index * 3 + 1));
}

std::string written(const LatentIdentity& id, const SnapshotContent& c) {
  std::string bytes;
  std::vector<std::byte> page;
  const Status status = write_snapshot(
      id, c,
      [&](const void* p, size_t n) {
        bytes.append(static_cast<const char*>(p), n);
        return Status();
      },
      [&](uint64_t i) -> Result<std::span<const std::byte>> {
        page = page_of(i);
        return std::span<const std::byte>(page);
      });
  REQUIRE(status.ok());
  return bytes;
}

struct Loaded {
  SnapshotContent content;
  std::vector<std::vector<std::byte>> pages;
  size_t stores = 0;
};

Status load(const LatentIdentity& id, const std::string& bytes, Loaded* out,
            uint64_t max_tokens = 100, bool tokens_only = false, size_t pages_at_once = 1) {
  size_t at = 0;
  const ReadBytes read = [&](void* p, size_t n) -> Status {
    if (n > bytes.size() - at) return make_error(Code::kCorrupt, "s.session: ends early");
    std::memcpy(p, bytes.data() + at, n);
    at += n;
    return {};
  };
  DSV3_TRY(read_snapshot(id, "s.session", max_tokens, tokens_only, read, &out->content));
  if (tokens_only && out->content.computed == 0) return {};
  std::vector<std::byte> buffer(pages_at_once * id.page_bytes);
  const auto store = [&](uint64_t begin, uint64_t end) -> Status {
    CHECK(begin == out->pages.size());
    CHECK(end <= begin + pages_at_once);
    for (size_t i = 0; i < end - begin; ++i) {
      const auto page = buffer.begin() + static_cast<std::ptrdiff_t>(i * id.page_bytes);
      out->pages.emplace_back(page, page + static_cast<std::ptrdiff_t>(id.page_bytes));
    }
    ++out->stores;
    return {};
  };
  return read_snapshot_pages(id, "s.session", out->content, read, buffer, store);
}

TEST_CASE("what was written comes back") {
  for (const size_t tokens : {0, 1, 4, 9, 23}) {
    for (const uint64_t computed : {uint64_t{0}, tokens / 2, uint64_t{tokens}}) {
      CAPTURE(tokens);
      CAPTURE(computed);
      const SnapshotContent c = content(tokens, computed);
      Loaded loaded;
      REQUIRE(load(identity(), written(identity(), c), &loaded).ok());
      CHECK(loaded.content.tokens == c.tokens);
      CHECK(loaded.content.computed == computed);
      CHECK(loaded.content.reasoning);
      REQUIRE(loaded.pages.size() == (computed + 3) / 4);
      for (size_t i = 0; i < loaded.pages.size(); ++i) CHECK(loaded.pages[i] == page_of(i));
    }
  }
}

TEST_CASE("pages come as many at once as there is room for") {
  const SnapshotContent c = content(23, 23);  // six pages
  const std::string bytes = written(identity(), c);
  for (const size_t at_once : {1, 2, 4, 5, 6, 9}) {
    CAPTURE(at_once);
    Loaded loaded;
    REQUIRE(load(identity(), bytes, &loaded, 100, false, at_once).ok());
    CHECK(loaded.stores == (6 + at_once - 1) / at_once);
    REQUIRE(loaded.pages.size() == 6);
    for (size_t i = 0; i < loaded.pages.size(); ++i) CHECK(loaded.pages[i] == page_of(i));
  }
}

TEST_CASE("every flipped bit and every shorter stream is refused") {
  const std::string good = written(identity(), content(9, 9));
  for (size_t i = 0; i < good.size(); ++i) {
    for (const int bit : {0, 7}) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ (1 << bit));
      Loaded loaded;
      const Status status = load(identity(), bad, &loaded);
      CAPTURE(i);
      CHECK_FALSE(status.ok());
      CHECK(status.message().find("s.session") == 0);
      CHECK((status.code() == Code::kCorrupt || status.code() == Code::kUnsupported));
    }
  }
  for (size_t size = 0; size < good.size(); ++size) {
    Loaded loaded;
    CHECK_FALSE(load(identity(), good.substr(0, size), &loaded).ok());
  }
}

TEST_CASE("pages in another order are refused") {
  std::string bytes = written(identity(), content(8, 8));
  const size_t page = 40 + 8, first = bytes.size() - 8 - 2 * page;
  const std::string a = bytes.substr(first, page), b = bytes.substr(first + page, page);
  bytes.replace(first, 2 * page, b + a);
  Loaded loaded;
  CHECK(load(identity(), bytes, &loaded).code() == Code::kCorrupt);
}

TEST_CASE("of another model, kernel set or layout: refused by name, or its tokens alone") {
  const std::string bytes = written(identity(), content(9, 9));
  const auto refused = [&](const LatentIdentity& id, const char* field) {
    Loaded loaded;
    const Status status = load(id, bytes, &loaded);
    CHECK(status.code() == Code::kUnsupported);
    CHECK(status.field() == field);
    CHECK(loaded.content.tokens.empty());
    Loaded tokens;
    return load(id, bytes, &tokens, 100, true).ok() && tokens.content.computed == 0 &&
           tokens.content.tokens == content(9, 9).tokens;
  };
  LatentIdentity other = identity();
  other.fingerprint[15] ^= 1;
  CHECK_FALSE(refused(other, "fingerprint"));
  other = identity();
  other.kernels = "avx2";
  CHECK(refused(other, "kernels"));
  other = identity();
  other.numeric_revision = 4;
  CHECK(refused(other, "numeric_revision"));
  other = identity();
  other.page_bytes = 80;
  CHECK(refused(other, "page_bytes"));
  other = identity();
  other.page_tokens *= 2;
  CHECK(refused(other, "page_bytes"));
}

TEST_CASE("latents of more tokens than there are") {
  const std::string bytes = written(identity(), content(9, 10));
  Loaded loaded;
  const Status status = load(identity(), bytes, &loaded);
  CHECK(status.code() == Code::kCorrupt);
  CHECK(status.field() == "computed");
}

TEST_CASE("more tokens than the model's positions are refused before memory is taken") {
  const std::string bytes = written(identity(), content(50, 0));
  Loaded loaded;
  const Status status = load(identity(), bytes, &loaded, 49);
  CHECK(status.field() == "token_count");
  CHECK(loaded.content.tokens.capacity() == 0);
}

}  // namespace
}  // namespace dsv3
