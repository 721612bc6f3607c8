// A daemon's end of clients on other hosts, against one that keeps to the
// protocol and many that do not, on a clock that stands still.

#include "transport/remote/remote_server.h"

#include <algorithm>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/transport/remote/remote_client_end.h"

namespace larder {
namespace {

using testing::Contains;
using testing::HasSubstr;
using testing::IsEmpty;
using testing::SizeIs;

std::vector<std::byte> Filled(size_t bytes, uint8_t with) {
  return std::vector<std::byte>(bytes, std::byte{with});
}
bool All(ByteSpan bytes, uint8_t are) {
  return std::all_of(bytes.begin(), bytes.end(),
                     [are](std::byte byte) { return byte == std::byte{are}; });
}

// ---- Who is served ----

TEST(RemoteServerHello, OneThatSaysNothingIsClosed) {
  RemoteBed bed;
  RemoteClientEnd silent(bed), polite(bed);
  ASSERT_TRUE(polite.Open());
  EXPECT_EQ(bed.server->GetStats().clients, 2u);
  bed.Pass(absl::Seconds(4));
  EXPECT_TRUE(silent.lost.ok());
  bed.Pass(absl::Seconds(2));
  EXPECT_FALSE(silent.lost.ok());
  EXPECT_TRUE(polite.lost.ok());
  EXPECT_EQ(bed.server->GetStats().clients, 1u);
  EXPECT_THAT(bed.log, Contains(HasSubstr("did not say hello in time")));
}

TEST(RemoteServerHello, OneThatIsRefusedHearsWhyAndIsClosed) {
  SessionOptions session;
  session.tenant_of = [](const PeerIdentity& peer) -> StatusOr<TenantId> {
    EXPECT_TRUE(peer.remote);
    EXPECT_EQ(peer.certificate, "engine-a");
    return absl::PermissionDeniedError("no tenant of ours");
  };
  RemoteBed bed({}, std::move(session));
  RemoteClientEnd client(bed);
  EXPECT_FALSE(client.Open());
  EXPECT_EQ(client.welcome.head.status,
            static_cast<uint16_t>(absl::StatusCode::kPermissionDenied));
  bed.Pass(absl::Seconds(6));
  EXPECT_FALSE(client.lost.ok());
  EXPECT_EQ(bed.server->GetStats().clients, 0u);
  EXPECT_EQ(bed.engine.clients(), 0u);
}

TEST(RemoteServerHello, StrangersAndOneTooMany) {
  RemoteServer::Options options;
  options.max_clients = 2;
  RemoteBed bed(std::move(options));
  RemoteClientEnd node(bed, "larder node 2");
  EXPECT_TRUE(absl::IsFailedPrecondition(node.status)) << node.status;
  RemoteClientEnd one(bed), two(bed), three(bed);
  EXPECT_TRUE(absl::IsResourceExhausted(three.status)) << three.status;
  EXPECT_EQ(bed.server->GetStats().refused, 2u);
  ASSERT_TRUE(two.Open());
}

// ---- A client at work ----

class RemoteServerTest : public testing::Test {
 protected:
  void SetUp() override { ASSERT_TRUE(client_.Open()); }

  RemoteBed bed_;
  RemoteClientEnd client_{bed_};
};

TEST_F(RemoteServerTest, BytesOfAnAnnouncedSlab) {
  std::vector<std::byte> memory(8192);
  const LandingId landing =
      client_.link->OpenLanding(memory, [](uint64_t, uint64_t) {});
  FetchRequest fetch{
      .slab = bed_.slab, .offset = 4096, .bytes = 4096, .landing = landing};
  // Nothing of it was held yet.
  EXPECT_TRUE(absl::IsNotFound(client_.Fetch(fetch)->value().status()));

  EXPECT_EQ(client_.Hold(2).chunk_count, 2u);
  ASSERT_THAT(client_.notices, SizeIs(1));
  EXPECT_EQ(client_.notices[0].type, wire::Type::kSlab);
  EXPECT_EQ(client_.notices[0].body.bytes, 1_MiB);
  fetch.at = 100;
  EXPECT_TRUE(client_.Fetch(fetch)->value().ok());
  EXPECT_TRUE(All(ByteSpan(memory).subspan(100, 4096), 0x5a));
  EXPECT_TRUE(All(ByteSpan(memory).first(100), 0));
  EXPECT_TRUE(All(ByteSpan(memory).subspan(4196), 0));
  EXPECT_EQ(bed_.server->GetStats().sent_bytes, 4096u);

  for (const auto& [offset, bytes] :
       {std::pair<uint64_t, uint64_t>{1_MiB - 1, 2},
        {0, 1_MiB + 1},
        {UINT64_MAX, 1},
        {1, UINT64_MAX},
        {0, 0}}) {
    fetch.offset = offset;
    fetch.bytes = bytes;
    EXPECT_TRUE(
        absl::IsInvalidArgument(client_.Fetch(fetch)->value().status()));
  }
  // A landing that there is not, or is too small: nothing happens to anybody.
  fetch = {.slab = bed_.slab, .bytes = 4096, .landing = 99};
  EXPECT_TRUE(client_.Fetch(fetch)->has_value());
  EXPECT_TRUE(client_.lost.ok());
}

TEST_F(RemoteServerTest, ASlabThatGoesIsUnmappedWhenTheClientSaysSo) {
  client_.Hold(1);
  bed_.hub->RetireSlab(bed_.slab);
  bed_.Run();
  ASSERT_THAT(client_.notices, SizeIs(2));
  EXPECT_EQ(client_.notices[1].type, wire::Type::kSlabRetired);
  EXPECT_THAT(bed_.unmapped, IsEmpty());
  client_.Say(RemoteMessage::kSend,
              PacketWriter(wire::Type::kUnmappedSlab, 9)
                  .Body(wire::SlabNotice{.slab = bed_.slab}));
  EXPECT_THAT(bed_.unmapped, testing::ElementsAre(bed_.slab));
  EXPECT_TRUE(absl::IsNotFound(
      client_.Fetch(FetchRequest{.slab = bed_.slab, .bytes = 1})
          ->value()
          .status()));
}

TEST_F(RemoteServerTest, ARecordIsCommittedWhenAllOfItLanded) {
  bed_.engine.Set({.finish_commits = false});
  const uint32_t region = client_.Share(64_KiB);
  ASSERT_NE(region, 0u);
  const auto record = Filled(10'000, 0x77);
  const LandingId landing = client_.Commit(RemoteClientEnd::CommitOf(
      20, region, 4096, record.size(), client_.Reserve()));
  ASSERT_NE(landing, 0u);
  client_.Put(landing, 0, ByteSpan(record).first(6000));
  EXPECT_THAT(bed_.engine.TakeCommits(), IsEmpty());
  client_.Put(landing, 6000, ByteSpan(record).subspan(6000));
  auto commits = bed_.engine.TakeCommits();
  ASSERT_THAT(commits, SizeIs(1));
  EXPECT_EQ(commits[0].request.record.size(), record.size());
  EXPECT_TRUE(All(commits[0].request.record, 0x77));

  // It can be changed by nobody now.
  const auto other = Filled(10'000, 0x11);
  client_.Put(landing, 0, other);
  EXPECT_TRUE(All(commits[0].request.record, 0x77));
  (*commits[0].progress)(SaveStage::kSourceReusable, absl::OkStatus());
  (*commits[0].progress)(SaveStage::kVolatile, absl::OkStatus());
  bed_.Run();
  ASSERT_THAT(client_.completions, SizeIs(2));
  EXPECT_EQ(client_.completions[0].request, 20u);
  EXPECT_EQ(client_.completions[1].value, Raw(SaveStage::kVolatile));
  EXPECT_EQ(bed_.server->GetStats().received_bytes, record.size());
}

TEST_F(RemoteServerTest, StagingThatGoesWaitsForItsRecords) {
  bed_.engine.Set({.finish_commits = false});
  const uint32_t region = client_.Share(64_KiB);
  const auto record = Filled(8192, 0x77);
  const uint64_t reservation = client_.Reserve();
  const LandingId landing = client_.Commit(
      RemoteClientEnd::CommitOf(20, region, 0, record.size(), reservation));
  const auto unshare = PacketWriter(wire::Type::kUnshareStaging, 21)
                           .Body(wire::UnshareStaging{.region = region});
  client_.Say(RemoteMessage::kSend, unshare);
  EXPECT_EQ(client_.Commit(RemoteClientEnd::CommitOf(22, region, 0, 4096)), 0u);
  EXPECT_EQ(bed_.server->GetStats().staging_bytes, 64_KiB);
  client_.Put(landing, 0, record);
  ASSERT_THAT(bed_.engine.TakeCommits(), SizeIs(1));
  EXPECT_EQ(bed_.server->GetStats().staging_bytes, 0u);
}

TEST_F(RemoteServerTest, RecordsThatLieNowhere) {
  const uint32_t region = client_.Share(64_KiB);
  for (const auto& [offset, bytes] : {std::pair<uint64_t, uint64_t>{64_KiB, 1},
                                      {0, 64_KiB + 1},
                                      {UINT64_MAX, 2},
                                      {2, UINT64_MAX},
                                      {0, 0}}) {
    EXPECT_EQ(
        client_.Commit(RemoteClientEnd::CommitOf(20, region, offset, bytes)),
        0u);
  }
  EXPECT_EQ(client_.Commit(RemoteClientEnd::CommitOf(20, region + 1, 0, 4096)),
            0u);
  EXPECT_TRUE(client_.lost.ok());
  EXPECT_EQ(bed_.engine.TakeCommits().size(), 0u);
}

TEST_F(RemoteServerTest, HalfOfARecordTwiceIsNotARecord) {
  // It is committed, and the engine refuses what does not verify: what lies
  // where nothing came is zero, not somebody's.
  bed_.engine.Set({.finish_commits = false});
  const uint32_t region = client_.Share(64_KiB);
  const auto half = Filled(4096, 0x77);
  const LandingId landing = client_.Commit(
      RemoteClientEnd::CommitOf(20, region, 0, 8192, client_.Reserve()));
  client_.Put(landing, 0, half);
  client_.Put(landing, 0, half);
  const auto commits = bed_.engine.TakeCommits();
  ASSERT_THAT(commits, SizeIs(1));
  EXPECT_TRUE(All(commits[0].request.record.subspan(4096), 0));
}

TEST_F(RemoteServerTest, TooManyRecordsAtOnceAreBusy) {
  const uint32_t region = client_.Share(64_KiB);
  for (uint64_t i = 0; i < 1024; ++i) {
    ASSERT_NE(
        client_.Commit(RemoteClientEnd::CommitOf(100 + i, region, 0, 4096)),
        0u);
  }
  const auto more = client_.Say(
      RemoteMessage::kCommit, RemoteClientEnd::CommitOf(5000, region, 0, 4096));
  EXPECT_TRUE(absl::IsResourceExhausted(more->value().status()));
  EXPECT_TRUE(client_.lost.ok());
}

TEST_F(RemoteServerTest, CompletionsComeInOrderAsTheClientTakesThem) {
  client_.keeps_answers = true;
  constexpr size_t kAll = 3 * wire::kRingEntries;
  for (size_t i = 0; i < kAll / 4; ++i) {
    bed_.engine.Revoke(HoldId{client_.Hold(1, 1000 + i).hold},
                       MissReason::kEvicted);
    bed_.Run();
  }
  // Only one message is under way; entries wait.
  EXPECT_EQ(client_.completion_messages, 1u);
  while (!client_.answers.empty()) {
    Answer answer = std::move(client_.answers.back());
    client_.answers.pop_back();
    answer.Send(std::string());
    bed_.Run();
  }
  EXPECT_THAT(client_.completions, SizeIs(kAll / 4));
  EXPECT_TRUE(std::is_sorted(client_.completions.begin(),
                             client_.completions.end(),
                             [](const auto& one, const auto& two) {
                               return one.request < two.request;
                             }));
  EXPECT_TRUE(client_.lost.ok());
}

TEST_F(RemoteServerTest, OneThatTakesNoCompletionsIsDropped) {
  client_.keeps_answers = true;
  const HoldId hold{client_.Hold(1).hold};
  for (int i = 0; i < 30'000; ++i) {
    bed_.engine.Revoke(hold, MissReason::kEvicted);
  }
  bed_.Run();
  EXPECT_FALSE(client_.lost.ok());
  EXPECT_EQ(bed_.engine.clients(), 0u);
}

// ---- Limits ----

TEST(RemoteServerLimits, StagingOfOneAndOfAll) {
  RemoteServer::Options options;
  options.staging_bytes = 1_MiB;
  options.all_staging_bytes = 3_MiB / 2;
  RemoteBed bed(std::move(options));
  {
    RemoteClientEnd one(bed), two(bed);
    ASSERT_TRUE(one.Open());
    ASSERT_TRUE(two.Open());
    EXPECT_EQ(one.welcome.max_staging_bytes, 1_MiB);
    EXPECT_EQ(one.Share(2_MiB, 10), 0u);
    EXPECT_EQ(one.Share(100, 11), 0u);  // no pages
    EXPECT_EQ(one.Share(0, 12), 0u);
    EXPECT_EQ(one.Share(UINT64_MAX - 4095, 13), 0u);
    EXPECT_NE(one.Share(1_MiB, 14), 0u);
    EXPECT_EQ(one.Share(4096, 15), 0u);
    EXPECT_EQ(two.Share(1_MiB, 16), 0u);  // all of them have no more
    EXPECT_NE(two.Share(512_KiB, 17), 0u);
    EXPECT_EQ(bed.server->GetStats().staging_bytes, 3_MiB / 2);
    EXPECT_TRUE(one.lost.ok());
  }
  EXPECT_EQ(bed.server->GetStats().staging_bytes, 0u);
}

// ---- Clients that go, and clients that lie ----

TEST_F(RemoteServerTest, WhatAClientHeldGoesWithIt) {
  {
    RemoteClientEnd other(bed_);
    ASSERT_TRUE(other.Open());
    other.Hold(3);
    other.Reserve();
    const uint32_t region = other.Share(64_KiB);
    // A record of which half is here.
    const auto half = Filled(4096, 1);
    other.Put(other.Commit(RemoteClientEnd::CommitOf(20, region, 0, 8192)), 0,
              half);
    EXPECT_EQ(bed_.engine.holds(), 1u);
    EXPECT_EQ(bed_.engine.clients(), 2u);
  }
  bed_.Run();
  EXPECT_EQ(bed_.engine.holds(), 0u);
  EXPECT_EQ(bed_.engine.reservations(), 0u);
  EXPECT_EQ(bed_.engine.clients(), 1u);
  EXPECT_EQ(bed_.server->GetStats().staging_bytes, 0u);
}

TEST_F(RemoteServerTest, OneOfWhichNothingIsHeardGivesBackWhatItHeld) {
  client_.Hold(3);
  bed_.network.Stop();
  bed_.Pass(absl::Seconds(4));
  EXPECT_EQ(bed_.engine.holds(), 1u);
  bed_.Pass(absl::Seconds(2));
  EXPECT_EQ(bed_.engine.holds(), 0u);
  EXPECT_EQ(bed_.server->GetStats().clients, 0u);
}

TEST_F(RemoteServerTest, AnAnswerThatComesAfterItsClient) {
  bed_.engine.Set({.finish_epochs = false});
  {
    RemoteClientEnd other(bed_);
    ASSERT_TRUE(other.Open());
    other.Say(RemoteMessage::kCall, PacketWriter(wire::Type::kAdvanceEpoch, 30)
                                        .Body(wire::SpaceRef{.space = 1}));
  }
  for (auto& done : bed_.engine.TakeEpochs()) std::move(done)(Epoch{3});
  bed_.Run();
  EXPECT_EQ(bed_.server->GetStats().clients, 1u);
}

TEST_F(RemoteServerTest, MessagesThatAreNone) {
  // Refused by name; whoever sends them stays.
  for (const std::string& message :
       {std::string(), std::string("short"), std::string(8, '\0'),
        RemoteMessageOf(RemoteMessage::kCompletions, {}),
        RemoteMessageOf(static_cast<RemoteMessage>(99), {}),
        RemoteMessageOf(RemoteMessage::kFetch, {})}) {
    EXPECT_FALSE(client_.SayRaw(message)->value().ok());
    EXPECT_TRUE(client_.lost.ok());
  }
  // A commit that comes as a call, a call that comes as a commit.
  const auto commit = RemoteClientEnd::CommitOf(20, 1, 0, 4096);
  EXPECT_FALSE(client_.Say(RemoteMessage::kCall, commit)->value().ok());
  EXPECT_FALSE(
      client_
          .Say(RemoteMessage::kCommit,
               PacketWriter(wire::Type::kPing, 21).Body(wire::SpaceRef{}))
          ->value()
          .ok());
  EXPECT_TRUE(client_.lost.ok());
}

// Each breaks the protocol in its way, and loses its link alone.
TEST_F(RemoteServerTest, PacketsThatBreakTheProtocolEndTheirClient) {
  const auto ping = [] {
    return PacketWriter(wire::Type::kPing, 50).Body(wire::SpaceRef{});
  };
  const auto breaks = [&](const char* what, RemoteMessage kind,
                          std::vector<std::byte> packet) {
    SCOPED_TRACE(what);
    RemoteClientEnd other(bed_);
    ASSERT_TRUE(other.Open());
    other.Say(kind, packet);
    EXPECT_FALSE(other.lost.ok());
  };
  auto magic = ping().Bytes();
  magic[0] ^= std::byte{1};
  breaks("magic", RemoteMessage::kCall, magic);
  breaks("cut", RemoteMessage::kCall, Filled(20, 0));
  breaks("empty", RemoteMessage::kSend, {});
  breaks("request 0", RemoteMessage::kCall,
         PacketWriter(wire::Type::kPing, 0).Body(wire::SpaceRef{}).Bytes());
  breaks("a second hello", RemoteMessage::kCall,
         PacketWriter(wire::Type::kHello, 51).Body(wire::Hello{}).Bytes());
  breaks("staging without an answer", RemoteMessage::kSend,
         PacketWriter(wire::Type::kShareStaging, 52)
             .Body(wire::ShareStaging{4096})
             .Bytes());
  {
    SCOPED_TRACE("before the hello");
    RemoteClientEnd other(bed_);
    other.Say(RemoteMessage::kCall, ping());
    EXPECT_EQ(bed_.engine.clients(), 1u);
    bed_.Pass(absl::Seconds(6));
    EXPECT_FALSE(other.lost.ok());
  }
  {
    SCOPED_TRACE("a request's number twice");
    bed_.engine.Set({.finish_epochs = false});
    RemoteClientEnd other(bed_);
    ASSERT_TRUE(other.Open());
    const auto advance = PacketWriter(wire::Type::kAdvanceEpoch, 60)
                             .Body(wire::SpaceRef{.space = 1});
    other.Say(RemoteMessage::kCall, advance);
    EXPECT_TRUE(other.lost.ok());
    other.Say(RemoteMessage::kCall, advance);
    EXPECT_FALSE(other.lost.ok());
  }
  EXPECT_TRUE(client_.lost.ok());
  EXPECT_EQ(client_.Hold(1).chunk_count, 1u);
}

}  // namespace
}  // namespace larder
