// A device that takes what leaves memory.

#include <algorithm>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/store/engine_rig.h"

namespace larder {
namespace {

using testing::ElementsAre;
using testing::Pair;
using testing::SizeIs;

constexpr uint64_t kChunk = 8_KiB;  // a whole small chunk in a tier

ChunkId Id(uint64_t n) {
  return OracleChunkId(n);
}

SaveSpec Spec(uint64_t n) {
  SaveSpec spec;
  spec.id = Id(n);
  return spec;
}

// Memory for 16 chunks, of which two are spilled ahead.
class SpillTest : public testing::Test {
 protected:
  void Start(uint64_t device_chunks, bool with_disk,
             EngineOptions options = {}) {
    rig = std::make_unique<EngineRig>(options, 16 * kChunk, 256 * kChunk,
                                      with_disk, device_chunks * kChunk);
    space = rig->Open(SmallSpace());
    client = rig->Client();
  }

  // One after the other, each with all that it brings about.
  void Save(uint64_t first, uint64_t last) {
    for (uint64_t n = first; n <= last; ++n) {
      const SaveResult saved = rig->Save(client, space, Spec(n));
      ASSERT_TRUE(saved.Reached(SaveStage::kVolatile)) << saved.error();
    }
  }

  // Whether a hold of it gives the right bytes; else why not.
  MissReason Load(uint64_t n, Lineage worst = Lineage::kExact) {
    rig->progress.clear();
    rig->worst_lineage = worst;
    const auto hold = rig->Hold(client, space, {Id(n)});
    EXPECT_TRUE(hold.ok()) << hold.status();
    rig->Run();
    MissReason reason = hold->chunks[0].reason;
    if (hold->chunks[0].state == ChunkState::kPending) {
      EXPECT_THAT(rig->progress, SizeIs(1));
      reason = rig->progress.at(0).second;
    }
    if (reason == MissReason::kNone) {
      const Status read = rig->Read(space, Id(n), hold->chunks[0]);
      EXPECT_TRUE(read.ok()) << read;
    }
    if (hold->hold != HoldId{}) {
      EXPECT_TRUE(rig->engine->ReleaseHold(client, hold->hold).ok());
      rig->Run();
    }
    return reason;
  }

  std::vector<TierKind> Tiers(uint64_t n) {
    const auto summary = rig->engine->Stat(std::nullopt, Id(n));
    return summary.ok() ? summary->tiers : std::vector<TierKind>();
  }

  std::unique_ptr<EngineRig> rig;
  SpaceId space;
  ClientId client{};
};

TEST_F(SpillTest, WhatLeavesMemoryIsOnTheDevice) {
  Start(64, false);
  Save(1, 40);
  const EngineStats stats = rig->engine->Stats();
  EXPECT_EQ(stats.chunks, 40u);
  EXPECT_EQ(stats.unspilled_evictions, 0u);
  EXPECT_EQ(stats.evicted_dram, 24u);
  EXPECT_EQ(stats.spill_backlog_bytes, 0u);
  EXPECT_THAT(Tiers(1), ElementsAre(TierKind::kHbm));
  EXPECT_THAT(Tiers(40), ElementsAre(TierKind::kDram));
  EXPECT_EQ(rig->State(space, Id(1)), ChunkState::kDurable);
  EXPECT_EQ(rig->State(space, Id(40)), ChunkState::kReady);
  for (uint64_t n = 1; n <= 40; ++n) EXPECT_EQ(Load(n), MissReason::kNone) << n;
  for (uint64_t n = 1; n <= 40; ++n) EXPECT_EQ(Load(n), MissReason::kNone) << n;
}

TEST_F(SpillTest, RandomUseOfMoreThanMemoryHoldsLosesNothing) {
  Start(64, false);
  Save(1, 60);
  std::mt19937_64 random(7);
  for (int i = 0; i < 500; ++i) {
    const uint64_t n = 1 + random() % 60;
    ASSERT_EQ(Load(n), MissReason::kNone) << n;
  }
  EXPECT_EQ(rig->engine->Stats().unspilled_evictions, 0u);
  EXPECT_LE(rig->engine->Stats().device.used_bytes, 64 * kChunk);
}

TEST_F(SpillTest, NothingGoesToTheDeviceWhileThereIsRoom) {
  Start(64, false);
  Save(1, 13);
  EXPECT_EQ(rig->engine->Stats().spilled_bytes, 0u);
  EXPECT_EQ(rig->device->extents(), 0u);
}

TEST_F(SpillTest, WhatComesUpLeavesTheDevice) {
  Start(64, false);
  Save(1, 20);
  ASSERT_THAT(Tiers(1), ElementsAre(TierKind::kHbm));
  ASSERT_EQ(rig->device->Records(Id(1)), 1);
  ASSERT_EQ(Load(1), MissReason::kNone);
  EXPECT_THAT(Tiers(1), ElementsAre(TierKind::kDram));
  EXPECT_EQ(rig->device->Records(Id(1)), 0);
  EXPECT_GT(rig->engine->Stats().unspilled_bytes, 0u);
}

TEST_F(SpillTest, EventsSayWhereChunksAre) {
  Start(64, false);
  Save(1, 20);
  ASSERT_EQ(Load(1), MissReason::kNone);
  std::vector<std::pair<EventType, TierKind>> seen;
  for (const Event& event :
       rig->engine->Events().Read(0, 1 << 20, absl::ZeroDuration())) {
    if (event.chunk == Id(1)) seen.emplace_back(event.type, event.tier);
  }
  EXPECT_THAT(seen,
              ElementsAre(Pair(EventType::kChunkStored, TierKind::kDram),
                          Pair(EventType::kChunkStored, TierKind::kHbm),
                          Pair(EventType::kChunkRemoved, TierKind::kDram),
                          Pair(EventType::kChunkStored, TierKind::kDram),
                          Pair(EventType::kChunkRemoved, TierKind::kHbm)));
}

TEST_F(SpillTest, AFullDeviceLosesItsOldest) {
  Start(8, false);
  Save(1, 40);
  EXPECT_EQ(rig->Why(space, Id(1)), MissReason::kEvicted);
  EXPECT_LE(rig->device->Usage().used_bytes, 8 * kChunk);
  EXPECT_GT(rig->engine->Stats().evicted_device, 0u);
  EXPECT_EQ(rig->engine->Stats().unspilled_evictions, 0u);
  // Memory holds 25..40, the device what went last and what goes next.
  for (uint64_t n = 21; n <= 24; ++n) {
    EXPECT_THAT(Tiers(n), ElementsAre(TierKind::kHbm)) << n;
  }
}

TEST_F(SpillTest, APinnedChunkStaysOnTheDevice) {
  Start(8, false);
  Save(1, 20);
  ASSERT_THAT(Tiers(1), ElementsAre(TierKind::kHbm));
  ASSERT_TRUE(rig->engine->Pin(std::nullopt, Id(1), true).ok());
  Save(21, 60);
  EXPECT_EQ(Load(1), MissReason::kNone);
}

TEST_F(SpillTest, EvictionDoesNotWaitForTheDevice) {
  Start(64, false);
  rig->device->SetDelays({}, absl::Hours(1));
  Save(1, 40);
  const EngineStats stats = rig->engine->Stats();
  EXPECT_EQ(stats.spilled_bytes, 0u);
  EXPECT_GT(stats.spill_backlog_bytes, 0u);
  EXPECT_GT(stats.unspilled_evictions, 0u);
  // What is under way is still in memory.
  EXPECT_EQ(Load(1), MissReason::kNone);
  rig->Pass(absl::Hours(2));
  EXPECT_EQ(rig->engine->Stats().spill_backlog_bytes, 0u);
}

TEST_F(SpillTest, ACorruptCopyIsAMiss) {
  Start(64, false);
  Save(1, 20);
  ASSERT_EQ(rig->device->Corrupt(Id(1), 5000), 1);
  EXPECT_EQ(Load(1), MissReason::kCorrupt);
  EXPECT_EQ(rig->engine->Stats().corrupt, 1u);
  const auto events = rig->Events(EventType::kChunkCorrupt);
  ASSERT_THAT(events, SizeIs(1));
  EXPECT_EQ(events[0].tier, TierKind::kHbm);
  EXPECT_EQ(rig->device->Records(Id(1)), 0);
  EXPECT_EQ(rig->Why(space, Id(1)), MissReason::kCorrupt);
}

TEST_F(SpillTest, AMisdirectedCopyIsAMiss) {
  Start(64, false);
  Save(1, 20);
  rig->device->Misdirect(Id(2), Id(1));
  EXPECT_EQ(Load(1), MissReason::kCorrupt);
  EXPECT_EQ(Load(2), MissReason::kNone);
}

TEST_F(SpillTest, ACorruptCopyIsReadFromTheDiskInstead) {
  Start(64, true);
  Save(1, 20);
  ASSERT_THAT(Tiers(1), ElementsAre(TierKind::kHbm, TierKind::kNvme));
  ASSERT_EQ(rig->device->Corrupt(Id(1), 5000), 1);
  EXPECT_EQ(Load(1), MissReason::kNone);
  EXPECT_EQ(rig->engine->Stats().corrupt, 1u);
  EXPECT_EQ(rig->device->Records(Id(1)), 0);
  EXPECT_THAT(Tiers(1), ElementsAre(TierKind::kDram, TierKind::kNvme));
}

TEST_F(SpillTest, TheDeviceIsReadBeforeTheDisk) {
  Start(64, true);
  Save(1, 20);
  rig->disk->FailReads(1000, absl::UnavailableError("not to be asked"));
  EXPECT_EQ(Load(1), MissReason::kNone);
}

TEST_F(SpillTest, AFailedReadKeepsTheCopy) {
  Start(64, true);
  Save(1, 20);
  rig->device->FailReads(1, absl::UnavailableError("injected"));
  EXPECT_EQ(Load(1), MissReason::kNone);
  EXPECT_EQ(rig->engine->Stats().corrupt, 0u);

  Start(64, false);
  Save(1, 20);
  rig->device->FailReads(1, absl::UnavailableError("injected"));
  EXPECT_EQ(Load(1), MissReason::kUnavailable);
  EXPECT_EQ(Load(1), MissReason::kNone);
}

// Readers were told what record they would get: the lossy one is for the next.
TEST_F(SpillTest, ALossyDurableCopyIsNoSubstituteForWhoIsWaiting) {
  Start(64, true);
  rig->coding = {kTestUpper, kUpperLevel};
  SpaceDescriptor large = SmallSpace();
  large.groups[0].k_head_bytes = 1008;
  rig = std::make_unique<EngineRig>(EngineOptions(), 16 * 36_KiB, 256 * 36_KiB,
                                    true, 64 * 36_KiB);
  rig->coding = {kTestUpper, kUpperLevel};
  space = rig->Open(large);
  client = rig->Client();
  Save(1, 20);
  ASSERT_THAT(Tiers(1), ElementsAre(TierKind::kHbm, TierKind::kNvme));
  // Exact, though the durable copy is not.
  ASSERT_EQ(Load(2), MissReason::kNone);
  ASSERT_EQ(rig->device->Corrupt(Id(1), 9000), 1);
  EXPECT_EQ(Load(1, kUpperLevel), MissReason::kCorrupt);
  EXPECT_EQ(Load(1), MissReason::kLineage);
  EXPECT_EQ(Load(1, kUpperLevel), MissReason::kNone);
}

TEST_F(SpillTest, VerificationCoversTheDevice) {
  Start(64, false);
  Save(1, 20);
  ASSERT_EQ(rig->device->Corrupt(Id(3), 5000), 1);
  Engine::VerifyProgress last;
  rig->engine->Verify(TierKind::kHbm, [&](const Engine::VerifyProgress& p) {
    last = p;
    return true;
  });
  rig->Run();
  EXPECT_TRUE(last.finished);
  EXPECT_TRUE(last.status.ok()) << last.status;
  EXPECT_EQ(last.corrupt, 1u);
  EXPECT_GE(last.chunks_total, 4u);
  EXPECT_EQ(rig->Why(space, Id(3)), MissReason::kCorrupt);
}

TEST_F(SpillTest, ALostDeviceTakesItsCopiesAndNothingElse) {
  Start(64, true);
  Save(1, 20);
  rig->device->Lose();
  EXPECT_EQ(Load(1), MissReason::kNone);  // from the disk
  rig->Run();
  EXPECT_EQ(rig->engine->Stats().device_health, "the fake device is lost");
  for (uint64_t n = 1; n <= 20; ++n) {
    EXPECT_THAT(Tiers(n), testing::Not(testing::Contains(TierKind::kHbm))) << n;
    EXPECT_EQ(Load(n), MissReason::kNone) << n;
  }
  EXPECT_EQ(rig->device->extents(), 0u);
  Save(21, 60);
  EXPECT_EQ(rig->engine->Stats().unspilled_evictions, 0u);
  const auto events = rig->Events(EventType::kTierDegraded);
  ASSERT_THAT(events, SizeIs(1)) << "says so once";
  EXPECT_EQ(events[0].tier, TierKind::kHbm);
  EXPECT_FALSE(rig->engine->SetTierLimit(TierKind::kHbm, 0).ok());
}

TEST_F(SpillTest, WithoutADiskALostDeviceIsNoticedByASpillToo) {
  Start(64, false);
  Save(1, 20);
  rig->device->Lose();
  Save(21, 30);
  EXPECT_THAT(rig->Events(EventType::kTierDegraded), SizeIs(1));
  EXPECT_EQ(rig->Why(space, Id(1)), MissReason::kUnavailable);
  EXPECT_EQ(Load(1), MissReason::kUnavailable);
  EXPECT_EQ(rig->device->extents(), 0u);
  EXPECT_EQ(Load(30), MissReason::kNone);
}

TEST_F(SpillTest, ALowerLimitGivesMemoryBackAndAHigherOneIsUsed) {
  Start(64, false);
  Save(1, 40);
  ASSERT_GT(rig->device->Usage().used_bytes, 20 * kChunk);
  const auto lower = rig->engine->SetTierLimit(TierKind::kHbm, 10 * kChunk);
  ASSERT_TRUE(lower.ok()) << lower.status();
  EXPECT_EQ(*lower, 10 * kChunk);
  EXPECT_LE(rig->device->Usage().used_bytes, 10 * kChunk);
  EXPECT_EQ(rig->engine->Stats().device.capacity_bytes, 10 * kChunk);
  EXPECT_GT(rig->engine->Stats().evicted_device, 0u);
  Save(41, 60);
  EXPECT_LE(rig->device->Usage().used_bytes, 10 * kChunk);

  ASSERT_EQ(*rig->engine->SetTierLimit(TierKind::kHbm, 0), 0u);
  EXPECT_EQ(rig->device->extents(), 0u);
  const uint64_t spilled = rig->engine->Stats().spilled_bytes;
  Save(61, 70);
  EXPECT_EQ(rig->engine->Stats().spilled_bytes, spilled);

  ASSERT_EQ(*rig->engine->SetTierLimit(TierKind::kHbm, UINT64_MAX),
            64 * kChunk);
  const uint64_t evicted = rig->engine->Stats().evicted_device;
  Save(71, 110);
  EXPECT_GT(rig->device->Usage().used_bytes, 30 * kChunk);
  EXPECT_EQ(rig->engine->Stats().evicted_device, evicted);
}

TEST_F(SpillTest, ALimitLoweredDuringAReadOrWriteHoldsAtItsEnd) {
  Start(64, false);
  Save(1, 40);
  rig->device->SetDelays(absl::Seconds(1), absl::Seconds(1));
  const auto hold = rig->Hold(client, space, {Id(1)});
  ASSERT_TRUE(hold.ok());
  ASSERT_EQ(hold->chunks[0].state, ChunkState::kPending);
  rig->Run();
  ASSERT_GT(rig->engine->Stats().spill_backlog_bytes, 0u);
  ASSERT_EQ(*rig->engine->SetTierLimit(TierKind::kHbm, 0), 0u);
  EXPECT_GT(rig->device->extents(), 0u);  // read and written just now
  rig->Pass(absl::Seconds(2));
  EXPECT_EQ(rig->device->extents(), 0u);
  ASSERT_THAT(rig->progress, SizeIs(1));
  EXPECT_EQ(rig->progress[0].second, MissReason::kNone);
  EXPECT_TRUE(rig->Read(space, Id(1), hold->chunks[0]).ok());
}

TEST_F(SpillTest, OtherTiersHaveNoLimitToSet) {
  Start(64, true);
  EXPECT_TRUE(absl::IsInvalidArgument(
      rig->engine->SetTierLimit(TierKind::kDram, 1_MiB).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      rig->engine->SetTierLimit(TierKind::kNvme, 1_MiB).status()));
  Start(0, true);
  EXPECT_TRUE(absl::IsNotFound(
      rig->engine->SetTierLimit(TierKind::kHbm, 1_MiB).status()));
}

// Not written yet when it left memory: it is when it is back.
TEST_F(SpillTest, WhatWasNeverWrittenIsWrittenWhenItComesUp) {
  Start(64, true);
  rig->disk->FailWrites(1000, absl::UnavailableError("injected"));
  rig->disk->SetHealth(absl::UnavailableError("injected"));
  Save(1, 30);
  ASSERT_THAT(Tiers(1), ElementsAre(TierKind::kHbm));
  rig->disk->FailWrites(0, absl::OkStatus());
  rig->disk->SetHealth(absl::OkStatus());
  Save(31, 32);
  ASSERT_EQ(rig->disk->Records(Id(1)), 0);
  EXPECT_EQ(Load(1), MissReason::kNone);
  EXPECT_EQ(rig->disk->Records(Id(1)), 1);
}

TEST_F(SpillTest, ADurableCopyMayGoWhereTheDeviceHasOne) {
  rig = std::make_unique<EngineRig>(EngineOptions(), 16 * kChunk, 24 * kChunk,
                                    true, 64 * kChunk);
  space = rig->Open(SmallSpace());
  client = rig->Client();
  Save(1, 60);
  ASSERT_GT(rig->engine->Stats().evicted_durable, 0u);
  EXPECT_THAT(Tiers(1), ElementsAre(TierKind::kHbm));
  for (uint64_t n = 1; n <= 60; ++n) EXPECT_EQ(Load(n), MissReason::kNone) << n;
}

TEST_F(SpillTest, AnEpochVoidsWhatIsOnTheDevice) {
  Start(64, false);
  Save(1, 40);
  rig->engine->AdvanceEpoch({}, space, [](StatusOr<Epoch>) {});
  EXPECT_EQ(Load(1), MissReason::kEpoch);
  rig->Run();
  EXPECT_EQ(rig->device->extents(), 0u);
}

TEST_F(SpillTest, ARecordLargerThanTheDeviceTakesIsLetGo) {
  rig = std::make_unique<EngineRig>(EngineOptions(), 16 * kChunk, 0, false,
                                    kPageBytes);
  space = rig->Open(SmallSpace());
  client = rig->Client();
  Save(1, 40);
  EXPECT_EQ(rig->engine->Stats().spilled_bytes, 0u);
  EXPECT_EQ(rig->Why(space, Id(1)), MissReason::kEvicted);
}

TEST_F(SpillTest, TheIndexCostsMoreOnlyForWhatIsOnTheDevice) {
  Start(0, false);
  Save(1, 10);
  const uint64_t without = rig->engine->Stats().index_bytes;
  Start(64, false);
  Save(1, 10);
  // An empty policy and an empty table.
  EXPECT_LE(rig->engine->Stats().index_bytes, without + 1_KiB);
  const uint64_t before = rig->engine->Stats().index_bytes;
  Save(11, 60);
  EXPECT_GT(rig->engine->Stats().index_bytes, before);
}

}  // namespace
}  // namespace larder
