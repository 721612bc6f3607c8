// The contract over UCX, tcp and shared memory.

#include "transport/ucx/ucx_transport.h"

#include "tests/conformance/transport_conformance.h"

namespace larder {
namespace {

class UcxHarness final : public TransportHarness {
 public:
  explicit UcxHarness(std::string transports)
      : transports_(std::move(transports)) {}
  std::unique_ptr<Transport> NewTransport(
      const TransportOptions& options) override {
    UcxOptions ucx;
    static_cast<TransportOptions&>(ucx) = options;
    ucx.transports = transports_;
    ucx.workers = 2;
    auto transport = NewUcxTransport(ucx);
    EXPECT_TRUE(transport.ok()) << transport.status();
    return *std::move(transport);
  }
  std::string address() const override { return "127.0.0.1:0"; }
  Clock& clock() override { return Clock::Real(); }
  void PumpUntil(absl::FunctionRef<bool()> done) override { AwaitThat(done); }

 private:
  const std::string transports_;
};

TransportFactory Over(std::string name, std::string transports) {
  return {std::move(name), [transports = std::move(transports)] {
            return std::make_unique<UcxHarness>(transports);
          }};
}

INSTANTIATE_TEST_SUITE_P(Ucx, TransportConformance,
                         testing::Values(Over("tcp", "tcp"),
                                         Over("shm", "shm,tcp")),
                         TransportFactoryName);

}  // namespace
}  // namespace larder
