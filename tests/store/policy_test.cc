#include "store/policy.h"

#include <map>
#include <optional>
#include <random>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace larder {
namespace {

class AllBut final : public EvictionPolicy::Evictable {
 public:
  explicit AllBut(std::set<uint32_t> kept = {}) : kept_(std::move(kept)) {}
  bool operator()(ChunkIndex chunk) const override {
    return !kept_.contains(Raw(chunk));
  }

 private:
  std::set<uint32_t> kept_;
};

ChunkFeatures Under(std::optional<uint32_t> parent = {}) {
  ChunkFeatures features;
  if (parent.has_value()) features.parent = ChunkIndex{*parent};
  return features;
}

std::vector<uint32_t> Drain(EvictionPolicy& policy, const AllBut& evictable) {
  std::vector<uint32_t> order;
  while (const auto victim = policy.Victim(evictable)) {
    order.push_back(Raw(*victim));
    policy.Remove(*victim);
  }
  return order;
}

using Order = std::vector<uint32_t>;

TEST(LruPolicy, WithoutParentsTheLeastRecentlyUsedGoes) {
  const auto policy = NewLruPolicy();
  for (uint32_t i = 0; i < 4; ++i) policy->Insert(ChunkIndex{i}, Under());
  policy->Touch(ChunkIndex{0}, absl::UnixEpoch());
  policy->Touch(ChunkIndex{2}, absl::UnixEpoch());
  EXPECT_EQ(Drain(*policy, AllBut()), (Order{1, 3, 0, 2}));
}

TEST(LruPolicy, LeavesGoBeforeTheirParents) {
  const auto policy = NewLruPolicy();
  policy->Insert(ChunkIndex{0}, Under());
  policy->Insert(ChunkIndex{1}, Under(0));
  policy->Insert(ChunkIndex{2}, Under(1));
  policy->Insert(ChunkIndex{3}, Under(0));
  // 2 and then 1: the branch used last, 3, stays longer.
  EXPECT_EQ(Drain(*policy, AllBut()), (Order{2, 1, 3, 0}));
}

TEST(LruPolicy, PassesOverWhatMayNotGoAndKeepsItsPlace) {
  const auto policy = NewLruPolicy();
  for (uint32_t i = 0; i < 3; ++i) policy->Insert(ChunkIndex{i}, Under());
  EXPECT_EQ(policy->Victim(AllBut({0})), ChunkIndex{1});
  EXPECT_EQ(policy->Victim(AllBut({0, 1, 2})), std::nullopt);
  EXPECT_EQ(policy->Victim(AllBut()), ChunkIndex{0});
}

TEST(LruPolicy, AHeldLeafKeepsItsAncestorsWhileAnotherLeafMayGo) {
  const auto policy = NewLruPolicy();
  policy->Insert(ChunkIndex{0}, Under());
  policy->Insert(ChunkIndex{1}, Under(0));
  policy->Insert(ChunkIndex{2}, Under());
  EXPECT_EQ(Drain(*policy, AllBut({1})), (Order{2, 0}));
}

// A reader that holds the end of a chain larger than the tier: what it has read
// last goes, and the beginning is still there for the next reader.
TEST(LruPolicy, AboveAHeldLeafTheDeepestGoes) {
  const auto policy = NewLruPolicy();
  for (uint32_t i = 0; i < 5; ++i) {
    policy->Insert(ChunkIndex{i}, i == 0 ? Under() : Under(i - 1));
  }
  EXPECT_EQ(Drain(*policy, AllBut({3, 4})), (Order{2, 1, 0}));
}

TEST(LruPolicy, AParentDroppedOutOfTurnLeavesItsChildrenEvictable) {
  const auto policy = NewLruPolicy();
  policy->Insert(ChunkIndex{0}, Under());
  policy->Insert(ChunkIndex{1}, Under(0));
  policy->Remove(ChunkIndex{0});
  policy->Insert(ChunkIndex{0}, Under());  // another chunk in the same slot
  policy->Touch(ChunkIndex{1}, absl::UnixEpoch());
  EXPECT_EQ(Drain(*policy, AllBut()), (Order{0, 1}));
}

// Against the definition: among the evictable chunks without children, the one
// whose last use is furthest back; if there is none, the first evictable one
// above the leaves, which are gone through in the order of use.
TEST(LruPolicy, AgreesWithTheDefinitionOnRandomUse) {
  struct Node {
    uint64_t used;
    std::optional<uint32_t> parent;
  };
  for (uint32_t seed = 0; seed < 50; ++seed) {
    std::mt19937 random(seed);
    const auto policy = NewLruPolicy();
    std::map<uint32_t, Node> model;
    uint64_t uses = 0;
    const auto remove = [&](uint32_t chunk) {
      policy->Remove(ChunkIndex{chunk});
      model.erase(chunk);
      for (auto& [other, node] : model) {
        if (node.parent == chunk) node.parent.reset();
      }
    };
    for (int step = 0; step < 2000; ++step) {
      const uint32_t chunk = random() % 40;
      switch (random() % 5) {
        case 0:
        case 1: {
          if (model.contains(chunk)) break;
          std::optional<uint32_t> parent = random() % 40;
          if (!model.contains(*parent)) parent.reset();
          policy->Insert(ChunkIndex{chunk}, Under(parent));
          model[chunk] = {++uses, parent};
          break;
        }
        case 2:
          if (!model.contains(chunk)) break;
          policy->Touch(ChunkIndex{chunk}, absl::UnixEpoch());
          model[chunk].used = ++uses;
          break;
        case 3:
          if (model.contains(chunk)) remove(chunk);
          break;
        case 4: {
          std::set<uint32_t> kept;
          const int keep = random() % 2 == 0 ? 10 : 120;
          for (int i = 0; i < keep; ++i) kept.insert(random() % 40);
          std::map<uint64_t, uint32_t> leaves;  // by their last use
          for (const auto& [candidate, node] : model) {
            bool leaf = true;
            for (const auto& [other, child] : model) {
              leaf = leaf && child.parent != candidate;
            }
            if (leaf) leaves[node.used] = candidate;
          }
          std::optional<uint32_t> expected;
          for (const auto& [used, leaf] : leaves) {
            if (!expected && !kept.contains(leaf)) expected = leaf;
          }
          for (const auto& [used, leaf] : leaves) {
            for (auto above = model[leaf].parent; above && !expected;
                 above = model[*above].parent) {
              if (!kept.contains(*above)) expected = above;
            }
          }
          const auto victim = policy->Victim(AllBut(kept));
          ASSERT_EQ(victim.has_value(), expected.has_value());
          if (!victim.has_value()) break;
          ASSERT_EQ(Raw(*victim), *expected);
          remove(*expected);
          break;
        }
      }
    }
  }
}

TEST(LruPolicy, ItsTablesAreSmall) {
  const auto policy = NewLruPolicy();
  for (uint32_t i = 0; i < 100'000; ++i) {
    policy->Insert(ChunkIndex{i},
                   Under(i == 0 ? std::nullopt : std::optional(i - 1)));
  }
  EXPECT_LE(policy->MemoryBytes(), 80u * 100'000);
}

}  // namespace
}  // namespace larder
