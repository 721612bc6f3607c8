#ifndef LARDER_TESTS_CONFORMANCE_TIER_CONFORMANCE_H_
#define LARDER_TESTS_CONFORMANCE_TIER_CONFORMANCE_H_

// What every Tier must do (store/tier.h). A back end derives a TierHarness and
// instantiates the suite in its own test:
//
//   INSTANTIATE_TEST_SUITE_P(Dram, TierConformance,
//                            testing::Values(TierFactory{"dram", MakeDram}),
//                            TierFactoryName);
//
// MemoryTiers also instantiate memory_tier_conformance.h, DurableTiers
// durable_tier_conformance.h. Include each in one source file per binary.

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/synchronization/mutex.h"
#include "gtest/gtest.h"

#include "store/record.h"
#include "store/status.h"
#include "store/tier.h"
#include "store/units.h"
#include "tests/testing/oracle.h"

namespace larder {

// One tier under test and what it needs to run.
class TierHarness {
 public:
  virtual ~TierHarness() = default;

  // The tier, ready for use (a DurableTier: Recover was called).
  virtual Tier& tier() = 0;

  // Lets the tier's work run until `done` is true. The default is for tiers
  // that finish by themselves; one with a ManualExecutor runs its tasks here.
  // Called by several threads at once.
  virtual void PumpUntil(absl::FunctionRef<bool()> done) {
    while (!done()) std::this_thread::yield();
  }

  // Rounds per thread of the concurrency test.
  virtual int HammerRounds() const { return 150; }
};

struct TierFactory {
  std::string name;
  // An empty tier of about `capacity_bytes`, at least half of it.
  std::function<std::unique_ptr<TierHarness>(uint64_t capacity_bytes)> make;
};
inline void PrintTo(const TierFactory& factory, std::ostream* out) {
  *out << factory.name;
}
inline std::string TierFactoryName(
    const testing::TestParamInfo<TierFactory>& info) {
  return info.param.name;
}

// Catches a Done callback; outlives the call whatever happens to this object.
class Completion {
 public:
  Tier::Done Callback() {
    return [state = state_](Status status) {
      absl::MutexLock lock(&state->mu);
      ++state->calls;
      state->status = std::move(status);
    };
  }
  bool done() const { return calls() > 0; }
  int calls() const {
    absl::MutexLock lock(&state_->mu);
    return state_->calls;
  }
  Status status() const {
    absl::MutexLock lock(&state_->mu);
    return state_->status;
  }

 private:
  struct State {
    absl::Mutex mu;
    int calls = 0;
    Status status;
  };
  std::shared_ptr<State> state_ = std::make_shared<State>();
};

inline Status WriteAndWait(TierHarness& harness, Extent extent,
                           const OracleRecord& record) {
  Completion completion;
  harness.tier().Write(extent, record.meta, record.bytes.span(),
                       completion.Callback());
  harness.PumpUntil([&] { return completion.done(); });
  EXPECT_EQ(completion.calls(), 1);
  return completion.status();
}

inline Status ReadAndWait(TierHarness& harness, Extent extent, uint64_t offset,
                          MutableByteSpan into) {
  Completion completion;
  harness.tier().Read(extent, offset, into, completion.Callback());
  harness.PumpUntil([&] { return completion.done(); });
  EXPECT_EQ(completion.calls(), 1);
  return completion.status();
}

// A sealed record of exactly `pages` pages with its group, for key `n`.
struct TestRecord {
  GroupDescriptor group;
  OracleRecord record;
};
inline TestRecord MakeTestRecord(uint64_t n, uint64_t pages,
                                 uint64_t generation = 1,
                                 TenantId tenant = TenantId{1}) {
  // Two pages are the least: tables, and a payload of its own pages. One byte
  // short of whole pages, so that padding is exercised.
  TestRecord test;
  test.group = OpaqueGroup(static_cast<uint32_t>((pages - 1) * kPageBytes - 1));
  RecordMeta meta =
      OracleMeta(OracleSpaceId(n % 3), OracleChunkId(n), WholePart(test.group),
                 /*tokens=*/1, generation);
  meta.tenant = tenant;
  test.record = FillRecord(test.group, meta);
  EXPECT_EQ(test.record.bytes.size(), pages * kPageBytes);
  return test;
}

// Reads a whole record and checks every byte of it.
inline Status ReadAndCheck(TierHarness& harness, Extent extent,
                           const TestRecord& test) {
  PageBuffer buffer(test.record.bytes.size());
  LARDER_RETURN_IF_ERROR(ReadAndWait(harness, extent, 0, buffer.span()));
  return CheckRecord(test.group, buffer.span(), test.record.meta);
}

// Allocates and writes; the extent is 0 if either failed.
inline Extent Store(TierHarness& harness, const TestRecord& test) {
  const StatusOr<Extent> extent = harness.tier().Allocate(
      test.record.meta.tenant, test.record.meta.record_bytes);
  EXPECT_TRUE(extent.ok()) << extent.status();
  if (!extent.ok()) return {};
  const Status written = WriteAndWait(harness, *extent, test.record);
  EXPECT_TRUE(written.ok()) << written;
  return written.ok() ? *extent : Extent{};
}

class TierConformance : public testing::TestWithParam<TierFactory> {
 protected:
  static constexpr uint64_t kCapacityBytes = 16_MiB;
  static constexpr TenantId kTenant{1};

  void SetUp() override {
    harness_ = GetParam().make(kCapacityBytes);
    ASSERT_NE(harness_, nullptr);
  }
  Tier& tier() { return harness_->tier(); }
  uint64_t used() { return tier().Usage().used_bytes; }
  void ExpectEventuallyUsed(uint64_t bytes) {
    harness_->PumpUntil([&] { return used() == bytes; });
    EXPECT_EQ(used(), bytes);
  }

  std::unique_ptr<TierHarness> harness_;
};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(TierConformance);

TEST_P(TierConformance, StartsEmpty) {
  const TierUsage usage = tier().Usage();
  EXPECT_EQ(usage.used_bytes, 0u);
  EXPECT_GE(usage.capacity_bytes, kCapacityBytes / 2);
  EXPECT_GE(tier().MaxExtentBytes(), 64_KiB);
  EXPECT_LE(tier().MaxExtentBytes(), usage.capacity_bytes);
  EXPECT_NE(tier().kind(), TierKind::kNone);
}

TEST_P(TierConformance, AllocateRoundsUpToPagesAndCountsAtOnce) {
  uint64_t total = 0;
  std::vector<Extent> extents;
  for (const uint64_t bytes :
       {uint64_t{1}, kPageBytes - 1, kPageBytes, kPageBytes + 1, 64_KiB - 1}) {
    const StatusOr<Extent> extent = tier().Allocate(kTenant, bytes);
    ASSERT_TRUE(extent.ok()) << extent.status();
    EXPECT_TRUE(*extent);
    EXPECT_EQ(extent->bytes % kPageBytes, 0u);
    EXPECT_GE(extent->bytes, bytes);
    EXPECT_LT(extent->bytes, bytes + kPageBytes);
    for (const Extent& other : extents) {
      EXPECT_NE(other.handle, extent->handle);
    }
    extents.push_back(*extent);
    total += extent->bytes;
    EXPECT_EQ(used(), total);
  }
  for (const Extent& extent : extents) tier().Free(extent);
  ExpectEventuallyUsed(0);
}

TEST_P(TierConformance, RefusesSizesThatCanNeverFit) {
  EXPECT_EQ(tier().Allocate(kTenant, 0).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(
      tier().Allocate(kTenant, tier().MaxExtentBytes() + 1).status().code(),
      absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(tier().Allocate(kTenant, ~uint64_t{0}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(used(), 0u);
}

TEST_P(TierConformance, LargestExtentCanBeAllocatedInAnEmptyTier) {
  const StatusOr<Extent> extent =
      tier().Allocate(kTenant, tier().MaxExtentBytes());
  ASSERT_TRUE(extent.ok()) << extent.status();
  EXPECT_EQ(extent->bytes, tier().MaxExtentBytes());
  tier().Free(*extent);
  ExpectEventuallyUsed(0);
}

TEST_P(TierConformance, FillsUpAndComesBack) {
  const uint64_t capacity = tier().Usage().capacity_bytes;
  constexpr uint64_t kBytes = 32_KiB;
  for (int round = 0; round < 3; ++round) {
    std::vector<Extent> extents;
    for (;;) {
      const StatusOr<Extent> extent = tier().Allocate(kTenant, kBytes);
      if (!extent.ok()) {
        EXPECT_EQ(extent.status().code(), absl::StatusCode::kResourceExhausted)
            << extent.status();
        break;
      }
      extents.push_back(*extent);
      ASSERT_LE(used(), capacity);
    }
    // Half is little to ask: logs keep room to collect garbage in.
    EXPECT_GE(used(), capacity / 2) << "round " << round;
    EXPECT_EQ(used(), extents.size() * kBytes);
    // Giving some back makes room again, perhaps after background work.
    for (size_t i = 0; i < extents.size() / 2; ++i) tier().Free(extents[i]);
    extents.erase(extents.begin(),
                  extents.begin() + static_cast<ptrdiff_t>(extents.size() / 2));
    StatusOr<Extent> again;
    harness_->PumpUntil([&] {
      again = tier().Allocate(kTenant, kBytes);
      return again.ok();
    });
    extents.push_back(*again);
    for (const Extent& extent : extents) tier().Free(extent);
    ExpectEventuallyUsed(0);
  }
}

TEST_P(TierConformance, ReadsBackWhatWasWritten) {
  std::vector<std::pair<Extent, TestRecord>> stored;
  uint64_t n = 0;
  for (const uint64_t pages : {2u, 3u, 5u, 16u, 33u, 64u, 2u, 100u}) {
    if (pages * kPageBytes > tier().MaxExtentBytes()) continue;
    TestRecord test = MakeTestRecord(n++, pages);
    const Extent extent = Store(*harness_, test);
    ASSERT_TRUE(extent);
    stored.emplace_back(extent, std::move(test));
  }
  for (const auto& [extent, test] : stored) {
    const Status status = ReadAndCheck(*harness_, extent, test);
    EXPECT_TRUE(status.ok()) << status;
  }
  // And again after every second one has gone and others took their place.
  for (size_t i = 0; i < stored.size(); i += 2) {
    tier().Free(stored[i].first);
    stored[i].second =
        MakeTestRecord(n++, stored[i].second.record.bytes.size() / kPageBytes);
    stored[i].first = Store(*harness_, stored[i].second);
    ASSERT_TRUE(stored[i].first);
  }
  for (const auto& [extent, test] : stored) {
    const Status status = ReadAndCheck(*harness_, extent, test);
    EXPECT_TRUE(status.ok()) << status;
    tier().Free(extent);
  }
  ExpectEventuallyUsed(0);
}

TEST_P(TierConformance, ReadsAnyPagesOfARecord) {
  const TestRecord test = MakeTestRecord(7, 12);
  const Extent extent = Store(*harness_, test);
  ASSERT_TRUE(extent);
  // The padding past record_bytes may be anything: compare without it.
  const uint64_t record_bytes = test.record.meta.record_bytes;
  for (uint64_t first = 0; first < 12; ++first) {
    for (uint64_t count = 1; first + count <= 12; count += 3) {
      PageBuffer buffer(count * kPageBytes);
      const Status status =
          ReadAndWait(*harness_, extent, first * kPageBytes, buffer.span());
      ASSERT_TRUE(status.ok()) << status;
      const uint64_t compare =
          std::min(buffer.size(), record_bytes - first * kPageBytes);
      EXPECT_EQ(
          std::memcmp(buffer.data(),
                      test.record.bytes.data() + first * kPageBytes, compare),
          0)
          << "pages " << first << "+" << count;
    }
  }
  tier().Free(extent);
}

TEST_P(TierConformance, RefusesReadsOutsideTheRecord) {
  const TestRecord test = MakeTestRecord(8, 4);
  const Extent extent = Store(*harness_, test);
  ASSERT_TRUE(extent);
  PageBuffer buffer(5 * kPageBytes);
  std::fill(buffer.span().begin(), buffer.span().end(), std::byte{0x5a});
  const auto refused = [&](uint64_t offset, uint64_t bytes) {
    return ReadAndWait(*harness_, extent, offset, buffer.span().first(bytes))
               .code() == absl::StatusCode::kInvalidArgument;
  };
  EXPECT_TRUE(refused(0, 5 * kPageBytes));
  EXPECT_TRUE(refused(4 * kPageBytes, kPageBytes));
  EXPECT_TRUE(refused(3 * kPageBytes, 2 * kPageBytes));
  EXPECT_TRUE(refused(~uint64_t{0} - kPageBytes + 1, kPageBytes));
  EXPECT_TRUE(refused(1, kPageBytes));
  EXPECT_TRUE(refused(0, kPageBytes - 1));
  for (const std::byte byte : buffer.span()) {
    ASSERT_EQ(byte, std::byte{0x5a}) << "a refused read wrote";
  }
  tier().Free(extent);
}

TEST_P(TierConformance, RefusesARecordThatDoesNotFit) {
  const TestRecord test = MakeTestRecord(9, 4);
  const StatusOr<Extent> extent = tier().Allocate(kTenant, 2 * kPageBytes);
  ASSERT_TRUE(extent.ok()) << extent.status();
  EXPECT_EQ(WriteAndWait(*harness_, *extent, test.record).code(),
            absl::StatusCode::kInvalidArgument);
  tier().Free(*extent);
  ExpectEventuallyUsed(0);
}

TEST_P(TierConformance, CallbacksMayCallTheTier) {
  const TestRecord test = MakeTestRecord(10, 6);
  const StatusOr<Extent> extent = tier().Allocate(kTenant, 6 * kPageBytes);
  ASSERT_TRUE(extent.ok()) << extent.status();
  PageBuffer buffer(6 * kPageBytes);
  std::atomic<bool> finished = false;
  Status write_status;
  Status read_status;
  tier().Write(*extent, test.record.meta, test.record.bytes.span(),
               [&](Status written) {
                 write_status = std::move(written);
                 (void)tier().Usage();
                 tier().Read(*extent, 0, buffer.span(), [&](Status read) {
                   read_status = std::move(read);
                   tier().Free(*extent);
                   finished = true;
                 });
               });
  harness_->PumpUntil([&] { return finished.load(); });
  EXPECT_TRUE(write_status.ok()) << write_status;
  EXPECT_TRUE(read_status.ok()) << read_status;
  EXPECT_TRUE(CheckRecord(test.group, buffer.span(), test.record.meta).ok());
  ExpectEventuallyUsed(0);
}

TEST_P(TierConformance, FreeDuringWriteCompletesItOnceAndGivesAllBack) {
  for (int round = 0; round < 20; ++round) {
    const TestRecord test = MakeTestRecord(100 + round, 8);
    const StatusOr<Extent> extent = tier().Allocate(kTenant, 8 * kPageBytes);
    ASSERT_TRUE(extent.ok()) << extent.status();
    Completion completion;
    tier().Write(*extent, test.record.meta, test.record.bytes.span(),
                 completion.Callback());
    tier().Free(*extent);
    harness_->PumpUntil([&] { return completion.done(); });
    EXPECT_TRUE(completion.status().ok() ||
                absl::IsCancelled(completion.status()))
        << completion.status();
    ExpectEventuallyUsed(0);
    EXPECT_EQ(completion.calls(), 1);
  }
}

TEST_P(TierConformance, FreeDuringReadNeverDeliversAnothersBytes) {
  for (int round = 0; round < 20; ++round) {
    const TestRecord test = MakeTestRecord(200 + round, 8);
    const Extent extent = Store(*harness_, test);
    ASSERT_TRUE(extent);
    PageBuffer buffer(8 * kPageBytes);
    Completion read;
    tier().Read(extent, 0, buffer.span(), read.Callback());
    tier().Free(extent);
    // Others at once ask for the same room and fill it.
    const TestRecord other = MakeTestRecord(300 + round, 8);
    const Extent successor = Store(*harness_, other);
    ASSERT_TRUE(successor);
    harness_->PumpUntil([&] { return read.done(); });
    if (read.status().ok()) {
      const Status status =
          CheckRecord(test.group, buffer.span(), test.record.meta);
      EXPECT_TRUE(status.ok()) << status;
    }
    EXPECT_EQ(read.calls(), 1);
    const Status status = ReadAndCheck(*harness_, successor, other);
    EXPECT_TRUE(status.ok()) << status;
    tier().Free(successor);
    ExpectEventuallyUsed(0);
  }
}

TEST_P(TierConformance, HoldsUnderConcurrentUse) {
  constexpr int kThreads = 4;
  constexpr size_t kLiveMax = 12;
  const uint64_t capacity = tier().Usage().capacity_bytes;
  const uint64_t pages_max =
      std::min<uint64_t>(40, tier().MaxExtentBytes() / kPageBytes);
  std::atomic<uint64_t> next_key = 1000;
  std::atomic<uint64_t> live_bytes = 0;
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      std::mt19937_64 random(static_cast<uint64_t>(t) + 1);
      const TenantId tenant{static_cast<uint32_t>(t % 2) + 1};
      std::vector<std::pair<Extent, TestRecord>> live;
      const auto drop = [&](size_t i) {
        live_bytes -= live[i].first.bytes;
        tier().Free(live[i].first);
        std::swap(live[i], live.back());
        live.pop_back();
      };
      for (int round = 0; round < harness_->HammerRounds(); ++round) {
        const uint64_t pages = 2 + random() % (pages_max - 1);
        TestRecord test = MakeTestRecord(next_key++, pages, 1, tenant);
        const StatusOr<Extent> extent =
            tier().Allocate(tenant, test.record.meta.record_bytes);
        if (extent.ok()) {
          live_bytes += extent->bytes;
          const Status written = WriteAndWait(*harness_, *extent, test.record);
          ASSERT_TRUE(written.ok()) << written;
          live.emplace_back(*extent, std::move(test));
        } else {
          ASSERT_TRUE(absl::IsResourceExhausted(extent.status()))
              << extent.status();
        }
        ASSERT_LE(used(), capacity);
        if (live.empty()) continue;
        const size_t i = random() % live.size();
        const Status status =
            ReadAndCheck(*harness_, live[i].first, live[i].second);
        ASSERT_TRUE(status.ok()) << status;
        if (live.size() == kLiveMax || random() % 4 == 0) drop(i);
      }
      // What is left at the end is all still there.
      while (!live.empty()) {
        const Status status =
            ReadAndCheck(*harness_, live[0].first, live[0].second);
        ASSERT_TRUE(status.ok()) << status;
        drop(0);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(live_bytes, 0u);
  ExpectEventuallyUsed(0);
}

}  // namespace larder

#endif  // LARDER_TESTS_CONFORMANCE_TIER_CONFORMANCE_H_
