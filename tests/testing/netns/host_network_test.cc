// What the network of a test promises, by sockets in its hosts.

#include "tests/testing/netns/host_network.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "gtest/gtest.h"

#include "tests/testing/await.h"

namespace larder {
namespace {

sockaddr_in At(uint32_t host, uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  inet_pton(AF_INET, HostNetwork::Address(host).c_str(), &address.sin_addr);
  return address;
}

class HostNetworkTest : public testing::Test {
 protected:
  void SetUp() override {
    auto network = HostNetwork::Create(3);
    ASSERT_TRUE(network.ok()) << network.status();
    network_ = *std::move(network);
  }
  void TearDown() override {
    for (const int socket : sockets_) ::close(socket);
  }

  int Bound(uint32_t host, int type, uint16_t port) {
    const int socket = network_->Socket(host, AF_INET, type);
    EXPECT_GE(socket, 0) << std::strerror(errno);
    sockets_.push_back(socket);
    const sockaddr_in address = At(host, port);
    EXPECT_EQ(::bind(socket, reinterpret_cast<const sockaddr*>(&address),
                     sizeof address),
              0);
    return socket;
  }
  // Of so many datagrams, how many arrive. REQUIRES: Meet.
  int Arrive(uint32_t from, uint32_t to, int datagrams) {
    const int receiver = Bound(to, SOCK_DGRAM, next_port_);
    const int sender = Bound(from, SOCK_DGRAM, 0);
    const sockaddr_in address = At(to, next_port_++);
    int arrived = 0;
    const auto receive = [&] {
      char byte;
      while (::recv(receiver, &byte, 1, MSG_DONTWAIT) == 1) ++arrived;
    };
    for (int i = 0; i < datagrams; ++i) {
      // Refused while its own cable is down.
      (void)!::sendto(sender, "x", 1, 0,
                      reinterpret_cast<const sockaddr*>(&address),
                      sizeof address);
      receive();
    }
    receive();
    return arrived;
  }
  // True: connected; false: refused.
  bool Connects(uint32_t from, uint32_t to, uint16_t port) {
    const int client = network_->Socket(from, AF_INET, SOCK_STREAM);
    sockets_.push_back(client);
    const sockaddr_in address = At(to, port);
    const int result = ::connect(
        client, reinterpret_cast<const sockaddr*>(&address), sizeof address);
    if (result != 0) EXPECT_EQ(errno, ECONNREFUSED);
    return result == 0;
  }
  // Neighbours know each other's hardware addresses, so datagrams are delivered
  // within the call that sends them.
  void Meet(uint32_t one, uint32_t other) {
    const int listener = Bound(other, SOCK_STREAM, next_port_);
    ASSERT_EQ(::listen(listener, 1), 0);
    ASSERT_TRUE(Connects(one, other, next_port_++));
  }

  std::unique_ptr<HostNetwork> network_;
  std::vector<int> sockets_;
  uint16_t next_port_ = 1000;
};

TEST_F(HostNetworkTest, EveryoneReachesEveryone) {
  Meet(0, 1);
  Meet(2, 1);
  EXPECT_EQ(Arrive(0, 1, 10), 10);
  EXPECT_EQ(Arrive(2, 1, 10), 10);
}

TEST_F(HostNetworkTest, NetworksDoNotMeet) {
  auto another = HostNetwork::Create(2);
  ASSERT_TRUE(another.ok()) << another.status();
  const int listener = Bound(1, SOCK_STREAM, 7);
  ASSERT_EQ(::listen(listener, 1), 0);
  EXPECT_TRUE(Connects(0, 1, 7));
  network_.swap(*another);
  EXPECT_FALSE(Connects(0, 1, 7));
}

TEST_F(HostNetworkTest, FaultsOfPacketsAndTheirEnd) {
  Meet(0, 1);
  Meet(0, 2);
  ASSERT_TRUE(network_->DropOneWay(0, 1).ok());
  EXPECT_EQ(Arrive(0, 1, 10), 0);
  EXPECT_EQ(Arrive(1, 0, 10), 10);
  ASSERT_TRUE(network_->Partition(0, 2).ok());
  EXPECT_EQ(Arrive(0, 2, 10), 0);
  EXPECT_EQ(Arrive(2, 0, 10), 0);
  ASSERT_TRUE(network_->Heal().ok());
  EXPECT_EQ(Arrive(0, 1, 10), 10);
  EXPECT_EQ(Arrive(0, 2, 10), 10);
  ASSERT_TRUE(network_->Lose(30).ok());
  const int arrived = Arrive(0, 1, 1000);
  EXPECT_GT(arrived, 600);
  EXPECT_LT(arrived, 800);
}

TEST_F(HostNetworkTest, ACableIsPulledAndPutBack) {
  Meet(0, 1);
  ASSERT_TRUE(network_->LinkDown(1).ok());
  EXPECT_EQ(Arrive(0, 1, 10), 0);
  EXPECT_EQ(Arrive(1, 0, 10), 0);
  ASSERT_TRUE(network_->LinkUp(1).ok());
  Meet(0, 1);
  EXPECT_EQ(Arrive(0, 1, 10), 10);
}

TEST_F(HostNetworkTest, APortIsRejected) {
  const int listener = Bound(1, SOCK_STREAM, 7);
  ASSERT_EQ(::listen(listener, 8), 0);
  EXPECT_TRUE(Connects(0, 1, 7));
  ASSERT_TRUE(network_->RejectPort(1, 7).ok());
  EXPECT_FALSE(Connects(0, 1, 7));
  ASSERT_TRUE(network_->Heal().ok());
  EXPECT_TRUE(Connects(0, 1, 7));
}

TEST_F(HostNetworkTest, BandwidthIsWhatWasSaid) {
  ASSERT_TRUE(network_->LimitBandwidth(1, 100'000'000).ok());
  const auto shapes = network_->Run(1, {"tc", "qdisc", "show", "dev", "eth0"});
  ASSERT_TRUE(shapes.ok()) << shapes.status();
  EXPECT_NE(shapes->find("rate 100Mbit"), std::string::npos) << *shapes;
  ASSERT_TRUE(network_->Heal().ok());
  EXPECT_EQ(
      network_->Run(1, {"tc", "qdisc", "show", "dev", "eth0"})->find("tbf"),
      std::string::npos);
}

TEST_F(HostNetworkTest, ProcessesOfAHost) {
  EXPECT_EQ(*network_->Run(2, {"ls", "/sys/class/net"}), "eth0\nlo\n");
  EXPECT_NE(network_->Run(2, {"hostname", "-I"})->find(HostNetwork::Address(2)),
            std::string::npos);
  EXPECT_EQ(network_->Run(2, {"false"}).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(network_->Start(2, {"/no/such/program"}).status().message(),
            "/no/such/program: No such file or directory");
  auto cat = network_->Start(0, {"cat"});
  ASSERT_TRUE(cat.ok()) << cat.status();
  EXPECT_TRUE((*cat)->Write("one\ntwo"));
  EXPECT_EQ((*cat)->ReadLine(), "one");
  (*cat)->CloseInput();
  EXPECT_EQ((*cat)->ReadRest(), "two");
  EXPECT_EQ((*cat)->Wait(), 0);
  auto sleeper = network_->Start(0, {"sleep", "1000"});
  ASSERT_TRUE(sleeper.ok()) << sleeper.status();
  (*sleeper)->Signal(SIGTERM);
  EXPECT_EQ((*sleeper)->Wait(), 128 + SIGTERM);
}

// Even if it is killed: what holds a namespace is a descriptor, and what is in
// it dies with its parent.
TEST_F(HostNetworkTest, NothingIsLeftOfOneThatIsKilled) {
  int out[2];
  ASSERT_EQ(::pipe(out), 0);
  const pid_t owner = ::fork();
  if (owner == 0) {
    auto sleeper = network_->Start(0, {"sleep", "1000"});
    const pid_t pid = sleeper.ok() ? (*sleeper)->pid() : -1;
    (void)!::write(out[1], &pid, sizeof pid);
    ::kill(::getpid(), SIGKILL);
  }
  pid_t sleeper = -1;
  ASSERT_EQ(::read(out[0], &sleeper, sizeof sleeper),
            static_cast<ssize_t>(sizeof sleeper));
  ASSERT_GT(sleeper, 0);
  const std::string stat = absl::StrCat("/proc/", sleeper, "/stat");
  // Whoever inherits it may take its time to bury it.
  AwaitThat([&] {
    char text[256] = "";
    const int file = ::open(stat.c_str(), O_RDONLY);
    if (file < 0) return true;
    (void)!::read(file, text, sizeof text - 1);
    ::close(file);
    return std::strstr(text, ") Z") != nullptr;
  });
  ::close(out[0]);
  ::close(out[1]);
}

}  // namespace
}  // namespace larder
