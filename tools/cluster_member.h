#ifndef LARDER_TOOLS_CLUSTER_MEMBER_H_
#define LARDER_TOOLS_CLUSTER_MEMBER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"

#include "store/cluster/cluster_node.h"
#include "store/engine.h"
#include "store/status.h"
#include "store/tier.h"
#include "tools/config.h"
#include "tools/tenants.h"

namespace larder {

// The daemon's part in a cluster as its configuration says: the node, its
// network, its entry in etcd. Thread-safe.
class ClusterMember {
 public:
  // Reads certificates, finds out this node's address; joins nobody yet.
  // Errors say what to change. `log`: one line for people; any thread.
  static StatusOr<std::unique_ptr<ClusterMember>> Create(
      const DaemonConfig::Cluster& config, const TenantDirectory& tenants,
      std::function<void(const std::string& line)> log);
  virtual ~ClusterMember() = default;

  // For Engine::Dependencies.
  virtual PeerTier& tier() = 0;
  virtual ChunkObserver& observer() = 0;
  virtual ChunkSender& sender() = 0;

  // Serves other nodes and enters the cluster, in the background: a registry
  // that does not answer is no error, it is asked again.
  virtual Status Start(Engine& engine) = 0;
  // Leaves. Nothing of it touches the engine or its memory afterwards; call it
  // before the engine goes.
  virtual void Stop() = 0;

  // Gives other nodes what only this one has, and leaves then; what is asked of
  // it locally goes on. In the background, until it is done or the daemon ends;
  // again: no change. FailedPrecondition: nobody is there to take it.
  virtual Status Drain() = 0;
  enum class Phase : uint8_t { kMember, kDraining, kLeft };
  virtual Phase phase() const = 0;

  virtual const Node& self() const = 0;
  virtual const ClusterNode& node() const = 0;
  virtual EventLog& events() = 0;
  // Why this node is not let into the cluster; empty: it is, or nobody said.
  virtual std::string join_problem() const = 0;
  // How long the registry has not answered; zero while it does.
  virtual absl::Duration RegistrySilence() const = 0;
};

}  // namespace larder

#endif  // LARDER_TOOLS_CLUSTER_MEMBER_H_
