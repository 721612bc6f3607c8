#ifndef LARDER_STORE_TRANSPORT_H_
#define LARDER_STORE_TRANSPORT_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>

#include "absl/functional/any_invocable.h"
#include "absl/time/time.h"

#include "store/executor.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder {

// What carries messages and KV bytes between hosts.
//
// Two things pass over a link, in either direction, whoever opened it: calls,
// small messages that are answered, and puts, bytes of any size straight into
// memory that the other side opened for them. A load from a peer is both: the
// one who loads opens a landing over its destination and calls; the peer puts
// what it has there and answers.
//
// tests/conformance/transport_conformance.h holds every implementation to this.

// Of a call's request and answer.
inline constexpr size_t kMessageBytesMax = 256_KiB;
// Of a greeting and the answer to it: what carries them may add to it.
inline constexpr size_t kGreetingBytesMax = kMessageBytesMax - 4_KiB;
// What TransportOptions::piece_bytes may be.
inline constexpr uint64_t kPieceBytesMax = 64_MiB;

// Whose turn it is where a link has more puts than it can send: what a request
// waits for, then everything else, then what only tidies up. Within each, in
// the order in which they were asked for. Calls and answers are small and wait
// for no put that was not handed to the network yet.
enum class Urgency : uint8_t { kDeadline = 0, kNormal = 1, kBackground = 2 };
inline constexpr size_t kUrgencies = 3;

// A landing's number, of one link.
using LandingId = uint64_t;

// Who is at the other end of a link.
struct Peer {
  std::string address;  // for logs
  // What the network proved: over TLS the name in its certificate. Empty:
  // nothing.
  std::string identity;
};

struct CallOptions {
  absl::Time deadline = absl::InfiniteFuture();
};

struct LinkStats {
  uint64_t sent_bytes = 0;    // of puts that are done
  uint64_t landed_bytes = 0;  // of puts that landed here
  uint64_t queued_bytes = 0;  // of puts that wait or are under way
  uint64_t calls = 0;         // begun here
  uint64_t failed_calls = 0;  // ... that were not answered
};

// A connection to one peer. Thread-safe. Callbacks run on a thread of the
// transport, none of its locks held, never from within the call that took them;
// they must not block. Each runs exactly once, also when the link is lost or
// destroyed.
class Link {
 public:
  using Replied = absl::AnyInvocable<void(StatusOr<std::string>) &&>;
  using Done = absl::AnyInvocable<void(Status) &&>;
  // Bytes [offset, offset + size) of a landing are there. On the link's own
  // thread: no two at once.
  using Landed = absl::AnyInvocable<void(uint64_t offset, uint64_t size)>;

  virtual ~Link() = default;

  // `replied` gets the answer, the error that the peer's service gave,
  // DeadlineExceeded, or Unavailable if the link is lost. Whether the peer did
  // what it was asked is unknown after the last two. InvalidArgument: the
  // message is too long. Answers may overtake each other, and the bytes of puts
  // that were begun before them.
  virtual void Call(std::string message, const CallOptions& options,
                    Replied replied) = 0;

  // Opens memory for the peer's puts: it may write anywhere in it, in any
  // order, until the landing is closed; who is told of it by a call that is
  // made after this finds it open. `memory` stays the transport's until
  // CloseLanding's `closed`.
  virtual LandingId OpenLanding(MutableByteSpan memory, Landed landed) = 0;
  // No put that arrives from now on touches the memory. `closed`: nor does any
  // that was under way, and `landed` will not be called any more. If the peer
  // stops in the middle of one, the link is given up after
  // TransportOptions::drain, so `closed` comes in bounded time.
  virtual void CloseLanding(LandingId landing, Task closed) = 0;

  // Copies `bytes` into the peer's landing at `offset`. They stay unchanged
  // until `done`, which says OK when they may be reused: the peer has what was
  // sent, or dropped it because the landing is closed. Whoever has to know that
  // bytes landed is told so by the peer.
  virtual void Put(LandingId landing, uint64_t offset, ByteSpan bytes,
                   Urgency urgency, Done done) = 0;

  // The link is of no more use: calls and puts under way end with Cancelled,
  // landings close. Puts are `done` once nothing reads their bytes.
  virtual void Close() = 0;

  // What the peer said of itself when the link was made.
  virtual const std::string& peer_greeting() const = 0;
  // peer().identity: whoever called Connect looks whether it is the one that
  // was meant.
  virtual const Peer& peer() const = 0;
  const std::string& peer_address() const { return peer().address; }
  virtual LinkStats Stats() const = 0;
};

// The right to answer one call. May be moved to any thread, kept, and
// destroyed, which answers Cancelled. After the link is lost it goes nowhere.
class Answer {
 public:
  class Sink {
   public:
    virtual ~Sink() = default;
    virtual void Send(uint64_t call, StatusOr<std::string> answer) = 0;
  };
  Answer(std::shared_ptr<Sink> sink, uint64_t call)
      : sink_(std::move(sink)), call_(call) {}
  Answer(Answer&&) = default;
  Answer& operator=(Answer&&) = delete;
  ~Answer() {
    if (sink_ != nullptr) Send(absl::CancelledError("not answered"));
  }

  // Once. Answers longer than kMessageBytesMax become Internal.
  void Send(StatusOr<std::string> answer) {
    std::exchange(sink_, nullptr)->Send(call_, std::move(answer));
  }

 private:
  std::shared_ptr<Sink> sink_;
  uint64_t call_;
};

// What one who is called must do. Called on threads of the transport: must not
// block.
class LinkService {
 public:
  virtual ~LinkService() = default;
  // `peer` connects and says `greeting`. The answer is what it is told, and
  // the link comes about; an error is told too, and it does not.
  virtual StatusOr<std::string> Admit(const std::string& greeting,
                                      const Peer& peer) = 0;
  // An admitted link; keep it, or it is closed.
  virtual void OnLink(std::shared_ptr<Link> link) = 0;
  // `deadline`: after it the answer is of no use to the caller.
  virtual void OnCall(const std::shared_ptr<Link>& link, std::string message,
                      absl::Time deadline, Answer answer) = 0;
  // It is lost, or was closed by either side.
  virtual void OnLost(const std::shared_ptr<Link>& link, const Status& why) = 0;
};

struct TransportOptions {
  // Of puts of one link that are handed to the network at once; what else there
  // is waits its turn by urgency.
  uint64_t window_bytes = 4_MiB;
  // Puts are cut into so much, so that what is urgent waits for one piece.
  uint64_t piece_bytes = 1_MiB;
  // Calls of one link that the service may have unanswered; the next are
  // answered ResourceExhausted.
  uint32_t calls_max = 1024;
  // A link over which nothing came for so long is lost. A peer that is alive
  // says something at least four times as often.
  absl::Duration silence = absl::Seconds(5);
  // A landing that is closed while bytes are under way to it waits for them,
  // at most a window, for so long; then the link is lost, because nothing else
  // makes the memory safe. Longer than a slow network needs for a window: at a
  // delay of 20 ms and 1 % of loss tcp carries 0.3 MB/s, so 14 s. A peer that
  // says nothing at all is lost by `silence`, before.
  absl::Duration drain = absl::Seconds(20);
};

// Links by one kind of network. Thread-safe. Destroy links first: destruction
// ends what is left of them, and waits.
class Transport {
 public:
  virtual ~Transport() = default;

  // Accepts links at `address` until the transport is destroyed; `service` must
  // outlive it. Returns the address that is listened at, with the port that
  // port 0 stands for.
  virtual StatusOr<std::string> Listen(const std::string& address,
                                       LinkService& service) = 0;

  using Connected =
      absl::AnyInvocable<void(StatusOr<std::shared_ptr<Link>>) &&>;
  // Calls of the peer go to `service`, which must outlive the link; its Admit
  // and OnLink are not called. Unavailable: nobody answers there;
  // PermissionDenied or what else Admit said; Unauthenticated: one of the two
  // does not believe what the other proved itself with; FailedPrecondition: it
  // speaks another version; DeadlineExceeded.
  virtual void Connect(const std::string& address, std::string greeting,
                       LinkService& service, absl::Time deadline,
                       Connected connected) = 0;
};

}  // namespace larder

#endif  // LARDER_STORE_TRANSPORT_H_
