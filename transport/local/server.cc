#include "transport/local/server.h"

#include <pthread.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

#include "transport/local/datagram.h"
#include "transport/local/listener.h"
#include "transport/local/os.h"
#include "transport/local/outbox.h"
#include "transport/local/reply_builder.h"
#include "transport/wire.h"

#ifndef SO_PEERPIDFD
#define SO_PEERPIDFD 77
#endif

namespace larder {
namespace {

constexpr uint32_t kMaxThreads = 16;
constexpr uint32_t kMaxPacketsPerTurn = 16;
constexpr int kEventsPerWait = 64;
// Turns for what a dead process had sent (a child of it may go on sending).
constexpr int kLastTurns = 256;

// What an epoll event is about: the low bits of its tag, the rest is the number
// of the connection.
enum : uint64_t { kSocketEvent = 0, kProcessEvent = 1, kTagStep = 2 };
constexpr uint64_t kWakeTag = UINT64_MAX;
constexpr uint64_t kListenTag = UINT64_MAX - 1;

struct Counters {
  std::atomic<uint64_t> accepted{0}, refused{0}, dropped{0};
  std::atomic<uint64_t> received{0}, sent{0};
  std::atomic<uint32_t> clients{0};
};

// The end of the peer's process, which a socket inherited by its children does
// not show. Invalid where the kernel cannot say.
UniqueFd PeerProcess(int socket, pid_t pid) {
  int fd = -1;
  socklen_t size = sizeof fd;
  if (getsockopt(socket, SOL_SOCKET, SO_PEERPIDFD, &fd, &size) == 0) {
    return UniqueFd(fd);
  }
  if (pid <= 0) return UniqueFd();
  return UniqueFd(static_cast<int>(syscall(SYS_pidfd_open, pid, 0)));
}

// This thread works in bursts of microseconds and others wait for them. From
// Linux 6.12 on, one that asks for short slices runs soon after it wakes up,
// however busy the machine is (EEVDF); it gets no more of the processor for it
// and needs no privilege. Older kernels take no notice.
void AskForShortSlices() {
  constexpr uint64_t kSliceNs = 100'000;  // the shortest there is
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns, deadline_ns, period_ns;
  } attributes = {};
  attributes.size = sizeof attributes;
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0 ||
      attributes.policy != SCHED_OTHER) {
    return;
  }
  attributes.flags = 0;
  attributes.runtime_ns = kSliceNs;
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

struct Connection {
  uint64_t number = 0;
  int socket = -1;  // the outbox owns it
  UniqueFd process;
  std::shared_ptr<Outbox> outbox;
  std::unique_ptr<Session> session;
  std::string who;  // for the log
  absl::Time hello_by;
  bool hello_pending = true;
};

// One epoll thread and the connections it serves.
class Worker {
 public:
  Worker(const LocalServer::Options& options, Clock& clock, Counters& counters)
      : options_(options),
        clock_(clock),
        counters_(counters),
        buffers_(options.packets_per_turn),
        messages_(options.packets_per_turn) {}

  Status Open() {
    epoll_.reset(epoll_create1(EPOLL_CLOEXEC));
    wake_.reset(eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK));
    if (!epoll_ || !wake_ || !Watch(wake_.get(), EPOLLIN, kWakeTag)) {
      return ErrnoStatus(absl::StatusCode::kResourceExhausted,
                         "cannot make an epoll");
    }
    for (size_t i = 0; i < buffers_.size(); ++i) {
      buffers_[i] = std::make_unique<Buffer>();
    }
    return absl::OkStatus();
  }

  // Before Start.
  bool Listen(int fd, std::function<void()> acceptable) {
    acceptable_ = std::move(acceptable);
    return Watch(fd, EPOLLIN, kListenTag);
  }

  void Start(const std::string& name) {
    thread_ = std::thread([this, name] {
      pthread_setname_np(pthread_self(), name.c_str());
      AskForShortSlices();
      Run();
    });
  }

  int epoll_fd() const { return epoll_.get(); }

  // Takes a connection over; any thread.
  void Adopt(std::unique_ptr<Connection> connection) {
    const uint64_t tag = connection->number * kTagStep;
    const int socket = connection->socket;
    const int process = connection->process.get();
    {
      absl::MutexLock lock(&mu_);
      adopted_.push_back(std::move(connection));
    }
    // Known before its first event: both are watched only now, and the thread
    // looks for newcomers before it looks for a number.
    if (process >= 0) Watch(process, EPOLLIN, tag | kProcessEvent);
    Watch(socket, EPOLLIN | EPOLLRDHUP, tag | kSocketEvent);
    Wake();  // its hello has a deadline
  }

  void Stop(absl::Time drain_until) {
    {
      absl::MutexLock lock(&mu_);
      stopping_ = true;
      drain_until_ = drain_until;
    }
    Wake();
    if (thread_.joinable()) thread_.join();
  }

 private:
  struct Buffer {
    alignas(64) std::byte bytes[wire::kMaxMessageBytes];
    DescriptorSpace descriptors;
    iovec piece;
  };

  bool Watch(int fd, uint32_t events, uint64_t tag) {
    epoll_event event = {};
    event.events = events;
    event.data.u64 = tag;
    return epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, fd, &event) == 0;
  }
  void Wake() {
    const uint64_t one = 1;
    [[maybe_unused]] const ssize_t n = write(wake_.get(), &one, sizeof one);
  }
  void EmptyBell() {
    uint64_t count;
    [[maybe_unused]] const ssize_t n = read(wake_.get(), &count, sizeof count);
  }

  void Run();
  void TakeAdopted();
  void OnEvent(uint64_t tag, uint32_t events);
  // False: the connection is to be dropped.
  bool ReadTurn(Connection& connection, bool* more);
  void Drop(uint64_t number);
  void CloseLateHellos();
  int WaitMs() const;
  void DrainAll(absl::Time until);

  // Constant after Start.
  const LocalServer::Options& options_;
  Clock& clock_;
  Counters& counters_;
  UniqueFd epoll_;
  UniqueFd wake_;
  std::function<void()> acceptable_;

  // Of the thread.
  std::vector<std::unique_ptr<Buffer>> buffers_;
  std::vector<mmsghdr> messages_;
  absl::flat_hash_map<uint64_t, std::unique_ptr<Connection>> connections_;
  size_t hellos_pending_ = 0;
  absl::Time next_hello_check_ = absl::InfinitePast();

  absl::Mutex mu_;
  std::vector<std::unique_ptr<Connection>> adopted_ ABSL_GUARDED_BY(mu_);
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time drain_until_ ABSL_GUARDED_BY(mu_);

  std::thread thread_;
};

void Worker::TakeAdopted() {
  std::vector<std::unique_ptr<Connection>> adopted;
  {
    absl::MutexLock lock(&mu_);
    adopted.swap(adopted_);
  }
  for (auto& connection : adopted) {
    ++hellos_pending_;
    const uint64_t number = connection->number;
    connections_.emplace(number, std::move(connection));
  }
}

void Worker::Run() {
  epoll_event events[kEventsPerWait];
  for (;;) {
    const int count =
        epoll_wait(epoll_.get(), events, kEventsPerWait, WaitMs());
    // The bell first, what it rings for after: a bell emptied later would take
    // away the ring of a change that was not seen.
    for (int i = 0; i < count; ++i) {
      if (events[i].data.u64 == kWakeTag) EmptyBell();
    }
    TakeAdopted();
    {
      absl::MutexLock lock(&mu_);
      if (stopping_) break;
    }
    for (int i = 0; i < count; ++i) {
      if (events[i].data.u64 == kWakeTag) continue;
      OnEvent(events[i].data.u64, events[i].events);
    }
    if (hellos_pending_ != 0) CloseLateHellos();
  }
  absl::Time until;
  {
    absl::MutexLock lock(&mu_);
    until = drain_until_;
  }
  DrainAll(until);
  while (!connections_.empty()) Drop(connections_.begin()->first);
}

void Worker::OnEvent(uint64_t tag, uint32_t events) {
  if (tag == kListenTag) {
    acceptable_();
    return;
  }
  const uint64_t number = tag / kTagStep;
  const auto it = connections_.find(number);
  if (it == connections_.end()) return;  // dropped in this very round
  Connection& connection = *it->second;
  if (connection.outbox->closing()) {
    Drop(number);
    return;
  }
  bool more = true;
  if ((tag & kProcessEvent) != 0) {  // dead: what it had sent still counts
    for (int turn = 0; more && turn < kLastTurns; ++turn) {
      if (!ReadTurn(connection, &more)) break;
    }
    Drop(number);
    return;
  }
  if ((events & EPOLLOUT) != 0) connection.outbox->Flush();
  if ((events & (EPOLLIN | EPOLLHUP | EPOLLERR | EPOLLRDHUP)) != 0 &&
      !ReadTurn(connection, &more)) {
    Drop(number);
  }
}

bool Worker::ReadTurn(Connection& connection, bool* more) {
  for (size_t i = 0; i < messages_.size(); ++i) {
    Buffer& buffer = *buffers_[i];
    buffer.piece = {buffer.bytes, sizeof buffer.bytes};
    msghdr& header = messages_[i].msg_hdr;
    header = {};
    header.msg_iov = &buffer.piece;
    header.msg_iovlen = 1;
    header.msg_control = buffer.descriptors.bytes;
    header.msg_controllen = sizeof buffer.descriptors.bytes;
  }
  const int count = recvmmsg(connection.socket, messages_.data(),
                             static_cast<unsigned>(messages_.size()),
                             MSG_DONTWAIT | MSG_CMSG_CLOEXEC, nullptr);
  if (count < 0) {
    *more = errno == EINTR || errno == ECONNRESET;
    // A reset is reported once, before what is queued.
    return errno == EAGAIN || errno == EWOULDBLOCK || *more;
  }
  *more = count == static_cast<int>(messages_.size());
  bool keep = true;
  for (int i = 0; i < count; ++i) {
    const msghdr& header = messages_[i].msg_hdr;
    int fds[wire::kMaxDescriptors];
    const size_t fd_count = TakeDescriptors(header, fds);
    if (keep && messages_[i].msg_len == 0) keep = false;  // end of the stream
    if (keep && (header.msg_flags & (MSG_TRUNC | MSG_CTRUNC)) != 0) {
      connection.outbox->Close(
          "broke the protocol: a packet or its descriptors are too many");
      keep = false;
    }
    if (!keep) {
      for (size_t f = 0; f < fd_count; ++f) close(fds[f]);
      continue;
    }
    keep = connection.session->OnPacket(
        {buffers_[i]->bytes, messages_[i].msg_len}, {fds, fd_count});
    if (keep && connection.hello_pending && connection.session->open()) {
      connection.hello_pending = false;
      --hellos_pending_;
    }
  }
  counters_.received.fetch_add(static_cast<uint64_t>(count),
                               std::memory_order_relaxed);
  return keep;
}

void Worker::Drop(uint64_t number) {
  const auto it = connections_.find(number);
  const std::unique_ptr<Connection> connection = std::move(it->second);
  connections_.erase(it);
  if (connection->hello_pending) --hellos_pending_;
  if (connection->process) {
    // Its open file may live on elsewhere, so closing is not enough.
    epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, connection->process.get(), nullptr);
  }
  epoll_ctl(epoll_.get(), EPOLL_CTL_DEL, connection->socket, nullptr);
  const std::string reason = connection->outbox->Detach();
  connection->session.reset();
  counters_.clients.fetch_sub(1, std::memory_order_relaxed);
  if (reason.empty()) return;
  counters_.dropped.fetch_add(1, std::memory_order_relaxed);
  if (options_.log) {
    options_.log(absl::StrCat("dropped ", connection->who, ": ", reason));
  }
}

void Worker::CloseLateHellos() {
  const absl::Time now = clock_.Now();
  if (now < next_hello_check_) return;
  next_hello_check_ = now + absl::Milliseconds(WaitMs());
  for (auto& [number, connection] : connections_) {
    if (connection->hello_pending && connection->hello_by <= now) {
      connection->outbox->Close("it did not say hello in time");
    }
  }
}

int Worker::WaitMs() const {
  if (hellos_pending_ == 0) return -1;
  const int64_t half = absl::ToInt64Milliseconds(options_.hello_timeout / 2);
  return static_cast<int>(std::clamp<int64_t>(half, 10, 1000));
}

void Worker::DrainAll(absl::Time until) {
  for (;;) {
    const bool empty =
        std::all_of(connections_.begin(), connections_.end(),
                    [](auto& item) { return item.second->outbox->Flush(); });
    const absl::Duration left = until - Clock::Real().Now();
    if (empty || left <= absl::ZeroDuration()) return;
    epoll_event events[kEventsPerWait];
    const int64_t ms = absl::ToInt64Milliseconds(left);
    epoll_wait(epoll_.get(), events, kEventsPerWait,
               static_cast<int>(std::clamp<int64_t>(ms, 1, 5)));
  }
}

// Asks for retired slabs every period, on the executor. Shared with its tasks.
class Housekeeping : public std::enable_shared_from_this<Housekeeping> {
 public:
  Housekeeping(std::function<std::vector<uint32_t>()> retired_slabs,
               absl::Duration period, std::shared_ptr<SessionHub> hub,
               Executor& executor, Clock& clock)
      : retired_slabs_(std::move(retired_slabs)),
        period_(period),
        hub_(std::move(hub)),
        executor_(executor),
        clock_(clock) {}

  void Schedule() {
    executor_.PostAt(clock_.Now() + period_, [self = weak_from_this()] {
      const auto live = self.lock();
      if (live != nullptr) live->Check();
    });
  }
  // Waits for a check under way.
  void Stop() {
    absl::MutexLock lock(&mu_);
    stopped_ = true;
  }

 private:
  void Check() {
    {
      absl::MutexLock lock(&mu_);
      if (stopped_) return;
      for (const uint32_t slab : retired_slabs_()) hub_->RetireSlab(slab);
    }
    Schedule();
  }

  const std::function<std::vector<uint32_t>()> retired_slabs_;
  const absl::Duration period_;
  const std::shared_ptr<SessionHub> hub_;
  Executor& executor_;
  Clock& clock_;
  absl::Mutex mu_;
  bool stopped_ ABSL_GUARDED_BY(mu_) = false;
};

class LocalServerImpl final : public LocalServer {
 public:
  LocalServerImpl(Options options, Clock& clock)
      : options_(std::move(options)), clock_(clock) {}
  ~LocalServerImpl() override { StopOnce(absl::Seconds(1)); }

  Status Open(Engine& engine, MemoryTier& dram, Executor& executor) {
    LARDER_ASSIGN_OR_RETURN(
        listener_, Listener::Open(options_.socket_path, options_.socket_mode,
                                  options_.socket_gid));
    spare_.reset(dup(listener_->fd()));
    hub_ = SessionHub::Create(
        options_.session,
        {.engine = &engine,
         .dram = &dram,
         .clock = &clock_,
         .slab_unmapped_everywhere = options_.slab_unmapped_everywhere});
    for (uint32_t i = 0; i < options_.threads; ++i) {
      workers_.push_back(std::make_unique<Worker>(options_, clock_, counters_));
      LARDER_RETURN_IF_ERROR(workers_.back()->Open());
    }
    if (!workers_[0]->Listen(listener_->fd(), [this] { Accept(); })) {
      return ErrnoStatus(absl::StatusCode::kInternal,
                         "cannot watch the listening socket");
    }
    for (uint32_t i = 0; i < options_.threads; ++i) {
      workers_[i]->Start(absl::StrCat("larder-local-", i));
    }
    if (options_.retired_slabs) {
      housekeeping_ = std::make_shared<Housekeeping>(
          options_.retired_slabs, options_.housekeeping_period, hub_, executor,
          clock_);
      housekeeping_->Schedule();
    }
    return absl::OkStatus();
  }

  void Stop(absl::Duration drain_for) override { StopOnce(drain_for); }
  void RetireSlab(uint32_t slab) override { hub_->RetireSlab(slab); }
  std::shared_ptr<SessionHub> hub() const override { return hub_; }

  Stats stats() const override {
    const auto read = [](const auto& counter) {
      return counter.load(std::memory_order_relaxed);
    };
    return {.clients = read(counters_.clients),
            .accepted = read(counters_.accepted),
            .refused = read(counters_.refused),
            .dropped = read(counters_.dropped),
            .packets_received = read(counters_.received),
            .packets_sent = read(counters_.sent)};
  }

 private:
  void StopOnce(absl::Duration drain_for) {
    absl::MutexLock lock(&stop_mu_);
    if (stopped_) return;
    stopped_ = true;
    if (housekeeping_ != nullptr) housekeeping_->Stop();
    const absl::Time until = Clock::Real().Now() + drain_for;
    for (auto& worker : workers_) worker->Stop(until);
    listener_.reset();
  }

  // On the first worker's thread.
  void Accept();
  void AcceptWithoutDescriptors();
  static void Refuse(int socket, std::string_view why);

  const Options options_;
  Clock& clock_;
  Counters counters_;
  std::unique_ptr<Listener> listener_;
  std::shared_ptr<SessionHub> hub_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::shared_ptr<Housekeeping> housekeeping_;

  // Of the accepting thread.
  UniqueFd spare_;  // given up for a moment to refuse when none is left
  uint64_t next_number_ = 1;

  absl::Mutex stop_mu_;
  bool stopped_ ABSL_GUARDED_BY(stop_mu_) = false;
};

void LocalServerImpl::Refuse(int socket, std::string_view why) {
  ReplyBuilder reply(1);
  wire::HelloReply refusal;
  refusal.head.status =
      static_cast<uint16_t>(absl::StatusCode::kResourceExhausted);
  refusal.head.detail_bytes = ReplyBuilder::DetailBytes(why);
  reply.SetBody(refusal);
  reply.Append(why.data(), refusal.head.detail_bytes);
  const ByteSpan packet = reply.packet();
  const iovec piece = {const_cast<std::byte*>(packet.data()), packet.size()};
  SendDatagram(socket, {&piece, 1}, {});
}

void LocalServerImpl::AcceptWithoutDescriptors() {
  spare_.reset();
  {
    UniqueFd socket(accept4(listener_->fd(), nullptr, nullptr,
                            SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (socket) Refuse(socket.get(), "the daemon has no descriptor left");
  }
  spare_.reset(dup(listener_->fd()));
  counters_.refused.fetch_add(1, std::memory_order_relaxed);
}

void LocalServerImpl::Accept() {
  UniqueFd socket(
      accept4(listener_->fd(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  if (!socket) {
    if (errno == EMFILE || errno == ENFILE) AcceptWithoutDescriptors();
    return;
  }
  if (counters_.clients.load(std::memory_order_relaxed) >=
      options_.max_clients) {
    counters_.refused.fetch_add(1, std::memory_order_relaxed);
    Refuse(socket.get(),
           absl::StrCat("the daemon serves ", options_.max_clients,
                        " clients already"));
    return;
  }
  ucred peer = {};
  socklen_t size = sizeof peer;
  if (getsockopt(socket.get(), SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0) {
    return;
  }
  auto connection = std::make_unique<Connection>();
  connection->number = next_number_++;
  connection->socket = socket.get();
  connection->process = PeerProcess(socket.get(), peer.pid);
  connection->who =
      absl::StrCat("a client (process ", peer.pid, ", user ", peer.uid, ")");
  connection->hello_by = clock_.Now() + options_.hello_timeout;
  Worker& worker = *workers_[connection->number % workers_.size()];
  connection->outbox = std::make_shared<Outbox>(
      std::move(socket),
      Outbox::Options{.queue_bytes = options_.send_queue_bytes,
                      .epoll_fd = worker.epoll_fd(),
                      .epoll_tag = connection->number * kTagStep,
                      .sent = &counters_.sent});
  connection->session = hub_->NewSession(
      {.uid = peer.uid, .gid = peer.gid, .pid = peer.pid}, connection->outbox);
  counters_.accepted.fetch_add(1, std::memory_order_relaxed);
  counters_.clients.fetch_add(1, std::memory_order_relaxed);
  worker.Adopt(std::move(connection));
}

}  // namespace

Status LocalServer::Options::Validate() const {
  LARDER_RETURN_IF_ERROR(session.Validate());
  if (threads == 0 || threads > kMaxThreads) {
    return absl::InvalidArgumentError(
        absl::StrCat("threads must be 1 to ", kMaxThreads));
  }
  if (packets_per_turn == 0 || packets_per_turn > kMaxPacketsPerTurn) {
    return absl::InvalidArgumentError(
        absl::StrCat("packets_per_turn must be 1 to ", kMaxPacketsPerTurn));
  }
  if (max_clients == 0 || send_queue_bytes < 2 * wire::kMaxMessageBytes) {
    return absl::InvalidArgumentError(
        "max_clients is zero or send_queue_bytes less than two packets");
  }
  if ((socket_mode & ~0777U) != 0 || hello_timeout <= absl::ZeroDuration() ||
      housekeeping_period <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        "socket_mode is no mode, or a duration is not positive");
  }
  return absl::OkStatus();
}

StatusOr<std::unique_ptr<LocalServer>> LocalServer::Start(Options options,
                                                          Engine& engine,
                                                          MemoryTier& dram,
                                                          Executor& executor,
                                                          Clock& clock) {
  LARDER_RETURN_IF_ERROR(options.Validate());
  auto server = std::make_unique<LocalServerImpl>(std::move(options), clock);
  LARDER_RETURN_IF_ERROR(server->Open(engine, dram, executor));
  return server;
}

}  // namespace larder
