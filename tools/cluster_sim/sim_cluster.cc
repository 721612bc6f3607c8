#include "tools/cluster_sim/sim_cluster.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"

#include "store/fingerprint.h"

namespace larder::cluster_sim {

class SimCluster::Calls final : public PeerCalls {
 public:
  Calls(SimCluster& cluster, size_t self) : cluster_(cluster), self_(self) {}
  void Call(NodeId node, std::string message, absl::Time deadline,
            Replied replied) override {
    cluster_.Call(self_, node, std::move(message), deadline,
                  std::move(replied));
  }

 private:
  SimCluster& cluster_;
  const size_t self_;
};

class SimCluster::Copier final : public Replicator {
 public:
  Copier(SimCluster& cluster, size_t self) : cluster_(cluster), self_(self) {}
  void Copy(ChunkKey chunk, NodeId to, Done done) override {
    cluster_.Copy(self_, chunk, to, std::move(done));
  }
  bool MayHave(ChunkKey, NodeId) const override { return true; }

 private:
  SimCluster& cluster_;
  const size_t self_;
};

SimCluster::SimCluster(const SimOptions& options)
    : options_(options), random_(options.seed) {}

SimCluster::~SimCluster() {
  for (size_t i = 0; i < nodes_.size(); ++i) Halt(i);
  loop_.Clear();
}

const Scope& SimCluster::TheScope() {
  static const Scope scope{0x5ca1ab1e, {}};
  return scope;
}

ChunkId SimCluster::IdOf(uint64_t number) {
  ChunkId id;
  for (size_t word = 0; word < 4; ++word) {
    const uint64_t bits =
        Fingerprint64(std::as_bytes(std::span(&number, 1)), word);
    std::memcpy(id.bytes.data() + 8 * word, &bits, sizeof bits);
  }
  return id;
}

void SimCluster::Start(size_t nodes) {
  for (size_t i = 0; i < nodes; ++i) {
    const size_t node = Add();
    nodes_[node]->member = true;
    Boot(node);
  }
  PublishView();
}

size_t SimCluster::Join() {
  const size_t node = Add();
  nodes_[node]->member = true;
  Boot(node);
  PublishView();
  return node;
}

size_t SimCluster::Add() {
  const size_t index = nodes_.size();
  auto node = std::make_unique<SimNode>();
  node->self.name = absl::StrCat("node", index);
  node->self.id = ComputeNodeId("simulated", node->self.name);
  index_[node->self.id] = index;
  nodes_.push_back(std::move(node));
  return index;
}

void SimCluster::Boot(size_t index) {
  SimNode& node = *nodes_[index];
  node.up = true;
  node.receives_until = loop_.Now();
  ++node.self.incarnation;
  node.self.draining = false;
  node.calls = std::make_unique<Calls>(*this, index);
  node.copier = std::make_unique<Copier>(*this, index);
  node.directory =
      std::make_unique<Directory>(loop_, options_.directory, random_());
  node.announcer = std::make_unique<Announcer>(
      Announcer::Parts{node.self, node.calls.get(), &loop_, &loop_,
                       node.directory.get()},
      options_.announcer);
  node.replication = std::make_unique<Replication>(
      Replication::Parts{node.self.id, node.announcer.get(), node.copier.get(),
                         &loop_, &loop_},
      options_.replication);
  node.locator = std::make_unique<Locator>(
      Locator::Parts{node.self.id, node.calls.get(), &loop_, &loop_,
                     node.directory.get()},
      options_.locator);
  for (const auto& [key, held] : node.chunks) {
    node.announcer->Stored(held.anchor, key, held.facts);
  }
}

void SimCluster::Halt(size_t index) {
  SimNode& node = *nodes_[index];
  node.up = false;
  node.locator.reset();
  node.replication.reset();
  node.announcer.reset();
  node.directory.reset();
}

void SimCluster::Crash(const std::vector<size_t>& nodes) {
  std::vector<std::pair<size_t, uint64_t>> lives;
  for (const size_t node : nodes) {
    lives.emplace_back(node, nodes_[node]->self.incarnation);
    Halt(node);
  }
  loop_.PostAt(loop_.Now() + options_.lease, [this, lives] {
    bool changed = false;
    for (const auto& [node, life] : lives) {
      if (nodes_[node]->self.incarnation != life) continue;
      nodes_[node]->member = false;
      changed = true;
    }
    if (changed) PublishView();
  });
}

void SimCluster::Restart(size_t node) {
  nodes_[node]->member = true;
  Boot(node);
  PublishView();
}

void SimCluster::Drain(size_t node) {
  nodes_[node]->self.draining = true;
  nodes_[node]->replication->SetDraining(true);
  PublishView();
}

void SimCluster::Leave(size_t node) {
  Halt(node);
  nodes_[node]->member = false;
  for (const auto& [key, held] : nodes_[node]->chunks) {
    std::erase(holders_[key], node);
  }
  nodes_[node]->chunks.clear();
  PublishView();
}

bool SimCluster::Drained(size_t node) const {
  return nodes_[node]->self.draining && nodes_[node]->announcer->Quiet() &&
         nodes_[node]->replication->Quiet();
}

void SimCluster::SetReachable(size_t node, bool reachable) {
  nodes_[node]->reachable = reachable;
}

void SimCluster::PublishView() {
  auto view = std::make_shared<ClusterView>();
  for (const auto& node : nodes_) {
    if (node->member) view->nodes.push_back(node->self);
  }
  std::sort(view->nodes.begin(), view->nodes.end(),
            [](const Node& a, const Node& b) { return a.id < b.id; });
  view->revision = ++revision_;
  view->current = true;
  const bool first = rendezvous_ == nullptr;
  rendezvous_ =
      std::make_shared<Rendezvous>(std::move(view), rendezvous_.get());
  for (size_t i = 0; i < nodes_.size(); ++i) {
    SimNode& node = *nodes_[i];
    if (!node.up) continue;
    if (first) {
      Deliver(i, rendezvous_);
      continue;
    }
    node.view_at = std::max(
        node.view_at,
        loop_.Now() + options_.view_spread *
                          std::uniform_real_distribution<>(0, 1)(random_));
    loop_.PostAt(node.view_at, [this, i, life = node.self.incarnation,
                                rendezvous = rendezvous_] {
      if (nodes_[i]->up && nodes_[i]->self.incarnation == life) {
        Deliver(i, rendezvous);
      }
    });
  }
}

void SimCluster::Deliver(size_t index,
                         std::shared_ptr<const Rendezvous> rendezvous) {
  SimNode& node = *nodes_[index];
  node.directory->SetView(rendezvous);
  node.locator->SetView(rendezvous);
  node.announcer->SetView(std::move(rendezvous));
}

void SimCluster::Call(size_t from, NodeId to, std::string message,
                      absl::Time deadline, PeerCalls::Replied replied) {
  ++stats_.calls;
  stats_.call_bytes += message.size();
  const auto reply = std::make_shared<PeerCalls::Replied>(std::move(replied));
  const auto it = index_.find(to);
  const size_t there = it == index_.end() ? SIZE_MAX : it->second;
  const bool lost = Lost();
  const auto life = nodes_[from]->self.incarnation;
  if (lost || there == SIZE_MAX || !nodes_[from]->reachable) {
    loop_.PostAt(deadline, [reply] {
      std::move (*reply)(absl::DeadlineExceededError("no answer"));
    });
    return;
  }
  loop_.PostAt(loop_.Now() + Latency(), [this, from, there, life, deadline,
                                         reply, message = std::move(message)] {
    SimNode& node = *nodes_[there];
    StatusOr<std::string> answer = absl::UnavailableError("down");
    if (node.up && node.reachable) {
      answer = node.directory->Handle(nodes_[from]->self.id, message);
      if (answer.ok()) stats_.call_bytes += answer->size();
    }
    if (!node.reachable || Lost() || !nodes_[from]->up ||
        nodes_[from]->self.incarnation != life) {
      loop_.PostAt(deadline, [reply] {
        std::move (*reply)(absl::DeadlineExceededError("no answer"));
      });
      return;
    }
    loop_.PostAt(std::min(deadline, loop_.Now() + Latency()),
                 [reply, answer = std::move(answer)]() mutable {
                   std::move (*reply)(std::move(answer));
                 });
  });
}

void SimCluster::Copy(size_t from, ChunkKey chunk, NodeId to,
                      Replicator::Done done) {
  const auto said = std::make_shared<Replicator::Done>(std::move(done));
  const auto say = [this, said](absl::Time when, Status status) {
    loop_.PostAt(when, [said, status = std::move(status)] {
      std::move (*said)(status);
    });
  };
  const absl::Time soon = loop_.Now() + 2 * Latency();
  const auto held = nodes_[from]->chunks.find(chunk);
  if (held == nodes_[from]->chunks.end()) {
    say(soon, absl::NotFoundError("gone"));
    return;
  }
  const auto it = index_.find(to);
  if (it == index_.end() || !nodes_[it->second]->up || Lost() ||
      !nodes_[it->second]->reachable || !nodes_[from]->reachable) {
    say(soon + absl::Seconds(1), absl::UnavailableError("no way"));
    return;
  }
  SimNode& target = *nodes_[it->second];
  if (target.chunks.contains(chunk)) {
    ++stats_.needless_copies;
    say(soon, absl::AlreadyExistsError("has it"));
    return;
  }
  const double bytes =
      static_cast<double>(held->second.facts.pages) * kPageBytes;
  target.receives_until = std::max(target.receives_until, soon) +
                          absl::Seconds(bytes / options_.link_bytes_per_second);
  loop_.PostAt(target.receives_until,
               [this, said, chunk, there = it->second, bytes,
                held = held->second, life = target.self.incarnation] {
                 SimNode& node = *nodes_[there];
                 if (!node.up || node.self.incarnation != life) {
                   std::move (*said)(absl::UnavailableError("died"));
                   return;
                 }
                 ++stats_.copies;
                 stats_.copied_bytes += bytes;
                 Put(there, chunk, held);
                 std::move (*said)(absl::OkStatus());
               });
}

void SimCluster::Save(size_t node, uint64_t anchor, uint64_t number,
                      const ChunkFacts& facts) {
  Put(node, KeyOf(number), {AnchorOf(anchor), facts});
}

void SimCluster::Put(size_t node, ChunkKey key, const Held& held) {
  if (nodes_[node]->chunks.insert_or_assign(key, held).second) {
    holders_[key].push_back(node);
  }
  nodes_[node]->announcer->Stored(held.anchor, key, held.facts);
}

void SimCluster::Evict(size_t node, uint64_t number) {
  const ChunkKey key = KeyOf(number);
  if (nodes_[node]->chunks.erase(key) == 0) return;
  std::erase(holders_[key], node);
  nodes_[node]->announcer->Removed(key);
}

size_t SimCluster::RandomUp() {
  for (;;) {
    const size_t node = Random(nodes_.size());
    if (nodes_[node]->up && nodes_[node]->member) return node;
  }
}

}  // namespace larder::cluster_sim
