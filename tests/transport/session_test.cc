#include "transport/local/session.h"

#include <dirent.h>

#include <algorithm>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/transport/session_harness.h"

namespace larder {
namespace {

using ::testing::HasSubstr;
using wire::Type;

constexpr int kStagingSeals = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;

class SessionTest : public ::testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(h_.Open()); }

  uint32_t Share(uint64_t bytes) {
    EXPECT_TRUE(h_.Give(
        PacketWriter(Type::kShareStaging, 50).Body(wire::ShareStaging{bytes}),
        StagingFd(bytes, kStagingSeals)));
    return h_.Reply<wire::ShareStagingReply>().region;
  }
  uint64_t Reserve() {
    EXPECT_TRUE(
        h_.Give(PacketWriter(Type::kReserve, 60)
                    .Body(wire::Reserve{.space = 1, .record_bytes = 4096})));
    return h_.Reply<wire::ReserveReply>().reservation;
  }
  void Commit(uint64_t request, uint64_t reservation, uint32_t region,
              uint64_t offset, uint64_t bytes, bool durable = false) {
    EXPECT_TRUE(h_.Give(PacketWriter(Type::kCommit, request)
                            .Body(wire::Commit{.reservation = reservation,
                                               .region = region,
                                               .want_durable = uint8_t{durable},
                                               .offset = offset,
                                               .bytes = bytes})));
    EXPECT_TRUE(h_.sink->Take().empty());  // answered by completions
  }

  SessionHarness h_;
};

// ---- The handshake ----

TEST(SessionHello, OtherVersions) {
  struct Case {
    uint16_t major, minor;
    bool fits;
  };
  for (const Case c : {Case{wire::kMajor, wire::kMinor, true},
                       {wire::kMajor, wire::kMinor - 1, true},
                       {wire::kMajor, wire::kMinor + 1, true},
                       {wire::kMajor, wire::kMinor + 2, false},
                       {wire::kMajor, 65535, false},
                       {wire::kMajor + 1, wire::kMinor, false},
                       {65535, 0, false}}) {
    SessionHarness h;
    const bool kept =
        h.Give(PacketWriter(Type::kHello, 1)
                   .Body(wire::Hello{.major = c.major, .minor = c.minor}));
    EXPECT_EQ(kept, c.fits);
    const auto reply = h.Reply<wire::HelloReply>();
    if (c.fits) {
      EXPECT_EQ(reply.head.status, 0);
      EXPECT_EQ(reply.minor, std::min(c.minor, wire::kMinor));
      EXPECT_EQ(reply.ring_entries, wire::kRingEntries);
      continue;
    }
    EXPECT_EQ(reply.head.status,
              static_cast<int>(absl::StatusCode::kFailedPrecondition));
    const auto view = PacketView::Parse(h.last.packet);
    const std::string text(reinterpret_cast<const char*>(view->arrays().data()),
                           view->arrays().size());
    EXPECT_THAT(text, HasSubstr(absl::StrCat(c.major, ".", c.minor)));
    EXPECT_THAT(text, HasSubstr(absl::StrCat(wire::kMajor, ".", wire::kMinor)));
    EXPECT_EQ(h.engine().clients(), 0U);
  }
}

// A client of the next minor version sends longer bodies, one of the previous
// version shorter ones.
TEST(SessionHello, LongerAndShorterBodies) {
  SessionHarness h;
  std::byte longer[sizeof(wire::Hello) + 64] = {};
  const wire::Hello hello{.minor = wire::kMinor + 1};
  std::memcpy(longer, &hello, sizeof hello);
  std::fill(longer + sizeof hello, longer + sizeof longer, std::byte{0xee});
  ASSERT_TRUE(
      h.Give(PacketWriter(Type::kHello, 1).BodyBytes(longer, sizeof longer)));
  EXPECT_EQ(h.Reply<wire::HelloReply>().head.status, 0);
  ASSERT_TRUE(h.OpenSpace());
  std::byte list[sizeof(wire::List) + 8] = {std::byte{1}};
  ASSERT_TRUE(
      h.Give(PacketWriter(Type::kList, 3).BodyBytes(list, sizeof list)));
  EXPECT_EQ(h.Reply<wire::ListReply>().chunk_count, wire::kMaxListed);

  SessionHarness old;
  const wire::Hello old_hello{.minor = wire::kMinor - 1};
  ASSERT_TRUE(
      old.Give(PacketWriter(Type::kHello, 1).BodyBytes(&old_hello, 72)));
  EXPECT_EQ(old.Reply<wire::HelloReply>().head.status, 0);
  ASSERT_TRUE(old.OpenSpace());
  // A hold body that ends after the count of ids.
  const auto ids = SomeIds(2);
  const wire::Hold hold{.space = 1, .id_count = 2};
  ASSERT_TRUE(old.Give(
      PacketWriter(Type::kHold, 3).BodyBytes(&hold, 8).Append(ids.data(), 64)));
  auto sent = old.sink->Take();
  ASSERT_EQ(sent.size(), 2U);  // the slab, then the reply
  EXPECT_EQ(
      PacketView::Parse(sent[1].packet)->Body<wire::HoldReply>().chunk_count,
      2U);
}

TEST(SessionHello, ComesFirstAndOnce) {
  SessionHarness h;
  EXPECT_FALSE(h.Give(PacketWriter(Type::kPing, 1)));
  EXPECT_THAT(h.sink->reason(), HasSubstr("no hello"));
  EXPECT_FALSE(h.Give(PacketWriter(Type::kHello, 1).Body(wire::Hello{})));
  SessionHarness again;
  ASSERT_TRUE(again.Open());
  EXPECT_FALSE(again.Give(PacketWriter(Type::kHello, 9).Body(wire::Hello{})));
}

TEST(SessionHello, TenantComesFromPeerAndToken) {
  SessionOptions options;
  std::string seen;
  options.tenant_of = [&](const PeerIdentity& peer) -> StatusOr<TenantId> {
    seen = absl::StrCat(peer.uid, "/", peer.gid, "/", peer.pid, "/",
                        std::string(peer.token), "/",
                        std::string(peer.client_name));
    if (peer.token != std::string_view("sesame")) {
      return absl::PermissionDeniedError("not a known token");
    }
    return TenantId{42};
  };
  SessionHarness h(options);
  wire::Hello hello;
  std::memcpy(hello.token, "sesame", 6);
  std::memcpy(hello.client_name, "a\nb", 3);
  ASSERT_TRUE(h.Give(PacketWriter(Type::kHello, 1).Body(hello)));
  EXPECT_EQ(h.Reply<wire::HelloReply>().tenant, 42U);
  EXPECT_EQ(seen, "7/8/9/sesame/a?b");

  SessionHarness refused(options);
  EXPECT_FALSE(refused.Give(PacketWriter(Type::kHello, 1).Body(wire::Hello{})));
  EXPECT_EQ(refused.ReplyCode(), absl::StatusCode::kPermissionDenied);
}

// ---- Packets that are not well-formed ----

std::vector<PacketWriter> OneOfEach() {
  const auto ids = SomeIds(3);
  const std::string space = EncodeSpace(SmallSpace(2));
  std::vector<PacketWriter> packets;
  const auto with_ids = [&](Type type, const auto& body) {
    packets.push_back(PacketWriter(type, 100).Body(body).Append(
        ids.data(), ids.size() * sizeof(ChunkId)));
  };
  with_ids(Type::kMatch, wire::Match{.space = 1, .id_count = 3});
  with_ids(Type::kLookup, wire::Lookup{.space = 1, .id_count = 3});
  with_ids(Type::kPrefetch, wire::Lookup{.space = 1, .id_count = 3});
  with_ids(Type::kHold, wire::Hold{.space = 1, .id_count = 3});
  const GroupMask groups[] = {1, 1, 1};
  packets.push_back(PacketWriter(Type::kAwait, 100)
                        .Body(wire::Await{.space = 1, .id_count = 3})
                        .Append(ids.data(), ids.size() * sizeof(ChunkId))
                        .Append(groups, sizeof groups));
  with_ids(Type::kDelete, wire::Delete{.space = 1, .id_count = 3});
  packets.push_back(
      PacketWriter(Type::kOpenSpace, 100)
          .Body(wire::OpenSpace{static_cast<uint32_t>(space.size()), 0})
          .Append(space.data(), space.size()));
  packets.push_back(PacketWriter(Type::kAttachHold, 100).Body(wire::HoldRef{}));
  packets.push_back(PacketWriter(Type::kRenewHold, 100).Body(wire::HoldRef{}));
  packets.push_back(
      PacketWriter(Type::kReleaseHold, 100).Body(wire::HoldRef{}));
  packets.push_back(
      PacketWriter(Type::kReportCorrupt, 100).Body(wire::ReportCorrupt{}));
  packets.push_back(PacketWriter(Type::kReserve, 100)
                        .Body(wire::Reserve{.space = 1, .record_bytes = 1}));
  packets.push_back(PacketWriter(Type::kCommit, 100).Body(wire::Commit{}));
  packets.push_back(PacketWriter(Type::kAbort, 100).Body(wire::Abort{}));
  packets.push_back(
      PacketWriter(Type::kAdvanceEpoch, 100).Body(wire::SpaceRef{.space = 1}));
  packets.push_back(
      PacketWriter(Type::kList, 100).Body(wire::List{.space = 1}));
  packets.push_back(PacketWriter(Type::kStats, 100));
  packets.push_back(
      PacketWriter(Type::kUnmappedSlab, 100).Body(wire::SlabNotice{}));
  packets.push_back(PacketWriter(Type::kPing, 100));
  packets.push_back(
      PacketWriter(Type::kWhyMiss, 100).Body(wire::WhyMiss{.space = 1}));
  packets.push_back(PacketWriter(Type::kCredit, 100));
  packets.push_back(
      PacketWriter(Type::kUnshareStaging, 100).Body(wire::UnshareStaging{}));
  packets.push_back(PacketWriter(Type{99}, 100));
  return packets;
}

TEST(SessionPackets, TruncatedAtEveryLength) {
  for (PacketWriter& writer : OneOfEach()) {
    const std::vector<std::byte> whole = writer.Bytes();
    for (size_t size = 0; size < whole.size(); ++size) {
      SessionHarness h;
      ASSERT_TRUE(h.Open());
      EXPECT_FALSE(h.Give({whole.begin(), whole.begin() + size}))
          << "type " << static_cast<int>(whole[4]) << " cut to " << size;
      EXPECT_THAT(h.sink->reason(), HasSubstr("broke the protocol"));
    }
    SessionHarness h;
    ASSERT_TRUE(h.Open());
    EXPECT_TRUE(h.Give(whole));
  }
}

TEST(SessionPackets, BytesTooMany) {
  for (PacketWriter& writer : OneOfEach()) {
    std::vector<std::byte> packet = writer.Bytes();
    if (static_cast<int>(packet[4]) == 99) continue;
    packet.push_back(std::byte{0});
    SessionHarness h;
    ASSERT_TRUE(h.Open());
    EXPECT_FALSE(h.Give(packet)) << static_cast<int>(packet[4]);
  }
}

TEST_F(SessionTest, UnknownTypeIsAnswered) {
  EXPECT_TRUE(h_.Give(PacketWriter(Type{77}, 5)));
  EXPECT_EQ(h_.ReplyCode(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(h_.Give(PacketWriter(Type::kReply, 6)));
  EXPECT_EQ(h_.ReplyCode(), absl::StatusCode::kInvalidArgument);
}

TEST_F(SessionTest, AbsurdCounts) {
  for (const uint32_t count : {4U, 1025U, 0x08000000U, UINT32_MAX}) {
    SessionHarness h;
    ASSERT_TRUE(h.Open());
    const auto ids = SomeIds(3);
    EXPECT_FALSE(h.Give(PacketWriter(Type::kMatch, 3)
                            .Body(wire::Match{.space = 1, .id_count = count})
                            .Append(ids.data(), 96)));
  }
  const auto ids = SomeIds(1025);
  EXPECT_FALSE(h_.Give(SessionHarness::Hold(3, ids)));
}

TEST_F(SessionTest, RequestZeroAndWrongMagic) {
  EXPECT_FALSE(h_.Give(PacketWriter(Type::kPing, 0)));
  SessionHarness h;
  ASSERT_TRUE(h.Open());
  auto packet = PacketWriter(Type::kPing, 3).Bytes();
  packet[1] = std::byte{0};
  EXPECT_FALSE(h.Give(packet));
}

TEST_F(SessionTest, DescriptorsWhereNoneBelong) {
  EXPECT_FALSE(h_.Give(PacketWriter(Type::kPing, 3), StagingFd(4096, 0)));
}

TEST_F(SessionTest, UnknownSpacesAndStarts) {
  const auto ids = SomeIds(2);
  for (const uint32_t space : {0U, 2U, UINT32_MAX}) {
    EXPECT_TRUE(h_.Give(PacketWriter(Type::kMatch, 3)
                            .Body(wire::Match{.space = space, .id_count = 2})
                            .Append(ids.data(), 64)));
    EXPECT_EQ(h_.ReplyCode(), absl::StatusCode::kNotFound);
  }
  EXPECT_TRUE(
      h_.Give(PacketWriter(Type::kMatch, 3)
                  .Body(wire::Match{.space = 1, .id_count = 2, .start = 3})
                  .Append(ids.data(), 64)));
  EXPECT_EQ(h_.ReplyCode(), absl::StatusCode::kInvalidArgument);
}

// ---- Answers ----

TEST_F(SessionTest, Match) {
  const auto ids = SomeIds(5);
  ASSERT_TRUE(
      h_.Give(PacketWriter(Type::kMatch, 3)
                  .Body(wire::Match{.space = 1, .id_count = 5, .start = 2})
                  .Append(ids.data(), 160)));
  const auto reply = h_.Reply<wire::MatchReply>();
  EXPECT_EQ(reply.usable, 3U);
  EXPECT_EQ(reply.group_count, 1U);
  EXPECT_EQ(reply.state_count, 3U);
  ArrayReader arrays(PacketView::Parse(h_.last.packet)->arrays());
  EXPECT_EQ((*arrays.Take<uint32_t>(1))[0], 3U);
  EXPECT_EQ((*arrays.Take<uint8_t>(3))[2], Raw(ChunkState::kReady));
  EXPECT_EQ(arrays.rest().size(), reply.head.detail_bytes);
}

// What other nodes have is waited for by who wants to wait.
TEST_F(SessionTest, MatchAcrossNodes) {
  const auto ids = SomeIds(3);
  FakeEngine::Behaviour behaviour;
  behaviour.elsewhere = true;
  h_.engine().Set(behaviour);
  const auto match = [&](uint64_t wait_us) {
    return h_.Give(
        PacketWriter(Type::kMatch, 3)
            .Body(wire::Match{.space = 1, .id_count = 3, .wait_us = wait_us})
            .Append(ids.data(), 96));
  };
  ASSERT_TRUE(match(0));
  EXPECT_EQ(h_.Reply<wire::MatchReply>().usable, 1U);
  ASSERT_TRUE(match(1000));
  EXPECT_TRUE(h_.sink->Take().empty());
  std::vector<Task> waiting = h_.engine().TakeLocations();
  ASSERT_EQ(waiting.size(), 2U);  // who does not wait has them asked, too
  for (Task& task : waiting) std::move(task)();
  EXPECT_EQ(h_.Reply<wire::MatchReply>().usable, 3U);
  ArrayReader arrays(PacketView::Parse(h_.last.packet)->arrays());
  ASSERT_TRUE(arrays.Take<uint32_t>(1).ok());
  EXPECT_EQ((*arrays.Take<uint8_t>(3))[2], Raw(ChunkState::kPeer));
}

TEST_F(SessionTest, Await) {
  const auto ids = SomeIds(2);
  const GroupMask groups[] = {1, 3};
  const auto await = [&](uint32_t count, size_t bytes) {
    return h_.Give(PacketWriter(Type::kAwait, 3)
                       .Body(wire::Await{.space = 1,
                                         .id_count = count,
                                         .layers = 2,
                                         .wait_us = UINT64_MAX})
                       .Append(ids.data(), 64)
                       .Append(groups, bytes));
  };
  ASSERT_TRUE(await(2, 4));
  EXPECT_EQ(h_.Reply<wire::AwaitReply>().layers_count, 2U);
  ArrayReader arrays(PacketView::Parse(h_.last.packet)->arrays());
  const auto layers = arrays.Take<uint32_t>(2);
  EXPECT_EQ((*layers)[0], 2U);
  EXPECT_EQ((*layers)[1], UINT32_MAX);
  // What nobody waits for any more is not kept for ever.
  EXPECT_EQ(h_.engine().awaited_until(), h_.clock.Now() + absl::Seconds(10));
  EXPECT_FALSE(await(2, 2));
}

TEST(SessionVersions, ToOlderClientsAPeerIsASlowerTier) {
  SessionHarness old;
  ASSERT_TRUE(old.Give(PacketWriter(Type::kHello, 1)
                           .Body(wire::Hello{.minor = wire::kMinor - 1})));
  EXPECT_EQ(old.Reply<wire::HelloReply>().head.status, 0);
  ASSERT_TRUE(old.OpenSpace());
  FakeEngine::Behaviour behaviour;
  behaviour.state = ChunkState::kPeer;
  old.engine().Set(behaviour);
  const auto ids = SomeIds(3);
  ASSERT_TRUE(old.Give(PacketWriter(Type::kMatch, 3)
                           .Body(wire::Match{.space = 1, .id_count = 3})
                           .Append(ids.data(), 96)));
  EXPECT_EQ(old.Reply<wire::MatchReply>().usable, 3U);
  ArrayReader arrays(PacketView::Parse(old.last.packet)->arrays());
  ASSERT_TRUE(arrays.Take<uint32_t>(1).ok());
  EXPECT_EQ((*arrays.Take<uint8_t>(3))[0], Raw(ChunkState::kDurable));
}

TEST_F(SessionTest, LongTextsAreCut) {
  ASSERT_TRUE(
      h_.Give(PacketWriter(Type::kWhyMiss, 3).Body(wire::WhyMiss{.space = 1})));
  EXPECT_EQ(h_.Reply<wire::WhyMissReply>().head.detail_bytes,
            wire::kMaxDetailBytes);
}

TEST_F(SessionTest, StatsMayBeKeptBack) {
  EXPECT_TRUE(h_.Give(PacketWriter(Type::kStats, 3)));
  EXPECT_EQ(h_.ReplyCode(), absl::StatusCode::kOk);
  SessionOptions options;
  options.share_stats = false;
  SessionHarness h(options);
  ASSERT_TRUE(h.Open());
  EXPECT_TRUE(h.Give(PacketWriter(Type::kStats, 3)));
  EXPECT_EQ(h.ReplyCode(), absl::StatusCode::kPermissionDenied);
}

TEST(SessionSpaces, LimitAndSameHandle) {
  SessionOptions options;
  options.max_spaces = 2;
  SessionHarness h(options);
  ASSERT_TRUE(h.Open());
  ASSERT_TRUE(h.OpenSpace());  // again: handle 1
  const auto open = [&](uint8_t salt) {
    const std::string space = EncodeSpace(SmallSpace(salt));
    EXPECT_TRUE(h.Give(
        PacketWriter(Type::kOpenSpace, 3)
            .Body(wire::OpenSpace{static_cast<uint32_t>(space.size()), 0})
            .Append(space.data(), space.size())));
    return h.Reply<wire::OpenSpaceReply>();
  };
  EXPECT_EQ(open(2).handle, 2U);
  EXPECT_EQ(open(3).head.status,
            static_cast<int>(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(open(2).handle, 2U);
}

// ---- Holds and slabs ----

TEST_F(SessionTest, SlabGoesOnceAndBeforeTheReply) {
  const auto ids = SomeIds(4);
  ASSERT_TRUE(h_.Give(SessionHarness::Hold(3, ids)));
  auto sent = h_.sink->Take();
  ASSERT_EQ(sent.size(), 2U);
  const auto slab = PacketView::Parse(sent[0].packet);
  EXPECT_EQ(slab->header().type, Type::kSlab);
  EXPECT_EQ(slab->Body<wire::SlabNotice>().bytes, 64_KiB);
  EXPECT_EQ(sent[0].fds.size(), 1U);
  const auto reply = PacketView::Parse(sent[1].packet);
  const auto hold = reply->Body<wire::HoldReply>();
  EXPECT_EQ(hold.chunk_count, 4U);
  EXPECT_EQ(hold.part_count, 4U);
  EXPECT_EQ(hold.end_index, 4U);
  ArrayReader arrays(reply->arrays());
  const auto chunks = *arrays.Take<wire::HeldChunk>(4);
  const auto parts = *arrays.Take<wire::HeldPart>(4);
  EXPECT_EQ(chunks[2].part_begin, 2U);
  EXPECT_EQ(parts[2].offset, 2 * kPageBytes);
  EXPECT_TRUE(arrays.rest().empty());

  ASSERT_TRUE(h_.Give(SessionHarness::Hold(4, ids)));
  EXPECT_EQ(h_.sink->Take().size(), 1U);  // the slab is known
}

TEST_F(SessionTest, AnotherTenantsSlabIsNeverSent) {
  const uint32_t foreign = h_.dram.AddSlab(TenantId{5}, 64_KiB);
  FakeEngine::Behaviour behaviour;
  behaviour.slab = foreign;
  h_.engine().Set(behaviour);
  ASSERT_TRUE(h_.Give(SessionHarness::Hold(3, SomeIds(1))));
  const auto sent = h_.TakeOne();
  const auto reply = PacketView::Parse(sent.packet);
  EXPECT_EQ(reply->Body<wire::HoldReply>().part_count, 0U);
  ArrayReader arrays(reply->arrays());
  EXPECT_EQ((*arrays.Take<wire::HeldChunk>(1))[0].state,
            Raw(ChunkState::kMiss));
}

TEST_F(SessionTest, AnswersThatTakeManyPackets) {
  FakeEngine::Behaviour behaviour;
  behaviour.parts_per_chunk = 8;
  h_.engine().Set(behaviour);
  const auto ids = SomeIds(1000);
  ASSERT_TRUE(h_.Give(SessionHarness::Hold(3, ids)));
  auto sent = h_.sink->Take();
  ASSERT_EQ(sent.size(), 2U);
  auto reply = PacketView::Parse(sent[1].packet)->Body<wire::HoldReply>();
  const uint64_t hold = reply.hold;
  uint32_t next = 0;
  uint32_t packets = 1;
  for (;;) {
    EXPECT_EQ(reply.first_index, next);
    EXPECT_EQ(reply.end_index, 1000U);
    EXPECT_EQ(reply.part_count, 8 * reply.chunk_count);
    EXPECT_GT(reply.chunk_count, 0U);
    next += reply.chunk_count;
    if (next == 1000) break;
    // Not from elsewhere.
    ASSERT_TRUE(h_.Give(
        PacketWriter(Type::kAttachHold, 4)
            .Body(wire::HoldRef{.hold = hold, .first_index = next + 1})));
    EXPECT_EQ(h_.ReplyCode(), absl::StatusCode::kInvalidArgument);
    ASSERT_TRUE(
        h_.Give(PacketWriter(Type::kAttachHold, 5)
                    .Body(wire::HoldRef{.hold = hold, .first_index = next})));
    reply = h_.Reply<wire::HoldReply>();
    ++packets;
  }
  EXPECT_EQ(packets, 7U);
  // Extended: indices go on.
  ASSERT_TRUE(h_.Give(SessionHarness::Hold(6, SomeIds(2), hold)));
  reply = h_.Reply<wire::HoldReply>();
  EXPECT_EQ(reply.first_index, 1000U);
  EXPECT_EQ(reply.end_index, 1002U);
}

TEST_F(SessionTest, AChunkOfMorePartsThanAPacketIsAMiss) {
  FakeEngine::Behaviour behaviour;
  behaviour.parts_per_chunk = 2000;
  h_.engine().Set(behaviour);
  ASSERT_TRUE(h_.Give(SessionHarness::Hold(3, SomeIds(2))));
  const auto reply = h_.Reply<wire::HoldReply>();
  EXPECT_EQ(reply.chunk_count, 2U);
  EXPECT_EQ(reply.part_count, 0U);
}

TEST(SessionHolds, TenThousand) {
  SessionOptions options;
  options.max_holds = 9'999;
  SessionHarness h(options);
  ASSERT_TRUE(h.Open());
  const auto ids = SomeIds(1);
  std::vector<uint64_t> holds;
  for (int i = 0; i < 9'999; ++i) {
    ASSERT_TRUE(h.Give(SessionHarness::Hold(3, ids)));
    auto sent = h.sink->Take();
    holds.push_back(
        PacketView::Parse(sent.back().packet)->Body<wire::HoldReply>().hold);
  }
  ASSERT_TRUE(h.Give(SessionHarness::Hold(4, ids)));
  EXPECT_EQ(h.ReplyCode(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(h.engine().holds(), 9'999U);
  for (int i = 0; i < 100; ++i) {
    ASSERT_TRUE(h.Give(PacketWriter(Type::kReleaseHold, 5)
                           .Body(wire::HoldRef{.hold = holds[i]})));
  }
  EXPECT_EQ(h.engine().holds(), 9'899U);
  h.session.reset();
  EXPECT_EQ(h.engine().holds(), 0U);
  EXPECT_EQ(h.engine().clients(), 0U);
}

TEST(SessionHolds, ForeignHoldsAndAttaching) {
  SessionOptions options;
  options.tenant_of = [](const PeerIdentity& peer) {
    return TenantId{peer.token.empty() ? 0U : 1U};
  };
  SessionHarness owner(options);
  ASSERT_TRUE(owner.Open());
  ASSERT_TRUE(owner.Give(SessionHarness::Hold(3, SomeIds(3))));
  auto sent = owner.sink->Take();
  const uint64_t hold =
      PacketView::Parse(sent.back().packet)->Body<wire::HoldReply>().hold;

  const auto probe = [&](SessionHarness& h) {
    for (const Type type : {Type::kRenewHold, Type::kReleaseHold}) {
      ASSERT_TRUE(
          h.Give(PacketWriter(type, 3).Body(wire::HoldRef{.hold = hold})));
      if (type == Type::kRenewHold) {
        EXPECT_EQ(h.ReplyCode(), absl::StatusCode::kNotFound);
      }
    }
    ASSERT_TRUE(h.Give(SessionHarness::Hold(4, SomeIds(1), hold)));
    EXPECT_EQ(h.ReplyCode(), absl::StatusCode::kNotFound);
    ASSERT_TRUE(
        h.Give(PacketWriter(Type::kAttachHold, 5)
                   .Body(wire::HoldRef{.hold = hold, .first_index = 1})));
    EXPECT_EQ(h.ReplyCode(), absl::StatusCode::kNotFound);
  };
  SessionHarness worker({}, owner.hub, &owner.engine());
  ASSERT_TRUE(worker.Open());
  probe(worker);
  ASSERT_TRUE(worker.Give(
      PacketWriter(Type::kAttachHold, 6).Body(wire::HoldRef{.hold = hold})));
  auto attached = worker.sink->Take();
  ASSERT_EQ(attached.size(), 2U);
  EXPECT_EQ(PacketView::Parse(attached[1].packet)
                ->Body<wire::HoldReply>()
                .chunk_count,
            3U);
  ASSERT_TRUE(worker.Give(
      PacketWriter(Type::kAttachHold, 7).Body(wire::HoldRef{.hold = hold})));
  EXPECT_EQ(worker.ReplyCode(), absl::StatusCode::kAlreadyExists);

  SessionHarness stranger({}, owner.hub, &owner.engine());
  wire::Hello hello;
  hello.token[0] = 'x';
  ASSERT_TRUE(stranger.Give(PacketWriter(Type::kHello, 1).Body(hello)));
  stranger.sink->Take();
  ASSERT_TRUE(stranger.OpenSpace());
  probe(stranger);
  ASSERT_TRUE(stranger.Give(
      PacketWriter(Type::kAttachHold, 6).Body(wire::HoldRef{.hold = hold})));
  EXPECT_EQ(stranger.ReplyCode(), absl::StatusCode::kNotFound);

  owner.session.reset();
  EXPECT_EQ(worker.engine().holds(), 1U);  // the worker's lives on
  worker.session.reset();
  stranger.session.reset();
}

TEST_F(SessionTest, PromotionsReportAfterTheReply) {
  FakeEngine::Behaviour behaviour;
  behaviour.state = ChunkState::kPending;
  h_.engine().Set(behaviour);
  ASSERT_TRUE(h_.Give(SessionHarness::Hold(3, SomeIds(3))));
  auto sent = h_.sink->Take();
  const uint64_t hold =
      PacketView::Parse(sent.back().packet)->Body<wire::HoldReply>().hold;
  auto pending = h_.engine().TakePending();
  ASSERT_EQ(pending.size(), 3U);
  (*pending[1].progress)(1, MissReason::kNone);
  (*pending[0].progress)(0, MissReason::kDeadline);
  ASSERT_EQ(h_.produced(), 2U);
  EXPECT_EQ(h_.entry(0).kind, wire::Completion::kHoldChunk);
  EXPECT_EQ(h_.entry(0).request, hold);
  EXPECT_EQ(h_.entry(0).value, 1U);
  EXPECT_EQ(h_.entry(1).status, Raw(MissReason::kDeadline));
  char bell;
  EXPECT_EQ(read(h_.bell.get(), &bell, 1), 1);
  ASSERT_TRUE(h_.Give(
      PacketWriter(Type::kReleaseHold, 5).Body(wire::HoldRef{.hold = hold})));
  (*pending[2].progress)(2, MissReason::kNone);
  EXPECT_EQ(h_.produced(), 2U);
}

TEST_F(SessionTest, CreditsRunOutAndComeBack) {
  FakeEngine::Behaviour behaviour;
  behaviour.state = ChunkState::kPending;
  h_.engine().Set(behaviour);
  const auto ids = SomeIds(1024);
  for (int i = 0; i < 4; ++i) {
    ASSERT_TRUE(h_.Give(SessionHarness::Hold(3, ids)));
    h_.sink->Take();
  }
  ASSERT_TRUE(h_.Give(SessionHarness::Hold(4, SomeIds(1))));
  EXPECT_EQ(h_.ReplyCode(), absl::StatusCode::kResourceExhausted);
  ASSERT_TRUE(h_.Give(PacketWriter(Type::kReserve, 5)
                          .Body(wire::Reserve{.space = 1, .record_bytes = 1})));
  EXPECT_EQ(h_.ReplyCode(), absl::StatusCode::kResourceExhausted);
  for (auto& chunk : h_.engine().TakePending()) {
    (*chunk.progress)(chunk.index, MissReason::kNone);
  }
  EXPECT_EQ(h_.produced(), 4096U);
  // Written is not read: still no room.
  ASSERT_TRUE(h_.Give(SessionHarness::Hold(6, SomeIds(1))));
  EXPECT_EQ(h_.ReplyCode(), absl::StatusCode::kResourceExhausted);
  ASSERT_TRUE(h_.Give(SessionHarness::Hold(7, SomeIds(5), 0, 4096)));
  EXPECT_EQ(h_.ReplyCode(), absl::StatusCode::kOk);
  // Old news is ignored, impossible news ends the connection.
  EXPECT_TRUE(h_.Give(PacketWriter(Type::kCredit, 8, 4000)));
  EXPECT_TRUE(h_.Give(PacketWriter(Type::kCredit, 8, 4096)));
  EXPECT_FALSE(h_.Give(PacketWriter(Type::kCredit, 8, 4097)));
}

TEST(SessionCompletions, RevocationsWaitForRoomButNotForEver) {
  SessionOptions options;
  options.max_completion_backlog = 10;
  SessionHarness h(options);
  ASSERT_TRUE(h.Open());
  ASSERT_TRUE(h.Give(SessionHarness::Hold(3, SomeIds(1))));
  const uint64_t hold = PacketView::Parse(h.sink->Take().back().packet)
                            ->Body<wire::HoldReply>()
                            .hold;
  constexpr uint64_t kDirect = wire::kRingEntries * 3 / 4;
  for (uint64_t i = 0; i < kDirect + 10; ++i) {
    h.engine().Revoke(HoldId{hold}, MissReason::kEpoch);
  }
  EXPECT_EQ(h.produced(), kDirect);
  EXPECT_EQ(h.sink->reason(), "");
  EXPECT_TRUE(h.Give(PacketWriter(Type::kCredit, 4, 100)));
  EXPECT_EQ(h.produced(), kDirect + 10);
  EXPECT_EQ(h.entry(kDirect + 9).kind, wire::Completion::kHoldRevoked);
  EXPECT_EQ(h.entry(kDirect + 9).value, Raw(MissReason::kEpoch));
  for (int i = 0; i < 101; ++i) {
    h.engine().Revoke(HoldId{hold}, MissReason::kEpoch);
  }
  EXPECT_THAT(h.sink->reason(), HasSubstr("does not read its completions"));
}

TEST(SessionHub, EpochsAndDeletionsAreToldToOthers) {
  SessionHarness a;
  ASSERT_TRUE(a.Open());
  SessionHarness b({}, a.hub, &a.engine());
  ASSERT_TRUE(b.Open());
  ASSERT_TRUE(a.Give(
      PacketWriter(Type::kAdvanceEpoch, 3).Body(wire::SpaceRef{.space = 1})));
  EXPECT_EQ(a.Reply<wire::EpochReply>().epoch, 2U);
  ASSERT_EQ(b.produced(), 1U);
  EXPECT_EQ(b.entry(0).kind, wire::Completion::kEpochAdvanced);
  EXPECT_EQ(b.entry(0).request, 1U);
  EXPECT_EQ(b.entry(0).value, 2U);
  const auto ids = SomeIds(2);
  ASSERT_TRUE(a.Give(PacketWriter(Type::kDelete, 4)
                         .Body(wire::Delete{.space = 1, .id_count = 2})
                         .Append(ids.data(), 64)));
  EXPECT_EQ(a.Reply<wire::DeleteReply>().deleted, 2U);
  EXPECT_EQ(b.entry(1).kind, wire::Completion::kLookupChanged);
  b.session.reset();
  // The answer of an epoch that takes longer than the session.
  FakeEngine::Behaviour behaviour;
  behaviour.finish_epochs = false;
  a.engine().Set(behaviour);
  for (int i = 0; i < 65; ++i) {
    ASSERT_TRUE(a.Give(
        PacketWriter(Type::kAdvanceEpoch, 3).Body(wire::SpaceRef{.space = 1})));
  }
  EXPECT_EQ(a.ReplyCode(), absl::StatusCode::kResourceExhausted);
  auto epochs = a.engine().TakeEpochs();
  EXPECT_EQ(epochs.size(), 64U);
  a.session.reset();
  for (auto& epoch : epochs) std::move(epoch)(Epoch{3});
}

TEST_F(SessionTest, RetiredSlabs) {
  SessionHarness other({}, h_.hub, &h_.engine());
  ASSERT_TRUE(other.Open());
  h_.hub->RetireSlab(9);  // nobody has it
  EXPECT_EQ(h_.unmapped, std::vector<uint32_t>{9});
  h_.unmapped.clear();
  for (SessionHarness* h : {&h_, &other}) {
    ASSERT_TRUE(h->Give(SessionHarness::Hold(3, SomeIds(1))));
    h->sink->Take();
  }
  h_.hub->RetireSlab(1);
  h_.hub->RetireSlab(1);
  for (SessionHarness* h : {&h_, &other}) {
    const auto notice = h->TakeOne();
    EXPECT_EQ(PacketView::Parse(notice.packet)->header().type,
              Type::kSlabRetired);
    EXPECT_EQ(
        reinterpret_cast<const wire::RingHeader*>(h->ring.data())->notices, 1U);
    char bell;
    EXPECT_EQ(read(h->bell.get(), &bell, 1), 1);
  }
  EXPECT_TRUE(h_.unmapped.empty());
  EXPECT_TRUE(h_.Give(
      PacketWriter(Type::kUnmappedSlab, 4).Body(wire::SlabNotice{.slab = 1})));
  EXPECT_TRUE(h_.Give(
      PacketWriter(Type::kUnmappedSlab, 4).Body(wire::SlabNotice{.slab = 1})));
  EXPECT_TRUE(h_.unmapped.empty());
  other.session.reset();  // died
  EXPECT_EQ(h_.unmapped, std::vector<uint32_t>{1});
}

// ---- Saves ----

TEST_F(SessionTest, StagingThatCannotBeTrusted) {
  const auto share = [&](UniqueFd fd, uint64_t bytes) {
    EXPECT_TRUE(h_.Give(
        PacketWriter(Type::kShareStaging, 3).Body(wire::ShareStaging{bytes}),
        std::move(fd)));
    return h_.ReplyCode();
  };
  using enum absl::StatusCode;
  EXPECT_EQ(share(StagingFd(4096, 0), 4096), kInvalidArgument);
  EXPECT_EQ(share(StagingFd(4096, F_SEAL_GROW), 4096), kInvalidArgument);
  EXPECT_EQ(share(StagingFd(4096, kStagingSeals), 4097), kInvalidArgument);
  EXPECT_EQ(share(StagingFd(4096, kStagingSeals), 0), kInvalidArgument);
  EXPECT_EQ(share(StagingFd(4096, kStagingSeals), UINT64_MAX),
            kInvalidArgument);
  EXPECT_EQ(share(UniqueFd(open("/dev/zero", O_RDWR)), 4096), kInvalidArgument);
  EXPECT_EQ(share(UniqueFd(dup(h_.bell.get())), 1), kInvalidArgument);
  EXPECT_EQ(share(StagingFd(4096, F_SEAL_SHRINK), 4096), kOk);
  EXPECT_FALSE(h_.Give(
      PacketWriter(Type::kShareStaging, 3).Body(wire::ShareStaging{1})));
}

TEST(SessionStaging, Limits) {
  SessionOptions options;
  options.max_staging_bytes = 64_KiB;
  options.max_staging_regions = 3;
  SessionHarness h(options);
  ASSERT_TRUE(h.Open());
  const auto share = [&](uint64_t bytes) {
    EXPECT_TRUE(h.Give(
        PacketWriter(Type::kShareStaging, 3).Body(wire::ShareStaging{bytes}),
        StagingFd(bytes, kStagingSeals)));
    return h.ReplyCode();
  };
  using enum absl::StatusCode;
  EXPECT_EQ(share(128_KiB), kResourceExhausted);
  EXPECT_EQ(share(48_KiB), kOk);
  EXPECT_EQ(share(32_KiB), kResourceExhausted);
  EXPECT_EQ(share(4_KiB), kOk);
  EXPECT_EQ(share(4_KiB), kOk);
  EXPECT_EQ(share(4_KiB), kResourceExhausted);
  ASSERT_TRUE(h.Give(PacketWriter(Type::kUnshareStaging, 4)
                         .Body(wire::UnshareStaging{.region = 1})));
  EXPECT_EQ(share(32_KiB), kOk);
}

TEST_F(SessionTest, CommitStages) {
  const uint32_t region = Share(8192);
  Commit(70, Reserve(), region, 4096, 4096);
  Commit(71, Reserve(), region, 0, 8192, true);
  ASSERT_EQ(h_.produced(), 5U);
  EXPECT_EQ(h_.entry(0).request, 70U);
  EXPECT_EQ(h_.entry(0).value, Raw(SaveStage::kSourceReusable));
  EXPECT_EQ(h_.entry(1).value, Raw(SaveStage::kVolatile));
  EXPECT_EQ(h_.entry(4).request, 71U);
  EXPECT_EQ(h_.entry(4).value, Raw(SaveStage::kDurable));
  EXPECT_EQ(h_.entry(4).status, 0U);
}

// ---- What commits say of their blocks ----

class SessionBlocksTest : public ::testing::Test {
 protected:
  explicit SessionBlocksTest(bool wanted = true) : h_(Options(wanted)) {}
  static SessionOptions Options(bool wanted) {
    SessionOptions options;
    options.wants_blocks = [wanted](TenantId) { return wanted; };
    return options;
  }
  void SetUp() override {
    FakeEngine::Behaviour behaviour;
    behaviour.finish_commits = false;
    h_.engine().Set(behaviour);
    ASSERT_TRUE(h_.Open());
    ASSERT_TRUE(h_.Give(
        PacketWriter(Type::kShareStaging, 50).Body(wire::ShareStaging{4096}),
        StagingFd(4096, kStagingSeals)));
    region_ = h_.Reply<wire::ShareStagingReply>().region;
  }
  // A commit with these arrays behind its body.
  bool Commit(wire::Commit body, const std::vector<uint64_t>& hashes,
              const std::vector<uint32_t>& tokens) {
    EXPECT_TRUE(
        h_.Give(PacketWriter(Type::kReserve, 60)
                    .Body(wire::Reserve{.space = 1, .record_bytes = 4096})));
    body.reservation = h_.Reply<wire::ReserveReply>().reservation;
    body.region = region_;
    body.bytes = 4096;
    return h_.Give(PacketWriter(Type::kCommit, 70)
                       .Body(body)
                       .Append(hashes.data(), hashes.size() * 8)
                       .Append(tokens.data(), tokens.size() * 4)
                       .Bytes());
  }
  std::shared_ptr<const ChunkBlocks> Told() {
    const auto commits = h_.engine().TakeCommits();
    return commits.size() == 1 ? commits[0].request.hints.blocks : nullptr;
  }

  SessionHarness h_;
  uint32_t region_ = 0;
};

TEST_F(SessionBlocksTest, GoWithTheSave) {
  ASSERT_TRUE(Commit(
      {.block_hash_count = 2, .token_count = 3, .signed_hashes = 1, .keyed = 1},
      {5, UINT64_MAX}, {1, 2, 3}));
  const auto blocks = Told();
  ASSERT_NE(blocks, nullptr);
  EXPECT_EQ(blocks->hashes, (std::vector<uint64_t>{5, UINT64_MAX}));
  EXPECT_EQ(blocks->tokens, (std::vector<uint32_t>{1, 2, 3}));
  EXPECT_TRUE(blocks->signed_hashes);
  EXPECT_TRUE(blocks->keyed);
  ASSERT_TRUE(Commit({}, {}, {}));
  EXPECT_EQ(Told(), nullptr);
}

TEST_F(SessionBlocksTest, CountsThatAreNotTheirSizeEndTheConnection) {
  EXPECT_FALSE(Commit({.token_count = 3}, {}, {1, 2}));
}

TEST_F(SessionBlocksTest, TooManyEndTheConnection) {
  EXPECT_FALSE(Commit({.block_hash_count = ChunkBlocks::kMaxHashes + 1},
                      std::vector<uint64_t>(ChunkBlocks::kMaxHashes + 1), {}));
}

TEST_F(SessionBlocksTest, SumsThatWrapAreNoWayIn) {
  EXPECT_FALSE(
      Commit({.block_hash_count = UINT32_MAX, .token_count = 1}, {}, {1}));
}

class SessionWithoutBlocksTest : public SessionBlocksTest {
 protected:
  SessionWithoutBlocksTest() : SessionBlocksTest(false) {}
};

TEST_F(SessionWithoutBlocksTest, WhatNobodyWantsIsDropped) {
  ASSERT_TRUE(Commit({.token_count = 3}, {}, {1, 2, 3}));
  EXPECT_EQ(Told(), nullptr);
}

TEST_F(SessionTest, CommitsOutsideStaging) {
  const uint32_t region = Share(8192);
  struct Case {
    uint32_t region;
    uint64_t offset, bytes;
  };
  uint64_t produced = 0;
  for (const Case c : {Case{region, 0, 8193},
                       {region, 8192, 1},
                       {region, 8191, 2},
                       {region, UINT64_MAX, 2},
                       {region, 1, UINT64_MAX},
                       {region, 0, 0},
                       {region, UINT64_MAX - 4095, 4096},
                       {region + 1, 0, 1},
                       {0, 0, 1}}) {
    Commit(80, Reserve(), c.region, c.offset, c.bytes);
    ASSERT_EQ(h_.produced(), ++produced);
    EXPECT_EQ(h_.entry(produced - 1).status,
              static_cast<uint32_t>(absl::StatusCode::kInvalidArgument));
  }
  EXPECT_EQ(h_.engine().reservations(), 0U);
  // Without a reservation, or with one twice.
  Commit(81, 12345, region, 0, 1);
  const uint64_t reservation = Reserve();
  Commit(82, reservation, region, 0, 1);
  Commit(83, reservation, region, 0, 1);
  EXPECT_EQ(h_.produced(), produced + 4);
  EXPECT_EQ(h_.entry(produced + 3).status,
            static_cast<uint32_t>(absl::StatusCode::kNotFound));
}

TEST_F(SessionTest, AbortGivesTheRoomBack) {
  for (int i = 0; i < 5000; ++i) {
    ASSERT_TRUE(
        h_.Give(PacketWriter(Type::kAbort, 3).Body(wire::Abort{Reserve()})));
  }
  EXPECT_EQ(h_.engine().reservations(), 0U);
  FakeEngine::Behaviour behaviour;
  behaviour.reserve = absl::AlreadyExistsError("");
  h_.engine().Set(behaviour);
  for (int i = 0; i < 5000; ++i) {
    ASSERT_TRUE(
        h_.Give(PacketWriter(Type::kReserve, 3)
                    .Body(wire::Reserve{.space = 1, .record_bytes = 1})));
    ASSERT_EQ(h_.ReplyCode(), absl::StatusCode::kAlreadyExists);
  }
}

TEST_F(SessionTest, StagingLivesAsLongAsItsCommit) {
  FakeEngine::Behaviour behaviour;
  behaviour.finish_commits = false;
  h_.engine().Set(behaviour);
  UniqueFd fd = StagingFd(4096, kStagingSeals);
  Mapping client = *Mapping::Map(fd.get(), 4096, PROT_READ | PROT_WRITE);
  std::memset(client.data(), 'a', 4096);
  ASSERT_TRUE(h_.Give(
      PacketWriter(Type::kShareStaging, 3).Body(wire::ShareStaging{4096}),
      std::move(fd)));
  const uint32_t region = h_.Reply<wire::ShareStagingReply>().region;
  Commit(70, Reserve(), region, 0, 4096);
  ASSERT_TRUE(h_.Give(PacketWriter(Type::kUnshareStaging, 4)
                          .Body(wire::UnshareStaging{.region = region})));
  h_.session.reset();  // the client dies during the commit
  auto commits = h_.engine().TakeCommits();
  ASSERT_EQ(commits.size(), 1U);
  EXPECT_EQ(commits[0].request.record[4095], std::byte{'a'});
  (*commits[0].progress)(SaveStage::kSourceReusable, absl::OkStatus());
  (*commits[0].progress)(SaveStage::kVolatile, absl::OkStatus());
  EXPECT_EQ(h_.produced(), 0U);  // nobody is told
}

TEST_F(SessionTest, EverythingLateIsHarmless) {
  FakeEngine::Behaviour behaviour;
  behaviour.state = ChunkState::kPending;
  behaviour.finish_commits = behaviour.finish_epochs = false;
  h_.engine().Set(behaviour);
  ASSERT_TRUE(h_.Give(SessionHarness::Hold(3, SomeIds(2))));
  h_.sink->Take();
  Commit(70, Reserve(), Share(4096), 0, 1, true);
  ASSERT_TRUE(h_.Give(
      PacketWriter(Type::kAdvanceEpoch, 3).Body(wire::SpaceRef{.space = 1})));
  auto pending = h_.engine().TakePending();
  auto commits = h_.engine().TakeCommits();
  auto epochs = h_.engine().TakeEpochs();
  h_.sink->Fill();
  h_.session.reset();
  h_.hub.reset();
  for (auto& chunk : pending) (*chunk.progress)(chunk.index, MissReason::kNone);
  (*commits[0].progress)(SaveStage::kSourceReusable, absl::DataLossError(""));
  std::move(epochs[0])(Epoch{5});
  EXPECT_EQ(h_.produced(), 0U);
}

// The ring belongs to the daemon: a client can neither write nor resize it.
TEST_F(SessionTest, TheRingIsSealed) {
  EXPECT_EQ(mmap(nullptr, 4096, PROT_READ | PROT_WRITE, MAP_SHARED,
                 h_.ring_fd.get(), 0),
            MAP_FAILED);
  const std::string path = absl::StrCat("/proc/self/fd/", h_.ring_fd.get());
  const UniqueFd again(open(path.c_str(), O_RDWR));
  EXPECT_EQ(write(again.get(), "x", 1), -1);
  EXPECT_NE(ftruncate(h_.ring_fd.get(), 0), 0);
  EXPECT_NE(ftruncate(h_.ring_fd.get(), 1 << 20), 0);
  EXPECT_NE(fallocate(h_.ring_fd.get(),
                      FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 0, 4096),
            0);
  EXPECT_NE(mprotect(h_.ring.data(), 4096, PROT_READ | PROT_WRITE), 0);
}

// A client that makes the bell blocking and fills it does not stop the daemon.
TEST_F(SessionTest, TheBellNeverBlocks) {
  fcntl(h_.bell.get(), F_SETFL, fcntl(h_.bell.get(), F_GETFL) & ~O_NONBLOCK);
  const uint32_t region = Share(4096);
  for (int i = 0; i < 2000; ++i) {
    ASSERT_TRUE(h_.Give(
        PacketWriter(Type::kCredit, 3, static_cast<uint32_t>(h_.produced()))));
    Commit(70, Reserve(), region, 0, 1, true);
  }
  EXPECT_EQ(h_.produced(), 6000U);
}

// ---- Profiles ----

TEST(SessionProfiles, GivesTheBytesThatAreKept) {
  ProfileId kept, other;
  kept.bytes.fill(1);
  other.bytes.fill(2);
  auto bytes = std::make_shared<std::string>();
  for (int i = 0; i < 150'000; ++i) {
    bytes->push_back(static_cast<char>(i * 7 >> 3));
  }
  SessionOptions options;
  options.profile_of = [&](const ProfileId& id) {
    return id == kept ? bytes : nullptr;
  };
  SessionHarness h(std::move(options));
  ASSERT_TRUE(h.Open());
  std::string got;
  const auto ask = [&](const ProfileId& id, uint64_t offset) {
    wire::GetProfile body;
    body.id = id;
    body.offset = offset;
    ASSERT_TRUE(h.Give(PacketWriter(Type::kProfile, 70).Body(body)));
  };
  for (const uint32_t want : {61440u, 61440u, 27120u}) {
    ask(kept, got.size());
    const auto reply = h.Reply<wire::ProfileReply>();
    EXPECT_EQ(reply.head.status, 0);
    EXPECT_EQ(reply.total_bytes, bytes->size());
    ASSERT_EQ(reply.bytes, want);
    const auto view = PacketView::Parse(h.last.packet);
    ASSERT_TRUE(view.ok());
    ASSERT_EQ(view->arrays().size(), want);
    got.append(reinterpret_cast<const char*>(view->arrays().data()), want);
  }
  EXPECT_EQ(got, *bytes);
  ask(kept, bytes->size());
  EXPECT_EQ(h.Reply<wire::ProfileReply>().bytes, 0u);
  for (const uint64_t beyond : {bytes->size() + 1, size_t{UINT64_MAX}}) {
    ask(kept, beyond);
    EXPECT_EQ(h.ReplyCode(), absl::StatusCode::kInvalidArgument);
  }
  ask(other, 0);
  EXPECT_EQ(h.ReplyCode(), absl::StatusCode::kNotFound);
  // Surplus bytes end the connection.
  EXPECT_FALSE(h.Give(PacketWriter(Type::kProfile, 71)
                          .Body(wire::GetProfile{})
                          .Append("12345678", 8)));
}

TEST_F(SessionTest, KeepsNoProfiles) {
  ASSERT_TRUE(
      h_.Give(PacketWriter(Type::kProfile, 70).Body(wire::GetProfile{})));
  EXPECT_EQ(h_.ReplyCode(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace larder
