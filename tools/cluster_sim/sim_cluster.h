#ifndef LARDER_TOOLS_CLUSTER_SIM_SIM_CLUSTER_H_
#define LARDER_TOOLS_CLUSTER_SIM_SIM_CLUSTER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/time/time.h"

#include "store/cluster/announcer.h"
#include "store/cluster/directory.h"
#include "store/cluster/locator.h"
#include "store/cluster/membership.h"
#include "store/cluster/peer_calls.h"
#include "store/cluster/rendezvous.h"
#include "store/cluster/replication.h"
#include "tools/cluster_sim/sim_loop.h"

namespace larder::cluster_sim {

struct SimOptions {
  uint64_t seed = 1;
  absl::Duration latency = absl::Microseconds(100);  // one way
  double loss = 0;  // of messages, questions and answers alike
  // After a crash the view changes when the lease ends; every node learns of a
  // view within `view_spread`, one after the other.
  absl::Duration lease = absl::Seconds(10);
  absl::Duration view_spread = absl::Seconds(1);
  double link_bytes_per_second = 1e9;  // into a node, of copies
  DirectoryOptions directory;
  AnnouncerOptions announcer;
  LocatorOptions locator;
  ReplicationOptions replication;
};

// Nodes with the parts of store/cluster as they are, over a simulated registry,
// network and store (a set of chunks, all durable). Not thread-safe.
class SimCluster {
 public:
  explicit SimCluster(const SimOptions& options);
  ~SimCluster();
  SimCluster(const SimCluster&) = delete;
  SimCluster& operator=(const SimCluster&) = delete;

  SimLoop& loop() { return loop_; }

  // They are members when the next view is there: at once if they are the
  // first.
  void Start(size_t nodes);
  size_t Join();
  // Its memory is gone, its chunks come back with Restart. The view changes at
  // the end of the lease if it was not restarted before.
  void Crash(const std::vector<size_t>& nodes);
  void Restart(size_t node);
  void Drain(size_t node);
  // Says goodbye; what it had is gone with it.
  void Leave(size_t node);
  // Whether it drains and has nothing left to do.
  bool Drained(size_t node) const;
  // It can neither call nor be called; it keeps its membership.
  void SetReachable(size_t node, bool reachable);
  void SetLoss(double loss) { options_.loss = loss; }

  // Chunk `number` of the simulation is saved at a node; its anchor is chunk
  // `anchor`.
  void Save(size_t node, uint64_t anchor, uint64_t number,
            const ChunkFacts& facts);
  void Evict(size_t node, uint64_t number);

  static ChunkId IdOf(uint64_t number);
  static const Scope& TheScope();
  static ChunkKey KeyOf(uint64_t number) {
    return ComputeChunkKey(TheScope(), IdOf(number));
  }
  static AnchorKey AnchorOf(uint64_t number) {
    return ComputeAnchorKey(TheScope(), IdOf(number));
  }

  bool Up(size_t node) const { return nodes_[node]->up; }
  size_t size() const { return nodes_.size(); }
  size_t Random(size_t below) { return random_() % below; }
  size_t RandomUp();
  NodeId Id(size_t node) const { return nodes_[node]->self.id; }
  bool Has(size_t node, ChunkKey key) const {
    return nodes_[node]->chunks.contains(key);
  }
  // Nodes that have it, up or not.
  std::vector<size_t> Holders(ChunkKey key) const {
    const auto it = holders_.find(key);
    return it == holders_.end() ? std::vector<size_t>() : it->second;
  }
  const Rendezvous& rendezvous() const { return *rendezvous_; }
  size_t IndexOf(NodeId id) const { return index_.at(id); }

  Locator& locator(size_t node) { return *nodes_[node]->locator; }
  Directory& directory(size_t node) { return *nodes_[node]->directory; }
  Announcer& announcer(size_t node) { return *nodes_[node]->announcer; }
  Replication& replication(size_t node) { return *nodes_[node]->replication; }

  struct Stats {
    uint64_t calls = 0;
    uint64_t call_bytes = 0;  // questions and answers
    uint64_t copies = 0;
    double copied_bytes = 0;
    uint64_t needless_copies = 0;
  };
  const Stats& stats() const { return stats_; }

 private:
  struct Held {
    AnchorKey anchor{};
    ChunkFacts facts;
  };
  class Calls;
  class Copier;
  struct SimNode {
    Node self;
    bool up = false;
    bool reachable = true;
    bool member = false;
    absl::Time view_at;  // when it learns of the last view that was sent to it
    absl::Time receives_until;
    absl::flat_hash_map<ChunkKey, Held> chunks;
    std::unique_ptr<Calls> calls;
    std::unique_ptr<Copier> copier;
    std::unique_ptr<Directory> directory;
    std::unique_ptr<Announcer> announcer;
    std::unique_ptr<Replication> replication;
    std::unique_ptr<Locator> locator;
  };

  size_t Add();
  void Put(size_t node, ChunkKey key, const Held& held);
  void Boot(size_t node);
  void Halt(size_t node);
  void PublishView();
  void Deliver(size_t node, std::shared_ptr<const Rendezvous> rendezvous);
  void Call(size_t from, NodeId to, std::string message, absl::Time deadline,
            PeerCalls::Replied replied);
  void Copy(size_t from, ChunkKey chunk, NodeId to, Replicator::Done done);
  bool Lost() {
    return options_.loss > 0 &&
           std::uniform_real_distribution<>(0, 1)(random_) < options_.loss;
  }
  absl::Duration Latency() {
    return options_.latency *
           std::uniform_real_distribution<>(0.5, 1.5)(random_);
  }

  SimOptions options_;
  SimLoop loop_;
  std::mt19937_64 random_;
  std::vector<std::unique_ptr<SimNode>> nodes_;
  absl::flat_hash_map<NodeId, size_t> index_;
  std::shared_ptr<const Rendezvous> rendezvous_;
  uint64_t revision_ = 0;
  absl::flat_hash_map<ChunkKey, std::vector<size_t>> holders_;
  Stats stats_;
};

}  // namespace larder::cluster_sim

#endif  // LARDER_TOOLS_CLUSTER_SIM_SIM_CLUSTER_H_
