#ifndef LARDER_TRANSPORT_TCP_TCP_TRANSPORT_H_
#define LARDER_TRANSPORT_TCP_TCP_TRANSPORT_H_

#include <memory>

#include "store/status.h"
#include "store/transport.h"
#include "transport/tcp/stream_transport.h"

namespace larder {

// Links by TCP as it is: nothing is encrypted, no peer proves who it is
// (Peer::identity is empty). For networks that are trusted; with
// NewTokenTransport (transport/link/token_transport.h) peers prove themselves
// by TLS first.
StatusOr<std::unique_ptr<Transport>> NewTcpTransport(
    const StreamOptions& options);

}  // namespace larder

#endif  // LARDER_TRANSPORT_TCP_TCP_TRANSPORT_H_
