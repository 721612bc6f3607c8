// Chunks that come part after part, and those who wait for them.

#include <cstdint>
#include <optional>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/store/engine_rig.h"

namespace larder {
namespace {

using ::testing::ElementsAre;
using ::testing::SizeIs;

constexpr uint32_t kAll = UINT32_MAX;

class ArrivalTest : public testing::Test {
 protected:
  void SetUp() override {
    GroupDescriptor group = SmallGroup(GroupKind::kFullAttention);
    group.layer_count = 4;
    group.layer_digest = "0-3";
    space_ =
        rig_.Open(SmallSpace({group, SmallGroup(GroupKind::kSlidingWindow)}));
    client_ = rig_.Client();
  }

  static std::vector<ChunkId> Ids(uint32_t count) {
    std::vector<ChunkId> ids;
    for (uint32_t i = 0; i < count; ++i) ids.push_back(OracleChunkId(1 + i));
    return ids;
  }
  // Layers of chunk `place` of the prompt Ids(), of these heads.
  void Save(uint32_t place, uint16_t layer, uint16_t layers = 1,
            uint16_t head = 0, uint16_t heads = 2) {
    SaveSpec spec;
    spec.id = OracleChunkId(1 + place);
    if (place > 0) spec.parent = OracleChunkId(place);
    spec.place = place;
    spec.shape = WholePart(rig_.spaces.at(space_).groups[0]);
    spec.shape->layer_begin = layer;
    spec.shape->layer_count = layers;
    spec.shape->head_begin = head;
    spec.shape->head_count = heads;
    const SaveResult saved = rig_.Save(client_, space_, spec);
    ASSERT_TRUE(saved.Reached(SaveStage::kVolatile)) << saved.error();
  }

  struct Waiting {
    std::optional<std::vector<uint32_t>> layers;
  };
  std::shared_ptr<Waiting> Await(const std::vector<ChunkId>& ids,
                                 uint32_t layers, GroupMask groups = 1,
                                 absl::Duration patience = absl::Seconds(10)) {
    auto waiting = std::make_shared<Waiting>();
    const std::vector<GroupMask> masks(ids.size(), groups);
    AwaitRequest request;
    request.space = space_;
    request.ids = ids;
    request.groups = masks;
    request.layers = layers;
    request.deadline = rig_.clock.Now() + patience;
    rig_.engine->Await(request, [waiting](std::vector<uint32_t> here) {
      EXPECT_FALSE(waiting->layers.has_value());
      waiting->layers = std::move(here);
    });
    return waiting;
  }

  HoldRequest Layers(const std::vector<ChunkId>& ids, uint16_t begin,
                     uint16_t end) {
    HoldRequest request = rig_.Ask(client_, space_, ids);
    request.layer_begin = begin;
    request.layer_end = end;
    return request;
  }

  EngineRig rig_;
  SpaceId space_;
  ClientId client_{};
};

TEST_F(ArrivalTest, ToldWhenAllChunksHaveTheLayers) {
  const std::vector<ChunkId> ids = Ids(2);
  const auto first = Await(ids, 1);
  const auto third = Await(ids, 3);
  const auto all = Await(ids, kAll);
  Save(0, 0);
  EXPECT_FALSE(first->layers.has_value());
  Save(1, 0);
  ASSERT_TRUE(first->layers.has_value());
  EXPECT_THAT(*first->layers, ElementsAre(1, 1));
  Save(0, 2);  // not in order
  Save(1, 1, 2);
  EXPECT_FALSE(third->layers.has_value());
  Save(0, 1);
  ASSERT_TRUE(third->layers.has_value());
  EXPECT_THAT(*third->layers, ElementsAre(3, 3));
  Save(0, 3);
  EXPECT_FALSE(all->layers.has_value());
  Save(1, 3);
  ASSERT_TRUE(all->layers.has_value());
  EXPECT_THAT(*all->layers, ElementsAre(kAll, kAll));
  // What is there is told at once.
  EXPECT_THAT(Await(ids, 2)->layers, testing::Optional(SizeIs(2)));
}

TEST_F(ArrivalTest, ALayerHasAllItsHeads) {
  const auto first = Await(Ids(1), 1);
  Save(0, 0, 1, 0, 1);
  EXPECT_FALSE(first->layers.has_value());
  Save(0, 0, 1, 1, 1);
  EXPECT_TRUE(first->layers.has_value());
}

TEST_F(ArrivalTest, OnlyTheGroupsThatAreWaitedFor) {
  const auto other = Await(Ids(1), 1, 2);
  const auto both = Await(Ids(1), 1, 3);
  const auto none = Await(Ids(1), 1, 0);
  EXPECT_TRUE(none->layers.has_value());
  Save(0, 0, 4);
  EXPECT_FALSE(other->layers.has_value());
  EXPECT_FALSE(both->layers.has_value());
  SaveSpec spec;
  spec.id = OracleChunkId(1);
  spec.group = GroupIndex{1};
  EXPECT_TRUE(rig_.Save(client_, space_, spec).error().ok());
  EXPECT_TRUE(other->layers.has_value());
  EXPECT_TRUE(both->layers.has_value());
}

TEST_F(ArrivalTest, TheDeadlineTellsWhatIsThere) {
  const auto waiting = Await(Ids(3), 2, 1, absl::Seconds(1));
  const auto late = Await(Ids(3), 2, 1, absl::ZeroDuration());
  EXPECT_THAT(late->layers, testing::Optional(ElementsAre(0, 0, 0)));
  Save(0, 0, 4);
  Save(1, 0);
  rig_.Pass(absl::Seconds(1));
  EXPECT_THAT(waiting->layers, testing::Optional(ElementsAre(kAll, 1, 0)));
  Save(2, 0, 4);
}

TEST_F(ArrivalTest, OneIdTwiceAndManyWhoWait) {
  const ChunkId id = OracleChunkId(1);
  std::vector<std::shared_ptr<Waiting>> all;
  for (int i = 0; i < 100; ++i) all.push_back(Await({id, id}, 1));
  Save(0, 0);
  for (const auto& waiting : all) {
    EXPECT_THAT(waiting->layers, testing::Optional(ElementsAre(1, 1)));
  }
}

TEST_F(ArrivalTest, ChunksOfAnOlderEpochAreNotThere) {
  Save(0, 0, 4);
  rig_.engine->AdvanceEpoch({}, space_, [](const StatusOr<Epoch>&) {});
  rig_.Run();
  const auto waiting = Await(Ids(1), 1);
  EXPECT_FALSE(waiting->layers.has_value());
  Save(0, 0);
  EXPECT_TRUE(waiting->layers.has_value());
}

TEST_F(ArrivalTest, WholeChunksCountInWhateverTier) {
  Save(0, 0, 4);
  rig_.Crash();
  client_ = rig_.Client();
  EXPECT_EQ(rig_.State(space_, OracleChunkId(1)), ChunkState::kDurable);
  EXPECT_THAT(Await(Ids(1), kAll)->layers,
              testing::Optional(ElementsAre(kAll)));
}

TEST_F(ArrivalTest, HoldsTheLayersThatAreThere) {
  const std::vector<ChunkId> ids = Ids(2);
  Save(0, 0, 2);
  Save(0, 2);
  Save(1, 0, 4);
  // Not the whole chunk.
  const auto whole = rig_.Hold(client_, space_, ids);
  ASSERT_TRUE(whole.ok());
  EXPECT_EQ(whole->chunks[0].reason, MissReason::kIncomplete);

  const auto hold = rig_.engine->Hold(Layers(ids, 0, 2), rig_.Progress());
  ASSERT_TRUE(hold.ok());
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ(hold->chunks[i].state, ChunkState::kReady);
    EXPECT_THAT(hold->chunks[i].parts, SizeIs(1));
    EXPECT_TRUE(rig_.Read(space_, ids[i], hold->chunks[i]).ok());
  }
  const auto next = rig_.engine->Hold(Layers(ids, 1, 3), rig_.Progress());
  ASSERT_TRUE(next.ok());
  EXPECT_THAT(next->chunks[0].parts, SizeIs(2));
  EXPECT_TRUE(rig_.Read(space_, ids[0], next->chunks[0]).ok());
  const auto last = rig_.engine->Hold(Layers(ids, 3, 4), rig_.Progress());
  ASSERT_TRUE(last.ok());
  EXPECT_EQ(last->chunks[0].reason, MissReason::kIncomplete);
}

TEST_F(ArrivalTest, WhatIsHeldStaysWhenTheRestNeverComes) {
  Save(0, 0);
  const auto hold = rig_.engine->Hold(Layers(Ids(1), 0, 1), rig_.Progress());
  ASSERT_TRUE(hold.ok());
  rig_.engine->RenewHold(client_, hold->hold, absl::Hours(1)).IgnoreError();
  rig_.Pass(rig_.options.incomplete_ttl + absl::Seconds(1));
  EXPECT_EQ(rig_.engine->Stats().chunks, 0u);
  EXPECT_TRUE(rig_.Read(space_, OracleChunkId(1), hold->chunks[0]).ok());
  EXPECT_TRUE(rig_.engine->ReleaseHold(client_, hold->hold).ok());
  EXPECT_EQ(rig_.dram->Usage().used_bytes, 0u);
}

TEST_F(ArrivalTest, AnEngineThatGoesTellsNobody) {
  const auto waiting = Await(Ids(1), 1, 1, absl::Seconds(1));
  rig_.engine.reset();
  rig_.Pass(absl::Seconds(2));
  EXPECT_FALSE(waiting->layers.has_value());
}

}  // namespace
}  // namespace larder
