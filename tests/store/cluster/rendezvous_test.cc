#include "store/cluster/rendezvous.h"

#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/store/cluster/cluster_rig.h"

namespace larder {
namespace {

using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::Not;
using ::testing::SizeIs;

std::vector<Node> Nodes(int count) {
  std::vector<Node> nodes;
  for (int i = 0; i < count; ++i) nodes.push_back(TestNode(i));
  return nodes;
}

TEST(RendezvousTest, HomesAreTheHeaviestInOrder) {
  const auto nodes = Nodes(20);
  const Rendezvous rendezvous(ViewOf(nodes));
  for (uint64_t a = 1; a < 200; ++a) {
    const AnchorKey anchor{a * 0x1234567};
    auto sorted = nodes;
    std::sort(sorted.begin(), sorted.end(), [&](const Node& x, const Node& y) {
      return Rendezvous::Weight(anchor, x.id) >
             Rendezvous::Weight(anchor, y.id);
    });
    EXPECT_THAT(rendezvous.Find(anchor, 3),
                ElementsAre(sorted[0].id, sorted[1].id, sorted[2].id));
  }
}

TEST(RendezvousTest, FewerNodesThanAskedForAreAllHomes) {
  EXPECT_THAT(Rendezvous(ViewOf(Nodes(2))).Find(AnchorKey{7}, 4), SizeIs(2));
  EXPECT_THAT(Rendezvous(ViewOf({})).Find(AnchorKey{7}, 4), IsEmpty());
  EXPECT_THAT(Rendezvous(ViewOf(Nodes(2))).Find(AnchorKey{7}, 0), IsEmpty());
}

TEST(RendezvousTest, DrainingNodesAreNobodysHome) {
  auto nodes = Nodes(5);
  nodes[2].draining = true;
  const Rendezvous rendezvous(ViewOf(nodes));
  for (uint64_t a = 1; a < 500; ++a) {
    EXPECT_THAT(rendezvous.Find(AnchorKey{a}, 4), Not(Contains(nodes[2].id)));
  }
}

TEST(RendezvousTest, SharesAreEven) {
  constexpr int kNodes = 50, kAnchors = 50'000;
  const Rendezvous rendezvous(ViewOf(Nodes(kNodes)));
  std::map<NodeId, int> first, second;
  for (uint64_t a = 1; a <= kAnchors; ++a) {  // not even hashed
    const Homes homes = rendezvous.Find(AnchorKey{a}, 2);
    ++first[homes[0]];
    ++second[homes[1]];
  }
  // 1000 each: five standard deviations.
  for (const auto* shares : {&first, &second}) {
    ASSERT_THAT(*shares, SizeIs(kNodes));
    for (const auto& [node, share] : *shares) EXPECT_NEAR(share, 1000, 160);
  }
}

TEST(RendezvousTest, ANodeThatEntersTakesItsShareAndNothingElseMoves) {
  constexpr int kNodes = 40, kAnchors = 20'000;
  const auto nodes = Nodes(kNodes);
  const Rendezvous without(ViewOf({nodes.begin(), nodes.end() - 1}));
  const Rendezvous with(ViewOf(nodes), &without);
  int moved = 0;
  for (uint64_t a = 1; a <= kAnchors; ++a) {
    const Homes before = without.Find(AnchorKey{a}, 2);
    Homes after = with.Find(AnchorKey{a}, 2);
    if (before == after) continue;
    ++moved;
    ASSERT_THAT(after, Contains(nodes.back().id));
    after.erase(std::find(after.begin(), after.end(), nodes.back().id));
    EXPECT_EQ(after[0], before[0]);
  }
  EXPECT_LE(moved, 1.2 * 2 * kAnchors / kNodes);
  EXPECT_GE(moved, 0.8 * 2 * kAnchors / kNodes);
}

TEST(RendezvousTest, WhatDidNotMoveIsTheSame) {
  std::mt19937_64 random(3);
  std::vector<Node> nodes = Nodes(12);
  auto before = RendezvousOf(nodes);
  int unmoved = 0;
  for (int round = 0; round < 60; ++round) {
    Node& some = nodes[random() % nodes.size()];
    switch (random() % 4) {
      case 0:
        some.draining = !some.draining;
        break;
      case 1:
        ++some.incarnation;
        break;
      case 2:
        if (nodes.size() < 6) continue;
        nodes.erase(nodes.begin() + static_cast<long>(random() % nodes.size()));
        break;
      default:
        nodes.push_back(TestNode(100 + round));
    }
    const auto after = RendezvousOf(nodes, before.get());
    EXPECT_EQ(after->before(), before->digest());
    for (uint64_t a = 1; a < 300; ++a) {
      const AnchorKey anchor{a};
      const Homes homes = before->Find(anchor, 3);
      if (after->Moved(anchor, homes, 3)) continue;
      ++unmoved;
      ASSERT_EQ(after->Find(anchor, 3), homes);
      for (const NodeId home : homes) {
        ASSERT_EQ(before->view().Find(home)->incarnation,
                  after->view().Find(home)->incarnation);
      }
    }
    before = after;
  }
  EXPECT_GT(unmoved, 5000);
}

TEST(RendezvousTest, WhoAgreesAboutHomesHasTheSameDigest) {
  auto nodes = Nodes(5);
  const Rendezvous one(ViewOf(nodes));
  nodes[1].address = "elsewhere";
  nodes.push_back(TestNode(9, 1, true));  // no home
  EXPECT_EQ(Rendezvous(ViewOf(nodes)).digest(), one.digest());
}

}  // namespace
}  // namespace larder
