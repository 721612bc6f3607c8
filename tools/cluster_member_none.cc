#include "tools/cluster_member.h"

namespace larder {

StatusOr<std::unique_ptr<ClusterMember>> ClusterMember::Create(
    const DaemonConfig::Cluster&, const TenantDirectory&,
    std::function<void(const std::string&)>) {
  return absl::UnimplementedError(
      "cluster.etcd: this larderd was built without gRPC (LARDER_CORE_ONLY)");
}

}  // namespace larder
