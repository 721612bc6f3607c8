// What the index costs. Memory is asserted; the time of a match is printed
// (tests assert no real durations), to be read off a release build.

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <memory>
#include <utility>
#include <vector>

#include "gtest/gtest.h"

#include "store/engine.h"
#include "tests/testing/fake_tiers.h"
#include "tests/testing/manual_clock.h"
#include "tests/testing/manual_executor.h"
#include "tests/testing/oracle.h"

namespace larder {
namespace {

constexpr uint32_t kChunks = 100'000;
constexpr uint16_t kParts = 8;

// Extents without memory.
class HollowDurableTier final : public DurableTier {
 public:
  TierKind kind() const override { return TierKind::kNvme; }
  TierUsage Usage() const override { return {}; }
  uint64_t MaxExtentBytes() const override { return 1_GiB; }
  StatusOr<Extent> Allocate(TenantId, uint64_t) override {
    return absl::ResourceExhaustedError("hollow");
  }
  void Free(Extent) override {}
  void Write(Extent, const RecordMeta&, ByteSpan, Done done) override {
    std::move(done)(absl::UnavailableError("hollow"));
  }
  void Read(Extent, uint64_t, MutableByteSpan, Done done) override {
    std::move(done)(absl::UnavailableError("hollow"));
  }
  StatusOr<RecoveryReport> Recover(Found found) override {
    for (const auto& [meta, extent] : records) found(meta, extent);
    return RecoveryReport{};
  }
  void PutControl(std::string key, std::string value, Done done) override {
    controls.emplace_back(std::move(key), std::move(value));
    std::move(done)(absl::OkStatus());
  }
  void ForEachControl(Control control) override {
    for (const auto& [key, value] : controls) control(key, value);
  }
  void Flush(Done done) override { std::move(done)(absl::OkStatus()); }
  Status Health() const override { return absl::OkStatus(); }
  WriteCounters Writes() const override { return {}; }

  std::vector<std::pair<RecordMeta, Extent>> records;
  std::vector<std::pair<std::string, std::string>> controls;
};

struct Index {
  Index() {
    SpaceDescriptor space;
    space.model_name = "eight ranks";
    space.weights = OracleDigest<Sha256Digest>(1, 3);
    space.cache_dtype = "f16";
    space.kv_scales = "none";
    space.rope = "theta=10000";
    space.engine_layout = "test 1";
    space.hash_scheme = "larder";
    space.block_tokens = 16;
    space.chunk_tokens = 256;
    GroupDescriptor group;
    group.layer_count = 2;
    group.kv_head_count = kParts;
    group.k_head_bytes = 16;
    group.v_head_bytes = 16;
    group.layer_digest = "0-1";
    space.groups = {group};
    Open();
    id = engine->OpenSpace({}, space)->id;
    const PartShape one{0, 2, 0, 1, 0, 1};
    const uint64_t bytes =
        LayoutRecord(group, one, space.chunk_tokens)->record_bytes;
    disk.records.reserve(kChunks * kParts);
    for (uint32_t n = 0; n < kChunks; ++n) {
      RecordMeta meta = OracleMeta(id, OracleChunkId(n), one, 256, n);
      meta.token_begin = n % 500 * 256;
      if (n % 500 != 0) meta.parent = OracleChunkId(n - 1);
      meta.record_bytes = bytes;
      for (uint16_t head = 0; head < kParts; ++head) {
        meta.shape.head_begin = head;
        disk.records.emplace_back(
            meta, Extent{n * kParts + head + 1, RoundUp(bytes, kPageBytes)});
      }
      ids.push_back(meta.chunk);
    }
    Open();
  }

  void Open() {
    Engine::Dependencies dependencies;
    dependencies.clock = &clock;
    dependencies.executor = &executor;
    dependencies.dram = &dram;
    dependencies.durable = &disk;
    dependencies.dram_policy = NewLruPolicy();
    dependencies.durable_policy = NewLruPolicy();
    engine = *Engine::Open({}, std::move(dependencies));
  }

  ManualClock clock;
  ManualExecutor executor{clock};
  FakeMemoryTier dram{1_MiB};
  HollowDurableTier disk;
  SpaceId id;
  std::vector<ChunkId> ids;
  std::unique_ptr<Engine> engine;
};

TEST(EngineCost, AChunkOfEightPartsTakesLessThanAKibibyteOfIndex) {
  Index index;
  const EngineStats stats = index.engine->Stats();
  ASSERT_EQ(stats.chunks, kChunks);
  ASSERT_EQ(stats.incomplete_chunks, 0u);
  // Recovered chunks are in one tier. In both, the other policy has as much
  // again.
  const auto second = NewLruPolicy();
  for (uint32_t n = 0; n < kChunks; ++n) second->Insert(ChunkIndex{n}, {});
  const double bytes =
      static_cast<double>(stats.index_bytes + second->MemoryBytes()) / kChunks;
  std::printf("index: %.0f bytes per chunk of %d parts\n", bytes, kParts);
  EXPECT_LE(bytes, 1024);
}

TEST(EngineCost, MatchOfAPrompt) {
  Index index;
  std::vector<std::chrono::nanoseconds> took;
  for (int round = 0; round < 501; ++round) {
    // Prompts all over the index, so that little of it is in the caches.
    std::vector<ChunkId> ids(
        index.ids.begin() + round * 7919 % (kChunks / 500) * 500,
        index.ids.begin() + round * 7919 % (kChunks / 500) * 500 + 500);
    ids.insert(ids.end(), index.ids.begin() + 1, index.ids.begin() + 13);
    MatchRequest request;
    request.space = index.id;
    request.ids = ids;
    const auto begin = std::chrono::steady_clock::now();
    const MatchResult match = index.engine->Match(request);
    took.push_back(std::chrono::steady_clock::now() - begin);
    ASSERT_EQ(match.usable, ids.size());
  }
  std::sort(took.begin(), took.end());
  const auto ms = [&](size_t at) {
    return static_cast<double>(took[at].count()) / 1e6;
  };
  std::printf("match of 512 ids: median %.3f ms, best %.3f ms\n", ms(250),
              ms(0));
}

}  // namespace
}  // namespace larder
