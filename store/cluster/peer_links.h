#ifndef LARDER_STORE_CLUSTER_PEER_LINKS_H_
#define LARDER_STORE_CLUSTER_PEER_LINKS_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/after_unlock.h"
#include "store/clock.h"
#include "store/cluster/link_meter.h"
#include "store/cluster/membership.h"
#include "store/cluster/peer_calls.h"
#include "store/cluster/peer_messages.h"
#include "store/events.h"
#include "store/executor.h"
#include "store/lifeline.h"
#include "store/status.h"
#include "store/transport.h"

namespace larder {

struct PeerLinksOptions {
  // The kernel asks a second time after 1 s, then after 3: better anew.
  absl::Duration connect_timeout = absl::Seconds(1);
  // A node that could not be reached is not tried again for so long; doubled
  // with every failure up to retry_max.
  absl::Duration retry = absl::Milliseconds(100);
  absl::Duration retry_max = absl::Seconds(5);
  // Who may wait for a link that is being made; the next is ResourceExhausted.
  size_t waiting_max = 4096;
};

// The links of this node: one to each node that it asks something, made when it
// is asked for and made anew when it was lost; and those that others made, over
// which they ask. A link is with a node of the view in the life that the view
// says, or it is closed. Thread-safe.
class PeerLinks final : public PeerCalls, private LinkService {
 public:
  // Others' questions, by the node that asks. As LinkService::OnCall.
  using OnCalled = absl::AnyInvocable<void(
      NodeId from, const std::shared_ptr<Link>& link, std::string message,
      absl::Time deadline, Answer answer)>;

  struct Parts {
    std::string cluster;
    Node self;
    Clock* clock = nullptr;
    Executor* executor = nullptr;
    OnCalled on_called;
    // TenantPolicies::secret_check.
    uint64_t secret_check = 0;
    // Whether the peer is that node, by what the network proved; null: nobody
    // proves anything.
    std::function<Status(const Node& node, const Peer& peer)> authorize;
    // One line for people when a node refuses this one, or this one it, for
    // reasons that somebody must change; none twice in a row. Any thread.
    std::function<void(const std::string& line)> log;
    // What becomes of links that this node makes; may be null. Must not call
    // anything here.
    std::function<void(EventType type, const Node& node,
                       const std::string& detail)>
        happened;
  };

  PeerLinks(Parts parts, const PeerLinksOptions& options);
  // Ends the links. The transport must have been destroyed, or be destroyed
  // before anything that a callback touches is.
  ~PeerLinks() override;

  // Once, before anything else. `transport` must outlive it, or Stop must come
  // first. Returns where it listens, for Node::address; "" as address: nowhere.
  StatusOr<std::string> Start(Transport& transport, const std::string& address);
  // No link is made or accepted any more, and those that are end.
  void Stop();

  void SetView(std::shared_ptr<const ClusterView> view);

  // A link to the node. As PeerCalls::Call says of `replied`, by `deadline`.
  using Got = absl::AnyInvocable<void(StatusOr<std::shared_ptr<Link>>) &&>;
  void Get(NodeId node, absl::Time deadline, Got got);

  void Call(NodeId node, std::string message, absl::Time deadline,
            Replied replied) override;

  // Of a node of the view, for as long as it is in it.
  std::shared_ptr<LinkMeter> MeterOf(NodeId node);

  struct PeerState {
    Node node;
    bool connected = false;
    std::string problem;  // why the last attempt failed
    LinkStats stats;      // of the link that this node made
    LinkMeter::Figures measured;
  };
  std::vector<PeerState> States() const;

  struct Stats {
    uint64_t out = 0;     // links now: made by this node,
    uint64_t in = 0;      // by others
    uint64_t made = 0;    // by this node, of those
    uint64_t failed = 0;  // could not be made
    uint64_t lost = 0;    // ended while the node was in the view
  };
  Stats GetStats() const;

 private:
  struct Waiting {
    uint64_t number = 0;
    Got got;
  };
  struct Connection {
    std::shared_ptr<Link> link;  // made by this node
    bool connecting = false;
    uint64_t attempt = 0;
    absl::Time retry_at = absl::InfinitePast();
    absl::Duration backoff;
    Status problem;
    Status told;  // to people
    std::vector<Waiting> waiting;
  };

  // -- LinkService
  StatusOr<std::string> Admit(const std::string& greeting,
                              const Peer& peer) override;
  void OnLink(std::shared_ptr<Link> link) override;
  void OnCall(const std::shared_ptr<Link>& link, std::string message,
              absl::Time deadline, Answer answer) override;
  void OnLost(const std::shared_ptr<Link>& link, const Status& why) override;

  void Connect(const Node& node, Connection& connection, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnConnected(NodeId node, uint64_t attempt,
                   StatusOr<std::shared_ptr<Link>> link);
  void Say(EventType type, NodeId node, const Status& why)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Fail(Connection& connection, const Status& why, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::string Greeting() const;
  // Why `said` cannot be a node of this cluster.
  Status CheckGreeting(const PeerGreeting& said) const;

  Parts parts_;
  const PeerLinksOptions options_;
  const uint64_t cluster_;
  const std::shared_ptr<Lifeline> lifeline_ = std::make_shared<Lifeline>();

  mutable absl::Mutex mu_;
  Transport* transport_ ABSL_GUARDED_BY(mu_) = nullptr;
  std::shared_ptr<const ClusterView> view_ ABSL_GUARDED_BY(mu_) =
      std::make_shared<ClusterView>();
  std::map<NodeId, Connection> connections_ ABSL_GUARDED_BY(mu_);
  std::map<NodeId, std::shared_ptr<LinkMeter>> meters_ ABSL_GUARDED_BY(mu_);
  // Made by others, with who they are.
  absl::flat_hash_map<std::shared_ptr<Link>, std::pair<NodeId, uint64_t>>
      accepted_ ABSL_GUARDED_BY(mu_);
  uint64_t last_number_ ABSL_GUARDED_BY(mu_) = 0;
  Stats stats_ ABSL_GUARDED_BY(mu_);  // `out` and `in` are counted when asked
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_PEER_LINKS_H_
