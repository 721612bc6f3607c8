// Arbitrary frames for one end of a link between hosts, while it has calls,
// puts and a landing under way. The input is a program:
//
//   byte 0: 1: this end connects, else it is connected to; 2: frames are sent
//           at once, else when the program says so
//   then steps, each of a byte and what it needs:
//     0xf0: what was sent is done; 0xf1: time passes; 0xf2: calls, puts;
//     0xf3: the landing is closed; 0xf4: the wire is lost; 0xf5: closed here
//     else a frame: kind = byte & 15, bits 4: with a wrong magic, 5: of another
//     version; then code, reserved, call, landing (0: the open one), offset /
//     256, bytes / 16

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "tests/testing/manual_clock.h"
#include "tests/testing/manual_executor.h"
#include "transport/link/link_core.h"

namespace larder {
namespace {

void Require(bool condition) {
  if (!condition) std::abort();
}

// Every callback comes once.
struct Once {
  std::shared_ptr<int> calls = std::make_shared<int>(0);
  void operator()() const { Require(++*calls == 1); }
};

class Service final : public LinkService {
 public:
  StatusOr<std::string> Admit(const std::string& greeting,
                              const Peer&) override {
    if (greeting.size() % 5 == 4) return absl::PermissionDeniedError("no");
    return greeting;
  }
  void OnLink(std::shared_ptr<Link> link) override { links.push_back(link); }
  void OnCall(const std::shared_ptr<Link>&, std::string message, absl::Time,
              Answer answer) override {
    if (message.size() % 3 == 0) {
      answer.Send(std::move(message));
    } else if (message.size() % 3 == 1) {
      kept.push_back(std::move(answer));
    }
  }
  void OnLost(const std::shared_ptr<Link>&, const Status&) override {
    Require(++lost == 1);
  }
  std::vector<std::shared_ptr<Link>> links;
  std::vector<Answer> kept;
  int lost = 0;
};

struct Outbox {
  std::vector<Wire::Done> sent, receiving;
  bool at_once = false;
  bool closed = false;
  void Finish(const Status& status) {
    for (auto* list : {&sent, &receiving}) {
      for (Wire::Done& done : std::exchange(*list, {})) std::move(done)(status);
    }
  }
};

class FuzzWire final : public Wire {
 public:
  FuzzWire(ManualExecutor& executor, Outbox& out)
      : executor_(executor), out_(out) {}
  void Send(const FrameHeader& header, ByteSpan bytes, Done done) override {
    Require(!out_.closed || header.kind != FrameKind::kPut);
    const auto parsed = ParseFrame(std::as_bytes(std::span(&header, 1)));
    Require(parsed.has_value() && header.bytes == bytes.size());
    // Whoever sends keeps the bytes: reads them all.
    volatile uint8_t sum = 0;
    for (const std::byte byte : bytes) sum = sum + static_cast<uint8_t>(byte);
    if (out_.at_once || out_.closed) {
      std::move(done)(absl::OkStatus());
    } else {
      out_.sent.push_back(std::move(done));
    }
  }
  void Close(Task closed) override {
    Require(!out_.closed);
    out_.closed = true;
    executor_.Post([this, closed = std::move(closed)]() mutable {
      out_.Finish(absl::CancelledError("closed"));
      std::move(closed)();
    });
  }

 private:
  ManualExecutor& executor_;
  Outbox& out_;
};

class FuzzBytes final : public Incoming {
 public:
  FuzzBytes(size_t size, Outbox& out, bool late)
      : size_(size), out_(out), late_(late) {}
  void Receive(std::byte* into, Wire::Done done) && override {
    std::memset(into, 0x5a, size_);
    if (late_) {
      out_.receiving.push_back(std::move(done));
    } else {
      std::move(done)(absl::OkStatus());
    }
  }

 private:
  const size_t size_;
  Outbox& out_;
  const bool late_;
};

class Program {
 public:
  Program(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t Next() {
    if (at_ >= size_) return 0;
    return data_[at_++];
  }
  bool more() const { return at_ < size_; }

 private:
  const uint8_t* const data_;
  const size_t size_;
  size_t at_ = 0;
};

}  // namespace
}  // namespace larder

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace larder;
  Program program(data, size);
  const uint8_t mode = program.Next();
  ManualClock clock;
  ManualExecutor executor(clock);
  Service service;
  Outbox out;
  out.at_once = (mode & 2) != 0;
  std::vector<std::byte> memory(4096), source(300'000);
  LandingId landing = 0;
  int ended = 0, connected = 0;
  {
    LinkCore::Parts parts;
    parts.strand = &executor;
    parts.clock = &clock;
    parts.service = &service;
    parts.options.calls_max = 8;
    parts.options.piece_bytes = 64_KiB;
    parts.options.window_bytes = 128_KiB;
    const auto core = std::make_shared<LinkCore>(std::move(parts));
    std::optional<LinkCore::Opening> opening;
    if ((mode & 1) != 0) {
      opening.emplace();
      opening->greeting = "me";
      opening->deadline = clock.Now() + absl::Seconds(3);
      opening->connected = [&](StatusOr<std::shared_ptr<Link>> link) {
        Require(++connected == 1);
        if (link.ok()) service.links.push_back(*std::move(link));
      };
    }
    core->Start(std::make_unique<FuzzWire>(executor, out), std::move(opening),
                [&] { Require(++ended == 1); });
    while (program.more()) {
      const uint8_t step = program.Next();
      Link* const link =
          service.links.empty() ? nullptr : service.links[0].get();
      switch (step) {
        case 0xf0:
          out.Finish(absl::OkStatus());
          break;
        case 0xf1:
          clock.Advance(absl::Milliseconds(700));
          break;
        case 0xf2:
          if (link == nullptr) break;
          link->Call("something", {clock.Now() + absl::Seconds(1)},
                     [once = Once{}](const StatusOr<std::string>&) { once(); });
          link->Put(7, 1, source, Urgency::kBackground,
                    [once = Once{}](const Status&) { once(); });
          if (landing == 0) {
            landing = link->OpenLanding(memory, [](uint64_t at, uint64_t n) {
              Require(at <= 4096 && n <= 4096 - at);
            });
          }
          break;
        case 0xf3:
          if (link == nullptr || landing == 0) break;
          link->CloseLanding(std::exchange(landing, 0),
                             [once = Once{}] { once(); });
          break;
        case 0xf4:
          core->OnWireLost(absl::UnavailableError("cut"));
          break;
        case 0xf5:
          if (link != nullptr) link->Close();
          break;
        default: {
          if (out.closed) break;
          FrameHeader header;
          header.kind = static_cast<FrameKind>(step & 15);
          if ((step & 16) != 0) header.magic ^= 1;
          if ((step & 32) != 0) header.version = 2;
          header.code = program.Next();
          header.reserved = program.Next();
          header.call = program.Next();
          const uint8_t where = program.Next();
          header.landing = where == 0 ? landing : where;
          header.offset = uint64_t{program.Next()} * 256;
          header.bytes = uint64_t{program.Next()} * 16;
          core->OnFrame(std::as_bytes(std::span(&header, 1)),
                        header.bytes == 0
                            ? nullptr
                            : std::make_unique<FuzzBytes>(header.bytes, out,
                                                          (step & 64) != 0));
        }
      }
      executor.RunAll();
    }
    service.kept.clear();
    service.links.clear();  // closes it
    executor.RunAll();
    core->Lose(absl::CancelledError("the end"));
    for (int i = 0; i < 4; ++i) {
      executor.RunAll();
      out.Finish(absl::OkStatus());
    }
  }
  Require(ended == 1 && out.closed);
  Require((mode & 1) == 0 || connected == 1);
  return 0;
}
