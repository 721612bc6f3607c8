#ifndef LARDER_TRANSPORT_LOCAL_SESSION_H_
#define LARDER_TRANSPORT_LOCAL_SESSION_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "store/clock.h"
#include "store/engine.h"
#include "store/status.h"
#include "store/tier.h"
#include "store/types.h"
#include "store/units.h"
#include "transport/wire.h"

namespace larder {

// Who connects. Numbers are the kernel's (SO_PEERCRED); the token is what the
// client sent, without padding.
struct PeerIdentity {
  uid_t uid = 0;
  gid_t gid = 0;
  pid_t pid = 0;  // 0: in a pid namespace that is not an ancestor of ours
  std::string_view token;
  std::string_view client_name;  // printable ASCII only; for people
  // On another host: the kernel's numbers say nothing then, and `certificate`
  // is what its link proved of it (Peer::identity), perhaps nothing. Lives as
  // long as the session's sink.
  bool remote = false;
  std::string_view certificate;
};

struct SessionOptions {
  // Decides the tenant of a connection. An error refuses it; its text goes to
  // the client. Any thread, must not block. Null: every peer is tenant 0 (for
  // tests and single-user set-ups).
  std::function<StatusOr<TenantId>(const PeerIdentity& peer)> tenant_of;

  // The bytes of a profile that is kept, or null. Any thread, must not block.
  // Null: none are.
  std::function<std::shared_ptr<const std::string>(const ProfileId& id)>
      profile_of;

  // Whether the tenant's events are published, so that its clients are asked
  // what is in their chunks. Any thread, must not block. Null: none are.
  std::function<bool(TenantId tenant)> wants_blocks;

  // What one client may have at most; one more is ResourceExhausted.
  uint64_t max_staging_bytes = 16_GiB;
  uint32_t max_staging_regions = 64;
  uint32_t max_holds = 4096;  // also said in the handshake
  uint32_t max_spaces = 256;
  uint32_t max_pending_calls = 64;  // answered later (kAdvanceEpoch)
  // Chunks of hold answers that wait for the client to ask for the next packet.
  uint32_t max_unsent_chunks = 1 << 16;
  // Completions nobody asked for that wait for room in the ring; at the bound
  // the client is dropped.
  uint32_t max_completion_backlog = 16384;
  // The longest that a match waits for what other nodes say, and that they are
  // asked where nobody waits.
  absl::Duration locate_wait = absl::Milliseconds(200);
  // The longest that a kAwait waits: what a client that goes leaves behind.
  absl::Duration await_wait = absl::Seconds(10);
  // kStats shows the whole daemon's figures; false: PermissionDenied.
  bool share_stats = true;

  Status Validate() const;
};

// Where a session sends. Thread-safe; outlives what uses it (shared).
class PacketSink {
 public:
  virtual ~PacketSink() = default;
  // Sends a packet or queues a copy of it (and of the descriptors, which are
  // borrowed). Never blocks. False: the client is gone or is being dropped.
  virtual bool Send(ByteSpan packet, std::span<const int> fds) = 0;
  // The ring or the notices have something new. True: the client hears of it
  // from the sink; false: its bell is to be rung. Any thread, also while the
  // session handles a packet.
  virtual bool Rang() { return false; }
  // The client is to be dropped, after what was sent; `reason` is for the log.
  // May be called from any thread, any number of times.
  virtual void Close(std::string_view reason) = 0;
};

// The protocol of one client on the daemon's side: untrusted packets in, engine
// calls, packets and completions out. Knows no socket: LocalServer, the
// simulation and the fuzzer all drive it.
//
// Threads: OnPacket and the destructor are called by one thread at a time.
// Engine callbacks come from any thread, also after the session is gone: they
// own what they touch.
//
// A packet that is not well-formed (wrong magic or sizes, counts that do not
// agree with its length, anything before the hello) closes the connection; a
// well-formed one that asks for what cannot be is answered with an error.
class Session {
 public:
  virtual ~Session() = default;  // Engine::RemoveClient, unmaps everything

  // Handles one packet. `fds` are taken over (closed if not wanted). False: the
  // connection is to be dropped; the sink has been told why.
  virtual bool OnPacket(ByteSpan packet, std::span<const int> fds) = 0;

  // A valid hello was answered.
  virtual bool open() const = 0;
};

// What the sessions of one daemon share: which client has which slab mapped,
// who must hear of an advanced epoch. Thread-safe.
class SessionHub {
 public:
  struct Dependencies {
    Engine* engine = nullptr;
    MemoryTier* dram = nullptr;
    Clock* clock = nullptr;
    // No session has this retired slab mapped any more; perhaps more than once
    // for a slab, from two threads at a time. May be null.
    std::function<void(uint32_t slab)> slab_unmapped_everywhere;
  };

  // What is passed by pointer outlives the hub and the last session.
  static std::shared_ptr<SessionHub> Create(SessionOptions options,
                                            Dependencies dependencies);
  virtual ~SessionHub() = default;

  // `peer.token` and `peer.client_name` are set by the hello.
  virtual std::unique_ptr<Session> NewSession(
      PeerIdentity peer, std::shared_ptr<PacketSink> sink) = 0;

  // The slab holds nothing any more: asks every session that has it mapped to
  // unmap it. `slab_unmapped_everywhere` is called when the last one has (or is
  // gone), at once if there is none. Idempotent until then.
  virtual void RetireSlab(uint32_t slab) = 0;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_LOCAL_SESSION_H_
