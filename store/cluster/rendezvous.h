#ifndef LARDER_STORE_CLUSTER_RENDEZVOUS_H_
#define LARDER_STORE_CLUSTER_RENDEZVOUS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/container/inlined_vector.h"

#include "store/cluster/chunk_key.h"
#include "store/cluster/membership.h"

namespace larder {

// Nodes by rank: the first is the home, then who takes over from it.
using Homes = absl::InlinedVector<NodeId, kHomesMax>;

// Which nodes are the homes of an anchor: those with the highest random weights
// (Thaler & Ravishankar, "Using name-based mappings to increase hit rates",
// 1998) among the live nodes of a view that do not drain. Everybody with the
// same view finds the same, and a node that enters or leaves changes nothing
// but what it is among the homes of. Immutable; one is made for each view and
// shared by all who use it.
class Rendezvous {
 public:
  // `before`: that of the view before, if there was one.
  explicit Rendezvous(std::shared_ptr<const ClusterView> view,
                      const Rendezvous* before = nullptr);

  // The first `count` homes, fewer if there are not so many nodes. O(nodes):
  // about a nanosecond for each.
  Homes Find(AnchorKey anchor, size_t count) const;

  // Whether the first `count` homes may be others than `homes`, or in another
  // life, which were found with the Rendezvous of digest before(). O(changed
  // nodes).
  bool Moved(AnchorKey anchor, const Homes& homes, size_t count) const;
  // Not a home any more since before(), or in another life: what it was told
  // is gone.
  bool Left(NodeId node) const;

  static uint64_t Weight(AnchorKey anchor, NodeId node);

  const ClusterView& view() const { return *view_; }
  // Of all that can be homes, in which lives: equal for two who agree about
  // every anchor. Never 0.
  uint64_t digest() const { return digest_; }
  // 0 if there was none.
  uint64_t before() const { return before_; }

 private:
  const std::shared_ptr<const ClusterView> view_;
  std::vector<NodeId> nodes_;  // ascending
  uint64_t digest_ = 1;
  uint64_t before_ = 0;
  std::vector<NodeId> entered_, left_;  // since before_, ascending
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_RENDEZVOUS_H_
