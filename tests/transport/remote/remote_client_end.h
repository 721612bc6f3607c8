#ifndef LARDER_TESTS_TRANSPORT_REMOTE_REMOTE_CLIENT_END_H_
#define LARDER_TESTS_TRANSPORT_REMOTE_REMOTE_CLIENT_END_H_

#include <cstring>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "store/transport.h"
#include "tests/testing/fake_network.h"
#include "tests/transport/session_harness.h"
#include "transport/remote/remote_messages.h"
#include "transport/remote/remote_server.h"

namespace larder {

// A RemoteServer over a fake network, a fake engine and a clock that stands
// still. Everything happens when the test runs it.
class RemoteBed {
 public:
  explicit RemoteBed(RemoteServer::Options options = {},
                     SessionOptions session = {}) {
    slab = dram.AddSlab(TenantId{}, 1_MiB, 0x5a);
    hub = SessionHub::Create(std::move(session),
                             {.engine = &engine,
                              .dram = &dram,
                              .clock = &clock,
                              .slab_unmapped_everywhere = [this](uint32_t one) {
                                unmapped.push_back(one);
                              }});
    options.log = [this](const std::string& line) { log.push_back(line); };
    server = RemoteServer::Create(hub, std::move(options), executor, clock);
    transport = network.NewTransport({}, "engine-a");
    address = transport->Listen("", *server).value();
  }
  ~RemoteBed() {
    transport.reset();
    executor.RunAll();
  }
  // What is due, without moving the clock.
  void Run() { executor.RunAll(); }
  void Pass(absl::Duration time) { executor.RunUntil(clock.Now() + time); }

  ManualClock clock;
  ManualExecutor executor{clock};
  FakeNetwork network{clock, executor};
  FakeEngine engine;
  FakeMemoryTier dram;
  uint32_t slab = 0;
  std::vector<uint32_t> unmapped;
  std::vector<std::string> log;
  std::shared_ptr<SessionHub> hub;
  std::unique_ptr<RemoteServer> server;
  std::unique_ptr<Transport> transport;
  std::string address;
};

// A client's end, which says whatever it is told to.
class RemoteClientEnd final : public LinkService {
 public:
  explicit RemoteClientEnd(RemoteBed& bed,
                           std::string greeting = std::string(kRemoteGreeting))
      : bed_(bed), transport_(bed.network.NewTransport({}, "store")) {
    transport_->Connect(bed.address, std::move(greeting), *this,
                        absl::InfiniteFuture(),
                        [this](StatusOr<std::shared_ptr<Link>> connected) {
                          status = connected.status();
                          if (connected.ok()) link = *std::move(connected);
                        });
    bed_.Run();
  }
  ~RemoteClientEnd() override {
    link = nullptr;
    transport_.reset();
    bed_.Run();
  }

  StatusOr<std::string> Admit(const std::string&, const Peer&) override {
    return absl::UnimplementedError("");
  }
  void OnLink(std::shared_ptr<Link>) override {}
  void OnCall(const std::shared_ptr<Link>&, std::string message, absl::Time,
              Answer answer) override {
    const ByteSpan bytes = BytesAfterKind(message);
    if (KindOf(message) == RemoteMessage::kCompletions) {
      ++completion_messages;
      for (size_t at = 0; at < bytes.size(); at += sizeof(wire::RingEntry)) {
        std::memcpy(&completions.emplace_back(), bytes.data() + at,
                    sizeof(wire::RingEntry));
      }
    } else {
      const PacketView view = *PacketView::Parse(bytes);
      notices.push_back({view.header().type, view.Body<wire::SlabNotice>()});
    }
    if (keeps_answers) {
      answers.push_back(std::move(answer));
    } else {
      answer.Send(std::string());
    }
  }
  void OnLost(const std::shared_ptr<Link>&, const Status& why) override {
    lost = why;
  }

  // What came of a message, unless nothing did yet.
  using Outcome = std::shared_ptr<std::optional<StatusOr<std::string>>>;
  Outcome Say(RemoteMessage kind, ByteSpan bytes) {
    return SayRaw(RemoteMessageOf(kind, bytes));
  }
  Outcome Say(RemoteMessage kind, PacketWriter packet) {
    return Say(kind, packet.Bytes());
  }
  Outcome SayRaw(std::string message) {
    auto outcome = std::make_shared<std::optional<StatusOr<std::string>>>();
    link->Call(std::move(message), {}, [outcome](StatusOr<std::string> answer) {
      *outcome = std::move(answer);
    });
    bed_.Run();
    return outcome;
  }
  template <class T>
  Outcome Fetch(const T& request) {
    return Say(RemoteMessage::kFetch, BytesOf(request));
  }
  template <class T>
  static T BodyOf(const Outcome& outcome) {
    return PacketView::Parse(std::as_bytes(std::span(***outcome)))
        ->template Body<T>();
  }

  // Says hello and opens SmallSpace as handle 1. False: it was refused.
  bool Open() {
    const auto hello =
        Say(RemoteMessage::kCall,
            PacketWriter(wire::Type::kHello, 1).Body(wire::Hello{}));
    if (!hello->has_value() || !(*hello)->ok()) return false;
    welcome = BodyOf<wire::HelloReply>(hello);
    if (welcome.head.status != 0) return false;
    const std::string encoded = EncodeSpace(SmallSpace());
    const auto opened =
        Say(RemoteMessage::kCall,
            PacketWriter(wire::Type::kOpenSpace, 2)
                .Body(wire::OpenSpace{
                    .encoded_bytes = static_cast<uint32_t>(encoded.size())})
                .Append(encoded.data(), encoded.size()));
    return BodyOf<wire::OpenSpaceReply>(opened).handle == 1;
  }
  // Holds so many chunks of SmallSpace.
  wire::HoldReply Hold(size_t chunks, uint64_t request = 3) {
    return BodyOf<wire::HoldReply>(Say(
        RemoteMessage::kCall, SessionHarness::Hold(request, SomeIds(chunks))));
  }
  // Shares staging; 0: it was refused.
  uint32_t Share(uint64_t bytes, uint64_t request = 4) {
    const auto shared = Say(RemoteMessage::kCall,
                            PacketWriter(wire::Type::kShareStaging, request)
                                .Body(wire::ShareStaging{.bytes = bytes}));
    if (!(*shared)->ok()) return 0;
    return BodyOf<wire::ShareStagingReply>(shared).region;
  }
  static PacketWriter CommitOf(uint64_t request, uint32_t region,
                               uint64_t offset, uint64_t bytes,
                               uint64_t reservation = 1) {
    return PacketWriter(wire::Type::kCommit, request)
        .Body(wire::Commit{.reservation = reservation,
                           .region = region,
                           .offset = offset,
                           .bytes = bytes});
  }
  // Reserves, as FakeEngine lets anybody; returns the reservation.
  uint64_t Reserve(uint64_t request = 5) {
    return BodyOf<wire::ReserveReply>(
               Say(RemoteMessage::kCall,
                   PacketWriter(wire::Type::kReserve, request)
                       .Body(wire::Reserve{.space = 1,
                                           .record_bytes = kPageBytes})))
        .reservation;
  }
  // The landing that a commit is answered with; 0: it was refused.
  LandingId Commit(PacketWriter commit) {
    const auto answer = Say(RemoteMessage::kCommit, std::move(commit));
    LandingId landing = 0;
    if (!answer->has_value() || !(*answer)->ok() ||
        !ReadExactly(std::as_bytes(std::span(***answer)), landing)) {
      return 0;
    }
    return landing;
  }
  void Put(LandingId landing, uint64_t offset, ByteSpan bytes) {
    link->Put(landing, offset, bytes, Urgency::kNormal, [](const Status&) {});
    bed_.Run();
  }

  std::shared_ptr<Link> link;
  Status status, lost;
  wire::HelloReply welcome;
  struct Notice {
    wire::Type type;
    wire::SlabNotice body;
  };
  std::vector<Notice> notices;
  std::vector<wire::RingEntry> completions;
  size_t completion_messages = 0;
  bool keeps_answers = false;
  std::vector<Answer> answers;

 private:
  RemoteBed& bed_;
  std::unique_ptr<Transport> transport_;
};

}  // namespace larder

#endif  // LARDER_TESTS_TRANSPORT_REMOTE_REMOTE_CLIENT_END_H_
