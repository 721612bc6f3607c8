#include "store/cluster/locator.h"

#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/store/cluster/cluster_rig.h"

namespace larder {
namespace {

using ::testing::Each;
using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using State = Location::State;

// This node is number 0 and nobody's home.
class LocatorTest : public ::testing::Test {
 protected:
  LocatorTest() {
    for (int i = 0; i < 1100; ++i) {
      ChunkId id;
      id.bytes[0] = static_cast<uint8_t>(i);
      id.bytes[1] = static_cast<uint8_t>(i >> 8);
      ids_.push_back(id);
    }
    Open({});
    SetNodes(20);
  }

  void Open(const LocatorOptions& options) {
    locator_.emplace(
        Locator::Parts{TestNode(0).id, &calls_, &clock_, &executor_, &own_},
        options);
  }
  void SetNodes(int count, uint64_t incarnation = 1) {
    std::vector<Node> nodes = {TestNode(0, 1, true)};
    for (int i = 1; i <= count; ++i) nodes.push_back(TestNode(i, incarnation));
    rendezvous_ = RendezvousOf(nodes);
    locator_->SetView(rendezvous_);
    own_.SetView(rendezvous_);
  }

  // The first call, as a directory would that knows holders_.
  void AnswerOne() {
    HeldCalls::Waiting call = calls_.Take();
    const auto query = ParseFind(call.message);
    ASSERT_TRUE(query.ok());
    asked_.push_back(call.to);
    FindAnswer found;
    for (const auto& section : query->sections) {
      if (directories_ == 1) {
        EXPECT_EQ(rendezvous_->Find(section.anchor, 1)[0], call.to);
      }
      found.sections.push_back({directories_, {}});
      for (const ChunkKey key : section.keys) {
        std::vector<Holder> holders;
        for (const int node : holders_[key]) {
          holders.push_back({TestNode(node).id, TestFacts()});
        }
        found.sections.back().holders.push_back(holders);
      }
    }
    call.Answer(Encode(found));
  }
  void AnswerAll() {
    while (!calls_.waiting.empty()) AnswerOne();
  }

  // Of ids_[start, end); empty while it was not called.
  std::shared_ptr<std::vector<Location>> Locate(
      size_t start, size_t end, absl::Duration deadline = absl::Seconds(30)) {
    auto result = std::make_shared<std::vector<Location>>();
    locator_->Locate(
        scope_, std::span(ids_).first(end), start, clock_.Now() + deadline,
        [result](std::vector<Location> locations) { *result = locations; });
    executor_.RunAll();
    return result;
  }
  State StateOf(size_t chunk) {
    return locator_->Find(scope_, std::span(ids_).first(chunk + 1), chunk)[0]
        .state;
  }
  ChunkKey Key(size_t chunk) { return ComputeChunkKey(scope_, ids_[chunk]); }
  void Advance(absl::Duration time) { executor_.RunUntil(clock_.Now() + time); }

  ManualClock clock_;
  ManualExecutor executor_{clock_};
  HeldCalls calls_;
  Directory own_{clock_, {}, 1};
  std::shared_ptr<const Rendezvous> rendezvous_;
  const Scope scope_{17, {}};
  std::vector<ChunkId> ids_;
  std::map<ChunkKey, std::vector<int>> holders_;
  std::vector<NodeId> asked_;
  uint8_t directories_ = 1;
  std::optional<Locator> locator_;
};

TEST_F(LocatorTest, AsksTheHomesOfAnchorsInParallel) {
  for (size_t i = 0; i < 512; ++i) holders_[Key(i)] = {1 + int(i) % 3};
  const auto result = Locate(0, 512);
  EXPECT_LE(calls_.waiting.size(), 8);
  EXPECT_GE(calls_.waiting.size(), 4);
  EXPECT_THAT(*result, IsEmpty());
  AnswerAll();
  ASSERT_THAT(*result, SizeIs(512));
  for (size_t i = 0; i < 512; ++i) {
    EXPECT_EQ((*result)[i].state, State::kHeld);
    EXPECT_THAT((*result)[i].holders,
                ElementsAre(Holder{TestNode(1 + int(i) % 3).id, TestFacts()}));
  }
  EXPECT_EQ(std::set(asked_.begin(), asked_.end()).size(), asked_.size());
}

TEST_F(LocatorTest, APromptOf512ChunksFromAnywhereAsksAtMostNine) {
  for (const size_t start : {1, 10, 63, 64, 500}) {
    Open({});
    SetNodes(20);
    calls_.waiting.clear();
    Locate(start, start + 512);
    EXPECT_LE(calls_.waiting.size(), 9);
  }
}

TEST_F(LocatorTest, FewNodesGetFewMessages) {
  SetNodes(1);
  Locate(0, 1000);
  EXPECT_THAT(calls_.waiting, SizeIs(1));
  calls_.waiting.clear();
  Open({});
  SetNodes(1);
  const auto result = Locate(0, 1100);  // more than one message may ask
  EXPECT_THAT(calls_.waiting, SizeIs(2));
  AnswerAll();
  EXPECT_THAT(*result, SizeIs(1100));
}

TEST_F(LocatorTest, AnswersAreRememberedForAWhile) {
  holders_[Key(0)] = {1};
  EXPECT_EQ(StateOf(0), State::kUnknown);
  Locate(0, 2);
  AnswerAll();
  EXPECT_EQ(StateOf(0), State::kHeld);
  EXPECT_EQ(StateOf(1), State::kAbsent);
  EXPECT_THAT(*Locate(0, 2), SizeIs(2));  // nobody is asked
  EXPECT_THAT(calls_.waiting, IsEmpty());
  Advance(absl::Seconds(1));
  EXPECT_EQ(StateOf(0), State::kHeld);
  EXPECT_EQ(StateOf(1), State::kUnknown);
  Locate(0, 2);
  ASSERT_THAT(calls_.waiting, SizeIs(1));
  EXPECT_EQ(ParseFind(calls_.waiting[0].message)->sections[0].keys,
            std::vector{Key(1)});
  Advance(absl::Seconds(9));
  EXPECT_EQ(StateOf(0), State::kUnknown);
}

TEST_F(LocatorTest, WhatIsBeingAskedIsNotAskedAgain) {
  const auto one = Locate(0, 60);
  const auto two = Locate(0, 64);
  const auto three = Locate(30, 50);
  EXPECT_THAT(calls_.waiting, SizeIs(2));
  EXPECT_EQ(locator_->GetStats().merged, 60 + 20);
  AnswerOne();
  EXPECT_THAT(*one, SizeIs(60));
  EXPECT_THAT(*two, IsEmpty());
  EXPECT_THAT(*three, SizeIs(20));
  AnswerOne();
  EXPECT_THAT(*two, SizeIs(64));
}

TEST_F(LocatorTest, TheDeadlineEndsTheWaitingNotTheQuestion) {
  holders_[Key(0)] = {1};
  holders_[Key(64)] = {1};
  const auto result = Locate(0, 65, absl::Milliseconds(20));
  ASSERT_THAT(calls_.waiting, SizeIs(2));
  AnswerOne();
  Advance(absl::Milliseconds(19));
  EXPECT_THAT(*result, IsEmpty());
  Advance(absl::Milliseconds(1));
  ASSERT_THAT(*result, SizeIs(65));
  EXPECT_NE((*result)[0].state, (*result)[64].state);
  result->clear();
  AnswerOne();
  EXPECT_THAT(*result, IsEmpty());  // once
  EXPECT_EQ(StateOf(0), State::kHeld);
  EXPECT_EQ(StateOf(64), State::kHeld);
}

TEST_F(LocatorTest, WhoDoesNotAnswerIsLeftAlone) {
  for (const StatusOr<std::string>& answer :
       {StatusOr<std::string>(absl::UnavailableError("gone")),
        StatusOr<std::string>("nonsense"),
        StatusOr<std::string>(Encode(FindAnswer{}))}) {
    const auto result = Locate(0, 10);
    ASSERT_THAT(calls_.waiting, SizeIs(1));
    calls_.Take().Answer(answer);
    ASSERT_THAT(*result, SizeIs(10));
    EXPECT_EQ((*result)[0].state, State::kUnknown);
    EXPECT_THAT(*Locate(0, 10), SizeIs(10));  // at once, of no use
    EXPECT_THAT(calls_.waiting, IsEmpty());
    Advance(absl::Seconds(1));
  }
  const auto result = Locate(0, 10);
  AnswerAll();
  EXPECT_EQ((*result)[0].state, State::kAbsent);
  EXPECT_EQ(locator_->GetStats().failures, 3);
}

TEST_F(LocatorTest, NodesThatAreGoneHaveNothing) {
  holders_[Key(0)] = {20, 1};
  holders_[Key(1)] = {20};
  Locate(0, 2);
  AnswerAll();
  SetNodes(19);
  const auto locations = locator_->Find(scope_, std::span(ids_).first(2), 0);
  ASSERT_THAT(locations[0].holders, SizeIs(1));
  EXPECT_EQ(locations[0].holders[0].node, TestNode(1).id);
  EXPECT_EQ(locations[1].state, State::kUnknown);  // who else has it?
}

TEST_F(LocatorTest, ThisNodeIsNoOtherNode) {
  holders_[Key(0)] = {0};
  Locate(0, 1);
  AnswerAll();
  EXPECT_EQ(StateOf(0), State::kAbsent);
}

TEST_F(LocatorTest, AHolderThatDidNotHaveItIsForgotten) {
  holders_[Key(0)] = {1, 2};
  Locate(0, 1);
  AnswerAll();
  locator_->Forget(Key(0), TestNode(1).id);
  const auto locations = locator_->Find(scope_, std::span(ids_).first(1), 0);
  ASSERT_THAT(locations[0].holders, SizeIs(1));
  EXPECT_EQ(locations[0].holders[0].node, TestNode(2).id);
  locator_->Forget(Key(0), TestNode(2).id);
  EXPECT_EQ(StateOf(0), State::kAbsent);
  Advance(absl::Seconds(1));
  EXPECT_EQ(StateOf(0), State::kUnknown);
  locator_->Forget(Key(5), TestNode(2).id);  // never heard of
}

TEST_F(LocatorTest, AHotAnchorIsAskedAboutAtOneOfItsDirectories) {
  directories_ = 3;
  Locate(0, 1);
  AnswerAll();
  std::set<NodeId> asked;
  for (int i = 0; i < 64; ++i) {  // askers
    Locator other({TestNode(100 + i).id, &calls_, &clock_, &executor_, &own_},
                  {});
    other.SetView(rendezvous_);
    const auto ask = [&](size_t chunk) {
      other.Locate(scope_, std::span(ids_).first(chunk + 1), chunk,
                   absl::InfiniteFuture(), [](const auto&) {});
      AnswerAll();
    };
    ask(1);  // learns of it from the first
    ask(2);
    asked.insert(asked_.back());
  }
  const Homes homes = rendezvous_->Find(ComputeAnchorKey(scope_, ids_[0]), 3);
  EXPECT_EQ(asked, std::set<NodeId>(homes.begin(), homes.end()));
}

TEST_F(LocatorTest, ItsMemoryIsBounded) {
  LocatorOptions options;
  options.chunks_max = 100;
  Open(options);
  SetNodes(5);
  for (size_t i = 0; i < 1000; ++i) {
    Locate(i, i + 1);
    AnswerAll();
    EXPECT_LE(locator_->GetStats().remembered, 100);
    EXPECT_EQ(StateOf(i), State::kAbsent);
  }
}

TEST_F(LocatorTest, WithoutAViewNothingIsKnownAndNobodyAsked) {
  Open({});
  const auto result = Locate(0, 3);
  ASSERT_THAT(*result, SizeIs(3));
  EXPECT_EQ((*result)[0].state, State::kUnknown);
  EXPECT_THAT(*Locate(3, 3), IsEmpty());
}

TEST_F(LocatorTest, ThisNodesOwnDirectoryIsAskedWithoutACall) {
  rendezvous_ = RendezvousOf({TestNode(0), TestNode(1, 1, true)});
  locator_->SetView(rendezvous_);
  own_.SetView(rendezvous_);
  Announce announce;
  announce.incarnation = announce.sequence = 1;
  announce.sections.push_back(
      {ComputeAnchorKey(scope_, ids_[0]), {{Key(0), TestFacts()}}});
  ASSERT_TRUE(own_.Handle(TestNode(1).id, Encode(announce)).ok());
  const auto result = Locate(0, 2);
  EXPECT_THAT(calls_.waiting, IsEmpty());
  ASSERT_THAT(*result, SizeIs(2));
  EXPECT_EQ((*result)[0].state, State::kHeld);
  EXPECT_EQ((*result)[1].state, State::kAbsent);
}

TEST_F(LocatorTest, NothingRunsAfterItsEnd) {
  const auto result = Locate(0, 3);
  locator_.reset();
  calls_.Take().Answer(Encode(FindAnswer{}));
  Advance(absl::Minutes(1));
  EXPECT_THAT(*result, IsEmpty());
}

}  // namespace
}  // namespace larder
