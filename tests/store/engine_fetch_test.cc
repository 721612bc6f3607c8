// Chunks that another node has.

#include <cstring>
#include <map>
#include <memory>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/store/engine_rig.h"

namespace larder {
namespace {

using testing::ElementsAre;
using testing::IsEmpty;
using testing::Pair;
using testing::SizeIs;

constexpr uint64_t kChunk = 8_KiB;  // a whole small chunk in a tier

ChunkId Id(uint64_t n) {
  return OracleChunkId(n);
}

// What another engine has, without a network between.
class NeighbourTier final : public PeerTier {
 public:
  NeighbourTier(EngineRig& neighbour, ManualExecutor& executor)
      : neighbour_(neighbour),
        client_(neighbour.Client()),
        executor_(executor) {}

  TierKind kind() const override { return TierKind::kPeer; }
  TierUsage Usage() const override { return {}; }
  uint64_t MaxExtentBytes() const override { return 0; }
  StatusOr<Extent> Allocate(TenantId, uint64_t) override {
    return absl::ResourceExhaustedError("other nodes store for themselves");
  }
  void Write(Extent, const RecordMeta&, ByteSpan, Done done) override {
    std::move(done)(absl::UnimplementedError("read only"));
  }
  void Free(Extent extent) override {
    EXPECT_EQ(extents_.erase(extent.handle), 1u);
  }
  void Read(Extent extent, uint64_t offset, MutableByteSpan into,
            Done done) override {
    ++reads;
    ASSERT_TRUE(extents_.contains(extent.handle));
    const RecordMeta meta = extents_.at(extent.handle);
    executor_.Post(
        [this, meta, offset, into, done = std::move(done)]() mutable {
          std::move(done)(Copy(meta, offset, into));
        });
  }

  void Find(TenantId tenant, const SpaceId& space, Epoch epoch,
            std::span<const ChunkId> ids, std::span<Chunk> out) override {
    const auto records = neighbour_.engine->Records(tenant, space, ids);
    for (size_t i = 0; i < ids.size(); ++i) {
      if (!known || records[i].parts.empty() ||
          records[i].parts[0].epoch != epoch) {
        continue;
      }
      out[i].groups = records[i].groups;
      for (const RecordMeta& meta : records[i].parts) {
        out[i].lineage = std::max(out[i].lineage, meta.lineage);
        out[i].token_count = meta.token_count;
        out[i].is_tail = meta.is_tail;
        out[i].bytes += meta.record_bytes;
      }
    }
  }
  std::vector<Part> Take(TenantId tenant, const SpaceId& space, Epoch,
                         const ChunkId& id) override {
    std::vector<Part> parts;
    if (!known) return parts;
    const auto records = neighbour_.engine->Records(tenant, space, {&id, 1});
    for (RecordMeta meta : records[0].parts) {
      if (lie != nullptr) lie(meta);
      const uint64_t handle = ++last_;
      extents_[handle] = meta;
      parts.push_back({meta, {handle, RoundUp(meta.record_bytes, kPageBytes)}});
    }
    return parts;
  }
  void Locate(TenantId, const SpaceId&, Epoch, std::vector<ChunkId>, uint32_t,
              absl::Time, Task done) override {
    known = true;
    std::move(done)();
  }

  size_t extents() const { return extents_.size(); }

  bool known = true;
  bool gone = false;
  bool damage = false;
  int reads = 0;
  std::function<void(RecordMeta&)> lie;

 private:
  Status Copy(const RecordMeta& meta, uint64_t offset, MutableByteSpan into) {
    if (gone) return absl::UnavailableError("the node is gone");
    HoldRequest request;
    request.client = client_;
    request.space = meta.space;
    request.ids = {&meta.chunk, 1};
    request.worst_lineage = Lineage::kUnknown;
    request.map = true;
    const auto hold = neighbour_.engine->Hold(request, nullptr);
    for (const HeldPart& part : hold->chunks[0].parts) {
      if (part.checksum != meta.checksum) continue;
      std::memset(into.data(), 0xee, into.size());
      const ByteSpan bytes = part.memory.subspan(offset);
      std::memcpy(into.data(), bytes.data(),
                  std::min(bytes.size(), into.size()));
      if (damage) into[into.size() / 2] ^= std::byte{1};
      EXPECT_TRUE(neighbour_.engine->ReleaseHold(client_, hold->hold).ok());
      return absl::OkStatus();
    }
    return absl::UnavailableError("it has another record");
  }

  EngineRig& neighbour_;
  const ClientId client_;
  ManualExecutor& executor_;
  uint64_t last_ = 0;
  std::map<uint64_t, RecordMeta> extents_;
};

// Here and there are alike; what is saved there is fetched here.
class FetchTest : public testing::Test {
 protected:
  void Start(std::vector<GroupDescriptor> groups = {SmallGroup(
                 GroupKind::kFullAttention)},
             EngineOptions options = {}) {
    there = std::make_unique<EngineRig>(options, 64 * kChunk);
    here = std::make_unique<EngineRig>(options, 16 * kChunk);
    peers = std::make_unique<NeighbourTier>(*there, *here->executor);
    here->engine.reset();
    here->peers = peers.get();
    here->Start();
    space = here->Open(SmallSpace(groups));
    ASSERT_EQ(there->Open(SmallSpace(groups)), space);
    client = here->Client();
    saver = there->Client();
  }
  ~FetchTest() override {
    if (here != nullptr) here->engine.reset();
    EXPECT_TRUE(peers == nullptr || peers->extents() == 0);
  }

  MissReason Load(const ChunkId& id, Lineage worst = Lineage::kExact) {
    here->progress.clear();
    here->worst_lineage = worst;
    const auto hold = here->Hold(client, space, {id});
    EXPECT_TRUE(hold.ok()) << hold.status();
    here->Run();
    MissReason reason = hold->chunks[0].reason;
    if (hold->chunks[0].state == ChunkState::kPending) {
      EXPECT_THAT(here->progress, SizeIs(1));
      reason = here->progress.at(0).second;
    }
    if (reason == MissReason::kNone) {
      const Status read = here->Read(space, id, hold->chunks[0]);
      EXPECT_TRUE(read.ok()) << read;
    }
    if (hold->hold != HoldId{}) {
      EXPECT_TRUE(here->engine->ReleaseHold(client, hold->hold).ok());
      here->Run();
    }
    return reason;
  }

  std::unique_ptr<EngineRig> there, here;
  std::unique_ptr<NeighbourTier> peers;
  SpaceId space;
  ClientId client{}, saver{};
};

TEST_F(FetchTest, MatchesAndHoldsWhatAnotherHas) {
  Start();
  const std::vector<ChunkId> ids = there->SaveChain(saver, space, 1, 4);
  const MatchResult match = here->Match(space, ids);
  EXPECT_EQ(match.usable, 4u);
  EXPECT_THAT(match.states, testing::Each(ChunkState::kPeer));
  EXPECT_GT(match.load_estimate, absl::ZeroDuration());
  EXPECT_EQ(here->engine->Stats().chunks, 0u);  // a match keeps nothing

  for (const ChunkId& id : ids) EXPECT_EQ(Load(id), MissReason::kNone);
  EXPECT_THAT(here->Match(space, ids).states,
              testing::Each(ChunkState::kReady));
  const EngineStats stats = here->engine->Stats();
  EXPECT_EQ(stats.chunks, 4u);
  EXPECT_EQ(stats.fetched_bytes, stats.promoted_bytes);
  EXPECT_EQ(peers->extents(), 0u);
  // It is a copy as any, but for the disk: whose it is keeps it.
  EXPECT_THAT(here->engine->Stat({}, ids[2])->tiers,
              ElementsAre(TierKind::kDram));
  EXPECT_THAT(here->Events(EventType::kChunkStored), SizeIs(4));
}

TEST_F(FetchTest, OnePromptFromBothNodes) {
  Start();
  const std::vector<ChunkId> ids = there->SaveChain(saver, space, 1, 6);
  here->SaveChain(client, space, 1, 3);
  const MatchResult match = here->Match(space, ids);
  EXPECT_EQ(match.usable, 6u);
  EXPECT_THAT(match.states, ElementsAre(ChunkState::kReady, ChunkState::kReady,
                                        ChunkState::kReady, ChunkState::kPeer,
                                        ChunkState::kPeer, ChunkState::kPeer));
  const auto hold = here->Hold(client, space, ids);
  ASSERT_TRUE(hold.ok());
  here->Run();
  for (size_t i = 0; i < ids.size(); ++i) {
    EXPECT_TRUE(here->Read(space, ids[i], hold->chunks[i]).ok()) << i;
  }
}

TEST_F(FetchTest, LayerByLayer) {
  EngineOptions options;
  options.promote_io_bytes = kPageBytes;
  Start({SmallGroup(GroupKind::kFullAttention)}, options);
  const std::vector<ChunkId> ids = there->SaveChain(saver, space, 1, 2);
  std::vector<std::pair<uint32_t, uint32_t>> layers;
  HoldRequest request = here->Ask(client, space, ids);
  request.layers_landed = [&](uint32_t index, uint32_t count) {
    layers.emplace_back(index, count);
  };
  const auto hold = here->engine->Hold(request, here->Progress());
  ASSERT_TRUE(hold.ok());
  here->Run();
  EXPECT_THAT(here->progress, SizeIs(2));
  EXPECT_TRUE(here->Read(space, ids[1], hold->chunks[1]).ok());
}

TEST_F(FetchTest, ANodeThatIsGoneCostsItsChunks) {
  Start();
  const std::vector<ChunkId> ids = there->SaveChain(saver, space, 1, 3);
  here->SaveChain(client, space, 1, 1);
  peers->gone = true;
  EXPECT_EQ(Load(ids[0]), MissReason::kNone);
  EXPECT_EQ(Load(ids[1]), MissReason::kUnavailable);
  EXPECT_EQ(here->engine->Stats().chunks, 1u);
  EXPECT_EQ(here->dram->Usage().used_bytes, kChunk);
  peers->gone = false;
  EXPECT_EQ(Load(ids[1]), MissReason::kNone);
}

TEST_F(FetchTest, DamagedBytesAreAMiss) {
  Start();
  const std::vector<ChunkId> ids = there->SaveChain(saver, space, 1, 1);
  peers->damage = true;
  EXPECT_EQ(Load(ids[0]), MissReason::kCorrupt);
  EXPECT_EQ(here->engine->Stats().corrupt, 1u);
  EXPECT_EQ(here->engine->Stats().chunks, 0u);
  peers->damage = false;
  EXPECT_EQ(Load(ids[0]), MissReason::kNone);
}

TEST_F(FetchTest, WhatIsSaidOfChunksIsNotBelieved) {
  Start();
  const std::vector<ChunkId> ids = there->SaveChain(saver, space, 1, 1);
  const std::vector<std::function<void(RecordMeta&)>> lies = {
      [](RecordMeta& meta) { meta.record_bytes = uint64_t{1} << 35; },
      [](RecordMeta& meta) { meta.chunk = Id(77); },
      [](RecordMeta& meta) { meta.space = {}; },
      [](RecordMeta& meta) { meta.epoch = Epoch{9}; },
      [](RecordMeta& meta) { meta.group = GroupIndex{5}; },
      [](RecordMeta& meta) { meta.token_count = 4000; },
      [](RecordMeta& meta) { meta.shape.layer_count = 9; },
      [](RecordMeta& meta) { meta.shape.layer_count = 1; },  // not covered
      [](RecordMeta& meta) { ++meta.checksum.low; },
      [](RecordMeta& meta) { meta.record_bytes -= 64; },
  };
  for (size_t i = 0; i < lies.size(); ++i) {
    peers->lie = lies[i];
    EXPECT_NE(Load(ids[0]), MissReason::kNone) << i;
    EXPECT_EQ(here->engine->Stats().chunks, 0u) << i;
    EXPECT_EQ(here->dram->Usage().used_bytes, 0u) << i;
    EXPECT_EQ(peers->extents(), 0u) << i;
  }
}

TEST_F(FetchTest, LineageAndEpochCount) {
  Start();
  SaveSpec spec;
  spec.id = Id(1);
  spec.lineage = Lineage::kLossyFinest;
  there->Save(saver, space, spec);
  EXPECT_EQ(here->Match(space, {Id(1)}).usable, 0u);
  EXPECT_NE(Load(Id(1)), MissReason::kNone);
  EXPECT_EQ(Load(Id(1), Lineage::kLossyFinest), MissReason::kNone);

  there->SaveChain(saver, space, 5, 1);
  here->engine->AdvanceEpoch({}, space, [](const StatusOr<Epoch>&) {});
  here->Run();
  here->worst_lineage = Lineage::kExact;
  EXPECT_EQ(here->Match(space, {Id(5)}).usable, 0u);
  EXPECT_NE(Load(Id(5)), MissReason::kNone);
}

// A worse copy that is here stays what a match says of it.
TEST_F(FetchTest, WhatIsHereIsNotFetched) {
  Start();
  SaveSpec spec;
  spec.id = Id(1);
  there->Save(saver, space, spec);
  spec.lineage = Lineage::kLossyFinest;
  here->Save(client, space, spec);
  EXPECT_EQ(here->Match(space, {Id(1)}).usable, 0u);
  EXPECT_EQ(Load(Id(1)), MissReason::kLineage);
  EXPECT_EQ(peers->reads, 0);
}

TEST_F(FetchTest, ASaveMeanwhileWins) {
  Start();
  there->SaveChain(saver, space, 1, 1);
  const auto hold = here->Hold(client, space, {Id(1)});
  ASSERT_TRUE(hold.ok());
  EXPECT_EQ(hold->chunks[0].state, ChunkState::kPending);
  SaveSpec spec;
  spec.id = Id(1);
  spec.version = 2;  // other bytes
  spec.want_durable = true;
  const SaveResult saved = here->Save(client, space, spec);
  EXPECT_TRUE(saved.Reached(SaveStage::kDurable)) << saved.error();
  EXPECT_THAT(here->progress, ElementsAre(Pair(0, MissReason::kNone)));
  EXPECT_TRUE(here->Read(space, Id(1), hold->chunks[0], 1).ok());
  EXPECT_TRUE(here->engine->ReleaseHold(client, hold->hold).ok());
  here->Run();
  const auto again = here->Hold(client, space, {Id(1)});
  EXPECT_TRUE(here->Read(space, Id(1), again->chunks[0], 2).ok());
}

TEST_F(FetchTest, WhatIsFetchedLeavesMemoryForGood) {
  Start();
  const std::vector<ChunkId> ids = there->SaveChain(saver, space, 1, 40);
  for (int round = 0; round < 2; ++round) {
    for (const ChunkId& id : ids) EXPECT_EQ(Load(id), MissReason::kNone);
  }
  const EngineStats stats = here->engine->Stats();
  EXPECT_LE(stats.chunks, 16u);
  EXPECT_EQ(stats.writes.user_bytes, 0u);
  EXPECT_GE(peers->reads, 80);
}

TEST_F(FetchTest, ADeadlineIsKeptAndTheChunkComesAllTheSame) {
  Start();
  there->SaveChain(saver, space, 1, 1);
  HoldRequest request = here->Ask(client, space, {Id(1)});
  const ChunkId id = Id(1);
  request.ids = {&id, 1};
  request.deadline = here->clock.Now();
  const auto hold = here->engine->Hold(request, here->Progress());
  ASSERT_TRUE(hold.ok());
  EXPECT_EQ(hold->chunks[0].reason, MissReason::kDeadline);
  here->Run();
  EXPECT_EQ(here->State(space, Id(1)), ChunkState::kReady);
}

TEST_F(FetchTest, PrefetchFetches) {
  Start();
  const std::vector<ChunkId> ids = there->SaveChain(saver, space, 1, 3);
  here->engine->Prefetch({}, space, ids);
  here->Run();
  for (const ChunkId& id : ids) {
    EXPECT_EQ(here->State(space, id), ChunkState::kReady);
  }
}

TEST_F(FetchTest, UnknownUntilSomebodyAsks) {
  Start();
  const std::vector<ChunkId> ids = there->SaveChain(saver, space, 1, 2);
  peers->known = false;
  EXPECT_EQ(here->Match(space, ids).usable, 0u);
  bool done = false;
  MatchRequest request;
  request.space = space;
  request.ids = ids;
  EXPECT_FALSE(there->engine->has_peers());
  here->engine->Locate(request, here->clock.Now() + absl::Seconds(1),
                       [&] { done = true; });
  EXPECT_TRUE(done);
  EXPECT_EQ(here->Match(space, ids).usable, 2u);
}

// Two parts, of which one does not come: nothing of the chunk stays.
TEST_F(FetchTest, AllPartsOrNone) {
  Start();
  SaveSpec spec;
  spec.id = Id(1);
  const GroupDescriptor group = SmallGroup(GroupKind::kFullAttention);
  for (const uint16_t layer : {0, 1}) {
    PartShape shape = WholePart(group);
    shape.layer_begin = layer;
    shape.layer_count = 1;
    spec.shape = shape;
    there->Save(saver, space, spec);
  }
  peers->lie = [](RecordMeta& meta) {
    if (meta.shape.layer_begin == 1) ++meta.checksum.low;
  };
  EXPECT_NE(Load(Id(1)), MissReason::kNone);
  EXPECT_EQ(here->engine->Stats().chunks, 0u);
  peers->lie = nullptr;
  EXPECT_EQ(Load(Id(1)), MissReason::kNone);
}

TEST_F(FetchTest, NobodyIsTheSourceOfWhatItFetches) {
  Start();
  there->SaveChain(saver, space, 1, 1);
  const auto hold = here->Hold(client, space, {Id(1)});
  ASSERT_TRUE(hold.ok());
  const ChunkId id = Id(1);
  auto records = here->engine->Records({}, space, {&id, 1});
  EXPECT_THAT(records[0].parts, IsEmpty());
  EXPECT_THAT(here->engine->List({}, {}, {}, 10), IsEmpty());
  here->Run();
  records = here->engine->Records({}, space, {&id, 1});
  EXPECT_THAT(records[0].parts, SizeIs(1));
}

}  // namespace
}  // namespace larder
