// The contract over TLS, who is believed and who is not, and what strangers can
// do to a port.

#include "transport/tls/tls_transport.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/tcp.h>
#include <openssl/ssl.h>
#include <poll.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <optional>

#include "absl/strings/match.h"
#include "absl/strings/str_join.h"
#include "gmock/gmock.h"

#include "tests/conformance/transport_conformance.h"
#include "tests/testing/fake_network.h"
#include "tests/testing/sanitized.h"
#include "tests/testing/test_ca.h"
#include "transport/link/link_tokens.h"
#include "transport/link/socket_address.h"
#include "transport/link/token_transport.h"
#include "transport/tcp/tcp_transport.h"

namespace larder {
namespace {

using testing::HasSubstr;
using testing::Not;

const TestCa& Ca() {
  static const auto* const kCa = new TestCa;
  return *kCa;
}

TlsOptions WithFiles(TlsOptions options, const TestCredentialFiles& files) {
  options.ca_file = files.ca();
  options.certificate_file = files.certificate();
  options.key_file = files.key();
  options.reload_interval = absl::ZeroDuration();
  return options;
}

class TlsHarness final : public TransportHarness {
 public:
  TlsHarness(std::string address, TlsOptions tls,
             std::string identity = "node.test")
      : address_(std::move(address)),
        identity_(std::move(identity)),
        files_(Ca().certificate(), Ca().Issue(identity_)),
        tls_(WithFiles(std::move(tls), files_)) {}
  std::unique_ptr<Transport> NewTransport(
      const TransportOptions& options) override {
    static_cast<TransportOptions&>(tls_) = options;
    auto transport = NewTlsTransport(tls_);
    EXPECT_TRUE(transport.ok()) << transport.status();
    return *std::move(transport);
  }
  std::string address() const override { return address_; }
  Clock& clock() override { return Clock::Real(); }
  std::string identity() const override { return identity_; }
  void PumpUntil(absl::FunctionRef<bool()> done) override { AwaitThat(done); }

 private:
  const std::string address_;
  const std::string identity_;
  const TestCredentialFiles files_;
  TlsOptions tls_;
};

TransportFactory Over(std::string name, std::string address,
                      TlsOptions options) {
  options.workers = 2;
  return {std::move(name),
          [=] { return std::make_unique<TlsHarness>(address, options); }};
}

// TCP as it is beneath, which proves nothing.
class TokenTlsHarness final : public TransportHarness {
 public:
  std::unique_ptr<Transport> NewTransport(
      const TransportOptions& options) override {
    TokenTransportParts parts;
    parts.control = control_.NewTransport(options);
    StreamOptions data;
    static_cast<TransportOptions&>(data) = options;
    auto made = NewTcpTransport(data);
    EXPECT_TRUE(made.ok()) << made.status();
    parts.data = *std::move(made);
    parts.data_address = control_.address();
    parts.clock = &clock();
    return NewTokenTransport(std::move(parts));
  }
  std::string address() const override { return control_.address(); }
  Clock& clock() override { return Clock::Real(); }
  std::string identity() const override { return control_.identity(); }
  void PumpUntil(absl::FunctionRef<bool()> done) override { AwaitThat(done); }

 private:
  TlsHarness control_{"127.0.0.1:0", {}, "node.test"};
};

TlsOptions KernelTls() {  // or without, where there is none
  TlsOptions options;
  options.kernel_tls = true;
  return options;
}

TlsOptions ManyKeys() {
  TlsOptions options;
  options.key_bytes = 100'000;
  return options;
}

INSTANTIATE_TEST_SUITE_P(
    Tls, TransportConformance,
    testing::Values(Over("v4", "127.0.0.1:0", {}),
                    Over("kernel", "127.0.0.1:0", KernelTls()),
                    Over("v6_keys", "[::1]:0", ManyKeys()),
                    TransportFactory{
                        "tokens",
                        [] { return std::make_unique<TokenTlsHarness>(); }}),
    TransportFactoryName);

// Keeps what was logged.
class LogBook {
 public:
  std::function<void(const Status&)> writer() {
    return [this](const Status& status) {
      absl::MutexLock lock(&mu_);
      lines_.push_back(status.ToString());
    };
  }
  size_t size() {
    absl::MutexLock lock(&mu_);
    return lines_.size();
  }
  std::string text() {
    absl::MutexLock lock(&mu_);
    return absl::StrJoin(lines_, "\n");
  }

 private:
  absl::Mutex mu_;
  std::vector<std::string> lines_;
};

// A clock that a test moves, with the right date.
class SteppedClock final : public Clock {
 public:
  absl::Time Now() const override { return manual_.Now(); }
  absl::Time WallNow() const override { return absl::Now() + wrong_by; }
  void Advance(absl::Duration by) { manual_.Advance(by); }

  absl::Duration wrong_by = absl::ZeroDuration();

 private:
  ManualClock manual_;
};

// One end: its files, its log, its transport.
struct End {
  explicit End(const TestCa::Issued& issued, std::string ca = "")
      : files(ca.empty() ? Ca().certificate() : ca, issued) {}
  ~End() {
    service.LetGo();
    transport = nullptr;
  }
  void Start(TlsOptions options = {}) {
    options.log = log.writer();
    auto made = NewTlsTransport(WithFiles(std::move(options), files));
    ASSERT_TRUE(made.ok()) << made.status();
    transport = *std::move(made);
  }
  void Listen(TlsOptions options = {}) {
    Start(std::move(options));
    auto at = transport->Listen("127.0.0.1:0", service);
    ASSERT_TRUE(at.ok()) << at.status();
    address = *at;
  }
  StatusOr<std::shared_ptr<Link>> Connect(
      const std::string& to, absl::Time deadline = absl::InfiniteFuture()) {
    std::atomic<bool> done{false};
    StatusOr<std::shared_ptr<Link>> link;
    transport->Connect(to, "me", service, deadline,
                       [&](StatusOr<std::shared_ptr<Link>> got) {
                         link = std::move(got);
                         done = true;
                       });
    AwaitThat([&] { return done.load(); });
    return link;
  }

  TestCredentialFiles files;
  LogBook log;
  EchoService service;
  std::unique_ptr<Transport> transport;
  std::string address;
};

StatusOr<std::string> CallOver(Link& link, std::string message) {
  std::atomic<bool> done{false};
  StatusOr<std::string> answer;
  link.Call(std::move(message), {}, [&](StatusOr<std::string> got) {
    answer = std::move(got);
    done = true;
  });
  AwaitThat([&] { return done.load(); });
  return answer;
}

// What a stranger has: a socket.
class Stranger {
 public:
  explicit Stranger(const std::string& address) {
    const SocketAddress to = ParseSocketAddress(address).value();
    fd_ = ::socket(to.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    EXPECT_EQ(::connect(fd_, to.get(), to.length), 0);
    const int yes = 1;
    ::setsockopt(fd_, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
  }
  ~Stranger() { ::close(fd_); }
  int fd() const { return fd_; }
  void Say(std::string_view text) {
    (void)::send(fd_, text.data(), text.size(), MSG_NOSIGNAL);
  }
  // Returns once the other side closed.
  void AwaitClose() {
    char dropped[4096];
    while (::recv(fd_, dropped, sizeof dropped, 0) > 0) {
    }
  }
  bool open() {
    pollfd poll_fd{fd_, POLLIN | POLLRDHUP, 0};
    return ::poll(&poll_fd, 1, 0) == 0;
  }

 private:
  int fd_;
};

// A program that speaks TLS, blocking.
class TlsStranger {
 public:
  TlsStranger(const std::string& address, int version,
              const TestCredentialFiles* files)
      : socket_(address), context_(SSL_CTX_new(TLS_client_method())) {
    SSL_CTX_set_max_proto_version(context_, version);
    if (files != nullptr) {
      SSL_CTX_use_certificate_chain_file(context_,
                                         files->certificate().c_str());
      SSL_CTX_use_PrivateKey_file(context_, files->key().c_str(),
                                  SSL_FILETYPE_PEM);
    }
    SSL_CTX_set_msg_callback(context_, &TlsStranger::OnMessage);
    SSL_CTX_set_msg_callback_arg(context_, this);
    ssl_ = SSL_new(context_);
    SSL_set_fd(ssl_, socket_.fd());
    connected_ = SSL_connect(ssl_) == 1;
  }
  ~TlsStranger() {
    SSL_free(ssl_);
    SSL_CTX_free(context_);
  }
  bool connected() const { return connected_; }
  void Say(const void* data, size_t size) {
    size_t written;
    (void)SSL_write_ex(ssl_, data, size, &written);
  }
  void AwaitClose() {
    while (Hear(1)) {
    }
  }
  // False if it is closed before that.
  bool Hear(size_t bytes) {
    char dropped[4096];
    while (bytes > 0) {
      const int size = SSL_read(
          ssl_, dropped, static_cast<int>(std::min(bytes, sizeof dropped)));
      if (size <= 0) return false;
      bytes -= static_cast<size_t>(size);
    }
    return true;
  }
  // How often the other end changed its key.
  int key_updates() const { return key_updates_; }

 private:
  static void OnMessage(int sent, int, int type, const void* message,
                        size_t size, SSL*, void* self) {
    if (sent == 0 && type == SSL3_RT_HANDSHAKE && size > 0 &&
        *static_cast<const uint8_t*>(message) == SSL3_MT_KEY_UPDATE) {
      ++static_cast<TlsStranger*>(self)->key_updates_;
    }
  }

  Stranger socket_;
  SSL_CTX* const context_;
  SSL* ssl_;
  int key_updates_ = 0;
  bool connected_;
};

size_t Descriptors() {
  const std::filesystem::directory_iterator open("/proc/self/fd");
  return static_cast<size_t>(std::distance(begin(open), end(open)));
}

// ---- Who is who

TEST(TlsIdentity, IsTheUriElseTheDnsNameElseTheCommonName) {
  const auto subject = [](const char* uri, const char* dns, const char* cn) {
    TestCa::Subject s;
    s.uri = uri;
    s.dns = dns;
    s.common_name = cn;
    return s;
  };
  End server(Ca().Issue("server.test"));
  server.Listen();
  for (const auto& [shown, identity] :
       {std::pair{subject("spiffe://x/node/1", "a.test", "b"),
                  "spiffe://x/node/1"},
        std::pair{subject("", "a.test", "b"), "a.test"},
        std::pair{subject("", "", "Node 3"), "Node 3"}}) {
    End client(Ca().Issue(shown));
    client.Start();
    const auto link = client.Connect(server.address);
    ASSERT_TRUE(link.ok()) << link.status();
    EXPECT_EQ((*link)->peer().identity, "server.test");
    EXPECT_EQ(server.service.admitted().identity, identity);
  }
}

struct BadCertificate {
  const char* what;
  // Of either end, whichever is bad.
  TestCa::Issued issued;
  bool of_server;
  const char* refuser;       // what the one says that refuses
  const char* refused;       // ... and the other
  bool tells_itself = true;  // sees it when it starts
};

TEST(TlsCertificates, BadOnesAreRefusedAndBothEndsSayWhatToDo) {
  const TestCa other("Somebody else's CA");
  TestCa::Subject expired, early, server_only, client_only, nameless;
  for (TestCa::Subject* subject :
       {&expired, &early, &server_only, &client_only}) {
    subject->dns = "bad.test";
  }
  expired.not_after = absl::Now() - absl::Minutes(1);
  early.not_before = absl::Now() + absl::Minutes(10);
  server_only.usage = "serverAuth";
  client_only.usage = "clientAuth";
  std::vector<BadCertificate> cases;
  for (const bool of_server : {false, true}) {
    const auto add = [&](const char* what, TestCa::Issued issued,
                         const char* refuser, const char* refused,
                         bool tells_itself = true) {
      cases.push_back(
          {what, std::move(issued), of_server, refuser, refused, tells_itself});
    };
    add("expired", Ca().Issue(expired), "has expired; renew it", "renew it");
    add("early", Ca().Issue(early), "not valid yet; look at the clocks",
        "its log says why");
    add("of another CA", other.Issue("bad.test"), "its CA is not known",
        "add the CA to its CA file");
    add("its own CA", TestCa::SelfSigned(expired), "it is signed by itself",
        "add the CA to its CA file");
    add("of nobody", Ca().Issue(nameless), "it names nobody",
        "it may name nobody");
    const TestCa::Subject& wrong = of_server ? client_only : server_only;
    add("for something else", Ca().Issue(wrong), "extended key usage",
        "extended key usage", false);
  }
  for (const BadCertificate& bad : cases) {
    SCOPED_TRACE(absl::StrCat(bad.what, bad.of_server ? ", server" : ""));
    const TestCa::Issued good = Ca().Issue("good.test");
    End server(bad.of_server ? bad.issued : good);
    End client(bad.of_server ? good : bad.issued);
    server.Listen();
    client.Start();
    const size_t warned = server.log.size();
    const auto link = client.Connect(server.address);
    EXPECT_EQ(link.status().code(), absl::StatusCode::kUnauthenticated)
        << link.status();
    AwaitThat([&] { return server.log.size() > warned; });
    const std::string here(link.status().message()), there = server.log.text();
    EXPECT_THAT(here, HasSubstr(bad.of_server ? bad.refuser : bad.refused));
    EXPECT_THAT(there, HasSubstr(bad.of_server ? bad.refused : bad.refuser));
    // Where the file is that has to be mended, or the CA added.
    EXPECT_THAT(
        here + there,
        HasSubstr((bad.of_server ? server : client).files.certificate()));
    EXPECT_EQ(server.service.link(), nullptr);
    for (const std::string& text : {here, there, client.log.text()}) {
      EXPECT_THAT(text, Not(HasSubstr("PRIVATE KEY")));
      EXPECT_THAT(text, Not(HasSubstr(bad.issued.key.substr(30, 20))));
    }
    EXPECT_EQ(absl::StrContains((bad.of_server ? server : client).log.text(),
                                "peers may not believe the certificate in"),
              bad.tells_itself);
  }
}

TEST(TlsCertificates, TheDateIsThatOfTheClock) {
  SteppedClock clock;
  clock.wrong_by = absl::Hours(48);
  TlsOptions options;
  options.clock = &clock;
  End server(Ca().Issue("server.test")), client(Ca().Issue("client.test"));
  server.Listen(options);
  client.Start();
  const auto link = client.Connect(server.address);
  EXPECT_EQ(link.status().code(), absl::StatusCode::kUnauthenticated);
  EXPECT_THAT(std::string(link.status().message()), HasSubstr("has expired"));
}

TEST(TlsFiles, WhatCannotBeUsedIsNamed) {
  const TestCa::Issued one = Ca().Issue("one.test"), two = Ca().Issue("two");
  TestCredentialFiles files(Ca().certificate(), one);
  const auto error = [&] {
    const auto made = NewTlsTransport(WithFiles({}, files));
    return made.ok() ? "it is fine" : made.status().ToString();
  };
  EXPECT_EQ(error(), "it is fine");
  files.SetKey(two.key);
  EXPECT_THAT(error(), HasSubstr(absl::StrCat(
                           "the key in '", files.key(),
                           "' is not that of the first certificate in '",
                           files.certificate(), "'")));
  files.SetKey(TestCa::EncryptedKey("open sesame"));
  EXPECT_THAT(error(), HasSubstr("is encrypted; decrypt it"));
  files.SetKey(one.certificate);
  EXPECT_THAT(error(), HasSubstr("does not hold a private key in PEM form"));
  files.SetKey(one.key);
  files.SetCertificate("nothing of the kind");
  EXPECT_THAT(error(), HasSubstr(absl::StrCat(
                           "the certificate file '", files.certificate(),
                           "' does not hold certificates in PEM")));
  files.SetCertificate(one.certificate);
  files.SetCa("");
  EXPECT_THAT(error(), HasSubstr("the CA file"));
  std::string damaged = Ca().certificate();
  damaged[damaged.size() / 2] ^= 1;
  files.SetCa(Ca().certificate() + damaged);
  EXPECT_THAT(error(), HasSubstr("the CA file"));
  std::filesystem::remove(files.ca());
  EXPECT_THAT(error(), HasSubstr("NOT_FOUND: cannot read the CA file"));
  files.SetCa(Ca().certificate());
  EXPECT_EQ(error(), "it is fine");
}

TEST(TlsFiles, NewOnesAreUsedByNewConnectionsAndBadOnesChangeNothing) {
  End server(Ca().Issue("first.test")), client(Ca().Issue("client.test"));
  server.Listen();
  client.Start();
  const auto identity = [&] {
    const auto link = client.Connect(server.address);
    return link.ok() ? (*link)->peer().identity : link.status().ToString();
  };
  const auto first = client.Connect(server.address);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ((*first)->peer().identity, "first.test");
  server.files.Set(Ca().Issue("second.test"));
  EXPECT_EQ(identity(), "second.test");
  EXPECT_EQ(CallOver(**first, "still here").value_or(""), "still here");

  EXPECT_EQ(server.log.size(), 0u);
  server.files.SetCertificate(Ca().Issue("third.test").certificate);
  EXPECT_EQ(identity(), "second.test");  // its key is not there yet
  EXPECT_EQ(identity(), "second.test");
  EXPECT_EQ(server.log.size(), 1u);  // said once
  EXPECT_THAT(server.log.text(),
              HasSubstr("the new certificates are not used, the old ones are: "
                        "the key in '"));
  server.files.Set(Ca().Issue("fourth.test"));
  EXPECT_EQ(identity(), "fourth.test");
}

TEST(TlsFiles, CasAreRotatedByHavingBothForAWhile) {
  const TestCa next("The next CA");
  End server(Ca().Issue("server.test")), client(Ca().Issue("client.test"));
  server.Listen();
  client.Start();
  const auto works = [&] { return client.Connect(server.address).ok(); };
  EXPECT_TRUE(works());
  const std::string both = Ca().certificate() + next.certificate();
  server.files.SetCa(both);
  EXPECT_TRUE(works());
  client.files.Set(next.Issue("client.test"));
  EXPECT_TRUE(works());
  server.files.Set(next.Issue("server.test"));
  EXPECT_FALSE(works());  // the client's turn was missed
  client.files.SetCa(both);
  EXPECT_TRUE(works());
  server.files.SetCa(next.certificate());
  client.files.SetCa(next.certificate());
  EXPECT_TRUE(works());
}

TEST(TlsKeys, AreChangedBeforeTheyAreWornOut) {
  TlsOptions options;
  options.key_bytes = 1000;
  End server(Ca().Issue("server.test")), client(Ca().Issue("client.test"));
  server.Listen(options);
  TlsStranger peer(server.address, TLS1_3_VERSION, &client.files);
  ASSERT_TRUE(peer.connected());
  FrameHeader header;
  header.kind = FrameKind::kHello;
  peer.Say(&header, sizeof header);
  ASSERT_TRUE(peer.Hear(sizeof header + std::string_view("hello ").size()));
  EXPECT_EQ(peer.key_updates(), 0);
  header.kind = FrameKind::kCall;
  header.bytes = sizeof header;  // another header is as good a message as any
  for (int i = 0; i < 50; ++i) {
    peer.Say(&header, sizeof header);
    peer.Say(&header, sizeof header);
    ASSERT_TRUE(peer.Hear(2 * sizeof header));
  }
  EXPECT_GE(peer.key_updates(), 4);
  EXPECT_LE(peer.key_updates(), 5);
}

// ---- What strangers can do

TEST(TlsPort, GarbageGetsAClose) {
  End server(Ca().Issue("server.test")), client(Ca().Issue("client.test"));
  server.Listen();
  client.Start();
  const auto noise = Pattern(7, 100'000);
  for (const std::string_view garbage :
       {std::string_view("GET / HTTP/1.1\r\n\r\n"), std::string_view("\0", 1),
        std::string_view("LLNK and what follows"),
        std::string_view("\x16\x03\x01\xff\xff\x01\xff\xff\xff", 9),
        std::string_view(reinterpret_cast<const char*>(noise.data()),
                         noise.size())}) {
    Stranger stranger(server.address);
    stranger.Say(garbage);
    ::shutdown(stranger.fd(), SHUT_WR);
    stranger.AwaitClose();
  }
  EXPECT_EQ(server.service.link(), nullptr);
  EXPECT_TRUE(client.Connect(server.address).ok());
}

TEST(TlsPort, OtherVersionsAndThoseWithoutACertificateAreRefused) {
  End server(Ca().Issue("server.test")), client(Ca().Issue("client.test"));
  server.Listen();
  TlsStranger old(server.address, TLS1_2_VERSION, &client.files);
  EXPECT_FALSE(old.connected());
  AwaitThat([&] { return server.log.size() == 1; });
  EXPECT_THAT(server.log.text(), HasSubstr("does not speak TLS 1.3"));
  TlsStranger nobody(server.address, TLS1_3_VERSION, nullptr);
  nobody.AwaitClose();
  AwaitThat([&] { return server.log.size() == 2; });
  EXPECT_THAT(server.log.text(), HasSubstr("has shown no certificate"));
  EXPECT_EQ(server.service.link(), nullptr);
}

TEST(TlsPort, FramesThatAreNoneLoseTheLink) {
  End server(Ca().Issue("server.test")), client(Ca().Issue("client.test"));
  server.Listen();
  TlsStranger stranger(server.address, TLS1_3_VERSION, &client.files);
  ASSERT_TRUE(stranger.connected());
  const auto noise = Pattern(1, 1000);
  stranger.Say(noise.data(), noise.size());
  stranger.AwaitClose();
  EXPECT_EQ(server.service.link(), nullptr);
}

TEST(TlsPort, WhoDoesNotShakeHandsInTimeMakesRoom) {
  SteppedClock clock;
  TlsOptions options;
  options.clock = &clock;
  options.handshakes_max = 3;
  End server(Ca().Issue("server.test")), client(Ca().Issue("client.test"));
  server.Listen(options);
  client.Start();
  const size_t before = Descriptors();
  {
    // One says nothing, one half of something, one is half open.
    Stranger silent(server.address), slow(server.address),
        half_open(server.address);
    slow.Say("\x16\x03\x01");
    ::shutdown(half_open.fd(), SHUT_RD);
    half_open.Say("\x16\x03\x01\x02");
    AwaitThat([&] { return Descriptors() == before + 6; });
    std::atomic<bool> connected{false};
    StatusOr<std::shared_ptr<Link>> link;
    client.transport->Connect(server.address, "me", client.service,
                              absl::InfiniteFuture(),
                              [&](StatusOr<std::shared_ptr<Link>> got) {
                                link = std::move(got);
                                connected = true;
                              });
    EXPECT_TRUE(silent.open() && slow.open());
    // Its thread has gone round: what was accepted is timed from now on. Then
    // once more, with nothing but the clock changed.
    const auto go_round = [&] {
      std::atomic<bool> done{false};
      server.transport->Connect("nobody", "", server.service, absl::Now(),
                                [&](const auto&) { done = true; });
      AwaitThat([&] { return done.load(); });
    };
    go_round();
    go_round();
    clock.Advance(options.handshake_timeout);
    go_round();
    AwaitThat([&] { return connected.load(); });
    EXPECT_TRUE(link.ok()) << link.status();
    silent.AwaitClose();
    slow.AwaitClose();
  }
  EXPECT_THAT(server.log.text(),
              HasSubstr("did not show who it is within 10s"));
}

TEST(TlsPort, WhoConnectsDoesNotWaitForEver) {
  const int listener = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in bound{};
  bound.sin_family = AF_INET;
  bound.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof bound;
  ASSERT_EQ(::bind(listener, reinterpret_cast<sockaddr*>(&bound), size), 0);
  ASSERT_EQ(::listen(listener, 8), 0);
  ::getsockname(listener, reinterpret_cast<sockaddr*>(&bound), &size);
  const std::string nobody = absl::StrCat("127.0.0.1:", ntohs(bound.sin_port));
  TlsOptions options;
  options.handshake_timeout = absl::Milliseconds(50);
  End client(Ca().Issue("client.test"));
  client.Start(options);
  EXPECT_EQ(client.Connect(nobody, Clock::Real().Now() + absl::Milliseconds(20))
                .status()
                .code(),
            absl::StatusCode::kDeadlineExceeded);
  const Status late = client.Connect(nobody).status();
  EXPECT_EQ(late.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(late.message()), HasSubstr(nobody));
  ::close(listener);
}

TEST(TlsPort, RefusalsAreLoggedWithinBounds) {
  SteppedClock clock;
  TlsOptions options;
  options.clock = &clock;
  options.workers = 2;
  End server(Ca().Issue("server.test"));
  server.Listen(options);
  const auto knock = [&](int times) {
    for (int i = 0; i < times; ++i) {
      Stranger stranger(server.address);
      stranger.Say("knock knock");
      stranger.AwaitClose();
    }
  };
  knock(25);
  EXPECT_EQ(server.log.size(), 10u);
  clock.Advance(absl::Seconds(1));
  knock(1);
  EXPECT_EQ(server.log.size(), 11u);
  EXPECT_THAT(server.log.text(), HasSubstr("(15 more were not logged)"));
}

// ---- Many

rlim_t RaiseDescriptors() {
  rlimit limit{};
  ::getrlimit(RLIMIT_NOFILE, &limit);
  limit.rlim_cur = limit.rlim_max;
  ::setrlimit(RLIMIT_NOFILE, &limit);
  return limit.rlim_cur;
}

TEST(TlsMany, AThousandAtOnce) {
  const size_t count =
      std::min<size_t>(FewerIfSanitized(1000), (RaiseDescriptors() - 100) / 2);
  TlsOptions options;
  options.handshakes_max = 32;
  options.silence = options.handshake_timeout = absl::Minutes(5);
  End server(Ca().Issue("server.test")), client(Ca().Issue("client.test"));
  server.Listen(options);
  client.Start(options);
  absl::Mutex mu;
  std::vector<std::shared_ptr<Link>> links;
  std::atomic<size_t> ended{0};
  for (size_t i = 0; i < count; ++i) {
    client.transport->Connect(server.address, absl::StrCat(i), client.service,
                              absl::InfiniteFuture(),
                              [&](StatusOr<std::shared_ptr<Link>> link) {
                                if (link.ok()) {
                                  absl::MutexLock lock(&mu);
                                  links.push_back(*std::move(link));
                                }
                                ++ended;
                              });
  }
  AwaitThat([&] { return ended == count; });
  ASSERT_EQ(links.size(), count);
  std::atomic<size_t> answered{0};
  for (const auto& link : links) {
    link->Call("hello", {}, [&](const StatusOr<std::string>& answer) {
      if (answer.ok()) ++answered;
    });
  }
  AwaitThat([&] { return answered == count; });
}

TEST(TlsMany, WithoutDescriptorsOneWaitsForThem) {
  if (kSanitized) {
    GTEST_SKIP() << "UBSan opens a pipe to see whether an object's memory can "
                    "be read, and takes it for unreadable";
  }
  End server(Ca().Issue("server.test")), client(Ca().Issue("client.test"));
  TlsOptions options;
  options.workers = 1;
  server.Listen(options);
  client.Start(options);
  rlimit before{};
  ::getrlimit(RLIMIT_NOFILE, &before);
  rlimit few = before;
  few.rlim_cur = 256;
  ::setrlimit(RLIMIT_NOFILE, &few);
  std::vector<int> taken;
  for (int fd; (fd = ::open("/dev/null", O_RDONLY | O_CLOEXEC)) >= 0;) {
    taken.push_back(fd);
  }
  ::close(taken.back());  // the client's
  taken.pop_back();
  std::atomic<bool> connected{false};
  StatusOr<std::shared_ptr<Link>> link;
  client.transport->Connect(server.address, "me", client.service,
                            absl::InfiniteFuture(),
                            [&](StatusOr<std::shared_ptr<Link>> got) {
                              link = std::move(got);
                              connected = true;
                            });
  AwaitThat([&] { return server.log.size() > 0; });
  EXPECT_THAT(server.log.text(),
              HasSubstr("accepting connections; trying again: Too many open"));
  EXPECT_FALSE(connected);
  for (const int fd : taken) ::close(fd);
  ::setrlimit(RLIMIT_NOFILE, &before);
  AwaitThat([&] { return connected.load(); });
  EXPECT_TRUE(link.ok()) << link.status();
}

TEST(TlsMany, AQuarterOfAGibibyteComesAsItWas) {
  const size_t words = FewerIfSanitized(256_MiB / 8);
  std::vector<uint64_t> source(words), into(words);
  for (size_t i = 0; i < words; ++i) source[i] = (i + 1) * 0x9e3779b97f4a7c15;
  End server(Ca().Issue("server.test")), client(Ca().Issue("client.test"));
  server.Listen();
  client.Start();
  const auto link = client.Connect(server.address);
  ASSERT_TRUE(link.ok()) << link.status();
  AwaitThat([&] { return server.service.link() != nullptr; });
  std::atomic<uint64_t> landed{0};
  const LandingId landing =
      (*link)->OpenLanding(std::as_writable_bytes(std::span(into)),
                           [&](uint64_t, uint64_t bytes) { landed += bytes; });
  ASSERT_TRUE(CallOver(**link, "it is open").ok());
  server.service.link()->Put(landing, 0, std::as_bytes(std::span(source)),
                             Urgency::kDeadline, [](const Status&) {});
  AwaitThat([&] { return landed == words * 8; });
  std::atomic<bool> closed{false};
  (*link)->CloseLanding(landing, [&] { closed = true; });
  AwaitThat([&] { return closed.load(); });
  EXPECT_TRUE(into == source);
}

// ---- Tokens

// Issues tokens to those who ask over TLS.
class TokenService final : public LinkService {
 public:
  explicit TokenService(LinkTokens& tokens) : tokens_(tokens) {}
  StatusOr<std::string> Admit(const std::string&, const Peer&) override {
    return "";
  }
  void OnLink(std::shared_ptr<Link> link) override { link_ = std::move(link); }
  void OnCall(const std::shared_ptr<Link>& link, std::string, absl::Time,
              Answer answer) override {
    answer.Send(tokens_.Issue(link->peer().identity));
  }
  void OnLost(const std::shared_ptr<Link>&, const Status&) override {}
  void LetGo() { link_ = nullptr; }

 private:
  LinkTokens& tokens_;
  std::shared_ptr<Link> link_;
};

// Admits those who have one, over a network that proves nothing.
class TokenDoor final : public LinkService {
 public:
  explicit TokenDoor(LinkTokens& tokens) : tokens_(tokens) {}
  StatusOr<std::string> Admit(const std::string& greeting,
                              const Peer&) override {
    LARDER_ASSIGN_OR_RETURN(admitted, tokens_.Redeem(greeting));
    return "";
  }
  void OnLink(std::shared_ptr<Link> link) override { link_ = std::move(link); }
  void OnCall(const std::shared_ptr<Link>&, std::string, absl::Time,
              Answer) override {}
  void OnLost(const std::shared_ptr<Link>&, const Status&) override {}
  void LetGo() { link_ = nullptr; }

  std::string admitted;

 private:
  LinkTokens& tokens_;
  std::shared_ptr<Link> link_;
};

TEST(TlsTokens, WhatTlsProvedIsGoodForAnotherNetwork) {
  ManualClock clock;
  LinkTokens tokens(clock, {});
  TokenService issuer(tokens);
  StatusOr<std::string> token;
  {
    End server(Ca().Issue("server.test")), client(Ca().Issue("client.test"));
    server.Start();
    const std::string at =
        server.transport->Listen("127.0.0.1:0", issuer).value();
    client.Start();
    const auto link = client.Connect(at);
    ASSERT_TRUE(link.ok()) << link.status();
    token = CallOver(**link, "a token, please");
    ASSERT_TRUE(token.ok()) << token.status();
    issuer.LetGo();
  }
  ManualExecutor executor(clock);
  FakeNetwork network(clock, executor);
  const auto server = network.NewTransport({}),
             client = network.NewTransport({});
  TokenDoor door(tokens);
  EchoService nothing;
  const std::string at = server->Listen("", door).value();
  for (const bool first : {true, false}) {
    std::optional<Status> told;
    client->Connect(at, *token, nothing, absl::InfiniteFuture(),
                    [&](const StatusOr<std::shared_ptr<Link>>& link) {
                      told = link.status();
                    });
    while (!told.has_value()) ASSERT_TRUE(executor.RunOne());
    EXPECT_EQ(told->code(), first ? absl::StatusCode::kOk
                                  : absl::StatusCode::kUnauthenticated);
  }
  EXPECT_EQ(door.admitted, "client.test");
  door.LetGo();
  executor.RunAll();
}

// ---- The stream

}  // namespace
}  // namespace larder
