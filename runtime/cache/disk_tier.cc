#include "runtime/cache/disk_tier.h"

#include <xxhash.h>

#include <algorithm>
#include <cassert>
#include <cstring>

namespace dsv3 {
namespace {

constexpr char kMagic[8] = {'D', 'S', 'V', '3', 'P', 'A', 'G', 'E'};
constexpr uint32_t kVersion = 1;
constexpr char kSuffix[] = ".page";
// Files that were used within the same span count as used at the same time.
constexpr int64_t kSameTimeNs = 16'000'000'000;
// Others hold the lock while they write a page or look through the directory: milliseconds. Who
// opens or purges it waits for that; a page that finds no time to be written is computed again one
// day, while requests wait for the thread that writes.
constexpr int64_t kOpenWaitNs = 5'000'000'000;
constexpr int64_t kWriteWaitNs = 250'000'000;

struct PageHeader {
  char magic[8];
  uint32_t version;
  uint32_t numeric_revision;
  uint8_t fingerprint[16];
  char kernels[24];
  uint64_t token_count;
  uint64_t page_bytes;
  uint64_t xxh3;  // of the tokens and the page
};
static_assert(sizeof(PageHeader) == 80);

PageHeader header_of(const LatentIdentity& identity, size_t tokens) {
  PageHeader h = {};
  std::memcpy(h.magic, kMagic, sizeof kMagic);
  h.version = kVersion;
  h.numeric_revision = identity.numeric_revision;
  std::memcpy(h.fingerprint, identity.fingerprint.data(), sizeof h.fingerprint);
  std::memcpy(h.kernels, identity.kernels.data(),
              std::min(identity.kernels.size(), sizeof h.kernels));
  h.token_count = tokens;
  h.page_bytes = identity.page_bytes;
  return h;
}

// 0 stands for "not written".
uint64_t content_hash(std::span<const std::byte> tokens, std::span<const std::byte> page) {
  return XXH3_64bits_withSeed(page.data(), page.size(), XXH3_64bits(tokens.data(), tokens.size()));
}

// Other files in the directory are none of the cache's business. See name_of().
bool is_page(const std::string& name) {
  constexpr size_t kDigits = 32;
  return name.find_first_not_of("0123456789abcdef") == kDigits &&
         name.compare(kDigits, std::string::npos, kSuffix) == 0;
}
// Writers hold the lock: who holds it finds only those of writers that died.
bool is_leftover(const std::string& name) { return is_page(PrivateDirectory::final_name(name)); }

}  // namespace

Result<std::unique_ptr<DiskTier>> DiskTier::open(const std::string& path, uint64_t max_bytes,
                                                 const LatentIdentity& identity) {
  DSV3_ASSIGN(PrivateDirectory directory, PrivateDirectory::open(path, /*make=*/true));
  std::unique_ptr<DiskTier> tier(new DiskTier(std::move(directory), max_bytes, identity));
  DSV3_ASSIGN(PrivateDirectory::Lock lock, tier->directory_.lock(kOpenWaitNs));
  uint64_t used = 0;
  DSV3_TRY(tier->shrink(max_bytes, &used));
  lock.set_counter(used);
  return tier;
}

Status DiskTier::purge(const std::string& path, uint64_t* bytes) {
  DSV3_ASSIGN(const PrivateDirectory directory, PrivateDirectory::open(path, /*make=*/false));
  DSV3_ASSIGN(PrivateDirectory::Lock lock, directory.lock(kOpenWaitNs));
  DSV3_ASSIGN(const std::vector<PrivateDirectory::Entry> entries, directory.list());
  uint64_t removed = 0, kept = 0;
  Status status;
  for (const auto& entry : entries) {
    if (!is_page(entry.name) && !is_leftover(entry.name)) continue;
    const Result<bool> gone = directory.remove(entry.name);
    if (!gone.ok()) {
      kept += entry.size;
      if (status.ok()) status = gone.status();  // the others go all the same
    } else if (gone.value()) {
      removed += entry.size;
    }
  }
  lock.set_counter(kept);
  DSV3_TRY(status);
  if (bytes != nullptr) *bytes = removed;
  return {};
}

std::string DiskTier::name_of(std::span<const int32_t> prefix) const {
  const PageHeader h = header_of(identity_, prefix.size());
  const uint64_t seed = XXH3_64bits(&h, offsetof(PageHeader, xxh3));
  const XXH128_hash_t hash = XXH3_128bits_withSeed(prefix.data(), prefix.size_bytes(), seed);
  return format("%016llx%016llx%s", static_cast<unsigned long long>(hash.high64),
                static_cast<unsigned long long>(hash.low64), kSuffix);
}

Status DiskTier::shrink(uint64_t limit, uint64_t* used) {
  DSV3_ASSIGN(std::vector<PrivateDirectory::Entry> entries, directory_.list());
  std::erase_if(entries,
                [](const auto& entry) { return !is_page(entry.name) && !is_leftover(entry.name); });
  uint64_t total = 0;
  for (const auto& entry : entries) total += entry.size;
  std::sort(entries.begin(), entries.end(), [](const auto& a, const auto& b) {
    const int64_t when_a = a.used_ns / kSameTimeNs, when_b = b.used_ns / kSameTimeNs;
    // A longer prefix is a larger file.
    return when_a != when_b ? when_a < when_b : a.size > b.size;
  });
  for (const auto& entry : entries) {
    if (total <= limit && !is_leftover(entry.name)) continue;
    const Result<bool> gone = directory_.remove(entry.name);
    if (gone.ok() && gone.value()) total -= entry.size;
  }
  *used = total;
  return {};
}

bool DiskTier::touch(std::span<const int32_t> prefix) {
  const std::string name = name_of(prefix);
  if (!directory_.contains(name)) return false;
  directory_.touch(name);
  return true;
}

Status DiskTier::put(std::span<const int32_t> prefix, std::span<const std::byte> page) {
  assert(prefix.size() % identity_.page_tokens == 0 && page.size() == identity_.page_bytes);
  const std::string name = name_of(prefix);
  const auto tokens = std::as_bytes(prefix);
  PageHeader h = header_of(identity_, prefix.size());
  h.xxh3 = content_hash(tokens, page);
  const uint64_t size = sizeof h + tokens.size() + page.size();
  if (size > max_bytes_) return {};

  DSV3_ASSIGN(PrivateDirectory::Lock lock, directory_.lock(kWriteWaitNs));
  if (directory_.contains(name)) {
    directory_.touch(name);
    return {};
  }
  uint64_t used = lock.counter();
  if (used == 0) DSV3_TRY(shrink(max_bytes_, &used));  // nothing is there, or the count was lost
  if (used > max_bytes_ || size > max_bytes_ - used) {
    // A tenth more than needed, so that not every page has to look through the directory.
    const uint64_t room = std::min(max_bytes_, size + max_bytes_ / 10);
    DSV3_TRY(shrink(max_bytes_ - room, &used));
  }
  if (used > max_bytes_ - size) return {};  // what is left could not be removed
  // Counted before it is there: a process that dies in between leaves the count too high, never too
  // low.
  lock.set_counter(used + size);
  const std::span<const std::byte> parts[] = {std::as_bytes(std::span(&h, 1)), tokens, page};
  Status status = directory_.write(name, parts);
  if (!status.ok()) lock.set_counter(used);
  return status;
}

Status DiskTier::get(std::span<const int32_t> prefix, std::vector<std::byte>* page, bool* found,
                     bool* damaged) {
  assert(prefix.size() % identity_.page_tokens == 0);
  *found = false;
  if (damaged != nullptr) *damaged = false;
  const std::string name = name_of(prefix);
  const auto tokens = std::as_bytes(prefix);
  const size_t size = sizeof(PageHeader) + tokens.size() + identity_.page_bytes;
  bool there = false;
  Status read = directory_.read(name, size, page, &there);
  if (!read.ok() && read.code() != Code::kCorrupt) return read;
  if (read.ok() && !there) return {};
  PageHeader expected = header_of(identity_, prefix.size());
  bool good = read.ok() && page->size() == size;
  if (good) {
    const std::span<const std::byte> bytes(*page);
    const auto found_tokens = bytes.subspan(sizeof expected, tokens.size());
    expected.xxh3 = content_hash(found_tokens, bytes.subspan(sizeof expected + tokens.size()));
    good = std::memcmp(page->data(), &expected, sizeof expected) == 0;
    // Another prefix with the same hash: not this one's page, but a good one.
    if (good && std::memcmp(found_tokens.data(), tokens.data(), tokens.size()) != 0) return {};
  }
  if (!good) {
    if (damaged != nullptr) *damaged = true;
    // The count stays too high until somebody looks through the directory.
    (void)directory_.remove(name);
    return {};
  }
  directory_.touch(name);
  page->erase(page->begin(),
              page->begin() + static_cast<std::ptrdiff_t>(size - identity_.page_bytes));
  *found = true;
  return {};
}

}  // namespace dsv3
