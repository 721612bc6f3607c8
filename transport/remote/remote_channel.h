#ifndef LARDER_TRANSPORT_REMOTE_REMOTE_CHANNEL_H_
#define LARDER_TRANSPORT_REMOTE_REMOTE_CHANNEL_H_

#include <functional>
#include <memory>
#include <string>

#include "store/clock.h"
#include "store/status.h"
#include "store/transport.h"
#include "transport/local/channel.h"

namespace larder {

// A LocalChannel to the daemon of another host, over a link. What is memory
// shared with the daemon there is memory of this process here, of the same
// size, in which nothing lies until it is held:
//
//  - Slab: the parts of chunks that are held are brought when the hold is
//    answered. Until a chunk's parts are there, the channel says that it is
//    pending, and says kHoldChunk when they are, as the daemon does of chunks
//    that come from a slower tier. Memory of parts that no hold of this channel
//    has goes back to the system.
//  - Staging: what is committed is sent then. Its memory is reusable when the
//    daemon says so, as ever.
//
// Bytes in it are as trustworthy as shared memory is: who reads them verifies
// what he takes out.
//
// Threads, time, failure and forks as LocalChannel says, but that the threads
// of the transport do the receiving.
class RemoteChannel {
 public:
  struct Options {
    LocalChannel::Options local;  // its socket_path is not used
    std::string address;          // as the transport wants it
    // Whether the daemon there is the one that was meant; null: any is.
    std::function<Status(const Peer&)> check;
    // That of the transport: deadlines are its values.
    Clock* clock = &Clock::Real();
  };

  // Takes the transport, which carries this channel alone. Errors as
  // LocalChannel::Connect, and Unauthenticated.
  static StatusOr<std::shared_ptr<LocalChannel>> Connect(
      std::unique_ptr<Transport> transport, const Options& options);
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_REMOTE_REMOTE_CHANNEL_H_
