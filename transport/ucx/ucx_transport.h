#ifndef LARDER_TRANSPORT_UCX_UCX_TRANSPORT_H_
#define LARDER_TRANSPORT_UCX_UCX_TRANSPORT_H_

#include <memory>
#include <string>

#include "absl/time/time.h"

#include "store/clock.h"
#include "store/status.h"
#include "store/transport.h"

namespace larder {

struct UcxOptions : TransportOptions {
  // UCX's own list of transports (UCX_TLS): "tcp"; "shm,tcp" for peers on the
  // same host; "rc_verbs" for RDMA, connected by rdmacm. Every link is made by
  // socket address, so tcp or rdmacm is needed by all. Empty: UCX's choice.
  std::string transports;
  // The network device that links go over (UCX_NET_DEVICES), "eth0" or
  // "mlx5_0:1". Empty: any.
  std::string devices;
  // Links that peers may have here at once; who comes then is rejected. Each
  // takes two descriptors, and UCX 1.13 ends the process when there are none
  // left. 0: a quarter of the descriptors that the process may have.
  uint32_t accepted_max = 0;
  // Payload between processes of this host is read straight from the sender's
  // memory (UCX's cma), where "shm" would copy it through small buffers: about
  // half the processor time. UCX 1.13 cannot call such a read back: after a
  // link was closed by force, the peer may still be reading bytes of a put that
  // is done here with an error, and land what is written there next. Only for
  // who verifies what landed, as loads do by their records' checksums.
  bool read_peer_memory = false;
  // Threads, each with a UCX worker; links are spread over them.
  uint32_t workers = 1;
  // A worker with nothing to do looks for more for so long before it sleeps.
  absl::Duration spin = absl::Microseconds(50);
  Clock* clock = &Clock::Real();
};

// Links by UCX active messages (UCX 1.13 or later), payload by rendezvous;
// FORMAT.md has the messages. Neither encrypts nor proves who the peer is: for
// networks that the operator trusts, beneath a TokenTransport.
//
// Addresses are "192.0.2.7:9400" or "[2001:db8::7]:9400"; no names.
// Unavailable: UCX has none of the transports on this host. FailedPrecondition:
// RDMA is asked for, and this process may not pin memory (RLIMIT_MEMLOCK).
StatusOr<std::unique_ptr<Transport>> NewUcxTransport(const UcxOptions& options);

}  // namespace larder

#endif  // LARDER_TRANSPORT_UCX_UCX_TRANSPORT_H_
