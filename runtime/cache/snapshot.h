// The stream that a saved session is: a header that says whose latents these are, the tokens, the
// latent pages, each part with a checksum. Written and read in one pass, a few pages in memory.
//
//   header   see Header in snapshot.cc, with its XXH3
//   tokens   int32 little-endian [token_count], XXH3
//   pages    [page_bytes] each, with the XXH3 of the page and its number
//   trailer  8 bytes
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "runtime/base/status.h"

namespace dsv3 {

// What must be equal for latents to mean the same, bit for bit.
struct LatentIdentity {
  std::array<uint8_t, 16> fingerprint{};  // of the model
  std::string kernels;                    // at most 23 bytes
  uint32_t numeric_revision = 0;          // of the kernels' arithmetic
  uint32_t page_tokens = 0;
  uint64_t page_bytes = 0;

  // What of `other`, found in a file called `name`, differs from this one; ok when nothing does.
  Status check(const LatentIdentity& other, const std::string& name) const;
};

struct SnapshotContent {
  std::vector<int32_t> tokens;
  uint64_t computed = 0;  // tokens at the beginning whose latents follow
  bool reasoning = false;
  bool tokens_only = false;  // read_snapshot() left out latents of another kernel set or layout
};

// Writes `size` bytes, all of them.
using WriteBytes = std::function<Status(const void* bytes, size_t size)>;
// Reads exactly `size` bytes, or fails (kCorrupt where the stream ends early).
using ReadBytes = std::function<Status(void* bytes, size_t size)>;

// Pages that hold the computed tokens of a snapshot.
uint64_t snapshot_pages(const LatentIdentity& identity, const SnapshotContent& content);

// `next_page` gives the pages in order; what it returns is used until its next call.
Status write_snapshot(
    const LatentIdentity& identity, const SnapshotContent& content, const WriteBytes& write,
    const std::function<Result<std::span<const std::byte>>(uint64_t index)>& next_page);

// The first half of reading: header and tokens. `identity` is what the reader has; max_tokens
// bounds the tokens (and so the memory). With `tokens_only`, latents of another kernel set or
// layout are no error: content->computed is 0 and content->tokens_only set then, and nothing more
// is to be read. Errors are kCorrupt (damaged) or kUnsupported (whole, but of another model, kernel
// set, layout or version), and name `name`.
Status read_snapshot(const LatentIdentity& identity, const std::string& name, uint64_t max_tokens,
                     bool tokens_only, const ReadBytes& read, SnapshotContent* content);
// The second half: the pages, as many at once as `buffer` [n, page_bytes] has room for (at least
// one), checked, and then `store`d: pages [begin, end), from the buffer's beginning on. Then the
// trailer (also where there are no pages).
Status read_snapshot_pages(const LatentIdentity& identity, const std::string& name,
                           const SnapshotContent& content, const ReadBytes& read,
                           std::span<std::byte> buffer,
                           const std::function<Status(uint64_t begin, uint64_t end)>& store);

}  // namespace dsv3
