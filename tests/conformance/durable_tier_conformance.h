#ifndef LARDER_TESTS_CONFORMANCE_DURABLE_TIER_CONFORMANCE_H_
#define LARDER_TESTS_CONFORMANCE_DURABLE_TIER_CONFORMANCE_H_

// What every DurableTier must do beyond tier_conformance.h.

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <ostream>
#include <string>
#include <utility>
#include <vector>

#include "tests/conformance/tier_conformance.h"

namespace larder {

class DurableTierHarness : public TierHarness {
 public:
  virtual DurableTier& durable() = 0;
  Tier& tier() final { return durable(); }

  enum class Restart {
    kClean,      // the tier is destroyed and opened again
    kCrash,      // ... as if the process had died (nothing more is written)
    kLoseIndex,  // ... as kClean, and the index is gone
  };
  // Opens the tier anew over what is on its medium, without calling Recover.
  // False if this kind cannot be acted out.
  virtual bool Reopen(Restart restart) = 0;
};

struct DurableTierFactory {
  std::string name;
  // Empty, about `capacity_bytes` large, Recover not yet called.
  std::function<std::unique_ptr<DurableTierHarness>(uint64_t capacity_bytes)>
      make;
};
inline void PrintTo(const DurableTierFactory& factory, std::ostream* out) {
  *out << factory.name;
}
inline std::string DurableTierFactoryName(
    const testing::TestParamInfo<DurableTierFactory>& info) {
  return info.param.name;
}

class DurableTierConformance
    : public testing::TestWithParam<DurableTierFactory> {
 protected:
  using Restart = DurableTierHarness::Restart;
  static constexpr uint64_t kCapacityBytes = 16_MiB;

  struct Recovered {
    std::map<ChunkId, std::pair<RecordMeta, Extent>> records;
    DurableTier::RecoveryReport report;
  };

  void SetUp() override {
    harness_ = GetParam().make(kCapacityBytes);
    ASSERT_NE(harness_, nullptr);
    EXPECT_TRUE(Recover().records.empty());
  }
  DurableTier& tier() { return harness_->durable(); }

  // Every record once, its meta as it was written.
  Recovered Recover() {
    Recovered recovered;
    const StatusOr<DurableTier::RecoveryReport> report =
        tier().Recover([&](const RecordMeta& meta, Extent extent) {
          EXPECT_TRUE(extent);
          EXPECT_TRUE(recovered.records
                          .emplace(meta.chunk, std::make_pair(meta, extent))
                          .second)
              << "found twice: " << ToHex(meta.chunk);
        });
    EXPECT_TRUE(report.ok()) << report.status();
    if (report.ok()) recovered.report = *report;
    EXPECT_EQ(recovered.report.records, recovered.records.size());
    return recovered;
  }

  Status FlushAndWait() {
    Completion completion;
    tier().Flush(completion.Callback());
    harness_->PumpUntil([&] { return completion.done(); });
    EXPECT_EQ(completion.calls(), 1);
    return completion.status();
  }

  Status PutAndWait(std::string key, std::string value) {
    Completion completion;
    tier().PutControl(std::move(key), std::move(value), completion.Callback());
    harness_->PumpUntil([&] { return completion.done(); });
    EXPECT_EQ(completion.calls(), 1);
    return completion.status();
  }

  std::map<std::string, std::string> Controls() {
    std::map<std::string, std::string> controls;
    tier().ForEachControl(
        [&](const std::string& key, const std::string& value) {
          EXPECT_TRUE(controls.emplace(key, value).second) << key;
        });
    return controls;
  }

  void ExpectExactly(const Recovered& recovered,
                     const std::map<ChunkId, TestRecord>& expected) {
    EXPECT_EQ(recovered.records.size(), expected.size());
    uint64_t bytes = 0;
    for (const auto& [chunk, test] : expected) {
      const auto it = recovered.records.find(chunk);
      ASSERT_NE(it, recovered.records.end()) << ToHex(chunk);
      EXPECT_EQ(it->second.first, test.record.meta);
      const Status status = ReadAndCheck(*harness_, it->second.second, test);
      EXPECT_TRUE(status.ok()) << status;
      bytes += it->second.second.bytes;
    }
    EXPECT_EQ(tier().Usage().used_bytes, bytes);
  }

  // Writes records, frees every third, restarts, expects exactly the rest, and
  // goes on from there once more.
  void RunRestart(Restart restart) {
    std::map<ChunkId, TestRecord> expected;
    std::vector<std::pair<Extent, ChunkId>> extents;
    uint64_t key = 0;
    for (int generation = 1; generation <= 2; ++generation) {
      for (int i = 0; i < 30; ++i) {
        TestRecord test =
            MakeTestRecord(key, 2 + key % 9, static_cast<uint64_t>(generation));
        ++key;
        const Extent extent = Store(*harness_, test);
        ASSERT_TRUE(extent);
        const ChunkId chunk = test.record.meta.chunk;
        extents.emplace_back(extent, chunk);
        expected.emplace(chunk, std::move(test));
      }
      for (size_t i = 0; i < extents.size(); i += 3) {
        tier().Free(extents[i].first);
        expected.erase(extents[i].second);
      }
      ASSERT_TRUE(FlushAndWait().ok());
      if (!harness_->Reopen(restart)) {
        GTEST_SKIP() << "this kind of restart cannot be acted out";
      }
      const Recovered recovered = Recover();
      if (restart == Restart::kLoseIndex) {
        EXPECT_TRUE(recovered.report.rebuilt_from_footers);
      }
      ExpectExactly(recovered, expected);
      extents.clear();
      for (const auto& [chunk, found] : recovered.records) {
        extents.emplace_back(found.second, chunk);
      }
      EXPECT_TRUE(tier().Health().ok()) << tier().Health();
    }
  }

  std::unique_ptr<DurableTierHarness> harness_;
};
GTEST_ALLOW_UNINSTANTIATED_PARAMETERIZED_TEST(DurableTierConformance);

TEST_P(DurableTierConformance, RecoversWhatWasAcknowledged) {
  RunRestart(Restart::kClean);
}

TEST_P(DurableTierConformance, RecoversAfterACrash) {
  RunRestart(Restart::kCrash);
}

TEST_P(DurableTierConformance, RecoversWithoutTheIndex) {
  RunRestart(Restart::kLoseIndex);
}

TEST_P(DurableTierConformance, LosesNothingAcknowledgedWithoutFlush) {
  // Frees may be forgotten without Flush; acknowledged writes may not.
  std::map<ChunkId, TestRecord> expected;
  for (uint64_t key = 0; key < 25; ++key) {
    TestRecord test = MakeTestRecord(key, 2 + key % 5);
    ASSERT_TRUE(Store(*harness_, test));
    const ChunkId chunk = test.record.meta.chunk;
    expected.emplace(chunk, std::move(test));
  }
  // A reservation that was never written leaves nothing behind.
  ASSERT_TRUE(tier().Allocate(TenantId{1}, 64_KiB).ok());
  if (!harness_->Reopen(Restart::kCrash)) GTEST_SKIP();
  ExpectExactly(Recover(), expected);
}

TEST_P(DurableTierConformance, UnacknowledgedWritesAreWholeOrAbsent) {
  std::map<ChunkId, TestRecord> written;
  for (uint64_t key = 0; key < 25; ++key) {
    TestRecord test = MakeTestRecord(key, 2 + key % 5);
    const ChunkId chunk = test.record.meta.chunk;
    written.emplace(chunk, std::move(test));
  }
  std::vector<Completion> completions(written.size());
  size_t i = 0;
  for (const auto& [chunk, test] : written) {
    const StatusOr<Extent> extent =
        tier().Allocate(TenantId{1}, test.record.meta.record_bytes);
    ASSERT_TRUE(extent.ok()) << extent.status();
    tier().Write(*extent, test.record.meta, test.record.bytes.span(),
                 completions[i++].Callback());
  }
  harness_->PumpUntil([&] { return completions[0].done(); });
  std::vector<bool> acknowledged;
  for (const Completion& completion : completions) {
    acknowledged.push_back(completion.done() && completion.status().ok());
  }
  EXPECT_TRUE(acknowledged[0]) << completions[0].status();
  if (!harness_->Reopen(Restart::kCrash)) GTEST_SKIP();
  const Recovered recovered = Recover();
  i = 0;
  for (const auto& [chunk, test] : written) {
    const bool must = acknowledged[i++];
    const auto it = recovered.records.find(chunk);
    if (it == recovered.records.end()) {
      EXPECT_FALSE(must) << "lost: " << ToHex(chunk);
      continue;
    }
    const Status status = ReadAndCheck(*harness_, it->second.second, test);
    EXPECT_TRUE(status.ok()) << status;
  }
}

TEST_P(DurableTierConformance, NewestGenerationWins) {
  const TestRecord older = MakeTestRecord(1, 3, /*generation=*/5);
  const TestRecord newer = MakeTestRecord(1, 3, /*generation=*/6);
  ASSERT_EQ(older.record.meta.chunk, newer.record.meta.chunk);
  for (const Restart restart :
       {Restart::kClean, Restart::kCrash, Restart::kLoseIndex}) {
    harness_ = GetParam().make(kCapacityBytes);
    Recover();
    // The newer one is written first: order of writing must not matter.
    ASSERT_TRUE(Store(*harness_, newer));
    ASSERT_TRUE(Store(*harness_, older));
    if (!harness_->Reopen(restart)) continue;
    const Recovered recovered = Recover();
    ASSERT_EQ(recovered.records.size(), 1u);
    const auto& [meta, extent] = recovered.records.begin()->second;
    EXPECT_EQ(meta, newer.record.meta);
    const Status status = ReadAndCheck(*harness_, extent, newer);
    EXPECT_TRUE(status.ok()) << status;
  }
}

TEST_P(DurableTierConformance, ControlsKeepTheLastValue) {
  const std::string large(48_KiB, '\x5a');
  const std::string long_key(128, 'k');
  const std::map<std::string, std::string> expected = {
      {"a", "2"}, {"large", large}, {long_key, std::string("\0x", 2)}};
  for (const Restart restart :
       {Restart::kClean, Restart::kCrash, Restart::kLoseIndex}) {
    harness_ = GetParam().make(kCapacityBytes);
    Recover();
    EXPECT_TRUE(Controls().empty());
    ASSERT_TRUE(PutAndWait("a", "1").ok());
    ASSERT_TRUE(PutAndWait("b", "gone").ok());
    ASSERT_TRUE(PutAndWait("large", "small").ok());
    ASSERT_TRUE(PutAndWait("a", "2").ok());
    ASSERT_TRUE(PutAndWait("b", "").ok());
    ASSERT_TRUE(PutAndWait("large", large).ok());
    ASSERT_TRUE(PutAndWait(long_key, std::string("\0x", 2)).ok());
    EXPECT_EQ(Controls(), expected);
    if (!harness_->Reopen(restart)) continue;
    Recover();
    EXPECT_EQ(Controls(), expected);
  }
}

TEST_P(DurableTierConformance, RefusesControlsOverTheLimits) {
  EXPECT_EQ(PutAndWait("", "value").code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(PutAndWait(std::string(129, 'k'), "value").code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(PutAndWait("key", std::string(48_KiB + 1, 'v')).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(Controls().empty());
}

TEST_P(DurableTierConformance, FreeIsRememberedAfterFlush) {
  for (const Restart restart :
       {Restart::kClean, Restart::kCrash, Restart::kLoseIndex}) {
    harness_ = GetParam().make(kCapacityBytes);
    Recover();
    const TestRecord kept = MakeTestRecord(1, 4);
    const TestRecord freed = MakeTestRecord(2, 4);
    ASSERT_TRUE(Store(*harness_, kept));
    const Extent extent = Store(*harness_, freed);
    ASSERT_TRUE(extent);
    tier().Free(extent);
    ASSERT_TRUE(FlushAndWait().ok());
    if (!harness_->Reopen(restart)) continue;
    std::map<ChunkId, TestRecord> expected;
    expected.emplace(kept.record.meta.chunk, MakeTestRecord(1, 4));
    ExpectExactly(Recover(), expected);
  }
}

TEST_P(DurableTierConformance, SurvivesManyTimesItsCapacity) {
  // Garbage collection moves records; handles stay good, and what is alive at
  // the end is found by Recover.
  const uint64_t capacity = tier().Usage().capacity_bytes;
  constexpr uint64_t kPages = 16;
  std::map<ChunkId, TestRecord> expected;
  std::vector<std::pair<Extent, ChunkId>> live;
  uint64_t written = 0;
  for (uint64_t key = 0; written < 3 * capacity; ++key) {
    TestRecord test = MakeTestRecord(key, kPages);
    StatusOr<Extent> extent;
    harness_->PumpUntil([&] {
      extent = tier().Allocate(TenantId{1}, test.record.meta.record_bytes);
      if (extent.ok()) return true;
      EXPECT_TRUE(absl::IsResourceExhausted(extent.status()))
          << extent.status();
      if (live.empty()) return false;
      const size_t victim = OracleMix(key) % live.size();
      tier().Free(live[victim].first);
      expected.erase(live[victim].second);
      live[victim] = live.back();
      live.pop_back();
      return false;
    });
    const Status status = WriteAndWait(*harness_, *extent, test.record);
    ASSERT_TRUE(status.ok()) << status;
    written += extent->bytes;
    const ChunkId chunk = test.record.meta.chunk;
    live.emplace_back(*extent, chunk);
    expected.emplace(chunk, std::move(test));
    // A third is kept at most, so that there is garbage to collect.
    while (live.size() * kPages * kPageBytes > capacity / 3) {
      const size_t victim = OracleMix(key + 7) % live.size();
      tier().Free(live[victim].first);
      expected.erase(live[victim].second);
      live[victim] = live.back();
      live.pop_back();
    }
    ASSERT_LE(tier().Usage().used_bytes, capacity);
  }
  for (const auto& [extent, chunk] : live) {
    const Status status = ReadAndCheck(*harness_, extent, expected.at(chunk));
    ASSERT_TRUE(status.ok()) << status;
  }
  const DurableTier::WriteCounters counters = tier().Writes();
  EXPECT_GE(counters.user_bytes, written - written / 8);
  EXPECT_GE(counters.device_bytes, counters.user_bytes);
  ASSERT_TRUE(FlushAndWait().ok());
  ASSERT_TRUE(harness_->Reopen(Restart::kClean));
  ExpectExactly(Recover(), expected);
}

}  // namespace larder

#endif  // LARDER_TESTS_CONFORMANCE_DURABLE_TIER_CONFORMANCE_H_
