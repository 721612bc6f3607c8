#include "tiers/hbm/hbm_tier.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/conformance/tier_conformance.h"
#include "tests/testing/cuda_device.h"
#include "tiers/hbm/copy_queue.h"

namespace larder {
namespace {

using ::testing::HasSubstr;

constexpr TenantId kAda{1};
constexpr TenantId kBob{2};

// A device of its own and a tier on it.
class HbmHarness final : public TierHarness {
 public:
  HbmHarness(uint64_t capacity_bytes, uint64_t slab_bytes,
             uint64_t staging_bytes, uint32_t staging_buffers) {
    if (OnStandin()) Control("reset");
    std::string why_not;
    driver_ = cuda::Driver::Open(TestDriver(), &why_not);
    EXPECT_NE(driver_, nullptr) << why_not;
    cuda::Error error;
    context_ = cuda::Context::Retain(*driver_, 0, &error);
    EXPECT_NE(context_, nullptr) << error.ToString();
    HbmTierOptions options;
    options.context = context_.get();
    options.capacity_bytes = capacity_bytes;
    options.slab_bytes = slab_bytes;
    options.staging_bytes = staging_bytes;
    options.staging_buffers = staging_buffers;
    StatusOr<std::unique_ptr<HbmTier>> tier = NewHbmTier(options);
    EXPECT_TRUE(tier.ok()) << tier.status();
    tier_ = *std::move(tier);
  }
  ~HbmHarness() override {
    tier_.reset();
    context_.reset();
    if (OnStandin()) EXPECT_EQ(Control("leaks"), "");
  }
  Tier& tier() override { return *tier_; }
  int HammerRounds() const override { return 60; }

 private:
  std::unique_ptr<const cuda::Driver> driver_;
  std::unique_ptr<cuda::Context> context_;
  std::unique_ptr<HbmTier> tier_;
};

auto Maker(uint64_t slab_bytes, uint64_t staging_bytes,
           uint32_t staging_buffers) {
  return [=](uint64_t capacity_bytes) {
    return std::make_unique<HbmHarness>(capacity_bytes, slab_bytes,
                                        staging_bytes, staging_buffers);
  };
}

INSTANTIATE_TEST_SUITE_P(
    Hbm, TierConformance,
    testing::Values(TierFactory{"small_slabs", Maker(2_MiB, 64_KiB, 3)},
                    TierFactory{"one_slab", Maker(16_MiB, 4_MiB, 4)},
                    TierFactory{"odd_slabs", Maker(6_MiB, 64_KiB, 1)}),
    TierFactoryName);

// The tier's calls, waited for.
Status Write(Tier& tier, Extent extent, const OracleRecord& record) {
  Completion completion;
  tier.Write(extent, record.meta, record.bytes.span(), completion.Callback());
  while (!completion.done()) std::this_thread::yield();
  return completion.status();
}
Status Read(Tier& tier, Extent extent, MutableByteSpan into) {
  Completion completion;
  tier.Read(extent, 0, into, completion.Callback());
  while (!completion.done()) std::this_thread::yield();
  return completion.status();
}
std::vector<Extent> Fill(Tier& tier, TenantId tenant, uint64_t bytes) {
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
void WaitForCommitted(const HbmTier& tier, uint64_t bytes) {
  while (tier.GetStats().committed_bytes != bytes) std::this_thread::yield();
}

class HbmTierTest : public DeviceTest {
 protected:
  std::unique_ptr<HbmTier> MakeTier(uint64_t capacity_bytes,
                                    uint64_t slab_bytes = 2_MiB) {
    StatusOr<std::unique_ptr<HbmTier>> tier =
        NewHbmTier(Options(capacity_bytes, slab_bytes));
    EXPECT_TRUE(tier.ok()) << tier.status();
    return tier.ok() ? *std::move(tier) : nullptr;
  }
  HbmTierOptions Options(uint64_t capacity_bytes, uint64_t slab_bytes) {
    HbmTierOptions options;
    options.context = &context();
    options.capacity_bytes = capacity_bytes;
    options.slab_bytes = slab_bytes;
    options.staging_bytes = 16_KiB;
    options.staging_buffers = 3;
    return options;
  }

  // Device memory at any address.
  std::vector<std::byte> Peek(cuda::DevicePtr at_dev, size_t bytes) {
    std::vector<std::byte> seen(bytes);
    cuda::Stream stream = nullptr;
    LARDER_EXPECT_CUDA(
        driver().stream_create(&stream, cuda::kStreamNonBlocking));
    LARDER_EXPECT_CUDA(
        driver().memcpy_d2h_async(seen.data(), at_dev, bytes, stream));
    LARDER_EXPECT_CUDA(driver().stream_synchronize(stream));
    LARDER_EXPECT_CUDA(driver().stream_destroy(stream));
    return seen;
  }
  uint64_t FreeDeviceBytes() {
    size_t free_bytes = 0;
    size_t total_bytes = 0;
    LARDER_EXPECT_CUDA(driver().mem_get_info(&free_bytes, &total_bytes));
    return free_bytes;
  }
};

TEST_F(HbmTierTest, NamesTheOptionThatIsWrong) {
  const auto refused = [&](auto change) {
    HbmTierOptions options = Options(8_MiB, 2_MiB);
    change(options);
    const Status status = NewHbmTier(options).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    return std::string(status.message());
  };
  using O = HbmTierOptions;
  EXPECT_THAT(refused([](O& o) { o.context = nullptr; }), HasSubstr("context"));
  EXPECT_THAT(refused([](O& o) { o.slab_bytes = 0; }), HasSubstr("slab_bytes"));
  EXPECT_THAT(refused([](O& o) { o.slab_bytes = 2_MiB + kPageBytes; }),
              HasSubstr("granularity"));
  EXPECT_THAT(refused([](O& o) { o.slab_bytes = 128_GiB; }),
              HasSubstr("slab_bytes"));
  EXPECT_THAT(refused([](O& o) { o.capacity_bytes = 1_MiB; }),
              HasSubstr("capacity_bytes"));
  EXPECT_THAT(refused([](O& o) { o.capacity_bytes = uint64_t{1} << 50; }),
              HasSubstr("more than the device has"));
  EXPECT_THAT(refused([](O& o) { o.staging_bytes = 100; }),
              HasSubstr("staging_bytes"));
  EXPECT_THAT(refused([](O& o) { o.staging_buffers = 0; }),
              HasSubstr("staging_buffers"));
}

TEST_F(HbmTierTest, TakesDeviceMemoryOnlyWhenItIsNeeded) {
  const auto tier = MakeTier(7_MiB);
  EXPECT_EQ(tier->kind(), TierKind::kHbm);
  EXPECT_EQ(tier->Usage().capacity_bytes, 6_MiB);
  EXPECT_EQ(tier->GetStats().committed_bytes, 0u);
  const uint64_t before = FreeDeviceBytes();
  const std::vector<Extent> extents = Fill(*tier, kAda, 1_MiB);
  EXPECT_EQ(extents.size(), 6u);
  EXPECT_EQ(tier->GetStats().committed_bytes, 6_MiB);
  if (OnStandin()) EXPECT_EQ(FreeDeviceBytes(), before - 6_MiB);
  for (const Extent& extent : extents) tier->Free(extent);
}

TEST_F(HbmTierTest, ExtentsLieInOneRangeAndDoNotOverlap) {
  const auto tier = MakeTier(8_MiB);
  std::vector<Extent> extents;
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (uint64_t n = 0; n < 40; ++n) {
    const StatusOr<Extent> extent =
        tier->Allocate(n % 2 == 0 ? kAda : kBob, (1 + n * 7 % 30) * kPageBytes);
    ASSERT_TRUE(extent.ok()) << extent.status();
    extents.push_back(*extent);
    ranges.emplace_back(tier->Locate(*extent), extent->bytes);
  }
  std::sort(ranges.begin(), ranges.end());
  for (size_t i = 1; i < ranges.size(); ++i) {
    EXPECT_LE(ranges[i - 1].first + ranges[i - 1].second, ranges[i].first);
  }
  EXPECT_LE(ranges.back().first + ranges.back().second - ranges.front().first,
            8_MiB);
  for (const Extent& extent : extents) tier->Free(extent);
  EXPECT_EQ(tier->Locate(extents[0]), 0u);
}

TEST_F(HbmTierTest, TenantsNeverShareASlab) {
  const auto tier = MakeTier(8_MiB);
  std::set<uint32_t> slabs[2];
  std::vector<Extent> extents;
  for (int n = 0; n < 40; ++n) {
    const StatusOr<Extent> extent =
        tier->Allocate(n % 2 == 0 ? kAda : kBob, 128_KiB);
    ASSERT_TRUE(extent.ok()) << extent.status();
    extents.push_back(*extent);
    slabs[n % 2].insert(tier->Address(*extent).slab);
  }
  for (const uint32_t slab : slabs[0]) EXPECT_EQ(slabs[1].count(slab), 0u);
  for (const Extent& extent : extents) tier->Free(extent);
}

TEST_F(HbmTierTest, AnotherTenantGetsZeroesUnderANewNumber) {
  const auto tier = MakeTier(6_MiB);
  std::set<uint32_t> former;
  std::vector<Extent> extents;
  for (uint64_t n = 0;; ++n) {
    const TestRecord test = MakeTestRecord(n, 128, 1, kAda);
    const StatusOr<Extent> extent =
        tier->Allocate(kAda, test.record.meta.record_bytes);
    if (!extent.ok()) break;
    extents.push_back(*extent);
    former.insert(tier->Address(*extent).slab);
    const Status written = Write(*tier, *extent, test.record);
    ASSERT_TRUE(written.ok()) << written;
  }
  EXPECT_EQ(extents.size(), 12u);
  EXPECT_FALSE(tier->Allocate(kBob, 4_KiB).ok());
  for (const Extent& extent : extents) tier->Free(extent);
  extents = Fill(*tier, kBob, 512_KiB);
  EXPECT_EQ(extents.size(), 12u);
  PageBuffer buffer(512_KiB);
  for (const Extent& extent : extents) {
    EXPECT_EQ(former.count(tier->Address(extent).slab), 0u);
    const Status read = Read(*tier, extent, buffer.span());
    ASSERT_TRUE(read.ok()) << read;
    for (const std::byte byte : buffer.span()) {
      ASSERT_EQ(byte, std::byte{0}) << "another tenant's bytes";
    }
    tier->Free(extent);
  }
}

TEST_F(HbmTierTest, ClientsReadExtentsWhereTheyLie) {
  const auto tier = MakeTier(4_MiB);
  const TestRecord first = MakeTestRecord(1, 9, 1, kAda);
  const TestRecord test = MakeTestRecord(2, 20, 1, kAda);
  const StatusOr<Extent> before =
      tier->Allocate(kAda, first.record.meta.record_bytes);
  ASSERT_TRUE(before.ok());
  const StatusOr<Extent> extent =
      tier->Allocate(kAda, test.record.meta.record_bytes);
  ASSERT_TRUE(extent.ok());
  ASSERT_TRUE(Write(*tier, *extent, test.record).ok());

  const ExtentAddress address = tier->Address(*extent);
  const StatusOr<HbmTier::ExportedSlab> slab = tier->Export(address.slab);
  ASSERT_TRUE(slab.ok()) << slab.status();
  EXPECT_EQ(slab->slab, address.slab);
  EXPECT_EQ(slab->tenant, kAda);
  EXPECT_EQ(slab->bytes, 2_MiB);
  // As a client does with the descriptor.
  cuda::MemHandle handle = 0;
  LARDER_ASSERT_CUDA(driver().mem_import_from_shareable_handle(
      &handle, reinterpret_cast<void*>(static_cast<intptr_t>(slab->fd)),
      cuda::HandleType::kPosixFileDescriptor));
  close(slab->fd);
  cuda::DevicePtr view = 0;
  LARDER_ASSERT_CUDA(driver().mem_address_reserve(&view, slab->bytes, 0, 0, 0));
  LARDER_ASSERT_CUDA(driver().mem_map(view, slab->bytes, 0, handle, 0));
  const cuda::MemAccessDesc access = {
      {cuda::LocationType::kDevice, context().device()},
      cuda::AccessFlags::kReadWrite};
  LARDER_ASSERT_CUDA(driver().mem_set_access(view, slab->bytes, &access, 1));
  const std::vector<std::byte> seen =
      Peek(view + address.offset, test.record.meta.record_bytes);
  EXPECT_EQ(std::memcmp(seen.data(), test.record.bytes.data(), seen.size()), 0);
  EXPECT_EQ(Peek(tier->Locate(*extent), 64),
            std::vector<std::byte>(seen.begin(), seen.begin() + 64));

  // Retired, it is wiped, and counts until nobody can map it.
  std::vector<std::pair<uint32_t, TenantId>> retired;
  tier->ObserveRetired([&](uint32_t number, TenantId tenant) {
    retired.emplace_back(number, tenant);
  });
  tier->Free(*before);
  tier->Free(*extent);
  const std::vector<Extent> others = Fill(*tier, kBob, 1_MiB);
  EXPECT_EQ(others.size(), 2u);
  EXPECT_EQ(retired,
            (std::vector<std::pair<uint32_t, TenantId>>{{address.slab, kAda}}));
  EXPECT_EQ(tier->RetiredSlabs(), std::vector<uint32_t>{address.slab});
  EXPECT_TRUE(absl::IsNotFound(tier->Export(address.slab).status()));
  EXPECT_EQ(tier->GetStats().committed_bytes, 4_MiB);
  EXPECT_EQ(tier->Usage().waste_bytes, 2_MiB);
  EXPECT_EQ(Peek(view, 4096), std::vector<std::byte>(4096, std::byte{0}));
  EXPECT_EQ(Peek(view + address.offset, 4096),
            std::vector<std::byte>(4096, std::byte{0}));
  LARDER_EXPECT_CUDA(driver().mem_unmap(view, slab->bytes));
  LARDER_EXPECT_CUDA(driver().mem_release(handle));
  LARDER_EXPECT_CUDA(driver().mem_address_free(view, slab->bytes));
  tier->Forget(address.slab);
  tier->Forget(address.slab);
  EXPECT_EQ(Fill(*tier, kBob, 1_MiB).size(), 2u);
  EXPECT_EQ(tier->GetStats().slabs_made, 3u);
}

TEST_F(HbmTierTest, GivesMemoryBackUnderPressureAndTakesItAgain) {
  const auto tier = MakeTier(8_MiB);
  // Slabs with 4, 3, 2 and 1 quarters in use.
  std::vector<Extent> extents = Fill(*tier, kAda, 512_KiB);
  ASSERT_EQ(extents.size(), 16u);
  std::vector<std::vector<Extent>> by_slab(4);
  for (const Extent& extent : extents) {
    by_slab[tier->Address(extent).slab - 1].push_back(extent);
  }
  for (size_t slab = 0; slab < 4; ++slab) {
    for (size_t n = 0; n < slab; ++n) {
      tier->Free(by_slab[slab].back());
      by_slab[slab].pop_back();
    }
  }
  tier->SetLimit(5_MiB);
  EXPECT_EQ(tier->Usage().capacity_bytes, 4_MiB);
  EXPECT_EQ(tier->Usage().used_bytes, 5_MiB);
  EXPECT_EQ(tier->GetStats().slabs, 4u);
  EXPECT_EQ(tier->GetStats().leaving_slabs, 2u);
  // The emptiest ones, and what is in them, emptiest first.
  EXPECT_EQ(tier->ExtentsBeyondLimit(),
            (std::vector<Extent>{by_slab[3][0], by_slab[2][0], by_slab[2][1]}));
  // They take nothing new; the others do.
  const StatusOr<Extent> more = tier->Allocate(kAda, 512_KiB);
  ASSERT_TRUE(more.ok()) << more.status();
  EXPECT_EQ(tier->Address(*more).slab, 2u);
  EXPECT_FALSE(tier->Allocate(kAda, 512_KiB).ok());
  // Evicted, they go.
  const uint64_t before = FreeDeviceBytes();
  for (const Extent& extent : tier->ExtentsBeyondLimit()) tier->Free(extent);
  WaitForCommitted(*tier, 4_MiB);
  EXPECT_TRUE(tier->ExtentsBeyondLimit().empty());
  if (OnStandin()) EXPECT_EQ(FreeDeviceBytes(), before + 4_MiB);
  EXPECT_FALSE(tier->Allocate(kAda, 512_KiB).ok());
  // And come again.
  tier->SetLimit(~uint64_t{0});
  EXPECT_EQ(tier->Usage().capacity_bytes, 8_MiB);
  EXPECT_EQ(Fill(*tier, kAda, 512_KiB).size(), 8u);
}

TEST_F(HbmTierTest, EmptySlabsGoBeforeSetLimitReturns) {
  const auto tier = MakeTier(8_MiB);
  std::vector<Extent> extents = Fill(*tier, kAda, 2_MiB);
  for (const Extent& extent : extents) tier->Free(extent);
  EXPECT_EQ(tier->GetStats().committed_bytes, 8_MiB);
  tier->SetLimit(2_MiB);
  EXPECT_EQ(tier->GetStats().committed_bytes, 2_MiB);
  tier->SetLimit(0);
  EXPECT_EQ(tier->GetStats().committed_bytes, 0u);
  EXPECT_TRUE(absl::IsResourceExhausted(tier->Allocate(kAda, 4_KiB).status()));
}

TEST_F(HbmTierTest, ALimitThatIsTakenBackKeepsWhatWasLeaving) {
  const auto tier = MakeTier(4_MiB);
  const StatusOr<Extent> large = tier->Allocate(kAda, 2_MiB);
  const StatusOr<Extent> small = tier->Allocate(kAda, 4_KiB);
  ASSERT_TRUE(large.ok() && small.ok());
  tier->SetLimit(2_MiB);
  EXPECT_FALSE(tier->Allocate(kAda, 4_KiB).ok());
  tier->SetLimit(4_MiB);
  const StatusOr<Extent> again = tier->Allocate(kAda, 4_KiB);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(tier->Address(*again).slab, tier->Address(*small).slab);
}

TEST_F(HbmTierTest, ARecordThatIsFreedWhileItMovesEmptiesItsSlabAtItsEnd) {
  ForSeeds(10, [&] {
    const auto tier = MakeTier(4_MiB);
    const TestRecord test = MakeTestRecord(5, 40, 1, kAda);
    const StatusOr<Extent> extent =
        tier->Allocate(kAda, test.record.meta.record_bytes);
    ASSERT_TRUE(extent.ok());
    Completion written;
    tier->Write(*extent, test.record.meta, test.record.bytes.span(),
                written.Callback());
    tier->Free(*extent);
    tier->SetLimit(0);
    while (!written.done()) std::this_thread::yield();
    EXPECT_TRUE(written.status().ok() || absl::IsCancelled(written.status()))
        << written.status();
    WaitForCommitted(*tier, 0);
  });
}

TEST_F(HbmTierTest, WhatIsUnderWayEndsBeforeTheTierDoes) {
  ForSeeds(10, [&] {
    auto tier = MakeTier(4_MiB);
    const TestRecord test = MakeTestRecord(6, 60, 1, kAda);
    const StatusOr<Extent> extent =
        tier->Allocate(kAda, test.record.meta.record_bytes);
    ASSERT_TRUE(extent.ok());
    PageBuffer buffer(test.record.bytes.size());
    Completion written;
    Completion read;
    tier->Write(*extent, test.record.meta, test.record.bytes.span(),
                written.Callback());
    tier->Read(*extent, 0, buffer.span(), read.Callback());
    tier.reset();
    EXPECT_TRUE(written.done() && written.status().ok());
    ASSERT_TRUE(read.done() && read.status().ok());
    // Asked for later, it saw what the write wrote.
    const Status status =
        CheckRecord(test.group, buffer.span(), test.record.meta);
    EXPECT_TRUE(status.ok()) << status;
  });
}

// Failures

class StandinHbmTest : public HbmTierTest {
 protected:
  void SetUp() override {
    ASSERT_TRUE(OnStandin());
    HbmTierTest::SetUp();
  }
};

TEST_F(StandinHbmTest, ADeviceWithoutMemoryIsFull) {
  Control("memory 16777216");
  const auto tier = MakeTier(8_MiB);
  // Somebody else takes all but one slab.
  cuda::DevicePtr other = 0;
  LARDER_ASSERT_CUDA(driver().mem_alloc(&other, FreeDeviceBytes() - 3_MiB));
  EXPECT_EQ(Fill(*tier, kAda, 1_MiB).size(), 2u);
  const Status status = tier->Allocate(kAda, 1_MiB).status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_THAT(std::string(status.message()),
              HasSubstr("cuMemCreate: out of memory"));
  EXPECT_TRUE(tier->Health().ok());
  LARDER_ASSERT_CUDA(driver().mem_free(other));
  EXPECT_EQ(Fill(*tier, kAda, 1_MiB).size(), 6u);
}

TEST_F(StandinHbmTest, ADeviceThatIsFullOfOthersTakesAnEmptySlabInstead) {
  const auto tier = MakeTier(8_MiB);
  const Extent ada = tier->Allocate(kAda, 1_MiB).value();
  tier->Free(ada);
  Control("fail cuMemCreate 1 2");  // out of memory
  EXPECT_TRUE(tier->Allocate(kBob, 1_MiB).ok());
  EXPECT_EQ(tier->GetStats().slabs, 1u);
  Control("fail cuMemCreate 1 2");
  EXPECT_TRUE(absl::IsResourceExhausted(tier->Allocate(kAda, 1_MiB).status()));
}

TEST_F(StandinHbmTest, ASlabThatCannotBeMadeLeavesNothingBehind) {
  const auto tier = MakeTier(2_MiB);
  for (const char* const call :
       {"cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD32Async",
        "cuStreamSynchronize", "cuCtxPushCurrent"}) {
    Control("fail " + std::string(call) + " 1 801");
    const Status status = tier->Allocate(kAda, 4_KiB).status();
    EXPECT_TRUE(absl::IsUnavailable(status)) << call << ": " << status;
    EXPECT_THAT(std::string(status.message()), HasSubstr(call));
    EXPECT_EQ(tier->GetStats().committed_bytes, 0u) << call;
    EXPECT_EQ(FreeDeviceBytes(), context().info().memory_bytes) << call;
    EXPECT_TRUE(tier->Health().ok()) << call;
  }
  EXPECT_TRUE(tier->Allocate(kAda, 2_MiB).ok());
}

TEST_F(StandinHbmTest, ATierThatCannotBeMadeLeavesNothingBehind) {
  for (const char* const call :
       {"cuMemAddressReserve", "cuStreamCreate", "cuMemHostAlloc",
        "cuEventCreate", "cuMemGetAllocationGranularity"}) {
    for (int nth = 1; nth <= 3; ++nth) {
      const std::string command =
          "fail " + std::string(call) + " " + std::to_string(nth) + " 2";
      if (nth > 1 && std::string(call).find("cuMemH") != 0 &&
          std::string(call).find("cuEvent") != 0) {
        continue;  // called less often
      }
      Control(command);
      const Status status = NewHbmTier(Options(4_MiB, 2_MiB)).status();
      EXPECT_TRUE(absl::IsResourceExhausted(status)) << command << status;
      EXPECT_EQ(Control("leaks"), "1 context") << command;
    }
  }
  Control("attribute 102 0");
  cuda::Error error;
  const auto old = cuda::Context::Retain(driver(), 0, &error);
  ASSERT_NE(old, nullptr);
  HbmTierOptions options = Options(4_MiB, 2_MiB);
  options.context = old.get();
  EXPECT_TRUE(absl::IsFailedPrecondition(NewHbmTier(options).status()));
}

TEST_F(StandinHbmTest, SlabsThatCannotBeExportedSayWhy) {
  Control("attribute 103 0");
  cuda::Error error;
  const auto context = cuda::Context::Retain(driver(), 0, &error);
  ASSERT_NE(context, nullptr);
  HbmTierOptions options = Options(4_MiB, 2_MiB);
  options.context = context.get();
  const auto tier = NewHbmTier(options);
  ASSERT_TRUE(tier.ok()) << tier.status();
  const StatusOr<Extent> extent = (*tier)->Allocate(kAda, 4_KiB);
  ASSERT_TRUE(extent.ok()) << extent.status();
  EXPECT_TRUE(absl::IsFailedPrecondition(
      (*tier)->Export((*tier)->Address(*extent).slab).status()));
}

TEST_F(StandinHbmTest, ACopyThatFailsIsTheErrorOfItsRecordAlone) {
  const auto tier = MakeTier(4_MiB);
  const TestRecord test = MakeTestRecord(9, 30, 1, kAda);
  const StatusOr<Extent> extent =
      tier->Allocate(kAda, test.record.meta.record_bytes);
  ASSERT_TRUE(extent.ok());
  PageBuffer buffer(test.record.bytes.size());
  // The record is of several pieces; any of them may fail, in any call.
  for (const char* const call : {"cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync",
                                 "cuEventRecord", "cuEventSynchronize"}) {
    for (int nth = 1; nth <= 8; ++nth) {
      Control("fail " + std::string(call) + " " + std::to_string(nth) + " 801");
      const Status written = Write(*tier, *extent, test.record);
      const Status read = Read(*tier, *extent, buffer.span());
      const bool of_write = std::string(call) != "cuMemcpyDtoHAsync";
      EXPECT_EQ(written.code(), of_write ? absl::StatusCode::kUnavailable
                                         : absl::StatusCode::kOk)
          << call << " " << nth << ": " << written;
      EXPECT_EQ(read.code(), of_write ? absl::StatusCode::kOk
                                      : absl::StatusCode::kUnavailable)
          << call << " " << nth << ": " << read;
      ASSERT_TRUE(Write(*tier, *extent, test.record).ok());
      ASSERT_TRUE(Read(*tier, *extent, buffer.span()).ok());
      const Status status =
          CheckRecord(test.group, buffer.span(), test.record.meta);
      EXPECT_TRUE(status.ok()) << call << " " << nth << ": " << status;
    }
  }
  EXPECT_TRUE(tier->Health().ok());
}

TEST(StandinHbmLostTest, ALostDeviceEndsEverythingAndHangsNothing) {
  for (int seed = 1; seed <= 10; ++seed) {
    Control("reset");
    Control("seed " + std::to_string(seed));
    std::string why_not;
    const auto driver = cuda::Driver::Open(TestDriver(), &why_not);
    ASSERT_NE(driver, nullptr);
    cuda::Error error;
    const auto context = cuda::Context::Retain(*driver, 0, &error);
    ASSERT_NE(context, nullptr);
    HbmTierOptions options;
    options.context = context.get();
    options.capacity_bytes = 4_MiB;
    options.slab_bytes = 2_MiB;
    options.staging_bytes = 16_KiB;
    auto tier = NewHbmTier(options);
    ASSERT_TRUE(tier.ok()) << tier.status();
    const TestRecord test = MakeTestRecord(11, 100, 1, kAda);
    const StatusOr<Extent> extent =
        (*tier)->Allocate(kAda, test.record.meta.record_bytes);
    ASSERT_TRUE(extent.ok());
    Completion writes[3];
    for (Completion& write : writes) {
      (*tier)->Write(*extent, test.record.meta, test.record.bytes.span(),
                     write.Callback());
    }
    Control("lose 700");
    PageBuffer buffer(test.record.bytes.size());
    EXPECT_TRUE(absl::IsUnavailable(Read(**tier, *extent, buffer.span())));
    for (Completion& write : writes) {
      while (!write.done()) std::this_thread::yield();
      EXPECT_EQ(write.calls(), 1);
      EXPECT_TRUE(write.status().ok() || absl::IsUnavailable(write.status()));
    }
    const Status health = (*tier)->Health();
    EXPECT_TRUE(absl::IsUnavailable(health)) << health;
    EXPECT_THAT(std::string(health.message()),
                HasSubstr("CUDA_ERROR_ILLEGAL_ADDRESS"));
    EXPECT_TRUE(absl::IsUnavailable((*tier)->Allocate(kAda, 4_KiB).status()));
    EXPECT_TRUE(absl::IsUnavailable(Write(**tier, *extent, test.record)));
    (*tier)->Free(*extent);
    (*tier)->SetLimit(0);
    EXPECT_EQ((*tier)->Usage().used_bytes, 0u);
    tier->reset();
  }
  Control("reset");
}

}  // namespace
}  // namespace larder
