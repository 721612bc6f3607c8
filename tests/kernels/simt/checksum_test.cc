// Checksums on the executor against those that the store computes.

#include "store/checksum.h"

#include <random>
#include <vector>

#include "gtest/gtest.h"

#include "kernels/cuda/checksum_types.h"
#include "tests/kernels/simt/launch.h"

namespace larder::kernels::cuda {
namespace {

// Ranges of these sizes, each at a multiple of 16 plus `offset`.
void AllAreTheStores(const std::vector<uint64_t>& sizes, uint64_t offset,
                     const simt::Schedule& schedule) {
  std::mt19937_64 random(sizes.size() + offset);
  std::vector<simt::DeviceArray<uint8_t>> memory;
  std::vector<ChecksumRange> ranges;
  for (const uint64_t size : sizes) {
    auto& bytes = memory.emplace_back(offset + size);
    for (size_t i = 0; i < bytes.size(); ++i) {
      bytes[i] = static_cast<uint8_t>(random() >> 56);
    }
    ranges.push_back({bytes.data() + offset, size});
  }
  const simt::DeviceArray<ChecksumRange> device(ranges);
  const simt::DeviceArray<ChecksumResult> results(ranges.size());
  Checksums checksums = {};
  checksums.ranges = device.data();
  checksums.results = results.data();
  checksums.count = static_cast<uint32_t>(ranges.size());
  ASSERT_EQ(simt::Launch(PlanChecksums(checksums), checksums, schedule),
            std::nullopt);
  for (size_t i = 0; i < ranges.size(); ++i) {
    const Checksum want = ComputeChecksum(
        {reinterpret_cast<const std::byte*>(ranges[i].bytes), ranges[i].size});
    EXPECT_EQ(results[i].low, want.low) << ranges[i].size << " at " << offset;
    EXPECT_EQ(results[i].high, want.high) << ranges[i].size << " at " << offset;
  }
}

TEST(ChecksumTest, ShortOnes) {
  std::vector<uint64_t> sizes;
  for (uint64_t size = 0; size <= 260; size += simt::kSmall ? 7 : 1) {
    sizes.push_back(size);
  }
  AllAreTheStores(sizes, 0, {});
  AllAreTheStores({0, 1, 5, 12, 40, 100, 130, 200, 240, 241}, 3, {});
}

TEST(ChecksumTest, LongOnes) {
  std::vector<uint64_t> sizes;
  // Around every stripe's and block's end.
  for (const uint64_t about : {256, 320, 512, 1024, 1088, 2048, 4096}) {
    for (uint64_t size = about - 1; size <= about + 1; ++size) {
      sizes.push_back(size);
    }
  }
  sizes.push_back(10'000);
  for (const simt::Schedule& schedule : simt::SomeSchedules(2)) {
    for (const uint64_t offset : {0, 1, 8}) {
      AllAreTheStores(sizes, offset, schedule);
    }
  }
}

TEST(ChecksumTest, NothingToDoHasNoEntry) {
  Checksums checksums = {};
  EXPECT_EQ(PlanChecksums(checksums).entry, nullptr);
  checksums.count = 5;
  EXPECT_EQ(PlanChecksums(checksums).grid[0], 2u);
}

// Segments as records have them: what their accesses cost is checked where
// simt_launch.cc is told to (tests/kernels/ptx).
TEST(ChecksumBulkTest, Segments) {
  AllAreTheStores({16'384, 16'384, 16'384, 16'384}, 0, {});
}

}  // namespace
}  // namespace larder::kernels::cuda
