// Every operating-system call of the library. Paths are UTF-8. Errors name the path and what the
// system said.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "runtime/base/status.h"

namespace dsv3 {

// What tells whether a file is still the one that was opened.
struct FileIdentity {
  uint64_t device = 0, inode = 0, size = 0;
  int64_t mtime_ns = 0, ctime_ns = 0;
  bool operator==(const FileIdentity&) const = default;
};

// A file open for reading at offsets. Only regular files: a FIFO, a directory or a device is
// refused without blocking.
class File {
 public:
  static Result<File> open(const std::string& path);
  File(File&&) noexcept;
  File& operator=(File&&) noexcept;
  ~File();

  uint64_t size() const { return identity_.size; }
  const std::string& path() const { return path_; }
  const FileIdentity& identity() const { return identity_; }
  // Reads exactly `size` bytes at `offset`, or fails. Any thread.
  Status read_at(uint64_t offset, void* dst, size_t size) const;
  // Asks the system to read ahead / to drop the range from the page cache. Hints, never fail.
  void will_need(uint64_t offset, uint64_t size) const;
  void dont_need(uint64_t offset, uint64_t size) const;
  // The identity the open file has now.
  Result<FileIdentity> current_identity() const;

 private:
  friend class Mapping;
  File() = default;
  int fd_ = -1;
  std::string path_;
  FileIdentity identity_;
};

// A whole file mapped read-only (shared with the page cache).
class Mapping {
 public:
  static Result<Mapping> map(const File& file);
  Mapping(Mapping&&) noexcept;
  Mapping& operator=(Mapping&&) noexcept;
  ~Mapping();
  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  Mapping() = default;
  const uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

// Writes a file under a temporary name beside `path` and renames it into place on commit(); removed
// when destroyed without commit. commit() syncs the file and its directory.
class AtomicFile {
 public:
  static Result<AtomicFile> create(const std::string& path, uint32_t mode = 0644);
  AtomicFile(AtomicFile&&) noexcept;
  AtomicFile& operator=(AtomicFile&&) = delete;
  ~AtomicFile();
  Status write_at(uint64_t offset, const void* src, size_t size);
  // Starts write-back of a finished range so that dirty pages stay bounded, and drops it from the
  // cache.
  void flush_range(uint64_t offset, uint64_t size);
  // Under its name; not replacing what stands there already unless `replace` (kInvalidArgument).
  Status commit(bool replace = true);

 private:
  AtomicFile() = default;
  int fd_ = -1;
  std::string path_, temporary_;
};

Result<std::string> read_file(const std::string& path, uint64_t max_bytes);
// Names (not paths) of the entries of a directory, sorted.
Result<std::vector<std::string>> list_directory(const std::string& path);
// Whether something has this name. So has a link to nowhere: who opens it is told.
Result<bool> file_exists(const std::string& path);
std::string join_path(const std::string& dir, const std::string& name);

int64_t monotonic_ns();
uint64_t process_id();
// For seeds that no file's author can know; nothing that is computed may depend on it.
uint64_t unpredictable_number();
// CPUs this process may use: affinity mask and cgroup quota, at least 1.
int available_cpus();
// What an aarch64 processor may have beside what all of them have: INT8 dot products (SDOT), BF16
// dot products (BFDOT). None on other processors.
struct ArmFeatures {
  bool dot = false, bf16 = false;
};
ArmFeatures arm_features();
// The first data cache of a CPU; 0 where the system does not say.
size_t l1_data_bytes();
// Memory of the machine or of the cgroup, in bytes; 0 when unknown.
uint64_t total_memory();
// What of it can be taken without swapping, in bytes: what files have in memory counts as free,
// those that this process maps included. 0 when unknown.
uint64_t available_memory();
// Resident memory of this process, in bytes; 0 when unknown. The second: beyond file mappings.
uint64_t resident_bytes();
uint64_t resident_anonymous_bytes();
// Page faults of this process so far; 0 when unknown.
uint64_t page_faults();
// Asks for huge pages for a range of memory or of a mapped file. A hint, never fails.
void advise_huge_pages(void* p, size_t size);
// A thread of a library inside a host: blocks all signals, has a name (at most 15 bytes), and runs
// with the default floating-point mode. Joined by the owner.
class Thread {
 public:
  // `body(arg)` must not throw.
  static Result<Thread> start(const char* name, void (*body)(void*), void* arg);
  Thread(Thread&&) noexcept;
  Thread& operator=(Thread&&) noexcept;
  ~Thread();  // joins
  void join();
  // Instead of joining: for the thread itself, when nobody is left to wait for it.
  void detach();
  // How long the thread has been ready to run without getting a CPU, in nanoseconds since it began;
  // a wait that is still going on counts when it is over. -1 when unknown. Some microseconds.
  int64_t starved_ns() const;

 private:
  Thread() = default;
  struct Impl;
  std::unique_ptr<Impl> impl_;
};
// Pins the calling thread to one CPU of its mask (index modulo their number). Best effort.
void pin_this_thread(int index);

// A level-triggered descriptor for event loops (eventfd on Linux), close-on-exec.
class WaitDescriptor {
 public:
  static Result<WaitDescriptor> create();
  WaitDescriptor(WaitDescriptor&&) noexcept;
  ~WaitDescriptor();
  intptr_t native() const { return fd_; }
  void set();    // readable from now on
  void clear();  // not readable from now on

 private:
  WaitDescriptor() = default;
  int fd_ = -1;
};

}  // namespace dsv3
