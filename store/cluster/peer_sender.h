#ifndef LARDER_STORE_CLUSTER_PEER_SENDER_H_
#define LARDER_STORE_CLUSTER_PEER_SENDER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/clock.h"
#include "store/cluster/membership.h"
#include "store/cluster/peer_calls.h"
#include "store/cluster/peer_messages.h"
#include "store/cluster/tenant_policies.h"
#include "store/engine.h"
#include "store/lifeline.h"

namespace larder {

// Offers records of this node to others, who fetch them (PeerReceiver).
// Thread-safe.
class PeerSender final : public ChunkSender {
 public:
  struct Parts {
    std::string cluster;
    NodeId self{};
    PeerCalls* calls = nullptr;
    const TenantPolicies* policies = nullptr;
    Clock* clock = nullptr;
  };
  // An offer that was not answered in `timeout` failed.
  PeerSender(Parts parts, absl::Duration timeout)
      : parts_(std::move(parts)), timeout_(timeout) {}
  ~PeerSender() override { lifeline_->Cut(); }

  void SetView(std::shared_ptr<const ClusterView> view)
      ABSL_LOCKS_EXCLUDED(mu_);

  // By the tenant's policy.
  bool MayHave(TenantId tenant, NodeId node) const {
    return parts_.policies->Allows(tenant, node);
  }
  // By a node's name; for who waits there.
  void Send(const std::string& destination, const SpaceDescriptor& space,
            const RecordMeta& meta, Done done) override;
  // All of `records`, at most kOfferRecordsMax, of one tenant and space;
  // AlreadyExists if nothing had to be moved, PermissionDenied if the node, or
  // this one, may not have the tenant's chunks.
  void Offer(NodeId node, const SpaceDescriptor& space,
             std::vector<RecordMeta> records, Urgency urgency, Done done);

  struct Stats {
    uint64_t offers = 0;
    uint64_t failed_offers = 0;
  };
  Stats GetStats() const ABSL_LOCKS_EXCLUDED(mu_);

 private:
  const Parts parts_;
  const absl::Duration timeout_;
  const std::shared_ptr<Lifeline> lifeline_ = std::make_shared<Lifeline>();

  mutable absl::Mutex mu_;
  std::shared_ptr<const ClusterView> view_ ABSL_GUARDED_BY(mu_) =
      std::make_shared<ClusterView>();
  Stats stats_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_PEER_SENDER_H_
