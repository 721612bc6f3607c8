#ifndef LARDER_TRANSPORT_UCX_LISTENER_GUARD_H_
#define LARDER_TRANSPORT_UCX_LISTENER_GUARD_H_

#include <sys/socket.h>

namespace larder {

// Keeps what is no connection request of UCX's away from a listener of it,
// which ends the process (an assertion in tcp_sockcm_ep.c of UCX 1.13) when
// more bytes come than the first of them, a length, say: 32 zeros, for example.
//
// Finds this process's TCP socket that listens at `address` and has the kernel
// drop such segments; connections that it accepts inherit that. Without one
// (rdmacm listens in its own way) nothing happens. It is against what strays
// to the port, not against an attacker, who can divide his bytes as he likes.
void GuardUcxListener(const sockaddr_storage& address);

}  // namespace larder

#endif  // LARDER_TRANSPORT_UCX_LISTENER_GUARD_H_
