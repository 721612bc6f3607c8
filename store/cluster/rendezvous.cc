#include "store/cluster/rendezvous.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace larder {

Rendezvous::Rendezvous(std::shared_ptr<const ClusterView> view,
                       const Rendezvous* before)
    : view_(std::move(view)) {
  for (const Node& node : view_->nodes) {
    if (node.draining) continue;
    nodes_.push_back(node.id);
    digest_ += Weight(AnchorKey{node.incarnation}, node.id);
  }
  if (digest_ == 0) digest_ = 1;
  if (before == nullptr) return;
  before_ = before->digest_;
  using Lives = std::vector<std::pair<NodeId, uint64_t>>;
  const auto lives = [](const ClusterView& nodes) {
    Lives all;
    for (const Node& node : nodes.nodes) {
      if (!node.draining) all.emplace_back(node.id, node.incarnation);
    }
    return all;
  };
  const auto missing = [](const Lives& from, const Lives& in) {
    Lives differing;
    std::set_difference(from.begin(), from.end(), in.begin(), in.end(),
                        std::back_inserter(differing));
    std::vector<NodeId> nodes;
    for (const auto& [node, incarnation] : differing) nodes.push_back(node);
    return nodes;
  };
  const Lives then = lives(*before->view_), now = lives(*view_);
  entered_ = missing(now, then);
  left_ = missing(then, now);
}

// The finalizer of SplitMix64. Both are hashes already, and a node's is turned
// by a constant so that no key cancels it.
uint64_t Rendezvous::Weight(AnchorKey anchor, NodeId node) {
  uint64_t x = Raw(anchor) ^ (Raw(node) * 0x9e3779b97f4a7c15);
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

Homes Rendezvous::Find(AnchorKey anchor, size_t count) const {
  absl::InlinedVector<std::pair<uint64_t, NodeId>, kHomesMax + 1> best;
  if (count == 0) return {};
  uint64_t least = 0;  // what it takes, once there are `count`
  for (const NodeId node : nodes_) {
    const uint64_t weight = Weight(anchor, node);
    if (best.size() == count) {
      if (weight <= least) continue;
      best.pop_back();
    }
    const std::pair<uint64_t, NodeId> entry(weight, node);
    const auto at = std::find_if(best.begin(), best.end(), [&](const auto& b) {
      return b.first < weight;
    });
    best.insert(at, entry);
    least = best.back().first;
  }
  Homes homes;
  for (const auto& [weight, node] : best) homes.push_back(node);
  return homes;
}

bool Rendezvous::Moved(AnchorKey anchor, const Homes& homes,
                       size_t count) const {
  for (const NodeId home : homes) {
    if (Left(home)) return true;
  }
  if (entered_.empty()) return false;
  if (homes.size() < count) return true;
  const uint64_t least = Weight(anchor, homes[count - 1]);
  return std::any_of(entered_.begin(), entered_.end(),
                     [&](NodeId node) { return Weight(anchor, node) > least; });
}

bool Rendezvous::Left(NodeId node) const {
  return std::binary_search(left_.begin(), left_.end(), node);
}

}  // namespace larder
