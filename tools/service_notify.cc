#include "tools/service_notify.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstddef>
#include <cstring>

#include "absl/strings/numbers.h"

namespace larder {

void ServiceNotify::Send(const std::string& message) const {
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (socket_.empty() || socket_.size() >= sizeof address.sun_path) return;
  std::memcpy(address.sun_path, socket_.data(), socket_.size());
  // A leading '@' stands for the NUL of the abstract name space.
  if (socket_[0] == '@') address.sun_path[0] = '\0';
  const int fd = socket(AF_UNIX, SOCK_DGRAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return;
  (void)sendto(
      fd, message.data(), message.size(), MSG_NOSIGNAL,
      reinterpret_cast<sockaddr*>(&address),
      static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + socket_.size()));
  close(fd);
}

std::optional<absl::Duration> WatchdogPeriod(const char* usec,
                                             const char* pid) {
  int64_t value = 0;
  if (usec == nullptr || !absl::SimpleAtoi(usec, &value) || value <= 0) {
    return std::nullopt;
  }
  int64_t meant = 0;
  if (pid != nullptr && absl::SimpleAtoi(pid, &meant) && meant != getpid()) {
    return std::nullopt;
  }
  return absl::Microseconds(value) / 2;
}

}  // namespace larder
