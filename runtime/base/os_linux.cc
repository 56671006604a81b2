#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/limits.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/auxv.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <fstream>

#include "runtime/base/os.h"
#include "runtime/base/os_affinity.h"
#include "runtime/base/os_cgroup.h"
#include "runtime/base/os_error.h"
#include "runtime/base/os_write.h"

namespace dsv3 {
namespace {

std::string system_text(int error) {
  char buffer[128];
  return strerror_r(error, buffer, sizeof buffer);  // GNU's, which may ignore the buffer
}

FileIdentity identity_of(const struct stat& st) {
  FileIdentity id;
  id.device = st.st_dev;
  id.inode = st.st_ino;
  id.size = static_cast<uint64_t>(st.st_size);
  id.mtime_ns = st.st_mtim.tv_sec * int64_t{1000000000} + st.st_mtim.tv_nsec;
  id.ctime_ns = st.st_ctim.tv_sec * int64_t{1000000000} + st.st_ctim.tv_nsec;
  return id;
}

const char* kind_of(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a FIFO";
  if (S_ISSOCK(mode)) return "a socket";
  if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
  return "not a regular file";
}

std::string parent_of(const std::string& path) {
  const size_t slash = path.rfind('/');
  if (slash == std::string::npos) return ".";
  return slash == 0 ? "/" : path.substr(0, slash);
}

bool has_nul(const std::string& path) { return path.find('\0') != std::string::npos; }

}  // namespace

Status io_error(const std::string& path, const char* action, int error) {
  const Code code = error == ENOENT   ? Code::kNotFound
                    : error == ENOMEM ? Code::kOutOfMemory
                                      : Code::kIo;
  return Status(code, format("%s: cannot %s: %s", path.c_str(), action, system_text(error).c_str()),
                /*field=*/"", may_pass(error));
}

// --- File

Result<File> File::open(const std::string& path) {
  if (path.empty() || has_nul(path)) {
    return make_error(Code::kInvalidArgument, "path is empty or has a NUL byte in it");
  }
  // O_NONBLOCK: opening a FIFO must not wait for a writer.
  const int fd = uninterrupted(
      [&] { return ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY); });
  if (fd < 0) return io_error(path, "open", errno);
  File file;
  file.fd_ = fd;
  file.path_ = path;
  struct stat st;
  if (fstat(fd, &st) != 0) return io_error(path, "examine", errno);
  if (!S_ISREG(st.st_mode)) {
    return make_error(Code::kInvalidArgument, "%s: is %s, expected a regular file", path.c_str(),
                      kind_of(st.st_mode));
  }
  file.identity_ = identity_of(st);
  return file;
}

File::File(File&& o) noexcept
    : fd_(std::exchange(o.fd_, -1)), path_(std::move(o.path_)), identity_(o.identity_) {}

File& File::operator=(File&& o) noexcept {
  std::swap(fd_, o.fd_);
  std::swap(path_, o.path_);
  std::swap(identity_, o.identity_);
  return *this;
}

File::~File() {
  if (fd_ >= 0) ::close(fd_);
}

Status File::read_at(uint64_t offset, void* dst, size_t size) const {
  auto* out = static_cast<uint8_t*>(dst);
  while (size > 0) {
    const ssize_t n =
        ::pread(fd_, out, std::min<size_t>(size, 1u << 30), static_cast<off_t>(offset));
    if (n < 0) {
      if (errno == EINTR) continue;
      return io_error(path_, "read", errno);
    }
    if (n == 0) {
      return make_error(Code::kCorrupt, "%s: ends at byte %llu, expected %zu bytes more",
                        path_.c_str(), static_cast<unsigned long long>(offset), size);
    }
    out += n;
    offset += static_cast<uint64_t>(n);
    size -= static_cast<size_t>(n);
  }
  return {};
}

void File::will_need(uint64_t offset, uint64_t size) const {
  posix_fadvise(fd_, static_cast<off_t>(offset), static_cast<off_t>(size), POSIX_FADV_WILLNEED);
}

void File::dont_need(uint64_t offset, uint64_t size) const {
  posix_fadvise(fd_, static_cast<off_t>(offset), static_cast<off_t>(size), POSIX_FADV_DONTNEED);
}

Result<FileIdentity> File::current_identity() const {
  struct stat st;
  if (fstat(fd_, &st) != 0) return io_error(path_, "examine", errno);
  return identity_of(st);
}

// --- Mapping

Result<Mapping> Mapping::map(const File& file) {
  Mapping m;
  m.size_ = file.size();
  if (m.size_ == 0) return m;
  void* p = ::mmap(nullptr, m.size_, PROT_READ, MAP_SHARED, file.fd_, 0);
  if (p == MAP_FAILED) return io_error(file.path(), "map", errno);
  m.data_ = static_cast<const uint8_t*>(p);
  // Where the file system keeps large folios, they are then read and mapped two megabytes at once.
  advise_huge_pages(p, m.size_);
  return m;
}

Mapping::Mapping(Mapping&& o) noexcept
    : data_(std::exchange(o.data_, nullptr)), size_(std::exchange(o.size_, 0)) {}

Mapping& Mapping::operator=(Mapping&& o) noexcept {
  std::swap(data_, o.data_);
  std::swap(size_, o.size_);
  return *this;
}

Mapping::~Mapping() {
  if (data_ != nullptr) ::munmap(const_cast<uint8_t*>(data_), size_);
}

// --- AtomicFile

namespace {

constexpr size_t kTemporaryNameBytes = 100;  // of the file's own name, for who finds what was left

// A rename would put the file in the place of a device or a FIFO, too, where the system lets it.
Status check_replaceable(const std::string& path) {
  struct stat st;
  if (::lstat(path.c_str(), &st) != 0) {
    // The temporary name is short, so that nothing but this finds it before the file is written.
    return errno == ENAMETOOLONG ? io_error(path, "create", ENAMETOOLONG) : Status();
  }
  if (S_ISREG(st.st_mode) || S_ISLNK(st.st_mode)) return {};
  return make_error(Code::kInvalidArgument, "%s: is %s, expected a regular file or none",
                    path.c_str(), kind_of(st.st_mode));
}

}  // namespace

Result<AtomicFile> AtomicFile::create(const std::string& path, uint32_t mode) {
  if (path.empty() || has_nul(path)) {
    return make_error(Code::kInvalidArgument, "path is empty or has a NUL byte in it");
  }
  AtomicFile file;
  file.path_ = path;
  DSV3_TRY(check_replaceable(path));
  // Not behind the whole name: that may be as long as the file system lets names be.
  const size_t name = path.rfind('/') + 1;  // 0 where there is none
  const std::string begin =
      path.substr(0, name) + utf8_prefix(path.substr(name), kTemporaryNameBytes);
  for (int attempt = 0; attempt < 100; ++attempt) {
    file.temporary_ = begin + format(".tmp-%d-%d", static_cast<int>(getpid()), attempt);
    file.fd_ = uninterrupted([&] {
      return ::open(file.temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW,
                    mode);
    });
    if (file.fd_ >= 0) return file;
    if (errno != EEXIST) break;
  }
  const int error = errno;
  file.temporary_.clear();
  return io_error(path, "create a temporary file beside it", error);
}

AtomicFile::AtomicFile(AtomicFile&& o) noexcept
    : fd_(std::exchange(o.fd_, -1)),
      path_(std::move(o.path_)),
      temporary_(std::exchange(o.temporary_, {})) {}

AtomicFile::~AtomicFile() {
  if (fd_ >= 0) ::close(fd_);
  if (!temporary_.empty()) ::unlink(temporary_.c_str());
}

Status AtomicFile::write_at(uint64_t offset, const void* src, size_t size) {
  const auto* in = static_cast<const uint8_t*>(src);
  while (size > 0) {
    const int64_t n = write_file_at(fd_, in, size, offset);
    if (n < 0) {
      if (errno == EINTR) continue;
      return io_error(path_, "write", errno);
    }
    in += n;
    offset += static_cast<uint64_t>(n);
    size -= static_cast<size_t>(n);
  }
  return {};
}

void AtomicFile::flush_range(uint64_t offset, uint64_t size) {
  sync_file_range(fd_, static_cast<off_t>(offset), static_cast<off_t>(size),
                  SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER);
  posix_fadvise(fd_, static_cast<off_t>(offset), static_cast<off_t>(size), POSIX_FADV_DONTNEED);
}

Status AtomicFile::commit(bool replace) {
  if (uninterrupted([&] { return ::fsync(fd_); }) != 0) return io_error(path_, "sync", errno);
  // Interrupted it has closed the descriptor all the same, and everything was synced.
  if (::close(std::exchange(fd_, -1)) != 0 && errno != EINTR) {
    return io_error(path_, "close", errno);
  }
  DSV3_TRY(check_replaceable(path_));  // there has been time to make one
  int error = 0;
  if (replace) {
    error = ::rename(temporary_.c_str(), path_.c_str()) == 0 ? 0 : errno;
  } else if (::renameat2(AT_FDCWD, temporary_.c_str(), AT_FDCWD, path_.c_str(), RENAME_NOREPLACE) !=
             0) {
    // Some file systems cannot; a second name cannot replace anything either.
    error = errno == EINVAL || errno == ENOSYS
                ? (::link(temporary_.c_str(), path_.c_str()) == 0 ? 0 : errno)
                : errno;
    if (error == 0) ::unlink(temporary_.c_str());
  }
  if (error == EEXIST && !replace) {
    return make_error(Code::kInvalidArgument,
                      "%s: appeared meanwhile, and overwriting it was not asked for",
                      path_.c_str());
  }
  if (error != 0) return io_error(path_, "rename the finished file to it", error);
  temporary_.clear();
  const int dir = ::open(parent_of(path_).c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (dir >= 0) {
    ::fsync(dir);  // some file systems refuse to sync a directory; the rename itself has succeeded
    ::close(dir);
  }
  return {};
}

// --- small things

Result<std::string> read_file(const std::string& path, uint64_t max_bytes) {
  DSV3_ASSIGN(const File file, File::open(path));
  if (file.size() > max_bytes) {
    return make_error(Code::kCorrupt, "%s: has %llu bytes, expected at most %llu", path.c_str(),
                      static_cast<unsigned long long>(file.size()),
                      static_cast<unsigned long long>(max_bytes));
  }
  std::string text(file.size(), '\0');
  DSV3_TRY(file.read_at(0, text.data(), text.size()));
  return text;
}

Result<std::vector<std::string>> list_directory(const std::string& path) {
  const std::unique_ptr<DIR, int (*)(DIR*)> dir(::opendir(path.c_str()), ::closedir);
  if (dir == nullptr) return io_error(path, "list", errno);
  std::vector<std::string> names;
  errno = 0;  // tells the end from a failure
  while (const dirent* entry = ::readdir(dir.get())) {
    const std::string name = entry->d_name;
    if (name != "." && name != "..") names.push_back(name);
    errno = 0;
  }
  if (errno != 0) return io_error(path, "list", errno);
  std::sort(names.begin(), names.end());
  return names;
}

Result<bool> file_exists(const std::string& path) {
  struct stat st;
  if (::lstat(path.c_str(), &st) == 0) return true;
  if (errno == ENOENT || errno == ENOTDIR) return false;
  return io_error(path, "examine", errno);
}

std::string join_path(const std::string& dir, const std::string& name) {
  if (dir.empty() || dir.back() == '/') return dir + name;
  return dir + "/" + name;
}

int64_t monotonic_ns() {
  timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return ts.tv_sec * int64_t{1000000000} + ts.tv_nsec;
}

uint64_t process_id() { return static_cast<uint64_t>(getpid()); }

uint64_t unpredictable_number() {
  uint64_t number = 0;
  if (::getrandom(&number, sizeof number, GRND_NONBLOCK) == sizeof number) return number;
  // A sandbox may forbid the call, and a system that has just started has nothing yet.
  return reinterpret_cast<uintptr_t>(&number) * 0x9E3779B97F4A7C15u ^
         static_cast<uint64_t>(monotonic_ns());
}

namespace {

CgroupLimits own_cgroup_limits() { return cgroup_limits("/sys/fs/cgroup", "/proc/self/cgroup"); }

}  // namespace

int available_cpus() {
  int cpus = std::max(1, CpuMask::of_this_thread().count());
  const double quota = own_cgroup_limits().cpus;
  if (quota > 0) cpus = std::min(cpus, std::max(1, static_cast<int>(std::ceil(quota))));
  return cpus;
}

ArmFeatures arm_features() {
  ArmFeatures features;
#if defined(__aarch64__)
  features.dot = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
  features.bf16 = (getauxval(AT_HWCAP2) & HWCAP2_BF16) != 0;
#endif
  return features;
}

size_t l1_data_bytes() {
#if defined(_SC_LEVEL1_DCACHE_SIZE)
  const long bytes = sysconf(_SC_LEVEL1_DCACHE_SIZE);
  return bytes > 0 ? static_cast<size_t>(bytes) : 0;
#else
  return 0;
#endif
}

uint64_t total_memory() {
  const long pages = sysconf(_SC_PHYS_PAGES);
  const long page = sysconf(_SC_PAGESIZE);
  double total = pages > 0 && page > 0 ? static_cast<double>(pages) * static_cast<double>(page) : 0;
  const double limit = own_cgroup_limits().memory;
  if (limit > 0 && (total == 0 || limit < total)) total = limit;
  return static_cast<uint64_t>(total);
}

void advise_huge_pages(void* p, size_t size) {
  constexpr uintptr_t kHuge = uintptr_t{2} << 20;
  const auto address = reinterpret_cast<uintptr_t>(p);
  const uintptr_t begin = (address + kHuge - 1) / kHuge * kHuge;
  const uintptr_t end = (address + size) / kHuge * kHuge;
  if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
}

namespace {

// A line of a file as /proc/self/status that is in kilobytes.
uint64_t kilobytes_line(const char* path, const std::string& name) {
  std::ifstream in(path);
  std::string line;
  while (std::getline(in, line)) {
    if (line.rfind(name + ":", 0) == 0)
      return std::strtoull(line.c_str() + name.size() + 1, nullptr, 10) * 1024;
  }
  return 0;
}

}  // namespace

uint64_t resident_bytes() { return kilobytes_line("/proc/self/status", "VmRSS"); }
uint64_t resident_anonymous_bytes() { return kilobytes_line("/proc/self/status", "RssAnon"); }

uint64_t available_memory() {
  const uint64_t free = kilobytes_line("/proc/meminfo", "MemAvailable");
  const auto left = static_cast<uint64_t>(own_cgroup_limits().memory_left);
  return free == 0 || left == 0 ? std::max(free, left) : std::min(free, left);
}

uint64_t page_faults() {
  rusage usage{};
  if (::getrusage(RUSAGE_SELF, &usage) != 0) return 0;
  return static_cast<uint64_t>(usage.ru_minflt) + static_cast<uint64_t>(usage.ru_majflt);
}

// --- Thread

struct Thread::Impl {
  pthread_t handle;
  char name[16];
  void (*body)(void*);
  void* arg;
  std::atomic<pid_t> id{0};  // the thread's own, once it runs

  static void* run(void* self) {
    auto* impl = static_cast<Impl*>(self);
    impl->id.store(gettid(), std::memory_order_relaxed);
    pthread_setname_np(pthread_self(), impl->name);
    std::fesetenv(FE_DFL_ENV);  // the host may have set flush-to-zero or another rounding
    impl->body(impl->arg);
    return nullptr;
  }
};

Result<Thread> Thread::start(const char* name, void (*body)(void*), void* arg) {
  Thread thread;
  thread.impl_ = std::make_unique<Impl>();
  std::snprintf(thread.impl_->name, sizeof thread.impl_->name, "%s", name);
  thread.impl_->body = body;
  thread.impl_->arg = arg;
  // Threads inherit the mask: block everything around the creation, so that no signal of the host
  // is ever delivered to one of ours.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  const int error = pthread_create(&thread.impl_->handle, nullptr, Impl::run, thread.impl_.get());
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  if (error != 0) {
    thread.impl_.reset();
    return Status(Code::kOutOfMemory,
                  format("cannot start thread %s: %s", name, system_text(error).c_str()),
                  /*field=*/"", may_pass(error));
  }
  return thread;
}

Thread::Thread(Thread&& o) noexcept : impl_(std::move(o.impl_)) {}

Thread& Thread::operator=(Thread&& o) noexcept {
  std::swap(impl_, o.impl_);
  return *this;
}

Thread::~Thread() { join(); }

void Thread::join() {
  if (impl_ == nullptr) return;
  pthread_join(impl_->handle, nullptr);
  impl_.reset();
}

void Thread::detach() {
  if (impl_ == nullptr) return;
  pthread_detach(impl_->handle);
  impl_.reset();  // the running thread has read it
}

int64_t Thread::starved_ns() const {
  const pid_t id = impl_ != nullptr ? impl_->id.load(std::memory_order_relaxed) : 0;
  if (id == 0) return -1;
  char text[96];
  std::snprintf(text, sizeof text, "/proc/self/task/%d/schedstat", static_cast<int>(id));
  const int fd = ::open(text, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  const ssize_t size = ::read(fd, text, sizeof text - 1);
  ::close(fd);
  text[std::max<ssize_t>(size, 0)] = 0;
  long long ran = 0, starved = -1;  // and the number of times it ran
  return std::sscanf(text, "%lld %lld", &ran, &starved) == 2 ? starved : -1;
}

// --- WaitDescriptor

Result<WaitDescriptor> WaitDescriptor::create() {
  WaitDescriptor d;
  d.fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (d.fd_ < 0) return io_error("eventfd", "create", errno);
  return d;
}

WaitDescriptor::WaitDescriptor(WaitDescriptor&& o) noexcept : fd_(std::exchange(o.fd_, -1)) {}

WaitDescriptor::~WaitDescriptor() {
  if (fd_ >= 0) ::close(fd_);
}

void WaitDescriptor::set() {
  const uint64_t one = 1;
  [[maybe_unused]] const ssize_t n = ::write(fd_, &one, sizeof one);
}

void WaitDescriptor::clear() {
  uint64_t value = 0;
  [[maybe_unused]] const ssize_t n = ::read(fd_, &value, sizeof value);
}

}  // namespace dsv3
