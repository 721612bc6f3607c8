#include "store/cluster/replication.h"

#include <algorithm>
#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "store/units.h"
#include "tests/store/cluster/cluster_rig.h"

namespace larder {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

class HeldCopies final : public Replicator {
 public:
  struct Waiting {
    ChunkKey chunk{};
    NodeId to{};
    Done done;
  };
  void Copy(ChunkKey chunk, NodeId to, Done done) override {
    waiting.push_back({chunk, to, std::move(done)});
    chunks.push_back(Raw(chunk));
  }
  bool MayHave(ChunkKey, NodeId node) const override {
    return std::find(never.begin(), never.end(), node) == never.end();
  }
  void Finish(const Status& status) {
    Waiting first = std::move(waiting.front());
    waiting.erase(waiting.begin());
    std::move(first.done)(status);
  }
  std::vector<Waiting> waiting;
  std::vector<uint64_t> chunks;  // ever
  std::vector<NodeId> never;     // by policy
};

class ReplicationTest : public ::testing::Test {
 protected:
  ReplicationTest() { Open({}); }

  void Open(const ReplicationOptions& options) {
    replication_.reset();
    announcer_.emplace(Announcer::Parts{TestNode(0), &calls_, &clock_,
                                        &executor_, &directory_},
                       AnnouncerOptions{});
    replication_.emplace(Replication::Parts{TestNode(0).id, &*announcer_,
                                            &replicator_, &clock_, &executor_},
                         options);
  }

  // What the directory says of a chunk of 1 MiB with two copies.
  Announcer::Told Verdict(uint64_t chunk, RecordVerdict verdict,
                          uint8_t copies = 2) {
    ChunkFacts facts = TestFacts(256);
    facts.copies = copies;
    // Known to the announcer, as it would be.
    announcer_->Stored(AnchorKey{1}, ChunkKey{chunk}, facts);
    return {AnchorKey{1}, ChunkKey{chunk}, facts, homes_, verdict};
  }
  void Tell(const Announcer::Told& told) { replication_->Told({&told, 1}); }
  // Still so after the time that others are given.
  void TellTwice(const Announcer::Told& told) {
    Tell(told);
    Run(absl::Seconds(2));
    Tell(told);
    Run(absl::Milliseconds(2));  // the first takes one
  }
  void Run(absl::Duration time) { executor_.RunUntil(clock_.Now() + time); }

  ManualClock clock_;
  ManualExecutor executor_{clock_};
  HeldCalls calls_;
  HeldCopies replicator_;
  Directory directory_{clock_, {}, 1};
  const Homes homes_{TestNode(1).id, TestNode(2).id, TestNode(0).id};
  std::optional<Announcer> announcer_;
  std::optional<Replication> replication_;
};

TEST_F(ReplicationTest, MakesTheCopiesThatAreMissing) {
  TellTwice(Verdict(5, {.held = 4, .holders = 1, .act = true}));
  ASSERT_THAT(replicator_.waiting, SizeIs(2));
  EXPECT_EQ(replicator_.waiting[0].to, homes_[0]);
  EXPECT_EQ(replicator_.waiting[1].to, homes_[1]);
  EXPECT_FALSE(replication_->Quiet());
  replicator_.Finish(absl::OkStatus());
  replicator_.Finish(absl::AlreadyExistsError(""));
  EXPECT_TRUE(replication_->Quiet());
  EXPECT_EQ(replication_->GetStats().copied, 1);
  EXPECT_EQ(replication_->GetStats().copied_bytes, 1_MiB);
  EXPECT_EQ(replication_->GetStats().needless, 1);
}

TEST_F(ReplicationTest, LeavesItToOthers) {
  TellTwice(Verdict(1, {.held = 4, .holders = 2, .act = false}));
  TellTwice(Verdict(2, {.held = 3, .holders = 2, .act = true}));
  TellTwice(Verdict(3, {.held = 0, .holders = 1, .act = true}, 0));
  EXPECT_THAT(replicator_.waiting, IsEmpty());
  EXPECT_TRUE(replication_->Quiet());
}

TEST_F(ReplicationTest, GivesOthersTime) {
  Tell(Verdict(1, {.held = 4, .holders = 1, .act = true}));
  Tell(Verdict(1, {.held = 4, .holders = 1, .act = true}));
  Run(absl::Seconds(1.9));
  EXPECT_THAT(replicator_.waiting, IsEmpty());
  Tell(Verdict(1, {.held = 7, .holders = 3, .act = true}));  // they did it
  Run(absl::Seconds(10));
  EXPECT_THAT(replicator_.waiting, IsEmpty());
  EXPECT_TRUE(replication_->Quiet());
}

TEST_F(ReplicationTest, AChunkThatIsGoneIsForgotten) {
  Tell(Verdict(1, {.held = 4, .holders = 1, .act = true}));
  EXPECT_FALSE(replication_->Quiet());
  announcer_->Removed(ChunkKey{1});
  Run(absl::Seconds(5));
  EXPECT_TRUE(replication_->Quiet());
  EXPECT_THAT(replicator_.waiting, IsEmpty());
}

TEST_F(ReplicationTest, AsksAgainUntilItIsToldSomething) {
  const auto rendezvous = RendezvousOf({TestNode(0, 1, true), TestNode(1)});
  announcer_->SetView(rendezvous);
  Tell(Verdict(1, {.held = 4, .holders = 1, .act = true}));
  Run(absl::Milliseconds(10));
  calls_.Take().Answer(absl::UnavailableError("no"));
  Run(absl::Seconds(3));
  ASSERT_THAT(calls_.waiting, SizeIs(1));  // Confirm and the retry
  EXPECT_FALSE(replication_->Quiet());
}

TEST_F(ReplicationTest, HotChunksGetCopies) {
  TellTwice(Verdict(1, {.held = 4, .holders = 1, .act = true, .hot = true}, 0));
  EXPECT_THAT(replicator_.waiting, SizeIs(2));
}

TEST_F(ReplicationTest, WhoDrainsCopiesWhatNobodyElseHas) {
  replication_->SetDraining(true);
  TellTwice(Verdict(1, {.held = 0, .holders = 0, .act = true}, 0));
  TellTwice(Verdict(2, {.held = 0, .holders = 1, .act = false}, 0));
  ASSERT_THAT(replicator_.chunks, ElementsAre(1));
  EXPECT_EQ(replicator_.waiting[0].to, homes_[0]);
}

TEST_F(ReplicationTest, WhoMayNotHaveItIsPassedOver) {
  replicator_.never = {homes_[0]};
  TellTwice(Verdict(1, {.held = 4, .holders = 1, .act = true}, 1));
  ASSERT_THAT(replicator_.waiting, SizeIs(1));
  EXPECT_EQ(replicator_.waiting[0].to, homes_[1]);
  // It has one at the second home, which is the first that may.
  TellTwice(Verdict(2, {.held = 2, .holders = 1, .act = true}, 1));
  EXPECT_THAT(replicator_.chunks, ElementsAre(1));
}

// Home after home, three times, then it is given up: a drain ends.
TEST_F(ReplicationTest, WhatNobodyTakesIsGivenUpInADrain) {
  ReplicationOptions options;
  options.drain_rounds = 3;
  Open(options);
  replication_->SetDraining(true);
  const auto tell = [&] {
    TellTwice(Verdict(1, {.held = 0, .holders = 0, .act = true}, 0));
  };
  std::vector<NodeId> asked;
  for (int i = 0; i < 10; ++i) {
    tell();
    if (replicator_.waiting.empty()) break;
    asked.push_back(replicator_.waiting[0].to);
    EXPECT_FALSE(replication_->Quiet());
    replicator_.Finish(i % 2 == 0 ? absl::UnavailableError("gone")
                                  : absl::ResourceExhaustedError("full"));
  }
  EXPECT_THAT(asked, ElementsAre(homes_[0], homes_[1], homes_[0], homes_[1],
                                 homes_[0], homes_[1]));
  EXPECT_TRUE(replication_->Quiet());
  EXPECT_EQ(replication_->GetStats().given_up, 1);
  // Of another that the second home takes nothing is left.
  TellTwice(Verdict(2, {.held = 0, .holders = 0, .act = true}, 0));
  replicator_.Finish(absl::UnavailableError("gone"));
  TellTwice(Verdict(2, {.held = 0, .holders = 0, .act = true}, 0));
  ASSERT_THAT(replicator_.waiting, SizeIs(1));
  EXPECT_EQ(replicator_.waiting[0].to, homes_[1]);
  replicator_.Finish(absl::OkStatus());
  EXPECT_TRUE(replication_->Quiet());
  EXPECT_EQ(replication_->GetStats().given_up, 1);
  // One that no home may have is given up at once.
  replicator_.never = {homes_[0], homes_[1]};
  TellTwice(Verdict(3, {.held = 0, .holders = 0, .act = true}, 0));
  EXPECT_TRUE(replication_->Quiet());
  EXPECT_EQ(replication_->GetStats().given_up, 2);
}

TEST_F(ReplicationTest, KeepsToItsBandwidthAndItsNumber) {
  ReplicationOptions options;
  options.bytes_per_second = 10.0 * (1 << 20);  // ten chunks
  options.copies_max = 3;
  Open(options);
  std::vector<Announcer::Told> told;
  for (uint64_t chunk = 1; chunk <= 100; ++chunk) {
    told.push_back(Verdict(chunk, {.held = 5, .holders = 2, .act = true}));
  }
  replication_->Told(told);
  Run(absl::Seconds(2));
  replication_->Told(told);
  Run(absl::Seconds(1));
  EXPECT_THAT(replicator_.waiting, SizeIs(3));
  const size_t before = replicator_.chunks.size();
  for (int i = 0; i < 300; ++i) {
    while (!replicator_.waiting.empty()) replicator_.Finish(absl::OkStatus());
    Run(absl::Milliseconds(10));
  }
  EXPECT_NEAR(static_cast<double>(replicator_.chunks.size() - before), 30, 2);
  // What was not sent costs nothing.
  const size_t then = replicator_.chunks.size();
  for (int i = 0; i < 100; ++i) {
    while (!replicator_.waiting.empty()) {
      replicator_.Finish(absl::AlreadyExistsError(""));
    }
    Run(absl::Milliseconds(10));
  }
  EXPECT_GT(replicator_.chunks.size() - then, 50);
}

TEST_F(ReplicationTest, WhatIsNearestToBeingLostGoesFirst) {
  ReplicationOptions options;
  options.copies_max = 1;
  Open(options);
  std::vector<Announcer::Told> told;
  for (uint64_t chunk = 1; chunk <= 5; ++chunk) {
    told.push_back(Verdict(chunk, {.held = 5, .holders = 2, .act = true}));
  }
  told.push_back(Verdict(6, {.held = 5, .holders = 1, .act = true}));
  replication_->Told(told);
  Run(absl::Seconds(2));
  replication_->Told(told);
  for (int i = 0; i < 6; ++i) {
    Run(absl::Seconds(1));
    ASSERT_THAT(replicator_.waiting, SizeIs(1));
    replicator_.Finish(absl::OkStatus());
  }
  EXPECT_THAT(replicator_.chunks, ElementsAre(6, 1, 2, 3, 4, 5));
}

TEST_F(ReplicationTest, WhatWaitsIsBounded) {
  ReplicationOptions options;
  options.waiting_max = 10;
  Open(options);
  for (uint64_t chunk = 1; chunk <= 50; ++chunk) {
    Tell(Verdict(chunk, {.held = 4, .holders = 1, .act = true}));
  }
  EXPECT_EQ(replication_->GetStats().waiting, 10);
  EXPECT_EQ(replication_->GetStats().overflows, 40);
}

TEST_F(ReplicationTest, NothingRunsAfterItsEnd) {
  TellTwice(Verdict(5, {.held = 4, .holders = 1, .act = true}));
  replication_.reset();
  replicator_.Finish(absl::OkStatus());
  Run(absl::Minutes(1));
  EXPECT_THAT(replicator_.waiting, SizeIs(1));
}

}  // namespace
}  // namespace larder
