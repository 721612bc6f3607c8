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

using testing::AllOf;
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
    bool draining = false;
    std::map<uint32_t, MissReason> progress;  // of the last hold
    std::function<void(ClusterNode::Parts&)> configure;
    std::vector<std::string> log;
  };

  ~ClusterNodeTest() override {
    for (auto& host : hosts_) Kill(*host);
  }

  Host& Add(const std::string& name,
            std::function<void(ClusterNode::Parts&)> configure = nullptr,
            bool open = true) {
    auto host = std::make_unique<Host>();
    host->name = name;
    host->configure = std::move(configure);
    host->disk =
        std::make_unique<FakeDurableTier>(clock_, executor_, 256 * kChunk);
    hosts_.push_back(std::move(host));
    Start(*hosts_.back(), "test", open);
    return *hosts_.back();
  }
  void Start(Host& host, const std::string& cluster = "test",
             bool open = true) {
    host.dram = std::make_unique<FakeMemoryTier>(64 * kChunk);
    host.transport = network_.NewTransport({});
    ClusterNode::Parts parts;
    parts.cluster = cluster;
    parts.name = host.name;
    parts.incarnation = ++host.incarnation;
    parts.clock = &clock_;
    parts.executor = &executor_;
    parts.seed = 5;
    parts.log = [&host](const std::string& line) { host.log.push_back(line); };
    if (host.configure != nullptr) host.configure(parts);
    options_.service.sealed_bytes_max = 1;  // one after the other
    host.node = std::make_unique<ClusterNode>(parts, options_);
    Engine::Dependencies dependencies;
    dependencies.clock = &clock_;
    dependencies.executor = &executor_;
    dependencies.dram = host.dram.get();
    dependencies.durable = host.disk.get();
    dependencies.peers = &host.node->tier();
    dependencies.observer = &host.node->observer();
    dependencies.sender = &host.node->sender();
    dependencies.dram_policy = NewLruPolicy();
    dependencies.durable_policy = NewLruPolicy();
    auto engine = Engine::Open({}, std::move(dependencies));
    ASSERT_TRUE(engine.ok()) << engine.status();
    host.engine = *std::move(engine);
    const Status started =
        host.node->Start(*host.engine, *host.transport, host.name);
    ASSERT_TRUE(started.ok()) << started;
    if (open) {
      const auto space = host.engine->OpenSpace(kTenant, SmallSpace());
      ASSERT_TRUE(space.ok());
      space_ = space->id;
    }
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
      if (host->node == nullptr) continue;
      view->nodes.push_back(host->node->self());
      view->nodes.back().draining = host->draining;
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

  // One layer of a chunk at a node that sends it to another one; what is told
  // of it, later too.
  using Told = std::shared_ptr<std::map<SaveStage, Status>>;
  Told Send(Host& host, const ChunkId& id, uint16_t layer,
            const std::string& destination) {
    const SpaceDescriptor space = SmallSpace();
    PartShape shape = WholePart(space.groups[0]);
    shape.layer_begin = layer;
    shape.layer_count = 1;
    auto record = std::make_shared<OracleRecord>(FillRecord(
        space.groups[0], OracleMeta(space_, id, shape, space.chunk_tokens), 1));
    ReserveRequest reserve;
    reserve.client = host.client;
    reserve.space = space_;
    reserve.record_bytes = record->meta.record_bytes;
    reserve.shape = shape;
    const auto reservation = host.engine->Reserve(reserve);
    EXPECT_TRUE(reservation.ok()) << reservation.status();
    CommitRequest commit;
    commit.client = host.client;
    commit.reservation = *reservation;
    commit.record = record->bytes.span().first(record->meta.record_bytes);
    commit.keep_alive = record;
    commit.hints.destination = destination;
    auto told = std::make_shared<std::map<SaveStage, Status>>();
    host.engine->Commit(std::move(commit),
                        [told](SaveStage stage, const Status& status) {
                          EXPECT_TRUE(told->emplace(stage, status).second);
                        });
    executor_.RunAll();
    return told;
  }
  // How many layers of a chunk, of [begin, end), a node has, right to the byte.
  size_t LayersAt(Host& host, const ChunkId& id, uint16_t begin, uint16_t end) {
    HoldRequest request;
    request.client = host.client;
    request.space = space_;
    request.ids = {&id, 1};
    request.layer_begin = begin;
    request.layer_end = end;
    request.map = true;
    request.peers = false;
    const auto hold = host.engine->Hold(request, [](uint32_t, MissReason) {});
    EXPECT_TRUE(hold.ok()) << hold.status();
    size_t layers = 0;
    for (const HeldPart& part : hold->chunks[0].parts) {
      RecordMeta expected =
          OracleMeta(space_, id, part.shape, SmallSpace().chunk_tokens);
      const Status right =
          CheckCodedRecord(SmallSpace(), part.memory, expected, 1, kPlanesMax);
      EXPECT_TRUE(right.ok()) << right;
      layers += part.shape.layer_count;
    }
    if (hold->hold != HoldId{}) {
      EXPECT_TRUE(host.engine->ReleaseHold(host.client, hold->hold).ok());
    }
    return layers;
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
  ClusterOptions options_;
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

std::function<void(ClusterNode::Parts&)> WithSecret(char c) {
  return [c](ClusterNode::Parts& parts) { parts.secret.assign(32, c); };
}

TEST_F(ClusterNodeTest, NodesOfOneSecretFindEachOthersChunks) {
  Host& a = Add("a", WithSecret('x'));
  Host& b = Add("b", WithSecret('x'));
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 4);
  EXPECT_EQ(Match(b, ids).usable, 4u);
  EXPECT_EQ(Load(b, ids), 4u);
  EXPECT_THAT(b.log, testing::IsEmpty());
}

TEST_F(ClusterNodeTest, NodesOfDifferentSecretsSaySo) {
  Host& a = Add("a", WithSecret('x'));
  Host& b = Add("b", WithSecret('y'));
  Host& c = Add("c");
  Gather();
  size_t lines = 0;
  for (Host* host : {&a, &b, &c}) {
    const std::vector<ChunkId> ids = Save(*host, 1, 4);
    for (Host* other : {&a, &b, &c}) {
      EXPECT_EQ(Match(*other, ids).usable, other == host ? 4u : 0u);
    }
    EXPECT_EQ(*host->engine->Evict(kTenant, ids[0], false), 1u);
  }
  for (Host* host : {&a, &b, &c}) {
    // Of each node once, however often it is tried.
    EXPECT_THAT(host->log, SizeIs(testing::Le(2u)));
    lines += host->log.size();
    EXPECT_THAT(host->log, Each(AllOf(HasSubstr("no link to node"),
                                      HasSubstr("cluster.secret_file"))));
    for (const PeerLinks::PeerState& peer : host->node->Peers()) {
      EXPECT_FALSE(peer.connected) << peer.node.name;
    }
  }
  EXPECT_GT(lines, 0u);
}

TEST_F(ClusterNodeTest, SomeNodesMayHaveATenantsChunks) {
  const auto both = [](ClusterNode::Parts& parts) {
    parts.tenants = {{kTenant, {"a", "b"}}};
  };
  Host& a = Add("a", both);
  Host& b = Add("b", both);
  Host& c = Add("c", both);
  Host& d = Add("d");  // nobody told it
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 4);
  EXPECT_EQ(Match(b, ids).usable, 4u);
  EXPECT_EQ(Load(b, ids), 4u);
  EXPECT_EQ(Match(c, ids).usable, 0u);
  EXPECT_EQ(Load(c, ids), 0u);
  EXPECT_EQ(c.node->GetStats().tier.record_questions, 0u);
  // It asks, and there is nothing.
  EXPECT_EQ(Match(d, ids).usable, 0u);
  EXPECT_EQ(Load(d, ids), 0u);
  EXPECT_GT(d.node->GetStats().tier.record_questions, 0u);
  // What is saved where it may not be stays there.
  const std::vector<ChunkId> at_c = Save(c, 50, 3), at_d = Save(d, 60, 3);
  EXPECT_EQ(Match(c, at_c).usable, 3u);
  for (Host* other : {&a, &b}) {
    EXPECT_EQ(Match(*other, at_c).usable, 0u);
    EXPECT_EQ(Match(*other, at_d).usable, 0u);
    EXPECT_EQ(other->node->GetStats().tier.reads, other == &b ? 4u : 0u);
  }
}

// A read that was not preceded by a question about records.
TEST_F(ClusterNodeTest, AReadOfANodeThatMayNotIsAsIfNothingWasThere) {
  Host& a = Add("a", [](ClusterNode::Parts& parts) {
    parts.tenants = {{kTenant, {"a"}}};
  });
  const std::vector<ChunkId> ids = Save(a, 1, 1);
  const auto known = a.engine->Records(kTenant, space_, ids);
  const TenantPolicies policies("test", ComputeNodeId("test", "a"), "",
                                {{kTenant, {"a"}}});
  PeerService service(*a.engine, policies, {});
  ReadQuery query;
  query.tenant = kTenant;
  query.space = space_;
  query.chunk = ids[0];
  query.shape = known[0].parts[0].shape;
  query.checksum = known[0].parts[0].checksum;
  query.bytes = 100;
  class Kept final : public Answer::Sink {
   public:
    void Send(uint64_t, StatusOr<std::string> answer) override {
      status = answer.status();
    }
    Status status;
  };
  const auto kept = std::make_shared<Kept>();
  service.Handle(ComputeNodeId("test", "b"), nullptr, Encode(query),
                 std::nullopt, absl::InfiniteFuture(), Answer(kept, 1));
  EXPECT_EQ(kept->status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(service.GetStats().reads, 0u);
}

std::function<void(ClusterNode::Parts&)> WithKey(char c) {
  return [c](ClusterNode::Parts& parts) {
    parts.tenants = {{kTenant, {}, std::string(ChunkCipher::kKeyBytes, c)}};
  };
}

TEST_F(ClusterNodeTest, ChunksOfATenantWithAKeyTravelEncrypted) {
  Host& a = Add("a", WithKey('k'));
  Host& b = Add("b", WithKey('k'));
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 20);
  std::vector<std::string> secrets;  // of each record a piece from its middle
  HoldRequest request;
  request.client = a.client;
  request.space = space_;
  request.ids = ids;
  request.map = true;
  const auto hold = a.engine->Hold(request, [](uint32_t, MissReason) {});
  ASSERT_TRUE(hold.ok()) << hold.status();
  for (size_t i = 0; i < ids.size(); ++i) {
    secrets.emplace_back(reinterpret_cast<const char*>(&ids[i]), sizeof ids[i]);
    const ByteSpan memory = hold->chunks[i].parts[0].memory;
    secrets.emplace_back(
        reinterpret_cast<const char*>(memory.data() + memory.size() / 2), 32);
  }
  const auto count_secrets = [&] {
    size_t seen = 0;
    network_.SetTap([&](const FrameHeader&, ByteSpan bytes) {
      const std::string_view text(reinterpret_cast<const char*>(bytes.data()),
                                  bytes.size());
      for (const std::string& secret : secrets) {
        seen += text.find(secret) != std::string_view::npos;
      }
    });
    EXPECT_EQ(Match(b, ids).usable, 20u);
    EXPECT_EQ(Load(b, ids), 20u);
    network_.SetTap(nullptr);
    return seen;
  };
  EXPECT_EQ(count_secrets(), 0u);
  const ClusterNode::Stats stats = a.node->GetStats();
  EXPECT_GT(stats.service.sealed_bytes, 0u);
  EXPECT_EQ(stats.service.sealed_bytes, stats.service.sent_bytes);
  EXPECT_EQ(stats.wrong_keys, 0u);
  EXPECT_THAT(a.log, testing::IsEmpty());
  // Without a key they are there to be seen.
  EXPECT_TRUE(a.engine->ReleaseHold(a.client, hold->hold).ok());
  for (Host* host : {&a, &b}) {
    Kill(*host);
    host->disk->Restart(executor_);
    host->configure = nullptr;
    Start(*host);
  }
  Gather();
  for (const ChunkId& id : ids) (void)b.engine->Evict(kTenant, id, true);
  Pass(absl::Seconds(1));
  EXPECT_GT(count_secrets(), 0u);
}

TEST_F(ClusterNodeTest, OffersGoToNodesThatMayHaveThem) {
  const auto named = [](char key, std::vector<std::string> nodes) {
    return [=](ClusterNode::Parts& parts) {
      parts.tenants = {
          {kTenant, nodes, std::string(ChunkCipher::kKeyBytes, key)}};
    };
  };
  Host& a = Add("a", named('k', {"a", "b", "d"}));
  Host& b = Add("b", named('k', {"a", "b"}));
  Host& c = Add("c", named('k', {"a", "b", "c"}));
  Host& d = Add("d", named('q', {}));
  Gather();
  size_t seen = 0;
  const ChunkId id = OracleChunkId(1);
  network_.SetTap([&](const FrameHeader&, ByteSpan bytes) {
    seen += std::string_view(reinterpret_cast<const char*>(bytes.data()),
                             bytes.size())
                .find({reinterpret_cast<const char*>(&id), sizeof id}) !=
            std::string_view::npos;
  });
  const auto send = [&](const char* to) {
    const Told told = Send(a, id, 0, to);
    Pass(absl::Seconds(1));
    EXPECT_TRUE(told->at(SaveStage::kVolatile).ok());
    return told->at(SaveStage::kDelivered);
  };
  EXPECT_TRUE(send("b").ok());
  EXPECT_EQ(LayersAt(b, id, 0, 2), 1u);
  EXPECT_EQ(a.node->GetStats().service.sealed_bytes,
            a.node->GetStats().service.sent_bytes);
  EXPECT_EQ(seen, 0u);
  // It is not offered to one that may not have it, and one that may, says who
  // offers, has another key.
  EXPECT_TRUE(absl::IsPermissionDenied(send("c")));
  EXPECT_TRUE(absl::IsNotFound(send("d")));
  // Who offers may be one that may not.
  const Told told = Send(c, id, 0, "b");
  Pass(absl::Seconds(1));
  EXPECT_TRUE(absl::IsNotFound(told->at(SaveStage::kDelivered)));
  for (Host* host : {&c, &d}) {
    EXPECT_EQ(host->node->GetStats().receiver.received, 0u) << host->name;
  }
  EXPECT_EQ(d.node->GetStats().wrong_keys, 1u);
  network_.SetTap(nullptr);
}

TEST_F(ClusterNodeTest, WithoutTheKeyNothingIsThere) {
  Host& a = Add("a", WithKey('k'));
  Host& b = Add("b", WithKey('q'));
  Host& c = Add("c");
  Gather();
  std::map<Host*, std::vector<ChunkId>> saved;
  uint64_t first = 1;
  for (Host* host : {&a, &b, &c}) {
    saved[host] = Save(*host, first, 4);
    first += 100;
  }
  for (const auto& [host, ids] : saved) {
    for (Host* other : {&a, &b, &c}) {
      if (other == host) continue;
      EXPECT_EQ(Match(*other, ids).usable, 0u) << host->name << other->name;
      EXPECT_EQ(Load(*other, ids), 0u) << host->name << other->name;
      EXPECT_GT(other->node->GetStats().tier.record_questions, 0u);
    }
    EXPECT_EQ(host->node->GetStats().service.sent_bytes, 0u);
    EXPECT_EQ(host->node->GetStats().wrong_keys > 0, host != &c);
  }
  EXPECT_THAT(a.log,
              testing::Contains(AllOf(HasSubstr("node b asks about tenant 7"),
                                      HasSubstr("key_file"))));
  EXPECT_THAT(a.log, SizeIs(1));
}

TEST_F(ClusterNodeTest, WhatIsChangedOnTheWayIsAMissAndAnEvent) {
  Host& a = Add("a", WithKey('k'));
  Host& b = Add("b", WithKey('k'));
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 4);
  EXPECT_EQ(Match(b, ids).usable, 4u);
  int puts = 0;
  network_.SetTap([&](const FrameHeader& header, ByteSpan bytes) {
    if (header.kind != FrameKind::kPut || ++puts != 3) return;
    // The sender's own memory, of this message alone.
    const_cast<std::byte&>(bytes[bytes.size() / 2]) ^= std::byte{1};
  });
  const uint64_t before = b.engine->Events().last_sequence();
  EXPECT_EQ(Load(b, ids), 3u);
  network_.SetTap(nullptr);
  size_t corrupt = 0;
  for (const Event& event :
       b.engine->Events().Read(before, 1000, absl::ZeroDuration())) {
    if (event.type != EventType::kChunkCorrupt) continue;
    ++corrupt;
    EXPECT_EQ(event.tier, TierKind::kPeer);
  }
  EXPECT_EQ(corrupt, 1u);
  EXPECT_EQ(b.node->GetStats().tier.failed_reads, 1u);
  // It was not the holder's fault: the next one gets it.
  EXPECT_EQ(Match(b, ids).usable, 4u);
  EXPECT_EQ(Load(b, ids), 4u);
}

TEST_F(ClusterNodeTest, ADeadPeerOfATenantWithAKeyCostsItsChunksInTime) {
  Host& a = Add("a", WithKey('k'));
  Host& b = Add("b", WithKey('k'));
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 4);
  EXPECT_EQ(Match(b, ids).usable, 4u);
  Kill(a);
  EXPECT_EQ(Load(b, ids), 0u);
  EXPECT_EQ(b.dram->Usage().used_bytes, 0u);
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

// ---- Sending chunks to a node

TEST_F(ClusterNodeTest, LayersAreSentBeforeTheChunkIsWhole) {
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  const ChunkId id = OracleChunkId(1);
  const GroupMask groups = 1;
  AwaitRequest request;
  request.tenant = kTenant;
  request.space = space_;
  request.ids = {&id, 1};
  request.groups = {&groups, 1};
  request.layers = 1;
  request.deadline = clock_.Now() + absl::Seconds(5);
  std::vector<uint32_t> here;
  b.engine->Await(request,
                  [&](std::vector<uint32_t> layers) { here = layers; });
  const Told first = Send(a, id, 0, "b");
  Pass(absl::Milliseconds(100));
  EXPECT_THAT(here, testing::ElementsAre(1));
  EXPECT_TRUE(first->at(SaveStage::kDelivered).ok())
      << first->at(SaveStage::kDelivered);
  EXPECT_EQ(LayersAt(b, id, 0, 2), 1u);
  EXPECT_EQ(b.engine->Lookup(kTenant, space_, {&id, 1})[0],
            ChunkState::kPending);

  const Told second = Send(a, id, 1, "b");
  Pass(absl::Milliseconds(100));
  EXPECT_TRUE(second->at(SaveStage::kDelivered).ok());
  EXPECT_EQ(LayersAt(b, id, 0, 2), 2u);
  EXPECT_EQ(b.engine->Lookup(kTenant, space_, {&id, 1})[0], ChunkState::kReady);
  EXPECT_EQ(b.node->GetStats().receiver.received, 2u);
  EXPECT_EQ(b.engine->Stats().reserved_bytes, 0u);
  // It is there.
  const Told again = Send(a, id, 1, "b");
  Pass(absl::Milliseconds(100));
  EXPECT_TRUE(again->at(SaveStage::kDelivered).ok());
  EXPECT_EQ(b.node->GetStats().receiver.present, 1u);
}

TEST_F(ClusterNodeTest, ADestinationThatCannotHaveItFailsNoSave) {
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  const Told nobody = Send(a, OracleChunkId(1), 0, "c");
  EXPECT_TRUE(nobody->at(SaveStage::kVolatile).ok());
  EXPECT_TRUE(absl::IsNotFound(nobody->at(SaveStage::kDelivered)));
  EXPECT_TRUE(
      Send(a, OracleChunkId(1), 1, "a")->at(SaveStage::kDelivered).ok());

  // One that nobody opened there is.
  Host& d = Add("d", nullptr, /*open=*/false);
  Gather();
  const Told opened = Send(a, OracleChunkId(1), 0, "d");
  Pass(absl::Seconds(1));
  EXPECT_TRUE(opened->at(SaveStage::kDelivered).ok())
      << opened->at(SaveStage::kDelivered);
  EXPECT_THAT(d.engine->Spaces(kTenant), SizeIs(1));

  // Its weights are others.
  b.engine->AdvanceEpoch(kTenant, space_, [](const StatusOr<Epoch>&) {});
  Pass(absl::Seconds(1));
  const Told other = Send(a, OracleChunkId(2), 0, "b");
  Pass(absl::Seconds(1));
  EXPECT_TRUE(other->at(SaveStage::kVolatile).ok());
  EXPECT_TRUE(absl::IsFailedPrecondition(other->at(SaveStage::kDelivered)))
      << other->at(SaveStage::kDelivered);
  EXPECT_EQ(LayersAt(b, OracleChunkId(2), 0, 2), 0u);

  Kill(b);
  const Told gone = Send(a, OracleChunkId(3), 0, "b");
  Pass(absl::Minutes(1));
  EXPECT_TRUE(gone->at(SaveStage::kVolatile).ok());
  EXPECT_FALSE(gone->at(SaveStage::kDelivered).ok());
}

TEST_F(ClusterNodeTest, ASenderThatGoesInTheMiddleLeavesNothing) {
  network_.SetDelay(absl::Milliseconds(10));
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  for (int step = 1; step < 30; ++step) {
    const ChunkId id = OracleChunkId(static_cast<uint64_t>(step));
    Send(a, id, 0, "b");
    Pass(absl::Milliseconds(10) * step);
    Kill(a);
    Pass(absl::Minutes(1));
    EXPECT_EQ(b.engine->Stats().reservations, 0u);
    EXPECT_EQ(b.engine->Stats().reserved_bytes, 0u);
    LayersAt(b, id, 0, 2);  // whatever there is, is right
    Start(a);
    Gather();
  }
  EXPECT_GT(b.node->GetStats().receiver.received, 0u);
}

TEST_F(ClusterNodeTest, OffersThatAreNoneAreRefused) {
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  Offer offer;
  offer.tenant = kTenant;
  const GroupDescriptor group = SmallSpace().groups[0];
  RecordMeta meta =
      FillRecord(group,
                 OracleMeta(space_, OracleChunkId(1), WholePart(group), 8), 1)
          .meta;
  meta.epoch = b.engine->Spaces(kTenant)[0].epoch;
  // There is no such record; nor so large a one; nor such a space.
  std::vector<Status> told;
  for (int wrong = 0; wrong < 3; ++wrong) {
    RecordMeta one = meta;
    if (wrong == 1) one.record_bytes = uint64_t{1} << 50;
    if (wrong == 2) one.space = OracleDigest<SpaceId>(9, 9);
    a.node->sender().Offer(b.node->self().id, SmallSpace(), {one},
                           Urgency::kNormal,
                           [&](Status status) { told.push_back(status); });
    Pass(absl::Minutes(1));
  }
  ASSERT_THAT(told, SizeIs(3));
  EXPECT_TRUE(absl::IsNotFound(told[0])) << told[0];
  EXPECT_FALSE(told[1].ok());
  EXPECT_TRUE(absl::IsNotFound(told[2])) << told[2];
  EXPECT_EQ(b.engine->Stats().reservations, 0u);
  EXPECT_EQ(b.dram->Usage().used_bytes, 0u);
}

// ---- Copies

TEST_F(ClusterNodeTest, WhatHasAReplicaSurvivesItsSaver) {
  options_.replicas = 1;
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  const std::vector<ChunkId> ids = Save(a, 1, 20);
  Pass(absl::Seconds(10));
  EXPECT_EQ(a.node->GetStats().replication.copied, 20u);
  EXPECT_EQ(a.node->GetStats().replication.failed, 0u);
  EXPECT_TRUE(a.node->Quiet());
  // b has no reason to copy anything back.
  Pass(absl::Minutes(5));
  EXPECT_EQ(b.node->GetStats().replication.copied, 0u);
  EXPECT_EQ(a.node->GetStats().replication.copied, 20u);
  Kill(a);
  Gather();
  EXPECT_THAT(Match(b, ids).states, Each(ChunkState::kReady));
  EXPECT_EQ(Load(b, ids), 20u);
}

TEST_F(ClusterNodeTest, ReplicasComeBackAfterANodeWent) {
  options_.replicas = 1;
  std::vector<Host*> nodes;
  for (const char* name : {"a", "b", "c"}) nodes.push_back(&Add(name));
  Gather();
  const std::vector<ChunkId> ids = Save(*nodes[0], 1, 12);
  for (size_t gone = 0; gone < 2; ++gone) {
    Pass(absl::Minutes(5));
    Kill(*nodes[gone]);
    Gather();
  }
  EXPECT_EQ(Match(*nodes[2], ids).usable, 12u);
  EXPECT_EQ(Load(*nodes[2], ids), 12u);
}

TEST_F(ClusterNodeTest, WithoutReplicasNothingIsCopied) {
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  Save(a, 1, 20);
  Pass(absl::Minutes(5));
  EXPECT_EQ(a.node->GetStats().sender.offers, 0u);
  EXPECT_EQ(b.dram->Usage().used_bytes, 0u);
}

TEST_F(ClusterNodeTest, WhoDrainsGivesAwayWhatNobodyElseHas) {
  Host& a = Add("a");
  Host& b = Add("b");
  Host& c = Add("c");
  Gather();
  const std::vector<ChunkId> own = Save(a, 1, 20);
  const std::vector<ChunkId> shared = Save(b, 100, 10);
  EXPECT_EQ(Match(a, shared).usable, 10u);
  EXPECT_EQ(Load(a, shared), 10u);
  Pass(absl::Seconds(1));
  a.draining = true;
  Gather();
  Pass(absl::Seconds(20));
  EXPECT_TRUE(a.node->Quiet());
  EXPECT_EQ(a.node->GetStats().replication.copied, 20u);
  Kill(a);
  Gather();
  EXPECT_EQ(Match(c, own).usable, 20u);
  EXPECT_EQ(Load(c, own), 20u);
  EXPECT_EQ(Match(c, shared).usable, 10u);
  EXPECT_EQ(Load(c, shared), 10u);
}

TEST_F(ClusterNodeTest, ADrainTriesAgainWhatWasRefused) {
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  Save(a, 1, 4);
  // b's weights are others, for a while.
  const auto advance = [&](Host& host) {
    host.engine->AdvanceEpoch(kTenant, space_, [](const StatusOr<Epoch>&) {});
  };
  advance(b);
  a.draining = true;
  Gather();
  Pass(absl::Seconds(20));
  EXPECT_FALSE(a.node->Quiet());
  EXPECT_GT(a.node->GetStats().replication.failed, 4u);
  // What is outdated at a, too, needs nobody.
  advance(a);
  Pass(absl::Seconds(20));
  EXPECT_TRUE(a.node->Quiet());
}

TEST_F(ClusterNodeTest, ADrainEndsAlsoIfNobodyTakesAnything) {
  Host& a = Add("a");
  Host& b = Add("b");
  Gather();
  Save(a, 1, 4);
  b.engine->AdvanceEpoch(kTenant, space_, [](const StatusOr<Epoch>&) {});
  a.draining = true;
  Gather();
  for (int minute = 0; minute < 10 && !a.node->Quiet(); ++minute) {
    Pass(absl::Minutes(1));
  }
  EXPECT_TRUE(a.node->Quiet());
  EXPECT_EQ(a.node->GetStats().replication.given_up, 4u);
}

}  // namespace
}  // namespace larder
