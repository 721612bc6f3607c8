// Three nodes in one process on real threads: every public call at once, under
// ThreadSanitizer, and then that everything is where it should be.

#include <atomic>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "store/cluster/locator.h"
#include "store/cluster/replication.h"
#include "tests/store/cluster/cluster_rig.h"

namespace larder {
namespace {

constexpr int kNodes = 3;

class ClusterThreadTest : public ::testing::Test {
 protected:
  // Another node's directory, on a thread of the pool; some calls fail.
  class Calls final : public PeerCalls {
   public:
    Calls(ClusterThreadTest& test, int self) : test_(test), self_(self) {}
    void Call(NodeId node, std::string message, absl::Time,
              Replied replied) override {
      test_.pool_->Post([this, node, message = std::move(message),
                         replied = std::move(replied)]() mutable {
        if (test_.failing_ && ++test_.calls_ % 7 == 0) {
          std::move(replied)(absl::UnavailableError("lost"));
          return;
        }
        std::move(replied)(
            test_.directories_.at(node)->Handle(TestNode(self_).id, message));
      });
    }

   private:
    ClusterThreadTest& test_;
    const int self_;
  };
  class Copier final : public Replicator {
   public:
    explicit Copier(ClusterThreadTest& test) : test_(test) {}
    void Copy(ChunkKey chunk, NodeId to, Done done) override {
      test_.pool_->Post([this, chunk, to, done = std::move(done)]() mutable {
        {
          absl::MutexLock lock(&mu_);
          if (ended_) return;
          test_.nodes_.at(to)->announcer->Stored(AnchorKey{Raw(chunk)}, chunk,
                                                 Facts());
        }
        std::move(done)(absl::OkStatus());
      });
    }
    bool MayHave(ChunkKey, NodeId) const override { return true; }
    // From now on it looks at no announcer.
    void End() {
      absl::MutexLock lock(&mu_);
      ended_ = true;
    }

   private:
    ClusterThreadTest& test_;
    absl::Mutex mu_;
    bool ended_ = false;
  };
  struct Parts {
    std::unique_ptr<Calls> calls;
    std::unique_ptr<Announcer> announcer;
    std::unique_ptr<Replication> replication;
    std::unique_ptr<Locator> locator;
  };

  static ChunkFacts Facts() {
    ChunkFacts facts = TestFacts();
    facts.copies = 2;
    return facts;
  }

  ClusterThreadTest() : pool_(NewThreadPool("cluster", 3)), copier_(*this) {
    AnnouncerOptions announcer;
    announcer.retry = absl::Milliseconds(2);
    ReplicationOptions replication;
    replication.settle = absl::Milliseconds(1);
    LocatorOptions locator;
    locator.suspect_for = locator.absent_for = locator.held_for =
        absl::Milliseconds(1);
    for (int i = 0; i < kNodes; ++i) {
      directories_[TestNode(i).id] =
          std::make_unique<Directory>(Clock::Real(), DirectoryOptions{}, 7);
    }
    for (int i = 0; i < kNodes; ++i) {
      auto node = std::make_unique<Parts>();
      Directory* const own = directories_[TestNode(i).id].get();
      node->calls = std::make_unique<Calls>(*this, i);
      node->announcer = std::make_unique<Announcer>(
          Announcer::Parts{TestNode(i), node->calls.get(), &Clock::Real(),
                           pool_.get(), own},
          announcer);
      node->replication = std::make_unique<Replication>(
          Replication::Parts{TestNode(i).id, node->announcer.get(), &copier_,
                             &Clock::Real(), pool_.get()},
          replication);
      node->locator = std::make_unique<Locator>(
          Locator::Parts{TestNode(i).id, node->calls.get(), &Clock::Real(),
                         pool_.get(), own},
          locator);
      nodes_[TestNode(i).id] = std::move(node);
    }
  }
  ~ClusterThreadTest() override {
    // While things are under way.
    for (auto& [id, node] : nodes_) {
      node->locator.reset();
      node->replication.reset();
    }
    copier_.End();
    for (auto& [id, node] : nodes_) node->announcer.reset();
    pool_.reset();
  }

  void SetView(bool all) {
    std::vector<Node> members;
    for (int i = all ? 0 : 1; i < kNodes; ++i) members.push_back(TestNode(i));
    const auto rendezvous = RendezvousOf(members, rendezvous_.get());
    rendezvous_ = rendezvous;
    for (auto& [id, directory] : directories_) directory->SetView(rendezvous);
    for (auto& [id, node] : nodes_) {
      node->locator->SetView(rendezvous);
      node->announcer->SetView(rendezvous);
    }
  }

  std::atomic<uint64_t> calls_{0};
  std::atomic<bool> failing_{true};
  std::unique_ptr<Executor> pool_;
  Copier copier_;
  std::map<NodeId, std::unique_ptr<Directory>> directories_;
  std::map<NodeId, std::unique_ptr<Parts>> nodes_;
  std::shared_ptr<const Rendezvous> rendezvous_;
};

TEST_F(ClusterThreadTest, EverythingAtOnce) {
  SetView(true);
  constexpr int kThreads = 3, kSteps = 300;
  std::atomic<int> asked{0}, answered{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([this, t, &asked, &answered] {
      Parts& node = *nodes_.at(TestNode(t).id);
      for (int step = 0; step < kSteps; ++step) {
        const ChunkKey key{static_cast<uint64_t>(step % 50 + 1)};
        node.announcer->Stored(AnchorKey{Raw(key)}, key, Facts());
        if (step % 3 == 0) node.announcer->Removed(key);
        std::vector<ChunkId> ids(10);
        for (size_t i = 0; i < ids.size(); ++i) {
          ids[i].bytes[0] = static_cast<uint8_t>(i + static_cast<size_t>(t));
        }
        ++asked;
        node.locator->Locate({}, ids, 0, absl::InfiniteFuture(),
                             [&answered](const std::vector<Location>& all) {
                               EXPECT_EQ(all.size(), 10);
                               ++answered;
                             });
        node.locator->Find({}, ids, 0);
        node.locator->Forget(key, TestNode(1).id);
        node.announcer->GetStats();
        node.replication->GetStats();
        node.replication->SetDraining(step % 2 == 0);
        directories_.at(TestNode(t).id)->GetStats();
      }
    });
  }
  for (int i = 0; i < 20; ++i) SetView(i % 2 == 1);
  for (std::thread& thread : threads) thread.join();
  failing_ = false;

  // All questions end, everything is told; a watchdog ends the test if not.
  const auto quiet = [this] {
    for (auto& [id, node] : nodes_) {
      if (!node->announcer->Quiet() || !node->replication->Quiet()) {
        return false;
      }
    }
    return true;
  };
  while (answered < asked || !quiet()) std::this_thread::yield();
  uint64_t held = 0, told = 0;
  for (auto& [id, node] : nodes_) held += node->announcer->GetStats().chunks;
  for (auto& [id, directory] : directories_) {
    told += directory->GetStats().entries;
  }
  EXPECT_GT(held, 0);
  EXPECT_GE(told, held);
}

TEST_F(ClusterThreadTest, EndsInTheMiddleOfThings) {
  SetView(true);
  for (uint64_t chunk = 1; chunk <= 2000; ++chunk) {
    nodes_.at(TestNode(chunk % kNodes).id)
        ->announcer->Stored(AnchorKey{chunk}, ChunkKey{chunk}, Facts());
  }
}

}  // namespace
}  // namespace larder
