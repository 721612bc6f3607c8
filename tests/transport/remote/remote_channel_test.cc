// The client's end of a daemon on another host: against a daemon that says
// whatever it is told to, and, with threads on both sides, against the real
// end.

#include "transport/remote/remote_channel.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "tests/testing/fake_network.h"
#include "tests/testing/test_ca.h"
#include "tests/transport/session_harness.h"
#include "transport/remote/remote_messages.h"
#include "transport/remote/remote_server.h"
#include "transport/tls/tls_transport.h"

namespace larder {
namespace {

using testing::HasSubstr;
using testing::SizeIs;

template <class Body>
std::string ReplyTo(uint64_t request, const Body& body,
                    std::string_view more = "") {
  return PacketWriter(wire::Type::kReply, request)
      .Body(body)
      .Append(more.data(), more.size())
      .Text();
}

// A daemon of which the test says what it answers. What it does not say is
// answered as a daemon would that has nothing.
class ScriptedDaemon final : public LinkService {
 public:
  // Gets the packet and the right to answer it.
  using Handler = std::function<void(PacketView, Answer)>;

  void On(wire::Type type, Handler handler) {
    absl::MutexLock lock(&mu_);
    handlers_[type] = std::move(handler);
  }
  // What came and was seen to, by type.
  size_t Count(wire::Type type) const {
    absl::MutexLock lock(&mu_);
    const auto it = counts_.find(type);
    return it == counts_.end() ? 0 : it->second;
  }
  void AwaitCount(wire::Type type, size_t count) const {
    absl::MutexLock lock(&mu_);
    const auto reached = [&] {
      mu_.AssertHeld();
      const auto it = counts_.find(type);
      return it != counts_.end() && it->second >= count;
    };
    mu_.Await(absl::Condition(&reached));
  }
  std::shared_ptr<Link> link() const {
    absl::MutexLock lock(&mu_);
    return link_;
  }
  void Say(RemoteMessage kind, ByteSpan bytes) {
    link()->Call(RemoteMessageOf(kind, bytes), {},
                 [](const StatusOr<std::string>&) {});
  }

  StatusOr<std::string> Admit(const std::string& greeting,
                              const Peer&) override {
    return greeting;
  }
  void OnLink(std::shared_ptr<Link> link) override {
    absl::MutexLock lock(&mu_);
    link_ = std::move(link);
  }
  void OnCall(const std::shared_ptr<Link>&, std::string message, absl::Time,
              Answer answer) override {
    const StatusOr<PacketView> view =
        PacketView::Parse(BytesAfterKind(message));
    if (!view.ok()) return answer.Send(view.status());
    const wire::Type type = view->header().type;
    Handler handler;
    {
      absl::MutexLock lock(&mu_);
      if (handlers_.contains(type)) handler = handlers_[type];
    }
    if (handler) {
      handler(*view, std::move(answer));
    } else {
      AnswerPlainly(type, view->header().request, std::move(answer));
    }
    absl::MutexLock lock(&mu_);
    ++counts_[type];
  }
  void OnLost(const std::shared_ptr<Link>&, const Status&) override {}

 private:
  static void AnswerPlainly(wire::Type type, uint64_t request, Answer answer) {
    if (type == wire::Type::kHello) {
      wire::HelloReply welcome;
      welcome.max_staging_bytes = 1_MiB;
      welcome.max_holds = 16;
      return answer.Send(ReplyTo(request, welcome));
    }
    if (type == wire::Type::kShareStaging) {
      return answer.Send(
          ReplyTo(request, wire::ShareStagingReply{.region = 3}));
    }
    answer.Send(ReplyTo(request, wire::ReplyHead{}));
  }

  mutable absl::Mutex mu_;
  std::map<wire::Type, Handler> handlers_ ABSL_GUARDED_BY(mu_);
  std::map<wire::Type, size_t> counts_ ABSL_GUARDED_BY(mu_);
  std::shared_ptr<Link> link_ ABSL_GUARDED_BY(mu_);
};

// A transport of a network that another thread runs: one thread at a time.
class SharedTransport final : public Transport {
 public:
  SharedTransport(absl::Mutex& mu, std::unique_ptr<Transport> transport)
      : mu_(mu), transport_(std::move(transport)) {}
  ~SharedTransport() override {
    absl::MutexLock lock(&mu_);
    transport_ = nullptr;
  }
  StatusOr<std::string> Listen(const std::string& address,
                               LinkService& service) override {
    absl::MutexLock lock(&mu_);
    return transport_->Listen(address, service);
  }
  void Connect(const std::string& address, std::string greeting,
               LinkService& service, absl::Time deadline,
               Connected connected) override {
    absl::MutexLock lock(&mu_);
    transport_->Connect(address, std::move(greeting), service, deadline,
                        std::move(connected));
  }

 private:
  absl::Mutex& mu_;
  std::unique_ptr<Transport> transport_;
};

// The network's thread is the test's own, which runs until it is stopped.
class RemoteChannelTest : public testing::Test {
 protected:
  ~RemoteChannelTest() override {
    channel_ = nullptr;
    StopPump();
    transport_ = nullptr;
    executor_.RunAll();
  }

  // The clock stands still: nothing is late that should not be.
  absl::Time Late() const { return clock_.Now() + absl::Seconds(60); }
  absl::Time AtOnce() const { return clock_.Now(); }

  StatusOr<std::shared_ptr<LocalChannel>> Connect() {
    transport_ = NewTransport();
    RemoteChannel::Options options;
    options.address = transport_->Listen("", daemon_).value();
    options.clock = &clock_;
    pump_ = std::thread([this] {
      while (!stopping_) {
        absl::MutexLock lock(&network_mu_);
        if (!executor_.RunOne()) std::this_thread::yield();
      }
    });
    return RemoteChannel::Connect(NewTransport(), options);
  }
  std::unique_ptr<Transport> NewTransport() {
    return std::make_unique<SharedTransport>(network_mu_,
                                             network_.NewTransport({}));
  }
  void Open() {
    auto channel = Connect();
    ASSERT_TRUE(channel.ok()) << channel.status();
    channel_ = *std::move(channel);
  }
  void StopPump() {
    stopping_ = true;
    if (pump_.joinable()) pump_.join();
  }
  Status Ping(absl::Time deadline) {
    return channel_->Call(wire::Type::kPing, wire::SpaceRef{}, {}, deadline)
        .status();
  }
  wire::RingEntry NextCompletion() {
    wire::RingEntry entry;
    while (channel_->DrainCompletions(
               [&](const wire::RingEntry& one) { entry = one; }) == 0) {
      const Status waited =
          channel_->WaitCompletions(channel_->drained(), Late());
      if (!waited.ok()) {
        ADD_FAILURE() << waited;
        break;
      }
    }
    return entry;
  }

  ManualClock clock_;
  ManualExecutor executor_{clock_};
  FakeNetwork network_{clock_, executor_};
  absl::Mutex network_mu_;
  ScriptedDaemon daemon_;
  std::unique_ptr<Transport> transport_;
  std::atomic<bool> stopping_{false};
  std::thread pump_;
  std::shared_ptr<LocalChannel> channel_;
};

TEST_F(RemoteChannelTest, SaysWhatTheDaemonSaid) {
  daemon_.On(wire::Type::kHello, [](PacketView view, Answer answer) {
    wire::HelloReply welcome;
    welcome.tenant = 4;
    welcome.client = 9;
    welcome.max_staging_bytes = 1_MiB;
    welcome.max_holds = 77;
    answer.Send(ReplyTo(view.header().request, welcome));
  });
  ASSERT_NO_FATAL_FAILURE(Open());
  EXPECT_EQ(channel_->session().tenant, TenantId{4});
  EXPECT_EQ(channel_->session().client, ClientId{9});
  EXPECT_EQ(channel_->session().max_holds, 77u);
  EXPECT_TRUE(Ping(Late()).ok());
  EXPECT_FALSE(channel_->broken());
}

TEST_F(RemoteChannelTest, HellosThatWillNotDo) {
  struct Case {
    const char* what;
    StatusOr<std::string> answer;
    absl::StatusCode code;
  };
  wire::HelloReply refusal, newer, other;
  refusal.head.status =
      static_cast<uint16_t>(absl::StatusCode::kPermissionDenied);
  refusal.head.detail_bytes = 2;
  newer.minor = wire::kMinor + 1;
  other.major = wire::kMajor + 1;
  const Case cases[] = {
      {"refused", ReplyTo(2, refusal, "no"),
       absl::StatusCode::kPermissionDenied},
      {"a newer minor version", ReplyTo(2, newer),
       absl::StatusCode::kFailedPrecondition},
      {"another major version", ReplyTo(2, other),
       absl::StatusCode::kFailedPrecondition},
      {"nothing", std::string(), absl::StatusCode::kInvalidArgument},
      {"no packet", std::string(64, 'x'), absl::StatusCode::kInvalidArgument},
      {"an error", absl::InternalError("oh"), absl::StatusCode::kInternal}};
  for (const Case& one : cases) {
    SCOPED_TRACE(one.what);
    StopPump();
    stopping_ = false;
    daemon_.On(wire::Type::kHello,
               [&](PacketView, Answer answer) { answer.Send(one.answer); });
    const auto channel = Connect();
    EXPECT_EQ(channel.status().code(), one.code) << channel.status();
  }
}

TEST_F(RemoteChannelTest, ACallThatIsNotAnsweredEndsByItsDeadline) {
  std::vector<Answer> kept;
  daemon_.On(wire::Type::kPing, [&](PacketView, Answer answer) {
    kept.push_back(std::move(answer));
  });
  ASSERT_NO_FATAL_FAILURE(Open());
  EXPECT_TRUE(absl::IsDeadlineExceeded(Ping(AtOnce())));
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      channel_->WaitCompletions(channel_->drained(), AtOnce())));
  EXPECT_FALSE(channel_->broken());
  StopPump();
  kept.clear();
}

TEST_F(RemoteChannelTest, WhatAHoldGaveTooLateIsGivenBack) {
  absl::Mutex mu;
  std::vector<std::pair<uint64_t, Answer>> kept;
  const auto keep = [&](PacketView view, Answer answer) {
    absl::MutexLock lock(&mu);
    kept.emplace_back(view.header().request, std::move(answer));
  };
  for (const wire::Type type :
       {wire::Type::kHold, wire::Type::kReserve, wire::Type::kShareStaging}) {
    daemon_.On(type, keep);
  }
  uint64_t released = 0, aborted = 0;
  uint32_t unshared = 0;
  daemon_.On(wire::Type::kReleaseHold, [&](PacketView view, Answer answer) {
    released = view.Body<wire::HoldRef>().hold;
    answer.Send(std::string());
  });
  daemon_.On(wire::Type::kAbort, [&](PacketView view, Answer answer) {
    aborted = view.Body<wire::Abort>().reservation;
    answer.Send(std::string());
  });
  daemon_.On(wire::Type::kUnshareStaging, [&](PacketView view, Answer answer) {
    unshared = view.Body<wire::UnshareStaging>().region;
    answer.Send(std::string());
  });
  ASSERT_NO_FATAL_FAILURE(Open());
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      channel_->Call(wire::Type::kHold, wire::Hold{}, {}, AtOnce()).status()));
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      channel_->Call(wire::Type::kReserve, wire::Reserve{}, {}, AtOnce())
          .status()));
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      channel_->CreateStaging(4096, AtOnce()).status()));
  for (const wire::Type type :
       {wire::Type::kHold, wire::Type::kReserve, wire::Type::kShareStaging}) {
    daemon_.AwaitCount(type, 1);
  }
  {
    absl::MutexLock lock(&mu);
    ASSERT_THAT(kept, SizeIs(3));
    kept[0].second.Send(
        ReplyTo(kept[0].first, wire::HoldReply{.hold = 17, .end_index = 0}));
    kept[1].second.Send(
        ReplyTo(kept[1].first, wire::ReserveReply{.reservation = 18}));
    kept[2].second.Send(
        ReplyTo(kept[2].first, wire::ShareStagingReply{.region = 19}));
  }
  daemon_.AwaitCount(wire::Type::kReleaseHold, 1);
  daemon_.AwaitCount(wire::Type::kAbort, 1);
  daemon_.AwaitCount(wire::Type::kUnshareStaging, 1);
  StopPump();
  EXPECT_EQ(released, 17u);
  EXPECT_EQ(aborted, 18u);
  EXPECT_EQ(unshared, 19u);
}

TEST_F(RemoteChannelTest, ADaemonThatGoesEndsWhatWaits) {
  daemon_.On(wire::Type::kPing,
             [this](PacketView, Answer) { daemon_.link()->Close(); });
  ASSERT_NO_FATAL_FAILURE(Open());
  EXPECT_FALSE(Ping(Late()).ok());
  const Status waited = channel_->WaitCompletions(channel_->drained(), Late());
  EXPECT_TRUE(absl::IsUnavailable(waited)) << waited;
  EXPECT_TRUE(channel_->broken());
  EXPECT_TRUE(absl::IsUnavailable(Ping(Late())));
  EXPECT_TRUE(absl::IsUnavailable(channel_->reason()));
  EXPECT_FALSE(channel_->CreateStaging(4096, Late()).ok());
}

TEST_F(RemoteChannelTest, CloseEndsWhatWaits) {
  daemon_.On(wire::Type::kPing, [](PacketView, Answer answer) {
    static auto* const kept = new std::vector<Answer>;
    kept->push_back(std::move(answer));
  });
  ASSERT_NO_FATAL_FAILURE(Open());
  std::thread closer([this] {
    daemon_.AwaitCount(wire::Type::kPing, 1);
    channel_->Close();
  });
  EXPECT_TRUE(absl::IsUnavailable(Ping(Late())));
  closer.join();
}

TEST_F(RemoteChannelTest, ACommitThatGoesWrongIsTold) {
  ASSERT_NO_FATAL_FAILURE(Open());
  const auto staging = channel_->CreateStaging(8192, Late());
  ASSERT_TRUE(staging.ok()) << staging.status();
  EXPECT_EQ((*staging)->bytes().size(), 8192u);
  EXPECT_TRUE(absl::IsResourceExhausted(
      channel_->CreateStaging(2_MiB, Late()).status()));
  const auto commit = [&](uint64_t offset, uint64_t bytes) {
    return channel_->Send(
        wire::Type::kCommit,
        wire::Commit{
            .region = (*staging)->region(), .offset = offset, .bytes = bytes},
        {}, Late(), channel_->NewRequestId());
  };
  EXPECT_FALSE(commit(4096, 8192).ok());
  EXPECT_FALSE(commit(UINT64_MAX, 2).ok());

  daemon_.On(wire::Type::kCommit, [](PacketView, Answer answer) {
    answer.Send(absl::ResourceExhaustedError("too many"));
  });
  ASSERT_TRUE(commit(0, 4096).ok());
  wire::RingEntry entry = NextCompletion();
  EXPECT_EQ(entry.kind, wire::Completion::kSave);
  EXPECT_EQ(entry.status,
            static_cast<uint32_t>(absl::StatusCode::kResourceExhausted));

  daemon_.On(wire::Type::kCommit, [](PacketView, Answer answer) {
    answer.Send(std::string("no landing"));
  });
  ASSERT_TRUE(commit(0, 4096).ok());
  entry = NextCompletion();
  EXPECT_EQ(entry.status, static_cast<uint32_t>(absl::StatusCode::kInternal));
}

// A stage that is told before the bytes are sent waits for that: until then
// they must not be reused.
TEST_F(RemoteChannelTest, StagesWaitUntilTheBytesAreSent) {
  std::vector<std::byte> memory(4096);
  daemon_.On(wire::Type::kCommit, [&](PacketView view, Answer answer) {
    const wire::RingEntry told{.request = view.header().request,
                               .kind = wire::Completion::kSave,
                               .value = Raw(SaveStage::kSourceReusable)};
    daemon_.Say(RemoteMessage::kCompletions, BytesOf(told));
    const LandingId landing =
        daemon_.link()->OpenLanding(memory, [](uint64_t, uint64_t) {});
    answer.Send(
        std::string(reinterpret_cast<const char*>(&landing), sizeof landing));
  });
  ASSERT_NO_FATAL_FAILURE(Open());
  const auto staging = channel_->CreateStaging(4096, Late());
  ASSERT_TRUE(staging.ok());
  std::memset((*staging)->bytes().data(), 0x77, 4096);
  ASSERT_TRUE(
      channel_
          ->Send(wire::Type::kCommit,
                 wire::Commit{.region = (*staging)->region(), .bytes = 4096},
                 {}, Late(), 1000)
          .ok());
  const wire::RingEntry entry = NextCompletion();
  EXPECT_EQ(entry.request, 1000u);
  EXPECT_EQ(entry.status, 0u);
  EXPECT_EQ(memory[4095], std::byte{0x77});
}

TEST_F(RemoteChannelTest, WhatTheDaemonSaysUnaskedBreaksNothing) {
  ASSERT_NO_FATAL_FAILURE(Open());
  const auto say_slab = [&](wire::Type type, uint32_t slab, uint64_t bytes) {
    daemon_.Say(RemoteMessage::kSend,
                PacketWriter(type, 1)
                    .Body(wire::SlabNotice{.slab = slab, .bytes = bytes})
                    .Bytes());
  };
  say_slab(wire::Type::kSlab, 1, 64_KiB);
  say_slab(wire::Type::kSlab, 1, 4_KiB);  // the first stays
  say_slab(wire::Type::kSlab, 2, UINT64_MAX);
  say_slab(wire::Type::kSlab, 3, 0);
  say_slab(wire::Type::kSlabRetired, 9, 0);
  daemon_.Say(RemoteMessage::kSend, {});
  daemon_.Say(
      RemoteMessage::kCall,
      PacketWriter(wire::Type::kPing, 1).Body(wire::SpaceRef{}).Bytes());
  daemon_.Say(static_cast<RemoteMessage>(1000), {});
  const std::vector<std::byte> torn(33);
  daemon_.Say(RemoteMessage::kCompletions, torn);
  std::vector<wire::RingEntry> entries(6);
  for (uint32_t i = 0; i < entries.size(); ++i) {
    entries[i].kind = static_cast<wire::Completion>(i + 1);
    entries[i].request = 4;
    entries[i].value = UINT64_MAX;
    entries[i].status = UINT32_MAX;
  }
  daemon_.Say(RemoteMessage::kCompletions, std::as_bytes(std::span(entries)));
  EXPECT_TRUE(Ping(Late()).ok());
  const auto slab = channel_->Slab(1);
  ASSERT_TRUE(slab.ok());
  EXPECT_EQ((*slab)->bytes().size(), 64_KiB);
  EXPECT_FALSE((*slab)->filled());
  EXPECT_FALSE(channel_->Slab(2).ok());
  EXPECT_FALSE(channel_->Slab(3).ok());
  EXPECT_FALSE(channel_->broken());
}

TEST_F(RemoteChannelTest, ASlabThatIsRetiredIsGivenBackByItsLastUser) {
  ASSERT_NO_FATAL_FAILURE(Open());
  const auto say = [&](wire::Type type) {
    daemon_.Say(RemoteMessage::kSend,
                PacketWriter(type, 1)
                    .Body(wire::SlabNotice{.slab = 1, .bytes = 64_KiB})
                    .Bytes());
  };
  say(wire::Type::kSlab);
  ASSERT_TRUE(Ping(Late()).ok());
  auto slab = channel_->Slab(1);
  ASSERT_TRUE(slab.ok());
  say(wire::Type::kSlabRetired);
  ASSERT_TRUE(Ping(Late()).ok());
  EXPECT_TRUE(absl::IsNotFound(channel_->Slab(1).status()));
  EXPECT_EQ(daemon_.Count(wire::Type::kUnmappedSlab), 0u);
  EXPECT_EQ((*slab)->bytes()[100], std::byte{0});  // still memory
  *slab = nullptr;
  daemon_.AwaitCount(wire::Type::kUnmappedSlab, 1);
}

TEST_F(RemoteChannelTest, AChildOfTheProcessHasNone) {
  ASSERT_NO_FATAL_FAILURE(Open());
  const absl::Time late = Late();  // the clock's lock may be taken in the child
  const pid_t child = fork();
  if (child == 0) {
    const bool right =
        absl::IsFailedPrecondition(
            channel_->Call(wire::Type::kPing, wire::SpaceRef{}, {}, late)
                .status()) &&
        !channel_->HasCompletions() &&
        absl::IsFailedPrecondition(channel_->Slab(1).status());
    _exit(right ? 0 : 1);
  }
  int status = 0;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
  EXPECT_TRUE(Ping(Late()).ok());
}

// ---- Both ends, over TLS, with threads ----

TEST(RemoteThreadsTest, HoldAndSaveFromManyThreadsWhileTheServerGoes) {
  constexpr int kThreads = 4, kRounds = 50;
  const auto Late = [] { return Clock::Real().Now() + absl::Seconds(60); };
  const TestCa ca;
  const TestCredentialFiles files(ca.certificate(), ca.Issue("host.test"));
  const auto transport = [&files] {
    TlsOptions options;
    options.ca_file = files.ca();
    options.certificate_file = files.certificate();
    options.key_file = files.key();
    auto made = NewTlsTransport(options);
    if (!made.ok()) ADD_FAILURE() << made.status();
    return *std::move(made);
  };
  const auto executor = NewThreadPool("test", 1);
  FakeEngine engine;
  FakeMemoryTier dram;
  dram.AddSlab(TenantId{}, 1_MiB, 0x5a);
  const auto hub = SessionHub::Create(
      {}, {.engine = &engine, .dram = &dram, .clock = &Clock::Real()});
  const auto server = RemoteServer::Create(hub, {}, *executor, Clock::Real());
  auto listening = transport();
  RemoteChannel::Options options;
  options.address = listening->Listen("127.0.0.1:0", *server).value();
  options.check = [](const Peer& peer) -> Status {
    if (peer.identity == "host.test") return absl::OkStatus();
    return absl::UnauthenticatedError(peer.identity);
  };
  const auto connected = RemoteChannel::Connect(transport(), options);
  ASSERT_TRUE(connected.ok()) << connected.status();
  LocalChannel& channel = **connected;
  const std::string encoded = EncodeSpace(SmallSpace());
  ASSERT_TRUE(channel
                  .Call(wire::Type::kOpenSpace,
                        wire::OpenSpace{.encoded_bytes = static_cast<uint32_t>(
                                            encoded.size())},
                        {std::as_bytes(std::span(encoded))}, Late())
                  .ok());
  std::atomic<int> loads{0}, saves{0}, over{0};
  const auto work = [&](int thread) {
    const auto staging = channel.CreateStaging(kRounds * 4096, Late());
    if (!staging.ok()) return;
    for (int round = 0; round < kRounds; ++round) {
      const auto ids = SomeIds(4);
      const auto reply = channel.Call(
          wire::Type::kHold,
          wire::Hold{
              .space = 1, .id_count = 4, .by_layer = uint8_t{round % 2 == 0}},
          {BytesOfArray(std::span(ids))}, Late());
      if (!reply.ok()) return;
      const uint64_t hold = reply->Body<wire::HoldReply>().hold;
      // Whose completions come here does not matter: they are counted until
      // nothing of this hold can be missing.
      std::memset((*staging)->bytes().data() + round * 4096, thread, 4096);
      const auto reserved = channel.Call(
          wire::Type::kReserve, wire::Reserve{.space = 1, .record_bytes = 4096},
          {}, Late());
      if (!reserved.ok()) return;
      if (!channel
               .Send(wire::Type::kCommit,
                     wire::Commit{
                         .reservation =
                             reserved->Body<wire::ReserveReply>().reservation,
                         .region = (*staging)->region(),
                         .offset = round * 4096U,
                         .bytes = 4096},
                     {}, Late(), channel.NewRequestId())
               .ok()) {
        return;
      }
      channel.SendLater(wire::Type::kReleaseHold, wire::HoldRef{.hold = hold});
      channel.Flush();
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      work(i);
      ++over;
    });
  }
  // Until each of them has done a good part, which the next lines interrupt.
  while (loads < 100 || saves < 100) {
    const uint64_t seen = channel.drained();
    channel.DrainCompletions([&](const wire::RingEntry& entry) {
      if (entry.kind == wire::Completion::kHoldChunk) {
        EXPECT_EQ(entry.status, 0u);
        ++loads;
      } else if (entry.kind == wire::Completion::kSave &&
                 entry.value == Raw(SaveStage::kVolatile)) {
        ++saves;
      }
    });
    if (over == kThreads && !channel.HasCompletions() && loads > 0) break;
    const Status waited =
        channel.WaitCompletions(seen, Clock::Real().Now() + absl::Seconds(1));
    ASSERT_TRUE(waited.ok() || absl::IsDeadlineExceeded(waited)) << waited;
  }
  EXPECT_GT(loads, 0);
  EXPECT_GT(saves, 0);
  listening = nullptr;
  for (std::thread& thread : threads) thread.join();
  EXPECT_FALSE(channel.WaitCompletions(UINT64_MAX, Late()).ok() &&
               !channel.broken());
  engine.AwaitClients(0);
}

}  // namespace
}  // namespace larder
