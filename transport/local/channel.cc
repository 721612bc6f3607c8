#include "transport/local/channel.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <bit>
#include <cerrno>
#include <cstring>
#include <deque>
#include <optional>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

#include "transport/local/datagram.h"
#include "transport/local/os.h"

namespace larder {

// ---- Packets and their buffers ----

class Packet::Buffer {
 public:
  alignas(64) std::byte bytes[wire::kMaxMessageBytes];
};

namespace {

// Buffers kept for the next packets; more are made and freed as needed.
constexpr size_t kPooledBuffers = 32;

class BufferPool {
 public:
  std::unique_ptr<Packet::Buffer> Take() {
    {
      absl::MutexLock lock(&mu_);
      if (!free_.empty()) {
        auto buffer = std::move(free_.back());
        free_.pop_back();
        return buffer;
      }
    }
    return std::unique_ptr<Packet::Buffer>(new Packet::Buffer);
  }
  void Give(std::unique_ptr<Packet::Buffer> buffer) {
    absl::MutexLock lock(&mu_);
    if (free_.size() < kPooledBuffers) free_.push_back(std::move(buffer));
  }

 private:
  absl::Mutex mu_;
  std::vector<std::unique_ptr<Packet::Buffer>> free_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

void Packet::Recycler::operator()(Buffer* buffer) const {
  static_cast<BufferPool*>(pool.get())->Give(std::unique_ptr<Buffer>(buffer));
}

StatusOr<Packet> Packet::Copy(ByteSpan bytes) {
  static const auto* const pool =
      new std::shared_ptr<BufferPool>(std::make_shared<BufferPool>());
  if (bytes.size() > wire::kMaxMessageBytes) {
    return absl::InvalidArgumentError("too long for a packet");
  }
  BufferPtr buffer((*pool)->Take().release(), Recycler{*pool});
  std::memcpy(buffer->bytes, bytes.data(), bytes.size());
  LARDER_ASSIGN_OR_RETURN(const PacketView view,
                          PacketView::Parse({buffer->bytes, bytes.size()}));
  return Packet(std::move(buffer), view);
}

Packet::Packet() = default;
Packet::Packet(BufferPtr buffer, PacketView view)
    : buffer_(std::move(buffer)), view_(view) {}
Packet::Packet(Packet&&) noexcept = default;
Packet& Packet::operator=(Packet&&) noexcept = default;
Packet::~Packet() = default;

std::string Packet::Detail() const {
  const size_t size = std::min<size_t>(
      view_.Body<wire::ReplyHead>().detail_bytes, view_.arrays().size());
  const ByteSpan text = view_.arrays().last(size);
  return {reinterpret_cast<const char*>(text.data()), text.size()};
}

namespace {

// How long a blocking receive sleeps before it looks at deadlines again. Calls
// with less time than twice this poll with their exact deadline.
constexpr absl::Duration kTick = absl::Milliseconds(20);
constexpr size_t kMaxArrays = 6;
// Sent before the first reply is read: what a socket's buffer takes.
constexpr size_t kCallsAtOnce = 64;
// Calls whose reply may still come after their deadline; what the oldest gave
// is left to its time to live.
constexpr size_t kMaxAbandoned = 4096;
// Unreported completions that make a message of their own worth while.
constexpr uint32_t kCreditEvery = wire::kRingEntries / 4;
constexpr uint32_t kMaxRingEntries = 1 << 20;

Status Gone(absl::string_view what) {
  return absl::UnavailableError(
      absl::StrCat("the connection to the daemon ended: ", what));
}

Status ForkedStatus() {
  return absl::FailedPreconditionError(
      "a channel cannot be used in a child of the process that connected it");
}

// poll with what is left until `deadline`. 0: it passed.
int PollUntil(std::span<pollfd> fds, absl::Time deadline) {
  timespec wait;
  timespec* limit = nullptr;
  if (deadline != absl::InfiniteFuture()) {
    const absl::Duration left =
        std::max(deadline - Clock::Real().Now(), absl::ZeroDuration());
    wait = absl::ToTimespec(left);
    limit = &wait;
  }
  return ppoll(fds.data(), fds.size(), limit, nullptr);
}

bool Passed(absl::Time deadline) {
  return deadline != absl::InfiniteFuture() && Clock::Real().Now() >= deadline;
}

// A short one-way message that must be sent sooner or later.
struct Owed {
  wire::Type type{};
  std::array<std::byte, LocalChannel::kMaxLaterBytes> body{};
  size_t body_bytes = 0;
};

Owed OweBytes(wire::Type type, ByteSpan body) {
  Owed owed{.type = type, .body_bytes = body.size()};
  std::memcpy(owed.body.data(), body.data(), body.size());
  return owed;
}
template <class Body>
Owed Owe(wire::Type type, const Body& body) {
  static_assert(sizeof(Body) <= LocalChannel::kMaxLaterBytes);
  return OweBytes(type, BytesOf(body));
}

class ChannelImpl;

class SlabMappingImpl final : public SlabMapping {
 public:
  SlabMappingImpl(std::weak_ptr<ChannelImpl> channel, uint32_t slab,
                  Mapping mapping)
      : SlabMapping(slab, {mapping.data(), mapping.size()}),
        channel_(std::move(channel)),
        mapping_(std::move(mapping)) {}
  ~SlabMappingImpl();

  void Retire() { retired_.store(true); }

 private:
  const std::weak_ptr<ChannelImpl> channel_;
  const pid_t process_ = getpid();
  std::atomic<bool> retired_{false};
  Mapping mapping_;
};

class StagingRegionImpl final : public StagingRegion {
 public:
  StagingRegionImpl(std::weak_ptr<ChannelImpl> channel, uint32_t region,
                    Mapping mapping)
      : StagingRegion(region, {mapping.data(), mapping.size()}),
        channel_(std::move(channel)),
        mapping_(std::move(mapping)) {}
  ~StagingRegionImpl();

 private:
  const std::weak_ptr<ChannelImpl> channel_;
  const pid_t process_ = getpid();
  Mapping mapping_;
};

class ChannelImpl final : public LocalChannel,
                          public std::enable_shared_from_this<ChannelImpl> {
 public:
  ChannelImpl() = default;
  ~ChannelImpl() override {
    if (getpid() != process_) ring_.Abandon();
  }

  Status Open(const Options& options);

  const Session& session() const override { return session_; }
  uint64_t NewRequestId() override {
    return next_request_.fetch_add(1, std::memory_order_relaxed);
  }
  StatusOr<Packet> CallBytes(wire::Type type, ByteSpan body,
                             std::span<const ByteSpan> arrays,
                             absl::Time deadline, int fd) override;
  std::vector<StatusOr<Packet>> CallEachBytes(wire::Type type,
                                              std::span<const ByteSpan> bodies,
                                              absl::Time deadline) override;
  Status SendBytes(wire::Type type, ByteSpan body,
                   std::span<const ByteSpan> arrays, absl::Time deadline,
                   uint64_t request) override;
  int event_fd() const override { return bell_.get(); }
  bool HasCompletions() const override {
    return getpid() == process_ && (Produced() != drained() || HasNotices());
  }
  size_t DrainCompletions(
      absl::FunctionRef<void(const wire::RingEntry&)> sink) override;
  uint64_t drained() const override {
    return consumed_.load(std::memory_order_acquire);
  }
  Status WaitCompletions(uint64_t drained, absl::Time deadline) override;
  StatusOr<std::shared_ptr<const SlabMapping>> Slab(uint32_t slab) override;
  StatusOr<std::shared_ptr<StagingRegion>> CreateStaging(
      uint64_t bytes, absl::Time deadline) override;
  bool broken() const override {
    return broken_.load(std::memory_order_acquire);
  }
  Status reason() const override {
    absl::MutexLock lock(&mu_);
    return reason_;
  }
  void Close() override { Break(Gone("it was closed")); }

  void SendLaterBytes(wire::Type type, ByteSpan body) override {
    Keep(OweBytes(type, body));
  }
  void Flush() override {
    if (getpid() != process_ || broken()) return;
    if (owes_.load(std::memory_order_acquire)) SendOwed();
  }
  // Sends it soon: at once if the socket takes it, else with the next message.
  void SendSoon(const Owed& owed) {
    Keep(owed);
    Flush();
  }

 private:
  struct Waiter {
    uint64_t request = 0;
    Packet reply;
    bool done = false;
    // The waiting thread's: a reply came, or it may become the reader.
    absl::CondVar* turn = nullptr;
  };
  enum class Read { kPacket, kNothing, kEnd };

  Status Handshake(const Options& options, absl::Time deadline);
  Status MapRing(UniqueFd ring, uint32_t entries);

  Status Usable() const {
    if (getpid() != process_) return ForkedStatus();
    if (broken()) return reason();
    return absl::OkStatus();
  }
  void Break(const Status& reason);

  // -- Sending.
  Status SendPacket(wire::Type type, uint64_t request, ByteSpan body,
                    std::span<const ByteSpan> arrays, int fd,
                    absl::Time deadline);
  void Keep(const Owed& owed) ABSL_LOCKS_EXCLUDED(mu_) {
    if (getpid() != process_ || broken()) return;
    absl::MutexLock lock(&mu_);
    owed_.push_back(owed);
    owes_.store(true, std::memory_order_release);
  }
  void SendOwed();

  // -- Receiving. One thread at a time has the reader's role (reading_).
  // Waits for a packet until `deadline` (zero time: does not wait).
  Read ReadPacket(absl::Time deadline, Packet::BufferPtr& buffer, size_t* size,
                  std::vector<UniqueFd>& fds);
  // Reads one packet and gives it to whom it belongs. False: there was none.
  bool ReadAndDispatch(absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);
  void Dispatch(Packet::BufferPtr buffer, const PacketView& view,
                std::vector<UniqueFd> fds) ABSL_LOCKS_EXCLUDED(mu_);
  void OnReply(Packet packet) ABSL_LOCKS_EXCLUDED(mu_);
  void OnSlab(const wire::SlabNotice& notice, UniqueFd fd);
  void OnSlabRetired(uint32_t slab);
  void PassReaderOn() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (!reading_ && !waiting_.empty())
      waiting_.begin()->second->turn->Signal();
  }
  // Sends a call and registers who waits for its reply.
  Status Ask(Waiter& waiter, wire::Type type, ByteSpan body,
             std::span<const ByteSpan> arrays, absl::Time deadline, int fd)
      ABSL_LOCKS_EXCLUDED(mu_);
  // The reply, or the daemon's status if that is not OK.
  StatusOr<Packet> Await(Waiter& waiter, wire::Type type, ByteSpan body,
                         absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);
  StatusOr<Packet> AwaitReply(Waiter& waiter, wire::Type type, ByteSpan body,
                              absl::Time deadline) ABSL_LOCKS_EXCLUDED(mu_);
  void Abandon(uint64_t request, wire::Type type, ByteSpan body)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void GiveBack(wire::Type type, const Packet& late)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TakeNotices() ABSL_LOCKS_EXCLUDED(mu_);

  // -- The ring.
  uint64_t Produced() const {
    return std::atomic_ref(header_->produced).load(std::memory_order_acquire);
  }
  bool HasNotices() const {
    return std::atomic_ref(header_->notices).load(std::memory_order_acquire) !=
           notices_seen_.load(std::memory_order_relaxed);
  }
  void SilenceBell() {
    char bytes[256];
    while (read(bell_.get(), bytes, sizeof bytes) ==
           static_cast<ssize_t>(sizeof bytes)) {
    }
  }

  // Wakes the thread that polls the bell: what it waits for may have been
  // drained, and the bell silenced, by another.
  void Nudge() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = write(nudge_.get(), &one, sizeof one);
  }

  // Constant after Open.
  const pid_t process_ = getpid();
  UniqueFd socket_;
  UniqueFd bell_;
  UniqueFd nudge_;  // an eventfd of this process alone
  Mapping ring_;
  wire::RingHeader* header_ = nullptr;  // read only
  uint32_t ring_entries_ = 0;
  Session session_;
  const std::shared_ptr<BufferPool> pool_ = std::make_shared<BufferPool>();

  // Own synchronisation.
  std::atomic<uint64_t> next_request_{2};  // 1 is the hello
  std::atomic<uint64_t> consumed_{0};
  std::atomic<uint64_t> notices_seen_{0};
  std::atomic<bool> broken_{false};
  std::atomic<bool> owes_{false};

  mutable absl::Mutex mu_;
  Status reason_ ABSL_GUARDED_BY(mu_);
  bool reading_ ABSL_GUARDED_BY(mu_) = false;
  absl::flat_hash_map<uint64_t, Waiter*> waiting_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<uint64_t, wire::Type> abandoned_ ABSL_GUARDED_BY(mu_);
  std::deque<Owed> owed_ ABSL_GUARDED_BY(mu_);

  absl::Mutex drain_mu_;  // held while a sink runs
  uint64_t reported_ ABSL_GUARDED_BY(drain_mu_) = 0;

  absl::Mutex wait_mu_;
  absl::CondVar wait_turn_;
  bool polling_ ABSL_GUARDED_BY(wait_mu_) = false;

  absl::Mutex slabs_mu_;
  // Null: announced, but could not be mapped.
  absl::flat_hash_map<uint32_t, std::shared_ptr<SlabMappingImpl>> slabs_
      ABSL_GUARDED_BY(slabs_mu_);
};

// ---- Memory ----

SlabMappingImpl::~SlabMappingImpl() {
  if (getpid() != process_) {
    mapping_.Abandon();
    return;
  }
  RunBeforeUnmap();
  { const Mapping unmap = std::move(mapping_); }
  if (!retired_.load()) return;
  if (const auto channel = channel_.lock()) {
    channel->SendSoon(
        Owe(wire::Type::kUnmappedSlab, wire::SlabNotice{.slab = slab()}));
  }
}

StagingRegionImpl::~StagingRegionImpl() {
  if (getpid() != process_) {
    mapping_.Abandon();
    return;
  }
  if (const auto channel = channel_.lock()) {
    channel->SendSoon(Owe(wire::Type::kUnshareStaging,
                          wire::UnshareStaging{.region = region()}));
  }
}

StatusOr<std::shared_ptr<const SlabMapping>> ChannelImpl::Slab(uint32_t slab) {
  if (getpid() != process_) return ForkedStatus();
  absl::MutexLock lock(&slabs_mu_);
  const auto it = slabs_.find(slab);
  if (it == slabs_.end()) {
    return absl::NotFoundError("the daemon announced no such slab");
  }
  if (it->second == nullptr) {
    return absl::ResourceExhaustedError("the slab could not be mapped");
  }
  return it->second;
}

void ChannelImpl::OnSlab(const wire::SlabNotice& notice, UniqueFd fd) {
  constexpr int kSealed = F_SEAL_SHRINK;
  constexpr int kReadOnly = F_SEAL_FUTURE_WRITE | F_SEAL_WRITE;
  const int seals = fcntl(fd.get(), F_GET_SEALS);
  struct stat file;
  if (seals < 0 || (seals & kSealed) == 0 || (seals & kReadOnly) == 0 ||
      fstat(fd.get(), &file) != 0 || notice.bytes == 0 || file.st_size < 0 ||
      notice.bytes > static_cast<uint64_t>(file.st_size)) {
    Break(Gone("it sent a slab that is not sealed, or not its size"));
    return;
  }
  StatusOr<Mapping> mapping = Mapping::Map(fd.get(), notice.bytes, PROT_READ);
  std::shared_ptr<SlabMappingImpl> mapped;
  if (mapping.ok()) {
    mapping->DontFork();
    mapped = std::make_shared<SlabMappingImpl>(weak_from_this(), notice.slab,
                                               *std::move(mapping));
  }
  {
    absl::MutexLock lock(&slabs_mu_);
    std::shared_ptr<SlabMappingImpl>& known = slabs_[notice.slab];
    if (known != nullptr) return;  // announced again: the first mapping serves
    known = mapped;
  }
  if (mapped != nullptr) return;
  // So that it is announced again, when there may be room.
  SendSoon(
      Owe(wire::Type::kUnmappedSlab, wire::SlabNotice{.slab = notice.slab}));
}

void ChannelImpl::OnSlabRetired(uint32_t slab) {
  std::shared_ptr<SlabMappingImpl> mapping;
  {
    absl::MutexLock lock(&slabs_mu_);
    const auto it = slabs_.find(slab);
    if (it == slabs_.end()) return;
    mapping = std::move(it->second);
    slabs_.erase(it);
  }
  // The last reference, ours or another's, unmaps it and says so.
  if (mapping != nullptr) mapping->Retire();
}

StatusOr<std::shared_ptr<StagingRegion>> ChannelImpl::CreateStaging(
    uint64_t bytes, absl::Time deadline) {
  LARDER_RETURN_IF_ERROR(Usable());
  if (bytes == 0 || bytes > session_.max_staging_bytes) {
    return absl::ResourceExhaustedError(
        absl::StrCat("staging of ", bytes, " bytes; the daemon allows 1 to ",
                     session_.max_staging_bytes));
  }
  const uint64_t size = RoundUp(bytes, kPageBytes);
  UniqueFd fd(memfd_create("larder-staging", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd || ftruncate(fd.get(), static_cast<off_t>(size)) != 0 ||
      fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) !=
          0) {
    return ErrnoStatus(absl::StatusCode::kResourceExhausted,
                       absl::StrCat("cannot make ", size, " bytes of staging"));
  }
  LARDER_ASSIGN_OR_RETURN(Mapping mapping,
                          Mapping::Map(fd.get(), size, PROT_READ | PROT_WRITE));
  mapping.DontFork();
  LARDER_ASSIGN_OR_RETURN(
      const Packet reply,
      Call(wire::Type::kShareStaging, wire::ShareStaging{.bytes = size}, {},
           deadline, fd.get()));
  return std::make_shared<StagingRegionImpl>(
      weak_from_this(), reply.Body<wire::ShareStagingReply>().region,
      std::move(mapping));
}

// ---- Sending ----

Status ChannelImpl::SendPacket(wire::Type type, uint64_t request, ByteSpan body,
                               std::span<const ByteSpan> arrays, int fd,
                               absl::Time deadline) {
  wire::Header header;
  header.type = type;
  header.body_bytes = static_cast<uint16_t>(body.size());
  header.request = request;
  header.ring_consumed =
      static_cast<uint32_t>(consumed_.load(std::memory_order_relaxed));
  if (arrays.size() > kMaxArrays || body.size() % 8 != 0) {
    return absl::InvalidArgumentError("a message of too many pieces");
  }
  iovec pieces[2 + kMaxArrays];
  size_t piece_count = 0;
  size_t size = 0;
  const auto add = [&](ByteSpan bytes) {
    if (bytes.empty()) return;
    pieces[piece_count++] = {const_cast<std::byte*>(bytes.data()),
                             bytes.size()};
    size += bytes.size();
  };
  add(BytesOf(header));
  add(body);
  for (const ByteSpan array : arrays) add(array);
  if (size > wire::kMaxMessageBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a message of ", size, " bytes, more than ", wire::kMaxMessageBytes));
  }
  for (;;) {
    const int error = SendDatagram(socket_.get(), {pieces, piece_count},
                                   {&fd, static_cast<size_t>(fd >= 0 ? 1 : 0)});
    if (error == 0) return absl::OkStatus();
    if (error != EAGAIN && error != ENOBUFS && error != ENOMEM) {
      if (error == EBADF || error == EINVAL || error == ETOOMANYREFS) {
        return ErrnoStatus(absl::StatusCode::kInvalidArgument,
                           "cannot send a message", error);
      }
      Break(Gone(std::strerror(error)));
      return reason();
    }
    if (Passed(deadline)) {
      return absl::DeadlineExceededError("the daemon does not read");
    }
    pollfd writable = {.fd = socket_.get(), .events = POLLOUT, .revents = 0};
    PollUntil({&writable, 1}, deadline);
    if (broken()) return reason();
  }
}

Status ChannelImpl::SendBytes(wire::Type type, ByteSpan body,
                              std::span<const ByteSpan> arrays,
                              absl::Time deadline, uint64_t request) {
  LARDER_RETURN_IF_ERROR(Usable());
  if (owes_.load(std::memory_order_acquire)) SendOwed();
  return SendPacket(type, request != 0 ? request : NewRequestId(), body, arrays,
                    -1, deadline);
}

void ChannelImpl::SendOwed() {
  for (;;) {
    Owed owed;
    {
      absl::MutexLock lock(&mu_);
      if (owed_.empty()) {
        owes_.store(false, std::memory_order_release);
        return;
      }
      owed = owed_.front();
      owed_.pop_front();
    }
    const Status sent = SendPacket(owed.type, NewRequestId(),
                                   std::span(owed.body).first(owed.body_bytes),
                                   {}, -1, absl::InfinitePast());
    if (sent.ok()) continue;
    if (absl::IsDeadlineExceeded(sent)) {
      absl::MutexLock lock(&mu_);
      owed_.push_front(owed);
      owes_.store(true, std::memory_order_release);
    }
    return;
  }
}

// ---- Receiving ----

ChannelImpl::Read ChannelImpl::ReadPacket(absl::Time deadline,
                                          Packet::BufferPtr& buffer,
                                          size_t* size,
                                          std::vector<UniqueFd>& fds) {
  int flags = MSG_CMSG_CLOEXEC;
  if (deadline == absl::InfinitePast()) {
    flags |= MSG_DONTWAIT;
  } else if (deadline != absl::InfiniteFuture() &&
             deadline - Clock::Real().Now() < 2 * kTick) {
    pollfd readable = {.fd = socket_.get(), .events = POLLIN, .revents = 0};
    if (PollUntil({&readable, 1}, deadline) <= 0) return Read::kNothing;
    flags |= MSG_DONTWAIT;
  }
  iovec piece = {buffer->bytes, sizeof buffer->bytes};
  DescriptorSpace space;
  msghdr message = {};
  message.msg_iov = &piece;
  message.msg_iovlen = 1;
  message.msg_control = space.bytes;
  message.msg_controllen = sizeof space.bytes;
  const ssize_t received = recvmsg(socket_.get(), &message, flags);
  if (received < 0) {
    // A reset is reported once, before what is queued.
    return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR ||
                   errno == ECONNRESET
               ? Read::kNothing
               : Read::kEnd;
  }
  int raw[wire::kMaxDescriptors];
  const size_t count = TakeDescriptors(message, raw);
  for (size_t i = 0; i < count; ++i) fds.emplace_back(raw[i]);
  if (received == 0) return Read::kEnd;
  // A truncated packet does not parse: one larger than any may be.
  *size = (message.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0
              ? 0
              : static_cast<size_t>(received);
  return Read::kPacket;
}

bool ChannelImpl::ReadAndDispatch(absl::Time deadline) {
  Packet::BufferPtr buffer(pool_->Take().release(), Packet::Recycler{pool_});
  size_t size = 0;
  std::vector<UniqueFd> fds;
  switch (ReadPacket(deadline, buffer, &size, fds)) {
    case Read::kNothing:
      return false;
    case Read::kEnd:
      Break(Gone("it closed it"));
      return false;
    case Read::kPacket:
      break;
  }
  const StatusOr<PacketView> view = PacketView::Parse({buffer->bytes, size});
  if (!view.ok()) {
    Break(Gone(absl::StrCat("it sent ", view.status().message())));
    return false;
  }
  Dispatch(std::move(buffer), *view, std::move(fds));
  return true;
}

void ChannelImpl::Dispatch(Packet::BufferPtr buffer, const PacketView& view,
                           std::vector<UniqueFd> fds) {
  switch (view.header().type) {
    case wire::Type::kReply:
      OnReply(Packet(std::move(buffer), view));
      return;
    case wire::Type::kSlab:
      if (fds.size() != 1) {
        Break(Gone("it sent a slab without its descriptor"));
        return;
      }
      OnSlab(view.Body<wire::SlabNotice>(), std::move(fds[0]));
      return;
    case wire::Type::kSlabRetired:
      notices_seen_.fetch_add(1, std::memory_order_relaxed);
      OnSlabRetired(view.Body<wire::SlabNotice>().slab);
      return;
    default:
      return;  // of a newer daemon
  }
}

void ChannelImpl::OnReply(Packet packet) {
  const uint64_t request = packet.header().request;
  bool owes = false;
  {
    absl::MutexLock lock(&mu_);
    if (const auto it = waiting_.find(request); it != waiting_.end()) {
      Waiter& waiter = *it->second;
      waiting_.erase(it);
      waiter.reply = std::move(packet);
      waiter.done = true;
      waiter.turn->Signal();
      return;
    }
    const auto late = abandoned_.find(request);
    if (late == abandoned_.end()) return;
    GiveBack(late->second, packet);
    abandoned_.erase(late);
    owes = owes_.load(std::memory_order_relaxed);
  }
  if (owes) SendOwed();
}

void ChannelImpl::GiveBack(wire::Type type, const Packet& late) {
  if (late.Body<wire::ReplyHead>().status != 0) return;
  switch (type) {
    case wire::Type::kHold: {
      const uint64_t hold = late.Body<wire::HoldReply>().hold;
      if (hold == 0) return;
      owed_.push_back(
          Owe(wire::Type::kReleaseHold, wire::HoldRef{.hold = hold}));
      break;
    }
    case wire::Type::kReserve:
      owed_.push_back(
          Owe(wire::Type::kAbort,
              wire::Abort{late.Body<wire::ReserveReply>().reservation}));
      break;
    case wire::Type::kShareStaging:
      owed_.push_back(Owe(
          wire::Type::kUnshareStaging,
          wire::UnshareStaging{late.Body<wire::ShareStagingReply>().region}));
      break;
    default:
      return;
  }
  owes_.store(true, std::memory_order_release);
}

void ChannelImpl::Abandon(uint64_t request, wire::Type type, ByteSpan body) {
  if (type == wire::Type::kHold) {
    wire::Hold hold;
    std::memcpy(&hold, body.data(), std::min(sizeof hold, body.size()));
    if (hold.extend != 0) return;  // the rest of the hold is in use
  } else if (type == wire::Type::kAttachHold) {
    wire::HoldRef hold;
    std::memcpy(&hold, body.data(), std::min(sizeof hold, body.size()));
    if (hold.first_index != 0) return;
    type = wire::Type::kHold;  // given back in the same way
  } else if (type != wire::Type::kReserve &&
             type != wire::Type::kShareStaging) {
    return;
  }
  if (abandoned_.size() < kMaxAbandoned) abandoned_.emplace(request, type);
}

StatusOr<Packet> ChannelImpl::AwaitReply(Waiter& waiter, wire::Type type,
                                         ByteSpan body, absl::Time deadline) {
  absl::MutexLock lock(&mu_);
  bool late = false;
  while (!waiter.done && !broken()) {
    if (!reading_) {
      reading_ = true;
      mu_.Unlock();
      ReadAndDispatch(deadline);
      late = Passed(deadline);
      mu_.Lock();
      reading_ = false;
    } else if (deadline == absl::InfiniteFuture()) {
      waiter.turn->Wait(&mu_);
    } else {
      const absl::Duration left = deadline - Clock::Real().Now();
      late = left <= absl::ZeroDuration();
      if (!late) waiter.turn->WaitWithTimeout(&mu_, left);
    }
    if (late && !waiter.done) break;
  }
  waiting_.erase(waiter.request);
  PassReaderOn();
  if (waiter.done) return std::move(waiter.reply);
  if (broken()) return reason_;
  Abandon(waiter.request, type, body);
  return absl::DeadlineExceededError("the daemon did not answer in time");
}

Status ChannelImpl::Ask(Waiter& waiter, wire::Type type, ByteSpan body,
                        std::span<const ByteSpan> arrays, absl::Time deadline,
                        int fd) {
  waiter.request = NewRequestId();
  {
    absl::MutexLock lock(&mu_);
    waiting_.emplace(waiter.request, &waiter);
  }
  Status sent = SendPacket(type, waiter.request, body, arrays, fd, deadline);
  if (!sent.ok()) {
    absl::MutexLock lock(&mu_);
    waiting_.erase(waiter.request);
    PassReaderOn();
  }
  return sent;
}

StatusOr<Packet> ChannelImpl::CallBytes(wire::Type type, ByteSpan body,
                                        std::span<const ByteSpan> arrays,
                                        absl::Time deadline, int fd) {
  LARDER_RETURN_IF_ERROR(Usable());
  if (owes_.load(std::memory_order_acquire)) SendOwed();
  absl::CondVar turn;
  Waiter waiter{.turn = &turn};
  LARDER_RETURN_IF_ERROR(Ask(waiter, type, body, arrays, deadline, fd));
  return Await(waiter, type, body, deadline);
}

std::vector<StatusOr<Packet>> ChannelImpl::CallEachBytes(
    wire::Type type, std::span<const ByteSpan> bodies, absl::Time deadline) {
  std::vector<StatusOr<Packet>> replies;
  replies.reserve(bodies.size());
  while (replies.size() < bodies.size()) {
    const auto window = bodies.subspan(
        replies.size(), std::min(kCallsAtOnce, bodies.size() - replies.size()));
    Status status = Usable();
    if (status.ok() && owes_.load(std::memory_order_acquire)) SendOwed();
    absl::CondVar turn;
    std::vector<Waiter> waiters(window.size());
    for (Waiter& waiter : waiters) waiter.turn = &turn;
    size_t asked = 0;
    while (asked < window.size() && status.ok()) {
      status = Ask(waiters[asked], type, window[asked], {}, deadline, -1);
      if (status.ok()) ++asked;
    }
    for (size_t i = 0; i < window.size(); ++i) {
      replies.push_back(i < asked ? Await(waiters[i], type, window[i], deadline)
                                  : StatusOr<Packet>(status));
    }
  }
  return replies;
}

StatusOr<Packet> ChannelImpl::Await(Waiter& waiter, wire::Type type,
                                    ByteSpan body, absl::Time deadline) {
  LARDER_ASSIGN_OR_RETURN(Packet reply,
                          AwaitReply(waiter, type, body, deadline));
  const auto head = reply.Body<wire::ReplyHead>();
  if (head.status != 0) {
    return Status(static_cast<absl::StatusCode>(head.status), reply.Detail());
  }
  return reply;
}

void ChannelImpl::TakeNotices() {
  {
    absl::MutexLock lock(&mu_);
    if (reading_ || broken()) return;  // who reads takes them
    reading_ = true;
  }
  const uint64_t sent =
      std::atomic_ref(header_->notices).load(std::memory_order_acquire);
  while (notices_seen_.load(std::memory_order_relaxed) != sent && !broken()) {
    if (!ReadAndDispatch(absl::InfinitePast())) break;
  }
  absl::MutexLock lock(&mu_);
  reading_ = false;
  PassReaderOn();
}

void ChannelImpl::Break(const Status& reason) {
  {
    absl::MutexLock lock(&mu_);
    if (broken()) return;
    reason_ = reason;
    broken_.store(true, std::memory_order_release);
    for (const auto& [request, waiter] : waiting_) waiter->turn->Signal();
  }
  // Wakes whoever reads or polls it.
  if (getpid() == process_) shutdown(socket_.get(), SHUT_RDWR);
  absl::MutexLock lock(&wait_mu_);
  wait_turn_.SignalAll();
}

// ---- Completions ----

size_t ChannelImpl::DrainCompletions(
    absl::FunctionRef<void(const wire::RingEntry&)> sink) {
  if (getpid() != process_) return 0;
  if (HasNotices()) TakeNotices();
  size_t count = 0;
  {
    absl::MutexLock lock(&drain_mu_);
    SilenceBell();  // before looking: what comes later rings again
    uint64_t at = consumed_.load(std::memory_order_relaxed);
    const uint64_t produced = Produced();
    if (produced - at > ring_entries_) {
      Break(Gone("it wrote over completions that were not read"));
      return 0;
    }
    const auto* entries = reinterpret_cast<const wire::RingEntry*>(
        ring_.data() + sizeof(wire::RingHeader));
    for (; at != produced; ++at, ++count) {
      wire::RingEntry entry;
      std::memcpy(&entry, &entries[at % ring_entries_], sizeof entry);
      sink(entry);
      consumed_.store(at + 1, std::memory_order_release);
    }
    if (at - reported_ >= kCreditEvery && !broken()) {
      reported_ = at;
      SendPacket(wire::Type::kCredit, NewRequestId(), {}, {}, -1,
                 absl::InfinitePast())
          .IgnoreError();
    }
  }
  if (count != 0) {
    absl::MutexLock lock(&wait_mu_);
    wait_turn_.SignalAll();
    if (polling_) Nudge();
  }
  return count;
}

Status ChannelImpl::WaitCompletions(uint64_t drained, absl::Time deadline) {
  LARDER_RETURN_IF_ERROR(Usable());
  absl::MutexLock lock(&wait_mu_);
  for (;;) {
    const uint64_t consumed = consumed_.load(std::memory_order_acquire);
    if (consumed != drained || Produced() != consumed) return absl::OkStatus();
    if (broken()) return reason();
    if (Passed(deadline)) {
      return absl::DeadlineExceededError("no completion came in time");
    }
    if (polling_) {
      if (deadline == absl::InfiniteFuture()) {
        wait_turn_.Wait(&wait_mu_);
      } else {
        wait_turn_.WaitWithTimeout(&wait_mu_, deadline - Clock::Real().Now());
      }
      continue;
    }
    polling_ = true;
    wait_mu_.Unlock();
    if (HasNotices()) TakeNotices();
    pollfd fds[3] = {{.fd = bell_.get(), .events = POLLIN, .revents = 0},
                     {.fd = socket_.get(), .events = POLLRDHUP, .revents = 0},
                     {.fd = nudge_.get(), .events = POLLIN, .revents = 0}};
    const int ready = PollUntil(fds, deadline);
    if (ready > 0 &&
        ((fds[0].revents & (POLLHUP | POLLERR)) != 0 ||
         (fds[1].revents & (POLLHUP | POLLRDHUP | POLLERR)) != 0) &&
        Produced() == consumed_.load(std::memory_order_acquire)) {
      Break(Gone("it closed it"));
    }
    // A bell for what was drained already would ring for ever.
    if (ready > 0 && (fds[0].revents & POLLIN) != 0) SilenceBell();
    if (ready > 0 && (fds[2].revents & POLLIN) != 0) {
      uint64_t nudges;
      [[maybe_unused]] const ssize_t n =
          read(nudge_.get(), &nudges, sizeof nudges);
    }
    wait_mu_.Lock();
    polling_ = false;
    wait_turn_.SignalAll();
  }
}

// ---- Connecting ----

Status ChannelImpl::Open(const Options& options) {
  const absl::Time deadline = Clock::Real().Now() + options.connect_timeout;
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  if (options.socket_path.empty() ||
      options.socket_path.size() >= sizeof address.sun_path) {
    return absl::InvalidArgumentError(
        absl::StrCat("a socket path must have 1 to ",
                     sizeof address.sun_path - 1, " bytes"));
  }
  if (options.token.size() > sizeof wire::Hello::token) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a token must have at most ", sizeof wire::Hello::token, " bytes"));
  }
  std::memcpy(address.sun_path, options.socket_path.data(),
              options.socket_path.size());
  socket_.reset(
      socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  nudge_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
  if (!socket_ || !nudge_) {
    return ErrnoStatus(absl::StatusCode::kResourceExhausted,
                       "cannot make a socket");
  }
  while (connect(socket_.get(), reinterpret_cast<const sockaddr*>(&address),
                 sizeof address) != 0) {
    // EAGAIN: more are waiting to be accepted than the daemon's backlog takes.
    // There is nothing to poll for that.
    if ((errno != EAGAIN && errno != EINTR) || Passed(deadline)) {
      return ErrnoStatus(
          absl::StatusCode::kUnavailable,
          absl::StrCat("cannot connect to ", options.socket_path));
    }
    PollUntil({},
              std::min(deadline, Clock::Real().Now() + absl::Milliseconds(1)));
  }
  const int flags = fcntl(socket_.get(), F_GETFL);
  const timeval tick = absl::ToTimeval(kTick);
  if (fcntl(socket_.get(), F_SETFL, flags & ~O_NONBLOCK) != 0 ||
      setsockopt(socket_.get(), SOL_SOCKET, SO_RCVTIMEO, &tick, sizeof tick) !=
          0) {
    return ErrnoStatus(absl::StatusCode::kInternal, "cannot set up a socket");
  }
  return Handshake(options, deadline);
}

Status ChannelImpl::Handshake(const Options& options, absl::Time deadline) {
  wire::Hello hello;
  hello.pid = static_cast<uint32_t>(getpid());
  std::memcpy(hello.token, options.token.data(), options.token.size());
  std::memcpy(hello.client_name, options.client_name.data(),
              std::min(options.client_name.size(), sizeof hello.client_name));
  // A daemon that is full refuses before it has heard anything: what it said
  // is read even if the hello could not be sent.
  const Status sent =
      SendPacket(wire::Type::kHello, 1, BytesOf(hello), {}, -1, deadline);
  Packet::BufferPtr buffer(pool_->Take().release(), Packet::Recycler{pool_});
  size_t size = 0;
  std::vector<UniqueFd> fds;
  for (;;) {
    const Read read = ReadPacket(deadline, buffer, &size, fds);
    if (read == Read::kPacket) break;
    if (read == Read::kEnd) {
      return sent.ok() ? Gone("it closed it during the handshake") : sent;
    }
    if (Passed(deadline)) {
      return absl::UnavailableError("the daemon did not answer the handshake");
    }
  }
  const StatusOr<PacketView> view = PacketView::Parse({buffer->bytes, size});
  if (!view.ok() || view->header().type != wire::Type::kReply ||
      view->header().request != 1) {
    return absl::FailedPreconditionError(
        absl::StrCat(options.socket_path,
                     " is served by something else than "
                     "a daemon of larder"));
  }
  const Packet reply(std::move(buffer), *view);
  const auto welcome = reply.Body<wire::HelloReply>();
  if (welcome.head.status != 0) {
    return Status(static_cast<absl::StatusCode>(welcome.head.status),
                  reply.Detail());
  }
  if (welcome.major != wire::kMajor || welcome.minor > wire::kMinor) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the client speaks protocol ", wire::kMajor, ".", wire::kMinor,
        ", the daemon ", welcome.major, ".", welcome.minor));
  }
  if (fds.size() != 2) {
    return absl::FailedPreconditionError("the daemon sent no completion ring");
  }
  LARDER_RETURN_IF_ERROR(MapRing(std::move(fds[0]), welcome.ring_entries));
  bell_ = std::move(fds[1]);
  const int flags = fcntl(bell_.get(), F_GETFL);
  if (flags < 0 || fcntl(bell_.get(), F_SETFL, flags | O_NONBLOCK) != 0) {
    return absl::FailedPreconditionError("the daemon sent no bell");
  }
  session_ = {.tenant = TenantId{welcome.tenant},
              .client = ClientId{welcome.client},
              .minor = welcome.minor,
              .max_staging_bytes = welcome.max_staging_bytes,
              .max_holds = welcome.max_holds,
              .wants_blocks = welcome.wants_blocks != 0};
  return absl::OkStatus();
}

Status ChannelImpl::MapRing(UniqueFd ring, uint32_t entries) {
  const int seals = fcntl(ring.get(), F_GET_SEALS);
  struct stat file;
  if (!std::has_single_bit(entries) || entries > kMaxRingEntries || seals < 0 ||
      (seals & F_SEAL_SHRINK) == 0 || fstat(ring.get(), &file) != 0 ||
      file.st_size < static_cast<off_t>(wire::RingBytes(entries))) {
    return absl::FailedPreconditionError(
        "the daemon's completion ring is not sealed, or not its size");
  }
  LARDER_ASSIGN_OR_RETURN(
      ring_, Mapping::Map(ring.get(), wire::RingBytes(entries), PROT_READ));
  ring_.DontFork();
  ring_entries_ = entries;
  header_ = reinterpret_cast<wire::RingHeader*>(ring_.data());
  if (header_->magic != wire::kMagic || header_->entries != entries) {
    return absl::FailedPreconditionError(
        "the daemon's completion ring has another format");
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<std::shared_ptr<LocalChannel>> LocalChannel::Connect(
    const Options& options) {
  auto channel = std::make_shared<ChannelImpl>();
  LARDER_RETURN_IF_ERROR(channel->Open(options));
  return channel;
}

}  // namespace larder
