#ifndef LARDER_TRANSPORT_LINK_LINK_CORE_H_
#define LARDER_TRANSPORT_LINK_LINK_CORE_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/clock.h"
#include "store/executor.h"
#include "store/transport.h"
#include "transport/link/frame.h"

namespace larder {

// How frames get from one end of a link to the other. All of it is called, and
// calls back, on the link's strand only.
class Wire {
 public:
  using Done = absl::AnyInvocable<void(Status) &&>;

  virtual ~Wire() = default;

  // Sends a frame; `bytes` stay unchanged until `done`, which may come within
  // the call. Frames without bytes and those with few arrive in order of their
  // sending; others may be overtaken.
  virtual void Send(const FrameHeader& header, ByteSpan bytes, Done done) = 0;

  // Nothing is sent or received any more. Every `done` that is still out comes,
  // as soon as its memory is not touched any more, then `closed`.
  virtual void Close(Task closed) = 0;
};

// Bytes of a frame that is arriving. Destroyed without Receive: dropped.
class Incoming {
 public:
  virtual ~Incoming() = default;
  // Puts all of them at `into`; `done` may come within the call.
  virtual void Receive(std::byte* into, Wire::Done done) && = 0;
};

// InvalidArgument: pieces or a window that no link can work with.
Status CheckOptions(const TransportOptions& options);

// One end of a link, over any wire: greeting, calls, landings, turns by
// urgency, silence and the end of it all. The public side (Link) is
// thread-safe; it and everything else happens on `strand`, an Executor that
// runs one task at a time in the order of Post.
class LinkCore final : public Link,
                       public Answer::Sink,
                       public std::enable_shared_from_this<LinkCore> {
 public:
  struct Parts {
    Executor* strand = nullptr;
    Clock* clock = nullptr;
    LinkService* service = nullptr;
    TransportOptions options;
    Peer peer;
  };
  // Who connects. `connected` gets a handle, or why there is none; it comes by
  // `deadline`.
  struct Opening {
    std::string greeting;
    absl::Time deadline;
    Transport::Connected connected;
  };

  explicit LinkCore(Parts parts);
  ~LinkCore() override;

  // On the strand, once: frames may be sent from now on. With an Opening this
  // end greets, without it waits to be greeted (for the time of
  // TransportOptions::silence).
  void Start(std::unique_ptr<Wire> wire, std::optional<Opening> opening,
             Task ended);

  // -- what the wire calls, on the strand
  // `bytes` is null if header.bytes is 0. Anything may be in the header.
  void OnFrame(ByteSpan header, std::unique_ptr<Incoming> bytes);
  // Bytes of a frame came, not all of it yet: the peer is alive.
  void OnBytes();
  void OnWireLost(const Status& why);

  // On the strand: ends it. Start's `ended` runs when nothing is touched any
  // more.
  void Lose(const Status& why);

  // -- Link
  void Call(std::string message, const CallOptions& options,
            Replied replied) override;
  LandingId OpenLanding(MutableByteSpan memory, Landed landed) override;
  void CloseLanding(LandingId landing, Task closed) override;
  void Put(LandingId landing, uint64_t offset, ByteSpan bytes, Urgency urgency,
           Done done) override;
  void Close() override;
  const std::string& peer_greeting() const override { return peer_greeting_; }
  const Peer& peer() const override { return parts_.peer; }
  LinkStats Stats() const override;

  // -- Answer::Sink
  void Send(uint64_t call, StatusOr<std::string> answer) override;

 private:
  enum class State : uint8_t { kNew, kGreeting, kRefused, kOpen, kLost };
  struct Landing {
    MutableByteSpan memory;
    Landed landed;
    uint32_t under_way = 0;
    bool closing = false;
    Task closed;
  };
  struct Outgoing {  // a put
    LandingId landing = 0;
    uint64_t offset = 0;
    ByteSpan rest;  // what was not handed to the wire yet
    uint32_t under_way = 0;
    Status status;
    Done done;
  };
  struct Waiting {  // a call
    absl::Time deadline;
    Replied replied;
  };

  template <class Work>
  void Post(Work work);
  void SendFrame(FrameHeader header, std::string bytes);
  void Refuse(const Status& why);
  void Ready(std::string peer_greeting);
  void OnHello(std::string greeting);
  void OnMessage(const FrameHeader& header, std::string bytes);
  void OnCall(const FrameHeader& header, std::string message);
  void OnAnswer(const FrameHeader& header, std::string message);
  void OnPut(const FrameHeader& header, std::unique_ptr<Incoming> bytes);
  void OnLanded(LandingId id, uint64_t offset, uint64_t size,
                const Status& status);
  void EndLanding(absl::flat_hash_map<LandingId, Landing>::iterator it);
  void Pump();
  void OnPieceSent(const std::shared_ptr<Outgoing>& put, uint64_t bytes,
                   const Status& status);
  void EndPut(Outgoing& put);
  void ArmDeadlines();
  void ExpireCalls();
  void Tick();
  void Connected(StatusOr<std::shared_ptr<Link>> link);

  const Parts parts_;
  std::string peer_greeting_;  // written before anybody has a handle
  std::atomic<uint64_t> next_call_{1};
  std::atomic<uint64_t> sent_bytes_{0}, landed_bytes_{0}, queued_bytes_{0},
      calls_made_{0}, calls_failed_{0};

  // Answers may be kept for longer than the transport, and its strand, live.
  absl::Mutex answers_mu_;
  bool answers_end_ ABSL_GUARDED_BY(answers_mu_) = false;

  // The rest is the strand's.
  State state_ = State::kNew;
  Status why_lost_;
  std::unique_ptr<Wire> wire_;
  std::optional<Opening> opening_;
  Task ended_;
  std::weak_ptr<Link> handle_;
  absl::flat_hash_map<uint64_t, Waiting> calls_;
  std::set<std::pair<absl::Time, uint64_t>> deadlines_;
  absl::Time armed_ = absl::InfiniteFuture();
  uint32_t unanswered_ = 0;
  uint32_t receiving_messages_ = 0;
  absl::flat_hash_map<LandingId, Landing> landings_;
  std::deque<std::shared_ptr<Outgoing>> queues_[kUrgencies];
  uint64_t window_used_ = 0;
  bool pumping_ = false;
  absl::Time heard_, said_;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_LINK_LINK_CORE_H_
