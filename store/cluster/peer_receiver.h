#ifndef LARDER_STORE_CLUSTER_PEER_RECEIVER_H_
#define LARDER_STORE_CLUSTER_PEER_RECEIVER_H_

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/clock.h"
#include "store/cluster/membership.h"
#include "store/cluster/peer_links.h"
#include "store/cluster/peer_messages.h"
#include "store/cluster/tenant_policies.h"
#include "store/engine.h"
#include "store/executor.h"
#include "store/lifeline.h"
#include "store/transport.h"
#include "store/units.h"

namespace larder {

struct PeerReceiverOptions {
  // Of records that are being fetched at once; the next ones wait. One alone
  // may be larger.
  uint64_t bytes_max = 256_MiB;
  // Records that wait; an offer of more is ResourceExhausted.
  size_t waiting_max = 16'384;
  // A record that did not come by then failed.
  absl::Duration read_timeout = absl::Seconds(10);
};

// Takes what other nodes offer: makes room, reads each record that is not here
// straight into it, and commits it there, verified. Records of chunks that are
// not complete yet count as any. Thread-safe; never blocks.
class PeerReceiver {
 public:
  struct Parts {
    Engine* engine = nullptr;
    PeerLinks* links = nullptr;
    const TenantPolicies* policies = nullptr;
    Clock* clock = nullptr;
    Executor* executor = nullptr;
  };
  // Order of the end: Stop; the transport, by which nothing writes to the
  // engine's memory any more; the engine; the receiver.
  PeerReceiver(Parts parts, const PeerReceiverOptions& options);
  ~PeerReceiver();
  // Calls the engine no more.
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);

  // A message of kind kOffer, of that node, which is asked for the bytes;
  // `sealed`: with whose key it came.
  void Handle(NodeId from, const std::string& message,
              std::optional<TenantId> sealed, Answer answer);

  struct Stats {
    uint64_t received = 0;  // records
    uint64_t received_bytes = 0;
    uint64_t present = 0;  // that were here
    uint64_t failed = 0;
  };
  Stats GetStats() const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Offered;
  struct Receiving;

  ClientId ClientOf(TenantId tenant) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Begins what there is room for.
  void Pump() ABSL_LOCKS_EXCLUDED(mu_);
  void Begin(const std::shared_ptr<Receiving>& receiving,
             StatusOr<std::shared_ptr<Link>> link);
  void OnRead(const std::shared_ptr<Receiving>& receiving,
              const Status& status);
  void End(const std::shared_ptr<Receiving>& receiving, const Status& status)
      ABSL_LOCKS_EXCLUDED(mu_);

  const Parts parts_;
  const PeerReceiverOptions options_;
  const std::shared_ptr<Lifeline> lifeline_ = std::make_shared<Lifeline>();

  mutable absl::Mutex mu_;
  std::map<TenantId, ClientId> clients_ ABSL_GUARDED_BY(mu_);
  // By urgency.
  std::deque<std::shared_ptr<Receiving>> waiting_[kUrgencies] ABSL_GUARDED_BY(
      mu_);
  size_t waiting_count_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;  // being fetched
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
  Stats stats_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_PEER_RECEIVER_H_
