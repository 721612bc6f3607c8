#include "store/cluster/membership.h"

#include <algorithm>
#include <span>

#include "store/fingerprint.h"

namespace larder {

NodeId ComputeNodeId(std::string_view cluster, std::string_view name) {
  const std::string both = std::string(cluster) + '\0' + std::string(name);
  return NodeId{Fingerprint64(std::as_bytes(std::span(both)))};
}

const Node* ClusterView::Find(NodeId id) const {
  const auto at = std::lower_bound(
      nodes.begin(), nodes.end(), id,
      [](const Node& node, NodeId wanted) { return node.id < wanted; });
  return at != nodes.end() && at->id == id ? &*at : nullptr;
}

}  // namespace larder
