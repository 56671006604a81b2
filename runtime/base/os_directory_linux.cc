#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <utility>

#include "runtime/base/os.h"
#include "runtime/base/os_directory.h"
#include "runtime/base/os_error.h"
#include "runtime/base/os_write.h"

namespace dsv3 {
namespace {

constexpr char kLockName[] = ".lock";
constexpr char kTemporaryPrefix[] = ".tmp-";
constexpr useconds_t kLockPollUs = 1000;

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) ::close(fd_);
  }
  int get() const { return fd_; }
  int release() { return std::exchange(fd_, -1); }

 private:
  int fd_;
};

int open_at(int directory, const char* name, int flags, mode_t mode = 0) {
  return uninterrupted([&] { return ::openat(directory, name, flags, mode); });
}

Status write_all(int fd, std::span<const std::byte> bytes, const std::string& path) {
  while (!bytes.empty()) {
    const int64_t n = write_file(fd, bytes.data(), bytes.size());
    if (n < 0) {
      if (errno == EINTR) continue;
      return io_error(path, "write", errno);
    }
    bytes = bytes.subspan(static_cast<size_t>(n));
  }
  return {};
}

}  // namespace

PrivateDirectory::Lock::Lock(Lock&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
PrivateDirectory::Lock::~Lock() {
  if (fd_ < 0) return;
  ::flock(fd_, LOCK_UN);  // closing does not while a process that forked meanwhile has it open, too
  ::close(fd_);
}

uint64_t PrivateDirectory::Lock::counter() const {
  uint64_t value = 0;
  return ::pread(fd_, &value, sizeof value, 0) == sizeof value ? value : 0;
}
void PrivateDirectory::Lock::set_counter(uint64_t value) {
  // Lost (a full disk): whoever reads 0 counts again.
  if (write_file_at(fd_, &value, sizeof value, 0) != sizeof value && ::ftruncate(fd_, 0) != 0) {
    return;
  }
}

Result<PrivateDirectory> PrivateDirectory::open(const std::string& path, bool make) {
  if (path.empty() || path.find('\0') != std::string::npos) {
    return make_error(Code::kInvalidArgument, "path is empty or has a NUL byte in it");
  }
  if (make && ::mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return io_error(path, "make the directory", errno);
  }
  Descriptor fd(uninterrupted(
      [&] { return ::open(path.c_str(), O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC); }));
  const int error = errno;
  struct stat st;
  if (fd.get() < 0) {
    if (::lstat(path.c_str(), &st) == 0 && S_ISLNK(st.st_mode)) {
      return make_error(Code::kIo, "%s: is a symbolic link, expected a directory", path.c_str());
    }
    return io_error(path, "open the directory", error);
  }
  if (::fstat(fd.get(), &st) != 0) return io_error(path, "look at the directory", errno);
  if (st.st_uid != ::geteuid()) {
    return make_error(Code::kIo, "%s: belongs to user %u, expected this process's user, %u",
                      path.c_str(), static_cast<unsigned>(st.st_uid),
                      static_cast<unsigned>(::geteuid()));
  }
  if ((st.st_mode & 0077) != 0) {
    return make_error(Code::kIo, "%s: has mode %04o, expected 0700: others could read it",
                      path.c_str(), static_cast<unsigned>(st.st_mode & 07777));
  }
  return PrivateDirectory(fd.release(), path);
}

PrivateDirectory::PrivateDirectory(PrivateDirectory&& other) noexcept
    : fd_(std::exchange(other.fd_, -1)), path_(std::move(other.path_)) {}
PrivateDirectory::~PrivateDirectory() {
  if (fd_ >= 0) ::close(fd_);
}

Result<PrivateDirectory::Lock> PrivateDirectory::lock(int64_t wait_ns) const {
  // Its own description each time: threads of one process exclude each other too. Not by a call
  // that waits: a holder that was stopped in a debugger would stop everybody.
  Descriptor fd(open_at(fd_, kLockName, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (fd.get() < 0) return io_error(path_, "open its lock", errno);
  const int64_t until = monotonic_ns() + wait_ns;
  while (::flock(fd.get(), LOCK_EX | LOCK_NB) != 0) {
    if (errno == EINTR) continue;
    if (errno != EWOULDBLOCK) return io_error(path_, "lock it", errno);
    if (monotonic_ns() >= until) {
      return Status(Code::kBusy,
                    format("%s/%s: another process or thread has held this lock for %lld ms",
                           path_.c_str(), kLockName, static_cast<long long>(wait_ns / 1'000'000)),
                    "", /*retryable=*/true);
    }
    ::usleep(kLockPollUs);
  }
  return Lock(fd.release());
}

Result<std::vector<PrivateDirectory::Entry>> PrivateDirectory::list() const {
  Descriptor fd(open_at(fd_, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  DIR* dir = fd.get() < 0 ? nullptr : ::fdopendir(fd.get());
  if (dir == nullptr) return io_error(path_, "list", errno);
  fd.release();  // closedir closes it
  struct Closer {
    DIR* dir;
    ~Closer() { ::closedir(dir); }
  } closer{dir};
  std::vector<Entry> entries;
  for (;;) {
    errno = 0;  // tells the end from a failure
    const dirent* item = ::readdir(dir);
    if (item == nullptr) break;
    const std::string_view name = item->d_name;
    if (name == "." || name == ".." || name == kLockName) continue;
    struct stat st;
    if (::fstatat(fd_, item->d_name, &st, AT_SYMLINK_NOFOLLOW) != 0) {
      if (errno == ENOENT) continue;  // gone meanwhile
      return io_error(path_ + "/" + item->d_name, "look at", errno);
    }
    if (!S_ISREG(st.st_mode)) continue;
    Entry entry;
    entry.name = name;
    entry.size = static_cast<uint64_t>(st.st_size);
    entry.used_ns = st.st_mtim.tv_sec * int64_t{1'000'000'000} + st.st_mtim.tv_nsec;
    entries.push_back(std::move(entry));
  }
  if (errno != 0) return io_error(path_, "list", errno);
  return entries;
}

Status PrivateDirectory::read(const std::string& name, size_t max_bytes,
                              std::vector<std::byte>* out, bool* found) const {
  *found = false;
  // O_NONBLOCK: what stands under the name may be a FIFO.
  Descriptor fd(open_at(fd_, name.c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK));
  if (fd.get() < 0) {
    if (errno == ENOENT) return {};
    if (errno == ELOOP) {
      return make_error(Code::kCorrupt, "%s/%s: is a symbolic link, expected a file", path_.c_str(),
                        name.c_str());
    }
    return io_error(path_ + "/" + name, "open", errno);
  }
  struct stat st;
  if (::fstat(fd.get(), &st) != 0) return io_error(path_ + "/" + name, "look at", errno);
  if (!S_ISREG(st.st_mode) || static_cast<uint64_t>(st.st_size) > max_bytes) {
    return make_error(Code::kCorrupt, "%s/%s: has %lld bytes, expected a file of at most %zu",
                      path_.c_str(), name.c_str(), static_cast<long long>(st.st_size), max_bytes);
  }
  out->resize(static_cast<size_t>(st.st_size));
  size_t done = 0;
  while (done < out->size()) {
    const ssize_t n = ::read(fd.get(), out->data() + done, out->size() - done);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return io_error(path_ + "/" + name, "read", errno);
    if (n == 0) break;
    done += static_cast<size_t>(n);
  }
  out->resize(done);
  *found = true;
  return {};
}

Status PrivateDirectory::write(const std::string& name,
                               std::span<const std::span<const std::byte>> parts) const {
  const std::string temporary =
      kTemporaryPrefix + std::to_string(static_cast<long>(::getpid())) + "-" + name;
  const std::string path = path_ + "/" + name;
  ::unlinkat(fd_, temporary.c_str(), 0);  // of a writer that died
  Descriptor fd(
      open_at(fd_, temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (fd.get() < 0) return io_error(path, "create a temporary file beside it", errno);
  Status status;
  for (const auto& part : parts) {
    if (status.ok()) status = write_all(fd.get(), part, path);
  }
  if (status.ok() && ::renameat(fd_, temporary.c_str(), fd_, name.c_str()) != 0) {
    status = io_error(path, "rename the finished file to it", errno);
  }
  if (!status.ok()) ::unlinkat(fd_, temporary.c_str(), 0);
  return status;
}

bool PrivateDirectory::contains(const std::string& name) const {
  return ::faccessat(fd_, name.c_str(), F_OK, AT_SYMLINK_NOFOLLOW) == 0;
}

void PrivateDirectory::touch(const std::string& name) const {
  const timespec now[2] = {{0, UTIME_NOW}, {0, UTIME_NOW}};
  ::utimensat(fd_, name.c_str(), now, AT_SYMLINK_NOFOLLOW);
}

Result<bool> PrivateDirectory::remove(const std::string& name) const {
  if (::unlinkat(fd_, name.c_str(), 0) == 0) return true;
  if (errno == EISDIR && ::unlinkat(fd_, name.c_str(), AT_REMOVEDIR) == 0) return true;
  if (errno == ENOENT) return false;
  return io_error(path_ + "/" + name, "remove", errno);
}

std::string PrivateDirectory::final_name(const std::string& name) {
  if (!name.starts_with(kTemporaryPrefix)) return "";
  const size_t process = strlen(kTemporaryPrefix);
  const size_t end = name.find_first_not_of("0123456789", process);
  const bool is_ours = end != std::string::npos && end > process && name[end] == '-';
  return is_ours ? name.substr(end + 1) : "";
}

}  // namespace dsv3
