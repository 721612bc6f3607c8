#ifndef LARDER_TRANSPORT_LINK_SOCKET_ADDRESS_H_
#define LARDER_TRANSPORT_LINK_SOCKET_ADDRESS_H_

#include <sys/socket.h>

#include <string>

#include "store/status.h"

namespace larder {

// Where a link goes, as the kernel wants it.
struct SocketAddress {
  sockaddr_storage storage{};
  socklen_t length = 0;
  const sockaddr* get() const {
    return reinterpret_cast<const sockaddr*>(&storage);
  }
};

// Of "192.0.2.7:9400" or "[2001:db8::7]:9400"; no names. InvalidArgument.
StatusOr<SocketAddress> ParseSocketAddress(const std::string& text);
// "?" for another family.
std::string FormatSocketAddress(const sockaddr_storage& storage);

}  // namespace larder

#endif  // LARDER_TRANSPORT_LINK_SOCKET_ADDRESS_H_
