// The contract over TCP as it is, and how frames are taken out of a stream.

#include "transport/tcp/tcp_transport.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "tests/conformance/transport_conformance.h"
#include "tests/testing/fake_network.h"
#include "transport/tcp/frame_stream.h"

namespace larder {
namespace {

class TcpHarness final : public TransportHarness {
 public:
  TcpHarness(std::string address, uint32_t workers)
      : address_(std::move(address)), workers_(workers) {}
  std::unique_ptr<Transport> NewTransport(
      const TransportOptions& options) override {
    StreamOptions tcp;
    static_cast<TransportOptions&>(tcp) = options;
    tcp.workers = workers_;
    auto transport = NewTcpTransport(tcp);
    EXPECT_TRUE(transport.ok()) << transport.status();
    return *std::move(transport);
  }
  std::string address() const override { return address_; }
  Clock& clock() override { return Clock::Real(); }
  void PumpUntil(absl::FunctionRef<bool()> done) override { AwaitThat(done); }

 private:
  const std::string address_;
  const uint32_t workers_;
};

INSTANTIATE_TEST_SUITE_P(
    Tcp, TransportConformance,
    testing::Values(
        TransportFactory{
            "v4",
            [] { return std::make_unique<TcpHarness>("127.0.0.1:0", 2); }},
        TransportFactory{
            "v6", [] { return std::make_unique<TcpHarness>("[::1]:0", 1); }}),
    TransportFactoryName);

class SilentWire final : public Wire {
 public:
  explicit SilentWire(Executor& strand) : strand_(strand) {}
  void Send(const FrameHeader&, ByteSpan, Done done) override {
    std::move(done)(absl::OkStatus());
  }
  void Close(Task closed) override { strand_.Post(std::move(closed)); }

 private:
  Executor& strand_;
};

class FrameStreamTest : public testing::Test {
 protected:
  FrameStreamTest() {
    LinkCore::Parts parts;
    parts.strand = &executor_;
    parts.clock = &clock_;
    parts.service = &service_;
    core_ = std::make_shared<LinkCore>(std::move(parts));
    stream_.emplace(core_);
    core_->Start(std::make_unique<SilentWire>(executor_), std::nullopt, [] {});
    Feed(Header(FrameKind::kHello, 2), 48);
    Feed(std::as_bytes(std::span("me", 2)), 1);
    executor_.RunAll();
  }
  ~FrameStreamTest() override {
    service_.LetGo();
    executor_.RunAll();
    core_->Lose(absl::CancelledError("the end"));
    executor_.RunAll();
  }
  static std::vector<std::byte> Header(FrameKind kind, uint64_t bytes,
                                       LandingId landing = 0,
                                       uint64_t offset = 0) {
    FrameHeader header;
    header.kind = kind;
    header.bytes = bytes;
    header.landing = landing;
    header.offset = offset;
    const ByteSpan raw = std::as_bytes(std::span(&header, 1));
    return {raw.begin(), raw.end()};
  }
  // In portions of `step` at most.
  void Feed(ByteSpan bytes, size_t step) {
    while (!bytes.empty()) {
      const MutableByteSpan room = stream_->Room();
      ASSERT_FALSE(room.empty());
      const size_t size = std::min({bytes.size(), room.size(), step});
      std::memcpy(room.data(), bytes.data(), size);
      stream_->Filled(size);
      bytes = bytes.subspan(size);
    }
  }

  ManualClock clock_;
  ManualExecutor executor_{clock_};
  EchoService service_;
  std::shared_ptr<LinkCore> core_;
  std::optional<FrameStream> stream_;
};

TEST_F(FrameStreamTest, BytesAreReadToWhereTheyBelong) {
  const auto link = service_.link();
  ASSERT_NE(link, nullptr);
  EXPECT_EQ(link->peer_greeting(), "me");
  std::vector<std::byte> into(1000);
  const LandingId landing = link->OpenLanding(into, nullptr);
  executor_.RunAll();
  Feed(Header(FrameKind::kPut, 600, landing, 300), 7);
  EXPECT_EQ(stream_->Room().data(), into.data() + 300);
  EXPECT_EQ(stream_->Room().size(), 600u);
  const auto bytes = Pattern(1, 600);
  Feed(bytes, 41);
  EXPECT_TRUE(std::equal(bytes.begin(), bytes.end(), into.begin() + 300));
  // What nobody wants is passed over, what follows is found.
  Feed(Header(FrameKind::kPut, 600, landing + 1), 48);
  Feed(bytes, 600);
  Feed(Header(FrameKind::kPut, 1, landing), 48);
  EXPECT_EQ(stream_->Room().data(), into.data());
}

TEST_F(FrameStreamTest, WhoIsSlowIsNotSilent) {
  const auto link = service_.link();
  std::vector<std::byte> into(100);
  const LandingId landing = link->OpenLanding(into, nullptr);
  executor_.RunAll();
  Feed(Header(FrameKind::kPut, 100, landing), 48);
  const auto bytes = Pattern(1, 100);
  for (int i = 0; i < 100; ++i) {
    executor_.RunUntil(clock_.Now() + absl::Seconds(4));
    Feed(ByteSpan(bytes).subspan(i, 1), 1);
  }
  EXPECT_EQ(service_.lost(), 0u);
  EXPECT_TRUE(into == bytes);
  executor_.RunUntil(clock_.Now() + absl::Seconds(6));
  EXPECT_EQ(service_.lost(), 1u);
}

TEST_F(FrameStreamTest, AfterWhatIsNoFrameNothingIsRead) {
  const auto link = service_.link();
  std::vector<std::byte> into(100, std::byte{0xee});
  const LandingId landing = link->OpenLanding(into, nullptr);
  executor_.RunAll();
  Feed(Pattern(3, 48), 48);
  Feed(Header(FrameKind::kPut, 100, landing), 48);
  Feed(Pattern(1, 100), 100);
  executor_.RunAll();
  EXPECT_EQ(service_.lost(), 1u);
  EXPECT_EQ(into[0], std::byte{0xee});
}

}  // namespace
}  // namespace larder
