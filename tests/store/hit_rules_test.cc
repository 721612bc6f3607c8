#include "store/hit_rules.h"

#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace larder {
namespace {

using testing::ElementsAre;

GroupDescriptor Group(GroupKind kind, uint32_t window = 0) {
  GroupDescriptor group;
  group.kind = kind;
  group.window_tokens = window;
  return group;
}

HitAnswer Ask(const std::vector<GroupDescriptor>& groups,
              const std::vector<GroupMask>& present, uint32_t tail = 0) {
  HitQuery query;
  query.present = present;
  query.chunk_tokens = 8;
  query.tail_tokens = tail;
  return ApplyHitRules(groups, query);
}

TEST(HitRules, NothingAskedIsUsable) {
  const HitAnswer answer = Ask({Group(GroupKind::kFullAttention)}, {});
  EXPECT_EQ(answer.usable, 0u);
  EXPECT_THAT(answer.group_hits, ElementsAre(0));
}

TEST(HitRules, FullAttentionEndsAtTheFirstGap) {
  for (GroupKind kind :
       {GroupKind::kFullAttention, GroupKind::kLatent, GroupKind::kIndexer}) {
    EXPECT_EQ(Ask({Group(kind)}, {1, 1, 0, 1}).usable, 2u);
    EXPECT_EQ(Ask({Group(kind)}, {0, 1, 1, 1}).usable, 0u);
    EXPECT_EQ(Ask({Group(kind)}, {1, 1, 1}).usable, 3u);
  }
}

TEST(HitRules, SlidingWindowNeedsTheTrailingChunksOnly) {
  const auto window = [](uint32_t tokens, std::vector<GroupMask> present,
                         uint32_t tail = 0) {
    return Ask({Group(GroupKind::kSlidingWindow, tokens)}, present, tail)
        .usable;
  };
  EXPECT_EQ(window(16, {0, 0, 1, 1}), 4u);
  EXPECT_EQ(window(17, {0, 0, 1, 1}), 0u) << "reaches into a third chunk";
  EXPECT_EQ(window(17, {0, 1, 1, 1}), 4u);
  EXPECT_EQ(window(1, {0, 1, 0}), 2u);
  EXPECT_EQ(window(64, {1, 1, 0}), 2u) << "all there is before the boundary";
  // A tail of 4 tokens shortens what the last chunks hold.
  EXPECT_EQ(window(16, {0, 0, 1, 1}, 4), 0u);
  EXPECT_EQ(window(16, {0, 1, 1, 1}, 4), 4u);
  EXPECT_EQ(window(12, {0, 0, 1, 1}, 4), 4u);
  EXPECT_EQ(window(4, {0, 0, 0, 1}, 4), 4u);
}

TEST(HitRules, RecurrentNeedsTheStateAtTheBoundaryOnly) {
  EXPECT_EQ(Ask({Group(GroupKind::kRecurrentState)}, {0, 0, 1, 0}).usable, 3u);
  EXPECT_EQ(Ask({Group(GroupKind::kRecurrentState)}, {0, 0}).usable, 0u);
}

TEST(HitRules, UsableIsWhatAllGroupsServeAtOneBoundary) {
  const std::vector<GroupDescriptor> groups = {
      Group(GroupKind::kFullAttention), Group(GroupKind::kSlidingWindow, 8),
      Group(GroupKind::kRecurrentState)};
  // Bits: 1 full, 2 window, 4 state.
  const HitAnswer answer = Ask(groups, {1, 1 | 2 | 4, 1 | 2, 1 | 4, 2 | 4});
  EXPECT_THAT(answer.group_hits, ElementsAre(4, 5, 5));
  EXPECT_EQ(answer.usable, 2u);
}

// The same, said in the slowest possible way.
bool Serves(const GroupDescriptor& group, const std::vector<GroupMask>& present,
            size_t g, size_t end, uint32_t tail) {
  const auto there = [&](size_t i) { return (present[i] >> g & 1) != 0; };
  switch (group.kind) {
    case GroupKind::kRecurrentState:
      return end == 0 || there(end - 1);
    case GroupKind::kSlidingWindow: {
      size_t tokens = 0;
      for (size_t i = end; i-- > 0 && tokens < group.window_tokens;) {
        if (!there(i)) return false;
        tokens += tail != 0 && i + 1 == present.size() ? tail : 8;
      }
      return true;
    }
    default:
      for (size_t i = 0; i < end; ++i) {
        if (!there(i)) return false;
      }
      return true;
  }
}

TEST(HitRules, AgreesWithTheDefinitionOnRandomPrompts) {
  std::mt19937 random(7);
  for (int round = 0; round < 5000; ++round) {
    std::vector<GroupDescriptor> groups;
    for (size_t g = 0; g < 1 + random() % 3; ++g) {
      groups.push_back(
          Group(static_cast<GroupKind>(1 + random() % 5), 1 + random() % 40));
    }
    std::vector<GroupMask> present(random() % 12);
    for (GroupMask& mask : present) mask = random() | random();
    const uint32_t tail = present.empty() || random() % 2 ? 0 : 4;
    const HitAnswer answer = Ask(groups, present, tail);
    size_t usable = 0;
    std::vector<uint32_t> hits(groups.size(), 0);
    for (size_t end = 1; end <= present.size(); ++end) {
      bool all = true;
      for (size_t g = 0; g < groups.size(); ++g) {
        if (Serves(groups[g], present, g, end, tail)) {
          hits[g] = static_cast<uint32_t>(end);
        } else {
          all = false;
        }
      }
      if (all) usable = end;
    }
    ASSERT_EQ(answer.usable, usable);
    ASSERT_EQ(answer.group_hits, hits);
  }
}

}  // namespace
}  // namespace larder
