#ifndef LARDER_TRANSPORT_LOCAL_DATAGRAM_H_
#define LARDER_TRANSPORT_LOCAL_DATAGRAM_H_

#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstddef>
#include <cstring>
#include <span>

#include "transport/wire.h"

namespace larder {

// Room for the descriptors beside one packet.
struct DescriptorSpace {
  alignas(cmsghdr) char bytes[CMSG_SPACE(wire::kMaxDescriptors * sizeof(int))];
};

// One packet, at once or not at all. 0, or the errno.
inline int SendDatagram(int socket, std::span<const iovec> pieces,
                        std::span<const int> fds) {
  msghdr message = {};
  message.msg_iov = const_cast<iovec*>(pieces.data());
  message.msg_iovlen = pieces.size();
  DescriptorSpace space;
  if (!fds.empty()) {
    message.msg_control = space.bytes;
    message.msg_controllen = CMSG_SPACE(fds.size_bytes());
    cmsghdr* control = CMSG_FIRSTHDR(&message);
    control->cmsg_level = SOL_SOCKET;
    control->cmsg_type = SCM_RIGHTS;
    control->cmsg_len = CMSG_LEN(fds.size_bytes());
    std::memcpy(CMSG_DATA(control), fds.data(), fds.size_bytes());
  }
  for (;;) {
    if (sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL) >= 0) return 0;
    if (errno != EINTR) return errno == EWOULDBLOCK ? EAGAIN : errno;
  }
}

// The descriptors that came with a received message, at most kMaxDescriptors;
// returns how many. The caller owns them.
inline size_t TakeDescriptors(const msghdr& message,
                              int (&fds)[wire::kMaxDescriptors]) {
  size_t count = 0;
  auto* mutable_message = const_cast<msghdr*>(&message);
  for (cmsghdr* control = CMSG_FIRSTHDR(mutable_message); control != nullptr;
       control = CMSG_NXTHDR(mutable_message, control)) {
    if (control->cmsg_level != SOL_SOCKET || control->cmsg_type != SCM_RIGHTS) {
      continue;
    }
    const size_t here = (control->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < here && count < wire::kMaxDescriptors; ++i) {
      std::memcpy(&fds[count++], CMSG_DATA(control) + i * sizeof(int),
                  sizeof(int));
    }
  }
  return count;
}

}  // namespace larder

#endif  // LARDER_TRANSPORT_LOCAL_DATAGRAM_H_
