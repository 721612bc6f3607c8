#ifndef LARDER_TRANSPORT_KV_EVENTS_PUBLISHER_H_
#define LARDER_TRANSPORT_KV_EVENTS_PUBLISHER_H_

#include <sys/types.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/time/time.h"

#include "store/clock.h"
#include "store/engine.h"
#include "store/status.h"
#include "store/types.h"
#include "transport/kv_events/batch_encoder.h"

namespace larder {

// Tells routers, in vLLM's schema and over ZeroMQ, which blocks of one tenant
// can be read in which tier (FORMAT.md). Follows the engine's log of events on
// a thread of its own: the engine never waits for it, nor it for a subscriber.
// Whoever falls behind sees a gap in the numbers, which the replay fills; if
// the publisher itself falls behind the log it says that all is cleared and
// tells anew what there is.
class KvEventPublisher {
 public:
  // ZeroMQ's own security: Z85 keys of 40 characters.
  struct Curve {
    std::string secret;                // the publisher's
    std::vector<std::string> clients;  // public keys of those who may connect
  };

  struct Options {
    TenantId tenant{};
    // "ipc:///path" or "tcp://address:port"; replay "": none.
    std::string publish;
    std::string replay;
    std::string topic;
    kv_events::Encoding encoding = kv_events::Encoding::kArrays;
    uint32_t ipc_mode = 0660;
    // Whether a process of this uid may subscribe over ipc (the kernel's word).
    // Called on the publisher's thread. Null: all that can open the socket.
    std::function<bool(uid_t uid)> admits;
    // Of tcp. Without it everybody who reaches the port may subscribe.
    std::optional<Curve> curve;
    // The longest that an event waits for others to share a batch with.
    absl::Duration interval = absl::Milliseconds(20);
    uint32_t batch_events = 256;
    // Batches that wait for a slow subscriber; it must have others replayed.
    uint32_t subscriber_batches = 1000;
    uint32_t replay_batches = 10'000;
    uint64_t replay_bytes = 64_MiB;
    uint64_t blocks_bytes = 256_MiB;  // for what saves said of their blocks
    bool keyed_tokens = false;
    // A replay asked for from before what is kept brings everything anew, not
    // more often than this.
    absl::Duration resync_interval = absl::Seconds(30);
  };

  struct Stats {
    uint64_t batches = 0;
    uint64_t stored = 0, removed = 0;  // events
    uint64_t listings = 0;             // "all cleared", then what there is
    uint64_t outrun = 0;               // of them because the engine was faster
    uint64_t replayed = 0;             // batches
    uint64_t refused = 0;              // peers
    uint64_t untold_chunks = 0;  // told without what is in them: no memory
    uint64_t subscriptions = 0;  // now
  };

  // Listens and begins with "all cleared" and what there is. InvalidArgument or
  // Unavailable name the endpoint. `engine` and `clock` outlive the publisher.
  static StatusOr<std::unique_ptr<KvEventPublisher>> Start(Options options,
                                                           Engine& engine,
                                                           Clock& clock);
  virtual ~KvEventPublisher() = default;

  virtual Stats stats() const = 0;  // thread-safe
  // What is listened on, where the options let the system choose.
  virtual const std::string& publish_endpoint() const = 0;
  virtual const std::string& replay_endpoint() const = 0;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_KV_EVENTS_PUBLISHER_H_
