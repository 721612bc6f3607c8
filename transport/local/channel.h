#ifndef LARDER_TRANSPORT_LOCAL_CHANNEL_H_
#define LARDER_TRANSPORT_LOCAL_CHANNEL_H_

#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/functional/function_ref.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/clock.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"
#include "transport/local/packet.h"
#include "transport/wire.h"

namespace larder {

// A reply: the bytes of one packet in a buffer that goes back to the channel's
// pool when the packet is destroyed. Movable; independent of the channel's
// life.
class Packet {
 public:
  class Buffer;
  struct Recycler {
    std::shared_ptr<void> pool;
    void operator()(Buffer* buffer) const;
  };
  using BufferPtr = std::unique_ptr<Buffer, Recycler>;

  // Of bytes that came by something else than a socket. InvalidArgument: they
  // are no packet.
  static StatusOr<Packet> Copy(ByteSpan bytes);

  Packet();
  Packet(BufferPtr buffer, PacketView view);
  Packet(Packet&&) noexcept;
  Packet& operator=(Packet&&) noexcept;
  ~Packet();

  const wire::Header& header() const { return view_.header(); }
  // The fixed body; what an older daemon did not send is zero.
  template <class T>
  T Body() const {
    return view_.Body<T>();
  }
  // For the counted arrays after the body, in the order of wire.h. Points into
  // the packet.
  ArrayReader Arrays() const { return ArrayReader(view_.arrays()); }
  // The reply's text, e.g. why a prefix ends.
  std::string Detail() const;

 private:
  BufferPtr buffer_;
  PacketView view_;
};

// One of the daemon's slabs of the client's own tenant, mapped read-only.
// Shared: it stays mapped while anyone holds a reference, even after the slab
// was retired or the daemon died; the last reference unmaps it and, if it was
// retired, tells the daemon. Do not keep one longer than a hold needs it.
// Not inherited over fork (MADV_DONTFORK), not in core dumps.
class SlabMapping {
 public:
  SlabMapping(const SlabMapping&) = delete;
  SlabMapping& operator=(const SlabMapping&) = delete;

  uint32_t slab() const { return slab_; }
  ByteSpan bytes() const { return bytes_; }
  // Whether all of it is memory. Of a daemon on another host only what is held
  // is: such a mapping is copied from, never registered with a device.
  bool filled() const { return filled_; }

  // `task` runs before the memory is unmapped, on the thread that drops the
  // last reference. Thread-safe.
  void BeforeUnmap(absl::AnyInvocable<void() &&> task) const
      ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    before_unmap_.push_back(std::move(task));
  }

 protected:
  SlabMapping(uint32_t slab, ByteSpan bytes, bool filled = true)
      : slab_(slab), bytes_(bytes), filled_(filled) {}
  ~SlabMapping() = default;

  void RunBeforeUnmap() ABSL_LOCKS_EXCLUDED(mu_) {
    std::vector<absl::AnyInvocable<void() &&>> tasks;
    {
      absl::MutexLock lock(&mu_);
      tasks.swap(before_unmap_);
    }
    for (auto& task : tasks) std::move(task)();
  }

 private:
  const uint32_t slab_;
  const ByteSpan bytes_;
  const bool filled_;
  mutable absl::Mutex mu_;
  mutable std::vector<absl::AnyInvocable<void() &&>> before_unmap_
      ABSL_GUARDED_BY(mu_);
};

// Memory of the client's own that commits name by region and offset: a memfd
// sealed against any change of size, mapped writable here and read-only in the
// daemon. Destruction unmaps it and tells the daemon, which keeps its mapping
// until commits that read it are done. Not inherited over fork.
class StagingRegion {
 public:
  StagingRegion(const StagingRegion&) = delete;
  StagingRegion& operator=(const StagingRegion&) = delete;

  uint32_t region() const { return region_; }
  MutableByteSpan bytes() const { return bytes_; }

 protected:
  StagingRegion(uint32_t region, MutableByteSpan bytes)
      : region_(region), bytes_(bytes) {}
  ~StagingRegion() = default;

 private:
  const uint32_t region_;
  const MutableByteSpan bytes_;
};

// The client's end of one connection to the daemon of this host: calls and
// their replies over a SOCK_SEQPACKET Unix socket, completions over a ring in
// shared memory, slabs and staging as mappings.
//
//   LARDER_ASSIGN_OR_RETURN(
//       auto channel, LocalChannel::Connect({.socket_path =
//       "/run/larder/sock"}));
//   wire::Lookup body{.space = handle, .id_count = ids.size()};
//   LARDER_ASSIGN_OR_RETURN(
//       Packet reply, channel->Call(wire::Type::kLookup, body,
//                                   {BytesOfArray(std::span(ids))}, deadline));
//   auto head = reply.Body<wire::LookupReply>();
//   ArrayReader arrays = reply.Arrays();
//   LARDER_ASSIGN_OR_RETURN(auto states,
//   arrays.Take<uint8_t>(head.state_count));
//
// Threads: every method may be called from many threads at once. There is no
// background thread: of the threads that wait in Call, one reads the socket and
// hands each reply to whom it belongs, then passes that role on. A lone caller
// pays one round trip and no wake-up of another thread.
//
// Time: deadlines are values of Clock::Real().Now(). A call that misses its
// deadline returns DeadlineExceeded; when its reply comes late, what it gave
// (a new or attached hold, a reservation) is handed back to the daemon.
//
// Failure: when the daemon is gone or breaks the protocol, every pending and
// later call returns Unavailable at once, broken() is true and stays so; make a
// new channel. Mappings stay readable until their owners drop them.
//
// Fork: in a child of the connecting process every call returns
// FailedPrecondition and the destructor touches nothing shared.
class LocalChannel {
 public:
  struct Options {
    std::string socket_path;
    std::string token;        // at most 64 bytes; decides the tenant
    std::string client_name;  // for people; cut at 64 bytes
    // For connect and handshake together.
    absl::Duration connect_timeout = absl::Seconds(5);
  };

  // Connects and shakes hands. Unavailable: nobody listens there or no answer
  // in time. FailedPrecondition: the versions do not fit (the text names both).
  // PermissionDenied: the daemon refused uid and token. ResourceExhausted: too
  // many clients. InvalidArgument: the options.
  static StatusOr<std::shared_ptr<LocalChannel>> Connect(
      const Options& options);

  // What the daemon said in the handshake.
  struct Session {
    TenantId tenant{};
    ClientId client{};
    uint16_t minor = 0;  // of the protocol as spoken on this connection
    uint64_t max_staging_bytes = 0;
    uint32_t max_holds = 0;
    bool wants_blocks = false;  // commits should say what is in their chunks
  };

  virtual ~LocalChannel() = default;
  virtual const Session& session() const = 0;

  // A number for a request, never given twice. Needed only by who must know it
  // before sending (kCommit: its completions may come before Send returns).
  virtual uint64_t NewRequestId() = 0;

  // Sends and waits for the reply. A reply whose status is not OK is returned
  // as that Status, with the daemon's text. `arrays` are sent after the body,
  // in order. `fd` (borrowed) travels along. Where the daemon's status and the
  // channel's own could be confused (Unavailable), ask broken().
  // InvalidArgument: the message is larger than kMaxMessageBytes.
  template <class Body>
  StatusOr<Packet> Call(wire::Type type, const Body& body,
                        std::initializer_list<ByteSpan> arrays,
                        absl::Time deadline, int fd = -1) {
    return CallBytes(type, BytesOf(body), {arrays.begin(), arrays.size()},
                     deadline, fd);
  }

  // The same for each of `bodies`, all of which are sent (in windows) before a
  // reply is waited for: many calls for little more than one round trip.
  template <class Body>
  std::vector<StatusOr<Packet>> CallEach(wire::Type type,
                                         std::span<const Body> bodies,
                                         absl::Time deadline) {
    std::vector<ByteSpan> bytes;
    bytes.reserve(bodies.size());
    for (const Body& body : bodies) bytes.push_back(BytesOf(body));
    return CallEachBytes(type, bytes, deadline);
  }

  // Sends a one-way message: OK = given to the kernel. Never blocks longer than
  // its deadline (DeadlineExceeded: the daemon does not read; nothing was
  // sent). `request` = 0: a new number.
  template <class Body>
  Status Send(wire::Type type, const Body& body,
              std::initializer_list<ByteSpan> arrays, absl::Time deadline,
              uint64_t request = 0) {
    return SendBytes(type, BytesOf(body), {arrays.begin(), arrays.size()},
                     deadline, request);
  }

  // Leaves a one-way message for the next call, send or flush, which it goes
  // out in front of: one wake-up of the daemon for both. Dropped when the
  // channel breaks. The caller sees to it that one of them comes.
  template <class Body>
  void SendLater(wire::Type type, const Body& body) {
    static_assert(sizeof(Body) <= kMaxLaterBytes);
    SendLaterBytes(type, BytesOf(body));
  }
  // Sends what was left, as far as the socket takes it now.
  virtual void Flush() = 0;

  static constexpr size_t kMaxLaterBytes = sizeof(wire::HoldRef);
  virtual void SendLaterBytes(wire::Type type, ByteSpan body) = 0;
  virtual StatusOr<Packet> CallBytes(wire::Type type, ByteSpan body,
                                     std::span<const ByteSpan> arrays,
                                     absl::Time deadline, int fd) = 0;
  virtual std::vector<StatusOr<Packet>> CallEachBytes(
      wire::Type type, std::span<const ByteSpan> bodies,
      absl::Time deadline) = 0;
  virtual Status SendBytes(wire::Type type, ByteSpan body,
                           std::span<const ByteSpan> arrays,
                           absl::Time deadline, uint64_t request) = 0;

  // -- Completions (wire::RingEntry). Entries arrive in order, each is given to
  // exactly one sink. Entries may come before the reply that names their hold
  // has been seen by the thread that waits for it: keep them.

  // Readable (poll, epoll, level-triggered) when there is something to drain.
  // Owned by the channel; only DrainCompletions may read from it.
  virtual int event_fd() const = 0;

  // Whether DrainCompletions has anything to do but to silence event_fd.
  virtual bool HasCompletions() const = 0;

  // Gives what is in the ring to `sink` and returns how many there were. One
  // thread drains at a time, others wait for it. `sink` may call the channel,
  // except for DrainCompletions itself. Also takes notices (retired slabs) off
  // the socket.
  virtual size_t DrainCompletions(
      absl::FunctionRef<void(const wire::RingEntry&)> sink) = 0;

  // How many completions sinks have been given so far.
  virtual uint64_t drained() const = 0;

  // Waits until there is something to drain, or drained() differs from
  // `drained` (another thread took what was there, perhaps what the caller
  // waits for): OK. DeadlineExceeded, Unavailable otherwise. The loop:
  //
  //   for (;;) {
  //     const uint64_t seen = channel.drained();
  //     if (my_operation_is_done) break;
  //     LARDER_RETURN_IF_ERROR(channel.WaitCompletions(seen, deadline));
  //     channel.DrainCompletions(sink);
  //   }
  virtual Status WaitCompletions(uint64_t drained, absl::Time deadline) = 0;

  // -- Memory.

  // The mapping of a slab that a reply named. NotFound: never announced, or
  // retired. ResourceExhausted: it could not be mapped.
  virtual StatusOr<std::shared_ptr<const SlabMapping>> Slab(uint32_t slab) = 0;

  // Makes `bytes` (rounded up to pages) of staging and shares it.
  // ResourceExhausted beyond the session's max_staging_bytes.
  virtual StatusOr<std::shared_ptr<StagingRegion>> CreateStaging(
      uint64_t bytes, absl::Time deadline) = 0;

  // -- Health.
  virtual bool broken() const = 0;
  virtual Status reason() const = 0;  // OK while not broken
  // Breaks it: pending calls return, the daemon sees the client leave.
  virtual void Close() = 0;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_LOCAL_CHANNEL_H_
