#include <sys/stat.h>
#include <unistd.h>

#include <atomic>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "store/types.h"
#include "tests/store/engine_rig.h"
#include "tests/testing/await.h"
#include "tests/tools/process.h"
#include "tests/transport/kv_events/subscriber.h"
#include "transport/kv_events/batch_encoder.h"
#include "transport/kv_events/block_ledger.h"
#include "transport/kv_events/publisher.h"
#include "transport/kv_events/replay_ring.h"

namespace larder::kv_events {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

// ---- Bytes ----

// One event of every kind, on the 1.5th second of the epoch.
std::string OneOfEach(Encoding encoding) {
  BatchEncoder encoder(encoding);
  const BlockHash hashes[] = {{0xfedcba9876543210}, {7}};
  const uint32_t tokens[] = {1, 200, 70000, 4};
  encoder.Stored({.hashes = hashes,
                  .parent = BlockHash{uint64_t(-2), true},
                  .tokens = tokens,
                  .block_size = 2,
                  .medium = "CPU"});
  encoder.Removed({hashes, 1}, "STORAGE");
  encoder.Cleared();
  EXPECT_EQ(encoder.count(), 3u);
  std::string batch =
      encoder.Take(absl::UnixEpoch() + absl::Milliseconds(1500));
  EXPECT_EQ(encoder.count(), 0u);
  return batch;
}

std::string Hex(const std::string& bytes) {
  return ToHex(bytes.data(), bytes.size());
}

TEST(BatchEncoder, ArraysAreTheseBytes) {
  EXPECT_EQ(Hex(OneOfEach(Encoding::kArrays)),
            "93"                  // [
            "cb3ff8000000000000"  // 1.5,
            "93"                  // [
            "98"                  // ["BlockStored",
            "ab426c6f636b53746f726564"
            "92cffedcba987654321007"                // [hash, 7],
            "fe"                                    // -2,
            "9401ccc8ce0001117004"                  // [1, 200, 70000, 4],
            "02"                                    // 2,
            "c0a3435055c0"                          // null, "CPU", null],
            "93ac426c6f636b52656d6f766564"          // ["BlockRemoved",
            "91cffedcba9876543210"                  // [hash],
            "a753544f52414745"                      // "STORAGE"],
            "91b0416c6c426c6f636b73436c6561726564"  // ["AllBlocksCleared"]],
            "00");                                  // 0]
}

void ExpectOneOfEach(const std::string& bytes) {
  const RouterBatch batch = ParseBatch(bytes);
  EXPECT_EQ(batch.time, 1.5);
  EXPECT_EQ(batch.rank, 0);
  ASSERT_THAT(batch.events, SizeIs(3));
  const RouterEvent& stored = batch.events[0];
  EXPECT_EQ(stored.type, "BlockStored");
  EXPECT_THAT(stored.hashes,
              ElementsAre(static_cast<int64_t>(0xfedcba9876543210), 7));
  EXPECT_EQ(stored.parent, -2);
  EXPECT_THAT(stored.tokens, ElementsAre(1, 200, 70000, 4));
  EXPECT_EQ(stored.block_size, 2);
  EXPECT_EQ(stored.medium, "CPU");
  EXPECT_EQ(batch.events[1].type, "BlockRemoved");
  EXPECT_EQ(batch.events[1].medium, "STORAGE");
  EXPECT_THAT(batch.events[1].hashes, SizeIs(1));
  EXPECT_EQ(batch.events[2].type, "AllBlocksCleared");
}

TEST(BatchEncoder, BothFormsSayTheSame) {
  ExpectOneOfEach(OneOfEach(Encoding::kArrays));
  const std::string maps = OneOfEach(Encoding::kMaps);
  ExpectOneOfEach(maps);
  Reader reader(maps);
  const Value batch = reader.Next();
  for (const Value& event : batch.items[1].items) {
    EXPECT_EQ(event.kind, Value::Kind::kMap);
  }
  EXPECT_THAT(maps, HasSubstr("parent_block_hash"));
}

TEST(BatchEncoder, AnEmptyBatchIsOne) {
  BatchEncoder encoder(Encoding::kArrays);
  EXPECT_THAT(ParseBatch(encoder.Take(absl::UnixEpoch())).events, IsEmpty());
}

TEST(ReplayRing, KeepsTheNewestThatFit) {
  const auto batch = [](size_t bytes) {
    return std::make_shared<const std::string>(bytes, 'x');
  };
  ReplayRing ring(3, 100);
  EXPECT_EQ(ring.end(), 0u);
  for (uint64_t n = 0; n < 5; ++n) EXPECT_EQ(ring.Add(batch(10 + n)), n);
  EXPECT_EQ(ring.oldest(), 2u);
  EXPECT_EQ(ring.at(2)->size(), 12u);
  EXPECT_EQ(ring.Add(batch(80)), 5u);
  EXPECT_EQ(ring.oldest(), 4u);  // 14 + 80
  EXPECT_EQ(ring.Add(batch(1000)), 6u);
  EXPECT_EQ(ring.oldest(), 6u);  // one too large is kept alone
  EXPECT_EQ(ring.bytes(), 1000u);
}

// ---- What is told of chunks ----

std::shared_ptr<const ChunkBlocks> Said(std::vector<uint64_t> hashes,
                                        std::vector<uint32_t> tokens,
                                        bool keyed = false) {
  auto blocks = std::make_shared<ChunkBlocks>();
  blocks->hashes = std::move(hashes);
  blocks->tokens = std::move(tokens);
  blocks->keyed = keyed;
  return blocks;
}

const std::vector<uint32_t> kTokens = {1, 2, 3, 4, 5, 6, 7, 8};

class LedgerTest : public testing::Test {
 protected:
  void Start(uint64_t memory = 1_MiB, bool keyed_tokens = false) {
    ledger = std::make_unique<BlockLedger>(
        BlockLedger::Options{.memory = memory,
                             .keyed_tokens = keyed_tokens,
                             .block_tokens = [](const SpaceId&) { return 4; }});
  }

  Event Of(EventType type, uint64_t n, TierKind tier,
           std::shared_ptr<const ChunkBlocks> blocks = nullptr) {
    Event event;
    event.sequence = ++sequence;
    event.type = type;
    event.chunk = OracleChunkId(n);
    if (n % 10 != 0) event.parent = OracleChunkId(n - 1);
    event.tier = tier;
    event.token_count = 8;
    event.blocks = std::move(blocks);
    return event;
  }
  // What a router is told of it.
  std::vector<RouterEvent> Tell(const Event& event) {
    ledger->Apply(event, out);
    return Told();
  }
  std::vector<RouterEvent> Told() {
    auto events = ParseBatch(out.Take(absl::UnixEpoch())).events;
    for (const RouterEvent& event : events) view.Apply(event);
    return events;
  }
  std::vector<RouterEvent> Stored(
      uint64_t n, TierKind tier,
      std::shared_ptr<const ChunkBlocks> blocks = nullptr) {
    return Tell(Of(EventType::kChunkStored, n, tier, std::move(blocks)));
  }
  std::vector<RouterEvent> Removed(uint64_t n, TierKind tier) {
    return Tell(Of(EventType::kChunkRemoved, n, tier));
  }
  static int64_t Own(uint64_t n) {
    return static_cast<int64_t>(OwnName(OracleChunkId(n)).bits);
  }

  std::unique_ptr<BlockLedger> ledger;
  BatchEncoder out{Encoding::kArrays};
  RouterView view;
  uint64_t sequence = 0;
};

TEST_F(LedgerTest, AChunkOfWhichNothingWasSaidIsOneBlock) {
  Start();
  const auto told = Stored(11, TierKind::kDram);
  ASSERT_THAT(told, SizeIs(1));
  EXPECT_THAT(told[0].hashes, ElementsAre(Own(11)));
  EXPECT_EQ(told[0].parent, Own(10));
  EXPECT_THAT(told[0].tokens, IsEmpty());
  EXPECT_EQ(told[0].block_size, 0);
  EXPECT_EQ(told[0].medium, "CPU");
  EXPECT_EQ(Stored(10, TierKind::kDram)[0].parent, std::nullopt);
  const auto removed = Removed(11, TierKind::kDram);
  ASSERT_THAT(removed, SizeIs(1));
  EXPECT_EQ(removed[0].type, "BlockRemoved");
  EXPECT_THAT(removed[0].hashes, ElementsAre(Own(11)));
  EXPECT_EQ(removed[0].medium, "CPU");
  EXPECT_EQ(ledger->known(), 0u);
}

TEST_F(LedgerTest, OwnNamesAreTheIdsLowBits) {
  ChunkId id;
  for (size_t i = 0; i < 32; ++i) id.bytes[i] = static_cast<uint8_t>(i);
  EXPECT_EQ(OwnName(id).bits, 0x18191a1b1c1d1e1fu);
}

TEST_F(LedgerTest, WithTokensItIsToldBlockByBlockInEveryTier) {
  Start();
  const auto first = Stored(10, TierKind::kDram, Said({}, kTokens));
  ASSERT_THAT(first, SizeIs(1));
  ASSERT_THAT(first[0].hashes, SizeIs(2));
  EXPECT_EQ(first[0].hashes[1], Own(10));
  EXPECT_NE(first[0].hashes[0], Own(10));
  EXPECT_EQ(first[0].tokens, kTokens);
  EXPECT_EQ(first[0].block_size, 4);
  const auto second = Stored(11, TierKind::kDram, Said({}, kTokens));
  EXPECT_EQ(second[0].parent, Own(10));  // the last block of the one before
  EXPECT_NE(second[0].hashes[0], first[0].hashes[0]);
  // What moves keeps its names, and its tokens: nobody says them again.
  const auto moved = Stored(10, TierKind::kNvme);
  EXPECT_EQ(moved[0].hashes, first[0].hashes);
  EXPECT_EQ(moved[0].tokens, kTokens);
  EXPECT_EQ(moved[0].medium, "STORAGE");
  EXPECT_EQ(Removed(10, TierKind::kDram)[0].hashes, first[0].hashes);
  EXPECT_EQ(ledger->known(), 2u);
  EXPECT_EQ(Removed(10, TierKind::kNvme)[0].hashes, first[0].hashes);
  EXPECT_EQ(ledger->known(), 1u);
  Removed(11, TierKind::kDram);
  EXPECT_EQ(ledger->memory(), 0u);
}

TEST_F(LedgerTest, TheEnginesOwnHashesWin) {
  Start();
  const auto first =
      Stored(10, TierKind::kDram, Said({100, 101, 102, 103}, kTokens));
  EXPECT_THAT(first[0].hashes, ElementsAre(100, 101, 102, 103));
  EXPECT_EQ(first[0].block_size, 2);
  auto blocks = std::make_shared<ChunkBlocks>();
  blocks->hashes = {uint64_t(-5)};
  blocks->signed_hashes = true;
  const auto second = Stored(11, TierKind::kHbm, blocks);
  EXPECT_THAT(second[0].hashes, ElementsAre(-5));
  EXPECT_TRUE(second[0].signed_hashes);
  EXPECT_EQ(second[0].parent, 103);
  EXPECT_EQ(second[0].block_size, 0);  // nobody knows
  EXPECT_EQ(second[0].medium, "GPU");
}

TEST_F(LedgerTest, TokensOfKeyedChunksAreKeptBack) {
  Start();
  const auto plain = Stored(10, TierKind::kDram, Said({}, kTokens, true));
  EXPECT_THAT(plain[0].tokens, IsEmpty());
  EXPECT_THAT(plain[0].hashes, ElementsAre(Own(10)));
  const auto hashed = Stored(11, TierKind::kDram, Said({1, 2}, kTokens, true));
  EXPECT_THAT(hashed[0].tokens, IsEmpty());
  EXPECT_THAT(hashed[0].hashes, ElementsAre(1, 2));
  Start(1_MiB, true);
  EXPECT_EQ(Stored(20, TierKind::kDram, Said({}, kTokens, true))[0].tokens,
            kTokens);
}

TEST_F(LedgerTest, WhatDoesNotFitTheChunkIsNotBelieved) {
  Start();
  const auto told = Stored(10, TierKind::kDram, Said({1, 2, 3}, {1, 2, 3}));
  EXPECT_THAT(told[0].hashes, ElementsAre(Own(10)));
  EXPECT_THAT(told[0].tokens, IsEmpty());
  EXPECT_EQ(ledger->known(), 0u);
}

TEST_F(LedgerTest, WithoutMemoryChunksAreToldOfWithoutTokens) {
  Start(300);
  EXPECT_THAT(Stored(10, TierKind::kDram, Said({}, kTokens))[0].tokens,
              SizeIs(8));
  EXPECT_THAT(Stored(20, TierKind::kDram, Said({}, kTokens))[0].tokens,
              IsEmpty());
  EXPECT_EQ(ledger->untold(), 1u);
  Stored(20, TierKind::kNvme);
  Removed(10, TierKind::kDram);
  // There is room again; each copy goes under the name it was told under.
  Removed(20, TierKind::kDram);
  EXPECT_THAT(Stored(20, TierKind::kDram, Said({}, kTokens))[0].tokens,
              SizeIs(8));
  EXPECT_THAT(Removed(20, TierKind::kNvme)[0].hashes, ElementsAre(Own(20)));
  Removed(20, TierKind::kDram);
  EXPECT_EQ(view.Count("CPU") + view.Count("STORAGE"), 0u);
}

// A list that was made at any moment between events ends in the same view.
TEST_F(LedgerTest, ListsAndEventsOfTheSameTimeAgree) {
  const auto summary = [](uint64_t n, std::vector<TierKind> tiers) {
    ChunkSummary chunk;
    chunk.id = OracleChunkId(n);
    if (n % 10 != 0) chunk.parent = OracleChunkId(n - 1);
    chunk.tiers = std::move(tiers);
    return chunk;
  };
  const auto tiers_of = [](const std::set<TierKind>& set) {
    return std::vector<TierKind>(set.begin(), set.end());
  };
  for (size_t listed_at = 0; listed_at <= 8; ++listed_at) {
    Start();
    sequence = 0;
    view = {};
    Stored(10, TierKind::kDram, Said({}, kTokens));  // known before
    const Event events[] = {
        Of(EventType::kChunkStored, 11, TierKind::kDram, Said({}, kTokens)),
        Of(EventType::kChunkStored, 11, TierKind::kNvme),
        Of(EventType::kChunkRemoved, 10, TierKind::kDram),
        Of(EventType::kChunkStored, 10, TierKind::kDram, Said({1, 2}, {})),
        Of(EventType::kChunkStored, 12, TierKind::kNvme),
        Of(EventType::kChunkStored, 12, TierKind::kDram, Said({}, kTokens)),
        Of(EventType::kChunkRemoved, 11, TierKind::kDram),
        Of(EventType::kChunkRemoved, 12, TierKind::kNvme),
    };
    std::map<uint64_t, std::set<TierKind>> there = {{10, {TierKind::kDram}}};
    for (size_t i = 0; i < listed_at; ++i) {
      for (const uint64_t n : {10, 11, 12}) {
        if (events[i].chunk != OracleChunkId(n)) continue;
        if (events[i].type == EventType::kChunkStored) {
          there[n].insert(events[i].tier);
        } else {
          there[n].erase(events[i].tier);
        }
      }
    }
    ledger->BeginListing(out);
    for (const auto& [n, tiers] : there) {
      ledger->List(summary(n, tiers_of(tiers)), out);
    }
    ledger->EndListing(events[7].sequence);
    for (const Event& event : events) ledger->Apply(event, out);
    Told();
    // 10 and 12 in memory, two blocks each under whatever name; 11 on disk.
    EXPECT_EQ(view.Count("STORAGE"), 2u) << listed_at;
    EXPECT_TRUE(view.Has("STORAGE", Own(11))) << listed_at;
    EXPECT_EQ(view.Count("CPU"), 4u) << listed_at;
    // Taking all back leaves nothing.
    Removed(10, TierKind::kDram);
    Removed(11, TierKind::kNvme);
    Removed(12, TierKind::kDram);
    EXPECT_EQ(view.Count("CPU") + view.Count("STORAGE"), 0u) << listed_at;
    EXPECT_EQ(ledger->known(), 0u);
  }
}

// ---- The publisher ----

class PublisherTest : public testing::Test {
 protected:
  PublisherTest() { Build({}); }

  void Build(EngineOptions engine_options, uint64_t dram_bytes = 1_MiB) {
    publisher.reset();
    rig = std::make_unique<EngineRig>(engine_options, dram_bytes);
    space = rig->Open(SmallSpace());
    client = rig->Client();
    options.publish = absl::StrCat("ipc://", folder / "publish");
    options.replay = absl::StrCat("ipc://", folder / "replay");
    options.interval = absl::Milliseconds(1);
  }
  void Publish() {
    auto started =
        KvEventPublisher::Start(options, *rig->engine, Clock::Real());
    ASSERT_TRUE(started.ok()) << started.status();
    publisher = *std::move(started);
  }
  // Follows from the beginning.
  std::unique_ptr<Subscriber> Subscribe() {
    const uint64_t before = publisher->stats().subscriptions;
    auto subscriber =
        std::make_unique<Subscriber>(options.publish, options.replay);
    AwaitThat([&] { return publisher->stats().subscriptions > before; });
    subscriber->Replay(0);
    return subscriber;
  }
  void Save(uint64_t n, std::shared_ptr<const ChunkBlocks> blocks = nullptr) {
    SaveSpec spec;
    spec.id = OracleChunkId(n);
    spec.hints.blocks = std::move(blocks);
    const SaveResult saved = rig->Save(client, space, spec);
    ASSERT_TRUE(saved.Reached(SaveStage::kVolatile)) << saved.error();
  }
  static void Until(Subscriber& subscriber, std::function<bool()> done) {
    while (!done()) subscriber.Take(100);
  }
  static int64_t Own(uint64_t n) {
    return static_cast<int64_t>(OwnName(OracleChunkId(n)).bits);
  }
  // Until the router believes what the engine says.
  void ExpectAgrees(Subscriber& subscriber) {
    std::map<std::string, std::set<int64_t>> there;
    const auto all =
        rig->engine->List(TenantId{}, std::nullopt, std::nullopt, 1 << 20);
    for (const ChunkSummary& chunk : all) {
      for (const TierKind tier : chunk.tiers) {
        there[std::string(MediumOf(tier))].insert(
            static_cast<int64_t>(OwnName(chunk.id).bits));
      }
    }
    Until(subscriber, [&] {
      auto believed = subscriber.view.blocks;
      std::erase_if(believed,
                    [](const auto& one) { return one.second.empty(); });
      return believed == there;
    });
  }

  TestFolder folder;
  std::unique_ptr<EngineRig> rig;
  SpaceId space;
  ClientId client{};
  KvEventPublisher::Options options;
  std::unique_ptr<KvEventPublisher> publisher;
};

TEST_F(PublisherTest, FollowsAChunkFromTierToTierAndAway) {
  options.topic = "kv@pod@model";
  Publish();
  const auto router = Subscribe();
  ASSERT_FALSE(router->events.empty());
  EXPECT_EQ(router->events[0].type, "AllBlocksCleared");
  Save(1, Said({}, kTokens));
  Until(*router, [&] { return router->view.Count("STORAGE") == 2; });
  EXPECT_EQ(router->topic, "kv@pod@model");
  EXPECT_EQ(router->view.Count("CPU"), 2u);
  ASSERT_THAT(router->events, SizeIs(3));
  EXPECT_EQ(router->events[1].medium, "CPU");
  EXPECT_EQ(router->events[2].medium, "STORAGE");
  for (const size_t i : {1, 2}) {
    EXPECT_EQ(router->events[i].tokens, kTokens);
    EXPECT_EQ(router->events[i].block_size, 4);
    EXPECT_EQ(router->events[i].hashes.back(), Own(1));
  }
  ASSERT_TRUE(rig->engine->Evict(TenantId{}, OracleChunkId(1), false).ok());
  Until(*router, [&] {
    return router->view.Count("CPU") + router->view.Count("STORAGE") == 0;
  });
  EXPECT_EQ(publisher->stats().stored, 2u);
  EXPECT_EQ(publisher->stats().removed, 2u);
  EXPECT_EQ(router->gaps, 0u);
}

TEST_F(PublisherTest, EvictionTakesBackTheTierThatWasLeft) {
  Build({}, 64_KiB);  // less than eight chunks
  Publish();
  const auto router = Subscribe();
  for (uint64_t n = 1; n <= 40; ++n) Save(n);
  ExpectAgrees(*router);
  EXPECT_EQ(router->view.Count("STORAGE"), 40u);
  EXPECT_LT(router->view.Count("CPU"), 9u);
  EXPECT_FALSE(router->view.Has("CPU", Own(1)));
}

TEST_F(PublisherTest, AnAdvancedEpochTakesBackItsSpaceAlone) {
  const SpaceDescriptor other_model = [] {
    SpaceDescriptor descriptor = SmallSpace();
    descriptor.model_name = "other";
    return descriptor;
  }();
  Publish();
  const auto router = Subscribe();
  for (uint64_t n = 1; n <= 5; ++n) Save(n);
  const SpaceId first = std::exchange(space, rig->Open(other_model));
  for (uint64_t n = 11; n <= 13; ++n) Save(n);
  ExpectAgrees(*router);
  EXPECT_EQ(router->view.Count("CPU"), 8u);
  rig->engine->AdvanceEpoch(TenantId{}, first, [](StatusOr<Epoch>) {});
  rig->Run();
  ExpectAgrees(*router);
  EXPECT_EQ(router->view.Count("CPU"), 3u);
  EXPECT_TRUE(router->view.Has("STORAGE", Own(11)));
  EXPECT_EQ(publisher->stats().listings, 1u);  // that of the start
}

TEST_F(PublisherTest, OthersTenantsAreNotToldOf) {
  Publish();
  const auto router = Subscribe();
  const TenantId other{7};
  const SpaceId theirs = rig->Open(SmallSpace(), other);
  const ClientId them = rig->Client(other);
  SaveSpec spec;
  spec.id = OracleChunkId(99);
  spec.hints.blocks = Said({0xabcdef}, kTokens);
  ASSERT_TRUE(rig->Save(them, theirs, spec).Reached(SaveStage::kVolatile));
  Save(1);
  ExpectAgrees(*router);
  for (const RouterEvent& event : router->events) {
    for (const int64_t hash : event.hashes) EXPECT_EQ(hash, Own(1));
  }
}

TEST_F(PublisherTest, WhatThereWasBeforeIsToldAtTheStart) {
  for (uint64_t n = 1; n <= 9; ++n) Save(n);
  options.batch_events = 4;
  Publish();
  const auto router = Subscribe();
  ExpectAgrees(*router);
  EXPECT_EQ(router->view.Count("STORAGE"), 9u);
}

TEST_F(PublisherTest, RestartsAreSeenByTheNumbers) {
  Publish();
  const auto router = Subscribe();
  for (uint64_t n = 1; n <= 3; ++n) Save(n, Said({}, kTokens));
  Until(*router, [&] { return router->view.Count("STORAGE") == 6; });
  publisher.reset();
  rig->Crash();  // memory is empty, the disk is not
  Publish();
  client = rig->Client();
  // ZeroMQ connects again by itself, while it is looked at.
  AwaitThat([&] {
    router->Take();
    return publisher->stats().subscriptions == 1;
  });
  router->Replay(0);
  ExpectAgrees(*router);
  EXPECT_EQ(router->view.Count("CPU"), 0u);
  EXPECT_EQ(router->view.Count("STORAGE"),
            3u);  // nobody knows their tokens now
}

TEST_F(PublisherTest, ReplayBringsFromWhereItIsAsked) {
  options.batch_events = 1;
  Publish();
  const auto router = Subscribe();
  for (uint64_t n = 1; n <= 5; ++n) Save(n);
  ExpectAgrees(*router);
  const uint64_t end = *router->next();
  EXPECT_EQ(end, 11u);  // all cleared, 5 in memory, 5 on disk
  Subscriber late(options.publish, options.replay);
  EXPECT_EQ(late.Replay(end - 2), 2u);
  EXPECT_EQ(late.Replay(end), 0u);
  EXPECT_EQ(late.Replay(UINT64_MAX), 0u);
  // What makes no sense is not answered, and does no harm.
  late.Ask("");
  late.Ask("short");
  late.Ask(std::string(900, 'x'));
  EXPECT_EQ(late.Replay(0), end);
  ExpectAgrees(late);
  EXPECT_EQ(publisher->stats().replayed, end + 2 + 1);
}

TEST_F(PublisherTest, TooLateForTheReplayBringsAllAnew) {
  options.batch_events = 1;
  options.replay_batches = 4;
  options.resync_interval = absl::ZeroDuration();
  Publish();
  Subscriber early(options.publish);
  AwaitThat([&] { return publisher->stats().subscriptions == 1; });
  for (uint64_t n = 1; n <= 6; ++n) Save(n);
  AwaitThat([&] { return publisher->stats().batches == 13; });
  const auto router = Subscribe();  // from 0: it is not there any more
  EXPECT_LE(router->replayed, 4u);
  ExpectAgrees(*router);
  EXPECT_EQ(publisher->stats().listings, 2u);
  EXPECT_EQ(publisher->stats().outrun, 0u);
}

TEST_F(PublisherTest, ASlowSubscriberSeesTheGapAndHasItReplayed) {
  constexpr uint32_t kWide = 4096;
  Build({}, 32_MiB);
  SpaceDescriptor wide = SmallSpace();
  wide.block_tokens = 2;
  wide.chunk_tokens = kWide;
  wide.groups[0].k_head_bytes = wide.groups[0].v_head_bytes = 1;
  space = rig->Open(wide);
  options.batch_events = 1;
  options.subscriber_batches = 2;
  Publish();
  Subscriber slow(options.publish, options.replay, "", nullptr, 2);
  AwaitThat([&] { return publisher->stats().subscriptions == 1; });
  slow.Replay(0);
  // It reads nothing meanwhile: more than the sockets' buffers hold is lost.
  std::vector<uint64_t> hashes(kWide / 2);
  for (uint64_t n = 1; n <= 40; ++n) {
    for (size_t i = 0; i < hashes.size(); ++i) hashes[i] = n << 32 | i;
    Save(n, Said(hashes, std::vector<uint32_t>(kWide, 1u << 20)));
  }
  AwaitThat([&] { return publisher->stats().batches == 81; });
  uint64_t last = 1000;
  for (; slow.gaps == 0; ++last) {
    slow.Take(100);
    Save(last);
  }
  AwaitThat(
      [&] { return publisher->stats().batches == 81 + 2 * (last - 1000); });
  slow.Replay(*slow.next());
  EXPECT_GT(slow.replayed, 1u);
  EXPECT_EQ(slow.view.Count("CPU"), 40 * hashes.size() + last - 1000);
  EXPECT_EQ(slow.view.Count("STORAGE"), 40 * hashes.size() + last - 1000);
}

// The publisher is kept busy by asking it who may subscribe.
TEST_F(PublisherTest, OutrunByTheEngineItTellsAllAnew) {
  EngineOptions small;
  small.event_capacity = 16;
  Build(small);
  absl::Notification asked, answer;
  options.admits = [&](uid_t) {
    if (!asked.HasBeenNotified()) asked.Notify();
    answer.WaitForNotification();
    return true;
  };
  Publish();
  Subscriber router(options.publish, options.replay);
  asked.WaitForNotification();
  for (uint64_t n = 1; n <= 20; ++n) Save(n);
  ASSERT_TRUE(rig->engine->Evict(TenantId{}, OracleChunkId(3), false).ok());
  answer.Notify();
  AwaitThat([&] { return publisher->stats().subscriptions == 1; });
  router.Replay(0);
  ExpectAgrees(router);
  EXPECT_EQ(publisher->stats().outrun, 1u);
  EXPECT_EQ(publisher->stats().listings, 2u);
}

TEST_F(PublisherTest, TheUidDecidesWhoMaySubscribe) {
  std::atomic<uid_t> seen{0xffffffff};
  options.admits = [&](uid_t uid) {
    seen = uid;
    return false;
  };
  Publish();
  Subscriber router(options.publish, options.replay);
  AwaitThat([&] { return publisher->stats().refused >= 2; });  // both sockets
  EXPECT_EQ(seen, getuid());
  Save(1);
  AwaitThat([&] { return publisher->stats().stored == 2; });
  EXPECT_EQ(router.Take(), 0u);
  EXPECT_EQ(publisher->stats().subscriptions, 0u);
}

TEST_F(PublisherTest, SocketsHaveTheModeThatWasAsked) {
  options.ipc_mode = 0600;
  Publish();
  for (const char* name : {"publish", "replay"}) {
    struct stat info;
    ASSERT_EQ(stat((folder / name).c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0600u);
  }
}

TEST_F(PublisherTest, CurveAdmitsThoseWhoAreListed) {
  CurveClient listed, unlisted;
  char server_public[41], secret[41], text[41], hidden[41];
  ASSERT_EQ(zmq_curve_keypair(server_public, secret), 0);
  for (CurveClient* each : {&listed, &unlisted}) {
    ASSERT_EQ(zmq_curve_keypair(text, hidden), 0);
    *each = {server_public, text, hidden};
  }
  options.publish = "tcp://127.0.0.1:*";
  options.replay = "";
  options.curve = KvEventPublisher::Curve{secret, {listed.own_public}};
  Publish();
  const std::string endpoint = publisher->publish_endpoint();
  Subscriber other(endpoint, "", "", &unlisted);
  AwaitThat([&] { return publisher->stats().refused >= 1; });
  Subscriber plain(endpoint);  // does not even get so far as to be refused
  Subscriber router(endpoint, "", "", &listed);
  AwaitThat([&] { return publisher->stats().subscriptions == 1; });
  Save(1);
  Until(router, [&] { return router.view.Has("STORAGE", Own(1)); });
  EXPECT_EQ(other.Take(), 0u);
  EXPECT_EQ(plain.Take(), 0u);

  options.curve->secret = "short";
  const auto bad =
      KvEventPublisher::Start(options, *rig->engine, Clock::Real());
  EXPECT_EQ(bad.status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(PublisherTest, AnEndpointThatCannotBeSaysSo) {
  options.publish = absl::StrCat("ipc://", folder / "absent/publish");
  auto started = KvEventPublisher::Start(options, *rig->engine, Clock::Real());
  EXPECT_EQ(started.status().code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(started.status().message()), HasSubstr("absent"));
  options.publish = "nonsense";
  started = KvEventPublisher::Start(options, *rig->engine, Clock::Real());
  EXPECT_THAT(std::string(started.status().message()), HasSubstr("nonsense"));
}

}  // namespace
}  // namespace larder::kv_events
