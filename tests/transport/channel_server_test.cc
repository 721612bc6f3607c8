// The two ends of the local transport over real sockets. Nothing here asserts a
// duration: what must come is waited for under the test's watchdog.

#include <dirent.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

#include "store/executor.h"
#include "tests/testing/fake_engine.h"
#include "tests/transport/session_harness.h"
#include "transport/local/channel.h"
#include "transport/local/server.h"

namespace larder {
namespace {

using ::testing::HasSubstr;
using wire::Type;

absl::Time After(absl::Duration wait) {
  return Clock::Real().Now() + wait;
}
absl::Time Never() {
  return absl::InfiniteFuture();
}

// What each open descriptor of this process leads to. Those into /proc and /sys
// are left out: this function's own, and what glibc and the sanitizers open for
// a moment on any thread (a first malloc reads /sys/devices/system/cpu/online).
std::vector<std::string> OpenDescriptors() {
  std::vector<std::string> targets;
  for (const auto& entry :
       std::filesystem::directory_iterator("/proc/self/fd")) {
    std::error_code gone;
    const auto target = std::filesystem::read_symlink(entry.path(), gone);
    if (!gone && !target.string().starts_with("/proc/") &&
        !target.string().starts_with("/sys/")) {
      targets.push_back(target);
    }
  }
  std::sort(targets.begin(), targets.end());
  return targets;
}

size_t MappedMemfds() {
  std::ifstream maps("/proc/self/maps");
  size_t count = 0;
  for (std::string line; std::getline(maps, line);) {
    if (line.find("memfd:") != std::string::npos) ++count;
  }
  return count;
}

class TempDir {
 public:
  TempDir() {
    char name[] = "/tmp/larder_transport_XXXXXX";
    path_ = mkdtemp(name);
  }
  ~TempDir() { std::filesystem::remove_all(path_); }
  std::string Socket() const { return path_ + "/socket"; }

 private:
  std::string path_;
};

// Gives the other threads time while something is awaited.
void Nap() {
  poll(nullptr, 0, 1);
}

class ServerTest : public ::testing::Test {
 protected:
  ServerTest() {
    dram_.AddSlab(TenantId{}, 256_KiB, 's');
    options_.socket_path = dir_.Socket();
    options_.log = [this](const std::string& line) {
      absl::MutexLock lock(&log_mu_);
      log_ += line + "\n";
    };
  }

  void Start() {
    auto server =
        LocalServer::Start(options_, engine_, dram_, *executor_, Clock::Real());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
  }
  StatusOr<std::shared_ptr<LocalChannel>> Connect() {
    return LocalChannel::Connect(
        {.socket_path = dir_.Socket(), .client_name = "test"});
  }
  std::string log() {
    absl::MutexLock lock(&log_mu_);
    return log_;
  }

  static uint32_t OpenSpace(LocalChannel& channel) {
    const std::string space = EncodeSpace(SmallSpace());
    const auto reply =
        channel.Call(Type::kOpenSpace,
                     wire::OpenSpace{static_cast<uint32_t>(space.size()), 0},
                     {BytesOfArray(std::span<const char>(space))}, Never());
    EXPECT_TRUE(reply.ok()) << reply.status();
    return reply->Body<wire::OpenSpaceReply>().handle;
  }
  static StatusOr<Packet> Hold(LocalChannel& channel, size_t count,
                               absl::Time deadline = Never()) {
    const auto ids = SomeIds(count);
    return channel.Call(
        Type::kHold,
        wire::Hold{.space = 1, .id_count = static_cast<uint32_t>(count)},
        {BytesOfArray(std::span<const ChunkId>(ids))}, deadline);
  }
  static void Release(LocalChannel& channel, uint64_t hold) {
    EXPECT_TRUE(
        channel
            .Send(Type::kReleaseHold, wire::HoldRef{.hold = hold}, {}, Never())
            .ok());
  }

  TempDir dir_;
  FakeMemoryTier dram_;
  FakeEngine engine_;
  std::unique_ptr<Executor> executor_ = NewThreadPool("test", 1);
  LocalServer::Options options_;
  absl::Mutex log_mu_;
  std::string log_;
  std::unique_ptr<LocalServer> server_;  // last: its threads use the others
};

// A client or daemon that does what a test wants.
class RawSocket {
 public:
  explicit RawSocket(UniqueFd fd) : fd_(std::move(fd)) {}
  static RawSocket ConnectTo(const std::string& path) {
    RawSocket raw(UniqueFd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)));
    const sockaddr_un address = Address(path);
    if (connect(raw.fd_.get(), reinterpret_cast<const sockaddr*>(&address),
                sizeof address) != 0) {
      std::abort();
    }
    return raw;
  }
  static RawSocket Listen(const std::string& path) {
    RawSocket raw(UniqueFd(socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC, 0)));
    const sockaddr_un address = Address(path);
    if (bind(raw.fd_.get(), reinterpret_cast<const sockaddr*>(&address),
             sizeof address) != 0 ||
        listen(raw.fd_.get(), 8) != 0) {
      std::abort();
    }
    return raw;
  }
  RawSocket Accept() {
    return RawSocket(UniqueFd(accept4(fd_.get(), nullptr, nullptr, 0)));
  }
  bool Send(const std::vector<std::byte>& packet, std::span<const int> fds = {},
            int flags = 0) {
    (void)flags;
    iovec piece = {const_cast<std::byte*>(packet.data()), packet.size()};
    msghdr message = {};
    message.msg_iov = &piece;
    message.msg_iovlen = 1;
    alignas(cmsghdr) char control[CMSG_SPACE(16 * sizeof(int))];
    if (!fds.empty()) {
      message.msg_control = control;
      message.msg_controllen = CMSG_SPACE(fds.size_bytes());
      cmsghdr* header = CMSG_FIRSTHDR(&message);
      header->cmsg_level = SOL_SOCKET;
      header->cmsg_type = SCM_RIGHTS;
      header->cmsg_len = CMSG_LEN(fds.size_bytes());
      std::memcpy(CMSG_DATA(header), fds.data(), fds.size_bytes());
    }
    return sendmsg(fd_.get(), &message, MSG_NOSIGNAL) >= 0;
  }
  bool Send(PacketWriter writer) { return Send(writer.Bytes()); }
  // Empty at the end.
  std::vector<std::byte> Receive() {
    std::vector<std::byte> bytes(wire::kMaxMessageBytes);
    ssize_t size;
    do {
      size = recv(fd_.get(), bytes.data(), bytes.size(), 0);
    } while (size < 0 && (errno == EINTR || errno == ECONNRESET));
    bytes.resize(size > 0 ? static_cast<size_t>(size) : 0);
    return bytes;
  }
  int fd() const { return fd_.get(); }
  void Close() { fd_.reset(); }

 private:
  static sockaddr_un Address(const std::string& path) {
    sockaddr_un address = {};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, path.data(), path.size());
    return address;
  }
  UniqueFd fd_;
};

// Accepts one client, says welcome, and leaves the rest to the test.
class RawDaemon {
 public:
  explicit RawDaemon(const std::string& path)
      : listener_(RawSocket::Listen(path)), client_(UniqueFd()) {}

  std::shared_ptr<LocalChannel> Welcome(const std::string& path) {
    std::shared_ptr<LocalChannel> channel;
    std::thread connector([&] {
      auto connected = LocalChannel::Connect({.socket_path = path});
      if (connected.ok()) channel = *connected;
    });
    client_ = listener_.Accept();
    client_.Receive();
    port_ = *CompletionPortForTest();
    wire::HelloReply welcome;
    welcome.max_staging_bytes = 1_MiB;
    client_.Send(PacketWriter(Type::kReply, 1).Body(welcome).Bytes(),
                 std::array<int, 2>{ring_.get(), bell_read_.get()});
    connector.join();
    return channel;
  }
  RawSocket& client() { return client_; }

 private:
  std::optional<int> CompletionPortForTest() {
    ring_.reset(memfd_create("ring", MFD_CLOEXEC | MFD_ALLOW_SEALING));
    if (ftruncate(ring_.get(), 256_KiB) != 0) std::abort();
    const wire::RingHeader header;
    if (pwrite(ring_.get(), &header, sizeof header, 0) < 0) std::abort();
    fcntl(ring_.get(), F_ADD_SEALS, F_SEAL_SHRINK);
    int bell[2];
    if (pipe2(bell, O_CLOEXEC | O_NONBLOCK) != 0) std::abort();
    bell_read_.reset(bell[0]);
    bell_write_.reset(bell[1]);
    return 0;
  }

  RawSocket listener_;
  RawSocket client_;
  UniqueFd ring_, bell_read_, bell_write_;
  int port_ = 0;
};

// ---- Working together ----

TEST_F(ServerTest, HoldMapRelease) {
  Start();
  const auto channel = Connect();
  ASSERT_TRUE(channel.ok()) << channel.status();
  EXPECT_EQ((*channel)->session().minor, wire::kMinor);
  EXPECT_EQ((*channel)->session().max_holds, 4096U);
  EXPECT_EQ((*channel)->Slab(1).status().code(), absl::StatusCode::kNotFound);
  ASSERT_EQ(OpenSpace(**channel), 1U);
  const auto reply = Hold(**channel, 3);
  ASSERT_TRUE(reply.ok()) << reply.status();
  const auto slab = (*channel)->Slab(1);
  ASSERT_TRUE(slab.ok()) << slab.status();
  EXPECT_EQ((*slab)->bytes().size(), 256_KiB);
  EXPECT_EQ((*slab)->bytes()[77], std::byte{'s'});
  Release(**channel, reply->Body<wire::HoldReply>().hold);
  engine_.AwaitHolds(0);
  (*channel)->Close();
  engine_.AwaitClients(0);
  EXPECT_EQ((*slab)->bytes()[99], std::byte{'s'});  // still mapped
  EXPECT_EQ(Hold(**channel, 3).status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(ServerTest, ErrorsCarryTheDaemonsText) {
  Start();
  const auto channel = *Connect();
  const Status status = Hold(*channel, 1).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(status.message()), HasSubstr("space"));
  EXPECT_FALSE(channel->broken());
  const std::vector<std::byte> large(wire::kMaxMessageBytes);
  EXPECT_EQ(channel->Call(Type::kPing, wire::SpaceRef{}, {large}, Never())
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
  const auto why =
      channel->Call(Type::kList, wire::List{.space = 9}, {}, Never());
  EXPECT_EQ(why.status().code(), absl::StatusCode::kNotFound);
}

TEST_F(ServerTest, TwoHundredClients) {
  options_.threads = 2;
  Start();
  std::vector<std::thread> threads;
  std::atomic<int> good{0};
  absl::Mutex mu;
  std::vector<std::shared_ptr<LocalChannel>> channels;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 50; ++i) {
        auto channel = Connect();
        if (!channel.ok()) continue;
        OpenSpace(**channel);
        if (Hold(**channel, 8).ok()) ++good;
        absl::MutexLock lock(&mu);
        channels.push_back(*channel);
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(good, 200);
  EXPECT_EQ(engine_.clients(), 200U);
  EXPECT_EQ(engine_.holds(), 200U);
  EXPECT_EQ(server_->stats().clients, 200U);
  channels.clear();
  engine_.AwaitClients(0);
  EXPECT_EQ(engine_.holds(), 0U);
}

TEST_F(ServerTest, ManyCallersOnOneChannel) {
  Start();
  const auto channel = *Connect();
  OpenSpace(*channel);
  std::vector<std::thread> threads;
  std::atomic<int> wrong{0};
  for (uint32_t t = 0; t < 8; ++t) {
    threads.emplace_back([&, t] {
      const auto ids = SomeIds(64);
      for (uint32_t i = 0; i < 300; ++i) {
        const uint32_t count = 1 + (t * 7 + i) % 64;
        // Infinite, long and short deadlines wait in different ways.
        const absl::Time deadline = i % 3 == 0   ? Never()
                                    : i % 3 == 1 ? After(absl::Minutes(5))
                                                 : After(absl::Seconds(30));
        const auto reply = channel->Call(
            Type::kMatch, wire::Match{.space = 1, .id_count = count},
            {BytesOfArray(std::span<const ChunkId>(ids).first(count))},
            deadline);
        if (!reply.ok() || reply->Body<wire::MatchReply>().usable != count ||
            reply->Detail() != "all there") {
          ++wrong;
        }
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// Many calls from many threads, all of each thread's sent before it reads:
// every one gets its own reply, and whoever waits always has somebody who
// reads.
TEST_F(ServerTest, CallsSentTogether) {
  Start();
  auto channel = *Connect();
  const uint32_t space = OpenSpace(*channel);
  std::vector<std::thread> threads;
  std::atomic<int> good{0};
  for (uint32_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (int round = 0; round < 20; ++round) {
        std::vector<wire::HoldRef> wrong(t * 50 + 1);
        for (const auto& reply : channel->CallEach<wire::HoldRef>(
                 Type::kRenewHold, wrong, Never())) {
          if (!reply.ok() && !channel->broken()) ++good;
        }
        std::vector<wire::Lookup> empty(t * 50 + 1);
        for (wire::Lookup& body : empty) body.space = space;
        for (const auto& reply :
             channel->CallEach<wire::Lookup>(Type::kLookup, empty, Never())) {
          if (reply.ok()) ++good;
        }
        if (Hold(*channel, 3).ok()) ++good;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(good, 20 * (2 * (1 + 51 + 101 + 151) + 4));
}

TEST_F(ServerTest, CallsSentTogetherEndWithTheDeadlineOrTheDaemon) {
  RawDaemon daemon(dir_.Socket());
  const auto channel = daemon.Welcome(dir_.Socket());
  ASSERT_NE(channel, nullptr);
  const std::vector<wire::SpaceRef> bodies(500);
  const auto late = channel->CallEach<wire::SpaceRef>(
      Type::kStats, bodies, After(absl::Milliseconds(20)));
  ASSERT_EQ(late.size(), bodies.size());
  for (const auto& reply : late) {
    EXPECT_TRUE(absl::IsDeadlineExceeded(reply.status())) << reply.status();
  }
  EXPECT_FALSE(channel->broken());
  channel->Close();
  const auto gone =
      channel->CallEach<wire::SpaceRef>(Type::kStats, bodies, Never());
  ASSERT_EQ(gone.size(), bodies.size());
  for (const auto& reply : gone) {
    EXPECT_TRUE(absl::IsUnavailable(reply.status())) << reply.status();
  }
}

TEST_F(ServerTest, CommitsAndCompletions) {
  Start();
  const auto channel = *Connect();
  OpenSpace(*channel);
  auto staging = channel->CreateStaging(10'000, Never());
  ASSERT_TRUE(staging.ok()) << staging.status();
  EXPECT_EQ((*staging)->bytes().size(), 12'288U);
  EXPECT_EQ(channel->WaitCompletions(0, After(absl::Milliseconds(5))).code(),
            absl::StatusCode::kDeadlineExceeded);
  std::atomic<uint64_t> durable{0};
  constexpr uint64_t kCommits = 2000;  // more completions than the ring has
  const auto drain = [&] {
    channel->DrainCompletions([&](const wire::RingEntry& entry) {
      if (entry.kind == wire::Completion::kSave &&
          entry.value == Raw(SaveStage::kDurable)) {
        ++durable;
      }
    });
  };
  std::vector<std::thread> waiters;
  for (int i = 0; i < 3; ++i) {
    waiters.emplace_back([&] {
      for (;;) {
        const uint64_t seen = channel->drained();
        if (durable == kCommits) return;
        if (!channel->WaitCompletions(seen, Never()).ok()) return;
        drain();
      }
    });
  }
  for (uint64_t i = 0; i < kCommits; ++i) {
    StatusOr<Packet> reserved;
    do {  // room in the ring comes with what the waiters read
      reserved = channel->Call(Type::kReserve,
                               wire::Reserve{.space = 1, .record_bytes = 4096},
                               {}, Never());
    } while (absl::IsResourceExhausted(reserved.status()));
    ASSERT_TRUE(reserved.ok()) << reserved.status();
    const wire::Commit commit{
        .reservation = reserved->Body<wire::ReserveReply>().reservation,
        .region = (*staging)->region(),
        .want_durable = 1,
        .bytes = 4096};
    ASSERT_TRUE(
        channel
            ->Send(Type::kCommit, commit, {}, Never(), channel->NewRequestId())
            .ok());
  }
  for (auto& waiter : waiters) waiter.join();
  EXPECT_EQ(durable, kCommits);
  EXPECT_EQ(channel->drained(), 3 * kCommits);
  // The bell is silent when there is nothing.
  drain();
  pollfd bell = {.fd = channel->event_fd(), .events = POLLIN, .revents = 0};
  EXPECT_EQ(poll(&bell, 1, 0), 0);
}

// A thread that polls the bell while another drains what it waits for: the bell
// is silent by then, and no other will ring.
TEST_F(ServerTest, APollingWaiterLearnsThatAnotherDrained) {
  FakeEngine::Behaviour behaviour;
  behaviour.state = ChunkState::kPending;
  engine_.Set(behaviour);
  Start();
  const auto channel = *Connect();
  OpenSpace(*channel);
  for (int round = 0; round < 200; ++round) {
    ASSERT_TRUE(Hold(*channel, 1).ok());
    const uint64_t seen = channel->drained();
    std::thread waiter(
        [&] { EXPECT_TRUE(channel->WaitCompletions(seen, Never()).ok()); });
    if (round % 2 == 0) Nap();
    for (auto& chunk : engine_.TakePending()) {
      (*chunk.progress)(chunk.index, MissReason::kNone);
    }
    while (channel->DrainCompletions([](const wire::RingEntry&) {}) == 0) {
    }
    waiter.join();
  }
}

TEST_F(ServerTest, SlabRetirement) {
  absl::Notification gone;
  std::atomic<bool> told{false};
  std::atomic<bool> retired{false};
  options_.housekeeping_period = absl::Milliseconds(1);
  options_.retired_slabs = [&] {
    return retired ? std::vector<uint32_t>{1} : std::vector<uint32_t>{};
  };
  options_.slab_unmapped_everywhere = [&](uint32_t slab) {
    EXPECT_EQ(slab, 1U);
    retired = false;
    // Housekeeping may say so once more, from a thread of its own.
    if (!told.exchange(true)) gone.Notify();
  };
  Start();
  // The daemon's threads use what lies on this stack.
  const absl::Cleanup stop = [&] { server_.reset(); };
  const auto channel = *Connect();
  const auto other = *Connect();
  OpenSpace(*channel);
  OpenSpace(*other);
  ASSERT_TRUE(Hold(*channel, 1).ok());
  ASSERT_TRUE(Hold(*other, 1).ok());
  auto mapping = *channel->Slab(1);
  retired = true;
  // The notice rings the bell of clients that do nothing.
  while (channel->Slab(1).ok()) {
    pollfd bell = {.fd = channel->event_fd(), .events = POLLIN, .revents = 0};
    poll(&bell, 1, -1);
    channel->DrainCompletions([](const wire::RingEntry&) {});
  }
  EXPECT_EQ(other->WaitCompletions(0, After(absl::Milliseconds(200))).code(),
            absl::StatusCode::kDeadlineExceeded);
  EXPECT_FALSE(other->Slab(1).ok());
  EXPECT_FALSE(gone.HasBeenNotified());
  EXPECT_EQ(mapping->bytes()[0], std::byte{'s'});
  mapping.reset();
  gone.WaitForNotification();
}

TEST_F(ServerTest, SlabThatIsNotSealedIsRefused) {
  FakeEngine::Behaviour behaviour;
  behaviour.slab = dram_.AddSlab(TenantId{}, 64_KiB, 'u', F_SEAL_SHRINK);
  engine_.Set(behaviour);
  Start();
  const auto channel = *Connect();
  OpenSpace(*channel);
  EXPECT_EQ(Hold(*channel, 1).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_TRUE(channel->broken());
  EXPECT_THAT(std::string(channel->reason().message()), HasSubstr("sealed"));
}

TEST_F(ServerTest, NothingLeaks) {
  const std::vector<std::string> fds_before = OpenDescriptors();
  const size_t maps_before = MappedMemfds();
  Start();
  for (int i = 0; i < 20; ++i) {
    auto channel = *Connect();
    OpenSpace(*channel);
    ASSERT_TRUE(Hold(*channel, 3).ok());
    auto slab = *channel->Slab(1);
    auto staging = *channel->CreateStaging(64_KiB, Never());
    auto dropped = channel->CreateStaging(64_KiB, Never());
    dropped->reset();
    if (i % 2 == 0) channel.reset();  // mappings outlive their channel
  }
  engine_.AwaitClients(0);
  server_.reset();
  EXPECT_EQ(OpenDescriptors(), fds_before);
  EXPECT_EQ(MappedMemfds(), maps_before);
}

// ---- Time and failure ----

TEST_F(ServerTest, DeadlinesOfADaemonThatNeverAnswers) {
  RawDaemon daemon(dir_.Socket());
  const auto channel = daemon.Welcome(dir_.Socket());
  ASSERT_NE(channel, nullptr);
  std::vector<std::thread> threads;
  std::atomic<int> late{0};
  for (const int ms : {0, 1, 5, 30, 45, 100, 3, 60}) {
    threads.emplace_back([&, ms] {
      const absl::Time deadline = After(absl::Milliseconds(ms));
      const auto reply =
          channel->Call(Type::kStats, wire::SpaceRef{}, {}, deadline);
      if (absl::IsDeadlineExceeded(reply.status()) &&
          Clock::Real().Now() >= deadline) {
        ++late;
      }
    });
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(late, 8);
  EXPECT_FALSE(channel->broken());
  EXPECT_EQ(channel->CreateStaging(4096, After(absl::Milliseconds(1)))
                .status()
                .code(),
            absl::StatusCode::kDeadlineExceeded);
  // It reads nothing either.
  Status status;
  while (status.ok()) {
    status = channel->Send(Type::kCredit, wire::SpaceRef{}, {},
                           After(absl::Milliseconds(5)));
  }
  EXPECT_EQ(status.code(), absl::StatusCode::kDeadlineExceeded);
  EXPECT_FALSE(channel->broken());
}

TEST_F(ServerTest, WhatComesLateIsGivenBack) {
  RawDaemon daemon(dir_.Socket());
  const auto channel = daemon.Welcome(dir_.Socket());
  ASSERT_NE(channel, nullptr);
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      Hold(*channel, 1, After(absl::Milliseconds(1))).status()));
  const auto hold = PacketView::Parse(daemon.client().Receive());
  EXPECT_EQ(hold->header().type, Type::kHold);
  daemon.client().Send(PacketWriter(Type::kReply, hold->header().request)
                           .Body(wire::HoldReply{.hold = 4711}));
  std::thread caller([&] {
    EXPECT_TRUE(
        channel->Call(Type::kStats, wire::SpaceRef{}, {}, Never()).ok());
  });
  bool released = false;
  bool answered = false;
  while (!released || !answered) {
    const auto bytes = daemon.client().Receive();
    const auto view = PacketView::Parse(bytes);
    ASSERT_TRUE(view.ok());
    if (view->header().type == Type::kReleaseHold) {
      EXPECT_EQ(view->Body<wire::HoldRef>().hold, 4711U);
      released = true;
    } else {
      daemon.client().Send(PacketWriter(Type::kReply, view->header().request)
                               .Body(wire::ReplyHead{}));
      answered = true;
    }
  }
  caller.join();
}

TEST_F(ServerTest, RepliesInAnyOrderReachTheirCallers) {
  RawDaemon daemon(dir_.Socket());
  const auto channel = daemon.Welcome(dir_.Socket());
  ASSERT_NE(channel, nullptr);
  std::vector<std::thread> threads;
  std::atomic<int> right{0};
  for (uint64_t t = 0; t < 10; ++t) {
    threads.emplace_back([&, t] {
      const auto reply = channel->Call(
          Type::kAdvanceEpoch, wire::Abort{.reservation = t}, {}, Never());
      if (reply.ok() && reply->Body<wire::EpochReply>().epoch == 100 + t) {
        ++right;
      }
    });
  }
  std::vector<std::pair<uint64_t, uint64_t>> calls;
  while (calls.size() < 10) {
    const auto bytes = daemon.client().Receive();
    const auto view = PacketView::Parse(bytes);
    calls.emplace_back(view->header().request,
                       view->Body<wire::Abort>().reservation);
  }
  std::reverse(calls.begin(), calls.end());
  for (const auto& [request, t] : calls) {
    daemon.client().Send(PacketWriter(Type{200}, 0));  // of a newer daemon
    daemon.client().Send(PacketWriter(Type::kReply, request)
                             .Body(wire::EpochReply{.epoch = 100 + t}));
  }
  for (auto& thread : threads) thread.join();
  EXPECT_EQ(right, 10);
}

TEST_F(ServerTest, ADaemonThatDiesOrTalksNonsense) {
  for (const bool nonsense : {false, true}) {
    RawDaemon daemon(dir_.Socket());
    const auto channel = daemon.Welcome(dir_.Socket());
    ASSERT_NE(channel, nullptr);
    std::vector<std::thread> threads;
    std::atomic<int> unavailable{0};
    for (int t = 0; t < 6; ++t) {
      threads.emplace_back([&, t] {
        const Status status =
            t == 0 ? channel->WaitCompletions(0, Never())
                   : channel->Call(Type::kStats, wire::SpaceRef{}, {}, Never())
                         .status();
        if (absl::IsUnavailable(status)) ++unavailable;
      });
    }
    for (int t = 1; t < 6; ++t) daemon.client().Receive();
    if (nonsense) {
      daemon.client().Send(std::vector<std::byte>(40, std::byte{1}));
    } else {
      daemon.client().Close();
    }
    for (auto& thread : threads) thread.join();
    EXPECT_EQ(unavailable, 6);
    EXPECT_TRUE(channel->broken());
    EXPECT_EQ(
        channel->Send(Type::kCredit, wire::SpaceRef{}, {}, Never()).code(),
        absl::StatusCode::kUnavailable);
    std::filesystem::remove(dir_.Socket());
  }
}

TEST_F(ServerTest, RestartedDaemon) {
  Start();
  const auto channel = *Connect();
  FakeEngine::Behaviour behaviour;
  behaviour.finish_epochs = false;  // a call that is never answered
  engine_.Set(behaviour);
  OpenSpace(*channel);
  std::thread caller([&] {
    EXPECT_TRUE(absl::IsUnavailable(
        channel
            ->Call(Type::kAdvanceEpoch, wire::SpaceRef{.space = 1}, {}, Never())
            .status()));
  });
  while (engine_.TakeEpochs().empty()) Nap();
  server_->Stop(absl::Seconds(1));
  server_->Stop(absl::Seconds(1));
  caller.join();
  EXPECT_TRUE(channel->broken());
  EXPECT_EQ(Connect().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_FALSE(std::filesystem::exists(dir_.Socket()));
  server_.reset();
  Start();
  EXPECT_TRUE(Connect().ok());
}

// Every newcomer rings the server's bell, and so does Stop: one ring must not
// be taken for both. Here Stop rings while a newcomer is being shown out.
TEST_F(ServerTest, StopsWhileItDropsANewcomer) {
  for (int turn = 0; turn < 20; ++turn) {
    std::thread stopper;
    absl::Notification shown_out;
    options_.log = [&](const std::string&) {
      stopper = std::thread([&] { server_->Stop(absl::ZeroDuration()); });
      Nap();  // Stop has rung
      shown_out.Notify();
    };
    Start();
    RawSocket visitor = RawSocket::ConnectTo(dir_.Socket());
    ASSERT_TRUE(visitor.Send({std::byte{1}}));  // not a packet
    shown_out.WaitForNotification();
    stopper.join();
    server_.reset();
  }
}

// ---- The socket file ----

TEST_F(ServerTest, SocketFiles) {
  options_.socket_mode = 0600;
  Start();
  struct stat file;
  ASSERT_EQ(stat(dir_.Socket().c_str(), &file), 0);
  EXPECT_EQ(file.st_mode & 0777, 0600U);
  auto second =
      LocalServer::Start(options_, engine_, dram_, *executor_, Clock::Real());
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("another"));
  EXPECT_TRUE(Connect().ok());  // the first is unharmed
  server_.reset();
  {
    // What a killed daemon leaves: a socket that nobody listens on.
    const RawSocket dead = RawSocket::Listen(dir_.Socket());
  }
  EXPECT_TRUE(std::filesystem::exists(dir_.Socket()));
  Start();
  EXPECT_TRUE(Connect().ok());
  server_.reset();
  {
    // A live one that knows nothing of the lock.
    const RawSocket live = RawSocket::Listen(dir_.Socket());
    second =
        LocalServer::Start(options_, engine_, dram_, *executor_, Clock::Real());
    EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
    std::filesystem::remove(dir_.Socket());
  }
  std::ofstream(dir_.Socket()) << "precious";
  second =
      LocalServer::Start(options_, engine_, dram_, *executor_, Clock::Real());
  EXPECT_EQ(second.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(std::filesystem::file_size(dir_.Socket()), 8U);
  options_.socket_path = std::string(200, 'x');
  second =
      LocalServer::Start(options_, engine_, dram_, *executor_, Clock::Real());
  EXPECT_EQ(second.status().code(), absl::StatusCode::kInvalidArgument);
}

// ---- Clients that misbehave ----

TEST_F(ServerTest, OneClientTooMany) {
  options_.max_clients = 2;
  Start();
  const auto a = Connect();
  const auto b = Connect();
  const auto c = Connect();
  EXPECT_TRUE(a.ok() && b.ok());
  EXPECT_EQ(c.status().code(), absl::StatusCode::kResourceExhausted)
      << c.status();
  EXPECT_THAT(std::string(c.status().message()), HasSubstr("2 clients"));
}

TEST_F(ServerTest, RefusedByTokenOrVersion) {
  options_.session.tenant_of =
      [](const PeerIdentity& peer) -> StatusOr<TenantId> {
    if (peer.uid != getuid() || peer.pid != getpid() ||
        peer.token != std::string_view("sesame")) {
      return absl::PermissionDeniedError("who are you");
    }
    return TenantId{3};
  };
  Start();
  EXPECT_EQ(Connect().status().code(), absl::StatusCode::kPermissionDenied);
  const auto good =
      LocalChannel::Connect({.socket_path = dir_.Socket(), .token = "sesame"});
  ASSERT_TRUE(good.ok()) << good.status();
  EXPECT_EQ((*good)->session().tenant, TenantId{3});
  RawSocket raw = RawSocket::ConnectTo(dir_.Socket());
  raw.Send(PacketWriter(Type::kHello, 1).Body(wire::Hello{.major = 9}));
  const auto bytes = raw.Receive();
  const auto view = PacketView::Parse(bytes);
  ASSERT_TRUE(view.ok());
  EXPECT_EQ(view->Body<wire::ReplyHead>().status,
            static_cast<int>(absl::StatusCode::kFailedPrecondition));
  EXPECT_TRUE(raw.Receive().empty());
  while (log().find(absl::StrCat("protocol 9.", wire::kMinor)) ==
         std::string::npos)
    Nap();
}

TEST_F(ServerTest, NoHelloInTime) {
  options_.hello_timeout = absl::Milliseconds(20);
  Start();
  RawSocket silent = RawSocket::ConnectTo(dir_.Socket());
  EXPECT_TRUE(silent.Receive().empty());
  EXPECT_TRUE(Connect().ok());
  while (log().empty()) Nap();
  EXPECT_THAT(log(), HasSubstr("hello"));
}

TEST_F(ServerTest, AClientThatDoesNotRead) {
  options_.send_queue_bytes = 2 * wire::kMaxMessageBytes;
  Start();
  RawSocket lazy = RawSocket::ConnectTo(dir_.Socket());
  ASSERT_TRUE(lazy.Send(PacketWriter(Type::kHello, 1).Body(wire::Hello{})));
  while (lazy.Send(
      PacketWriter(Type::kWhyMiss, 2).Body(wire::WhyMiss{.space = 1}))) {
  }
  engine_.AwaitClients(0);
  while (log().empty()) Nap();
  EXPECT_THAT(log(), HasSubstr("does not read its socket"));
}

TEST_F(ServerTest, NonsenseOnTheSocket) {
  Start();
  for (const size_t size : {1UL, 24UL, 4096UL, size_t{wire::kMaxMessageBytes},
                            size_t{wire::kMaxMessageBytes} + 1}) {
    RawSocket raw = RawSocket::ConnectTo(dir_.Socket());
    EXPECT_TRUE(raw.Send(std::vector<std::byte>(size, std::byte{0x41})));
    EXPECT_TRUE(raw.Receive().empty());
  }
  // More descriptors than any packet may have.
  RawSocket raw = RawSocket::ConnectTo(dir_.Socket());
  const std::vector<int> fds(16, raw.fd());
  const size_t before = OpenDescriptors().size();
  EXPECT_TRUE(
      raw.Send(PacketWriter(Type::kHello, 1).Body(wire::Hello{}).Bytes(), fds));
  EXPECT_TRUE(raw.Receive().empty());
  raw.Close();
  while (server_->stats().clients != 0) Nap();
  EXPECT_LT(OpenDescriptors().size(), before);
  EXPECT_TRUE(Connect().ok());
}

// ---- Processes ----

// A client killed while a child of it keeps the socket open.
TEST_F(ServerTest, DeathOfAProcess) {
  int go[2];
  ASSERT_EQ(pipe(go), 0);
  const std::string path = dir_.Socket();
  const pid_t child = fork();  // before any thread is started but the pool's
  if (child == 0) {
    char start;
    if (read(go[0], &start, 1) != 1) _exit(2);
    RawSocket raw = RawSocket::ConnectTo(path);
    raw.Send(PacketWriter(Type::kHello, 1).Body(wire::Hello{}));
    raw.Receive();
    if (fork() == 0) {  // holds the socket until the test closes the pipe
      close(go[1]);
      while (read(go[0], &start, 1) == 1) {
      }
      _exit(0);
    }
    kill(getpid(), SIGKILL);
  }
  Start();
  ASSERT_EQ(write(go[1], "g", 1), 1);
  int status;
  waitpid(child, &status, 0);
  engine_.AwaitClients(0);
  while (server_->stats().clients != 0 || server_->stats().accepted != 1) Nap();
  close(go[1]);
  close(go[0]);
}

TEST_F(ServerTest, AForkedChildCannotUseTheChannel) {
  Start();
  auto channel = *Connect();
  OpenSpace(*channel);
  ASSERT_TRUE(Hold(*channel, 1).ok());
  auto slab = *channel->Slab(1);
  auto staging = *channel->CreateStaging(4096, Never());
  const pid_t child = fork();
  if (child == 0) {
    const bool refused =
        Hold(*channel, 1).status().code() ==
            absl::StatusCode::kFailedPrecondition &&
        channel->Slab(1).status().code() ==
            absl::StatusCode::kFailedPrecondition &&
        channel->DrainCompletions([](const wire::RingEntry&) {}) == 0;
    staging.reset();
    slab.reset();
    channel.reset();
    _exit(refused ? 0 : 1);
  }
  int status = 0;
  waitpid(child, &status, 0);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  EXPECT_TRUE(Hold(*channel, 1).ok());  // the parent's stream is unharmed
  EXPECT_EQ(slab->bytes()[1], std::byte{'s'});
}

}  // namespace
}  // namespace larder
