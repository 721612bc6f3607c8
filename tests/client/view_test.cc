#include "client/core/view.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <random>
#include <vector>

#include "gtest/gtest.h"

#include "client/core/match_cache.h"
#include "client/core/queue.h"
#include "client/core/staging.h"

namespace larder::client {
namespace {

SpaceDescriptor OneGroup() {
  SpaceDescriptor space;
  space.block_tokens = 2;
  space.chunk_tokens = 4;
  GroupDescriptor group;
  group.layer_count = 2;
  group.kv_head_count = 4;
  group.k_head_bytes = 8;
  group.v_head_bytes = 4;
  group.interleave_count = 2;
  space.groups = {group};
  return space;
}

PartShape Shape(uint16_t head_begin, uint16_t heads, uint16_t turn = 0,
                uint16_t turns = 1) {
  return {0, 2, head_begin, heads, turn, turns};
}

TEST(ChooseParts, CoversOrSaysNo) {
  const GroupDescriptor group = OneGroup().groups[0];
  const PartShape whole = Shape(0, 4);
  using Parts = std::vector<PartShape>;
  using Chosen = std::vector<size_t>;
  EXPECT_EQ(ChooseParts(group, whole, Parts{whole}), Chosen{0});
  EXPECT_EQ(ChooseParts(group, whole, Parts{Shape(0, 2)}), Chosen{});
  EXPECT_EQ(ChooseParts(group, whole, Parts{Shape(0, 2), Shape(2, 2)}),
            (Chosen{0, 1}));
  // One that adds nothing is not read.
  EXPECT_EQ(ChooseParts(group, Shape(0, 2),
                        Parts{Shape(2, 2), Shape(0, 3), Shape(1, 1)}),
            Chosen{1});
  // Turns: both are needed for all tokens, one for a rank of its own.
  EXPECT_EQ(ChooseParts(group, whole, Parts{Shape(0, 4, 1, 2)}), Chosen{});
  EXPECT_EQ(
      ChooseParts(group, whole, Parts{Shape(0, 4, 1, 2), Shape(0, 4, 0, 2)}),
      (Chosen{0, 1}));
  EXPECT_EQ(ChooseParts(group, Shape(0, 4, 1, 2), Parts{Shape(0, 4)}),
            Chosen{0});
}

TEST(ViewRuns, TokensOfARankInTurn) {
  const SpaceDescriptor space = OneGroup();
  ViewSpec spec;
  spec.box = Shape(0, 4);
  std::vector<std::byte> buffers(2 * 4 * 4 * 12);
  spec.segments = {buffers.data(), buffers.data() + 4 * 4 * 12};
  const auto view = View::Make(space, spec);
  ASSERT_TRUE(view.ok()) << view.status();
  // Of a part with every second token, row r is token 2r + 1.
  std::vector<client::Run> runs;
  view->RunsOf(Shape(0, 4, 1, 2), 4, 0, {0, false, 2}, runs);
  ASSERT_EQ(runs.size(), 2u);
  EXPECT_EQ(runs[0].offset, 0u);
  EXPECT_EQ(runs[0].place, buffers.data() + (2 * 4 + 1) * 8);
  EXPECT_EQ(runs[1].offset, 8u);
  EXPECT_EQ(runs[1].place, buffers.data() + (2 * 4 + 3) * 8);
}

TEST(StagingPool, GivesTheLowestThatFits) {
  StagingPool pool(4 * kPageBytes + 100);
  EXPECT_EQ(pool.capacity(), 4 * kPageBytes);
  const auto a = pool.Allocate(1);
  const auto b = pool.Allocate(2 * kPageBytes);
  const auto c = pool.Allocate(kPageBytes);
  EXPECT_EQ(a, 0u);
  EXPECT_EQ(b, kPageBytes);
  EXPECT_EQ(c, 3 * kPageBytes);
  EXPECT_FALSE(pool.Allocate(1));
  pool.Free(*b);
  EXPECT_FALSE(pool.Allocate(3 * kPageBytes));
  EXPECT_EQ(pool.Allocate(1), kPageBytes);
  pool.Free(kPageBytes);
  pool.Free(*c);
  pool.Free(*c);  // given back already
  EXPECT_EQ(pool.frees(), 3u);
  pool.Free(*a);
  EXPECT_EQ(pool.Allocate(4 * kPageBytes), 0u);
  EXPECT_FALSE(pool.Allocate(5 * kPageBytes));
}

// Against a map of every page: no page has two owners, and Allocate fails only
// where no gap is large enough.
TEST(StagingPool, AgreesWithAMapOfItsPages) {
  constexpr size_t kPages = 64;
  std::mt19937 random(3);
  StagingPool pool(kPages * kPageBytes);
  std::vector<uint8_t> taken(kPages, 0);
  std::map<uint64_t, size_t> live;  // pages by offset
  for (int step = 0; step < 20'000; ++step) {
    if (random() % 2 == 0 && !live.empty()) {
      const auto victim = std::next(live.begin(), random() % live.size());
      std::fill_n(taken.begin() + victim->first / kPageBytes, victim->second,
                  0);
      pool.Free(victim->first);
      live.erase(victim);
      continue;
    }
    const size_t pages = 1 + random() % 12;
    const auto gap = std::search_n(taken.begin(), taken.end(), pages, 0);
    const auto offset = pool.Allocate(pages * kPageBytes - random() % 9);
    ASSERT_EQ(offset.has_value(), gap != taken.end());
    if (!offset) continue;
    ASSERT_EQ(*offset, (gap - taken.begin()) * kPageBytes);
    std::fill_n(gap, pages, 1);
    live[*offset] = pages;
  }
}

TEST(MatchCache, AgesAndForgets) {
  MatchCache cache(2, 4);
  const std::vector<ChunkId> ids(3);
  MatchQuery query;
  query.ids = ids;
  const absl::Time now = absl::UnixEpoch();
  const absl::Duration age = absl::Milliseconds(50);
  auto found = cache.Find(query, now, age);
  EXPECT_EQ(found.answer, nullptr);
  EXPECT_TRUE(found.refresh);
  EXPECT_FALSE(cache.Find(query, now, age).refresh);  // somebody asks already
  MatchAnswer answer;
  answer.usable = 2;
  cache.Store(query, answer, now);
  found = cache.Find(query, now + age, age);
  ASSERT_NE(found.answer, nullptr);
  EXPECT_FALSE(found.refresh);
  found = cache.Find(query, now + 2 * age, age);
  EXPECT_NE(found.answer, nullptr);
  EXPECT_TRUE(found.refresh);
  EXPECT_EQ(cache.Find(query, now + 100 * age, age).answer, nullptr);
  query.start = 1;  // another question
  EXPECT_EQ(cache.Find(query, now, age).answer, nullptr);
  cache.Clear();
  query.start = 0;
  EXPECT_EQ(cache.Find(query, now, age).answer, nullptr);
}

TEST(Queue, TellsOnceAndInOrder) {
  auto queue = Queue::Make();
  ASSERT_TRUE(queue.ok());
  for (JobId job = 1; job <= 3; ++job) {
    Done done;
    done.job = job;
    (*queue)->Push(std::move(done));
  }
  auto done = (*queue)->Poll(2, absl::ZeroDuration());
  ASSERT_EQ(done.size(), 2u);
  EXPECT_EQ(done[0].job, 1u);
  done = (*queue)->Poll(2, absl::ZeroDuration());
  ASSERT_EQ(done.size(), 1u);
  EXPECT_EQ(done[0].job, 3u);
  EXPECT_TRUE((*queue)->Poll(2, absl::ZeroDuration()).empty());
}

}  // namespace
}  // namespace larder::client
