// Links between processes in several hosts while the network, a process or
// somebody at the port fails. None of these asserts how long anything takes:
// what is asserted is that no byte is wrong, that every call and put ends, that
// every landing closes and nothing is written to its memory afterwards, and
// that links work again without anybody's being started anew.

#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "gtest/gtest.h"

#include "tests/testing/await.h"
#include "tests/testing/sanitized.h"
#include "tests/transport/faults/peer_process.h"
#include "transport/link/frame.h"

namespace larder {
namespace {

using Json = PeerProcess::Json;

bool AllEnded(const Json& state) {
  return state["calls"] == 0 && state["landings"] == 0 && state["puts"] == 0;
}

class LinkFaults : public testing::Test {
 protected:
  void SetUp() override {
    auto network = HostNetwork::Create(3);
    ASSERT_TRUE(network.ok()) << network.status();
    network_ = *std::move(network);
  }

  StatusOr<std::unique_ptr<PeerProcess>> TryStart(
      uint32_t host, std::vector<std::string> arguments = {}) {
    // Patience is what a call may take, and a link's making.
    arguments.insert(arguments.begin(), {"--silence", "1500", "--drain", "500",
                                         "--patience", "3000"});
    return PeerProcess::Start(*network_, host, LARDER_LINK_PEER, arguments);
  }
  std::unique_ptr<PeerProcess> Start(uint32_t host,
                                     std::vector<std::string> arguments = {}) {
    auto peer = TryStart(host, std::move(arguments));
    EXPECT_TRUE(peer.ok()) << peer.status();
    return peer.ok() ? *std::move(peer) : nullptr;
  }
  std::unique_ptr<PeerProcess> StartServer(
      uint32_t host, std::vector<std::string> arguments = {},
      uint16_t port = 9400) {
    arguments.insert(
        arguments.begin(),
        {"--listen", absl::StrCat(HostNetwork::Address(host), ":", port)});
    return Start(host, std::move(arguments));
  }
  // A server on host 1, a client on host 0 that loads from it and does not give
  // up.
  void StartLoad(const std::string& load,
                 const std::vector<std::string>& arguments = {}) {
    server_ = StartServer(1, arguments);
    ASSERT_NE(server_, nullptr);
    client_ = Start(0, arguments);
    ASSERT_NE(client_, nullptr);
    client_->Order(absl::StrCat("stay 1 ", server_->address()));
    client_->Order("load " + load);
    GoesOn();
  }
  // Loads come to their end, one after the other.
  void GoesOn(int64_t loads = 20) {
    EXPECT_TRUE(client_->UntilMore("complete", loads));
  }
  // The link is lost for both ends, and all that was under way is over.
  void BothLose() {
    EXPECT_TRUE(client_->Until([](const Json& state) {
      return state["lost"] >= 1 && state["links"] == 0 && AllEnded(state);
    }));
    EXPECT_TRUE(server_->Until([](const Json& state) {
      return state["lost"] >= 1 && state["links"] == 0 && AllEnded(state);
    }));
  }
  static void EndsWell(PeerProcess& peer) {
    const auto [end, code] = peer.Quit();
    EXPECT_EQ(code, 0);
    ASSERT_FALSE(end.is_null());
    EXPECT_EQ(end["wrong"], 0);
    EXPECT_EQ(end["late"], 0);
    EXPECT_TRUE(AllEnded(end)) << end;
  }
  void TearDown() override {
    if (client_ != nullptr) EndsWell(*client_);
    if (server_ != nullptr) EndsWell(*server_);
  }

  std::unique_ptr<HostNetwork> network_;
  std::unique_ptr<PeerProcess> server_, client_;
};

// ---- The network

TEST_F(LinkFaults, TheCableIsOutForLongerThanALinkIsPatient) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("1048576 4 background"));
  ASSERT_TRUE(network_->LinkDown(1).ok());
  BothLose();
  ASSERT_TRUE(network_->LinkUp(1).ok());
  GoesOn();
}

TEST_F(LinkFaults, TheCableIsOutForAMoment) {
  ASSERT_NO_FATAL_FAILURE(StartLoad(
      "1048576 4 background", {"--silence", "60000", "--patience", "60000"}));
  ASSERT_TRUE(network_->LinkDown(0).ok());
  // Nothing moves from one state to the next.
  int64_t before = -1;
  EXPECT_TRUE(client_->Until([&](const Json& state) {
    return std::exchange(before, state["verified"].get<int64_t>()) ==
           state["verified"];
  }));
  ASSERT_TRUE(network_->LinkUp(0).ok());
  GoesOn();
  EXPECT_EQ(client_->Count("lost"), 0);
  EXPECT_EQ(client_->Count("failed"), 0);
}

TEST_F(LinkFaults, EveryTwentiethPacketIsLost) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("262144 4 normal"));
  ASSERT_TRUE(network_->Lose(5).ok());
  GoesOn();
}

TEST_F(LinkFaults, ATenthOfTheBandwidthIsLeft) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("1048576 2 normal", {"--piece", "262144"}));
  ASSERT_TRUE(network_->LimitBandwidth(1, 1'000'000'000).ok());
  GoesOn();
  ASSERT_TRUE(network_->LimitBandwidth(1, 100'000'000).ok());
  GoesOn(10);
  EXPECT_EQ(client_->Count("lost"), 0);
}

// Neither end is told that the other is not there any more.
TEST_F(LinkFaults, HalfOpenByAPartition) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("1048576 4 deadline"));
  ASSERT_TRUE(network_->Partition(0, 1).ok());
  BothLose();
  ASSERT_TRUE(network_->Heal().ok());
  GoesOn();
}

TEST_F(LinkFaults, OnlyRequestsGetThrough) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("1048576 4 deadline"));
  ASSERT_TRUE(network_->DropOneWay(1, 0).ok());
  BothLose();
  ASSERT_TRUE(network_->Heal().ok());
  GoesOn();
}

TEST_F(LinkFaults, OnlyAnswersGetThrough) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("1048576 4 deadline"));
  ASSERT_TRUE(network_->DropOneWay(0, 1).ok());
  BothLose();
  ASSERT_TRUE(network_->Heal().ok());
  GoesOn();
}

TEST_F(LinkFaults, ThePortIsRejected) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("1048576 4 deadline"));
  ASSERT_TRUE(network_->RejectPort(1, 9400).ok());
  client_->Order("hangup");
  client_->Order(absl::StrCat("stay 1 ", server_->address()));
  EXPECT_TRUE(client_->UntilMore("refused", 2));
  ASSERT_TRUE(network_->Heal().ok());
  GoesOn();
}

// ---- Processes

TEST_F(LinkFaults, WhoSendsIsKilled) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("4194304 4 background"));
  server_->Signal(SIGKILL);
  EXPECT_EQ(server_->Wait(), 128 + SIGKILL);
  EXPECT_TRUE(client_->Until([](const Json& state) {
    return state["links"] == 0 && AllEnded(state);
  }));
  server_ = StartServer(1);  // at the same port, at once
  ASSERT_NE(server_, nullptr);
  GoesOn();
}

TEST_F(LinkFaults, WhoReceivesIsKilled) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("4194304 4 background"));
  client_->Signal(SIGKILL);
  EXPECT_EQ(client_->Wait(), 128 + SIGKILL);
  EXPECT_TRUE(server_->Until([](const Json& state) {
    return state["links"] == 0 && AllEnded(state);
  }));
  client_ = Start(0);
  ASSERT_NE(client_, nullptr);
  client_->Order("load 4194304 4 background");
  client_->Order(absl::StrCat("connect 1 ", server_->address()));
  GoesOn();
}

// What it had under way is of a link that the other end gave up, and lands
// nowhere when it goes on.
TEST_F(LinkFaults, WhoSendsStopsAndGoesOn) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("4194304 4 background"));
  server_->Signal(SIGSTOP);
  EXPECT_TRUE(client_->Until(
      [](const Json& state) { return state["lost"] >= 1 && AllEnded(state); }));
  server_->Signal(SIGCONT);
  GoesOn();
}

TEST_F(LinkFaults, WhoReceivesStopsAndGoesOn) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("4194304 4 background"));
  client_->Signal(SIGSTOP);
  EXPECT_TRUE(server_->Until(
      [](const Json& state) { return state["lost"] >= 1 && AllEnded(state); }));
  client_->Signal(SIGCONT);
  GoesOn();
}

TEST_F(LinkFaults, MemoryIsClosedInTheMiddle) {
  ASSERT_NO_FATAL_FAILURE(
      StartLoad("4194304 4 background", {"--piece", "262144"}));
  // So slow that there is a middle.
  ASSERT_TRUE(network_->LimitBandwidth(1, 400'000'000).ok());
  for (int i = 0; i < 10; ++i) {
    client_->Order("cut");
    EXPECT_TRUE(client_->UntilMore("verified", 1));
  }
  EXPECT_GE(client_->Count("cut"), 10);
  EXPECT_EQ(client_->Count("lost"), 0);
}

TEST_F(LinkFaults, ANodeThatConnectsTwice) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("1048576 2 normal", {"--node", "same"}));
  const auto second = Start(2, {"--node", "same"});
  ASSERT_NE(second, nullptr);
  second->Order("load 1048576 2 normal");
  second->Order(absl::StrCat("connect 1 ", server_->address()));
  EXPECT_TRUE(second->UntilMore("complete", 20));
  EXPECT_EQ(server_->Count("links"), 2);
  GoesOn();
  EndsWell(*second);
}

// ---- The port

TEST_F(LinkFaults, ThePortIsTaken) {
  const int taken = network_->Socket(1, AF_INET, SOCK_STREAM);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(9400);
  ASSERT_EQ(::bind(taken, reinterpret_cast<const sockaddr*>(&address),
                   sizeof address),
            0);
  ASSERT_EQ(::listen(taken, 1), 0);
  const std::string where = HostNetwork::Address(1) + ":9400";
  const auto refused = TryStart(1, {"--listen", where});
  EXPECT_TRUE(absl::StrContains(refused.status().message(), where))
      << refused.status();
  ::close(taken);
  ASSERT_NO_FATAL_FAILURE(StartLoad("1048576 1 normal"));
}

FrameHeader Hello() {
  FrameHeader hello;
  hello.kind = FrameKind::kHello;
  return hello;
}
std::string Frame(const FrameHeader& header, const std::string& bytes = {}) {
  return absl::StrCat(
      absl::BytesToHexString(
          {reinterpret_cast<const char*>(&header), sizeof header}),
      " ", absl::BytesToHexString(bytes), "\n");
}

TEST_F(LinkFaults, APeerOfAnotherVersionIsToldSo) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("1048576 1 normal"));
  auto peer =
      network_->Start(2, {LARDER_RAW_PEER, HostNetwork::Address(1), "9400"});
  ASSERT_TRUE(peer.ok()) << peer.status();
  FrameHeader hello = Hello();
  hello.version = kFrameVersion + 1;
  (*peer)->Write(Frame(hello));
  const auto line = (*peer)->ReadLine();
  ASSERT_TRUE(line.has_value());
  const std::string answer =
      absl::HexStringToBytes(line->substr(0, line->find(' ')));
  FrameHeader refused;
  ASSERT_EQ(answer.size(), sizeof refused) << *line;
  std::memcpy(&refused, answer.data(), sizeof refused);
  EXPECT_EQ(refused.kind, FrameKind::kRefused);
  EXPECT_EQ(refused.version, kFrameVersion);
  EXPECT_EQ(refused.code, Raw(absl::StatusCode::kFailedPrecondition));
  EXPECT_TRUE(absl::StrContains(
      absl::HexStringToBytes(line->substr(line->find(' ') + 1)), "version"));
  GoesOn();
}

// Somebody who speaks UCX, and says what is no frame, or out of turn.
TEST_F(LinkFaults, GarbageInFrames) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("1048576 1 normal"));
  std::mt19937_64 random(7);
  const auto noise = [&](size_t size) {
    std::string bytes(size, '\0');
    for (char& byte : bytes) byte = static_cast<char>(random());
    return bytes;
  };
  FrameHeader hello = Hello();
  hello.bytes = 5;
  const std::string greeting = Frame(hello, "noise");
  FrameHeader lying = Hello();
  lying.bytes = 1 << 20;
  FrameHeader putting;
  putting.kind = FrameKind::kPut;
  putting.landing = 1;
  putting.bytes = 100'000;
  FrameHeader long_call;
  long_call.kind = FrameKind::kCall;
  long_call.bytes = 400'000;
  const std::vector<std::string> said = {
      absl::BytesToHexString(noise(48)) + "\n",
      absl::BytesToHexString(noise(7)) + " " +
          absl::BytesToHexString(noise(70'000)) + "\n",
      Frame(lying, "short"),
      greeting + greeting,
      // Dropped: nobody opened that landing. Then what is too long.
      greeting + Frame(putting, noise(100'000)) +
          Frame(long_call, noise(400'000)),
  };
  for (const std::string& words : said) {
    auto peer =
        network_->Start(2, {LARDER_RAW_PEER, HostNetwork::Address(1), "9400"});
    ASSERT_TRUE(peer.ok()) << peer.status();
    (*peer)->Write(words);
    const std::string heard = (*peer)->ReadRest();
    EXPECT_TRUE(absl::EndsWith(heard, "gone\n")) << heard;
  }
  GoesOn();
  EXPECT_EQ(client_->Count("lost"), 0);
}

// Somebody who does not even speak UCX, at each port that is open.
TEST_F(LinkFaults, GarbageOnThePort) {
  ASSERT_NO_FATAL_FAILURE(StartLoad("1048576 1 normal"));
  std::mt19937_64 random(9);
  std::string noise(70'000, '\0');
  for (char& byte : noise) byte = static_cast<char>(random());
  const std::vector<std::string> said = {
      "", "G", "GET / HTTP/1.1\r\nHost: larder\r\n\r\n",
      std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 11), noise};
  const auto open = network_->Run(1, {"ss", "-Hltn"});
  ASSERT_TRUE(open.ok()) << open.status();
  int ports = 0;
  for (const auto line : absl::StrSplit(*open, '\n', absl::SkipEmpty())) {
    const std::vector<std::string> fields =
        absl::StrSplit(line, ' ', absl::SkipEmpty());
    ASSERT_GE(fields.size(), 4u);
    if (!fields[3].starts_with(HostNetwork::Address(1))) continue;  // its lo
    uint32_t port = 0;
    ASSERT_TRUE(
        absl::SimpleAtoi(fields[3].substr(fields[3].rfind(':') + 1), &port));
    ++ports;
    for (const std::string& words : said) {
      SCOPED_TRACE(absl::StrCat("port ", port, ", ", words.size(), " bytes"));
      const int socket = network_->Socket(2, AF_INET, SOCK_STREAM);
      sockaddr_in address{};
      address.sin_family = AF_INET;
      address.sin_port = htons(static_cast<uint16_t>(port));
      inet_pton(AF_INET, HostNetwork::Address(1).c_str(), &address.sin_addr);
      ASSERT_EQ(::connect(socket, reinterpret_cast<const sockaddr*>(&address),
                          sizeof address),
                0);
      (void)!::send(socket, words.data(), words.size(), MSG_NOSIGNAL);
      ::close(socket);
    }
    GoesOn();
  }
  EXPECT_GE(ports, 2);
  EXPECT_EQ(client_->Count("lost"), 0);
}

uint64_t DescriptorsOf(pid_t pid) {
  const std::filesystem::directory_iterator all(
      absl::StrCat("/proc/", pid, "/fd"));
  return static_cast<uint64_t>(std::distance(begin(all), end(all)));
}
uint64_t ResidentBytesOf(pid_t pid) {
  std::ifstream file(absl::StrCat("/proc/", pid, "/statm"));
  uint64_t size = 0, resident = 0;
  file >> size >> resident;
  return resident * 4096;
}

// More than the server has descriptors for: some are rejected, the others are
// served, and what they took is free again when they are gone.
TEST_F(LinkFaults, AThousandConnectAtOnce) {
  constexpr int kClients = 1000;
  constexpr int kProcesses = 4;
  constexpr int kDescriptors = 2800;  // a quarter is for links
  const std::vector<std::string> patient = {"--silence", "60000", "--patience",
                                            "60000"};
  std::vector<std::string> limited = {absl::StrCat("--nofile=", kDescriptors),
                                      LARDER_LINK_PEER, "--listen",
                                      HostNetwork::Address(1) + ":9400"};
  limited.insert(limited.end(), patient.begin(), patient.end());
  auto started = PeerProcess::Start(*network_, 1, "prlimit", limited);
  ASSERT_TRUE(started.ok()) << started.status();
  server_ = *std::move(started);
  const uint64_t descriptors = DescriptorsOf(server_->pid());
  const uint64_t resident = ResidentBytesOf(server_->pid());

  std::vector<std::unique_ptr<PeerProcess>> clients;
  for (int i = 0; i < kProcesses; ++i) {
    clients.push_back(Start(i % 2 == 0 ? 0 : 2, patient));
    ASSERT_NE(clients.back(), nullptr);
  }
  for (const auto& client : clients) {
    client->Order(absl::StrCat("connect ", kClients / kProcesses, " ",
                               server_->address()));
  }
  int64_t links = 0, refused = 0;
  for (const auto& client : clients) {
    EXPECT_TRUE(client->Until([&](const Json& state) {
      return state["links"].get<int>() + state["refused"].get<int>() ==
             kClients / kProcesses;
    }));
    links += client->Count("links");
    refused += client->Count("refused");
  }
  EXPECT_EQ(links, kDescriptors / 4);
  EXPECT_EQ(refused, kClients - links);
  EXPECT_LT(DescriptorsOf(server_->pid()), kDescriptors);
  // What a link takes is less than this; under a sanitizer, its own.
  if (!kSanitized) {
    EXPECT_LT(ResidentBytesOf(server_->pid()), resident + links * 256_KiB);
  }
  for (const auto& client : clients) {
    client->Order("load 65536 1 normal");
  }
  for (const auto& client : clients) {
    EXPECT_TRUE(client->UntilMore("complete", kClients / kProcesses));
    client->Order("rest");
  }
  for (const auto& client : clients) EndsWell(*client);
  EXPECT_TRUE(server_->Until([](const Json& state) {
    return state["links"] == 0 && AllEnded(state);
  }));
  AwaitThat([&] { return DescriptorsOf(server_->pid()) <= descriptors; });
}

}  // namespace
}  // namespace larder
