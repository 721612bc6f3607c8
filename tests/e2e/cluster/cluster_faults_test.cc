// What becomes of a cluster of real daemons when its network, its processes,
// its etcd or its clocks fail. What every test asserts, and no durations: an
// engine gets right bytes or a miss; daemons stay; whole prompts come again
// without a restart of who survived; nothing is held or reserved in the end.

#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/socket.h>

#include <iterator>
#include <random>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "gmock/gmock.h"

#include "tests/e2e/cluster/fault_cluster.h"
#include "transport/link/frame.h"

namespace larder {
namespace {

using testing::HasSubstr;

// ---- The network, by the network that nodes use

class NetworkFaults : public FaultCluster,
                      public testing::WithParamInterface<const char*> {
 protected:
  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(FaultCluster::SetUp());
    ASSERT_NO_FATAL_FAILURE(StartPair(GetParam() == std::string("ucx")));
    ASSERT_NO_FATAL_FAILURE(StartLoad());
  }
};
INSTANTIATE_TEST_SUITE_P(Networks, NetworkFaults, testing::Values("tls", "ucx"),
                         [](const auto& network) { return network.param; });

TEST_P(NetworkFaults, TheCableIsOutAndInAgain) {
  for (const FaultNode* node : {a_, b_}) {
    ASSERT_TRUE(network_->LinkDown(node->host()).ok());
    Misses();
    ASSERT_TRUE(network_->LinkUp(node->host()).ok());
    GoesOn();
  }
}

TEST_P(NetworkFaults, PacketsAreLost) {
  ASSERT_TRUE(network_->Lose(5).ok());
  SomeCome(3);
  ASSERT_TRUE(network_->Heal().ok());
  GoesOn();
}

TEST_P(NetworkFaults, ATenthOfTheBandwidthIsLeft) {
  ASSERT_TRUE(network_->LimitBandwidth(a_->host(), 2'000'000'000).ok());
  GoesOn();
  ASSERT_TRUE(network_->LimitBandwidth(a_->host(), 200'000'000).ok());
  SomeCome(3);
  // So little that no prompt comes in time.
  ASSERT_TRUE(network_->LimitBandwidth(a_->host(), 8'000'000).ok());
  Misses();
  ASSERT_TRUE(network_->Heal().ok());
  GoesOn();
}

TEST_P(NetworkFaults, WhoGivesIsKilledInTheMiddle) {
  // So slow that there is a middle.
  ASSERT_TRUE(network_->LimitBandwidth(a_->host(), 200'000'000).ok());
  SomeCome(1);
  a_->Kill();
  Misses();
  ASSERT_TRUE(network_->Heal().ok());
  ASSERT_NO_FATAL_FAILURE(a_->Start());
  GoesOn();
}

TEST_P(NetworkFaults, WhoGetsIsKilledInTheMiddle) {
  ASSERT_TRUE(network_->LimitBandwidth(a_->host(), 200'000'000).ok());
  SomeCome(1);
  b_->Kill();
  loading_ = nullptr;
  ASSERT_TRUE(network_->Heal().ok());
  ASSERT_NO_FATAL_FAILURE(b_->Start());
  StartLoad();
}

TEST_P(NetworkFaults, WhoGivesStopsAndGoesOn) {
  a_->Signal(SIGSTOP);
  Misses();
  a_->Signal(SIGCONT);
  GoesOn();
}

TEST_P(NetworkFaults, WhoGetsStopsAndGoesOn) {
  a_->ForgetLog();
  b_->Signal(SIGSTOP);
  // Gone for the other: its lease has ended.
  ASSERT_TRUE(a_->Says("cluster: 1 nodes"));
  b_->Signal(SIGCONT);
  GoesOn();
}

// What b has of a is half open: nobody told it that the other end died.
TEST_P(NetworkFaults, HalfOpenConnections) {
  ASSERT_TRUE(network_->Partition(a_->host(), b_->host()).ok());
  a_->Kill();
  ASSERT_NO_FATAL_FAILURE(a_->Start());
  Misses();
  ASSERT_TRUE(network_->Join(a_->host(), b_->host()).ok());
  GoesOn();
}

TEST_P(NetworkFaults, PacketsOfOneDirectionAreLost) {
  ASSERT_TRUE(network_->DropOneWay(a_->host(), b_->host()).ok());
  Misses();
  ASSERT_TRUE(network_->Heal().ok());
  GoesOn();
}

// ---- What is sent to a node that waits for it

class SendingFaults : public FaultCluster,
                      public testing::WithParamInterface<const char*> {
 protected:
  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(FaultCluster::SetUp());
    ASSERT_NO_FATAL_FAILURE(StartPair(GetParam() == std::string("ucx")));
    waiting_ = std::make_unique<FaultEngine>(b_->socket());
    sending_ = std::make_unique<SendingEngine>(a_->socket(), "b");
    Arrives();
  }
  void TearDown() override {
    sending_ = nullptr;
    waiting_ = nullptr;
    FaultCluster::TearDown();
  }
  void Arrives() {
    const uint64_t before = sending_->delivered();
    EXPECT_TRUE(Until([&] { return sending_->delivered() > before + 1; }));
  }
  void Fails() {
    const uint64_t before = sending_->failed();
    EXPECT_TRUE(Until([&] { return sending_->failed() > before; }));
  }
  // A node takes what is of a space that an engine has opened there.
  std::unique_ptr<FaultEngine> waiting_;
  std::unique_ptr<SendingEngine> sending_;
};
INSTANTIATE_TEST_SUITE_P(Networks, SendingFaults, testing::Values("tls", "ucx"),
                         [](const auto& network) { return network.param; });

TEST_P(SendingFaults, TheCableIsOutThenTheReceiverIsKilled) {
  ASSERT_TRUE(network_->LinkDown(b_->host()).ok());
  Fails();
  ASSERT_TRUE(network_->LinkUp(b_->host()).ok());
  Arrives();
  // So slow that there is a middle.
  ASSERT_TRUE(network_->LimitBandwidth(a_->host(), 200'000'000).ok());
  Arrives();
  b_->Kill();
  Fails();
  ASSERT_NO_FATAL_FAILURE(b_->Start());
  waiting_ = std::make_unique<FaultEngine>(b_->socket());
  Arrives();
}

TEST_P(SendingFaults, WhoSendsIsKilledInTheMiddle) {
  ASSERT_TRUE(network_->LimitBandwidth(a_->host(), 200'000'000).ok());
  Arrives();
  a_->Kill();
  sending_ = nullptr;
  ASSERT_TRUE(network_->Heal().ok());
  // What was on its way takes no room.
  EXPECT_TRUE(Until([&] {
    const FaultNode::Json status = b_->Status();
    return status.is_object() && status["reservations"] == 0;
  }));
  ASSERT_NO_FATAL_FAILURE(a_->Start());
  {
    FaultEngine engine(a_->socket());
    EXPECT_TRUE(Until([&] { return engine.SaveTo("b", 100).ok(); }));
  }
  // What came is b's own.
  a_->Kill();
  EXPECT_EQ(waiting_->Load(100), kPromptChunks);
}

// ---- What comes to the port

class PortFaults : public FaultCluster {
 protected:
  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(FaultCluster::SetUp());
    ASSERT_NO_FATAL_FAILURE(StartPair());
    ASSERT_NO_FATAL_FAILURE(StartLoad());
  }

  // A stranger's connection to a.
  int Knock(uint16_t port = 9400) {
    const int fd = Connect(3, a_->host(), port);
    EXPECT_GE(fd, 0);
    return fd;
  }
  static uint64_t DescriptorsOf(const FaultNode& node) {
    const std::filesystem::directory_iterator all(
        absl::StrCat("/proc/", node.pid(), "/fd"));
    return static_cast<uint64_t>(std::distance(begin(all), end(all)));
  }
};

TEST_F(PortFaults, GarbageOnEachOpenPort) {
  std::mt19937_64 random(9);
  std::string noise(70'000, '\0');
  for (char& byte : noise) byte = static_cast<char>(random());
  const std::vector<std::string> said = {
      "",
      "G",
      "GET / HTTP/1.1\r\nHost: larder\r\n\r\n",
      std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11),
      std::string(32, '\0'),
      noise};
  const auto open = network_->Run(a_->host(), {"ss", "-Hltn"});
  ASSERT_TRUE(open.ok()) << open.status();
  int ports = 0;
  for (const auto line : absl::StrSplit(*open, '\n', absl::SkipEmpty())) {
    const std::vector<std::string> fields =
        absl::StrSplit(line, ' ', absl::SkipEmpty());
    ASSERT_GE(fields.size(), 4u);
    uint32_t port = 0;
    ASSERT_TRUE(
        absl::SimpleAtoi(fields[3].substr(fields[3].rfind(':') + 1), &port));
    ++ports;
    for (const std::string& words : said) {
      const int fd = Knock(static_cast<uint16_t>(port));
      (void)!::send(fd, words.data(), words.size(), MSG_NOSIGNAL);
      ::close(fd);
    }
  }
  EXPECT_EQ(ports, 1);  // nothing else listens
  GoesOn();
}

// Somebody with a certificate and OpenSSL.
class TlsStranger {
 public:
  TlsStranger(const std::string& ca, const TestCa::Issued& issued)
      : files_(ca, issued), context_(SSL_CTX_new(TLS_client_method())) {
    SSL_CTX_set_min_proto_version(context_, TLS1_3_VERSION);
    ::signal(SIGPIPE, SIG_IGN);  // OpenSSL writes to who hung up
    EXPECT_EQ(SSL_CTX_use_certificate_file(
                  context_, files_.certificate().c_str(), SSL_FILETYPE_PEM),
              1);
    EXPECT_EQ(SSL_CTX_use_PrivateKey_file(context_, files_.key().c_str(),
                                          SSL_FILETYPE_PEM),
              1);
  }
  ~TlsStranger() { SSL_CTX_free(context_); }

  // Greets over a connection; what the first frame back is, and its bytes.
  std::optional<std::pair<FrameHeader, std::string>> Greet(
      int fd, const FrameHeader& hello) {
    const int on = 1;
    ::setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    SSL* const ssl = SSL_new(context_);
    SSL_set_fd(ssl, fd);
    std::optional<std::pair<FrameHeader, std::string>> answer;
    std::pair<FrameHeader, std::string> read;
    if (SSL_connect(ssl) == 1 &&
        SSL_write(ssl, &hello, sizeof hello) == sizeof hello &&
        ReadAll(ssl, &read.first, sizeof read.first)) {
      read.second.resize(std::min<uint64_t>(read.first.bytes, 256_KiB));
      if (ReadAll(ssl, read.second.data(), read.second.size())) {
        answer = std::move(read);
      }
    }
    SSL_free(ssl);
    return answer;
  }

 private:
  static bool ReadAll(SSL* ssl, void* into, size_t size) {
    for (size_t at = 0; at < size;) {
      const int got = SSL_read(ssl, static_cast<char*>(into) + at,
                               static_cast<int>(size - at));
      if (got <= 0) return false;
      at += static_cast<size_t>(got);
    }
    return true;
  }

  const TestCredentialFiles files_;
  SSL_CTX* const context_;
};

FrameHeader Hello() {
  FrameHeader hello;
  hello.kind = FrameKind::kHello;
  return hello;
}

TEST_F(PortFaults, AnotherVersionIsToldSo) {
  TlsStranger stranger(ca_.certificate(), ca_.Issue("later"));
  FrameHeader hello = Hello();
  hello.version = kFrameVersion + 1;
  const int fd = Knock();
  const auto answer = stranger.Greet(fd, hello);
  ::close(fd);
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->first.kind, FrameKind::kRefused);
  EXPECT_EQ(answer->first.version, kFrameVersion);
  EXPECT_THAT(answer->second, HasSubstr("version"));
  GoesOn();
}

TEST_F(PortFaults, CertificatesThatAreNoGood) {
  const TestCa other;
  TestCa::Subject expired = SubjectOf("c");
  expired.not_after = absl::Now() - absl::Hours(2);
  TestCa::Subject future = SubjectOf("c");
  future.not_before = absl::Now() + absl::Hours(2);
  const FrameHeader hello = Hello();
  for (const TestCa::Issued& issued :
       {other.Issue("a"), ca_.Issue(expired), ca_.Issue(future),
        TestCa::SelfSigned(SubjectOf("a"))}) {
    TlsStranger stranger(ca_.certificate(), issued);
    const int fd = Knock();
    EXPECT_FALSE(stranger.Greet(fd, hello).has_value());
    ::close(fd);
  }
  // A good one of nobody who is in the cluster.
  TlsStranger stranger(ca_.certificate(), ca_.Issue("c"));
  const int fd = Knock();
  const auto answer = stranger.Greet(fd, hello);
  ::close(fd);
  ASSERT_TRUE(answer.has_value());
  EXPECT_EQ(answer->first.kind, FrameKind::kRefused);
  GoesOn();
}

// A node that calls itself c, and whose certificate is good for another or for
// nobody, gets nothing and gives nothing.
TEST_F(PortFaults, ANodeWithTheWrongCertificate) {
  const TestCa other;
  TestCa::Subject expired = SubjectOf("c");
  expired.not_after = absl::Now() - absl::Hours(2);
  for (const TestCa::Issued& issued :
       {other.Issue(SubjectOf("c")), ca_.Issue(expired),
        ca_.Issue(SubjectOf("b"))}) {
    FaultNode& c = Add(3);
    c.WithTls("c", ca_.certificate(), issued);
    c.WithDram(32);
    ASSERT_NO_FATAL_FAILURE(c.Start());
    ASSERT_TRUE(c.Says("cluster: 3 nodes"));
    {
      FaultEngine engine(c.socket());
      ASSERT_NO_FATAL_FAILURE(engine.Save(100));
      for (uint32_t prompt = 0; prompt < kPrompts; ++prompt) {
        EXPECT_EQ(engine.Load(prompt), 0u);
      }
      EXPECT_EQ(engine.Load(100), kPromptChunks);
    }
    GoesOn();
    EXPECT_EQ(FaultEngine(b_->socket()).Load(100), 0u);
    EXPECT_EQ(c.Cluster()["fetched_bytes"], 0);
    a_->ForgetLog();
    EXPECT_EQ(c.Terminate(), 0) << c.Log();
    ASSERT_TRUE(a_->Says("cluster: 2 nodes"));
  }
}

// They show who they are, and are nobody in the cluster. There are fewer
// descriptors than that.
TEST_F(PortFaults, AThousandConnectAtOnce) {
  loading_ = nullptr;
  a_->Kill();
  a_->before = {"prlimit", "--nofile=200"};
  ASSERT_NO_FATAL_FAILURE(a_->Start());
  ASSERT_NO_FATAL_FAILURE(StartLoad());
  const uint64_t descriptors = DescriptorsOf(*a_);
  TlsStranger stranger(ca_.certificate(), ca_.Issue("c"));
  std::vector<int> sockets;
  for (int i = 0; i < 1000; ++i) {
    sockets.push_back(Knock());
  }
  GoesOn();
  // Those that are let in learn that they are not, the others wait.
  int refused = 0;
  for (int& fd : sockets) {
    const auto answer = stranger.Greet(fd, Hello());
    refused += answer.has_value() && answer->first.kind == FrameKind::kRefused;
    ::close(fd);
  }
  EXPECT_EQ(refused, 1000);
  GoesOn();
  // Nor does a node that comes now find the door shut.
  b_->Kill();
  loading_ = nullptr;
  ASSERT_NO_FATAL_FAILURE(b_->Start());
  StartLoad();
  EXPECT_TRUE(Until([&] { return DescriptorsOf(*a_) <= descriptors + 8; }));
}

// ---- The registry

class RegistryFaults : public FaultCluster {
 protected:
  void SetUp() override {
    ASSERT_NO_FATAL_FAILURE(FaultCluster::SetUp());
    ASSERT_NO_FATAL_FAILURE(StartPair());
    ASSERT_NO_FATAL_FAILURE(StartLoad());
  }
  bool Answers(FaultNode& node, bool answers, size_t nodes) {
    return Until([&] {
      const FaultNode::Json cluster = node.Cluster();
      return cluster.is_object() && cluster["registry_answers"] == answers &&
             cluster["nodes"].size() == nodes;
    });
  }
  // What a saves now b finds.
  void FindsNew(uint32_t prompt) {
    ASSERT_NO_FATAL_FAILURE(FaultEngine(a_->socket()).Save(prompt));
    FaultEngine engine(b_->socket());
    EXPECT_TRUE(Until([&] { return engine.Load(prompt) == kPromptChunks; }));
  }
};

TEST_F(RegistryFaults, EtcdIsKilledAndComesBack) {
  KillEtcd();
  EXPECT_TRUE(Answers(*a_, false, 2));
  EXPECT_TRUE(Answers(*b_, false, 2));
  GoesOn();
  ASSERT_NO_FATAL_FAILURE(FindsNew(100));
  ASSERT_NO_FATAL_FAILURE(StartEtcd());
  EXPECT_TRUE(Answers(*a_, true, 2));
  EXPECT_TRUE(Answers(*b_, true, 2));
  GoesOn();
  // Nor does it matter that it forgot everything.
  KillEtcd();
  std::filesystem::remove_all(etcd_folder_ / "data");
  ASSERT_NO_FATAL_FAILURE(StartEtcd());
  EXPECT_TRUE(Answers(*a_, true, 2));
  EXPECT_TRUE(Answers(*b_, true, 2));
  GoesOn();
  ASSERT_NO_FATAL_FAILURE(FindsNew(101));
}

TEST_F(RegistryFaults, EtcdStopsAndGoesOn) {
  etcd_->Signal(SIGSTOP);
  EXPECT_TRUE(Answers(*a_, false, 2));
  GoesOn();
  etcd_->Signal(SIGCONT);
  EXPECT_TRUE(Answers(*a_, true, 2));
  EXPECT_TRUE(Answers(*b_, true, 2));
  GoesOn();
}

TEST_F(RegistryFaults, OneNodeIsCutOffFromEtcd) {
  for (const FaultNode* node : {a_, b_}) {
    SCOPED_TRACE(node == a_ ? "a" : "b");
    FaultNode& other = node == a_ ? *b_ : *a_;
    ASSERT_TRUE(network_->Partition(0, node->host()).ok());
    // Its lease ends; it itself believes what it knew.
    EXPECT_TRUE(Answers(other, true, 1));
    ASSERT_TRUE(network_->Join(0, node->host()).ok());
    EXPECT_TRUE(Answers(other, true, 2));
    GoesOn();
  }
}

TEST_F(RegistryFaults, ANameIsTakenTwice) {
  FaultNode& twin = AddTls(3, "a");
  twin.WithDram(32);
  ASSERT_NO_FATAL_FAILURE(twin.Start());
  ASSERT_TRUE(twin.Says("not joined: a node named a"));
  GoesOn();
  // It serves its engines, and takes the place when that is free.
  {
    FaultEngine engine(twin.socket());
    ASSERT_NO_FATAL_FAILURE(engine.Save(100));
    EXPECT_EQ(engine.Load(100), kPromptChunks);
  }
  EXPECT_EQ(a_->Terminate(), 0);
  Misses();
  ASSERT_TRUE(twin.Says("the name a is free: joined"));
  FaultEngine engine(b_->socket());
  EXPECT_TRUE(Until([&] { return engine.Load(100) == kPromptChunks; }));
}

// ---- The hosts

class HostFaults : public FaultCluster {};

// By what is put before the daemon's calls of the C library.
TEST_F(HostFaults, ClocksAreAnHourApart) {
  const auto shift = [](FaultNode& node, int seconds) {
    node.environment = {"LD_PRELOAD=" LARDER_SHIFTED_CLOCK,
                        absl::StrCat("LARDER_CLOCK_SHIFT=", seconds)};
  };
  a_ = &AddTls(1, "a");
  b_ = &AddTls(2, "b");
  a_->WithDram(96);
  a_->WithNvme(a_->folder() / "nvme");
  b_->WithDram(32);
  shift(*a_, 3600);
  ASSERT_NO_FATAL_FAILURE(a_->Start());
  ASSERT_NO_FATAL_FAILURE(b_->Start());
  ASSERT_NO_FATAL_FAILURE(Meet());
  ASSERT_NO_FATAL_FAILURE(SaveAll());
  // What is shown was shifted.
  const absl::Time hour = absl::Now() + absl::Minutes(59);
  absl::Time logged;
  std::string error;
  ASSERT_TRUE(absl::ParseTime(absl::RFC3339_full,
                              a_->Log().substr(0, a_->Log().find(' ')), &logged,
                              &error))
      << error;
  EXPECT_GT(logged, hour - absl::Minutes(5));
  ASSERT_NO_FATAL_FAILURE(StartLoad());
  // It is started again with a clock that is behind: its life before was an
  // hour later.
  a_->Kill();
  shift(*a_, -3600);
  ASSERT_NO_FATAL_FAILURE(a_->Start());
  GoesOn();
}

// Of who gets chunks: its memory is small, what is full is where it keeps more.
TEST_F(HostFaults, TheDiskIsFullAtTheReceiver) {
  // Mounts of this test are its own, and go with it.
  ASSERT_EQ(::unshare(CLONE_NEWNS), 0) << std::strerror(errno);
  ASSERT_EQ(::mount("none", "/", nullptr, MS_REC | MS_PRIVATE, nullptr), 0);
  const TestFolder disk;
  ASSERT_EQ(::mount("disk", disk.path().c_str(), "tmpfs", 0, "size=160m"), 0)
      << std::strerror(errno);
  const absl::Cleanup unmounted = [&] {
    ::umount2(disk.path().c_str(), MNT_DETACH);
  };
  a_ = &AddTls(1, "a");
  b_ = &AddTls(2, "b");
  a_->WithDram(96);
  a_->WithNvme(a_->folder() / "nvme");
  b_->WithDram(32);
  b_->WithNvme(disk / "nvme");
  ASSERT_NO_FATAL_FAILURE(a_->Start());
  ASSERT_NO_FATAL_FAILURE(b_->Start());
  ASSERT_NO_FATAL_FAILURE(Meet());
  ASSERT_NO_FATAL_FAILURE(SaveAll());
  {
    std::ofstream filler(disk / "filler", std::ios::binary);
    const std::string zeros(1_MiB, '\0');
    while (filler.write(zeros.data(), 1_MiB) && filler.flush()) {
    }
  }
  ASSERT_NO_FATAL_FAILURE(StartLoad());
  // What is saved is there, if not for good, and the operator is told.
  FaultEngine engine(b_->socket());
  uint32_t prompt = 100;
  const auto disk_works = [&] {
    engine.Save(++prompt);
    EXPECT_EQ(engine.Load(prompt), kPromptChunks);
    const FaultNode::Json tiers = b_->Status()["tiers"];
    for (const auto& tier : tiers) {
      if (tier["kind"] == "nvme") return tier["healthy"].get<bool>();
    }
    return false;
  };
  EXPECT_TRUE(Until([&] { return !disk_works(); }));
  GoesOn();
  std::filesystem::remove(disk / "filler");
  EXPECT_TRUE(Until(disk_works));
  GoesOn();
}

}  // namespace
}  // namespace larder
