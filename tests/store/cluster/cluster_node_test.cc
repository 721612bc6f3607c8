// Nodes of a cluster in one process, on a network and a clock that stand
// still: engines, directories and links as they are.

#include "store/cluster/cluster_node.h"

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/store/engine_rig.h"
#include "tests/testing/fake_network.h"

namespace larder {
namespace {

using testing::Each;
using testing::HasSubstr;
using testing::SizeIs;

constexpr uint64_t kChunk = 8_KiB;  // a whole small chunk in a tier
constexpr TenantId kTenant{7};

class ClusterNodeTest : public testing::Test {
 protected:
  struct Host {
    std::string name;
    std::unique_ptr<FakeMemoryTier> dram;
    std::unique_ptr<FakeDurableTier> disk;
    std::unique_ptr<Transport> transport;
    std::unique_ptr<ClusterNode> node;
    std::unique_ptr<Engine> engine;
    ClientId client{};
    uint64_t incarnation = 0;
    std::map<uint32_t, MissReason> progress;  // of the last hold
  };

  ~ClusterNodeTest() override {
    for (auto& host : hosts_) Kill(*host);
  }

  Host& Add(const std::string& name) {
    auto host = std::make_unique<Host>();
    host->name = name;
    host->disk =
        std::make_unique<FakeDurableTier>(clock_, executor_, 256 * kChunk);
    hosts_.push_back(std::move(host));
    Start(*hosts_.back());
    return *hosts_.back();
  }
  void Start(Host& host, const std::string& cluster = "test") {
    host.dram = std::make_unique<FakeMemoryTier>(64 * kChunk);
    host.transport = network_.NewTransport({});
    ClusterNode::Parts parts;
    parts.cluster = cluster;
    parts.name = host.name;
    parts.incarnation = ++host.incarnation;
    parts.clock = &clock_;
    parts.executor = &executor_;
    parts.seed = 5;
    host.node = std::make_unique<ClusterNode>(parts, ClusterOptions{});
    Engine::Dependencies dependencies;
    dependencies.clock = &clock_;
    dependencies.executor = &executor_;
    dependencies.dram = host.dram.get();
    dependencies.durable = host.disk.get();
    dependencies.peers = &host.node->tier();
    dependencies.observer = &host.node->observer();
    dependencies.dram_policy = NewLruPolicy();
    dependencies.durable_policy = NewLruPolicy();
    auto engine = Engine::Open({}, std::move(dependencies));
    ASSERT_TRUE(engine.ok()) << engine.status();
    host.engine = *std::move(engine);
    const Status started =
        host.node->Start(*host.engine, *host.transport, host.name);
    ASSERT_TRUE(started.ok()) << started;
    const auto space = host.engine->OpenSpace(kTenant, SmallSpace());
    ASSERT_TRUE(space.ok());
    space_ = space->id;
    host.client = host.engine->AddClient(kTenant, [](HoldId, MissReason) {});
  }
  // As a crash: nobody is told.
  void Kill(Host& host) {
    if (host.node == nullptr) return;
    host.node->Stop();
    Pass(absl::Milliseconds(10));  // a transport's end waits for its links'
    host.transport.reset();
    host.engine.reset();
    host.node.reset();
  }
  // Everybody learns who is there.
  void Gather() {
    auto view = std::make_shared<ClusterView>();
    view->revision = ++revision_;
    view->current = true;
    for (const auto& host : hosts_) {
      if (host->node != nullptr) view->nodes.push_back(host->node->self());
    }
    std::sort(view->nodes.begin(), view->nodes.end(),
              [](const Node& a, const Node& b) { return a.id < b.id; });
    for (const auto& host : hosts_) {
      if (host->node != nullptr) host->node->SetView(view);
    }
    Pass(absl::Seconds(3));
  }
  void Pass(absl::Duration time) { executor_.RunUntil(clock_.Now() + time); }

  std::vector<ChunkId> Save(Host& host, uint64_t first, uint32_t count) {
    std::vector<ChunkId> ids;
    for (uint32_t i = 0; i < count; ++i) {
      const SpaceDescriptor space = SmallSpace();
      const GroupDescriptor& group = space.groups[0];
      RecordMeta meta = OracleMeta(space_, OracleChunkId(first + i),
                                   WholePart(group), space.chunk_tokens);
      if (i > 0) meta.parent = ids.back();
      meta.token_begin = i * space.chunk_tokens;
      auto record = std::make_shared<OracleRecord>(FillRecord(group, meta, 1));
      ReserveRequest reserve;
      reserve.client = host.client;
      reserve.space = space_;
      reserve.record_bytes = record->meta.record_bytes;
      reserve.shape = WholePart(group);
      const auto reservation = host.engine->Reserve(reserve);
      EXPECT_TRUE(reservation.ok()) << reservation.status();
      CommitRequest commit;
      commit.client = host.client;
      commit.reservation = *reservation;
      commit.record = record->bytes.span().first(record->meta.record_bytes);
      commit.keep_alive = record;
      host.engine->Commit(std::move(commit), [](SaveStage, Status status) {
        EXPECT_TRUE(status.ok()) << status;
      });
      ids.push_back(meta.chunk);
      executor_.RunAll();
    }
    Pass(absl::Milliseconds(50));
    return ids;
  }

  // A match that waits for what others say.
  MatchResult Match(Host& host, const std::vector<ChunkId>& ids) {
    MatchRequest request;
    request.tenant = kTenant;
    request.space = space_;
    request.ids = ids;
    bool done = false;
    host.engine->Locate(request, clock_.Now() + absl::Milliseconds(500),
                        [&] { done = true; });
    Pass(absl::Seconds(1));
    EXPECT_TRUE(done);
    return host.engine->Match(request);
  }

  // How many of them a hold gives, right to the byte.
  size_t Load(Host& host, const std::vector<ChunkId>& ids,
              absl::Duration patience = absl::Seconds(30)) {
    HoldRequest request;
    request.client = host.client;
    request.space = space_;
    request.ids = ids;
    request.map = true;
    host.progress.clear();
    const auto hold =
        host.engine->Hold(request, [&host](uint32_t index, MissReason reason) {
          EXPECT_TRUE(host.progress.emplace(index, reason).second);
        });
    EXPECT_TRUE(hold.ok()) << hold.status();
    if (!hold.ok()) return 0;
    Pass(patience);
    size_t good = 0;
    for (size_t i = 0; i < ids.size(); ++i) {
      const HeldChunk& chunk = hold->chunks[i];
      if (chunk.state == ChunkState::kMiss) continue;
      if (chunk.state == ChunkState::kPending) {
        EXPECT_TRUE(host.progress.contains(i)) << "no answer about " << i;
        if (host.progress[i] != MissReason::kNone) continue;
      }
      for (const HeldPart& part : chunk.parts) {
        const Status right = CheckRecord(
            SmallSpace().groups[0], part.memory,
            OracleMeta(space_, ids[i], part.shape, SmallSpace().chunk_tokens),
            1);
        EXPECT_TRUE(right.ok()) << right;
      }
      ++good;
    }
    if (hold->hold != HoldId{}) {
      EXPECT_TRUE(host.engine->ReleaseHold(host.client, hold->hold).ok());
    }
    Pass(absl::Milliseconds(10));
    return good;
  }

  ManualClock clock_;
  ManualExecutor executor_{clock_};
  FakeNetwork network_{clock_, executor_};
  std::vector<std::unique_ptr<Host>> hosts_;
  SpaceId space_;
  uint64_t revision_ = 0;
};

TEST_F(ClusterNodeTest, OneFindsAndLoadsWhatAnotherSaved) {
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 20);
  const MatchResult match = Match(b, ids);
  EXPECT_EQ(match.usable, 20u);
  EXPECT_THAT(match.states, Each(ChunkState::kPeer));
  EXPECT_EQ(Load(b, ids), 20u);
  EXPECT_THAT(Match(b, ids).states, Each(ChunkState::kReady));
  EXPECT_EQ(a.node->GetStats().service.refused_reads, 0u);
  EXPECT_EQ(b.node->GetStats().tier.failed_reads, 0u);
}

TEST_F(ClusterNodeTest, AloneItIsAsWithoutACluster) {
  Host& a = Add("a");
  const std::vector<ChunkId> before = Save(a, 1, 3);
  Gather();
  EXPECT_EQ(Match(a, before).usable, 3u);
  EXPECT_EQ(Match(a, {OracleChunkId(50)}).usable, 0u);
  EXPECT_EQ(Load(a, before), 3u);
}

TEST_F(ClusterNodeTest, APromptFromManyNodes) {
  std::vector<Host*> nodes;
  for (const char* name : {"a", "b", "c", "d", "e"})
    nodes.push_back(&Add(name));
  Gather();
  // Each has a piece of it in the middle of its own.
  const std::vector<ChunkId> ids = Save(*nodes[0], 1, 12);
  EXPECT_EQ(Match(*nodes[1], ids).usable, 12u);
  EXPECT_EQ(Load(*nodes[1], ids), 12u);
  for (size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(*nodes[0]->engine->Evict(kTenant, ids[2 * i], false), 1u);
  }
  Pass(absl::Milliseconds(50));
  EXPECT_EQ(Match(*nodes[2], ids).usable, 12u);
  EXPECT_EQ(Load(*nodes[2], ids), 12u);
}

TEST_F(ClusterNodeTest, WhatASaverHadBeforeOthersCameIsFound) {
  Host& a = Add("a");
  const std::vector<ChunkId> ids = Save(a, 1, 4);
  Host& b = Add("b");
  Gather();
  EXPECT_EQ(Match(b, ids).usable, 4u);
  EXPECT_EQ(Load(b, ids), 4u);
}

TEST_F(ClusterNodeTest, WhatIsGoneThereIsAMissHere) {
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 4);
  EXPECT_EQ(Match(b, ids).usable, 4u);
  EXPECT_EQ(*a.engine->Evict(kTenant, ids[1], false), 1u);
  // It is still believed to be there.
  EXPECT_EQ(Load(b, ids), 3u);
  EXPECT_EQ(Load(b, ids), 1u);  // prefix: the second is known to be gone
  EXPECT_EQ(Match(b, ids).usable, 1u);
}

TEST_F(ClusterNodeTest, ADeadPeerCostsItsChunksInTime) {
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 4);
  EXPECT_EQ(Match(b, ids).usable, 4u);
  Kill(a);
  EXPECT_EQ(Load(b, ids), 0u);
  EXPECT_EQ(b.dram->Usage().used_bytes, 0u);
  Gather();
  EXPECT_EQ(Match(b, ids).usable, 0u);
}

TEST_F(ClusterNodeTest, ASilentNetworkCostsTheChunksInTime) {
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 4);
  EXPECT_EQ(Match(b, ids).usable, 4u);
  network_.Stop();
  EXPECT_EQ(Load(b, ids), 0u);
  EXPECT_EQ(b.dram->Usage().used_bytes, 0u);
}

TEST_F(ClusterNodeTest, ANodeThatReturnsBringsItsDiskBack) {
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 4);
  Pass(absl::Seconds(1));
  Kill(a);
  a.disk->Restart(executor_);
  Gather();
  EXPECT_EQ(Match(b, ids).usable, 0u);
  Start(a);
  Gather();
  EXPECT_EQ(Match(b, ids).usable, 4u);
  EXPECT_EQ(Load(b, ids), 4u);
}

TEST_F(ClusterNodeTest, TheFormerLifeOfANodeIsNotAdmitted) {
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 2);
  // b believes in a life of a that has not begun.
  auto view = std::make_shared<ClusterView>(*b.node->View());
  for (Node& node : view->nodes) {
    if (node.name == "a") node.incarnation = 9;
  }
  b.node->SetView(view);
  EXPECT_EQ(Match(b, ids).usable, 0u);
  ASSERT_THAT(b.node->Peers(), SizeIs(1));
}

TEST_F(ClusterNodeTest, AnotherClusterIsRefused) {
  Host& a = Add("a");
  Host& b = Add("b");
  Kill(b);
  Start(b, "another");
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 2);
  EXPECT_EQ(Match(b, ids).usable, 0u);
}

TEST_F(ClusterNodeTest, OtherTenantsDoNotSeeIt) {
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 2);
  ASSERT_TRUE(b.engine->OpenSpace(TenantId{8}, SmallSpace()).ok());
  MatchRequest request;
  request.tenant = TenantId{8};
  request.space = space_;
  request.ids = ids;
  b.engine->Locate(request, clock_.Now() + absl::Seconds(1), [] {});
  Pass(absl::Seconds(2));
  EXPECT_EQ(b.engine->Match(request).usable, 0u);
}

TEST_F(ClusterNodeTest, AMatchOfALongPromptAsksFewNodes) {
  std::vector<Host*> nodes;
  for (int i = 0; i < 12; ++i) nodes.push_back(&Add(absl::StrCat("n", i)));
  Gather();
  std::vector<ChunkId> ids;
  for (uint64_t i = 0; i < 512; ++i) ids.push_back(OracleChunkId(1000 + i));
  const uint64_t before = nodes[0]->node->GetStats().locator.messages;
  EXPECT_EQ(Match(*nodes[0], ids).usable, 0u);
  EXPECT_LE(nodes[0]->node->GetStats().locator.messages - before, 9u);
}

TEST_F(ClusterNodeTest, StopsInTheMiddleOfALoad) {
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 8);
  EXPECT_EQ(Match(b, ids).usable, 8u);
  network_.SetDelay(absl::Milliseconds(1));
  b.engine->Prefetch(kTenant, space_, ids);
  Pass(absl::Milliseconds(3));
  Kill(b);
  Pass(absl::Seconds(1));
  EXPECT_EQ(a.engine->Stats().holds, 0u);
}

}  // namespace
}  // namespace larder
