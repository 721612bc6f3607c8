#ifndef LARDER_TESTS_SIM_SIM_CLIENT_H_
#define LARDER_TESTS_SIM_SIM_CLIENT_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "store/space.h"
#include "transport/local/packet.h"
#include "transport/local/session.h"
#include "transport/wire.h"

namespace larder::sim {

// A reply as it came: header, body bytes and arrays.
struct Reply {
  std::vector<std::byte> packet;
  PacketView view;
  absl::StatusCode code() const {
    return static_cast<absl::StatusCode>(view.Body<wire::ReplyHead>().status);
  }
};

// An engine process of the simulation: speaks the real wire messages to a real
// Session, without a socket, on the simulation's one thread. Maps what it is
// sent (slabs, ring) and shares staging memory as a process would.
class SimClient {
 public:
  SimClient(SessionHub& hub, const PeerIdentity& peer);
  ~SimClient();  // the process dies: nothing is said to the daemon
  SimClient(const SimClient&) = delete;
  SimClient& operator=(const SimClient&) = delete;

  // False once the daemon dropped the connection.
  bool alive() const;

  void Hello();
  std::optional<wire::OpenSpaceReply> OpenSpace(const SpaceDescriptor& space);
  void ShareStaging(uint64_t bytes);

  // Sends a packet. The reply, if it has come by the time the session returns.
  std::optional<Reply> Call(wire::Type type, ByteSpan body, ByteSpan array = {},
                            int fd = -1);
  void Send(wire::Type type, ByteSpan body, ByteSpan array = {});
  // Takes a reply that came later (kAdvanceEpoch), by request id.
  std::optional<Reply> TakeReply(uint64_t request);
  uint64_t last_request() const { return next_request_ - 1; }

  std::vector<wire::RingEntry> DrainRing();

  MutableByteSpan staging() const { return staging_; }
  uint32_t staging_region() const { return region_; }

  // The bytes of an extent, through this client's own read-only mapping.
  ByteSpan Extent(uint32_t slab, uint64_t offset, uint64_t bytes) const;

 private:
  struct Sink;
  struct Mapping {
    std::byte* data = nullptr;
    uint64_t bytes = 0;
  };
  void Receive();

  std::shared_ptr<Sink> sink_;
  std::unique_ptr<Session> session_;
  bool dropped_ = false;
  uint64_t next_request_ = 1;
  std::deque<Reply> replies_;
  std::map<uint32_t, Mapping> slabs_;
  Mapping ring_;
  uint64_t ring_read_ = 0;
  MutableByteSpan staging_;
  uint32_t region_ = 0;
};

}  // namespace larder::sim

#endif  // LARDER_TESTS_SIM_SIM_CLIENT_H_
