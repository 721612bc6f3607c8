#ifndef LARDER_TESTS_STORE_CLUSTER_CLUSTER_RIG_H_
#define LARDER_TESTS_STORE_CLUSTER_CLUSTER_RIG_H_

#include <algorithm>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

#include "store/cluster/peer_calls.h"
#include "store/cluster/rendezvous.h"
#include "tests/testing/manual_clock.h"
#include "tests/testing/manual_executor.h"

namespace larder {

inline Node TestNode(int number, uint64_t incarnation = 1,
                     bool draining = false) {
  Node node;
  node.name = absl::StrCat("node", number);
  node.id = ComputeNodeId("test", node.name);
  node.incarnation = incarnation;
  node.draining = draining;
  return node;
}

inline std::shared_ptr<const ClusterView> ViewOf(std::vector<Node> nodes) {
  auto view = std::make_shared<ClusterView>();
  std::sort(nodes.begin(), nodes.end(),
            [](const Node& a, const Node& b) { return a.id < b.id; });
  view->nodes = std::move(nodes);
  view->current = true;
  return view;
}

inline std::shared_ptr<const Rendezvous> RendezvousOf(
    std::vector<Node> nodes, const Rendezvous* before = nullptr) {
  return std::make_shared<Rendezvous>(ViewOf(std::move(nodes)), before);
}

inline ChunkFacts TestFacts(uint32_t pages = 1) {
  ChunkFacts facts;
  facts.groups = 1;
  facts.pages = pages;
  facts.tokens = 256;
  return facts;
}

// Calls that wait for the test to answer them.
class HeldCalls final : public PeerCalls {
 public:
  struct Waiting {
    NodeId to{};
    std::string message;
    absl::Time deadline;
    Replied replied;
    void Answer(StatusOr<std::string> answer) {
      std::move(replied)(std::move(answer));
    }
  };
  void Call(NodeId node, std::string message, absl::Time deadline,
            Replied replied) override {
    waiting.push_back({node, std::move(message), deadline, std::move(replied)});
  }
  Waiting Take() {
    Waiting first = std::move(waiting.front());
    waiting.erase(waiting.begin());
    return first;
  }
  std::vector<Waiting> waiting;
};

}  // namespace larder

#endif  // LARDER_TESTS_STORE_CLUSTER_CLUSTER_RIG_H_
