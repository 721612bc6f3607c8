// Durable copies that a codec made: what they are called, who gets them, and
// that nobody takes them for something better.

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "store/chunk_table.h"
#include "tests/store/engine_rig.h"

namespace larder {
namespace {

constexpr CodingSpec kLossy{kTestUpper, kUpperLevel};
constexpr CodingSpec kLossless{kTestPlanes, Lineage::kExact};
constexpr uint64_t kRawPages = 36_KiB;  // of a chunk of CodedSpace

SpaceDescriptor CodedSpace(GroupKind kind = GroupKind::kFullAttention) {
  GroupDescriptor group = SmallGroup(kind);
  group.k_head_bytes = 1008;
  return SmallSpace({group});
}

SaveSpec Spec(uint64_t n) {
  SaveSpec spec;
  spec.id = OracleChunkId(n);
  return spec;
}

struct CodingRig : EngineRig {
  explicit CodingRig(CodingSpec wanted, EngineOptions engine_options = {},
                     uint64_t dram_chunks = 4)
      : EngineRig(engine_options, dram_chunks * kRawPages, 64 * kRawPages) {
    coding = wanted;
    space = Open(CodedSpace());
    client = Client();
  }

  SaveResult SaveDurable(SaveSpec spec) {
    spec.want_durable = true;
    return Save(client, space, spec);
  }
  // Chunks that nobody asks for again push all others out of memory.
  void FillMemory() {
    for (int i = 0; i < 4; ++i) Save(client, space, Spec(1000 + filler_++));
  }
  MatchResult MatchAt(Lineage worst, uint64_t n) {
    worst_lineage = worst;
    return Match(space, {OracleChunkId(n)});
  }
  // Holds a chunk, waits until it is in memory, and reads it.
  Status ReadChunk(Lineage worst, uint64_t n, uint64_t version = 1) {
    worst_lineage = worst;
    progress.clear();
    const auto hold = Hold(client, space, {OracleChunkId(n)});
    if (!hold.ok()) return hold.status();
    Run();
    Status status = absl::OkStatus();
    const HeldChunk& chunk = hold->chunks[0];
    if (chunk.state == ChunkState::kMiss ||
        (chunk.state == ChunkState::kPending &&
         (progress.size() != 1 || progress[0].second != MissReason::kNone))) {
      status = absl::NotFoundError(std::string(ToString(chunk.reason)));
    } else {
      status = Read(space, OracleChunkId(n), chunk, version);
    }
    if (hold->hold != HoldId{}) {
      EXPECT_TRUE(engine->ReleaseHold(client, hold->hold).ok());
    }
    return status;
  }
  ChunkSummary Stat(uint64_t n) {
    const auto summary = engine->Stat(TenantId{}, OracleChunkId(n));
    EXPECT_TRUE(summary.ok()) << summary.status();
    return summary.value_or(ChunkSummary());
  }

  SpaceId space;
  ClientId client{};
  uint64_t filler_ = 0;
};

TEST(EngineCoding, EachCopyIsWhatItIs) {
  CodingRig rig(kLossy);
  ASSERT_TRUE(rig.SaveDurable(Spec(1)).Reached(SaveStage::kDurable));
  const ChunkSummary chunk = rig.Stat(1);
  EXPECT_EQ(chunk.lineage, Lineage::kExact) << "memory has the exact copy";
  ASSERT_EQ(chunk.copies.size(), 2u);
  EXPECT_EQ(chunk.copies[0].tier, TierKind::kDram);
  EXPECT_EQ(chunk.copies[0].codec, CodecId::kRaw);
  EXPECT_EQ(chunk.copies[0].lineage, Lineage::kExact);
  EXPECT_EQ(chunk.copies[0].bytes, chunk.copies[0].plain_bytes);
  EXPECT_EQ(chunk.copies[1].tier, TierKind::kNvme);
  EXPECT_EQ(chunk.copies[1].codec, kTestUpper);
  EXPECT_EQ(chunk.copies[1].lineage, kUpperLevel);
  EXPECT_EQ(chunk.copies[1].plain_bytes, chunk.copies[0].bytes);
  EXPECT_LT(chunk.copies[1].bytes, chunk.copies[0].bytes);
  EXPECT_EQ(chunk.copies[1].parts, 1u);

  const EngineStats stats = rig.engine->Stats();
  EXPECT_EQ(stats.encoded_records, 1u);
  EXPECT_EQ(stats.encoded_plain_bytes, chunk.copies[0].bytes);
  EXPECT_EQ(stats.encoded_bytes, chunk.copies[1].bytes);
  EXPECT_EQ(stats.demoted_bytes, chunk.copies[1].bytes);
  EXPECT_EQ(stats.writes.user_bytes, chunk.copies[1].bytes);
  EXPECT_EQ(stats.durable_backlog_bytes, 0u);
}

TEST(EngineCoding, InspectSaysWhatCopiesAreCodedWith) {
  CodingRig rig(kLossy);
  ASSERT_TRUE(rig.SaveDurable(Spec(1)).Reached(SaveStage::kDurable));
  const auto inspect = [&](uint64_t n) {
    auto answer = std::make_shared<std::optional<StatusOr<ChunkSummary>>>();
    rig.engine->Inspect(
        TenantId{}, OracleChunkId(n),
        [answer](StatusOr<ChunkSummary> chunk) { *answer = std::move(chunk); });
    return answer;
  };
  // Stat reads nothing, and so knows it of raw copies alone.
  EXPECT_EQ(rig.Stat(1).copies[0].profile, ProfileId{});
  EXPECT_EQ(rig.Stat(1).copies[1].profile, std::nullopt);
  auto answer = inspect(1);
  EXPECT_FALSE(answer->has_value()) << "it is being read";
  rig.Run();
  ASSERT_TRUE(answer->has_value());
  ASSERT_EQ((**answer)->copies.size(), 2u);
  EXPECT_EQ((**answer)->copies[0].profile, ProfileId{});
  EXPECT_EQ((**answer)->copies[1].profile, ProfileId{}) << "with none";

  // What cannot be read is not known, and that is all.
  rig.disk->FailReads(1, absl::UnavailableError("injected"));
  answer = inspect(1);
  rig.Run();
  ASSERT_TRUE(answer->has_value());
  EXPECT_EQ((**answer)->copies[1].profile, std::nullopt);
  EXPECT_EQ((**answer)->copies[1].codec, kTestUpper);

  // Coded copies in memory.
  rig.FillMemory();
  ASSERT_EQ(rig.ReadChunk(kUpperLevel, 1), absl::OkStatus());
  answer = inspect(1);
  rig.Run();
  ASSERT_TRUE(answer->has_value());
  ASSERT_EQ((**answer)->copies.size(), 2u);
  EXPECT_EQ((**answer)->copies[0].tier, TierKind::kDram);
  EXPECT_EQ((**answer)->copies[0].codec, kTestUpper);
  EXPECT_EQ((**answer)->copies[0].profile, ProfileId{});

  // Gone while it was being read; never there.
  answer = inspect(1);
  ASSERT_TRUE(rig.engine->EvictSpace(TenantId{}, rig.space).ok());
  rig.Run();
  ASSERT_TRUE(answer->has_value());
  EXPECT_TRUE(absl::IsNotFound((*answer)->status()));
  answer = inspect(2);
  ASSERT_TRUE(answer->has_value());
  EXPECT_TRUE(absl::IsNotFound((*answer)->status()));
}

TEST(EngineCoding, LineageFollowsTheCopyThatIsLeft) {
  CodingRig rig(kLossy);
  ASSERT_TRUE(rig.SaveDurable(Spec(1)).Reached(SaveStage::kDurable));
  EXPECT_EQ(rig.MatchAt(Lineage::kExact, 1).usable, 1u);
  rig.FillMemory();
  ASSERT_EQ(rig.State(rig.space, OracleChunkId(1)), ChunkState::kDurable);

  const MatchResult exact = rig.MatchAt(Lineage::kExact, 1);
  EXPECT_EQ(exact.usable, 0u);
  EXPECT_EQ(exact.reason, MissReason::kLineage);
  EXPECT_EQ(rig.MatchAt(Lineage{6}, 1).usable, 0u);
  const MatchResult lossy = rig.MatchAt(kUpperLevel, 1);
  EXPECT_EQ(lossy.usable, 1u);
  EXPECT_EQ(lossy.states[0], ChunkState::kDurable);
  EXPECT_EQ(rig.Stat(1).lineage, kUpperLevel);
  EXPECT_EQ(rig.Stat(1).bytes, rig.Stat(1).copies[0].bytes);

  // It comes up as it is: less memory, and no better for it.
  const uint64_t before = rig.dram->Usage().used_bytes;
  ASSERT_TRUE(rig.engine->EvictSpace(TenantId{}, rig.space).ok());
  EXPECT_LT(rig.dram->Usage().used_bytes, before);
}

TEST(EngineCoding, CodedRecordsArePromotedAsTheyAre) {
  CodingRig rig(kLossy);
  ASSERT_TRUE(rig.SaveDurable(Spec(1)).Reached(SaveStage::kDurable));
  rig.FillMemory();
  EXPECT_FALSE(rig.ReadChunk(Lineage::kExact, 1).ok());
  const Status read = rig.ReadChunk(kUpperLevel, 1);
  EXPECT_TRUE(read.ok()) << read;
  ASSERT_EQ(rig.State(rig.space, OracleChunkId(1)), ChunkState::kReady);
  const ChunkSummary chunk = rig.Stat(1);
  ASSERT_EQ(chunk.copies.size(), 2u);
  for (const CopySummary& copy : chunk.copies) {
    EXPECT_EQ(copy.codec, kTestUpper);
    EXPECT_EQ(copy.lineage, kUpperLevel);
  }
  EXPECT_EQ(rig.MatchAt(Lineage::kExact, 1).reason, MissReason::kLineage)
      << "in memory, and still lossy";
  EXPECT_TRUE(rig.ReadChunk(kUpperLevel, 1).ok());
  // Out of memory again, and back: nothing is encoded twice.
  rig.FillMemory();
  EXPECT_TRUE(rig.ReadChunk(kUpperLevel, 1).ok());
  EXPECT_EQ(rig.disk->Records(OracleChunkId(1)), 1);
}

TEST(EngineCoding, AnExactWriterReplacesALossyCopy) {
  CodingRig rig(kLossy);
  ASSERT_TRUE(rig.SaveDurable(Spec(1)).Reached(SaveStage::kDurable));
  rig.FillMemory();
  ASSERT_TRUE(rig.ReadChunk(kUpperLevel, 1).ok());

  SaveSpec again = Spec(1);
  again.lineage = kUpperLevel;
  again.version = 2;
  EXPECT_TRUE(absl::IsAlreadyExists(rig.SaveDurable(again).reserve))
      << "no better than what is there";
  again.lineage = Lineage::kExact;
  ASSERT_TRUE(rig.SaveDurable(again).Reached(SaveStage::kDurable));
  EXPECT_EQ(rig.MatchAt(Lineage::kExact, 1).usable, 1u);
  EXPECT_TRUE(rig.ReadChunk(Lineage::kExact, 1, 2).ok());
  EXPECT_EQ(rig.disk->Records(OracleChunkId(1)), 1) << "the old one is freed";
  EXPECT_EQ(rig.Stat(1).copies[1].codec, kTestUpper);
}

TEST(EngineCoding, AChildOfALossyCopyIsLossyForEver) {
  CodingRig rig(kLossy);
  ASSERT_TRUE(rig.SaveDurable(Spec(1)).Reached(SaveStage::kDurable));
  SaveSpec child = Spec(2);
  child.parent = OracleChunkId(1);
  child.place = 1;
  // What was computed while the exact copy was there is exact.
  ASSERT_TRUE(
      rig.Save(rig.client, rig.space, child).Reached(SaveStage::kVolatile));
  EXPECT_EQ(rig.Stat(2).lineage, Lineage::kExact);
  // What its writer says was computed over less, is not.
  child.id = OracleChunkId(3);
  child.lineage = kUpperLevel;
  ASSERT_TRUE(
      rig.Save(rig.client, rig.space, child).Reached(SaveStage::kVolatile));
  EXPECT_EQ(rig.Stat(3).lineage, kUpperLevel);
  EXPECT_EQ(rig.Stat(3).copies[0].codec, CodecId::kRaw);
  // Nor what has a parent of which only a lossy copy is left, whatever its
  // writer says.
  rig.FillMemory();
  child.id = OracleChunkId(4);
  child.lineage = Lineage::kExact;
  ASSERT_TRUE(
      rig.Save(rig.client, rig.space, child).Reached(SaveStage::kVolatile));
  EXPECT_EQ(rig.Stat(4).lineage, kUpperLevel);
  // The exact parent comes back; the child stays what it is.
  ASSERT_TRUE(rig.SaveDurable(Spec(1)).Reached(SaveStage::kDurable));
  EXPECT_EQ(rig.Stat(1).lineage, Lineage::kExact);
  EXPECT_EQ(rig.Stat(4).lineage, kUpperLevel);
  EXPECT_EQ(rig.MatchAt(Lineage::kExact, 4).reason, MissReason::kLineage);
}

TEST(EngineCoding, RecoveryKnowsWhatCopiesAre) {
  CodingRig rig(kLossy);
  ASSERT_TRUE(rig.SaveDurable(Spec(1)).Reached(SaveStage::kDurable));
  const ChunkSummary before = rig.Stat(1);
  rig.Crash();
  rig.client = rig.Client();
  const ChunkSummary after = rig.Stat(1);
  ASSERT_EQ(after.copies.size(), 1u);
  EXPECT_EQ(after.copies[0].codec, before.copies[1].codec);
  EXPECT_EQ(after.copies[0].bytes, before.copies[1].bytes);
  EXPECT_EQ(after.copies[0].plain_bytes, before.copies[1].plain_bytes);
  EXPECT_EQ(rig.MatchAt(Lineage::kExact, 1).reason, MissReason::kLineage);
  EXPECT_TRUE(rig.ReadChunk(kUpperLevel, 1).ok());
}

// A daemon that lost the configuration, or knows no codec, keeps what is there.
TEST(EngineCoding, CopiesOfAnUnknownCodecAreKept) {
  CodingRig rig(kLossy);
  ASSERT_TRUE(rig.SaveDurable(Spec(1)).Reached(SaveStage::kDurable));
  rig.coder.reset();
  rig.Crash();
  rig.client = rig.Client();
  EXPECT_TRUE(rig.ReadChunk(kUpperLevel, 1).ok());
  ASSERT_TRUE(rig.SaveDurable(Spec(2)).Reached(SaveStage::kDurable));
  EXPECT_EQ(rig.Stat(2).copies[1].codec, CodecId::kRaw);
}

TEST(EngineCoding, LosslessCopiesAreExact) {
  CodingRig rig(kLossless);
  SaveSpec spec = Spec(1);
  spec.version = kOracleSmooth | 1;
  ASSERT_TRUE(rig.SaveDurable(spec).Reached(SaveStage::kDurable));
  EXPECT_EQ(rig.Stat(1).copies[1].codec, kTestPlanes);
  rig.FillMemory();
  EXPECT_EQ(rig.MatchAt(Lineage::kExact, 1).usable, 1u);
  const Status read = rig.ReadChunk(Lineage::kExact, 1, spec.version);
  EXPECT_TRUE(read.ok()) << read;
  EXPECT_TRUE(absl::IsAlreadyExists(rig.SaveDurable(spec).reserve));
}

TEST(EngineCoding, WhatIsNotSmallerIsStoredRaw) {
  CodingRig rig(kLossless);
  ASSERT_TRUE(rig.SaveDurable(Spec(1)).Reached(SaveStage::kDurable));
  EXPECT_EQ(rig.Stat(1).copies[1].codec, CodecId::kRaw);
  const EngineStats stats = rig.engine->Stats();
  EXPECT_EQ(stats.encode_not_smaller, 1u);
  EXPECT_EQ(stats.encoded_records, 0u);
  rig.FillMemory();
  EXPECT_TRUE(rig.ReadChunk(Lineage::kExact, 1).ok());
}

TEST(EngineCoding, WhatACodecDoesNotTakeIsStoredRaw) {
  CodingRig rig(kLossy);
  rig.space = rig.Open(CodedSpace(GroupKind::kRecurrentState));
  ASSERT_TRUE(rig.SaveDurable(Spec(1)).Reached(SaveStage::kDurable));
  EXPECT_EQ(rig.Stat(1).copies[1].codec, CodecId::kRaw);
  EXPECT_EQ(rig.engine->Stats().encode_unsupported, 1u);
  rig.coding = {CodecId{77}, Lineage{3}};
  ASSERT_TRUE(rig.SaveDurable(Spec(2)).Reached(SaveStage::kDurable));
  EXPECT_EQ(rig.engine->Stats().encode_unsupported, 2u);
}

TEST(EngineCoding, RotInMemoryIsNotEncoded) {
  CodingRig rig(kLossy);
  SaveSpec wanted = Spec(1);
  wanted.want_durable = true;
  const auto result = rig.StartSave(rig.client, rig.space, wanted);
  while (!result->Reached(SaveStage::kVolatile)) rig.executor->RunOne();
  const auto hold = rig.Hold(rig.client, rig.space, {OracleChunkId(1)});
  ASSERT_TRUE(hold.ok());
  rig.dram->At(hold->chunks[0].parts[0].address)[9000] ^= std::byte{4};
  rig.Run();
  EXPECT_TRUE(absl::IsDataLoss(result->error())) << result->error();
  EXPECT_EQ(rig.disk->extents(), 0u);
  EXPECT_EQ(rig.Why(rig.space, OracleChunkId(1)), MissReason::kCorrupt);
}

TEST(EngineCoding, RottenCodedCopyIsWrittenAgainOrMissed) {
  CodingRig rig(kLossy);
  ASSERT_TRUE(rig.SaveDurable(Spec(1)).Reached(SaveStage::kDurable));
  const auto verify = [&](TierKind tier) {
    Engine::VerifyProgress last;
    rig.engine->Verify(tier, [&](const Engine::VerifyProgress& p) {
      last = p;
      return true;
    });
    rig.Run();
    EXPECT_EQ(last.bytes_done, last.bytes_total);
    return last.corrupt;
  };
  EXPECT_EQ(verify(TierKind::kNvme), 0u);
  EXPECT_EQ(verify(TierKind::kDram), 0u);
  ASSERT_EQ(rig.disk->Corrupt(OracleChunkId(1), 6000), 1);
  EXPECT_EQ(verify(TierKind::kNvme), 1u);
  // From the exact copy in memory.
  EXPECT_EQ(rig.Stat(1).copies.size(), 2u);
  EXPECT_EQ(rig.Stat(1).lineage, Lineage::kExact);
  EXPECT_EQ(verify(TierKind::kNvme), 0u);
  EXPECT_EQ(rig.engine->Stats().encoded_records, 2u);

  // The exact copy rots: the lossy one is what is left.
  const auto hold = rig.Hold(rig.client, rig.space, {OracleChunkId(1)});
  ASSERT_TRUE(hold.ok());
  rig.dram->At(hold->chunks[0].parts[0].address)[9000] ^= std::byte{1};
  EXPECT_EQ(verify(TierKind::kDram), 1u);
  EXPECT_TRUE(rig.engine->ReleaseHold(rig.client, hold->hold).ok());
  EXPECT_EQ(rig.MatchAt(Lineage::kExact, 1).reason, MissReason::kLineage);
  ASSERT_EQ(rig.disk->Corrupt(OracleChunkId(1), 6000), 1);
  EXPECT_FALSE(rig.ReadChunk(kUpperLevel, 1).ok());
  EXPECT_EQ(rig.Why(rig.space, OracleChunkId(1)), MissReason::kCorrupt);
}

// A chunk of which a part is lossy is lossy.
// Two planes: the first alone is what test-upper makes.
CodingSpec TwoPlanes() {
  CodingSpec spec = kLossless;
  spec.planes = 2;
  return spec;
}

struct PlanesRig : CodingRig {
  static constexpr uint64_t kVersion = kOracleSmooth | 1;

  PlanesRig() : CodingRig(TwoPlanes()) {
    EXPECT_TRUE(SaveDurable(SmoothSpec()).Reached(SaveStage::kDurable));
    FillMemory();
    EXPECT_EQ(State(space, OracleChunkId(1)), ChunkState::kDurable);
  }
  static SaveSpec SmoothSpec() {
    SaveSpec spec = Spec(1);
    spec.version = kVersion;
    return spec;
  }
  StoredChunk Describe(uint64_t n) {
    const std::vector<ChunkId> ids = {OracleChunkId(n)};
    return engine->Describe(TenantId{}, space, ids, Lineage::kUnknown)[0];
  }
  StatusOr<HoldReply> HoldWith(uint8_t planes) {
    hold_planes = planes;
    progress.clear();
    auto hold = Hold(client, space, {OracleChunkId(1)});
    hold_planes = 0;
    return hold;
  }
};

TEST(EnginePlanes, AreBroughtOneByOne) {
  PlanesRig rig;
  const StoredChunk about = rig.Describe(1);
  ASSERT_EQ(about.planes, 2);
  EXPECT_EQ(about.lineage, Lineage::kExact);
  EXPECT_EQ(about.cuts[0].lineage, kUpperLevel);
  EXPECT_GT(about.cuts[0].bytes_to_read, 0u);
  EXPECT_LT(about.cuts[0].bytes_to_read, about.bytes_to_read);
  const uint64_t promoted = rig.engine->Stats().promoted_bytes;

  const auto first = rig.HoldWith(1);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->chunks[0].state, ChunkState::kPending);
  rig.Run();
  ASSERT_EQ(rig.progress.size(), 1u);
  EXPECT_EQ(rig.progress[0].second, MissReason::kNone);
  EXPECT_EQ(rig.engine->Stats().promoted_bytes - promoted,
            about.cuts[0].bytes_to_read);
  EXPECT_EQ(
      rig.Read(rig.space, OracleChunkId(1), first->chunks[0], rig.kVersion, 1),
      absl::OkStatus());
  EXPECT_NE(
      rig.Read(rig.space, OracleChunkId(1), first->chunks[0], rig.kVersion, 2),
      absl::OkStatus())
      << "its bytes have not been read";
  // Memory has no copy of the chunk; what it takes to have one is less now.
  EXPECT_EQ(rig.State(rig.space, OracleChunkId(1)), ChunkState::kDurable);
  EXPECT_EQ(rig.Describe(1).cuts[0].bytes_to_read, 0u);
  EXPECT_EQ(rig.Describe(1).bytes_to_read,
            about.bytes_to_read - about.cuts[0].bytes_to_read);

  // Another with as few waits for nothing, one of all for the rest alone.
  const auto again = rig.HoldWith(1);
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->chunks[0].state, ChunkState::kReady);
  const auto all = rig.HoldWith(0);
  ASSERT_TRUE(all.ok());
  EXPECT_EQ(all->chunks[0].state, ChunkState::kPending);
  rig.Run();
  ASSERT_EQ(rig.progress.size(), 1u);
  EXPECT_EQ(rig.progress[0].second, MissReason::kNone);
  EXPECT_EQ(rig.engine->Stats().promoted_bytes - promoted, about.bytes_to_read);
  EXPECT_EQ(rig.State(rig.space, OracleChunkId(1)), ChunkState::kReady);
  EXPECT_EQ(rig.Read(rig.space, OracleChunkId(1), all->chunks[0], rig.kVersion),
            absl::OkStatus());
  // It is the memory that the first ones read.
  EXPECT_EQ(all->chunks[0].parts[0].address, first->chunks[0].parts[0].address);
  for (const auto* hold : {&*first, &*again, &*all}) {
    EXPECT_TRUE(rig.engine->ReleaseHold(rig.client, hold->hold).ok());
  }
}

TEST(EnginePlanes, ThatNobodyHoldsAreForgotten) {
  PlanesRig rig;
  const auto hold = rig.HoldWith(1);
  ASSERT_TRUE(hold.ok());
  rig.Run();
  const uint64_t used = rig.engine->Stats().dram.used_bytes;
  EXPECT_TRUE(rig.engine->ReleaseHold(rig.client, hold->hold).ok());
  rig.Run();
  EXPECT_LT(rig.engine->Stats().dram.used_bytes, used);
  EXPECT_EQ(rig.Describe(1).planes, 2);
  EXPECT_EQ(rig.ReadChunk(Lineage::kExact, 1, rig.kVersion), absl::OkStatus());
  // Released before it was read: the same.
  rig.FillMemory();
  const auto early = rig.HoldWith(1);
  ASSERT_TRUE(early.ok());
  EXPECT_TRUE(rig.engine->ReleaseHold(rig.client, early->hold).ok());
  rig.Run();
  EXPECT_EQ(rig.ReadChunk(Lineage::kExact, 1, rig.kVersion), absl::OkStatus());
}

TEST(EnginePlanes, WaitersOfBothAreServedInTurn) {
  PlanesRig rig;
  const auto first = rig.HoldWith(1);
  const auto all = rig.HoldWith(2);
  ASSERT_TRUE(first.ok() && all.ok());
  rig.Run();
  EXPECT_EQ(
      rig.Read(rig.space, OracleChunkId(1), first->chunks[0], rig.kVersion, 1),
      absl::OkStatus());
  EXPECT_EQ(rig.Read(rig.space, OracleChunkId(1), all->chunks[0], rig.kVersion),
            absl::OkStatus());
  EXPECT_TRUE(rig.engine->ReleaseHold(rig.client, first->hold).ok());
  EXPECT_TRUE(rig.engine->ReleaseHold(rig.client, all->hold).ok());
}

TEST(EnginePlanes, EvictedWhileSomeAreHeld) {
  PlanesRig rig;
  const auto first = rig.HoldWith(1);
  ASSERT_TRUE(first.ok());
  rig.Run();
  ASSERT_TRUE(rig.engine->Evict(TenantId{}, OracleChunkId(1), false).ok());
  rig.Run();
  EXPECT_EQ(rig.State(rig.space, OracleChunkId(1)), ChunkState::kMiss);
  // Who holds it may read on.
  EXPECT_EQ(
      rig.Read(rig.space, OracleChunkId(1), first->chunks[0], rig.kVersion, 1),
      absl::OkStatus());
  EXPECT_TRUE(rig.engine->ReleaseHold(rig.client, first->hold).ok());
  rig.Run();
  // Saved again, it is another chunk, of another copy.
  EXPECT_TRUE(rig.SaveDurable(rig.SmoothSpec()).Reached(SaveStage::kDurable));
  EXPECT_EQ(rig.ReadChunk(Lineage::kExact, 1, rig.kVersion), absl::OkStatus());
}

TEST(EnginePlanes, AHoldOfSomeIsNotShared) {
  PlanesRig rig;
  const auto first = rig.HoldWith(1);
  ASSERT_TRUE(first.ok());
  const ClientId other = rig.Client();
  EXPECT_EQ(rig.engine->AttachHold(other, first->hold, nullptr).status().code(),
            absl::StatusCode::kFailedPrecondition);
  rig.Run();
  EXPECT_TRUE(rig.engine->ReleaseHold(rig.client, first->hold).ok());
}

TEST(EnginePlanes, AreKnownAfterARestart) {
  PlanesRig rig;
  const StoredChunk before = rig.Describe(1);
  rig.Crash();
  rig.client = rig.Client();
  const StoredChunk after = rig.Describe(1);
  EXPECT_EQ(after.planes, 2);
  EXPECT_EQ(after.cuts, before.cuts);
  EXPECT_EQ(after.bytes_to_read, before.bytes_to_read);
}

TEST(EngineCoding, WorstOfItsParts) {
  CodingRig rig(kLossy, {}, 8);
  SaveSpec left = Spec(1);
  left.shape = PartShape{0, 1, 0, 2, 0, 1};
  SaveSpec right = Spec(1);
  right.shape = PartShape{1, 1, 0, 2, 0, 1};
  ASSERT_TRUE(rig.SaveDurable(left).Reached(SaveStage::kDurable));
  rig.coding = {};
  ASSERT_TRUE(rig.SaveDurable(right).Reached(SaveStage::kDurable));
  EXPECT_EQ(rig.Stat(1).lineage, Lineage::kExact);
  rig.Crash();
  const ChunkSummary chunk = rig.Stat(1);
  EXPECT_EQ(chunk.lineage, kUpperLevel);
  EXPECT_EQ(chunk.copies.size(), 2u) << "one coded, one raw";
}

TEST(EngineCoding, ClientsCannotSaveCodedRecords) {
  CodingRig rig(kLossy);
  OracleRecord record = rig.Record(rig.space, Spec(1));
  const auto room =
      rig.coder->EncodedBytesMax(kLossy, rig.spaces[rig.space], record.meta);
  ASSERT_TRUE(room.ok());
  OracleRecord coded{record.meta, PageBuffer(*room)};
  const auto made = rig.coder->Encode(kLossy, rig.spaces[rig.space],
                                      record.bytes.span(), coded.bytes.span());
  ASSERT_TRUE(made.ok() && made->has_value());
  coded.meta = **made;
  const auto reservation =
      rig.Reserve(rig.client, rig.space, Spec(1), kRawPages);
  ASSERT_TRUE(reservation.ok());
  auto result = std::make_shared<SaveResult>();
  rig.Commit(rig.client, *reservation, std::move(coded), Spec(1), result);
  rig.Run();
  EXPECT_TRUE(absl::IsInvalidArgument(result->error())) << result->error();
}

// The index of who uses no codec pays nothing for those who do.
TEST(EngineCoding, OnlyCopiesThatDifferTakeIndex) {
  const auto index_bytes = [](CodingSpec coding) {
    CodingRig rig(coding, {}, 64);
    for (uint64_t n = 0; n < 32; ++n) {
      EXPECT_TRUE(rig.SaveDurable(Spec(n)).Reached(SaveStage::kDurable));
    }
    return rig.engine->Stats().index_bytes;
  };
  EXPECT_LT(index_bytes({}), index_bytes(kLossy));
  EXPECT_LE(sizeof(PartEntry), 72u);
}

}  // namespace
}  // namespace larder
