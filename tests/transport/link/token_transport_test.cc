// Links over a network that proves nothing, between peers that were proved on
// another: the contract, and who gets no link.

#include "transport/link/token_transport.h"

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/conformance/transport_conformance.h"
#include "tests/testing/fake_network.h"
#include "transport/link/token_messages.h"

namespace larder {
namespace {

class TokenHarness final : public TransportHarness {
 public:
  std::unique_ptr<Transport> NewTransport(
      const TransportOptions& options) override {
    return New(options, identity());
  }
  // `peer`: who its peers are, as the control network proves it.
  std::unique_ptr<Transport> New(const TransportOptions& options,
                                 std::string peer) {
    TokenTransportParts parts;
    parts.control = control.NewTransport(options, std::move(peer));
    parts.data = data.NewTransport(options);
    parts.clock = &clock_;
    return NewTokenTransport(std::move(parts));
  }
  std::string address() const override { return "fake:0"; }
  std::string identity() const override { return "a fake"; }
  Clock& clock() override { return clock_; }
  void PumpUntil(absl::FunctionRef<bool()> done) override {
    for (int idle = 0; !done();) {
      if (executor_.RunOne()) {
        idle = 0;
        continue;
      }
      clock_.Advance(absl::Milliseconds(1));
      ASSERT_LT(++idle, 1'000'000) << "it never happens";
    }
  }

 private:
  ManualClock clock_;
  ManualExecutor executor_{clock_};

 public:
  FakeNetwork control{clock_, executor_};
  FakeNetwork data{clock_, executor_};
};

INSTANTIATE_TEST_SUITE_P(Token, TransportConformance,
                         testing::Values(TransportFactory{
                             "fake",
                             [] { return std::make_unique<TokenHarness>(); }}),
                         TransportFactoryName);

// A listener, and a thief on the network that proves nothing.
class TokenTransportTest : public testing::Test {
 protected:
  ~TokenTransportTest() override { served_.LetGo(); }

  StatusOr<std::shared_ptr<Link>> Connect(Transport& from,
                                          const std::string& address,
                                          const std::string& greeting,
                                          LinkService& service) {
    StatusOr<std::shared_ptr<Link>> got;
    bool done = false;
    from.Connect(address, greeting, service,
                 bed_.clock().Now() + absl::Minutes(1),
                 [&](StatusOr<std::shared_ptr<Link>> link) {
                   got = std::move(link);
                   done = true;
                 });
    bed_.PumpUntil([&] { return done; });
    return got;
  }
  // What a node gets when it asks for a token.
  TokenGrant Ask() {
    const auto link = Connect(*asks_, address_, EncodeTokenInquiry(), thiefs_);
    EXPECT_TRUE(link.ok()) << link.status();
    return link.ok() ? ParseTokenGrant((*link)->peer_greeting()).value()
                     : TokenGrant{};
  }
  Status Greet(const TokenGrant& grant, const std::string& token,
               const std::string& identity) {
    return Connect(*thief_, grant.address,
                   Encode(TokenHello{token, identity, "me"}), thiefs_)
        .status();
  }

  TokenHarness bed_;
  EchoService served_, thiefs_;
  std::unique_ptr<Transport> server_ = bed_.New({}, "node-a");
  std::unique_ptr<Transport> asks_ = bed_.control.NewTransport({}, "node-b");
  std::unique_ptr<Transport> thief_ = bed_.data.NewTransport({});
  const std::string address_ = server_->Listen("", served_).value();
};

TEST_F(TokenTransportTest, BothEndsKnowWhoIsThere) {
  EchoService calling;
  const auto client = bed_.New({}, "node-b");
  const auto link = Connect(*client, address_, "me", calling);
  ASSERT_TRUE(link.ok()) << link.status();
  bed_.PumpUntil([&] { return served_.link() != nullptr; });
  EXPECT_EQ(served_.link()->peer().identity, "node-a");
  EXPECT_EQ(served_.link()->peer_greeting(), "me");
  EXPECT_EQ((*link)->peer().identity, "node-b");
}

TEST_F(TokenTransportTest, ATokenIsGoodOnce) {
  const TokenGrant grant = Ask();
  EXPECT_EQ(grant.identity, "node-a");
  EXPECT_TRUE(Greet(grant, grant.token, "node-a").ok());
  EXPECT_EQ(Greet(grant, grant.token, "node-a").code(),
            absl::StatusCode::kUnauthenticated);
}

TEST_F(TokenTransportTest, ATokenIsGoodForItsNodeAlone) {
  const TokenGrant grant = Ask();
  EXPECT_EQ(Greet(grant, grant.token, "node-c").code(),
            absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(Greet(grant, grant.token, "node-a").code(),
            absl::StatusCode::kUnauthenticated);  // used
}

TEST_F(TokenTransportTest, ATokenEndsByItself) {
  const TokenGrant grant = Ask();
  const absl::Time late = bed_.clock().Now() + absl::Seconds(10);
  bed_.PumpUntil([&] { return bed_.clock().Now() >= late; });
  EXPECT_EQ(Greet(grant, grant.token, "node-a").code(),
            absl::StatusCode::kUnauthenticated);
}

TEST_F(TokenTransportTest, WithoutATokenThereIsNoLink) {
  const TokenGrant grant = Ask();
  EXPECT_EQ(Greet(grant, std::string(kTokenBytes, 'x'), "node-a").code(),
            absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(Connect(*thief_, grant.address, "me", thiefs_).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Connect(*asks_, address_, "me", thiefs_).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(served_.link(), nullptr);
}

TEST_F(TokenTransportTest, WhoProvedNobodyGetsNoToken) {
  const auto server = bed_.New({}, "");
  const std::string address = server->Listen("", served_).value();
  EXPECT_EQ(
      Connect(*asks_, address, EncodeTokenInquiry(), thiefs_).status().code(),
      absl::StatusCode::kFailedPrecondition);
}

// Takes every token, and answers as well as it can.
class Impostor final : public LinkService {
 public:
  StatusOr<std::string> Admit(const std::string&, const Peer&) override {
    return answer;
  }
  void OnLink(std::shared_ptr<Link> link) override { links.push_back(link); }
  void OnCall(const std::shared_ptr<Link>&, std::string, absl::Time,
              Answer) override {}
  void OnLost(const std::shared_ptr<Link>&, const Status&) override {}
  std::string answer;
  std::vector<std::shared_ptr<Link>> links;
};

TEST_F(TokenTransportTest, WhoAnswersInsteadOfTheListenerIsNotBelieved) {
  // The listener says that its other address is the impostor's.
  Impostor impostor, control;
  const auto elsewhere = bed_.data.NewTransport({});
  TokenGrant grant = Ask();
  grant.address = elsewhere->Listen("", impostor).value();
  control.answer = Encode(grant);
  const auto listener = bed_.control.NewTransport({}, "node-a");
  const std::string address = listener->Listen("", control).value();
  const auto client = bed_.New({}, "node-b");
  for (const std::string& answer :
       {std::string(), std::string("me"),
        Encode(TokenWelcome{std::string(kTokenBytes, 'x'), "me"}),
        Encode(TokenWelcome{grant.token, "me"})}) {
    impostor.answer = answer;
    EXPECT_FALSE(Connect(*client, address, "me", thiefs_).ok());
  }
  impostor.answer = Encode(TokenWelcome{grant.proof, "me"});
  EXPECT_TRUE(Connect(*client, address, "me", thiefs_).ok());
}

}  // namespace
}  // namespace larder
