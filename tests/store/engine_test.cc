#include "store/engine.h"

#include <algorithm>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/store/engine_rig.h"

namespace larder {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::Pair;
using testing::SizeIs;

constexpr TenantId kOther{7};
constexpr uint64_t kChunkPages = 8_KiB;  // a whole small chunk

ChunkId Id(uint64_t n) {
  return OracleChunkId(n);
}

SaveSpec Spec(uint64_t n) {
  SaveSpec spec;
  spec.id = Id(n);
  return spec;
}

PartShape Shape(uint16_t layer, uint16_t layers, uint16_t head,
                uint16_t heads) {
  return {layer, layers, head, heads, 0, 1};
}

EngineOptions OnEvict() {
  EngineOptions options;
  options.write_back = EngineOptions::WriteBack::kOnEvict;
  return options;
}

std::string Message(const Status& status) {
  return std::string(status.message());
}

// ---- Saving and reading back ----

TEST(Engine, SavedChunkIsMatchedHeldAndReadBack) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = rig.SaveChain(client, space, 0, 4);

  const MatchResult match = rig.Match(space, ids);
  EXPECT_EQ(match.usable, 4u);
  EXPECT_EQ(match.reason, MissReason::kNone);
  EXPECT_THAT(match.group_hits, ElementsAre(4));
  EXPECT_GT(match.load_estimate, absl::ZeroDuration());

  const auto hold = rig.Hold(client, space, ids);
  ASSERT_TRUE(hold.ok()) << hold.status();
  for (size_t i = 0; i < ids.size(); ++i) {
    EXPECT_EQ(hold->chunks[i].state, ChunkState::kReady);
    EXPECT_TRUE(rig.Read(space, ids[i], hold->chunks[i]).ok());
  }
  EXPECT_TRUE(rig.engine->ReleaseHold(client, hold->hold).ok());
  EXPECT_EQ(rig.engine->Stats().holds, 0u);
}

TEST(Engine, StagesComeInOrderAndDurableOnlyWhenWanted) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  SaveSpec spec = Spec(1);
  spec.want_durable = true;
  const SaveResult durable = rig.Save(client, space, spec);
  ASSERT_THAT(durable.calls, SizeIs(3));
  EXPECT_EQ(durable.calls[0].first, SaveStage::kSourceReusable);
  EXPECT_EQ(durable.calls[1].first, SaveStage::kVolatile);
  EXPECT_EQ(durable.calls[2].first, SaveStage::kDurable);
  EXPECT_TRUE(durable.Reached(SaveStage::kDurable));
  EXPECT_EQ(rig.disk->Records(Id(1)), 1);

  EXPECT_THAT(rig.Save(client, space, Spec(2)).calls, SizeIs(2));
}

TEST(Engine, WithoutADurableTierDurableIsAnErrorAfterVolatile) {
  EngineRig rig({}, 1_MiB, 0, false);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  SaveSpec spec = Spec(1);
  spec.want_durable = true;
  const SaveResult saved = rig.Save(client, space, spec);
  EXPECT_TRUE(saved.Reached(SaveStage::kVolatile));
  EXPECT_TRUE(absl::IsFailedPrecondition(saved.error()));
}

TEST(Engine, NothingIsVisibleBeforeCommit) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  OracleRecord record = rig.Record(space, Spec(1));
  const auto reservation =
      rig.Reserve(client, space, Spec(1), record.meta.record_bytes);
  ASSERT_TRUE(reservation.ok());
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kPending);
  EXPECT_EQ(rig.Match(space, {Id(1)}).usable, 0u);
  EXPECT_EQ(rig.Match(space, {Id(1)}).reason, MissReason::kIncomplete);
  ASSERT_TRUE(rig.engine->Abort(client, *reservation).ok());
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kMiss);
  EXPECT_EQ(rig.dram->extents(), 0u);
}

TEST(Engine, SameChunkAgainSucceedsWithoutCopying) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  ASSERT_TRUE(rig.Save(client, space, Spec(1)).error().ok());
  EXPECT_TRUE(absl::IsAlreadyExists(rig.Save(client, space, Spec(1)).reserve));

  // Two at once, both reserved before either was there: other bytes lose.
  SaveSpec first = Spec(2), second = Spec(2);
  second.version = 9;
  const auto a = rig.StartSave(client, space, first);
  const auto b = rig.StartSave(client, space, second);
  rig.Run();
  EXPECT_TRUE(a->Reached(SaveStage::kVolatile));
  EXPECT_TRUE(b->Reached(SaveStage::kVolatile));
  const auto hold = rig.Hold(client, space, {Id(2)});
  EXPECT_TRUE(rig.Read(space, Id(2), hold->chunks[0], 1).ok());
  EXPECT_THAT(rig.Events(EventType::kSaveRejected), IsEmpty());
  EXPECT_THAT(rig.Events(EventType::kChunkCorrupt), IsEmpty());
  EXPECT_EQ(rig.dram->extents(), 2u);
}

TEST(Engine, CommitOfWhatIsThereByThenReadsNothing) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  OracleRecord record = rig.Record(space, Spec(1));
  const auto reservation =
      rig.Reserve(client, space, Spec(1), record.meta.record_bytes);
  ASSERT_TRUE(reservation.ok());
  ASSERT_TRUE(rig.Save(client, space, Spec(1)).error().ok());
  std::memset(record.bytes.data(), 0, record.bytes.size());
  auto result = std::make_shared<SaveResult>();
  SaveSpec spec = Spec(1);
  spec.want_durable = true;
  rig.Commit(client, *reservation, std::move(record), spec, result);
  rig.Run();
  EXPECT_TRUE(result->Reached(SaveStage::kDurable)) << result->error();
  EXPECT_EQ(rig.dram->extents(), 1u);
}

TEST(Engine, IdMayBeBoundAtCommit) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  SaveSpec spec = Spec(1);
  spec.bind_id = false;
  EXPECT_TRUE(rig.Save(client, space, spec).Reached(SaveStage::kVolatile));
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kReady);
}

TEST(Engine, BetterLineageReplacesWorse) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  SaveSpec lossy = Spec(1);
  lossy.lineage = Lineage::kLossyFinest;
  lossy.version = 5;
  ASSERT_TRUE(rig.Save(client, space, lossy).error().ok());
  EXPECT_EQ(rig.Match(space, {Id(1)}).reason, MissReason::kLineage);
  rig.worst_lineage = Lineage::kLossyFinest;
  const auto old = rig.Hold(client, space, {Id(1)});
  EXPECT_EQ(old->chunks[0].state, ChunkState::kReady);

  ASSERT_TRUE(rig.Save(client, space, Spec(1)).Reached(SaveStage::kVolatile));
  rig.worst_lineage = Lineage::kExact;
  const auto hold = rig.Hold(client, space, {Id(1)});
  EXPECT_TRUE(rig.Read(space, Id(1), hold->chunks[0], 1).ok());
  // The reader of the worse one keeps it until it lets go.
  EXPECT_TRUE(rig.Read(space, Id(1), old->chunks[0], 5).ok());
  EXPECT_EQ(rig.dram->extents(), 2u);
  ASSERT_TRUE(rig.engine->ReleaseHold(client, old->hold).ok());
  ASSERT_TRUE(rig.engine->ReleaseHold(client, hold->hold).ok());
  rig.Run();
  EXPECT_EQ(rig.dram->extents(), 1u);
  EXPECT_EQ(rig.disk->Records(Id(1)), 1);
  // And a worse one changes nothing.
  EXPECT_TRUE(absl::IsAlreadyExists(rig.Save(client, space, lossy).reserve));
}

TEST(Engine, LineageIsInheritedFromTheParent) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  SaveSpec parent = Spec(1);
  parent.lineage = Lineage::kApproximate;
  ASSERT_TRUE(rig.Save(client, space, parent).error().ok());
  SaveSpec child = Spec(2);
  child.parent = Id(1);
  child.place = 1;
  ASSERT_TRUE(rig.Save(client, space, child).error().ok());
  EXPECT_EQ(rig.engine->Stat(TenantId{}, Id(2))->lineage,
            Lineage::kApproximate);
  EXPECT_EQ(rig.Why(space, Id(2)), MissReason::kNone);
  const auto hold = rig.Hold(client, space, {Id(2)});
  EXPECT_EQ(hold->chunks[0].reason, MissReason::kLineage);
}

// ---- Parts ----

TEST(Engine, ChunkIsVisibleWhenItsPartsTileTheGroup) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  SaveSpec spec = Spec(1);
  for (const PartShape shape : {Shape(0, 1, 0, 1), Shape(1, 1, 0, 2)}) {
    spec.shape = shape;
    ASSERT_TRUE(rig.Save(client, space, spec).Reached(SaveStage::kVolatile));
    EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kPending);
    EXPECT_EQ(rig.Match(space, {Id(1)}).reason, MissReason::kIncomplete);
  }
  EXPECT_EQ(rig.engine->Stats().incomplete_chunks, 1u);
  EXPECT_THAT(rig.Events(EventType::kChunkStored), IsEmpty());
  spec.shape = Shape(0, 1, 1, 1);
  ASSERT_TRUE(rig.Save(client, space, spec).Reached(SaveStage::kVolatile));
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kReady);
  EXPECT_EQ(rig.engine->Stats().incomplete_chunks, 0u);
  const auto hold = rig.Hold(client, space, {Id(1)});
  EXPECT_THAT(hold->chunks[0].parts, SizeIs(3));
  EXPECT_TRUE(rig.Read(space, Id(1), hold->chunks[0]).ok());
}

TEST(Engine, OverlapWithAnotherShapeIsRefusedWithAReason) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  SaveSpec spec = Spec(1);
  spec.shape = Shape(0, 1, 0, 2);
  ASSERT_TRUE(rig.Save(client, space, spec).error().ok());
  spec.shape = Shape(0, 2, 1, 1);
  const SaveResult refused = rig.Save(client, space, spec);
  EXPECT_TRUE(absl::IsFailedPrecondition(refused.error()));
  const auto events = rig.Events(EventType::kSaveRejected);
  ASSERT_THAT(events, SizeIs(1));
  EXPECT_THAT(events[0].detail, HasSubstr("overlaps"));
  EXPECT_EQ(rig.dram->extents(), 1u);
}

TEST(Engine, PartsMustAgreeAboutTheChunk) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  SaveSpec spec = Spec(1);
  spec.shape = Shape(0, 1, 0, 2);
  ASSERT_TRUE(rig.Save(client, space, spec).error().ok());
  spec.shape = Shape(1, 1, 0, 2);
  spec.place = 1;
  EXPECT_FALSE(rig.Save(client, space, spec).error().ok());
}

TEST(Engine, JointGroupsBecomeVisibleTogether) {
  std::vector<GroupDescriptor> groups = {SmallGroup(GroupKind::kLatent),
                                         SmallGroup(GroupKind::kIndexer),
                                         SmallGroup(GroupKind::kFullAttention)};
  for (GroupDescriptor& group : groups) {
    if (group.kind == GroupKind::kLatent || group.kind == GroupKind::kIndexer) {
      group.kv_head_count = 1;
      group.v_head_bytes = 0;
      group.joint = 1;
    }
  }
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace(groups));
  const ClientId client = rig.Client();
  SaveSpec spec = Spec(1);
  ASSERT_TRUE(rig.Save(client, space, spec).error().ok());
  EXPECT_THAT(rig.Match(space, {Id(1)}).group_hits, ElementsAre(0, 0, 0));
  spec.group = GroupIndex{2};
  ASSERT_TRUE(rig.Save(client, space, spec).error().ok());
  EXPECT_THAT(rig.Match(space, {Id(1)}).group_hits, ElementsAre(0, 0, 1));
  spec.group = GroupIndex{1};
  ASSERT_TRUE(rig.Save(client, space, spec).error().ok());
  EXPECT_THAT(rig.Match(space, {Id(1)}).group_hits, ElementsAre(1, 1, 1));
  EXPECT_EQ(rig.Match(space, {Id(1)}).usable, 1u);
}

TEST(Engine, IncompleteChunkExpires) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  SaveSpec spec = Spec(1);
  spec.shape = Shape(0, 1, 0, 2);
  ASSERT_TRUE(rig.Save(client, space, spec).error().ok());
  rig.Pass(rig.options.incomplete_ttl - absl::Seconds(1));
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kPending);
  rig.Pass(absl::Seconds(2));
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kMiss);
  EXPECT_EQ(rig.Why(space, Id(1)), MissReason::kIncomplete);
  EXPECT_EQ(rig.dram->extents(), 0u);
  EXPECT_EQ(rig.disk->extents(), 0u);
}

// ---- What is refused ----

TEST(Engine, RecordsOfAnotherGeometryAreRefused) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  // Sealed for heads of another size: verifies, but is not this space's.
  SpaceDescriptor wide = SmallSpace();
  wide.groups[0].k_head_bytes = 32;
  rig.spaces[space] = wide;
  SaveSpec spec = Spec(1);
  EXPECT_TRUE(absl::IsInvalidArgument(rig.Save(client, space, spec).error()));
  // As many bytes in all, otherwise divided.
  wide.groups[0].k_head_bytes = 24;
  wide.groups[0].v_head_bytes = 8;
  rig.spaces[space] = wide;
  EXPECT_TRUE(absl::IsInvalidArgument(rig.Save(client, space, spec).error()));
  // The other order of heads and tokens.
  wide = SmallSpace();
  wide.groups[0].layout = SegmentLayout::kTokenMajor;
  rig.spaces[space] = wide;
  EXPECT_TRUE(absl::IsInvalidArgument(rig.Save(client, space, spec).error()));
  EXPECT_EQ(rig.dram->extents(), 0u);
  EXPECT_THAT(rig.Events(EventType::kSaveRejected), SizeIs(3));
}

TEST(Engine, TokenCountsOfChunksAndTails) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  SaveSpec tail = Spec(1);
  tail.tail_tokens = 4;
  EXPECT_TRUE(rig.Save(client, space, tail).error().ok());
  tail.id = Id(2);
  tail.tail_tokens = 3;  // not a multiple of the block
  EXPECT_FALSE(rig.Save(client, space, tail).error().ok());
  tail.tail_tokens = 8;  // a whole chunk is no tail
  EXPECT_FALSE(rig.Save(client, space, tail).error().ok());
  SaveSpec child = Spec(3);
  child.parent = Id(1);
  child.place = 1;
  EXPECT_TRUE(
      absl::IsFailedPrecondition(rig.Save(client, space, child).error()));
  SaveSpec orphan = Spec(4);
  orphan.parent = Id(99);  // unknown is fine
  orphan.place = 1;
  EXPECT_TRUE(rig.Save(client, space, orphan).error().ok());
  SaveSpec ring = Spec(5);
  ring.parent = Id(5);
  EXPECT_FALSE(rig.Save(client, space, ring).error().ok());
}

TEST(Engine, TornStagingIsRefused) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  OracleRecord record = rig.Record(space, Spec(1));
  const auto reservation =
      rig.Reserve(client, space, Spec(1), record.meta.record_bytes);
  record.bytes.data()[record.meta.record_bytes - 1] ^= std::byte{1};
  auto result = std::make_shared<SaveResult>();
  rig.Commit(client, *reservation, std::move(record), Spec(1), result);
  rig.Run();
  EXPECT_TRUE(absl::IsDataLoss(result->error()));
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kMiss);
  EXPECT_EQ(rig.dram->extents(), 0u);
}

TEST(Engine, RecordMustBeWhatWasReserved) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const SpaceId other =
      rig.Open(SmallSpace({SmallGroup(GroupKind::kFullAttention),
                           SmallGroup(GroupKind::kFullAttention)}));
  const ClientId client = rig.Client();
  const auto commit = [&](const SaveSpec& reserved, OracleRecord record) {
    const auto reservation = rig.Reserve(client, space, reserved, 8_KiB);
    auto result = std::make_shared<SaveResult>();
    rig.Commit(client, *reservation, std::move(record), reserved, result);
    rig.Run();
    return result->error();
  };
  EXPECT_FALSE(commit(Spec(1), rig.Record(space, Spec(2))).ok());
  SaveSpec in_group_1 = Spec(1);
  in_group_1.group = GroupIndex{1};
  EXPECT_FALSE(commit(Spec(1), rig.Record(other, in_group_1)).ok());
  SaveSpec unbound = Spec(3);
  unbound.bind_id = false;
  EXPECT_FALSE(commit(unbound, rig.Record(other, in_group_1)).ok());
  EXPECT_TRUE(commit(Spec(1), rig.Record(space, Spec(1))).ok());
}

TEST(Engine, ReservationsAreTheirClientsOwn) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const ClientId sibling = rig.Client();
  const ClientId stranger = rig.Client(kOther);
  const auto reservation = rig.Reserve(client, space, Spec(1), 8_KiB);
  EXPECT_TRUE(
      absl::IsPermissionDenied(rig.engine->Abort(sibling, *reservation)));
  EXPECT_TRUE(absl::IsNotFound(rig.engine->Abort(stranger, *reservation)));
  auto result = std::make_shared<SaveResult>();
  rig.Commit(sibling, *reservation, rig.Record(space, Spec(1)), Spec(1),
             result);
  rig.Run();
  EXPECT_TRUE(absl::IsPermissionDenied(result->error()));
  EXPECT_TRUE(rig.engine->Abort(client, *reservation).ok());
  EXPECT_TRUE(absl::IsNotFound(rig.engine->Abort(client, *reservation)));
}

TEST(Engine, ReservationExpires) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  ASSERT_TRUE(rig.Reserve(client, space, Spec(1), 8_KiB).ok());
  rig.Pass(rig.options.reservation_ttl + absl::Seconds(1));
  EXPECT_EQ(rig.dram->extents(), 0u);
  EXPECT_EQ(rig.engine->Stats().reserved_bytes, 0u);
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kMiss);
}

TEST(Engine, BudgetsOfOneClient) {
  EngineOptions options;
  options.reserved_bytes_per_client = 16_KiB;
  options.holds_per_client = 2;
  options.held_bytes_per_client = 3 * 6_KiB;
  options.spaces_per_tenant = 2;
  EngineRig rig(options);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  ASSERT_TRUE(rig.Reserve(client, space, Spec(90), 8_KiB).ok());
  const auto second = rig.Reserve(client, space, Spec(91), 8_KiB);
  ASSERT_TRUE(second.ok());
  EXPECT_TRUE(absl::IsResourceExhausted(
      rig.Reserve(client, space, Spec(92), 1).status()));
  ASSERT_TRUE(rig.engine->Abort(client, *second).ok());
  const auto ids = rig.SaveChain(client, space, 0, 5);

  const uint64_t bytes = rig.engine->Stat(TenantId{}, ids[0])->bytes;
  const auto fit = options.held_bytes_per_client / bytes;
  const auto hold = rig.Hold(client, space, ids);
  ASSERT_TRUE(hold.ok());
  EXPECT_EQ(hold->chunks[fit - 1].state, ChunkState::kReady);
  EXPECT_EQ(hold->chunks[fit].state, ChunkState::kMiss);
  EXPECT_EQ(hold->chunks[fit].reason, MissReason::kBusy);
  EXPECT_TRUE(absl::IsResourceExhausted(rig.Hold(client, space, ids).status()));
  ASSERT_TRUE(rig.engine->ReleaseHold(client, hold->hold).ok());
  ASSERT_TRUE(rig.Hold(client, space, {ids[0]}).ok());
  ASSERT_TRUE(rig.Hold(client, space, {ids[1]}).ok());
  EXPECT_TRUE(
      absl::IsResourceExhausted(rig.Hold(client, space, {ids[2]}).status()));

  SpaceDescriptor more = SmallSpace();
  more.rope = "theta=2";
  EXPECT_TRUE(rig.engine->OpenSpace({}, more).ok());
  more.rope = "theta=3";
  EXPECT_TRUE(
      absl::IsResourceExhausted(rig.engine->OpenSpace({}, more).status()));
  EXPECT_TRUE(rig.engine->OpenSpace(kOther, more).ok());
}

// ---- Tenants ----

TEST(Engine, AnotherTenantsChunkWasNeverSeen) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  rig.Open(SmallSpace(), kOther);
  const ClientId client = rig.Client();
  const ClientId stranger = rig.Client(kOther);
  SaveSpec spec = Spec(1);
  spec.root_content = OracleDigest<Sha256Digest>(1, 9);
  ASSERT_TRUE(rig.Save(client, space, spec).error().ok());

  EXPECT_EQ(rig.State(space, Id(1), kOther), ChunkState::kMiss);
  const MatchResult mine = rig.Match(space, {Id(77)}, kOther);
  const MatchResult theirs = rig.Match(space, {Id(1)}, kOther);
  EXPECT_EQ(mine.reason, MissReason::kNeverSeen);
  EXPECT_EQ(theirs.reason, MissReason::kNeverSeen);
  EXPECT_EQ(theirs.states, mine.states);
  EXPECT_EQ(rig.engine->WhyMiss(kOther, space, Id(1), spec.root_content).reason,
            MissReason::kNeverSeen);
  EXPECT_TRUE(absl::IsNotFound(rig.engine->Stat(kOther, Id(1)).status()));
  EXPECT_THAT(rig.engine->List(kOther, {}, {}, 10), IsEmpty());
  EXPECT_TRUE(
      absl::IsNotFound(rig.engine->Evict(kOther, Id(1), false).status()));
  EXPECT_TRUE(absl::IsNotFound(rig.engine->Pin(kOther, Id(1), true)));
  const auto hold = rig.Hold(stranger, space, {Id(1)});
  ASSERT_TRUE(hold.ok());
  EXPECT_EQ(hold->hold, HoldId{});
  EXPECT_EQ(hold->chunks[0].reason, MissReason::kNeverSeen);
  // And its own chunk of that id is another.
  ASSERT_TRUE(rig.Save(stranger, space, Spec(1)).error().ok());
  EXPECT_EQ(rig.dram->extents(), 2u);
}

TEST(Engine, HoldsAreNotAttachableByOtherTenants) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const ClientId worker = rig.Client();
  const ClientId stranger = rig.Client(kOther);
  ASSERT_TRUE(rig.Save(client, space, Spec(1)).error().ok());
  const auto hold = rig.Hold(client, space, {Id(1)});
  EXPECT_TRUE(absl::IsNotFound(
      rig.engine->AttachHold(stranger, hold->hold, rig.Progress()).status()));
  EXPECT_TRUE(absl::IsNotFound(rig.engine->ReleaseHold(stranger, hold->hold)));
  EXPECT_TRUE(
      absl::IsPermissionDenied(rig.engine->ReleaseHold(worker, hold->hold)));
  EXPECT_TRUE(absl::IsPermissionDenied(
      rig.engine->RenewHold(worker, hold->hold, {}).status()));
}

// ---- Matching ----

TEST(Engine, MatchAppliesTheHitRulesOfAllGroups) {
  GroupDescriptor state = SmallGroup(GroupKind::kRecurrentState);
  state.kv_head_count = 1;
  state.layout = SegmentLayout::kOpaque;
  EngineRig rig;
  const SpaceId space =
      rig.Open(SmallSpace({SmallGroup(GroupKind::kFullAttention),
                           SmallGroup(GroupKind::kSlidingWindow), state}));
  const ClientId client = rig.Client();
  const auto save = [&](uint32_t n, std::vector<uint16_t> groups) {
    for (const uint16_t group : groups) {
      SaveSpec spec = Spec(n);
      spec.place = n;
      spec.group = GroupIndex{group};
      ASSERT_TRUE(rig.Save(client, space, spec).error().ok());
    }
  };
  save(0, {0});
  save(1, {0, 1, 2});
  save(2, {0, 1});
  save(3, {0, 1});
  const MatchResult match = rig.Match(space, {Id(0), Id(1), Id(2), Id(3)});
  EXPECT_THAT(match.group_hits, ElementsAre(4, 4, 2));
  EXPECT_EQ(match.usable, 2u);
  EXPECT_EQ(match.reason, MissReason::kIncomplete);
  // What the engine has itself counts as there.
  EXPECT_EQ(rig.Match(space, {Id(9), Id(1), Id(2)}, {}, 1).usable, 1u);
  EXPECT_EQ(rig.Match(space, {Id(9), Id(1)}, {}, 2).usable, 0u);
  EXPECT_EQ(rig.Match(space, {Id(9)}, {}, 5).usable, 0u);
}

TEST(Engine, NothingIsUsableBeyondATail) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  SaveSpec tail = Spec(1);
  tail.tail_tokens = 4;
  ASSERT_TRUE(rig.Save(client, space, tail).error().ok());
  ASSERT_TRUE(rig.Save(client, space, Spec(2)).error().ok());
  EXPECT_EQ(rig.Match(space, {Id(1), Id(2)}).usable, 1u);
  EXPECT_EQ(rig.Match(space, {Id(2), Id(1)}).usable, 2u);
}

TEST(Engine, MatchSaysWhichFieldOfTheSpaceDiffers) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  SpaceDescriptor other_descriptor = SmallSpace();
  other_descriptor.cache_dtype = "bf16";
  const SpaceId other = rig.Open(other_descriptor);
  const ClientId client = rig.Client();
  SaveSpec spec = Spec(1);
  spec.root_content = OracleDigest<Sha256Digest>(5, 9);
  ASSERT_TRUE(rig.Save(client, space, spec).error().ok());

  const ChunkId wanted = Id(2);
  MatchRequest request;
  request.space = other;
  request.ids = std::span(&wanted, 1);
  request.root_content = spec.root_content;
  MatchResult match = rig.engine->Match(request);
  EXPECT_EQ(match.reason, MissReason::kSpaceDiffers);
  EXPECT_EQ(match.detail, "cache_dtype");
  EXPECT_EQ(rig.engine->WhyMiss({}, other, wanted, spec.root_content).detail,
            "cache_dtype");
  // Only as long as it would be found there.
  ASSERT_TRUE(rig.engine->Evict({}, Id(1), false).ok());
  match = rig.engine->Match(request);
  EXPECT_EQ(match.reason, MissReason::kNeverSeen);
}

TEST(Engine, TouchesAreTailFirstSoThatChainsLoseTheirEnds) {
  EngineRig rig({}, 4 * kChunkPages, 1_MiB, false);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  // Without parents, only the order of use can save the first chunk.
  for (uint64_t n = 0; n < 4; ++n) {
    ASSERT_TRUE(rig.Save(client, space, Spec(n)).error().ok());
  }
  EXPECT_EQ(rig.Match(space, {Id(0), Id(1), Id(2), Id(3)}).usable, 4u);
  ASSERT_TRUE(rig.Save(client, space, Spec(10)).error().ok());
  EXPECT_EQ(rig.Match(space, {Id(0), Id(1), Id(2), Id(3)}).usable, 3u);
  EXPECT_EQ(rig.Why(space, Id(3)), MissReason::kEvicted);
}

// ---- Holds ----

TEST(Engine, HoldStopsAtTheFirstMissUnlessToldOtherwise) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  ASSERT_TRUE(rig.Save(client, space, Spec(0)).error().ok());
  ASSERT_TRUE(rig.Save(client, space, Spec(2)).error().ok());
  const std::vector<ChunkId> ids = {Id(0), Id(1), Id(2)};
  const auto prefix = rig.Hold(client, space, ids);
  EXPECT_EQ(prefix->chunks[0].state, ChunkState::kReady);
  EXPECT_EQ(prefix->chunks[1].reason, MissReason::kNeverSeen);
  EXPECT_EQ(prefix->chunks[2].state, ChunkState::kMiss);
  HoldRequest request = rig.Ask(client, space, ids);
  request.prefix_only = false;
  const auto each = rig.engine->Hold(request, rig.Progress());
  EXPECT_EQ(each->chunks[1].state, ChunkState::kMiss);
  EXPECT_EQ(each->chunks[2].state, ChunkState::kReady);
  // One and two of three were given.
  EXPECT_EQ(rig.engine->Stats().held_chunks, 3u);
  EXPECT_EQ(rig.engine->Stats().unheld_chunks, 3u);
  EXPECT_FALSE(rig.Hold(client, space, {Id(7), Id(8)})->chunks.empty());
  EXPECT_EQ(rig.engine->Stats().unheld_chunks, 5u);
}

TEST(Engine, HeldChunksAreNotEvictedAndTheRefusalSaysSo) {
  EngineRig rig({}, 2 * kChunkPages, 0, false);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  ASSERT_TRUE(rig.Save(client, space, Spec(0)).error().ok());
  ASSERT_TRUE(rig.Save(client, space, Spec(1)).error().ok());
  const auto hold = rig.Hold(client, space, {Id(0)});
  ASSERT_TRUE(rig.engine->Pin({}, Id(1), true).ok());
  const SaveResult refused = rig.Save(client, space, Spec(2));
  EXPECT_TRUE(absl::IsResourceExhausted(refused.reserve));
  EXPECT_THAT(Message(refused.reserve), HasSubstr("1 are held, 1 pinned"));
  EXPECT_EQ(rig.engine->Stats().refused_full, 1u);
  EXPECT_TRUE(rig.Read(space, Id(0), hold->chunks[0]).ok());
  ASSERT_TRUE(rig.engine->ReleaseHold(client, hold->hold).ok());
  EXPECT_TRUE(rig.Save(client, space, Spec(2)).error().ok());
  EXPECT_EQ(rig.State(space, Id(0)), ChunkState::kMiss);
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kReady);
}

TEST(Engine, ExpiredHoldIsRevokedAndItsMemoryWaitsForTheReader) {
  EngineRig rig({}, kChunkPages, 0, false);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  ASSERT_TRUE(rig.Save(client, space, Spec(0)).error().ok());
  const auto hold = rig.Hold(client, space, {Id(0)});
  rig.Pass(rig.options.hold_ttl - absl::Seconds(1));
  const auto renewed = rig.engine->RenewHold(client, hold->hold, {});
  ASSERT_TRUE(renewed.ok());
  rig.Pass(absl::Seconds(2));
  EXPECT_THAT(rig.revoked[client], IsEmpty());
  rig.Pass(rig.options.hold_ttl);
  EXPECT_THAT(rig.revoked[client],
              ElementsAre(Pair(hold->hold, MissReason::kDeadline)));
  EXPECT_THAT(rig.Events(EventType::kHoldExpired), SizeIs(1));
  EXPECT_TRUE(absl::IsFailedPrecondition(
      rig.engine->RenewHold(client, hold->hold, {}).status()));
  EXPECT_TRUE(absl::IsFailedPrecondition(
      rig.engine->AttachHold(client, hold->hold, rig.Progress()).status()));
  EXPECT_TRUE(rig.Read(space, Id(0), hold->chunks[0]).ok());
  EXPECT_TRUE(
      absl::IsResourceExhausted(rig.Save(client, space, Spec(1)).reserve));
  ASSERT_TRUE(rig.engine->ReleaseHold(client, hold->hold).ok());
  EXPECT_TRUE(rig.Save(client, space, Spec(1)).error().ok());
}

TEST(Engine, MemoryIsPinnedUntilEveryOwnerIsGone) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId scheduler = rig.Client();
  const ClientId worker = rig.Client();
  ASSERT_TRUE(rig.Save(scheduler, space, Spec(0)).error().ok());
  const auto hold = rig.Hold(scheduler, space, {Id(0)});
  const auto attached =
      rig.engine->AttachHold(worker, hold->hold, rig.Progress());
  ASSERT_TRUE(attached.ok());
  EXPECT_EQ(attached->chunks[0].parts[0].address,
            hold->chunks[0].parts[0].address);
  ASSERT_TRUE(rig.engine->ReleaseHold(scheduler, hold->hold).ok());
  ASSERT_TRUE(rig.engine->Evict({}, Id(0), false).ok());
  EXPECT_EQ(rig.State(space, Id(0)), ChunkState::kMiss);
  EXPECT_TRUE(rig.Read(space, Id(0), attached->chunks[0]).ok());
  // The id is free for a new chunk meanwhile.
  ASSERT_TRUE(rig.Save(scheduler, space, Spec(0)).error().ok());
  EXPECT_EQ(rig.dram->extents(), 2u);
  rig.engine->RemoveClient(worker);
  EXPECT_EQ(rig.dram->extents(), 1u);
  EXPECT_THAT(rig.Events(EventType::kClientGone), SizeIs(1));
}

TEST(Engine, ExtendedHoldCountsAllItsChunks) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = rig.SaveChain(client, space, 0, 3);
  const auto hold = rig.Hold(client, space, {ids[0]});
  HoldRequest more = rig.Ask(client, space, {ids});
  more.ids = std::span(ids).subspan(1);
  more.extend = hold->hold;
  const auto extended = rig.engine->Hold(more, rig.Progress());
  ASSERT_TRUE(extended.ok());
  EXPECT_EQ(extended->hold, hold->hold);
  EXPECT_THAT(extended->chunks, SizeIs(2));
  EXPECT_THAT(
      rig.engine->AttachHold(client, hold->hold, rig.Progress())->chunks,
      SizeIs(3));
  EXPECT_EQ(rig.engine->Stats().holds, 1u);
  ASSERT_TRUE(rig.engine->ReleaseHold(client, hold->hold).ok());
  EXPECT_EQ(rig.engine->Stats().held_bytes, 0u);
}

TEST(Engine, HoldIdsAreDrawnFromEntropyByDefault) {
  std::set<HoldId> seen;
  for (int i = 0; i < 4; ++i) {
    EngineRig rig;
    rig.options.id_seed = 0;
    rig.Crash();
    const SpaceId space = rig.Open(SmallSpace());
    const ClientId client = rig.Client();
    ASSERT_TRUE(rig.Save(client, space, Spec(0)).error().ok());
    EXPECT_TRUE(seen.insert(rig.Hold(client, space, {Id(0)})->hold).second);
  }
}

// ---- Demotion and promotion ----

// Memory for two chunks; `count` chunks, of which the last two are in memory.
std::vector<ChunkId> Spill(EngineRig& rig, ClientId client,
                           const SpaceId& space, uint32_t count) {
  for (uint64_t n = 0; n < count; ++n) {
    EXPECT_TRUE(rig.Save(client, space, Spec(n)).error().ok());
    rig.Run();
  }
  std::vector<ChunkId> ids;
  for (uint64_t n = 0; n < count; ++n) ids.push_back(Id(n));
  return ids;
}

TEST(Engine, EvictedFromMemoryComesBackFromTheDurableTier) {
  EngineRig rig({}, 2 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = Spill(rig, client, space, 4);
  EXPECT_EQ(rig.State(space, ids[0]), ChunkState::kDurable);
  EXPECT_EQ(rig.State(space, ids[3]), ChunkState::kReady);
  EXPECT_EQ(rig.Match(space, ids).usable, 4u);

  const auto hold = rig.Hold(client, space, {ids[0]});
  ASSERT_TRUE(hold.ok());
  EXPECT_EQ(hold->chunks[0].state, ChunkState::kPending);
  EXPECT_THAT(rig.progress, IsEmpty());
  rig.Run();
  EXPECT_THAT(rig.progress, ElementsAre(Pair(0u, MissReason::kNone)));
  EXPECT_TRUE(rig.Read(space, ids[0], hold->chunks[0]).ok());
  EXPECT_EQ(rig.State(space, ids[0]), ChunkState::kReady);
  EXPECT_GT(rig.engine->Stats().promoted_bytes, 0u);
}

TEST(Engine, TwoHoldsShareAPromotion) {
  EngineRig rig({}, 2 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = Spill(rig, client, space, 3);
  const auto a = rig.Hold(client, space, {ids[0]});
  const auto b = rig.Hold(client, space, {ids[0]});
  const auto c = rig.engine->AttachHold(client, a->hold, rig.Progress());
  EXPECT_EQ(a->chunks[0].parts[0].address, b->chunks[0].parts[0].address);
  EXPECT_EQ(c->chunks[0].state, ChunkState::kPending);
  rig.Run();
  EXPECT_EQ(rig.progress.size(), 3u);
  EXPECT_TRUE(rig.Read(space, ids[0], b->chunks[0]).ok());
  EXPECT_EQ(rig.engine->Stats().promoted_bytes,
            rig.engine->Stat(TenantId{}, ids[0])->bytes);
}

TEST(Engine, LatePromotionIsAMissInTimeAndLandsForTheNext) {
  EngineRig rig({}, 2 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = Spill(rig, client, space, 3);
  rig.disk->SetDelays(absl::Seconds(5), absl::ZeroDuration());
  HoldRequest request = rig.Ask(client, space, {ids});
  request.deadline = rig.clock.Now() + absl::Seconds(1);
  request.ids = std::span(ids).first(1);
  const auto hold = rig.engine->Hold(request, rig.Progress());
  EXPECT_EQ(hold->chunks[0].state, ChunkState::kPending);
  rig.Pass(absl::Seconds(2));
  EXPECT_THAT(rig.progress, ElementsAre(Pair(0u, MissReason::kDeadline)));
  // Released while the read still runs into its memory.
  ASSERT_TRUE(rig.engine->ReleaseHold(client, hold->hold).ok());
  rig.Pass(absl::Seconds(10));
  EXPECT_EQ(rig.State(space, ids[0]), ChunkState::kReady);
  EXPECT_EQ(rig.progress.size(), 1u);

  request.deadline = rig.clock.Now();
  request.ids = std::span(ids).subspan(1, 1);
  const auto at_once = rig.engine->Hold(request, rig.Progress());
  EXPECT_EQ(at_once->chunks[0].reason, MissReason::kDeadline);
  EXPECT_EQ(at_once->hold, HoldId{});
}

TEST(Engine, NoProgressAfterTheHoldWasReleased) {
  EngineRig rig({}, 2 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = Spill(rig, client, space, 3);
  const auto hold = rig.Hold(client, space, {ids[0]});
  ASSERT_TRUE(rig.engine->ReleaseHold(client, hold->hold).ok());
  rig.Run();
  EXPECT_THAT(rig.progress, IsEmpty());
  EXPECT_EQ(rig.State(space, ids[0]), ChunkState::kReady);
}

TEST(Engine, PromotionIsBusyWhenEverythingIsHeld) {
  EngineRig rig({}, 2 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = Spill(rig, client, space, 4);
  HoldRequest request = rig.Ask(client, space, ids);
  const std::vector<ChunkId> order = {ids[2], ids[3], ids[0]};
  request.ids = order;
  const auto hold = rig.engine->Hold(request, rig.Progress());
  EXPECT_EQ(hold->chunks[1].state, ChunkState::kReady);
  EXPECT_EQ(hold->chunks[2].reason, MissReason::kBusy);
}

TEST(Engine, PrefetchBringsUpWithoutHolding) {
  EngineRig rig({}, 2 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = Spill(rig, client, space, 4);
  rig.engine->Prefetch({}, space, std::span(ids).first(2));
  rig.Run();
  EXPECT_EQ(rig.State(space, ids[0]), ChunkState::kReady);
  EXPECT_EQ(rig.State(space, ids[1]), ChunkState::kReady);
  EXPECT_EQ(rig.engine->Stats().held_bytes, 0u);
}

TEST(Engine, CorruptDurableCopyIsAMissNeverData) {
  for (const size_t byte :
       {size_t{40}, size_t{300}, size_t{4096}, size_t{5000}}) {
    EngineRig rig({}, 2 * kChunkPages);
    const SpaceId space = rig.Open(SmallSpace());
    const ClientId client = rig.Client();
    const auto ids = Spill(rig, client, space, 3);
    ASSERT_EQ(rig.disk->Corrupt(ids[0], byte), 1);
    const auto hold = rig.Hold(client, space, {ids[0]});
    rig.Run();
    EXPECT_THAT(rig.progress, ElementsAre(Pair(0u, MissReason::kCorrupt)));
    EXPECT_EQ(rig.Why(space, ids[0]), MissReason::kCorrupt);
    EXPECT_THAT(rig.Events(EventType::kChunkCorrupt), SizeIs(1));
    EXPECT_EQ(rig.engine->Stats().corrupt, 1u);
    EXPECT_EQ(rig.disk->Records(ids[0]), 0);
  }
}

TEST(Engine, MisdirectedReadIsNotServed) {
  EngineRig rig({}, 2 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = Spill(rig, client, space, 4);
  rig.disk->Misdirect(ids[1], ids[0]);
  const auto hold = rig.Hold(client, space, {ids[0]});
  rig.Run();
  EXPECT_THAT(rig.progress, ElementsAre(Pair(0u, MissReason::kCorrupt)));
}

TEST(Engine, FailedReadIsUnavailableAndKeepsTheCopy) {
  EngineRig rig({}, 2 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = Spill(rig, client, space, 3);
  rig.disk->FailReads(1, absl::UnavailableError("injected"));
  ASSERT_TRUE(rig.Hold(client, space, {ids[0]}).ok());
  rig.Run();
  EXPECT_THAT(rig.progress, ElementsAre(Pair(0u, MissReason::kUnavailable)));
  EXPECT_EQ(rig.State(space, ids[0]), ChunkState::kDurable);
  rig.engine->Prefetch({}, space, std::span(ids).first(1));
  rig.Run();
  EXPECT_EQ(rig.State(space, ids[0]), ChunkState::kReady);
}

TEST(Engine, LargeRecordsAreReadInPieces) {
  EngineOptions options;
  options.promote_io_bytes = 4_KiB;
  EngineRig rig(options, 2 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = Spill(rig, client, space, 3);
  const auto hold = rig.Hold(client, space, {ids[0]});
  rig.executor->Shuffle(3);
  rig.Run();
  EXPECT_TRUE(rig.Read(space, ids[0], hold->chunks[0]).ok());
}

// ---- Layer by layer

struct LayersRig : EngineRig {
  static constexpr uint32_t kLayers = 5;
  static EngineOptions Options() {
    EngineOptions options;
    options.promote_io_bytes = 4_KiB;
    return options;
  }
  // A layer takes some pages.
  static SpaceDescriptor Large() {
    SpaceDescriptor large = SmallSpace();
    GroupDescriptor& group = large.groups[0];
    group.layer_count = kLayers;
    group.k_head_bytes = group.v_head_bytes = 512;  // 16 KiB a layer
    return large;
  }
  explicit LayersRig(const EngineOptions& engine_options = Options())
      : EngineRig(engine_options, 1_MiB) {
    space = Open(Large());
    client = Client();
    ids = Spill(*this, client, space, 3);
    Crash();  // nothing is in memory afterwards
    client = Client();
  }
  StatusOr<HoldReply> HoldLayers(const std::vector<ChunkId>& of) {
    HoldRequest request = Ask(client, space, of);
    request.layers_landed = [this](uint32_t index, uint32_t layers) {
      landed.emplace_back(index, layers);
    };
    return engine->Hold(request, Progress());
  }
  // OK if the first layers of the chunk lie where the reply says.
  Status ReadLayers(const HeldChunk& chunk, uint32_t layers) {
    const HeldPart& part = chunk.parts.at(0);
    const auto view =
        RecordView::Parse(dram->At(part.address).first(part.record_bytes));
    if (!view.ok()) return view.status();
    if (view->meta().checksum != part.checksum) {
      return absl::DataLossError("not the record of the reply");
    }
    return view->VerifySegments(0, layers);
  }

  SpaceId space;
  ClientId client{};
  std::vector<ChunkId> ids;
  std::vector<std::pair<uint32_t, uint32_t>> landed;
};

TEST(Engine, ByLayerTheFirstLayersOfAllChunksComeFirst) {
  LayersRig rig;
  rig.disk->SetDelays(absl::Milliseconds(1), absl::ZeroDuration());
  const auto hold = rig.HoldLayers({rig.ids[0], rig.ids[1]});
  ASSERT_TRUE(hold.ok());
  ASSERT_EQ(hold->chunks[1].state, ChunkState::kPending);
  std::map<uint32_t, uint32_t> layers;
  size_t seen = 0;
  for (int i = 0; i < 100 && rig.progress.size() < 2; ++i) {
    rig.Pass(absl::Milliseconds(1));
    for (; seen < rig.landed.size(); ++seen) {
      const auto [index, count] = rig.landed[seen];
      EXPECT_GT(count, layers[index]);
      layers[index] = count;
      EXPECT_TRUE(rig.ReadLayers(hold->chunks[index], count).ok()) << count;
      // Neither is ahead of the other by more than what is read at once.
      EXPECT_LE(std::max(layers[0], layers[1]),
                std::min(layers[0], layers[1]) + 1);
    }
  }
  EXPECT_EQ(layers[0], LayersRig::kLayers - 1);
  EXPECT_EQ(layers[1], LayersRig::kLayers - 1);
  EXPECT_THAT(rig.progress,
              testing::UnorderedElementsAre(Pair(0u, MissReason::kNone),
                                            Pair(1u, MissReason::kNone)));
  for (uint32_t i = 0; i < 2; ++i) {
    EXPECT_TRUE(rig.Read(rig.space, rig.ids[i], hold->chunks[i]).ok());
    EXPECT_EQ(rig.State(rig.space, rig.ids[i]), ChunkState::kReady);
  }
}

TEST(Engine, ByLayerOnlyWhatIsBeingReadCountsAsUnderWay) {
  EngineOptions options = LayersRig::Options();
  options.promote_bytes_in_flight = 96_KiB;  // less than a chunk
  {
    LayersRig rig(options);
    const auto hold = rig.Hold(rig.client, rig.space, rig.ids);
    ASSERT_TRUE(hold.ok());
    EXPECT_EQ(hold->chunks[0].state, ChunkState::kPending);
    EXPECT_EQ(hold->chunks[1].reason, MissReason::kBusy);
  }
  LayersRig rig(options);
  const auto hold = rig.HoldLayers(rig.ids);
  ASSERT_TRUE(hold.ok());
  rig.Run();
  for (size_t i = 0; i < rig.ids.size(); ++i) {
    EXPECT_EQ(hold->chunks[i].reason, MissReason::kNone) << i;
    EXPECT_TRUE(rig.Read(rig.space, rig.ids[i], hold->chunks[i]).ok()) << i;
  }
  // Nothing of it is counted any more.
  rig.Crash();
  const ClientId client = rig.Client();
  const auto again = rig.Hold(client, rig.space, {rig.ids[0]});
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->chunks[0].reason, MissReason::kNone);
}

TEST(Engine, ByLayerWhatWasToldOfStaysUntilTheRelease) {
  LayersRig rig;
  // The last layer is bad.
  ASSERT_EQ(rig.disk->Corrupt(rig.ids[0], 4_KiB + 4 * 16_KiB + 100), 1);
  const uint64_t before = rig.dram->Usage().used_bytes;
  const auto hold = rig.HoldLayers({rig.ids[0]});
  ASSERT_TRUE(hold.ok());
  rig.Run();
  EXPECT_THAT(rig.progress, ElementsAre(Pair(0u, MissReason::kCorrupt)));
  EXPECT_THAT(rig.landed, ElementsAre(Pair(0u, 1u), Pair(0u, 2u), Pair(0u, 3u),
                                      Pair(0u, 4u)));
  EXPECT_TRUE(rig.ReadLayers(hold->chunks[0], 4).ok());
  EXPECT_TRUE(rig.engine->ReleaseHold(rig.client, hold->hold).ok());
  rig.Run();
  EXPECT_EQ(rig.dram->Usage().used_bytes, before);
  EXPECT_EQ(rig.Why(rig.space, rig.ids[0]), MissReason::kCorrupt);
}

TEST(Engine, ByLayerAndWholeShareAPromotion) {
  for (const bool whole_first : {false, true}) {
    LayersRig rig;
    const auto hold_one = [&](bool whole) {
      return whole ? rig.Hold(rig.client, rig.space, {rig.ids[0]})
                   : rig.HoldLayers({rig.ids[0]});
    };
    const auto a = hold_one(whole_first);
    const auto b = hold_one(!whole_first);
    ASSERT_TRUE(a.ok() && b.ok());
    rig.Run();
    EXPECT_THAT(rig.progress, ElementsAre(Pair(0u, MissReason::kNone),
                                          Pair(0u, MissReason::kNone)));
    // Who comes to one that reads all at once is told of that alone.
    EXPECT_EQ(rig.landed.empty(), whole_first);
    EXPECT_TRUE(rig.Read(rig.space, rig.ids[0], a->chunks[0]).ok());
    EXPECT_TRUE(rig.Read(rig.space, rig.ids[0], b->chunks[0]).ok());
  }
}

TEST(Engine, PromotionsKeepToTheirRate) {
  EngineOptions options;
  options.promote_io_bytes = 4_KiB;
  const uint64_t bytes = kChunkPages;  // of a chunk's record
  options.promote_rate.steps = {{bytes, absl::Seconds(1)},
                                {0, absl::Seconds(3)}};
  EngineRig rig(options, 2 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = Spill(rig, client, space, 4);
  const std::vector<StoredChunk> about =
      rig.engine->Describe(TenantId{}, space, ids, Lineage::kExact);
  ASSERT_EQ(about.size(), 4U);
  EXPECT_EQ(about[0].state, ChunkState::kDurable);
  EXPECT_GT(about[0].bytes_to_read, bytes - kPageBytes);
  EXPECT_LE(about[0].bytes_to_read, bytes);
  EXPECT_EQ(about[3].state, ChunkState::kReady);
  EXPECT_EQ(about[3].bytes_to_read, 0U);
  EXPECT_GT(about[3].token_count, 0U);

  const auto hold = rig.Hold(client, space, {ids[0], ids[1]});
  ASSERT_TRUE(hold.ok());
  rig.Pass(absl::Milliseconds(990));
  EXPECT_THAT(rig.progress, IsEmpty());
  rig.Pass(absl::Milliseconds(20));
  EXPECT_THAT(rig.progress, ElementsAre(Pair(0u, MissReason::kNone)));
  rig.Pass(absl::Milliseconds(3970));
  EXPECT_EQ(rig.progress.size(), 1U);
  rig.Pass(absl::Milliseconds(40));
  EXPECT_EQ(rig.progress.size(), 2U);
  EXPECT_TRUE(rig.Read(space, ids[1], hold->chunks[1]).ok());
}

TEST(Engine, ARateThatMovesNothingIsRefused) {
  for (const RateSchedule::Step step :
       {RateSchedule::Step{0, absl::Seconds(1)},
        RateSchedule::Step{5, absl::ZeroDuration()}}) {
    EngineOptions options;
    options.promote_rate.steps = {step};
    EXPECT_THAT(Engine::Open(options, {}).status().message(),
                testing::HasSubstr("promote_rate"));
  }
}

TEST(Engine, DescribesWhatIsMissing) {
  EngineRig rig({}, 2 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const std::vector<ChunkId> ids(2);
  for (const SpaceId& where : {space, SpaceId{}}) {
    const auto about =
        rig.engine->Describe(TenantId{}, where, ids, Lineage::kExact);
    ASSERT_EQ(about.size(), 2U);
    EXPECT_EQ(about[1].state, ChunkState::kMiss);
    EXPECT_EQ(about[1].reason, MissReason::kNeverSeen);
    EXPECT_EQ(about[1].bytes_to_read, 0U);
  }
}

// ---- Write-back ----

TEST(Engine, UnwrittenChunkGoesOnlyWhenNothingElseDoes) {
  EngineOptions options;
  options.write_back_bytes_in_flight = 1;  // one at a time
  EngineRig rig(options, 3 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  ASSERT_TRUE(rig.Save(client, space, Spec(0)).error().ok());
  rig.disk->SetDelays({}, absl::Seconds(10));
  // 1 is being written, 2 waits; 0 is written, but was used last.
  ASSERT_TRUE(rig.Save(client, space, Spec(1)).error().ok());
  ASSERT_TRUE(rig.Save(client, space, Spec(2)).error().ok());
  rig.Match(space, {Id(0)});
  ASSERT_TRUE(rig.Save(client, space, Spec(3)).error().ok());
  EXPECT_EQ(rig.State(space, Id(0)), ChunkState::kDurable);
  // Now only unwritten ones: 2 is given up, 1 cannot be (its memory is read).
  ASSERT_TRUE(rig.Save(client, space, Spec(4)).error().ok());
  EXPECT_EQ(rig.Why(space, Id(2)), MissReason::kEvicted);
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kReady);
  // What somebody waits for is not given up at all.
  rig.Pass(absl::Minutes(2));
  SaveSpec wanted = Spec(10);
  for (uint64_t n = 10; n < 13; ++n) {
    wanted.id = Id(n);
    wanted.want_durable = true;
    ASSERT_TRUE(rig.Save(client, space, wanted).Reached(SaveStage::kVolatile));
  }
  const SaveResult refused = rig.Save(client, space, Spec(13));
  EXPECT_TRUE(absl::IsResourceExhausted(refused.reserve));
  EXPECT_THAT(Message(refused.reserve), HasSubstr("3 wait for write-back"));
  EXPECT_GT(rig.engine->Stats().durable_backlog_bytes, 0u);
  rig.Pass(absl::Minutes(2));
  EXPECT_EQ(rig.engine->Stats().durable_backlog_bytes, 0u);
}

TEST(Engine, OnEvictWritesOnlyWhatLeavesMemory) {
  EngineRig rig(OnEvict(), 4 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  for (uint64_t n = 0; n < 3; ++n) {
    ASSERT_TRUE(rig.Save(client, space, Spec(n)).error().ok());
  }
  EXPECT_EQ(rig.disk->extents(), 0u);
  SaveSpec wanted = Spec(3);
  wanted.want_durable = true;
  ASSERT_TRUE(rig.Save(client, space, wanted).Reached(SaveStage::kDurable));
  for (uint64_t n = 4; n < 20; ++n) {
    SaveResult saved = rig.Save(client, space, Spec(n));
    if (!saved.reserve.ok()) {
      EXPECT_THAT(Message(saved.reserve), HasSubstr("write-back"));
      rig.Run();
      saved = rig.Save(client, space, Spec(n));
    }
    ASSERT_TRUE(saved.error().ok()) << saved.error();
  }
  for (uint64_t n = 0; n < 20; ++n) {
    EXPECT_NE(rig.State(space, Id(n)), ChunkState::kMiss) << n;
  }
}

TEST(Engine, FullDurableTierEvictsByItsOwnPolicyLeafFirst) {
  EngineRig rig({}, 2 * kChunkPages, 4 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = rig.SaveChain(client, space, 0, 4);
  ASSERT_TRUE(rig.Save(client, space, Spec(50)).error().ok());
  ASSERT_TRUE(rig.Save(client, space, Spec(51)).error().ok());
  rig.Run();
  EXPECT_LE(rig.disk->Usage().used_bytes, rig.disk->Usage().capacity_bytes);
  EXPECT_EQ(rig.engine->Stats().evicted_durable, 2u);
  // The ends of the chain are gone; its beginning is not.
  EXPECT_EQ(rig.Match(space, ids).usable, 2u);
  EXPECT_EQ(rig.Why(space, ids[3]), MissReason::kEvicted);
}

TEST(Engine, FailingDurableTierDegradesOnceAndSavesGoOn) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  rig.disk->FailWrites(3, absl::UnavailableError("EIO"));
  SaveSpec wanted = Spec(1);
  wanted.want_durable = true;
  const SaveResult failed = rig.Save(client, space, wanted);
  EXPECT_TRUE(failed.Reached(SaveStage::kVolatile));
  EXPECT_TRUE(absl::IsUnavailable(failed.error()));
  EXPECT_TRUE(rig.Save(client, space, Spec(2)).Reached(SaveStage::kVolatile));
  EXPECT_TRUE(rig.Save(client, space, Spec(3)).Reached(SaveStage::kVolatile));
  EXPECT_THAT(rig.Events(EventType::kTierDegraded), SizeIs(1));
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kReady);
  // Back again: what was missed is made up for.
  wanted.id = Id(4);
  EXPECT_TRUE(rig.Save(client, space, wanted).Reached(SaveStage::kDurable));
  EXPECT_THAT(rig.Events(EventType::kTierRecovered), SizeIs(1));
  EXPECT_EQ(rig.disk->Records(Id(1)), 1);

  rig.disk->SetHealth(absl::UnavailableError("read-only file system"));
  wanted.id = Id(5);
  EXPECT_THAT(Message(rig.Save(client, space, wanted).error()),
              HasSubstr("read-only"));
  EXPECT_THAT(rig.engine->Stats().durable_health, HasSubstr("read-only"));
}

TEST(Engine, MemoryThatRotsIsNotWrittenToTheDurableTier) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  SaveSpec wanted = Spec(1);
  wanted.want_durable = true;
  const auto result = rig.StartSave(client, space, wanted);
  while (!result->Reached(SaveStage::kVolatile)) rig.executor->RunOne();
  const auto hold = rig.Hold(client, space, {Id(1)});
  rig.dram->At(hold->chunks[0].parts[0].address)[40] ^= std::byte{4};
  rig.Run();
  EXPECT_TRUE(absl::IsDataLoss(result->error()));
  EXPECT_EQ(rig.disk->extents(), 0u);
  EXPECT_EQ(rig.Why(space, Id(1)), MissReason::kCorrupt);
}

class Fussy final : public EvictionPolicy {
 public:
  std::string_view name() const override { return "fussy"; }
  bool Admit(const ChunkFeatures& features) override {
    return features.priority > 0;
  }
  void Insert(ChunkIndex chunk, const ChunkFeatures& features) override {
    lru_->Insert(chunk, features);
  }
  void Touch(ChunkIndex chunk, absl::Time now) override {
    lru_->Touch(chunk, now);
  }
  void Remove(ChunkIndex chunk) override { lru_->Remove(chunk); }
  std::optional<ChunkIndex> Victim(const Evictable& evictable) override {
    return lru_->Victim(evictable);
  }
  uint64_t MemoryBytes() const override { return lru_->MemoryBytes(); }

 private:
  std::unique_ptr<EvictionPolicy> lru_ = NewLruPolicy();
};

TEST(Engine, AdmissionIsThePolicysAndTheRefusalSaysSo) {
  EngineRig rig;
  rig.dram_policy = std::make_unique<Fussy>();
  rig.Crash();
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const SaveResult refused = rig.Save(client, space, Spec(1));
  EXPECT_TRUE(absl::IsResourceExhausted(refused.error()));
  EXPECT_THAT(Message(refused.error()),
              HasSubstr("not admitted by policy fussy"));
  SaveSpec dear = Spec(2);
  dear.hints.priority = 1;
  EXPECT_TRUE(rig.Save(client, space, dear).error().ok());
  EXPECT_EQ(rig.dram->extents(), 1u);
}

// ---- Death ----

TEST(Engine, AWriterThatDiesLeavesNothingBehind) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto copying = rig.StartSave(client, space, Spec(1));
  OracleRecord record = rig.Record(space, Spec(2));
  const auto reservation =
      rig.Reserve(client, space, Spec(2), record.meta.record_bytes);
  rig.engine->RemoveClient(client);
  auto late = std::make_shared<SaveResult>();
  rig.Commit(client, *reservation, std::move(record), Spec(2), late);
  rig.Run();
  EXPECT_FALSE(copying->error().ok());
  EXPECT_FALSE(late->error().ok());
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kMiss);
  EXPECT_EQ(rig.State(space, Id(2)), ChunkState::kMiss);
  EXPECT_EQ(rig.dram->extents(), 0u);
  EXPECT_EQ(rig.engine->Stats().reserved_bytes, 0u);
  EXPECT_EQ(rig.engine->Stats().clients, 0u);
}

TEST(Engine, AReaderThatDiesGivesItsHoldsBack) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  ASSERT_TRUE(rig.Save(client, space, Spec(1)).error().ok());
  const ClientId reader = rig.Client();
  ASSERT_TRUE(rig.Hold(reader, space, {Id(1)}).ok());
  ASSERT_TRUE(rig.engine->Evict({}, Id(1), false).ok());
  EXPECT_EQ(rig.dram->extents(), 1u);
  rig.engine->RemoveClient(reader);
  rig.Run();
  EXPECT_EQ(rig.dram->extents(), 0u);
  EXPECT_EQ(rig.engine->Stats().holds, 0u);
}

TEST(Engine, WorkThatIsQueuedOutlivesTheEngineUnrun) {
  EngineRig rig({}, 2 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = Spill(rig, client, space, 3);
  ASSERT_TRUE(rig.Hold(client, space, {ids[0]}).ok());
  const auto saving = rig.StartSave(client, space, Spec(9));
  rig.engine.reset();
  rig.Run();
  EXPECT_THAT(saving->calls, IsEmpty());
}

// ---- Epochs ----

TEST(Engine, AdvancingTheEpochStopsMatchesAtOnce) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = rig.SaveChain(client, space, 0, 2);
  const auto hold = rig.Hold(client, space, {ids[0]});
  const auto copying = rig.StartSave(client, space, Spec(7));
  OracleRecord record = rig.Record(space, Spec(8));
  const auto reserved =
      rig.Reserve(client, space, Spec(8), record.meta.record_bytes);

  StatusOr<Epoch> advanced = absl::UnknownError("not yet");
  rig.engine->AdvanceEpoch({}, space, [&](StatusOr<Epoch> e) { advanced = e; });
  EXPECT_EQ(rig.Match(space, ids).usable, 0u);
  EXPECT_EQ(rig.Match(space, ids).reason, MissReason::kEpoch);
  EXPECT_THAT(rig.revoked[client],
              ElementsAre(Pair(hold->hold, MissReason::kEpoch)));
  EXPECT_FALSE(advanced.ok()) << "not durable yet";
  // The same id of the new weights is another chunk, even before the sweep.
  auto late = std::make_shared<SaveResult>();
  rig.Commit(client, *reserved, std::move(record), Spec(8), late);
  rig.Run();
  ASSERT_TRUE(advanced.ok());
  EXPECT_EQ(*advanced, Epoch{1});
  EXPECT_TRUE(absl::IsAborted(copying->error())) << copying->error();
  EXPECT_TRUE(absl::IsAborted(late->error()));
  EXPECT_EQ(rig.Match(space, ids).reason, MissReason::kEpoch);
  EXPECT_EQ(rig.dram->extents(), 1u) << "the held one";
  EXPECT_TRUE(rig.Read(space, ids[0], hold->chunks[0]).ok());
  EXPECT_EQ(rig.disk->extents(), 0u);
  ASSERT_TRUE(rig.engine->ReleaseHold(client, hold->hold).ok());
  EXPECT_EQ(rig.dram->extents(), 0u);

  SaveSpec fresh = Spec(0);
  fresh.version = 2;
  ASSERT_TRUE(rig.Save(client, space, fresh).error().ok());
  const auto again = rig.Hold(client, space, {ids[0]});
  EXPECT_TRUE(rig.Read(space, ids[0], again->chunks[0], 2).ok());
  rig.engine->AdvanceEpoch({}, SpaceId(),
                           [&](StatusOr<Epoch> e) { advanced = e; });
  EXPECT_TRUE(absl::IsNotFound(advanced.status()));
}

TEST(Engine, NewChunkOfAnIdReplacesTheUnsweptOldOne) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  ASSERT_TRUE(rig.Save(client, space, Spec(1)).error().ok());
  rig.executor->Shuffle(1);
  rig.engine->AdvanceEpoch({}, space, [](StatusOr<Epoch>) {});
  SaveSpec fresh = Spec(1);
  fresh.version = 2;
  EXPECT_TRUE(rig.Save(client, space, fresh).error().ok());
  const auto hold = rig.Hold(client, space, {Id(1)});
  EXPECT_TRUE(rig.Read(space, Id(1), hold->chunks[0], 2).ok());
  EXPECT_EQ(rig.dram->extents(), 1u);
}

// ---- Corruption ----

TEST(Engine, ReportedCorruptionIsCheckedBeforeItIsBelieved) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  ASSERT_TRUE(rig.Save(client, space, Spec(1)).error().ok());
  const auto hold = rig.Hold(client, space, {Id(1)});
  rig.engine->ReportCorrupt(client, hold->hold, Id(1));
  rig.Run();
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kReady);
  EXPECT_EQ(rig.engine->Stats().corrupt, 0u);

  rig.dram->At(hold->chunks[0].parts[0].address)[5000] ^= std::byte{1};
  rig.engine->ReportCorrupt(client, hold->hold, Id(1));
  rig.engine->ReportCorrupt(client, hold->hold, Id(1));
  rig.Run();
  EXPECT_EQ(rig.engine->Stats().corrupt, 1u);
  EXPECT_THAT(rig.Events(EventType::kChunkCorrupt), SizeIs(1));
  // The durable copy is still good.
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kDurable);
  EXPECT_EQ(rig.dram->extents(), 1u) << "the reader's";
  ASSERT_TRUE(rig.engine->ReleaseHold(client, hold->hold).ok());
  EXPECT_EQ(rig.dram->extents(), 0u);
  const auto again = rig.Hold(client, space, {Id(1)});
  rig.Run();
  EXPECT_TRUE(rig.Read(space, Id(1), again->chunks[0]).ok());
}

TEST(Engine, VerifyFindsRotInEitherTier) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = rig.SaveChain(client, space, 0, 6);
  rig.Run();
  rig.disk->Corrupt(ids[2], 5000);
  const auto verify = [&](TierKind tier) {
    Engine::VerifyProgress last;
    int calls = 0;
    rig.engine->Verify(tier, [&](const Engine::VerifyProgress& p) {
      last = p;
      ++calls;
      return true;
    });
    rig.Run();
    EXPECT_TRUE(last.finished);
    EXPECT_GT(calls, 1);
    EXPECT_EQ(last.chunks_done, last.chunks_total);
    EXPECT_EQ(last.bytes_done, last.bytes_total);
    return last.corrupt;
  };
  EXPECT_EQ(verify(TierKind::kDram), 0u) << "its memory is good";
  EXPECT_EQ(verify(TierKind::kNvme), 1u) << "read past the copy in memory";
  EXPECT_EQ(rig.State(space, ids[2]), ChunkState::kReady);
  EXPECT_EQ(rig.disk->Records(ids[2]), 1) << "written again from memory";
  EXPECT_EQ(verify(TierKind::kNvme), 0u);
  const auto hold = rig.Hold(client, space, {ids[4]});
  rig.dram->At(hold->chunks[0].parts[0].address)[5000] ^= std::byte{1};
  EXPECT_EQ(verify(TierKind::kDram), 1u);
  EXPECT_EQ(rig.State(space, ids[4]), ChunkState::kDurable);

  Status status;
  rig.engine->Verify(TierKind::kCxl, [&](const Engine::VerifyProgress& p) {
    status = p.status;
    return true;
  });
  EXPECT_FALSE(status.ok());
  int calls = 0;
  rig.engine->Verify(TierKind::kNvme, [&](const Engine::VerifyProgress&) {
    ++calls;
    return false;
  });
  rig.Run();
  EXPECT_EQ(calls, 1) << "cancelled";
}

// ---- Restart ----

TEST(Engine, WhatWasDurableIsThereAfterACrash) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  ClientId client = rig.Client();
  SaveSpec spec = Spec(1);
  spec.want_durable = true;
  spec.root_content = OracleDigest<Sha256Digest>(3, 9);
  ASSERT_TRUE(rig.Save(client, space, spec).Reached(SaveStage::kDurable));
  spec = Spec(2);
  spec.shape = Shape(0, 1, 0, 2);
  spec.want_durable = true;
  ASSERT_TRUE(rig.Save(client, space, spec).Reached(SaveStage::kDurable));
  ASSERT_TRUE(rig.engine->Pin({}, Id(1), true).ok());
  rig.Run();

  rig.Crash();
  ASSERT_THAT(rig.engine->Spaces({}), SizeIs(1));
  EXPECT_EQ(rig.engine->Spaces({})[0].id, space);
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kDurable);
  EXPECT_TRUE(rig.engine->Stat(TenantId{}, Id(1))->pinned);
  client = rig.Client();
  const auto hold = rig.Hold(client, space, {Id(1)});
  rig.Run();
  EXPECT_TRUE(rig.Read(space, Id(1), hold->chunks[0]).ok());
  SpaceDescriptor other = SmallSpace();
  other.rope = "theta=1";
  const SpaceId second = rig.Open(other);
  EXPECT_EQ(
      rig.engine->WhyMiss({}, second, Id(8), OracleDigest<Sha256Digest>(3, 9))
          .detail,
      "rope");
  // The other rank never came back.
  EXPECT_EQ(rig.State(space, Id(2)), ChunkState::kPending);
  rig.Pass(rig.options.incomplete_ttl + absl::Seconds(1));
  EXPECT_EQ(rig.Why(space, Id(2)), MissReason::kIncomplete);
  EXPECT_EQ(rig.disk->extents(), 1u);
  // Unpinned, and that is remembered too.
  ASSERT_TRUE(rig.engine->Pin({}, Id(1), false).ok());
  rig.Run();
  rig.Crash();
  EXPECT_FALSE(rig.engine->Stat(TenantId{}, Id(1))->pinned);
}

TEST(Engine, RecordsOfOlderEpochsDoNotComeBack) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  rig.SaveChain(client, space, 0, 2);
  rig.Run();
  bool done = false;
  rig.engine->AdvanceEpoch({}, space,
                           [&](StatusOr<Epoch> e) { done = e.ok(); });
  // Durable, but the sweep has not given anything back yet.
  while (!done) ASSERT_TRUE(rig.executor->RunOne());
  rig.Crash();
  rig.Run();
  EXPECT_EQ(rig.State(space, Id(0)), ChunkState::kMiss);
  EXPECT_EQ(rig.engine->Spaces({})[0].epoch, Epoch{1});
  EXPECT_EQ(rig.disk->extents(), 0u);
}

TEST(Engine, RecoveryOrdersThePolicyByAge) {
  EngineRig rig({}, 8 * kChunkPages, 4 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  ClientId client = rig.Client();
  for (uint64_t n = 0; n < 4; ++n) {
    ASSERT_TRUE(rig.Save(client, space, Spec(n)).error().ok());
  }
  rig.Crash();
  client = rig.Client();
  ASSERT_TRUE(rig.Save(client, space, Spec(9)).error().ok());
  EXPECT_EQ(rig.State(space, Id(0)), ChunkState::kMiss);
  EXPECT_EQ(rig.State(space, Id(1)), ChunkState::kDurable);
}

TEST(Engine, NothingIsDurableBeforeItsSpaceIs) {
  EngineRig rig;
  rig.disk->FailControls(1, absl::UnavailableError("EIO"));
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  SaveSpec spec = Spec(1);
  spec.want_durable = true;
  const SaveResult failed = rig.Save(client, space, spec);
  EXPECT_TRUE(failed.Reached(SaveStage::kVolatile));
  EXPECT_FALSE(failed.error().ok());
  spec.id = Id(2);
  EXPECT_TRUE(rig.Save(client, space, spec).Reached(SaveStage::kDurable));
  rig.Crash();
  EXPECT_EQ(rig.State(space, Id(2)), ChunkState::kDurable);
}

TEST(Engine, DrainMakesEverythingDurable) {
  EngineRig rig(OnEvict());
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = rig.SaveChain(client, space, 0, 5);
  EXPECT_EQ(rig.disk->extents(), 0u);
  Status drained = absl::UnknownError("not yet");
  rig.engine->Drain([&](Status status) { drained = status; });
  EXPECT_TRUE(absl::IsUnavailable(rig.Save(client, space, Spec(9)).reserve));
  rig.Run();
  EXPECT_TRUE(drained.ok()) << drained;
  EXPECT_EQ(rig.Match(space, ids).usable, 5u) << "reading goes on";
  rig.Crash();
  EXPECT_EQ(rig.Match(space, ids).usable, 5u);

  rig.disk->FailWrites(1, absl::UnavailableError("EIO"));
  ASSERT_TRUE(rig.Save(rig.Client(), space, Spec(20)).error().ok());
  rig.engine->Drain([&](Status status) { drained = status; });
  rig.Run();
  EXPECT_FALSE(drained.ok());

  EngineRig volatile_rig({}, 1_MiB, 0, false);
  volatile_rig.engine->Drain([&](Status status) { drained = status; });
  EXPECT_TRUE(drained.ok());
}

// ---- Administration ----

TEST(Engine, ListPagesThroughAllChunksInOrder) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  rig.Open(SmallSpace(), kOther);
  const ClientId client = rig.Client();
  rig.SaveChain(client, space, 0, 10);
  ASSERT_TRUE(rig.Save(rig.Client(kOther), space, Spec(3)).error().ok());
  std::vector<ChunkSummary> all;
  std::optional<ChunkId> after;
  for (;;) {
    const auto page = rig.engine->List({}, space, after, 3);
    if (page.empty()) break;
    all.insert(all.end(), page.begin(), page.end());
    after = page.back().id;
  }
  EXPECT_THAT(all, SizeIs(11));
  EXPECT_TRUE(
      std::is_sorted(all.begin(), all.end(),
                     [](const auto& a, const auto& b) { return a.id < b.id; }));
  EXPECT_THAT(rig.engine->List(TenantId{}, {}, {}, 100), SizeIs(10));
  EXPECT_TRUE(all[0].complete);
  EXPECT_THAT(all[0].tiers, ElementsAre(TierKind::kDram, TierKind::kNvme));
}

TEST(Engine, EvictSubtreeAndSpace) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = rig.SaveChain(client, space, 0, 6);
  EXPECT_EQ(*rig.engine->Evict({}, ids[3], true), 3u);
  EXPECT_EQ(rig.Match(space, ids).usable, 3u);
  EXPECT_EQ(rig.Match(space, ids).reason, MissReason::kEvicted);
  EXPECT_EQ(*rig.engine->Evict({}, ids[1], false), 1u);
  EXPECT_EQ(*rig.engine->EvictSpace({}, space), 2u);
  EXPECT_TRUE(absl::IsNotFound(rig.engine->EvictSpace({}, SpaceId()).status()));
  rig.Run();
  EXPECT_EQ(rig.dram->extents(), 0u);
  EXPECT_EQ(rig.disk->extents(), 0u);
  EXPECT_EQ(rig.engine->Stats().chunks, 0u);
}

TEST(Engine, MissesAreRememberedUpToABound) {
  EngineOptions options;
  options.remembered_misses = 2;
  EngineRig rig(options);
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  const auto ids = rig.SaveChain(client, space, 0, 3);
  for (const ChunkId& id : ids)
    ASSERT_TRUE(rig.engine->Evict({}, id, false).ok());
  EXPECT_EQ(rig.Why(space, ids[0]), MissReason::kNeverSeen);
  EXPECT_EQ(rig.Why(space, ids[1]), MissReason::kEvicted);
  EXPECT_EQ(rig.Why(space, ids[2]), MissReason::kEvicted);
}

TEST(Engine, EventsTellWhereChunksCameAndWent) {
  EngineRig rig({}, 2 * kChunkPages);
  const SpaceId space = rig.Open(SmallSpace());
  Spill(rig, rig.Client(), space, 3);
  std::vector<std::pair<TierKind, ChunkId>> stored;
  for (const Event& event : rig.Events(EventType::kChunkStored)) {
    stored.emplace_back(event.tier, event.chunk);
  }
  EXPECT_EQ(stored.size(), 6u);
  const auto removed = rig.Events(EventType::kChunkRemoved);
  ASSERT_THAT(removed, SizeIs(1));
  EXPECT_EQ(removed[0].chunk, Id(0));
  EXPECT_EQ(removed[0].tier, TierKind::kDram);
  EXPECT_EQ(removed[0].reason, MissReason::kEvicted);
  uint64_t expected = 0;
  for (const Event& event :
       rig.engine->Events().Read(0, 1000, absl::ZeroDuration())) {
    EXPECT_EQ(event.sequence, ++expected);
  }
}

TEST(Engine, WhatASaveSaysOfItsBlocksIsInTheEventThatItCanBeRead) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  const ClientId client = rig.Client();
  auto blocks = std::make_shared<ChunkBlocks>();
  blocks->tokens = {1, 2, 3};
  std::weak_ptr<const ChunkBlocks> alive = blocks;
  SaveSpec spec;
  spec.id = Id(1);
  spec.parent = Id(0);
  spec.place = 1;
  spec.hints.blocks = std::move(blocks);
  ASSERT_TRUE(rig.Save(client, space, spec).Reached(SaveStage::kVolatile));
  const auto stored = rig.Events(EventType::kChunkStored);
  ASSERT_THAT(stored, SizeIs(2));
  EXPECT_EQ(stored[0].tier, TierKind::kDram);
  EXPECT_EQ(stored[0].parent, Id(0));
  EXPECT_EQ(stored[0].token_count, 8u);
  EXPECT_EQ(stored[0].blocks, alive.lock());
  EXPECT_EQ(stored[1].tier, TierKind::kNvme);
  EXPECT_EQ(stored[1].blocks, nullptr);
  // A part of it that others save, too, says nothing new.
  ASSERT_TRUE(rig.Save(client, space, spec).error().code() ==
              absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(rig.Events(EventType::kChunkStored), SizeIs(2));
}

TEST(EventLog, KeepsTheNewestAndShowsTheGap) {
  EventLog log(4);
  for (int i = 0; i < 10; ++i) log.Publish(Event{});
  const auto events = log.Read(2, 3, absl::ZeroDuration());
  ASSERT_THAT(events, SizeIs(3));
  EXPECT_EQ(events[0].sequence, 7u);
  EXPECT_THAT(log.Read(10, 5, absl::ZeroDuration()), IsEmpty());
  EXPECT_EQ(log.last_sequence(), 10u);
}

TEST(EventLog, TheOldestLoseTheirBlocksFirst) {
  EventLog log(2 * EventLog::kWithBlocks);
  Event event;
  event.blocks = std::make_shared<ChunkBlocks>();
  std::weak_ptr<const ChunkBlocks> alive = event.blocks;
  for (size_t i = 0; i < EventLog::kWithBlocks + 5; ++i) log.Publish(event);
  event.blocks.reset();
  const auto events = log.Read(0, 6, absl::ZeroDuration());
  ASSERT_THAT(events, SizeIs(6));
  EXPECT_EQ(events[4].blocks, nullptr);
  EXPECT_EQ(events[5].blocks, alive.lock());
  EXPECT_EQ(alive.use_count(),
            static_cast<long>(EventLog::kWithBlocks) + 1);  // and events[5]
}

TEST(Engine, OpeningIsIdempotentAndNamesWhatIsMissing) {
  EngineRig rig;
  const SpaceId space = rig.Open(SmallSpace());
  EXPECT_EQ(rig.Open(SmallSpace()), space);
  EXPECT_EQ(rig.engine->Stats().spaces, 1u);
  SpaceDescriptor bad = SmallSpace();
  bad.rope.clear();
  EXPECT_THAT(Message(rig.engine->OpenSpace({}, bad).status()),
              HasSubstr("rope"));
  EXPECT_FALSE(Engine::Open({}, {}).ok());
}

}  // namespace
}  // namespace larder
