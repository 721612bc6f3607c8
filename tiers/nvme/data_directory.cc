#include "tiers/nvme/data_directory.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstring>
#include <system_error>
#include <utility>

namespace larder {
namespace {

// Every segment file stays open: the soft limit of 1024 that shells give is
// for select(), which nobody here calls.
void RaiseDescriptorLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) == 0 &&
      limit.rlim_cur < limit.rlim_max) {
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
  }
}

}  // namespace

Status FileError(int error, const std::string& doing) {
  const std::string text =
      absl::StrCat(doing, ": ", std::generic_category().message(error));
  switch (error) {
    case ENOENT:
    case ENOTDIR:
      return absl::NotFoundError(text);
    case EACCES:
    case EPERM:
      return absl::PermissionDeniedError(
          absl::StrCat(text, " (give the daemon's user write access)"));
    case EROFS:
      return absl::PermissionDeniedError(
          absl::StrCat(text, " (remount it writable, or choose another path)"));
    case ENOSPC:
    case EDQUOT:
      return absl::ResourceExhaustedError(absl::StrCat(
          text, " (free space there, or give the tier a smaller capacity)"));
    case EMFILE:
    case ENFILE:
      return absl::ResourceExhaustedError(absl::StrCat(
          text, " (raise the limit on open files, LimitNOFILE in systemd)"));
    default:
      return absl::UnavailableError(text);
  }
}

StatusOr<std::unique_ptr<DataDirectory>> DataDirectory::Take(
    const std::string& path) {
  if (mkdir(path.c_str(), 0700) != 0 && errno != EEXIST) {
    return FileError(errno, absl::StrCat("make the data directory ", path));
  }
  const int directory = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (directory < 0) {
    return FileError(errno, absl::StrCat("open the data directory ", path));
  }
  const int lock_file =
      openat(directory, "LOCK", O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  if (lock_file < 0) {
    const int error = errno;
    close(directory);
    return FileError(error, absl::StrCat("write in the data directory ", path));
  }
  if (flock(lock_file, LOCK_EX | LOCK_NB) != 0) {
    const int error = errno;
    close(lock_file);
    close(directory);
    if (error == EWOULDBLOCK) {
      return absl::FailedPreconditionError(absl::StrCat(
          "the data directory ", path,
          " is in use by another larderd: stop that one, or give this one a "
          "directory of its own"));
    }
    return FileError(error, absl::StrCat("lock the data directory ", path));
  }
  RaiseDescriptorLimit();
  return std::unique_ptr<DataDirectory>(
      new DataDirectory(path, directory, lock_file));
}

DataDirectory::DataDirectory(std::string path, int directory, int lock_file)
    : path_(std::move(path)),
      directory_(directory),
      lock_file_(lock_file),
      descriptors_(new std::atomic<int>[kMaxFiles]) {
  for (uint32_t i = 0; i < kMaxFiles; ++i) descriptors_[i] = -1;
}

DataDirectory::~DataDirectory() {
  for (uint32_t i = 0; i < kMaxFiles; ++i) {
    if (const int fd = descriptors_[i].load(); fd >= 0) close(fd);
  }
  close(lock_file_);
  close(directory_);
}

StatusOr<std::vector<FileIo::FileInfo>> DataDirectory::List() {
  const int copy = openat(directory_, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (copy < 0) return FileError(errno, absl::StrCat("list ", path_));
  DIR* dir = fdopendir(copy);
  if (dir == nullptr) {
    const int error = errno;
    close(copy);
    return FileError(error, absl::StrCat("list ", path_));
  }
  std::vector<FileIo::FileInfo> files;
  for (;;) {
    errno = 0;
    // Each stream is used by one thread.
    const dirent* entry = readdir(dir);  // NOLINT(concurrency-mt-unsafe)
    if (entry == nullptr) break;
    struct stat info {};
    if (fstatat(directory_, entry->d_name, &info, AT_SYMLINK_NOFOLLOW) == 0 &&
        S_ISREG(info.st_mode)) {
      files.push_back({entry->d_name, static_cast<uint64_t>(info.st_size)});
    }
  }
  const int error = errno;
  closedir(dir);
  if (error != 0) return FileError(error, absl::StrCat("list ", path_));
  return files;
}

StatusOr<int> DataDirectory::OpenAt(const std::string& name, int flags) {
  if (direct()) {
    const int fd =
        openat(directory_, name.c_str(), flags | O_DIRECT | O_CLOEXEC, 0600);
    if (fd >= 0) return fd;
    if (errno != EINVAL) {
      return FileError(errno, absl::StrCat("open ", path_, "/", name));
    }
    direct_ = false;  // this file system has none: go through the page cache
    if ((flags & O_CREAT) != 0) unlinkat(directory_, name.c_str(), 0);
  }
  const int fd = openat(directory_, name.c_str(), flags | O_CLOEXEC, 0600);
  if (fd < 0) return FileError(errno, absl::StrCat("open ", path_, "/", name));
  return fd;
}

StatusOr<FileId> DataDirectory::Remember(int fd) {
  absl::MutexLock lock(&mu_);
  uint32_t slot = 0;
  if (!free_slots_.empty()) {
    slot = free_slots_.back();
    free_slots_.pop_back();
  } else if (next_slot_ < kMaxFiles) {
    slot = next_slot_++;
  } else {
    close(fd);
    return absl::ResourceExhaustedError(absl::StrCat(
        path_, ": more than ", kMaxFiles, " files (use larger segment files)"));
  }
  descriptors_[slot].store(fd, std::memory_order_release);
  return static_cast<FileId>(slot);
}

StatusOr<FileId> DataDirectory::Create(const std::string& name,
                                       uint64_t bytes) {
  LARDER_ASSIGN_OR_RETURN(const int fd,
                          OpenAt(name, O_RDWR | O_CREAT | O_EXCL));
  int error = 0;
  do {
    error = fallocate(fd, 0, 0, static_cast<off_t>(bytes)) == 0 ? 0 : errno;
  } while (error == EINTR);
  if (error == EOPNOTSUPP) error = posix_fallocate(fd, 0, bytes);
  if (error != 0) {
    close(fd);
    unlinkat(directory_, name.c_str(), 0);
    return FileError(error, absl::StrCat("reserve ", bytes, " bytes for ",
                                         path_, "/", name));
  }
  StatusOr<FileId> file = Remember(fd);
  if (!file.ok()) unlinkat(directory_, name.c_str(), 0);
  return file;
}

StatusOr<FileId> DataDirectory::Open(const std::string& name) {
  LARDER_ASSIGN_OR_RETURN(const int fd, OpenAt(name, O_RDWR));
  return Remember(fd);
}

int DataDirectory::Forget(FileId file) {
  const auto slot = static_cast<uint32_t>(file);
  if (slot == 0 || slot >= kMaxFiles) return -1;
  absl::MutexLock lock(&mu_);
  const int fd = descriptors_[slot].exchange(-1);
  if (fd >= 0) free_slots_.push_back(slot);
  return fd;
}

Status DataDirectory::Delete(const std::string& name) {
  if (unlinkat(directory_, name.c_str(), 0) != 0) {
    return FileError(errno, absl::StrCat("delete ", path_, "/", name));
  }
  return absl::OkStatus();
}

Status DataDirectory::Sync() {
  if (fsync(directory_) != 0) {
    return FileError(errno, absl::StrCat("sync the directory ", path_));
  }
  return absl::OkStatus();
}

void DirectoryFileIo::Close(FileId file) {
  if (const int fd = directory_->Forget(file); fd >= 0) close(fd);
}

int64_t DirectoryFileIo::ReadNow(FileId file, uint64_t offset,
                                 MutableByteSpan into) {
  return Transfer({.kind = IoRequest::Kind::kRead,
                   .file = file,
                   .offset = offset,
                   .first = into});
}

int64_t DirectoryFileIo::WriteNow(FileId file, uint64_t offset, ByteSpan from) {
  return Transfer(
      {.kind = IoRequest::Kind::kWrite,
       .file = file,
       .offset = offset,
       .first = {const_cast<std::byte*>(from.data()), from.size()}});
}

int64_t DirectoryFileIo::SyncNow(FileId file) {
  return Transfer({.kind = IoRequest::Kind::kSync, .file = file});
}

int64_t DirectoryFileIo::Transfer(const IoRequest& request) {
  const int fd = directory_->descriptor(request.file);
  if (fd < 0) return -EBADF;
  if (request.kind == IoRequest::Kind::kSync) {
    return fdatasync(fd) == 0 ? 0 : -errno;
  }
  const std::array<iovec, 2> parts{
      {{request.first.data(), request.first.size()},
       {request.second.data(), request.second.size()}}};
  const int count = request.second.empty() ? 1 : 2;
  const auto offset = static_cast<off_t>(request.offset);
  const ssize_t result = request.kind == IoRequest::Kind::kRead
                             ? preadv(fd, parts.data(), count, offset)
                             : pwritev(fd, parts.data(), count, offset);
  return result >= 0 ? result : -errno;
}

}  // namespace larder
