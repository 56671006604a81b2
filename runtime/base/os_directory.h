// A directory that belongs to this user alone (mode 0700) and is shared by processes that know the
// same rules: files appear whole under their names, and whoever changes the set of files holds the
// directory's lock. For caches of what must not be read by others.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "runtime/base/status.h"

namespace dsv3 {

class PrivateDirectory {
 public:
  struct Entry {
    std::string name;
    uint64_t size = 0;
    int64_t used_ns = 0;  // when it was written or last touched
  };
  // Held until destroyed; waits for other holders, in this process or another.
  class Lock {
   public:
    Lock(Lock&& other) noexcept;
    Lock& operator=(Lock&&) = delete;
    ~Lock();
    // A number that its holders share, kept in the lock's file. 0 at first, or when it was lost.
    uint64_t counter() const;
    void set_counter(uint64_t value);

   private:
    friend class PrivateDirectory;
    explicit Lock(int fd) : fd_(fd) {}
    int fd_;
  };

  // Makes the directory where it is missing (its parent must exist), if `make`. One that belongs to
  // somebody else, or that others may enter, is refused, as is what is no directory. A symbolic
  // link is followed only in the path above it.
  static Result<PrivateDirectory> open(const std::string& path, bool make);
  PrivateDirectory(PrivateDirectory&& other) noexcept;
  PrivateDirectory& operator=(PrivateDirectory&&) = delete;
  ~PrivateDirectory();

  const std::string& path() const { return path_; }
  // kBusy (retryable) when somebody else has it for so long.
  Result<Lock> lock(int64_t wait_ns) const;
  // Regular files, temporary ones of writers (see write) included; not the lock.
  Result<std::vector<Entry>> list() const;
  // *found = false when there is no such file. A file of more than max_bytes is kCorrupt.
  Status read(const std::string& name, size_t max_bytes, std::vector<std::byte>* out,
              bool* found) const;
  // The parts one after another, mode 0600, under a temporary name first. The caller holds the
  // lock. Not synced to the disk: after a power cut the file may hold anything, which its reader's
  // checksum has to find.
  Status write(const std::string& name, std::span<const std::span<const std::byte>> parts) const;
  bool contains(const std::string& name) const;
  void touch(const std::string& name) const;  // now is its used_ns
  // A file, or an empty directory in a file's place. False when there was none.
  Result<bool> remove(const std::string& name) const;
  // The name that a file which is being written (or was, by a process that died) was to have in the
  // end; empty when `name` is none of such a file.
  static std::string final_name(const std::string& name);

 private:
  PrivateDirectory(int fd, std::string path) : fd_(fd), path_(std::move(path)) {}
  int fd_;
  std::string path_;
};

}  // namespace dsv3
