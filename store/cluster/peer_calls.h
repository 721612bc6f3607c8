#ifndef LARDER_STORE_CLUSTER_PEER_CALLS_H_
#define LARDER_STORE_CLUSTER_PEER_CALLS_H_

#include <string>

#include "absl/functional/any_invocable.h"
#include "absl/time/time.h"

#include "store/cluster/membership.h"
#include "store/status.h"

namespace larder {

// Small questions to other nodes by id, whatever link there is to them (in a
// simulation: none). Thread-safe.
class PeerCalls {
 public:
  using Replied = absl::AnyInvocable<void(StatusOr<std::string>) &&>;

  virtual ~PeerCalls() = default;

  // `replied` runs exactly once, never from within the call, on a thread that
  // must not be blocked: the answer, the error that the other gave,
  // DeadlineExceeded, or Unavailable if there is no way to it. `message` and
  // answers have at most kMessageBytesMax.
  virtual void Call(NodeId node, std::string message, absl::Time deadline,
                    Replied replied) = 0;
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_PEER_CALLS_H_
