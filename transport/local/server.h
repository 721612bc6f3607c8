#ifndef LARDER_TRANSPORT_LOCAL_SERVER_H_
#define LARDER_TRANSPORT_LOCAL_SERVER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"

#include "store/clock.h"
#include "store/engine.h"
#include "store/executor.h"
#include "store/status.h"
#include "store/tier.h"
#include "transport/local/session.h"

namespace larder {

// The daemon's end of the Unix socket: accepts engine processes, reads their
// packets, and drives one Session (session.h) for each. A few epoll threads
// serve thousands of clients; a client stays with one thread.
//
// A client that dies (or closes, or breaks the protocol, or does not read what
// it is sent) is dropped: the engine gives back all it held, every descriptor
// and mapping goes. Death is seen by the process itself (pidfd), not only by
// the socket, which a forked child may keep open.
//
// Thread-safe.
class LocalServer {
 public:
  struct Options {
    std::string socket_path;      // at most 107 bytes; its folder must exist
    uint32_t socket_mode = 0660;  // set before the socket listens
    int64_t socket_gid = -1;      // chown of the socket's group; -1: as created
    uint32_t max_clients = 4096;  // one more is refused by name
    uint32_t threads = 1;         // 1..16
    // A connection that has not said a valid hello by then is closed.
    absl::Duration hello_timeout = absl::Seconds(5);
    // Packets of one client before the next ready client of the thread gets its
    // turn (1..16).
    uint32_t packets_per_turn = 8;
    // What waits for a client that does not read its socket; at the bound the
    // client is dropped.
    uint64_t send_queue_bytes = 4_MiB;
    // How often retired slabs are asked for.
    absl::Duration housekeeping_period = absl::Milliseconds(200);

    // Slabs that clients should unmap: asked for every housekeeping period, so
    // that none is forgotten; may be null where RetireSlab is called for each.
    // (DramTier::RetiredSlabs.)
    std::function<std::vector<uint32_t>()> retired_slabs;
    // No client has this retired slab mapped any more; any thread, without
    // locks, perhaps more than once for a slab and from two threads at a time;
    // may be null. (DramTier::Forget.)
    std::function<void(uint32_t slab)> slab_unmapped_everywhere;
    // One line for people about why a client was dropped (never a payload, a
    // token or an id); any thread; may be null.
    std::function<void(const std::string& line)> log;

    // Tenant mapping and the limits of one client.
    SessionOptions session;

    Status Validate() const;
  };

  // Binds, listens and serves. FailedPrecondition: another daemon serves the
  // path (a lock beside the socket, PATH.lock, and a trial connect say so), or
  // something that is no socket lies there. A socket that a dead daemon left is
  // replaced. What is passed by reference outlives the server; the executor is
  // used for housekeeping only.
  static StatusOr<std::unique_ptr<LocalServer>> Start(Options options,
                                                      Engine& engine,
                                                      MemoryTier& dram,
                                                      Executor& executor,
                                                      Clock& clock);

  // As Stop with one second.
  virtual ~LocalServer() = default;

  // Accepts and reads no more, sends what is queued (for at most `drain_for`),
  // drops all clients, removes the socket file, joins the threads. Idempotent.
  virtual void Stop(absl::Duration drain_for) = 0;

  // Tells the clients that have the slab mapped to unmap it;
  // `slab_unmapped_everywhere` follows, perhaps before the return. Never
  // blocks; may be called from the tier (DramTier::ObserveRetired). Idempotent.
  virtual void RetireSlab(uint32_t slab) = 0;

  // For sessions that come by other ways than the socket.
  virtual std::shared_ptr<SessionHub> hub() const = 0;

  struct Stats {
    uint64_t clients = 0;   // now
    uint64_t accepted = 0;  // ever
    uint64_t refused = 0;   // too many clients, or no descriptor left
    uint64_t dropped = 0;   // by us: protocol, not reading, no hello
    uint64_t packets_received = 0;
    uint64_t packets_sent = 0;
  };
  virtual Stats stats() const = 0;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_LOCAL_SERVER_H_
