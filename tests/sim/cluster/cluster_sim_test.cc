// store/cluster as it is, on a simulated network: what a user of 10,000 nodes
// is promised, at a size that a test can have, and what stays true whatever
// happens to nodes and messages.

#include <cstdint>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/testing/sanitized.h"
#include "tools/cluster_sim/scenarios.h"
#include "tools/cluster_sim/sim_cluster.h"

namespace larder::cluster_sim {
namespace {

Scale SmallScale() {
  Scale scale;
  scale.nodes = 40;
  scale.sampled = kSanitized ? 1200 : 4000;
  scale.chunks = 4e6;
  return scale;
}

TEST(ClusterSimTest, APromptAsksAtMostNineNodes) {
  const MatchResult result = SimulateMatch(100, 512, 20, 1);
  EXPECT_LE(result.messages_max, 8);
  EXPECT_LE(result.messages_unaligned_max, 9);
  EXPECT_GT(result.messages_mean, 4);
  EXPECT_EQ(result.wrong, 0);
}

TEST(ClusterSimTest, ADirectoryTakesLessThan64BytesPerCopy) {
  Scale scale = SmallScale();
  scale.chunks = 1e6;
  const DirectoryResult result = SimulateDirectory(scale);
  EXPECT_GE(result.entries, 3 * 25'000 * 0.95);
  EXPECT_LE(result.bytes, 64 * result.entries);
}

TEST(ClusterSimTest, ANodeThatComesOrGoesMovesItsShare) {
  const ChangeResult result = SimulateChanges(SmallScale(), 4);
  EXPECT_LE(result.join_share, 1.2);
  EXPECT_GE(result.join_share, 0.7);
  EXPECT_LE(result.leave_share, 1.2);
  EXPECT_GE(result.leave_share, 0.7);
}

TEST(ClusterSimTest, WhatIsLeftOfFailuresIsFoundAndRepaired) {
  const auto results = SimulateFailures(
      SmallScale(), {{"one", 1}, {"a rack", 4}, {"a third", 13}});
  ASSERT_EQ(results.size(), 3);
  for (const FailureResult& result : results) {
    SCOPED_TRACE(result.name);
    ASSERT_FALSE(result.points.empty());
    EXPECT_EQ(result.points.back().degraded, 0);
    EXPECT_GE(result.points.back().located, 0.999);
    EXPECT_LE(result.copied_share, 1.2);
    EXPECT_GT(result.repaired_after, 0);
  }
  // All three copies of a chunk, or two if its saver is one of its homes.
  EXPECT_EQ(results[0].lost, 0);
  EXPECT_LE(results[2].lost, 0.08);
  // Within some seconds of the view's change.
  EXPECT_LE(results[2].located_after, 15);
}

// Everything at once, then silence.
class ClusterModelTest : public ::testing::TestWithParam<uint64_t> {
 protected:
  static constexpr uint64_t kChunks = 400;

  ClusterModelTest() : cluster_(Options()) {
    cluster_.Start(12);
    for (uint64_t chunk = 0; chunk < kChunks; ++chunk) Save(chunk);
  }
  static SimOptions Options() {
    SimOptions options;
    options.seed = GetParam();
    options.loss = 0.1;
    return options;
  }

  // Anchors of up to eight chunks; half of them are to be copied.
  void Save(uint64_t chunk) {
    ChunkFacts facts;
    facts.pages = 1000;
    facts.tier = CopyTier::kDurable;
    facts.copies = chunk % 16 < 8 ? 2 : 0;
    cluster_.Save(cluster_.RandomUp(), chunk / 8 * 8, chunk, facts);
  }

  void Disturb() {
    const size_t node = cluster_.RandomUp();
    switch (cluster_.Random(10)) {
      case 0:
        if (UpCount() > 6) cluster_.Crash({node});
        break;
      case 1:
        for (size_t i = 0; i < cluster_.size(); ++i) {
          if (cluster_.Up(i)) continue;
          cluster_.Restart(i);
          break;
        }
        break;
      case 2:
        if (cluster_.size() < 20) cluster_.Join();
        break;
      case 3:
        cluster_.SetReachable(node, cluster_.Random(2) == 0);
        break;
      case 4:
      case 5: {
        const uint64_t chunk = cluster_.Random(kChunks);
        cluster_.Evict(node, chunk);
        break;
      }
      case 6:
        Save(cluster_.Random(kChunks));
        break;
      case 7: {
        // A prompt is asked for meanwhile.
        std::vector<ChunkId> ids;
        for (uint64_t i = 0; i < 60; ++i) ids.push_back(SimCluster::IdOf(i));
        const absl::Time deadline =
            cluster_.loop().Now() + absl::Milliseconds(30);
        ++asked_;
        cluster_.locator(node).Locate(
            SimCluster::TheScope(), ids, 0, deadline,
            [this, deadline](const std::vector<Location>& locations) {
              ++answered_;
              EXPECT_LE(cluster_.loop().Now(), deadline);
              EXPECT_EQ(locations.size(), 60);
            });
        break;
      }
      default:
        cluster_.loop().RunFor(
            absl::Milliseconds(static_cast<double>(cluster_.Random(4000))));
    }
  }
  size_t UpCount() const {
    size_t count = 0;
    for (size_t i = 0; i < cluster_.size(); ++i) count += cluster_.Up(i);
    return count;
  }
  std::vector<size_t> UpHolders(uint64_t chunk) {
    std::vector<size_t> up;
    for (const size_t node : cluster_.Holders(SimCluster::KeyOf(chunk))) {
      if (cluster_.Up(node)) up.push_back(node);
    }
    return up;
  }
  Location LocateFrom(size_t node, uint64_t chunk) {
    // The anchor of a chunk of the model is not its own first one.
    Location found;
    std::vector<ChunkId> ids(chunk % 8 + 1);
    for (uint64_t i = 0; i < ids.size(); ++i) {
      ids[i] = SimCluster::IdOf(chunk / 8 * 8 + i);
    }
    cluster_.locator(node).Locate(
        SimCluster::TheScope(), ids, chunk % 8,
        cluster_.loop().Now() + absl::Seconds(1),
        [&found](const std::vector<Location>& all) { found = all[0]; });
    cluster_.loop().RunFor(absl::Milliseconds(5));
    return found;
  }

  uint64_t asked_ = 0, answered_ = 0;
  SimCluster cluster_;
};

TEST_P(ClusterModelTest, AfterTheStormEverythingIsFoundAndCopied) {
  for (int step = 0; step < (kSanitized ? 600 : 2000); ++step) Disturb();
  cluster_.SetLoss(0);
  for (size_t i = 0; i < cluster_.size(); ++i) cluster_.SetReachable(i, true);
  // A lease may be ending, a call be lost, everything be told again once.
  cluster_.loop().RunFor(absl::Seconds(15) + absl::Minutes(2));

  uint64_t held = 0;
  for (uint64_t chunk = 0; chunk < kChunks; ++chunk) {
    const std::vector<size_t> holders = UpHolders(chunk);
    const size_t asker = cluster_.RandomUp();
    const std::set<size_t> there(holders.begin(), holders.end());
    const Location location = LocateFrom(asker, chunk);
    if (there.size() > there.count(asker)) {
      ASSERT_EQ(location.state, Location::State::kHeld) << chunk;
      ++held;
    }
  }
  EXPECT_GT(held, kChunks / 4);

  // What was told before and is not so any more expires; what is to be copied
  // has been.
  cluster_.loop().RunFor(absl::Minutes(6));
  uint64_t copied = 0;
  for (uint64_t chunk = 0; chunk < kChunks; ++chunk) {
    const std::vector<size_t> holders = UpHolders(chunk);
    std::set<NodeId> there;
    for (const size_t node : holders) there.insert(cluster_.Id(node));
    const size_t asker = cluster_.RandomUp();
    for (const Holder& holder : LocateFrom(asker, chunk).holders) {
      EXPECT_TRUE(there.contains(holder.node)) << chunk;
    }
    if (chunk % 16 >= 8 || holders.empty()) continue;
    for (const NodeId home :
         cluster_.rendezvous().Find(SimCluster::AnchorOf(chunk / 8 * 8), 2)) {
      EXPECT_TRUE(there.contains(home)) << chunk;
      ++copied;
    }
  }
  EXPECT_GT(copied, kChunks / 4);
  // Of those whose node lives no answer is missing.
  EXPECT_LE(answered_, asked_);
  EXPECT_GT(answered_, asked_ / 2);
}

INSTANTIATE_TEST_SUITE_P(Seeds, ClusterModelTest,
                         ::testing::Values(1, 2, 3, 4));

TEST(DrainTest, ANodeThatDrainsLeavesNothingBehind) {
  SimOptions options;
  options.announcer.refresh = absl::Hours(1);  // draining asks by itself
  options.directory.ttl = absl::Hours(3);
  SimCluster cluster(options);
  cluster.Start(8);
  ChunkFacts facts;
  facts.pages = 1000;
  facts.tier = CopyTier::kMemory;
  for (uint64_t chunk = 0; chunk < 500; ++chunk) {
    cluster.Save(chunk % 8, chunk / 4 * 4, chunk, facts);
  }
  cluster.loop().RunFor(absl::Seconds(5));
  EXPECT_EQ(cluster.stats().copies, 0);
  cluster.Drain(3);
  absl::Duration took;
  for (; took < absl::Minutes(5); took += absl::Seconds(1)) {
    cluster.loop().RunFor(absl::Seconds(1));
    if (took > absl::Seconds(2) && cluster.Drained(3)) break;
  }
  EXPECT_LT(took, absl::Seconds(30));
  cluster.Leave(3);
  cluster.loop().RunFor(absl::Seconds(5));
  for (uint64_t chunk = 0; chunk < 500; ++chunk) {
    EXPECT_FALSE(cluster.Holders(SimCluster::KeyOf(chunk)).empty()) << chunk;
  }
  // Nothing else moved.
  EXPECT_EQ(cluster.stats().copies, 63);
}

TEST(RestartTest, ANodeThatReturnsBringsWhatItHas) {
  SimOptions options;
  options.announcer.refresh = absl::Hours(1);
  options.directory.ttl = absl::Hours(3);
  SimCluster cluster(options);
  cluster.Start(5);
  ChunkFacts facts;
  facts.tier = CopyTier::kDurable;
  for (uint64_t chunk = 0; chunk < 100; ++chunk) {
    cluster.Save(2, chunk, chunk, facts);
  }
  cluster.loop().RunFor(absl::Seconds(1));
  const auto found = [&] {
    int count = 0;
    for (uint64_t chunk = 0; chunk < 100; ++chunk) {
      const ChunkId id = SimCluster::IdOf(chunk);
      cluster.locator(1).Locate(
          SimCluster::TheScope(), {&id, 1}, 0, absl::InfiniteFuture(),
          [&](const std::vector<Location>& locations) {
            count += locations[0].state == Location::State::kHeld ? 1 : 0;
          });
    }
    cluster.loop().RunFor(absl::Seconds(2));
    return count;
  };
  EXPECT_EQ(found(), 100);
  cluster.Crash({2});
  cluster.loop().RunFor(absl::Seconds(30));
  EXPECT_EQ(found(), 0);
  cluster.Restart(2);
  cluster.loop().RunFor(absl::Seconds(5));
  EXPECT_EQ(found(), 100);
  // Another's directory is lost: who has something tells it again.
  cluster.Crash({4});
  cluster.loop().RunFor(absl::Seconds(1));
  cluster.Restart(4);
  cluster.loop().RunFor(absl::Seconds(15));
  EXPECT_EQ(found(), 100);
}

}  // namespace
}  // namespace larder::cluster_sim
