#include "transport/local/listener.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

namespace larder {
namespace {

constexpr int kBacklog = 1024;

StatusOr<UniqueFd> TakeLock(const std::string& path) {
  const std::string lock_path = path + ".lock";
  UniqueFd lock(
      open(lock_path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600));
  if (!lock) {
    return ErrnoStatus(absl::StatusCode::kFailedPrecondition,
                       absl::StrCat("cannot open ", lock_path));
  }
  if (flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("another daemon serves ", path));
  }
  return lock;
}

// Removes what a dead daemon left at the address.
Status ClearPath(const sockaddr_un& address) {
  struct stat file;
  if (lstat(address.sun_path, &file) != 0) {
    if (errno == ENOENT) return absl::OkStatus();
    return ErrnoStatus(absl::StatusCode::kFailedPrecondition,
                       absl::StrCat("cannot look at ", address.sun_path));
  }
  if (!S_ISSOCK(file.st_mode)) {
    return absl::FailedPreconditionError(
        absl::StrCat(address.sun_path, " exists and is no socket"));
  }
  UniqueFd probe(
      socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (connect(probe.get(), reinterpret_cast<const sockaddr*>(&address),
              sizeof address) == 0 ||
      errno == EAGAIN || errno == EPROTOTYPE) {
    return absl::FailedPreconditionError(
        absl::StrCat("another daemon listens on ", address.sun_path));
  }
  if (errno != ECONNREFUSED || unlink(address.sun_path) != 0) {
    return ErrnoStatus(
        absl::StatusCode::kFailedPrecondition,
        absl::StrCat("cannot replace the socket ", address.sun_path));
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<std::unique_ptr<Listener>> Listener::Open(const std::string& path,
                                                   uint32_t mode, int64_t gid) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof address.sun_path ||
      path.find('\0') != std::string::npos) {
    return absl::InvalidArgumentError(
        absl::StrCat("a socket path must have 1 to ",
                     sizeof address.sun_path - 1, " bytes"));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  std::unique_ptr<Listener> listener(new Listener(path));
  LARDER_ASSIGN_OR_RETURN(listener->lock_, TakeLock(path));
  LARDER_RETURN_IF_ERROR(ClearPath(address));

  UniqueFd socket_fd(
      socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  // The mode of the socket bounds that of its file: never wider, not even for
  // the moment before chmod.
  if (!socket_fd || fchmod(socket_fd.get(), mode) != 0 ||
      bind(socket_fd.get(), reinterpret_cast<const sockaddr*>(&address),
           sizeof address) != 0) {
    return ErrnoStatus(absl::StatusCode::kFailedPrecondition,
                       absl::StrCat("cannot bind ", path));
  }
  listener->socket_ = std::move(socket_fd);
  struct stat file;
  if (lstat(path.c_str(), &file) != 0 ||
      (gid >= 0 && chown(path.c_str(), static_cast<uid_t>(-1),
                         static_cast<gid_t>(gid)) != 0) ||
      chmod(path.c_str(), mode) != 0) {
    const Status status =
        ErrnoStatus(absl::StatusCode::kFailedPrecondition,
                    absl::StrCat("cannot set the permissions of ", path));
    unlink(path.c_str());
    return status;
  }
  listener->device_ = file.st_dev;
  listener->inode_ = file.st_ino;
  if (listen(listener->socket_.get(), kBacklog) != 0) {
    return ErrnoStatus(absl::StatusCode::kFailedPrecondition,
                       absl::StrCat("cannot listen on ", path));
  }
  return listener;
}

Listener::~Listener() {
  struct stat file;
  if (inode_ != 0 && lstat(path_.c_str(), &file) == 0 &&
      file.st_dev == device_ && file.st_ino == inode_) {
    unlink(path_.c_str());
  }
}

}  // namespace larder
