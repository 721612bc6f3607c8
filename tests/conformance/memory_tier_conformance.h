#ifndef LARDER_TESTS_CONFORMANCE_MEMORY_TIER_CONFORMANCE_H_
#define LARDER_TESTS_CONFORMANCE_MEMORY_TIER_CONFORMANCE_H_

// What every MemoryTier must do beyond tier_conformance.h.

#include <sys/mman.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <ostream>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "tests/conformance/tier_conformance.h"

namespace larder {

class MemoryTierHarness : public TierHarness {
 public:
  virtual MemoryTier& memory() = 0;
  Tier& tier() final { return memory(); }
};

struct MemoryTierFactory {
  std::string name;
  // Empty, about `capacity_bytes` large, room for at least four slabs.
  std::function<std::unique_ptr<MemoryTierHarness>(uint64_t capacity_bytes)>
      make;
};
inline void PrintTo(const MemoryTierFactory& factory, std::ostream* out) {
  *out << factory.name;
}
inline std::string MemoryTierFactoryName(
    const testing::TestParamInfo<MemoryTierFactory>& info) {
  return info.param.name;
}

class MemoryTierConformance : public testing::TestWithParam<MemoryTierFactory> {
 protected:
  static constexpr uint64_t kCapacityBytes = 16_MiB;
  static constexpr TenantId kTenant{1};
  static constexpr TenantId kOther{2};

  void SetUp() override {
    harness_ = GetParam().make(kCapacityBytes);
    ASSERT_NE(harness_, nullptr);
  }
  MemoryTier& tier() { return harness_->memory(); }

  std::unique_ptr<MemoryTierHarness> harness_;
};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(MemoryTierConformance);

TEST_P(MemoryTierConformance, MapIsWhatReadAndClientsSee) {
  const TestRecord test = MakeTestRecord(1, 9);
  const Extent extent = Store(*harness_, test);
  ASSERT_TRUE(extent);
  const MutableByteSpan memory = tier().Map(extent);
  ASSERT_EQ(memory.size(), extent.bytes);
  EXPECT_TRUE(CheckRecord(test.group, memory, test.record.meta).ok());

  const ExtentAddress address = tier().Address(extent);
  const StatusOr<SlabInfo> slab = tier().Slab(address.slab);
  ASSERT_TRUE(slab.ok()) << slab.status();
  EXPECT_EQ(slab->slab, address.slab);
  EXPECT_EQ(slab->tenant, kTenant);
  ASSERT_LE(address.offset + extent.bytes, slab->bytes);
  void* view = ::mmap(nullptr, slab->bytes, PROT_READ, MAP_SHARED, slab->fd, 0);
  ASSERT_NE(view, MAP_FAILED);
  const ByteSpan seen(static_cast<const std::byte*>(view) + address.offset,
                      extent.bytes);
  EXPECT_TRUE(CheckRecord(test.group, seen, test.record.meta).ok());
  // Not a copy: what the daemon writes through Map appears there.
  memory[extent.bytes - 1] = std::byte{0x77};
  EXPECT_EQ(seen[extent.bytes - 1], std::byte{0x77});
  ::munmap(view, slab->bytes);
  tier().Free(extent);
}

TEST_P(MemoryTierConformance, WritesThroughMapAreRead) {
  const TestRecord test = MakeTestRecord(2, 5);
  const StatusOr<Extent> extent = tier().Allocate(kTenant, 5 * kPageBytes);
  ASSERT_TRUE(extent.ok()) << extent.status();
  std::memcpy(tier().Map(*extent).data(), test.record.bytes.data(),
              extent->bytes);
  const Status status = ReadAndCheck(*harness_, *extent, test);
  EXPECT_TRUE(status.ok()) << status;
  tier().Free(*extent);
}

TEST_P(MemoryTierConformance, ExtentsNeverOverlap) {
  std::vector<Extent> extents;
  for (uint64_t n = 0; n < 200; ++n) {
    const StatusOr<Extent> extent = tier().Allocate(
        n % 2 == 0 ? kTenant : kOther, (1 + n % 7) * kPageBytes);
    if (!extent.ok()) break;
    extents.push_back(*extent);
    const MutableByteSpan memory = tier().Map(*extent);
    std::memset(memory.data(), static_cast<int>(n), memory.size());
  }
  for (size_t n = 0; n < extents.size(); ++n) {
    for (const std::byte byte : tier().Map(extents[n])) {
      ASSERT_EQ(byte, static_cast<std::byte>(n)) << "extent " << n;
    }
    tier().Free(extents[n]);
  }
}

TEST_P(MemoryTierConformance, TenantsNeverShareASlab) {
  std::set<uint32_t> slabs[2];
  std::vector<Extent> extents;
  for (int n = 0; n < 40; ++n) {
    const StatusOr<Extent> extent =
        tier().Allocate(n % 2 == 0 ? kTenant : kOther, 64_KiB);
    if (!extent.ok()) break;
    extents.push_back(*extent);
    slabs[n % 2].insert(tier().Address(*extent).slab);
  }
  ASSERT_FALSE(slabs[0].empty());
  ASSERT_FALSE(slabs[1].empty());
  for (const uint32_t slab : slabs[0]) EXPECT_EQ(slabs[1].count(slab), 0u);
  for (const Extent& extent : extents) tier().Free(extent);
}

TEST_P(MemoryTierConformance, AnotherTenantGetsZeroesUnderANewNumber) {
  std::set<uint32_t> former;
  std::vector<Extent> extents;
  for (;;) {
    const StatusOr<Extent> extent = tier().Allocate(kTenant, 256_KiB);
    if (!extent.ok()) break;
    std::memset(tier().Map(*extent).data(), 0xee, extent->bytes);
    former.insert(tier().Address(*extent).slab);
    extents.push_back(*extent);
  }
  ASSERT_FALSE(extents.empty());
  EXPECT_FALSE(tier().Allocate(kOther, 256_KiB).ok());
  for (const Extent& extent : extents) tier().Free(extent);
  extents.clear();
  for (;;) {
    const StatusOr<Extent> extent = tier().Allocate(kOther, 256_KiB);
    if (!extent.ok()) break;
    EXPECT_EQ(former.count(tier().Address(*extent).slab), 0u);
    for (const std::byte byte : tier().Map(*extent)) {
      ASSERT_EQ(byte, std::byte{0}) << "another tenant's bytes";
    }
    extents.push_back(*extent);
  }
  EXPECT_FALSE(extents.empty());
  for (const uint32_t slab : former) {
    EXPECT_TRUE(absl::IsNotFound(tier().Slab(slab).status()));
  }
  for (const Extent& extent : extents) tier().Free(extent);
}

TEST_P(MemoryTierConformance, ShrinkGivesBackTheEnd) {
  const StatusOr<Extent> extent = tier().Allocate(kTenant, 10 * kPageBytes);
  ASSERT_TRUE(extent.ok()) << extent.status();
  const MutableByteSpan memory = tier().Map(*extent);
  std::memset(memory.data(), 0x31, memory.size());
  const ExtentAddress address = tier().Address(*extent);

  const Extent same = tier().Shrink(*extent, 9 * kPageBytes + 1);
  EXPECT_EQ(same, *extent);
  const Extent smaller = tier().Shrink(*extent, 3 * kPageBytes - 5);
  EXPECT_EQ(smaller.handle, extent->handle);
  EXPECT_EQ(smaller.bytes, 3 * kPageBytes);
  EXPECT_EQ(tier().Usage().used_bytes, 3 * kPageBytes);
  EXPECT_EQ(tier().Address(smaller), address);
  ASSERT_EQ(tier().Map(smaller).size(), 3 * kPageBytes);
  EXPECT_EQ(tier().Map(smaller).data(), memory.data());
  // The end can be had again and is not the extent's any more.
  const StatusOr<Extent> other = tier().Allocate(kTenant, 7 * kPageBytes);
  ASSERT_TRUE(other.ok()) << other.status();
  std::memset(tier().Map(*other).data(), 0x42, other->bytes);
  for (const std::byte byte : tier().Map(smaller)) {
    ASSERT_EQ(byte, std::byte{0x31});
  }
  tier().Free(smaller);
  tier().Free(*other);
  EXPECT_EQ(tier().Usage().used_bytes, 0u);
}

TEST_P(MemoryTierConformance, ObserversSeeEverySlab) {
  // One observer from the start, one that comes when slabs exist already; each
  // must know exactly the memory that extents lie in.
  using Known = std::set<std::pair<const std::byte*, size_t>>;
  auto early = std::make_shared<Known>();
  auto late = std::make_shared<Known>();
  const auto observe = [&](std::shared_ptr<Known> known) {
    tier().ObserveSlabs([known](MutableByteSpan memory, bool added) {
      const auto key = std::make_pair(
          static_cast<const std::byte*>(memory.data()), memory.size());
      if (added) {
        EXPECT_TRUE(known->insert(key).second) << "added twice";
      } else {
        EXPECT_EQ(known->erase(key), 1u) << "removed, never added";
      }
    });
  };
  const auto knows = [](const Known& known, MutableByteSpan memory) {
    for (const auto& [data, size] : known) {
      if (memory.data() >= data &&
          memory.data() + memory.size() <= data + size) {
        return true;
      }
    }
    return false;
  };
  observe(early);
  std::vector<Extent> extents;
  for (const TenantId tenant : {kTenant, kOther}) {
    for (;;) {
      const StatusOr<Extent> extent = tier().Allocate(tenant, 512_KiB);
      if (!extent.ok()) break;
      EXPECT_TRUE(knows(*early, tier().Map(*extent)));
      extents.push_back(*extent);
      if (late->empty()) {
        observe(late);
        EXPECT_EQ(*late, *early);
      }
      EXPECT_TRUE(knows(*late, tier().Map(*extent)));
    }
    EXPECT_EQ(*late, *early);
    for (const Extent& extent : extents) tier().Free(extent);
    extents.clear();
  }
  // When the tier goes, so does its memory.
  harness_.reset();
  EXPECT_TRUE(early->empty());
  EXPECT_TRUE(late->empty());
}

}  // namespace larder

#endif  // LARDER_TESTS_CONFORMANCE_MEMORY_TIER_CONFORMANCE_H_
