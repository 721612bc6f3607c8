#ifndef LARDER_TRANSPORT_TCP_SOCKET_STREAM_H_
#define LARDER_TRANSPORT_TCP_SOCKET_STREAM_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "store/status.h"
#include "store/units.h"

namespace larder {

// Bytes both ways over a connected socket that does not block: as they are, or
// encrypted. The socket stays its owner's. Used by one thread at a time.
class SocketStream {
 public:
  enum class Outcome : uint8_t {
    kDone,
    kWait,  // until the socket is ready again, then the same once more
    kLost,  // why() says why
  };

  virtual ~SocketStream() = default;

  // First, until it is done: both ends know then who is there.
  virtual Outcome Handshake() = 0;
  // Some bytes, `size` of them, at least one.
  virtual Outcome Read(MutableByteSpan into, size_t& size) = 0;
  virtual Outcome Write(ByteSpan from, size_t& size) = 0;
  // What was begun to be written is written: the time for what goes between.
  virtual void BetweenWrites() {}

  virtual Status why() const = 0;
  // After the handshake; empty: nothing was proved.
  virtual std::string identity() const = 0;
};

// Makes one over `fd` for a connection with `peer`, for logs. Thread-safe.
using NewSocketStream = std::function<StatusOr<std::unique_ptr<SocketStream>>(
    int fd, bool accepting, const std::string& peer)>;

}  // namespace larder

#endif  // LARDER_TRANSPORT_TCP_SOCKET_STREAM_H_
