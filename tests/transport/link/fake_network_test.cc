// The contract over wires on a clock that stands still, and what only those can
// show: silence, turns, and a peer that stops in the middle of a put.

#include "tests/testing/fake_network.h"

#include "tests/conformance/transport_conformance.h"

namespace larder {
namespace {

class FakeHarness final : public TransportHarness {
 public:
  std::unique_ptr<Transport> NewTransport(
      const TransportOptions& options) override {
    return network.NewTransport(options, identity());
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
  FakeNetwork network{clock_, executor_};
};

INSTANTIATE_TEST_SUITE_P(Fake, TransportConformance,
                         testing::Values(TransportFactory{
                             "fake",
                             [] { return std::make_unique<FakeHarness>(); }}),
                         TransportFactoryName);

// Two ends, and a test that decides when what happens.
class LinkTest : public testing::Test {
 protected:
  void Open(const TransportOptions& options) {
    server_ = bed_.NewTransport(options);
    client_ = bed_.NewTransport(options);
    bool done = false;
    client_->Connect(server_->Listen("", served_).value(), "me", calling_,
                     absl::InfiniteFuture(),
                     [&](StatusOr<std::shared_ptr<Link>> link) {
                       link_ = *std::move(link);
                       done = true;
                     });
    bed_.PumpUntil([&] { return done && served_.link() != nullptr; });
    far_ = served_.link();
  }
  ~LinkTest() override {
    link_ = far_ = nullptr;
    served_.LetGo();
  }

  FakeHarness bed_;
  EchoService served_, calling_;
  std::unique_ptr<Transport> server_, client_;
  std::shared_ptr<Link> link_, far_;
};

TEST_F(LinkTest, WhatIsUrgentOvertakesWhatIsNot) {
  TransportOptions options;
  options.window_bytes = options.piece_bytes = 1000;
  Open(options);
  std::vector<std::byte> into(30'000);
  std::vector<uint64_t> order;
  const LandingId landing = link_->OpenLanding(
      into, [&](uint64_t offset, uint64_t) { order.push_back(offset); });
  const auto from = Pattern(1, 10'000);
  int done = 0;
  const auto put = [&](uint64_t offset, Urgency urgency) {
    far_->Put(landing, offset, from, urgency, [&](Status) { ++done; });
  };
  put(0, Urgency::kBackground);
  bed_.PumpUntil([&] { return order.size() == 2; });
  put(10'000, Urgency::kNormal);
  put(20'000, Urgency::kDeadline);
  bed_.PumpUntil([&] { return done == 3; });
  // What was handed over goes first, then by urgency.
  const std::vector<uint64_t> urgent(order.begin() + 3, order.begin() + 13);
  EXPECT_TRUE(std::all_of(urgent.begin(), urgent.end(), [](uint64_t at) {
    return at >= 20'000;
  })) << testing::PrintToString(order);
  EXPECT_TRUE(
      std::all_of(order.begin() + 13, order.begin() + 23,
                  [](uint64_t at) { return at >= 10'000 && at < 20'000; }))
      << testing::PrintToString(order);
}

TEST_F(LinkTest, SilenceLosesALinkAndWhoLivesIsNotSilent) {
  TransportOptions options;
  options.silence = absl::Seconds(1);
  Open(options);
  const absl::Time quiet = bed_.clock().Now() + absl::Minutes(1);
  bed_.PumpUntil([&] { return bed_.clock().Now() >= quiet; });
  EXPECT_EQ(calling_.lost() + served_.lost(), 0u);  // nothing was said for long
  Status called;
  link_->Call("keep", {},
              [&](StatusOr<std::string> answer) { called = answer.status(); });
  bed_.network.Stop();
  const absl::Time stopped = bed_.clock().Now();
  bed_.PumpUntil([&] { return calling_.lost() == 1 && served_.lost() == 1; });
  EXPECT_LE(bed_.clock().Now() - stopped, absl::Milliseconds(1200));
  EXPECT_EQ(called.code(), absl::StatusCode::kUnavailable);
}

TEST_F(LinkTest, APeerThatStopsInTheMiddleOfAPutCostsTheLink) {
  TransportOptions options;
  options.silence = absl::Hours(1);
  options.drain = absl::Milliseconds(100);
  Open(options);
  bed_.network.SetDelay(absl::Milliseconds(10));
  std::vector<std::byte> into(100'000, std::byte{0xee});
  const LandingId landing = link_->OpenLanding(into, nullptr);
  const auto from = Pattern(1, into.size());
  bool put = false;
  far_->Put(landing, 0, from, Urgency::kNormal, [&](Status) { put = true; });
  bed_.PumpUntil([&] { return into[0] == from[0]; });
  bed_.network.Stop();
  const absl::Time asked = bed_.clock().Now();
  bool closed = false;
  link_->CloseLanding(landing, [&] { closed = true; });
  bed_.PumpUntil([&] { return closed; });
  EXPECT_EQ(bed_.clock().Now() - asked, absl::Milliseconds(100));
  EXPECT_EQ(calling_.lost(), 1u);
  std::fill(into.begin(), into.end(), std::byte{0xee});
  far_->Close();
  bed_.PumpUntil([&] { return put; });
  EXPECT_TRUE(std::all_of(into.begin(), into.end(),
                          [](std::byte b) { return b == std::byte{0xee}; }));
}

TEST_F(LinkTest, AnAnswerNobodyWaitsForIsNotReceived) {
  Open({});
  bed_.network.SetDelay(absl::Milliseconds(10));
  CallOptions options;
  options.deadline = bed_.clock().Now() + absl::Milliseconds(15);
  Status called;
  bool done = false;
  link_->Call(std::string(100'000, 'x'), options,
              [&](StatusOr<std::string> answer) {
                called = answer.status();
                done = true;
              });
  bed_.PumpUntil([&] { return done; });
  EXPECT_EQ(called.code(), absl::StatusCode::kDeadlineExceeded);
  const absl::Time later = bed_.clock().Now() + absl::Seconds(1);
  bed_.PumpUntil([&] { return bed_.clock().Now() >= later; });
  EXPECT_EQ(calling_.lost() + served_.lost(), 0u);
}

}  // namespace
}  // namespace larder
