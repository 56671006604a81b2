#include "runtime/cache/snapshot.h"

#include <xxhash.h>

#include <bit>
#include <cassert>
#include <cstring>
#include <type_traits>

#include "runtime/base/checked.h"

namespace dsv3 {
namespace {

static_assert(std::endian::native == std::endian::little, "snapshots are little-endian");

constexpr char kMagic[8] = {'D', 'S', 'V', '3', 'S', 'E', 'S', 'S'};
constexpr char kTrailer[8] = {'D', 'S', 'V', '3', 'D', 'O', 'N', 'E'};
constexpr uint32_t kVersion = 1;
constexpr uint32_t kFlagReasoning = 1;

struct Header {
  char magic[8];
  uint32_t version;
  uint32_t header_bytes;
  uint8_t fingerprint[16];
  char kernels[24];  // padded with NULs
  uint32_t numeric_revision;
  uint32_t page_tokens;
  uint64_t page_bytes;
  uint64_t token_count;
  uint64_t computed;
  uint32_t flags;
  uint32_t reserved;
  uint64_t xxh3;  // of all above
};
static_assert(sizeof(Header) == 104 && std::is_trivially_copyable_v<Header>);

uint64_t header_hash(const Header& h) { return XXH3_64bits(&h, offsetof(Header, xxh3)); }

Status corrupt(const std::string& name, const char* what) {
  return make_error(Code::kCorrupt, "%s: %s: the saved session is damaged", name.c_str(), what);
}

std::string hex(const uint8_t* bytes, size_t size) {
  std::string text;
  for (size_t i = 0; i < size; ++i) text += format("%02x", bytes[i]);
  return text;
}

}  // namespace

Status LatentIdentity::check(const LatentIdentity& other, const std::string& name) const {
  if (other.fingerprint != fingerprint) {
    return make_field_error(Code::kUnsupported, "fingerprint",
                            "%s: is of a model with fingerprint %s, this one's is %s", name.c_str(),
                            hex(other.fingerprint.data(), other.fingerprint.size()).c_str(),
                            hex(fingerprint.data(), fingerprint.size()).c_str());
  }
  if (other.kernels != kernels) {
    return make_field_error(Code::kUnsupported, "kernels",
                            "%s: has latents of the kernel set \"%s\", this context uses \"%s\"",
                            name.c_str(), other.kernels.c_str(), kernels.c_str());
  }
  if (other.numeric_revision != numeric_revision) {
    return make_field_error(
        Code::kUnsupported, "numeric_revision",
        "%s: has latents of numeric revision %u of \"%s\", this library's is %u", name.c_str(),
        other.numeric_revision, kernels.c_str(), numeric_revision);
  }
  if (other.page_tokens != page_tokens || other.page_bytes != page_bytes) {
    return make_field_error(
        Code::kUnsupported, "page_bytes",
        "%s: has pages of %u tokens and %llu bytes, this context's have %u and %llu", name.c_str(),
        other.page_tokens, static_cast<unsigned long long>(other.page_bytes), page_tokens,
        static_cast<unsigned long long>(page_bytes));
  }
  return {};
}

uint64_t snapshot_pages(const LatentIdentity& identity, const SnapshotContent& content) {
  return ceil_div<uint64_t>(content.computed, identity.page_tokens);
}

Status write_snapshot(
    const LatentIdentity& identity, const SnapshotContent& content, const WriteBytes& write,
    const std::function<Result<std::span<const std::byte>>(uint64_t index)>& next_page) {
  Header h = {};
  std::memcpy(h.magic, kMagic, sizeof kMagic);
  h.version = kVersion;
  h.header_bytes = sizeof h;
  std::memcpy(h.fingerprint, identity.fingerprint.data(), sizeof h.fingerprint);
  if (identity.kernels.size() >= sizeof h.kernels) {
    return make_error(Code::kInternal, "the name of kernel set \"%s\" is too long",
                      identity.kernels.c_str());
  }
  std::memcpy(h.kernels, identity.kernels.data(), identity.kernels.size());
  h.numeric_revision = identity.numeric_revision;
  h.page_tokens = identity.page_tokens;
  h.page_bytes = identity.page_bytes;
  h.token_count = content.tokens.size();
  h.computed = content.computed;
  h.flags = content.reasoning ? kFlagReasoning : 0;
  h.xxh3 = header_hash(h);
  DSV3_TRY(write(&h, sizeof h));

  const size_t token_bytes = content.tokens.size() * sizeof(int32_t);
  const uint64_t token_hash = XXH3_64bits(content.tokens.data(), token_bytes);
  if (token_bytes > 0) DSV3_TRY(write(content.tokens.data(), token_bytes));
  DSV3_TRY(write(&token_hash, sizeof token_hash));

  const uint64_t pages = snapshot_pages(identity, content);
  for (uint64_t i = 0; i < pages; ++i) {
    DSV3_ASSIGN(const std::span<const std::byte> page, next_page(i));
    const uint64_t hash = XXH3_64bits_withSeed(page.data(), page.size(), i);
    DSV3_TRY(write(page.data(), page.size()));
    DSV3_TRY(write(&hash, sizeof hash));
  }
  return write(kTrailer, sizeof kTrailer);
}

Status read_snapshot(const LatentIdentity& identity, const std::string& name, uint64_t max_tokens,
                     bool tokens_only, const ReadBytes& read, SnapshotContent* content) {
  Header h;
  DSV3_TRY(read(&h, sizeof h));
  if (std::memcmp(h.magic, kMagic, sizeof kMagic) != 0) {
    return make_error(Code::kCorrupt, "%s: does not begin with \"DSV3SESS\": no saved session",
                      name.c_str());
  }
  // The checksum's place belongs to the version.
  if (h.version != kVersion) {
    return make_field_error(Code::kUnsupported, "version",
                            "%s: is a saved session of version %u, this library reads version %u",
                            name.c_str(), h.version, kVersion);
  }
  if (h.header_bytes != sizeof h || h.xxh3 != header_hash(h)) {
    return corrupt(name, "its header's checksum differs");
  }
  LatentIdentity found;
  std::memcpy(found.fingerprint.data(), h.fingerprint, sizeof h.fingerprint);
  found.kernels.assign(h.kernels, strnlen(h.kernels, sizeof h.kernels));
  found.numeric_revision = h.numeric_revision;
  found.page_tokens = h.page_tokens;
  found.page_bytes = h.page_bytes;
  Status same = identity.check(found, name);
  const bool usable = same.ok();
  if (!usable && (!tokens_only || found.fingerprint != identity.fingerprint)) return same;
  if (h.token_count > max_tokens) {
    return make_field_error(Code::kCorrupt, "token_count",
                            "%s: has %llu tokens, expected at most %llu", name.c_str(),
                            static_cast<unsigned long long>(h.token_count),
                            static_cast<unsigned long long>(max_tokens));
  }
  if (h.computed > h.token_count) {
    return make_field_error(Code::kCorrupt, "computed",
                            "%s: has latents of %llu tokens, but only %llu tokens", name.c_str(),
                            static_cast<unsigned long long>(h.computed),
                            static_cast<unsigned long long>(h.token_count));
  }
  content->tokens.resize(static_cast<size_t>(h.token_count));
  const size_t token_bytes = content->tokens.size() * sizeof(int32_t);
  if (token_bytes > 0) DSV3_TRY(read(content->tokens.data(), token_bytes));
  uint64_t hash = 0;
  DSV3_TRY(read(&hash, sizeof hash));
  if (hash != XXH3_64bits(content->tokens.data(), token_bytes)) {
    return corrupt(name, "the checksum of its tokens differs");
  }
  content->computed = usable ? h.computed : 0;
  content->tokens_only = !usable;
  content->reasoning = (h.flags & kFlagReasoning) != 0;
  return {};
}

Status read_snapshot_pages(const LatentIdentity& identity, const std::string& name,
                           const SnapshotContent& content, const ReadBytes& read,
                           std::span<std::byte> buffer,
                           const std::function<Status(uint64_t begin, uint64_t end)>& store) {
  const uint64_t pages = snapshot_pages(identity, content);
  const uint64_t room = buffer.size() / identity.page_bytes;
  assert(pages == 0 || room > 0);
  for (uint64_t i = 0; i < pages; ++i) {
    const auto page = buffer.subspan(static_cast<size_t>(i % room * identity.page_bytes),
                                     static_cast<size_t>(identity.page_bytes));
    DSV3_TRY(read(page.data(), page.size()));
    uint64_t hash = 0;
    DSV3_TRY(read(&hash, sizeof hash));
    if (hash != XXH3_64bits_withSeed(page.data(), page.size(), i)) {
      return corrupt(
          name,
          format("the checksum of page %llu differs", static_cast<unsigned long long>(i)).c_str());
    }
    if (i % room == room - 1 || i == pages - 1) DSV3_TRY(store(i - i % room, i + 1));
  }
  char trailer[sizeof kTrailer];
  DSV3_TRY(read(trailer, sizeof trailer));
  if (std::memcmp(trailer, kTrailer, sizeof trailer) != 0) {
    return corrupt(name, "its last bytes are not a snapshot's end");
  }
  return {};
}

}  // namespace dsv3
