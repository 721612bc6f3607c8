// The engine over a real pool in device memory.

#include <memory>
#include <random>
#include <thread>

#include "gtest/gtest.h"

#include "tests/store/engine_rig.h"
#include "tests/testing/cuda_device.h"
#include "tiers/hbm/hbm_tier.h"

namespace larder {
namespace {

constexpr uint64_t kSlab = 2_MiB;
constexpr uint64_t kSlabs = 4;
// A part of large heads: records of 36 KiB.
constexpr uint64_t kChunk = 36_KiB;

class HbmEngineTest : public DeviceTest {
 protected:
  void SetUp() override {
    DeviceTest::SetUp();
    free_bytes_ = FreeDeviceBytes();
    HbmTierOptions options;
    options.context = &context();
    options.capacity_bytes = kSlabs * kSlab;
    options.slab_bytes = kSlab;
    options.staging_bytes = 16_KiB;
    options.staging_buffers = 2;
    auto tier = NewHbmTier(options);
    ASSERT_TRUE(tier.ok()) << tier.status();
    tier_ = *std::move(tier);
    made_bytes_ = FreeDeviceBytes();
    rig_ = std::make_unique<EngineRig>(EngineOptions(), 32 * kChunk, 0, false);
    rig_->other_device = tier_.get();
    rig_->engine.reset();
    rig_->Start();
    SpaceDescriptor large = SmallSpace();
    large.groups[0].k_head_bytes = 1008;
    for (uint32_t n = 0; n < 2; ++n) {
      spaces_[n] = rig_->Open(large, TenantId{n});
      clients_[n] = rig_->Client(TenantId{n});
    }
  }
  void TearDown() override {
    rig_.reset();
    tier_.reset();
    DeviceTest::TearDown();
  }

  uint64_t FreeDeviceBytes() {
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    LARDER_EXPECT_CUDA(driver().mem_get_info(&free_bytes, &total_bytes));
    return free_bytes;
  }

  // The pool's thread is at work beside the test's.
  template <typename Condition>
  void RunUntil(Condition condition) {
    for (;;) {
      rig_->Run();
      if (condition()) return;
      std::this_thread::yield();
    }
  }
  void Settle() {
    RunUntil([&] { return rig_->engine->Stats().spill_backlog_bytes == 0; });
  }

  // Chunk n is of tenant n % 2.
  void Save(uint64_t n) {
    SaveSpec spec;
    spec.id = OracleChunkId(n);
    const SaveResult saved = rig_->Save(clients_[n % 2], spaces_[n % 2], spec);
    ASSERT_TRUE(saved.Reached(SaveStage::kVolatile)) << saved.error();
    Settle();
  }
  MissReason Load(uint64_t n) {
    rig_->progress.clear();
    const ChunkId id = OracleChunkId(n);
    const auto hold = rig_->Hold(clients_[n % 2], spaces_[n % 2], {id});
    EXPECT_TRUE(hold.ok()) << hold.status();
    MissReason reason = hold->chunks[0].reason;
    if (hold->chunks[0].state == ChunkState::kPending) {
      RunUntil([&] { return !rig_->progress.empty(); });
      reason = rig_->progress[0].second;
    }
    if (reason == MissReason::kNone) {
      const Status read = rig_->Read(spaces_[n % 2], id, hold->chunks[0]);
      EXPECT_TRUE(read.ok()) << read;
    }
    if (hold->hold != HoldId{}) {
      EXPECT_TRUE(rig_->engine->ReleaseHold(clients_[n % 2], hold->hold).ok());
    }
    Settle();
    return reason;
  }

  uint64_t free_bytes_ = 0;
  uint64_t made_bytes_ = 0;
  std::unique_ptr<HbmTier> tier_;
  std::unique_ptr<EngineRig> rig_;
  SpaceId spaces_[2];
  ClientId clients_[2];
};

TEST_F(HbmEngineTest, MoreThanMemoryHoldsComesBackBitForBit) {
  for (uint64_t n = 0; n < 100; ++n) Save(n);
  EXPECT_EQ(rig_->engine->Stats().unspilled_evictions, 0u);
  EXPECT_GT(tier_->GetStats().slabs, 1u);
  std::mt19937_64 random(3);
  for (int i = 0; i < 120; ++i) {
    const uint64_t n = random() % 100;
    ASSERT_EQ(Load(n), MissReason::kNone) << n;
  }
  EXPECT_EQ(rig_->engine->Stats().corrupt, 0u);
}

TEST_F(HbmEngineTest, ALowerLimitGivesDeviceMemoryBackWhileServing) {
  for (uint64_t n = 0; n < 200; ++n) Save(n);
  EXPECT_EQ(tier_->GetStats().committed_bytes, kSlabs * kSlab);
  if (OnStandin()) EXPECT_EQ(FreeDeviceBytes(), made_bytes_ - kSlabs * kSlab);

  const auto one = rig_->engine->SetTierLimit(TierKind::kHbm, kSlab + 1);
  ASSERT_TRUE(one.ok()) << one.status();
  EXPECT_EQ(*one, kSlab);
  RunUntil([&] { return tier_->GetStats().committed_bytes == kSlab; });
  if (OnStandin()) EXPECT_EQ(FreeDeviceBytes(), made_bytes_ - kSlab);
  uint64_t left = 0;
  for (uint64_t n = 0; n < 200; ++n) {
    left += rig_->engine->Stat(std::nullopt, OracleChunkId(n)).ok() ? 1 : 0;
  }
  EXPECT_GT(left, 33u);
  EXPECT_LT(left, 32 + kSlab / kChunk + 1);

  ASSERT_EQ(*rig_->engine->SetTierLimit(TierKind::kHbm, 0), 0u);
  RunUntil([&] { return tier_->GetStats().committed_bytes == 0; });
  if (OnStandin()) EXPECT_EQ(FreeDeviceBytes(), made_bytes_);
  for (uint64_t n = 200; n < 240; ++n) Save(n);
  EXPECT_EQ(tier_->GetStats().committed_bytes, 0u);
  EXPECT_EQ(Load(239), MissReason::kNone);

  ASSERT_EQ(*rig_->engine->SetTierLimit(TierKind::kHbm, UINT64_MAX),
            kSlabs * kSlab);
  for (uint64_t n = 240; n < 300; ++n) Save(n);
  EXPECT_GT(tier_->GetStats().committed_bytes, 0u);
  for (uint64_t n = 245; n < 300; ++n) EXPECT_EQ(Load(n), MissReason::kNone);
}

// Whatever happens, what is served is right.
TEST_F(HbmEngineTest, RandomUseUnderChangingLimits) {
  std::mt19937_64 random(11);
  uint64_t served = 0;
  for (int i = 0; i < 250; ++i) {
    const uint64_t n = random() % 250;
    if (random() % 40 == 0) {
      ASSERT_TRUE(
          rig_->engine
              ->SetTierLimit(TierKind::kHbm, random() % (kSlabs + 1) * kSlab)
              .ok());
    }
    if (rig_->engine->Stat(std::nullopt, OracleChunkId(n)).ok()) {
      const MissReason reason = Load(n);
      EXPECT_EQ(reason, MissReason::kNone) << ToString(reason);
      ++served;
    } else {
      Save(n);
    }
  }
  EXPECT_GT(served, 30u);
  RunUntil([&] {
    return tier_->GetStats().committed_bytes <= tier_->Usage().capacity_bytes;
  });
  for (uint32_t n = 0; n < 2; ++n) {
    ASSERT_TRUE(rig_->engine->EvictSpace(TenantId{n}, spaces_[n]).ok());
  }
  Settle();
  EXPECT_EQ(tier_->Usage().used_bytes, 0u);
}

using HbmEngineStandinTest = HbmEngineTest;

TEST_F(HbmEngineStandinTest, ALostDeviceTakesItsCopiesAndNothingElse) {
  for (uint64_t n = 0; n < 100; ++n) Save(n);
  ExpectLost();
  Control("lose 719");  // a wild access of a kernel
  EXPECT_EQ(Load(0), MissReason::kUnavailable);
  Settle();
  EXPECT_NE(rig_->engine->Stats().device_health, "");
  EXPECT_EQ(rig_->Events(EventType::kTierDegraded).size(), 1u);
  EXPECT_EQ(rig_->engine->Stats().chunks, 31u);  // one made room, in vain
  for (uint64_t n = 100; n < 150; ++n) Save(n);
  for (uint64_t n = 118; n < 150; ++n) EXPECT_EQ(Load(n), MissReason::kNone);
}

}  // namespace
}  // namespace larder
