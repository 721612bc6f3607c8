// Arbitrary bytes in what a TLS stream carries, for a link that is admitted and
// has a landing. The input: byte 0: in portions of so many bytes (0: as much as
// there is room for); byte 1: 1: a hello and a put into the landing come before
// the rest, so that the fuzzer need not guess a landing's number.

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/testing/manual_clock.h"
#include "tests/testing/manual_executor.h"
#include "transport/tcp/frame_stream.h"

namespace larder {
namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

class Service final : public LinkService {
 public:
  StatusOr<std::string> Admit(const std::string& greeting,
                              const Peer&) override {
    return greeting;
  }
  void OnLink(std::shared_ptr<Link> got) override { link = std::move(got); }
  void OnCall(const std::shared_ptr<Link>&, std::string message, absl::Time,
              Answer answer) override {
    answer.Send(std::move(message));
  }
  void OnLost(const std::shared_ptr<Link>&, const Status&) override {}
  std::shared_ptr<Link> link;
};

class FuzzWire final : public Wire {
 public:
  FuzzWire(ManualExecutor& executor, FrameStream& stream)
      : executor_(executor), stream_(stream) {}
  void Send(const FrameHeader&, ByteSpan, Done done) override {
    std::move(done)(absl::OkStatus());
  }
  void Close(Task closed) override {
    stream_.End(absl::CancelledError("closed"));
    executor_.Post(std::move(closed));
  }

 private:
  ManualExecutor& executor_;
  FrameStream& stream_;
};

}  // namespace
}  // namespace larder

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace larder;
  if (size < 2) return 0;
  const size_t step = data[0] == 0 ? SIZE_MAX : data[0];
  const bool begun = (data[1] & 1) != 0;
  ManualClock clock;
  ManualExecutor executor(clock);
  Service service;
  LinkCore::Parts parts;
  parts.strand = &executor;
  parts.clock = &clock;
  parts.service = &service;
  const auto core = std::make_shared<LinkCore>(std::move(parts));
  FrameStream stream(core);
  bool ended = false;
  core->Start(std::make_unique<FuzzWire>(executor, stream), std::nullopt,
              [&] { ended = true; });
  const auto feed = [&](ByteSpan bytes) {
    while (!bytes.empty()) {
      const MutableByteSpan room = stream.Room();
      Require(!room.empty());
      const size_t portion = std::min({bytes.size(), room.size(), step});
      std::memcpy(room.data(), bytes.data(), portion);
      stream.Filled(portion);
      executor.RunAll();
      bytes = bytes.subspan(portion);
    }
  };
  const auto memory = std::make_unique<std::vector<std::byte>>(4096);
  LandingId landing = 0;
  bool closed = false;
  if (begun) {
    FrameHeader header;
    header.kind = FrameKind::kHello;
    feed(std::as_bytes(std::span(&header, 1)));
    Require(service.link != nullptr);
    landing = service.link->OpenLanding(*memory, nullptr);
    executor.RunAll();
    header.kind = FrameKind::kPut;
    header.landing = landing;
    header.bytes = 64;
    feed(std::as_bytes(std::span(&header, 1)));
  }
  feed(std::as_bytes(std::span(data + 2, size - 2)));
  if (landing != 0) {
    service.link->CloseLanding(landing, [&] { closed = true; });
    executor.RunAll();
    // Somebody stopped in the middle of a put, perhaps.
    clock.Advance(TransportOptions().drain);
    executor.RunAll();
    Require(closed);
  }
  service.link = nullptr;
  executor.RunAll();
  core->Lose(absl::CancelledError("the end"));
  executor.RunAll();
  Require(ended);
  return 0;
}
