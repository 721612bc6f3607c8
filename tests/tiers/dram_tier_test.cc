#include "tiers/dram/dram_tier.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <memory>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "tests/conformance/memory_tier_conformance.h"
#include "tests/conformance/tier_conformance.h"

namespace larder {
namespace {

constexpr TenantId kAda{1};
constexpr TenantId kBob{2};

std::unique_ptr<DramTier> MakeTier(uint64_t capacity_bytes, uint64_t slab_bytes,
                                   bool prefault = false) {
  DramTierOptions options;
  options.capacity_bytes = capacity_bytes;
  options.slab_bytes = slab_bytes;
  options.prefault = prefault;
  StatusOr<std::unique_ptr<DramTier>> tier = NewDramTier(std::move(options));
  EXPECT_TRUE(tier.ok()) << tier.status();
  return tier.ok() ? *std::move(tier) : nullptr;
}

class DramHarness final : public MemoryTierHarness {
 public:
  explicit DramHarness(std::unique_ptr<DramTier> tier)
      : tier_(std::move(tier)) {}
  MemoryTier& memory() override { return *tier_; }

 private:
  std::unique_ptr<DramTier> tier_;
};

auto Maker(uint64_t slab_bytes, bool prefault) {
  return [=](uint64_t capacity_bytes) {
    return std::make_unique<DramHarness>(
        MakeTier(capacity_bytes, slab_bytes, prefault));
  };
}

INSTANTIATE_TEST_SUITE_P(
    Dram, TierConformance,
    testing::Values(TierFactory{"small_slabs", Maker(2_MiB, false)},
                    TierFactory{"prefault", Maker(4_MiB, true)},
                    TierFactory{"odd_last_slab", Maker(6_MiB, false)}),
    TierFactoryName);
INSTANTIATE_TEST_SUITE_P(
    Dram, MemoryTierConformance,
    testing::Values(MemoryTierFactory{"small_slabs", Maker(2_MiB, false)},
                    MemoryTierFactory{"prefault", Maker(4_MiB, true)}),
    MemoryTierFactoryName);

std::vector<Extent> Fill(MemoryTier& tier, TenantId tenant, uint64_t bytes) {
  std::vector<Extent> extents;
  for (;;) {
    const StatusOr<Extent> extent = tier.Allocate(tenant, bytes);
    if (!extent.ok()) {
      EXPECT_TRUE(absl::IsResourceExhausted(extent.status()))
          << extent.status();
      return extents;
    }
    extents.push_back(*extent);
  }
}

void FreeAll(MemoryTier& tier, std::vector<Extent>& extents) {
  for (const Extent& extent : extents) tier.Free(extent);
  extents.clear();
}

TEST(DramTierTest, NamesTheOptionThatIsWrong) {
  const auto refused = [](uint64_t capacity, uint64_t slab, int node) {
    DramTierOptions options;
    options.capacity_bytes = capacity;
    options.slab_bytes = slab;
    options.numa_node = node;
    return std::string(NewDramTier(std::move(options)).status().message());
  };
  EXPECT_NE(refused(1_MiB, 2_MiB, -1).find("capacity_bytes"),
            std::string::npos);
  EXPECT_NE(refused(8_MiB, 0, -1).find("slab_bytes"), std::string::npos);
  EXPECT_NE(refused(8_MiB, 3_MiB, -1).find("slab_bytes"), std::string::npos);
  EXPECT_NE(refused(8_MiB, 128_GiB, -1).find("slab_bytes"), std::string::npos);
  EXPECT_NE(refused(8_MiB, 2_MiB, 77).find("numa_node"), std::string::npos);
  EXPECT_NE(refused(8_MiB, 2_MiB, -2).find("numa_node"), std::string::npos);
}

TEST(DramTierTest, CapacityIsRoundedDownAndBoundsTheLargestExtent) {
  const auto tier = MakeTier(5_MiB + 4096, 64_MiB);
  EXPECT_EQ(tier->Usage().capacity_bytes, 4_MiB);
  EXPECT_EQ(tier->MaxExtentBytes(), 4_MiB);
}

TEST(DramTierTest, UsesAllOfItsCapacityWithALastSlabThatIsSmaller) {
  const auto tier = MakeTier(10_MiB, 4_MiB);
  std::vector<Extent> extents = Fill(*tier, kAda, 1_MiB);
  EXPECT_EQ(extents.size(), 10u);
  EXPECT_EQ(tier->GetStats().slabs, 3u);
  EXPECT_EQ(tier->GetStats().committed_bytes, 10_MiB);
  FreeAll(*tier, extents);
  // Another tenant gets all of it as well, the largest extent included.
  const StatusOr<Extent> large = tier->Allocate(kBob, 4_MiB);
  ASSERT_TRUE(large.ok()) << large.status();
  extents = Fill(*tier, kBob, 1_MiB);
  EXPECT_EQ(extents.size(), 6u);
  EXPECT_EQ(tier->Usage().used_bytes, 10_MiB);
}

TEST(DramTierTest, PrefaultMakesAllSlabsBeforeItReturns) {
  DramTierOptions options;
  options.capacity_bytes = 10_MiB;
  options.slab_bytes = 4_MiB;
  options.prefault = true;
  std::vector<std::pair<uint64_t, uint64_t>> progress;
  options.progress = [&](uint64_t done, uint64_t total) {
    progress.emplace_back(done, total);
  };
  const auto tier = NewDramTier(std::move(options));
  ASSERT_TRUE(tier.ok()) << tier.status();
  EXPECT_EQ(
      progress,
      (std::vector<std::pair<uint64_t, uint64_t>>{
          {0, 10_MiB}, {4_MiB, 10_MiB}, {8_MiB, 10_MiB}, {10_MiB, 10_MiB}}));
  EXPECT_EQ((*tier)->GetStats().spare_slabs, 3u);
  EXPECT_EQ((*tier)->Usage().used_bytes, 0u);
  // A spare slab is nobody's: nobody is told about it.
  EXPECT_TRUE(absl::IsNotFound((*tier)->Slab(1).status()));
  // A small extent leaves the large slabs to those that need them.
  const StatusOr<Extent> small = (*tier)->Allocate(kAda, 64_KiB);
  ASSERT_TRUE(small.ok());
  EXPECT_EQ((*tier)->Slab((*tier)->Address(*small).slab)->bytes, 2_MiB);
  EXPECT_EQ(Fill(**tier, kBob, 4_MiB).size(), 2u);
  EXPECT_EQ((*tier)->GetStats().slabs_made, 3u);
}

TEST(DramTierTest, SlackAndRetiredSlabsAreWaste) {
  const auto tier = MakeTier(8_MiB, 2_MiB);
  const StatusOr<Extent> extent = tier->Allocate(kAda, 4097);
  ASSERT_TRUE(extent.ok());
  EXPECT_EQ(tier->Usage().used_bytes, 8192u);
  EXPECT_EQ(tier->Usage().waste_bytes, 4095u);
  const Extent shrunk = tier->Shrink(*extent, 4000);
  EXPECT_EQ(tier->Usage().used_bytes, 4096u);
  EXPECT_EQ(tier->Usage().waste_bytes, 96u);
  tier->Free(shrunk);
  EXPECT_EQ(tier->Usage().waste_bytes, 0u);
}

TEST(DramTierTest, PrefersTheFullestSlabThatFits) {
  const auto tier = MakeTier(8_MiB, 2_MiB);
  std::vector<Extent> extents = Fill(*tier, kAda, 512_KiB);
  ASSERT_EQ(extents.size(), 16u);
  const auto slab_of = [&](Extent extent) {
    return tier->Address(extent).slab;
  };
  // Of slab 1 three go, of slab 2 one, of slab 3 two.
  std::vector<Extent> kept;
  int freed[5] = {};
  const int goes[5] = {0, 3, 1, 2, 0};
  for (const Extent& extent : extents) {
    const uint32_t slab = slab_of(extent);
    ASSERT_LT(slab, 5u);
    if (freed[slab] < goes[slab]) {
      ++freed[slab];
      tier->Free(extent);
    } else {
      kept.push_back(extent);
    }
  }
  std::vector<uint32_t> order;
  for (int i = 0; i < 6; ++i) {
    order.push_back(slab_of(*tier->Allocate(kAda, 512_KiB)));
  }
  EXPECT_EQ(order, (std::vector<uint32_t>{2, 3, 3, 1, 1, 1}));
}

TEST(DramTierTest, AnEmptySlabGoesToAnotherTenantAtOnceIfNobodyCanMapIt) {
  const auto tier = MakeTier(8_MiB, 2_MiB);
  std::vector<Extent> extents = Fill(*tier, kAda, 2_MiB);
  ASSERT_EQ(extents.size(), 4u);
  EXPECT_TRUE(absl::IsResourceExhausted(tier->Allocate(kBob, 1).status()));
  tier->Free(extents.back());
  const StatusOr<Extent> extent = tier->Allocate(kBob, 2_MiB);
  ASSERT_TRUE(extent.ok()) << extent.status();
  EXPECT_EQ(tier->Address(*extent).slab, 5u);
  EXPECT_EQ(tier->GetStats().retired_slabs, 0u);
  EXPECT_EQ(tier->GetStats().committed_bytes, 8_MiB);
  // A slab that still holds something is nobody else's.
  tier->Free(extents[0]);
  const StatusOr<Extent> small = tier->Allocate(kAda, 1);
  ASSERT_TRUE(small.ok());
  EXPECT_TRUE(absl::IsResourceExhausted(tier->Allocate(kBob, 1_MiB).status()));
}

TEST(DramTierTest, ASlabThatMayBeMappedCountsUntilItIsForgotten) {
  const auto tier = MakeTier(4_MiB, 2_MiB);
  std::vector<std::pair<uint32_t, TenantId>> retired;
  tier->ObserveRetired([&](uint32_t slab, TenantId tenant) {
    retired.emplace_back(slab, tenant);
  });
  std::vector<Extent> extents = Fill(*tier, kAda, 2_MiB);
  ASSERT_EQ(extents.size(), 2u);
  std::memset(tier->Map(extents[0]).data(), 0x5a, 2_MiB);
  const uint32_t number = tier->Address(extents[0]).slab;
  const StatusOr<SlabInfo> slab = tier->Slab(number);
  ASSERT_TRUE(slab.ok());
  void* view = ::mmap(nullptr, slab->bytes, PROT_READ, MAP_SHARED, slab->fd, 0);
  ASSERT_NE(view, MAP_FAILED);
  struct stat before;
  ASSERT_EQ(::fstat(slab->fd, &before), 0);

  tier->Free(extents[0]);
  EXPECT_TRUE(absl::IsResourceExhausted(tier->Allocate(kBob, 1).status()));
  EXPECT_EQ(retired,
            (std::vector<std::pair<uint32_t, TenantId>>{{number, kAda}}));
  EXPECT_EQ(tier->RetiredSlabs(), std::vector<uint32_t>{number});
  EXPECT_TRUE(absl::IsNotFound(tier->Slab(number).status()));
  // The former reader sees zeroes, in a file whose number means nothing else.
  for (uint64_t i = 0; i < slab->bytes; ++i) {
    ASSERT_EQ(static_cast<const char*>(view)[i], 0);
  }
  struct stat after;
  ASSERT_EQ(::fstat(slab->fd, &after), 0);
  EXPECT_EQ(before.st_ino, after.st_ino);
  EXPECT_EQ(tier->Usage().waste_bytes, 2_MiB);
  EXPECT_EQ(tier->GetStats().committed_bytes, 4_MiB);
  // Nobody gets that room, its former owner neither.
  EXPECT_TRUE(absl::IsResourceExhausted(tier->Allocate(kAda, 1).status()));

  ::munmap(view, slab->bytes);
  tier->Forget(number);
  tier->Forget(number);
  tier->Forget(9999);
  tier->Forget(tier->Address(extents[1]).slab);  // in service: nothing happens
  EXPECT_EQ(tier->Usage().waste_bytes, 0u);
  EXPECT_TRUE(tier->RetiredSlabs().empty());
  const StatusOr<Extent> extent = tier->Allocate(kBob, 2_MiB);
  ASSERT_TRUE(extent.ok()) << extent.status();
  EXPECT_EQ(tier->GetStats().committed_bytes, 4_MiB);
  EXPECT_EQ(tier->Map(extents[1]).size(), 2_MiB);
}

TEST(DramTierTest, AnObserverMayForgetAtOnce) {
  const auto tier = MakeTier(2_MiB, 2_MiB);
  tier->ObserveRetired([&](uint32_t slab, TenantId) { tier->Forget(slab); });
  const StatusOr<Extent> first = tier->Allocate(kAda, 2_MiB);
  ASSERT_TRUE(first.ok());
  ASSERT_TRUE(tier->Slab(1).ok());
  tier->Free(*first);
  const StatusOr<Extent> second = tier->Allocate(kBob, 2_MiB);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(tier->Address(*second).slab, 2u);
}

TEST(DramTierTest, AClientThatNeverUnmapsBlocksOnlyItsOwnSlab) {
  const auto tier = MakeTier(6_MiB, 2_MiB);
  std::vector<Extent> extents = Fill(*tier, kAda, 2_MiB);
  for (const Extent& extent : extents) {
    ASSERT_TRUE(tier->Slab(tier->Address(extent).slab).ok());
  }
  FreeAll(*tier, extents);
  // Each refusal retires one more, so that one stubborn client is not waited
  // for alone.
  EXPECT_FALSE(tier->Allocate(kBob, 1).ok());
  EXPECT_EQ(tier->RetiredSlabs().size(), 1u);
  EXPECT_FALSE(tier->Allocate(kBob, 1).ok());
  EXPECT_EQ(tier->RetiredSlabs().size(), 2u);
  tier->Forget(tier->RetiredSlabs()[1]);
  EXPECT_TRUE(tier->Allocate(kBob, 1).ok());
  EXPECT_EQ(tier->GetStats().committed_bytes, 6_MiB);
}

TEST(DramTierTest, CapacityHoldsWhileTenantsTakeTurns) {
  constexpr uint64_t kCapacity = 12_MiB;
  const auto tier = MakeTier(kCapacity, 2_MiB);
  std::atomic<bool> stop = false;
  std::set<uint32_t> seen;
  // The session layer: acknowledges retirements a little later.
  std::thread session([&] {
    while (!stop) {
      for (const uint32_t slab : tier->RetiredSlabs()) tier->Forget(slab);
      const DramTier::Stats stats = tier->GetStats();
      EXPECT_LE(stats.committed_bytes, kCapacity);
      const TierUsage usage = tier->Usage();
      EXPECT_LE(usage.used_bytes + stats.retired_bytes, 2 * kCapacity);
      std::this_thread::yield();
    }
  });
  std::vector<std::thread> tenants;
  for (uint32_t t = 1; t <= 3; ++t) {
    tenants.emplace_back([&, t] {
      std::mt19937_64 random(t);
      std::vector<Extent> live;
      int stored = 0;
      while (stored < 150) {
        const StatusOr<Extent> extent =
            tier->Allocate(TenantId{t}, 1 + random() % 1_MiB);
        if (!extent.ok()) {
          ASSERT_TRUE(absl::IsResourceExhausted(extent.status()));
          for (const Extent& each : live) tier->Free(each);
          live.clear();
          std::this_thread::yield();
          continue;
        }
        ++stored;
        const StatusOr<SlabInfo> slab = tier->Slab(tier->Address(*extent).slab);
        ASSERT_TRUE(slab.ok());
        ASSERT_EQ(slab->tenant, TenantId{t});
        const MutableByteSpan memory = tier->Map(*extent);
        for (const size_t at : {size_t{0}, memory.size() - 1}) {
          ASSERT_TRUE(memory[at] == std::byte{0} ||
                      memory[at] == static_cast<std::byte>(t))
              << "another tenant's byte";
          memory[at] = static_cast<std::byte>(t);
        }
        live.push_back(*extent);
      }
      for (const Extent& each : live) tier->Free(each);
    });
  }
  for (std::thread& thread : tenants) thread.join();
  stop = true;
  session.join();
  EXPECT_EQ(tier->Usage().used_bytes, 0u);
}

TEST(DramTierTest, FreeWaitsForReadsUnderWay) {
  constexpr uint64_t kPages = 512;
  const auto tier = MakeTier(2_MiB, 2_MiB);
  for (uint64_t round = 0; round < 40; ++round) {
    const TestRecord test = MakeTestRecord(round, kPages);
    const StatusOr<Extent> extent = tier->Allocate(kAda, 2_MiB);
    ASSERT_TRUE(extent.ok());
    Completion write;
    tier->Write(*extent, test.record.meta, test.record.bytes.span(),
                write.Callback());
    ASSERT_TRUE(write.status().ok());
    PageBuffer buffer(2_MiB);
    std::atomic<bool> started = false;
    Completion read;
    std::thread reader([&] {
      started = true;
      tier->Read(*extent, 0, buffer.span(), read.Callback());
    });
    while (!started) std::this_thread::yield();
    tier->Free(*extent);
    // The successor takes the very same bytes as soon as it may.
    StatusOr<Extent> successor;
    do {
      successor = tier->Allocate(kAda, 2_MiB);
    } while (!successor.ok());
    std::memset(tier->Map(*successor).data(), 0xee, 2_MiB);
    reader.join();
    if (read.status().ok()) {
      EXPECT_TRUE(
          CheckRecord(test.group, buffer.span(), test.record.meta).ok());
    } else {
      EXPECT_TRUE(absl::IsInvalidArgument(read.status())) << read.status();
    }
    tier->Free(*successor);
    EXPECT_EQ(tier->Usage().used_bytes, 0u);
  }
}

TEST(DramTierTest, RefusesARecordOfAnotherSizeThanItsMeta) {
  const auto tier = MakeTier(2_MiB, 2_MiB);
  TestRecord test = MakeTestRecord(1, 4);
  const StatusOr<Extent> extent = tier->Allocate(kAda, 5 * kPageBytes);
  ASSERT_TRUE(extent.ok());
  const auto write = [&](uint64_t record_bytes) {
    RecordMeta meta = test.record.meta;
    meta.record_bytes = record_bytes;
    Completion completion;
    tier->Write(*extent, meta, test.record.bytes.span(), completion.Callback());
    return completion.status().code();
  };
  EXPECT_EQ(write(0), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(write(3 * kPageBytes), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(write(~uint64_t{0}), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(write(4 * kPageBytes), absl::StatusCode::kOk);
}

TEST(DramTierTest, StaleHandlesAreNoticed) {
  const auto tier = MakeTier(4_MiB, 2_MiB);
  const StatusOr<Extent> stale = tier->Allocate(kAda, 8_KiB);
  ASSERT_TRUE(stale.ok());
  tier->Free(*stale);
  const StatusOr<Extent> current = tier->Allocate(kAda, 8_KiB);
  ASSERT_TRUE(current.ok());
  // The same pages, and yet another extent.
  ASSERT_EQ(tier->Address(*current), tier->Address(*stale));
  EXPECT_NE(current->handle, stale->handle);
  Completion read;
  PageBuffer buffer(kPageBytes);
  tier->Read(*stale, 0, buffer.span(), read.Callback());
  EXPECT_TRUE(absl::IsInvalidArgument(read.status())) << read.status();
#ifdef NDEBUG
  tier->Free(*stale);
  tier->Free(Extent{});
  EXPECT_TRUE(tier->Map(*stale).empty());
  EXPECT_EQ(tier->Shrink(*stale, 1), *stale);
  EXPECT_EQ(tier->Shrink(*current, 12_KiB), *current);
  EXPECT_EQ(tier->GetStats().ignored_calls, 5u);
  EXPECT_EQ(tier->Usage().used_bytes, 8_KiB);
#else
  testing::FLAGS_gtest_death_test_style = "threadsafe";
  EXPECT_DEATH(tier->Free(*stale), "Free of no live extent");
#endif
}

}  // namespace
}  // namespace larder
