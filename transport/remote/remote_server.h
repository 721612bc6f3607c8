#ifndef LARDER_TRANSPORT_REMOTE_REMOTE_SERVER_H_
#define LARDER_TRANSPORT_REMOTE_REMOTE_SERVER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/time/time.h"

#include "store/clock.h"
#include "store/executor.h"
#include "store/status.h"
#include "store/transport.h"
#include "store/units.h"
#include "transport/local/session.h"

namespace larder {

// The daemon's end of clients on other hosts: one Session (session.h) for each
// link, as LocalServer has one for each socket. What a local client maps, a
// remote one is sent: bytes of its tenant's slabs on request, completions as
// they come; what it saves lands in staging memory of the daemon's own.
//
// A client that goes, breaks the protocol, or from which nothing is heard (the
// link's silence) gives back all it held.
//
// Thread-safe. Destroy the transport that it listens on first.
class RemoteServer : public LinkService {
 public:
  struct Options {
    uint32_t max_clients = 1024;
    // Staging of one client, and of all of them: memory of this process, as
    // far as it was ever written. One more region is ResourceExhausted, which
    // a client takes for a daemon that is busy: it saves later.
    uint64_t staging_bytes = 256_MiB;
    uint64_t all_staging_bytes = 4_GiB;
    // A link that says no valid hello is closed.
    absl::Duration hello_timeout = absl::Seconds(5);
    // One line for people; any thread; may be null.
    std::function<void(const std::string& line)> log;
  };
  struct Stats {
    uint64_t clients = 0;  // now
    uint64_t accepted = 0, refused = 0;
    uint64_t staging_bytes = 0;                   // now, of all clients
    uint64_t sent_bytes = 0, received_bytes = 0;  // of KV
  };

  // What is passed by reference outlives the server; tasks that it left there
  // do not touch it.
  static std::unique_ptr<RemoteServer> Create(std::shared_ptr<SessionHub> hub,
                                              Options options,
                                              Executor& executor, Clock& clock);

  virtual Stats GetStats() const = 0;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_REMOTE_REMOTE_SERVER_H_
