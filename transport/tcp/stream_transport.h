#ifndef LARDER_TRANSPORT_TCP_STREAM_TRANSPORT_H_
#define LARDER_TRANSPORT_TCP_STREAM_TRANSPORT_H_

#include <cstdint>
#include <functional>
#include <memory>

#include "absl/time/time.h"

#include "store/clock.h"
#include "store/status.h"
#include "store/transport.h"
#include "transport/tcp/socket_stream.h"

namespace larder {

struct StreamOptions : TransportOptions {
  // Threads; links are spread over them.
  uint32_t workers = 1;
  // One with nothing to do looks for more for so long before it sleeps.
  absl::Duration spin = absl::Microseconds(50);
  // A connection that has not shown by then who it is is closed, at both ends.
  absl::Duration handshake_timeout = absl::Seconds(10);
  // Accepted connections that have not shown it yet, and accepted ones
  // altogether. More wait in the kernel's queue.
  uint32_t handshakes_max = 256;
  uint32_t connections_max = 8192;

  // Gets what no caller is told: connections refused here (ten a second at
  // most, the rest are counted), files that cannot be used. Called on threads
  // of the transport; must not block. No secret is in it.
  std::function<void(const Status&)> log;
  Clock* clock = &Clock::Real();
};

// Links over TCP, by streams of `make`; FORMAT.md of transport/link has the
// frames. `name`: of the threads, at most 8 characters.
//
// Addresses are "192.0.2.7:9400" or "[2001:db8::7]:9400"; no names.
StatusOr<std::unique_ptr<Transport>> NewStreamTransport(
    const StreamOptions& options, const char* name, NewSocketStream make);

}  // namespace larder

#endif  // LARDER_TRANSPORT_TCP_STREAM_TRANSPORT_H_
