#include "store/cluster/announcer.h"

#include <algorithm>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/store/cluster/cluster_rig.h"

namespace larder {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

// This node is none of the view's: all homes are called.
class AnnouncerTest : public ::testing::Test {
 protected:
  AnnouncerTest() { Open({}); }

  void Open(const AnnouncerOptions& options) {
    announcer_.reset();
    calls_.waiting.clear();
    announcer_.emplace(
        Announcer::Parts{TestNode(0, 3), &calls_, &clock_, &executor_, &own_},
        options);
    announcer_->SetOnTold([this](std::span<const Announcer::Told> told) {
      told_.insert(told_.end(), told.begin(), told.end());
    });
    heard_.clear();
    rendezvous_ = nullptr;
  }

  void SetNodes(std::vector<Node> nodes) {
    rendezvous_ = RendezvousOf(std::move(nodes), rendezvous_.get());
    announcer_->SetView(rendezvous_);
  }

  void Run(absl::Duration time = absl::Milliseconds(10)) {
    executor_.RunUntil(clock_.Now() + time);
  }

  // As a directory with room would: what a node was told, by node and chunk.
  void AnswerOne() {
    HeldCalls::Waiting call = calls_.Take();
    const auto announce = ParseAnnounce(call.message);
    ASSERT_TRUE(announce.ok()) << announce.status();
    EXPECT_EQ(announce->incarnation, 3);
    EXPECT_GT(announce->sequence, sequence_);
    sequence_ = announce->sequence;
    Announced answer;
    answer.digest = rendezvous_->digest();
    for (const Announce::Section& section : announce->sections) {
      answer.sections.push_back({directories_, {}});
      for (const ChunkRecord& record : section.records) {
        ++records_;
        auto& node = heard_[call.to];
        if (record.facts.tier == CopyTier::kGone) {
          node.erase(record.key);
        } else {
          node[record.key] = record.facts;
        }
        answer.sections.back().verdicts.push_back({.holders = 1, .act = true});
      }
    }
    call.Answer(Encode(answer));
  }
  void RunAndAnswer(absl::Duration time) {
    const absl::Time end = clock_.Now() + time;
    while (clock_.Now() < end) {
      Run(absl::Milliseconds(5));
      while (!calls_.waiting.empty()) AnswerOne();
    }
  }

  NodeId HomeOf(uint64_t anchor) {
    return rendezvous_->Find(AnchorKey{anchor}, 1)[0];
  }
  void Store(uint64_t anchor, uint64_t chunk,
             const ChunkFacts& facts = TestFacts()) {
    announcer_->Stored(AnchorKey{anchor}, ChunkKey{chunk}, facts);
  }
  size_t HeardChunks() {
    size_t count = 0;
    for (const auto& [node, chunks] : heard_) count += chunks.size();
    return count;
  }

  ManualClock clock_;
  ManualExecutor executor_{clock_};
  HeldCalls calls_;
  Directory own_{clock_, {}, 1};
  std::shared_ptr<const Rendezvous> rendezvous_;
  std::map<NodeId, std::map<ChunkKey, ChunkFacts>> heard_;
  std::vector<Announcer::Told> told_;
  uint64_t sequence_ = 0;
  uint64_t records_ = 0;
  uint8_t directories_ = 1;
  std::optional<Announcer> announcer_;
};

TEST_F(AnnouncerTest, WhatComesTogetherIsToldTogether) {
  SetNodes({TestNode(1)});
  Run();
  for (uint64_t chunk = 1; chunk <= 100; ++chunk) Store(chunk / 64, chunk);
  Run(absl::Milliseconds(4));
  EXPECT_THAT(calls_.waiting, IsEmpty());
  Run(absl::Milliseconds(1));
  ASSERT_THAT(calls_.waiting, SizeIs(1));
  EXPECT_FALSE(announcer_->Quiet());
  AnswerOne();
  EXPECT_EQ(HeardChunks(), 100);
  EXPECT_TRUE(announcer_->Quiet());
  EXPECT_THAT(told_, SizeIs(100));
  EXPECT_THAT(told_[0].homes, ElementsAre(TestNode(1).id));
}

TEST_F(AnnouncerTest, EachAnchorIsToldToItsHome) {
  SetNodes({TestNode(1), TestNode(2), TestNode(3)});
  for (uint64_t chunk = 1; chunk <= 300; ++chunk) Store(chunk, chunk);
  RunAndAnswer(absl::Milliseconds(20));
  EXPECT_EQ(HeardChunks(), 300);
  for (uint64_t chunk = 1; chunk <= 300; ++chunk) {
    EXPECT_TRUE(heard_[HomeOf(chunk)].contains(ChunkKey{chunk}));
  }
}

TEST_F(AnnouncerTest, TellsWhatChangedAsItIsWhenItIsSent) {
  SetNodes({TestNode(1)});
  Store(1, 1);
  Store(1, 2);
  RunAndAnswer(absl::Milliseconds(20));
  records_ = 0;
  ChunkFacts durable = TestFacts();
  durable.tier = CopyTier::kDurable;
  Store(1, 1, durable);
  Store(1, 3);
  announcer_->Removed(ChunkKey{2});
  announcer_->Removed(ChunkKey{3});
  announcer_->Removed(ChunkKey{4});  // never there
  Store(1, 1, durable);              // no change
  RunAndAnswer(absl::Milliseconds(20));
  EXPECT_EQ(records_, 3);
  EXPECT_THAT(heard_[TestNode(1).id],
              ElementsAre(std::pair(ChunkKey{1}, durable)));
}

TEST_F(AnnouncerTest, ALostCallIsToldAgainAsThingsAreThen) {
  SetNodes({TestNode(1)});
  Store(1, 1);
  Store(2, 2);
  Run();
  ASSERT_THAT(calls_.waiting, SizeIs(1));
  announcer_->Removed(ChunkKey{1});
  Store(3, 3);
  Run();
  EXPECT_THAT(calls_.waiting, SizeIs(1));  // one at a time
  calls_.Take().Answer(absl::DeadlineExceededError("lost"));
  Run(absl::Milliseconds(990));
  EXPECT_THAT(calls_.waiting, IsEmpty());  // left alone
  RunAndAnswer(absl::Milliseconds(50));
  EXPECT_THAT(heard_[TestNode(1).id], ElementsAre(testing::Key(ChunkKey{2}),
                                                  testing::Key(ChunkKey{3})));
  EXPECT_EQ(announcer_->GetStats().failures, 1);
}

TEST_F(AnnouncerTest, AnAnswerThatDoesNotFitIsAFailure) {
  SetNodes({TestNode(1)});
  Store(1, 1);
  for (const std::string& answer :
       {std::string(), std::string("nonsense"), Encode(Announced{})}) {
    Run(absl::Seconds(2));
    ASSERT_THAT(calls_.waiting, SizeIs(1));
    calls_.Take().Answer(answer);
    EXPECT_FALSE(announcer_->Quiet());
  }
  EXPECT_EQ(announcer_->GetStats().failures, 3);
  RunAndAnswer(absl::Seconds(2));
  EXPECT_EQ(HeardChunks(), 1);
  EXPECT_TRUE(announcer_->Quiet());
}

TEST_F(AnnouncerTest, EverythingIsToldAgainInTime) {
  SetNodes({TestNode(1), TestNode(2)});
  for (uint64_t chunk = 1; chunk <= 500; ++chunk) Store(chunk / 4, chunk);
  RunAndAnswer(absl::Milliseconds(50));
  heard_.clear();
  records_ = 0;
  RunAndAnswer(absl::Seconds(121));
  EXPECT_EQ(HeardChunks(), 500);
  EXPECT_LE(records_, 520);  // once
}

TEST_F(AnnouncerTest, ToldAtAnEvenRate) {
  AnnouncerOptions options;
  options.records_per_second = 1000;
  options.message_records_max = 100;
  Open(options);
  SetNodes({TestNode(1), TestNode(2), TestNode(3)});
  for (uint64_t chunk = 1; chunk <= 5000; ++chunk) Store(chunk, chunk);
  RunAndAnswer(absl::Seconds(2));
  EXPECT_LE(records_, 2200);
  EXPECT_GE(records_, 1800);
  RunAndAnswer(absl::Seconds(4));
  EXPECT_EQ(HeardChunks(), 5000);
}

TEST_F(AnnouncerTest, ANewViewTellsNewHomesAndNobodyElse) {
  SetNodes({TestNode(1), TestNode(2), TestNode(3)});
  for (uint64_t chunk = 1; chunk <= 1000; ++chunk) Store(chunk, chunk);
  RunAndAnswer(absl::Milliseconds(100));
  heard_.clear();
  records_ = 0;
  SetNodes({TestNode(1), TestNode(2), TestNode(3), TestNode(4)});
  RunAndAnswer(absl::Milliseconds(100));
  EXPECT_THAT(heard_, SizeIs(1));
  for (uint64_t chunk = 1; chunk <= 1000; ++chunk) {
    EXPECT_EQ(heard_[TestNode(4).id].contains(ChunkKey{chunk}),
              HomeOf(chunk) == TestNode(4).id);
  }
  EXPECT_NEAR(static_cast<double>(records_), 250, 70);
  // One that was born again knows nothing.
  heard_.clear();
  SetNodes({TestNode(1), TestNode(2), TestNode(3), TestNode(4, 2)});
  RunAndAnswer(absl::Milliseconds(100));
  EXPECT_THAT(heard_, SizeIs(1));
  for (uint64_t chunk = 1; chunk <= 1000; ++chunk) {
    EXPECT_EQ(heard_[TestNode(4).id].contains(ChunkKey{chunk}),
              HomeOf(chunk) == TestNode(4).id);
  }
  // Views that nobody had the time to look at are made up for.
  heard_.clear();
  SetNodes({TestNode(1), TestNode(2), TestNode(3)});
  SetNodes({TestNode(1), TestNode(2), TestNode(3), TestNode(5)});
  RunAndAnswer(absl::Milliseconds(200));
  for (uint64_t chunk = 1; chunk <= 1000; ++chunk) {
    EXPECT_TRUE(heard_[HomeOf(chunk)].contains(ChunkKey{chunk}));
  }
}

TEST_F(AnnouncerTest, WhatCameBeforeTheFirstViewIsToldThen) {
  Store(1, 1);
  Store(2, 2);
  announcer_->Removed(ChunkKey{2});
  Run(absl::Seconds(1));
  EXPECT_THAT(calls_.waiting, IsEmpty());
  SetNodes({TestNode(1)});
  RunAndAnswer(absl::Milliseconds(20));
  EXPECT_THAT(heard_[TestNode(1).id], ElementsAre(testing::Key(ChunkKey{1})));
}

TEST_F(AnnouncerTest, WhatIsTooMuchForAQueueIsToldAsAWhole) {
  AnnouncerOptions options;
  options.changes_max = 100;
  Open(options);
  SetNodes({TestNode(1), TestNode(2)});
  RunAndAnswer(absl::Milliseconds(20));
  for (uint64_t chunk = 1; chunk <= 2000; ++chunk) Store(chunk, chunk);
  for (uint64_t chunk = 1; chunk <= 500; ++chunk) {
    announcer_->Removed(ChunkKey{chunk});
  }
  EXPECT_GT(announcer_->GetStats().overflows, 10);
  RunAndAnswer(absl::Milliseconds(500));
  EXPECT_EQ(HeardChunks(), 1500);
}

TEST_F(AnnouncerTest, AnAnchorOfManyChunksIsToldInPieces) {
  AnnouncerOptions options;
  options.message_records_max = 10;
  Open(options);
  for (uint64_t chunk = 1; chunk <= 1000; ++chunk) Store(7, chunk);
  SetNodes({TestNode(1)});
  uint64_t next = 1;
  while (!announcer_->Quiet()) {
    Run(absl::Milliseconds(5));
    if (calls_.waiting.empty()) continue;
    EXPECT_LE(calls_.waiting[0].message.size(), 24 + 3 * 16 + 10 * 32);
    AnswerOne();
    // Meanwhile some go, and others come.
    if (next <= 300) {
      announcer_->Removed(ChunkKey{3 * next});
      Store(7, 10'000 + next);
      ++next;
    }
  }
  ASSERT_GT(next, 300);
  const auto& heard = heard_[TestNode(1).id];
  EXPECT_THAT(heard, SizeIs(1000));
  for (uint64_t chunk = 1; chunk <= 1000; ++chunk) {
    EXPECT_EQ(heard.contains(ChunkKey{chunk}), chunk % 3 != 0 || chunk > 900);
  }
}

TEST_F(AnnouncerTest, HotAnchorsAreToldToMoreHomes) {
  SetNodes({TestNode(1), TestNode(2), TestNode(3), TestNode(4)});
  Store(1, 1);
  directories_ = 3;
  RunAndAnswer(absl::Milliseconds(50));
  EXPECT_EQ(HeardChunks(), 3);
  for (const NodeId home : rendezvous_->Find(AnchorKey{1}, 3)) {
    EXPECT_TRUE(heard_[home].contains(ChunkKey{1}));
  }
  announcer_->Removed(ChunkKey{1});
  RunAndAnswer(absl::Milliseconds(50));
  EXPECT_EQ(HeardChunks(), 0);
}

TEST_F(AnnouncerTest, NothingRunsAfterItsEnd) {
  SetNodes({TestNode(1)});
  Store(1, 1);
  Run();
  ASSERT_THAT(calls_.waiting, SizeIs(1));
  announcer_.reset();
  calls_.Take().Answer(Encode(Announced{}));
  Run(absl::Minutes(10));
  EXPECT_THAT(told_, IsEmpty());
}

TEST(OwnDirectoryTest, IsToldWithoutACall) {
  ManualClock clock;
  ManualExecutor executor(clock);
  HeldCalls calls;
  Directory directory(clock, {}, 1);
  std::vector<Announcer::Told> told;
  Announcer announcer({TestNode(1), &calls, &clock, &executor, &directory}, {});
  announcer.SetOnTold([&](std::span<const Announcer::Told> some) {
    told.insert(told.end(), some.begin(), some.end());
  });
  const auto rendezvous = RendezvousOf({TestNode(1)});
  directory.SetView(rendezvous);
  announcer.SetView(rendezvous);
  announcer.Stored(AnchorKey{1}, ChunkKey{1}, TestFacts());
  executor.RunUntil(clock.Now() + absl::Milliseconds(20));
  EXPECT_THAT(calls.waiting, IsEmpty());
  EXPECT_EQ(directory.GetStats().entries, 1);
  ASSERT_THAT(told, SizeIs(1));
  EXPECT_EQ(told[0].verdict,
            (RecordVerdict{.held = 1, .holders = 1, .act = true}));
}

}  // namespace
}  // namespace larder
