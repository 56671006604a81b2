// Full latent pages of prefixes in a directory, from which a new process starts warm. A file per
// page, named by the hash of all tokens up to its end; it holds these tokens too, and a hit
// compares them. Several processes may use one directory at once. It holds people's text in another
// form: the directory is private to its user.
//
// The budget is one for all processes: whoever writes counts, and removes what was used longest ago
// (of what was used at about the same time, the ends of prefixes before their beginnings).
//
// Thread-safe. Blocking: not for the engine's thread.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "runtime/base/os_directory.h"
#include "runtime/base/status.h"
#include "runtime/cache/snapshot.h"

namespace dsv3 {

class DiskTier {
 public:
  // Makes the directory where it is missing. Files of other models, kernel sets or versions may lie
  // in it; they count and are evicted like all.
  static Result<std::unique_ptr<DiskTier>> open(const std::string& path, uint64_t max_bytes,
                                                const LatentIdentity& identity);
  // Removes every page in the directory, whoever wrote it. *bytes (may be null): how many that
  // were.
  static Status purge(const std::string& path, uint64_t* bytes);

  // Whether the page is there; it counts as used now.
  bool touch(std::span<const int32_t> prefix);
  // `prefix`: all tokens up to and with the page's, a multiple of page_tokens. Storing a page that
  // is there already marks it as used. One that is larger than the budget is not stored.
  Status put(std::span<const int32_t> prefix, std::span<const std::byte> page);
  // *found = false when there is no such page; one that is damaged is removed and not found.
  // *page [page_bytes].
  // *damaged (may be null): whether it was.
  Status get(std::span<const int32_t> prefix, std::vector<std::byte>* page, bool* found,
             bool* damaged = nullptr);

 private:
  DiskTier(PrivateDirectory directory, uint64_t max_bytes, const LatentIdentity& identity)
      : directory_(std::move(directory)), max_bytes_(max_bytes), identity_(identity) {}
  std::string name_of(std::span<const int32_t> prefix) const;
  // Under the lock: counts, and evicts down to `limit` bytes. *used: what is left.
  Status shrink(uint64_t limit, uint64_t* used);

  const PrivateDirectory directory_;
  const uint64_t max_bytes_;
  const LatentIdentity identity_;
};

}  // namespace dsv3
