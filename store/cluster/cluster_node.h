#ifndef LARDER_STORE_CLUSTER_CLUSTER_NODE_H_
#define LARDER_STORE_CLUSTER_CLUSTER_NODE_H_

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"

#include "store/clock.h"
#include "store/cluster/announcer.h"
#include "store/cluster/chunk_copier.h"
#include "store/cluster/cluster_tier.h"
#include "store/cluster/directory.h"
#include "store/cluster/locator.h"
#include "store/cluster/membership.h"
#include "store/cluster/peer_links.h"
#include "store/cluster/peer_receiver.h"
#include "store/cluster/peer_sender.h"
#include "store/cluster/peer_service.h"
#include "store/cluster/replication.h"
#include "store/cluster/tenant_policies.h"
#include "store/engine.h"
#include "store/events.h"
#include "store/executor.h"
#include "store/status.h"
#include "store/transport.h"

namespace larder {

struct ClusterOptions {
  DirectoryOptions directory;
  AnnouncerOptions announcer;
  LocatorOptions locator;
  PeerLinksOptions links;
  ClusterTierOptions tier;
  PeerReceiverOptions receiver;
  ReplicationOptions replication;
  // Each chunk shall be at so many nodes more than one, at most kReplicasMax:
  // at the first replicas + 1 homes of its anchor. 0: where it was saved, and
  // where it is much asked for. The same at all nodes.
  uint8_t replicas = 0;
  // An offer that was not answered by then failed.
  absl::Duration offer_timeout = absl::Seconds(20);
  PeerServiceOptions service;
};

inline constexpr uint8_t kReplicasMax = kHomesMax - 1;

// This node's part in a cluster: tells others what it has, keeps its shard of
// the directory, finds and fetches what others have, gives them what they ask
// for. All of it comes and goes with the view of a Membership; without one, and
// without other nodes, an engine with it is as one alone.
//
//   ClusterNode node(...);
//   Engine::Open({.., .peers = &node.tier(), .observer = &node.observer(),
//                 .sender = &node.sender()});
//   node.Start(*engine, transport, "192.0.2.7:0");
//   membership.Join(node.self(), [&](view) { node.SetView(view); }, ...);
//
// Thread-safe. Order of the end: no more SetView, node.Stop(), the transport
// destroyed, the engine, the node.
class ClusterNode {
 public:
  struct Parts {
    std::string cluster;
    std::string name;  // of the node, unique in the cluster
    uint64_t incarnation = 0;
    Clock* clock = nullptr;
    Executor* executor = nullptr;
    // See TenantPolicies.
    std::string secret;
    std::vector<TenantPolicy> tenants;
    // See PeerLinks::Parts.
    std::function<Status(const Node& node, const Peer& peer)> authorize;
    std::function<void(const std::string& line)> log;
    uint64_t seed = 0;  // random; 0: from the kernel
  };

  ClusterNode(Parts parts, const ClusterOptions& options);
  ~ClusterNode();

  // For Engine::Dependencies.
  PeerTier& tier();
  ChunkObserver& observer();
  PeerSender& sender() { return sender_; }

  // Once: others may ask from now on, over `transport`, which listens at
  // `address`. Where that is in the end is self().address.
  Status Start(Engine& engine, Transport& transport,
               const std::string& address);
  void Stop();
  void SetView(std::shared_ptr<const ClusterView> view);

  // What Membership::Join is told.
  Node self() const;

  struct Stats {
    Directory::Stats directory;
    Announcer::Stats announcer;
    Locator::Stats locator;
    ClusterTier::Stats tier;
    PeerService::Stats service;
    PeerSender::Stats sender;
    PeerReceiver::Stats receiver;
    uint64_t wrong_keys = 0;  // questions that no key here opens
    Replication::Stats replication;
  };
  Stats GetStats() const;
  // What happened to the nodes and to the links with them, for people.
  EventLog& events() { return events_; }
  std::vector<PeerLinks::PeerState> Peers() const { return links_.States(); }
  PeerLinks::Stats LinkStats() const { return links_.GetStats(); }
  std::shared_ptr<const ClusterView> View() const;
  // Everything that this node has was told, and what was to be copied is: after
  // a view in which this node drains it may leave.
  bool Quiet() const { return announcer_.Quiet() && replication_.Quiet(); }

 private:
  class Observer;

  void OnCalled(NodeId from, const std::shared_ptr<Link>& link,
                std::string message, absl::Time deadline, Answer answer);

  void Dispatch(NodeId from, const std::shared_ptr<Link>& link,
                const std::string& message, std::optional<TenantId> sealed,
                absl::Time deadline, Answer answer);
  void OnWrongKey(NodeId from, TenantId tenant);
  void Publish(EventType type, const std::string& node,
               std::string detail = {});
  void TellChanges(const ClusterView& before, const ClusterView& now);

  const Parts parts_;
  const PeerServiceOptions service_options_;
  const NodeId id_;
  const TenantPolicies policies_;
  EventLog events_{1024};
  Directory directory_;
  PeerLinks links_;
  PeerSender sender_;
  Announcer announcer_;
  ChunkCopier copier_;
  Replication replication_;
  Locator locator_;
  ClusterTier tier_;
  const PeerReceiverOptions receiver_options_;
  const std::unique_ptr<Observer> observer_;

  mutable absl::Mutex mu_;
  std::unique_ptr<PeerService> service_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<PeerReceiver> receiver_ ABSL_GUARDED_BY(mu_);
  uint64_t wrong_keys_ ABSL_GUARDED_BY(mu_) = 0;
  // When people were told of whose wrong keys.
  std::map<NodeId, absl::Time> said_ ABSL_GUARDED_BY(mu_);
  std::string address_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<const ClusterView> view_ ABSL_GUARDED_BY(mu_) =
      std::make_shared<ClusterView>();
  std::shared_ptr<const Rendezvous> rendezvous_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_CLUSTER_NODE_H_
