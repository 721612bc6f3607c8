#include "store/expiry_queue.h"

#include <map>
#include <random>
#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace larder {
namespace {

using What = ExpiryQueue::What;

TEST(ExpiryQueue, WhatIsDueComesInOrder) {
  ExpiryQueue queue;
  const absl::Time start = absl::UnixEpoch();
  EXPECT_EQ(queue.Next(), absl::InfiniteFuture());
  queue.Add(start + absl::Seconds(3), What::kHold, 3);
  queue.Add(start + absl::Seconds(1), What::kReservation, 1);
  queue.Add(absl::InfiniteFuture(), What::kHold, 9);  // never
  queue.Add(start + absl::Seconds(2), What::kHold, 2);
  EXPECT_EQ(queue.Next(), start + absl::Seconds(1));
  EXPECT_FALSE(queue.PopDue(start));
  EXPECT_EQ(queue.PopDue(start + absl::Seconds(2))->id, 1u);
  EXPECT_EQ(queue.PopDue(start + absl::Seconds(2))->id, 2u);
  EXPECT_FALSE(queue.PopDue(start + absl::Seconds(2)));
  EXPECT_EQ(queue.PopDue(start + absl::Hours(1))->id, 3u);
  EXPECT_FALSE(queue.PopDue(absl::InfiniteFuture() - absl::Seconds(1)));
}

// A client that takes and gives back as fast as it can, for longer than the
// entries take to fall due: what means nothing any more does not pile up, and
// of what does nothing is lost.
TEST(ExpiryQueue, PruningKeepsWhatStillMeansSomething) {
  ExpiryQueue queue;
  std::mt19937 random(1);
  std::set<uint64_t> live;
  std::map<uint64_t, absl::Time> due;
  size_t prunes = 0;
  for (uint64_t id = 0; id < 100'000; ++id) {
    due[id] = absl::UnixEpoch() + absl::Seconds(random() % 1000);
    live.insert(id);
    queue.Add(due[id], What::kHold, id);
    if (queue.WantsPruning()) {
      ++prunes;
      queue.Prune(
          [&](const ExpiryQueue::Entry& e) { return live.contains(e.id); });
      ASSERT_FALSE(queue.WantsPruning());
    }
    if (live.size() > 100) live.erase(live.begin());
  }
  EXPECT_GT(prunes, 50u);
  EXPECT_LT(prunes, 200u);
  absl::Time last = absl::InfinitePast();
  size_t entries = 0;
  while (const auto entry = queue.PopDue(absl::UnixEpoch() + absl::Hours(1))) {
    EXPECT_EQ(entry->when, due[entry->id]);
    EXPECT_LE(last, entry->when);
    last = entry->when;
    live.erase(entry->id);
    ++entries;
  }
  EXPECT_TRUE(live.empty());
  EXPECT_LE(entries, 1200u);
}

}  // namespace
}  // namespace larder
