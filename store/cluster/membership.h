#ifndef LARDER_STORE_CLUSTER_MEMBERSHIP_H_
#define LARDER_STORE_CLUSTER_MEMBERSHIP_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/functional/any_invocable.h"

#include "store/status.h"

namespace larder {

// A node of a cluster: a daemon by its name, which it keeps over restarts, so
// that what is known of its durable chunks stays true.
enum class NodeId : uint64_t {};

// Of a name within a cluster: Fingerprint64 of both.
NodeId ComputeNodeId(std::string_view cluster, std::string_view name);

struct Node {
  NodeId id{};
  std::string name;     // unique in the cluster
  std::string address;  // where peers connect, as Transport::Connect takes it
  // Which of its lives: a node that was started again is another peer with the
  // same chunks on disk.
  uint64_t incarnation = 0;
  // About to leave: gives chunks, takes none, and is nobody's home.
  bool draining = false;

  bool operator==(const Node&) const = default;
};

struct ClusterView {
  std::vector<Node> nodes;  // alive, this one too; ascending by id
  uint64_t revision = 0;    // grows with every change
  // The registry answers. If not, `nodes` are those it knew last: who is gone
  // meanwhile is found out by asking him.
  bool current = false;

  // nullptr if it is not among them.
  const Node* Find(NodeId id) const;
};

// Who belongs to the cluster, by a registry that all can reach (etcd). Nothing
// here elects anybody. Thread-safe.
class Membership {
 public:
  using Changed = absl::AnyInvocable<void(std::shared_ptr<const ClusterView>)>;
  using Done = absl::AnyInvocable<void(Status) &&>;

  // Leaves without a word, as a crash would: the others learn of it when the
  // lease of this node ends.
  virtual ~Membership() = default;

  // Enters `self` under a lease, kept alive until Leave or destruction, and
  // entered again by itself whenever it was lost. `changed` is called with
  // every new view from then on, in order, on a thread of the membership, none
  // of its locks held; it must not block. `done`: OK once entered;
  // AlreadyExists if a node of that name, another incarnation, is alive, for
  // longer than its lease; PermissionDenied; Unavailable if the registry does
  // not answer. Once; what failed is tried again behind it.
  virtual void Join(Node self, Changed changed, Done done) = 0;

  // This node's entry becomes `self` (draining, address). Same id.
  virtual void Update(Node self, Done done) = 0;

  // Takes the entry away. The others learn of it at once.
  virtual void Leave(Done done) = 0;

  // The newest; before the first answer one without nodes. Never null.
  virtual std::shared_ptr<const ClusterView> View() const = 0;
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_MEMBERSHIP_H_
