#include "transport/tcp/stream_transport.h"

#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <deque>
#include <optional>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"

#include "transport/link/link_core.h"
#include "transport/link/socket_address.h"
#include "transport/link/strand.h"
#include "transport/tcp/frame_stream.h"

namespace larder {
namespace {

// Frames with fewer bytes are put together into records, and keep their order;
// larger puts are written from where they are.
constexpr size_t kCopyMax = 4_KiB;
constexpr size_t kRecordMax = 16_KiB;  // of TLS one
// What one link reads or writes before it is another's turn.
constexpr size_t kTurnBytes = 1_MiB;
// What the kernel has of a link that is not on the network yet: what is urgent
// waits for it.
constexpr int kUnsentMax = 256 << 10;
// What the other kernel has of a link that was not read yet, likewise (it takes
// twice of it, with what it needs itself). Links over 1 ms carry 1 GB/s still.
constexpr int kUnreadMax = 1 << 20;
// What is read of a refused peer, so that the refusal reaches it.
constexpr size_t kLingerBytesMax = 64_KiB;
constexpr uint32_t kLogsPerSecond = 10;

Status NetworkError(const char* doing) {
  return absl::UnavailableError(
      absl::StrCat(doing, ": ", std::strerror(errno)));
}

void SetOption(int fd, int level, int option, int value) {
  (void)::setsockopt(fd, level, option, &value, sizeof value);
}

// ---- Workers

// Something with a descriptor, on its worker's thread.
class Polled {
 public:
  // `event`: something may have become possible; else it is called because it
  // asked.
  virtual void Work(bool event) = 0;

 protected:
  ~Polled() = default;
};

class Handshake;

// A thread, which runs tasks, timers and descriptors in turn: the strand of the
// links that it has.
class Worker final : public Strand {
 public:
  Worker(Clock& clock, absl::Duration spin) : Strand(clock), spin_(spin) {}
  ~Worker() override;

  Status Start(const std::string& name);
  // Nothing runs any more, what was posted is dropped. REQUIRES: no links.
  void Finish();

  // -- on its thread
  // Calls `polled` when its descriptor's state changes. Returns its number.
  StatusOr<uint64_t> Add(int fd, Polled* polled);
  void Replace(uint64_t number, Polled* polled) { polled_[number] = polled; }
  void Remove(uint64_t number, int fd);
  // Calls it soon.
  void SetReady(uint64_t number) { ready_.push_back(number); }

  // Which live here, each until it has ended.
  absl::flat_hash_map<LinkCore*, std::shared_ptr<LinkCore>>& links() {
    return links_;
  }
  absl::flat_hash_map<uint64_t, std::unique_ptr<Handshake>>& handshakes() {
    return handshakes_;
  }

 private:
  void Run();
  void Call(uint64_t number, bool event) {
    const auto it = polled_.find(number);
    if (it != polled_.end()) it->second->Work(event);
  }

  const absl::Duration spin_;
  int epoll_ = -1;
  std::thread thread_;
  uint64_t next_number_ = 1;  // 0: wake_fd()
  absl::flat_hash_map<uint64_t, Polled*> polled_;
  std::vector<uint64_t> ready_;
  absl::flat_hash_map<LinkCore*, std::shared_ptr<LinkCore>> links_;
  absl::flat_hash_map<uint64_t, std::unique_ptr<Handshake>> handshakes_;
};

// A socket with a stream over it. Closed with it.
class Connection {
 public:
  // `released` runs when it is closed.
  Connection(Worker& worker, int fd, Task released)
      : worker_(worker), fd_(fd), released_(std::move(released)) {
    SetOption(fd, IPPROTO_TCP, TCP_NODELAY, 1);
    SetOption(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, kUnsentMax);
    SetOption(fd, SOL_SOCKET, SO_RCVBUF, kUnreadMax);
    // A peer that vanished; LinkCore notices earlier.
    SetOption(fd, SOL_SOCKET, SO_KEEPALIVE, 1);
    SetOption(fd, IPPROTO_TCP, TCP_KEEPIDLE, 15);
    SetOption(fd, IPPROTO_TCP, TCP_KEEPINTVL, 5);
    SetOption(fd, IPPROTO_TCP, TCP_KEEPCNT, 3);
    SetOption(fd, IPPROTO_TCP, TCP_USER_TIMEOUT, 30'000);
  }
  ~Connection() {
    if (number_ != 0) worker_.Remove(number_, fd_);
    stream_ = nullptr;
    ::close(fd_);
    if (released_ != nullptr) std::move(released_)();
  }

  // On the worker's thread, once.
  Status Open(const NewSocketStream& make, bool accepting,
              const std::string& peer, Polled* polled) {
    LARDER_ASSIGN_OR_RETURN(stream_, make(fd_, accepting, peer));
    LARDER_ASSIGN_OR_RETURN(number_, worker_.Add(fd_, polled));
    return absl::OkStatus();
  }

  Worker& worker() { return worker_; }
  int fd() const { return fd_; }
  uint64_t number() const { return number_; }
  SocketStream& stream() { return *stream_; }

 private:
  Worker& worker_;
  const int fd_;
  Task released_;
  uint64_t number_ = 0;
  std::unique_ptr<SocketStream> stream_;
};

// A connection until both ends have shown who they are.
class Handshake final : public Polled {
 public:
  using Done =
      absl::AnyInvocable<void(StatusOr<std::unique_ptr<Connection>>) &&>;
  struct Parts {
    const NewSocketStream* make = nullptr;
    std::unique_ptr<Connection> connection;
    std::string peer;
    bool accepting = false;
    Task released;  // runs when it is over
    Done done;      // once
  };

  explicit Handshake(Parts parts) : parts_(std::move(parts)) {}
  ~Handshake();

  // Ends with `late` at `deadline`.
  static void Start(Parts parts, absl::Time deadline, Status late);
  void Work(bool event) override;

 private:
  void End() {
    connection().worker().handshakes().erase(connection().number());
  }
  void Fail(const Status& why);
  void Linger();
  Connection& connection() { return *parts_.connection; }

  Parts parts_;
  bool connecting_ = false;  // TCP's part
  size_t lingered_ = 0;
};

// A connection with a link.
class StreamWire final : public Wire, public Polled {
 public:
  StreamWire(std::unique_ptr<Connection> connection,
             const std::shared_ptr<LinkCore>& core)
      : worker_(connection->worker()),
        connection_(std::move(connection)),
        core_(core),
        frames_(core) {
    worker_.Replace(connection_->number(), this);
    BeReady();  // something may have come with the handshake
  }

  void Send(const FrameHeader& header, ByteSpan bytes, Done done) override;
  void Close(Task closed) override;
  void Work(bool event) override;

 private:
  struct Outgoing {
    FrameHeader header;
    ByteSpan bytes;
    Done done;
  };

  void Read();
  void Write();
  bool FillRecord();
  // Whether the network gets full segments only, which costs both ends less.
  void Cork(bool corked) {
    if (std::exchange(corked_, corked) == corked) return;
    SetOption(connection_->fd(), IPPROTO_TCP, TCP_CORK, corked ? 1 : 0);
  }
  void Lose(const Status& why) {
    if (const auto core = core_.lock()) core->OnWireLost(why);
  }
  void BeReady() {
    if (!std::exchange(ready_, true)) worker_.SetReady(connection_->number());
  }
  bool HasToWrite() const {
    return !writing_.empty() || !ordered_.empty() || !puts_.empty();
  }

  Worker& worker_;
  std::unique_ptr<Connection> connection_;  // null: closed
  const std::weak_ptr<LinkCore> core_;
  FrameStream frames_;
  bool readable_ = true, writable_ = true;  // until the socket says no
  bool ready_ = false;                      // the worker will call
  bool closing_ = false;
  bool corked_ = false;

  // Puts of many bytes let everything else pass.
  std::deque<Outgoing> ordered_, puts_;
  // What is being written: a record of whole frames, the last of them perhaps
  // without its bytes, which follow from where they are.
  std::string record_;
  ByteSpan rest_of_record_, rest_of_put_;
  std::vector<Outgoing> writing_;
};

// ---- Worker

Worker::~Worker() {
  Finish();
  if (epoll_ >= 0) ::close(epoll_);
}

Status Worker::Start(const std::string& name) {
  LARDER_RETURN_IF_ERROR(Open());
  epoll_ = ::epoll_create1(EPOLL_CLOEXEC);
  epoll_event event{};
  event.events = EPOLLIN;
  if (epoll_ < 0 ||
      ::epoll_ctl(epoll_, EPOLL_CTL_ADD, wake_fd(), &event) != 0) {
    return NetworkError("epoll");
  }
  thread_ = std::thread([this, name] {
    pthread_setname_np(pthread_self(), name.c_str());
    // OpenSSL writes to sockets without MSG_NOSIGNAL.
    sigset_t pipe;
    sigemptyset(&pipe);
    sigaddset(&pipe, SIGPIPE);
    pthread_sigmask(SIG_BLOCK, &pipe, nullptr);
    Run();
  });
  return absl::OkStatus();
}

void Worker::Finish() {
  if (!thread_.joinable()) return;
  Stop();
  thread_.join();
  DropAll();
}

StatusOr<uint64_t> Worker::Add(int fd, Polled* polled) {
  const uint64_t number = next_number_++;
  epoll_event event{};
  event.events = EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET;
  event.data.u64 = number;
  if (::epoll_ctl(epoll_, EPOLL_CTL_ADD, fd, &event) != 0) {
    return NetworkError("epoll");
  }
  polled_[number] = polled;
  return number;
}

void Worker::Remove(uint64_t number, int fd) {
  polled_.erase(number);
  (void)::epoll_ctl(epoll_, EPOLL_CTL_DEL, fd, nullptr);
}

void Worker::Run() {
  std::array<epoll_event, 64> events;
  std::vector<uint64_t> ready;
  absl::Time idle_since = absl::InfiniteFuture();
  while (!stopping()) {
    bool worked = RunDue() || !ready_.empty();
    ready.swap(ready_);
    for (const uint64_t number : ready) Call(number, false);
    ready.clear();
    worked |= !ready_.empty();
    bool sleeps = false;
    if (worked) {
      idle_since = absl::InfiniteFuture();
    } else {
      const absl::Time now = absl::Now();
      idle_since = std::min(idle_since, now);
      sleeps = now - idle_since >= spin_;
    }
    const int timeout_ms = sleeps ? FallAsleep() : 0;
    const int count = ::epoll_wait(epoll_, events.data(),
                                   static_cast<int>(events.size()), timeout_ms);
    bool rung = false;
    for (int i = 0; i < count; ++i) rung |= events[i].data.u64 == 0;
    if (sleeps || rung) WakeUp(rung);
    for (int i = 0; i < count; ++i) Call(events[i].data.u64, true);
    if (count > 0) idle_since = absl::InfiniteFuture();
  }
}

// ---- Handshake

Handshake::~Handshake() {
  if (parts_.done != nullptr) {
    std::move(parts_.done)(absl::CancelledError("the transport ends"));
  }
  parts_.connection = nullptr;
  if (parts_.released != nullptr) std::move(parts_.released)();
}

void Handshake::Start(Parts parts, absl::Time deadline, Status late) {
  auto handshake = std::make_unique<Handshake>(std::move(parts));
  Connection& connection = handshake->connection();
  Handshake* const self = handshake.get();
  self->connecting_ = !self->parts_.accepting;
  if (const Status opened = connection.Open(
          *self->parts_.make, self->parts_.accepting, self->parts_.peer, self);
      !opened.ok()) {
    std::exchange(self->parts_.done, nullptr)(opened);
    return;
  }
  Worker& worker = connection.worker();
  const uint64_t number = connection.number();
  worker.handshakes().emplace(number, std::move(handshake));
  worker.PostAt(deadline, [&worker, number, late = std::move(late)] {
    const auto it = worker.handshakes().find(number);
    if (it == worker.handshakes().end()) return;
    const auto ended = std::move(it->second);
    worker.handshakes().erase(it);
    if (ended->parts_.done != nullptr) {
      std::exchange(ended->parts_.done, nullptr)(late);
    }
  });
  worker.SetReady(number);
}

void Handshake::Work(bool) {
  if (parts_.done == nullptr) {
    Linger();
    return;
  }
  if (connecting_) {
    int error = 0;
    socklen_t size = sizeof error;
    sockaddr_storage peer;
    socklen_t peer_size = sizeof peer;
    (void)::getsockopt(connection().fd(), SOL_SOCKET, SO_ERROR, &error, &size);
    if (error == 0 &&
        ::getpeername(connection().fd(), reinterpret_cast<sockaddr*>(&peer),
                      &peer_size) != 0) {
      return;  // still connecting
    }
    if (error != 0) {
      errno = error;
      std::exchange(parts_.done, nullptr)(NetworkError(parts_.peer.c_str()));
      End();
      return;
    }
    connecting_ = false;
  }
  SocketStream& stream = connection().stream();
  switch (stream.Handshake()) {
    case SocketStream::Outcome::kWait:
      return;
    case SocketStream::Outcome::kLost:
      return Fail(stream.why());
    case SocketStream::Outcome::kDone:
      break;
  }
  auto done = std::exchange(parts_.done, nullptr);
  auto connected = std::move(parts_.connection);
  connected->worker().handshakes().erase(connected->number());  // this
  std::move(done)(std::move(connected));
}

void Handshake::Fail(const Status& why) {
  std::exchange(parts_.done, nullptr)(why);
  // The stream has told the peer; closing with something unread would take that
  // back.
  (void)::shutdown(connection().fd(), SHUT_WR);
  Linger();
}

void Handshake::Linger() {
  std::array<std::byte, 4096> dropped;
  for (;;) {
    const ssize_t size =
        ::recv(connection().fd(), dropped.data(), dropped.size(), 0);
    if (size < 0 && errno == EINTR) continue;
    if (size < 0 && errno == EAGAIN) return;
    lingered_ += size > 0 ? static_cast<size_t>(size) : 0;
    if (size <= 0 || lingered_ > kLingerBytesMax) break;
  }
  End();
}

// ---- StreamWire

void StreamWire::Send(const FrameHeader& header, ByteSpan bytes, Done done) {
  if (connection_ == nullptr) {
    std::move(done)(absl::UnavailableError("the connection is closed"));
    return;
  }
  const bool passes =
      header.kind != FrameKind::kPut || bytes.size() <= kCopyMax;
  (passes ? ordered_ : puts_).push_back({header, bytes, std::move(done)});
  if (writable_) BeReady();
}

void StreamWire::Close(Task closed) {
  closing_ = true;
  std::deque<Outgoing> puts = std::exchange(puts_, {});
  // A last word, if there is room for it.
  if (rest_of_put_.empty()) Write();
  connection_ = nullptr;
  const Status why = absl::CancelledError("the connection was closed");
  frames_.End(why);
  for (Outgoing& out : std::exchange(writing_, {})) std::move(out.done)(why);
  for (Outgoing& out : std::exchange(ordered_, {})) std::move(out.done)(why);
  for (Outgoing& out : puts) std::move(out.done)(why);
  worker_.Post(std::move(closed));
}

void StreamWire::Work(bool event) {
  ready_ = false;
  if (event) readable_ = writable_ = true;
  Read();
  Write();
  if (connection_ != nullptr && (readable_ || (writable_ && HasToWrite()))) {
    BeReady();
  }
}

void StreamWire::Read() {
  for (size_t budget = kTurnBytes; !closing_ && readable_ && budget > 0;) {
    const MutableByteSpan room = frames_.Room();
    SocketStream& stream = connection_->stream();
    size_t size = 0;
    switch (stream.Read(room, size)) {
      case SocketStream::Outcome::kDone:
        budget -= std::min(budget, size);
        frames_.Filled(size);
        break;
      case SocketStream::Outcome::kWait:
        readable_ = false;
        break;
      case SocketStream::Outcome::kLost:
        readable_ = false;
        Lose(stream.why());
        break;
    }
  }
}

void StreamWire::Write() {
  for (size_t budget = kTurnBytes;
       connection_ != nullptr && writable_ && budget > 0;) {
    if (rest_of_record_.empty() && rest_of_put_.empty()) {
      for (Outgoing& out : std::exchange(writing_, {})) {
        std::move(out.done)(absl::OkStatus());
      }
      if (connection_ == nullptr || !FillRecord()) return;
    }
    ByteSpan& rest = rest_of_record_.empty() ? rest_of_put_ : rest_of_record_;
    SocketStream& stream = connection_->stream();
    size_t size = 0;
    const SocketStream::Outcome outcome = stream.Write(rest, size);
    if (outcome == SocketStream::Outcome::kDone) {
      budget -= std::min(budget, size);
      rest = rest.subspan(size);
      continue;
    }
    writable_ = false;
    if (closing_ || outcome == SocketStream::Outcome::kWait) return;
    // What the peer said before it hung up tells more.
    readable_ = true;
    const Status why = stream.why();
    Read();
    if (!closing_) Lose(why);
  }
}

// The next frames, small ones as many as go into a record; false if there is
// none.
bool StreamWire::FillRecord() {
  connection_->stream().BetweenWrites();
  record_.clear();
  while (rest_of_put_.empty()) {
    std::deque<Outgoing>& queue = ordered_.empty() ? puts_ : ordered_;
    if (queue.empty()) break;
    Outgoing& next = queue.front();
    const bool whole = next.bytes.size() <= kCopyMax;
    const size_t copied = whole ? next.bytes.size() : 0;
    if (record_.size() + sizeof next.header + copied > kRecordMax) break;
    record_.append(reinterpret_cast<const char*>(&next.header),
                   sizeof next.header);
    record_.append(reinterpret_cast<const char*>(next.bytes.data()), copied);
    if (!whole) {
      rest_of_put_ = next.bytes;
      Cork(true);
    }
    writing_.push_back(std::move(next));
    queue.pop_front();
  }
  rest_of_record_ = std::as_bytes(std::span(record_));
  if (!record_.empty()) return true;
  Cork(false);
  std::string().swap(record_);  // idle links keep nothing
  return false;
}

// ---- The transport

class StreamTransport final : public Transport {
 public:
  StreamTransport(const StreamOptions& options, const char* name,
                  NewSocketStream make)
      : options_(options), name_(name), make_(std::move(make)) {}
  ~StreamTransport() override;

  Status Start();
  StatusOr<std::string> Listen(const std::string& address,
                               LinkService& service) override;
  void Connect(const std::string& address, std::string greeting,
               LinkService& service, absl::Time deadline,
               Connected connected) override;

 private:
  struct Listener final : Polled {
    StreamTransport* transport = nullptr;
    LinkService* service = nullptr;
    int fd = -1;
    uint64_t number = 0;
    void Work(bool) override { transport->Accept(*this); }
    ~Listener() {
      if (fd >= 0) ::close(fd);
    }
  };

  void Accept(Listener& listener);
  void AcceptAll();
  void BeginAccepted(std::unique_ptr<Connection> connection,
                     LinkService& service, std::string peer, Task released);
  void BeginConnecting(Worker& worker, const SocketAddress& to,
                       std::string address, LinkService& service,
                       LinkCore::Opening opening);
  void StartLink(std::unique_ptr<Connection> connection, std::string address,
                 LinkService& service,
                 std::optional<LinkCore::Opening> opening);
  void Log(const Status& status) ABSL_LOCKS_EXCLUDED(mu_);
  Worker& NextWorker() {
    return *workers_[next_worker_.fetch_add(1) % workers_.size()];
  }
  // On the worker's thread, and waits.
  static void RunOn(Worker& worker, Task task);

  const StreamOptions options_;
  const std::string name_;
  const NewSocketStream make_;
  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<size_t> next_worker_{0};

  // The first worker's.
  std::vector<std::unique_ptr<Listener>> listeners_;
  uint32_t handshakes_ = 0;   // of accepted connections
  uint32_t connections_ = 0;  // accepted

  absl::Mutex mu_;
  absl::Time log_second_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  uint32_t logged_ ABSL_GUARDED_BY(mu_) = 0;
  uint32_t not_logged_ ABSL_GUARDED_BY(mu_) = 0;
};

Status StreamTransport::Start() {
  for (uint32_t i = 0; i < std::max<uint32_t>(options_.workers, 1); ++i) {
    auto worker = std::make_unique<Worker>(*options_.clock, options_.spin);
    LARDER_RETURN_IF_ERROR(worker->Start(absl::StrCat(name_, "-", i)));
    workers_.push_back(std::move(worker));
  }
  return absl::OkStatus();
}

StreamTransport::~StreamTransport() {
  if (!workers_.empty()) {
    RunOn(*workers_[0], [this] {
      for (const auto& listener : listeners_) {
        workers_[0]->Remove(listener->number, listener->fd);
      }
      listeners_.clear();
    });
  }
  for (const auto& worker : workers_) {
    for (bool left = true; left;) {
      RunOn(*worker, [&] {
        const auto handshakes = std::exchange(worker->handshakes(), {});
        const auto links = worker->links();
        for (const auto& [core, link] : links) {
          link->Lose(absl::CancelledError("the transport ends"));
        }
        left = !worker->links().empty();
      });
    }
  }
  for (const auto& worker : workers_) worker->Finish();
}

void StreamTransport::RunOn(Worker& worker, Task task) {
  absl::Notification done;
  worker.Post([&] {
    std::move(task)();
    done.Notify();
  });
  done.WaitForNotification();
}

void StreamTransport::Log(const Status& status) {
  if (options_.log == nullptr) return;
  uint32_t left_out = 0;
  {
    absl::MutexLock lock(&mu_);
    const absl::Time now = options_.clock->Now();
    if (now - log_second_ >= absl::Seconds(1)) {
      log_second_ = now;
      logged_ = 0;
      left_out = std::exchange(not_logged_, 0);
    }
    if (logged_ == kLogsPerSecond) {
      ++not_logged_;
      return;
    }
    ++logged_;
  }
  options_.log(left_out == 0
                   ? status
                   : Annotate(status, absl::StrCat("(", left_out,
                                                   " more were not logged)")));
}

StatusOr<std::string> StreamTransport::Listen(const std::string& address,
                                              LinkService& service) {
  LARDER_ASSIGN_OR_RETURN(const SocketAddress parsed,
                          ParseSocketAddress(address));
  auto listener = std::make_unique<Listener>();
  listener->transport = this;
  listener->service = &service;
  listener->fd = ::socket(parsed.storage.ss_family,
                          SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (listener->fd < 0) return NetworkError("a socket");
  SetOption(listener->fd, SOL_SOCKET, SO_REUSEADDR, 1);
  sockaddr_storage bound{};
  socklen_t size = sizeof bound;
  if (::bind(listener->fd, parsed.get(), parsed.length) != 0 ||
      ::listen(listener->fd, SOMAXCONN) != 0 ||
      ::getsockname(listener->fd, reinterpret_cast<sockaddr*>(&bound), &size) !=
          0) {
    return NetworkError(absl::StrCat("listening at ", address).c_str());
  }
  Status added;
  RunOn(*workers_[0], [&] {
    StatusOr<uint64_t> number = workers_[0]->Add(listener->fd, listener.get());
    added = number.status();
    if (!added.ok()) return;
    listener->number = *number;
    listeners_.push_back(std::move(listener));
  });
  LARDER_RETURN_IF_ERROR(added);
  return FormatSocketAddress(bound);
}

void StreamTransport::AcceptAll() {
  for (const auto& listener : listeners_) Accept(*listener);
}

// Until there is none, or no room for one: then again when there is.
void StreamTransport::Accept(Listener& listener) {
  while (handshakes_ < options_.handshakes_max &&
         connections_ < options_.connections_max) {
    sockaddr_storage from{};
    socklen_t size = sizeof from;
    const int fd = ::accept4(listener.fd, reinterpret_cast<sockaddr*>(&from),
                             &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd < 0) {
      if (errno == EAGAIN) return;
      if (errno == EMFILE || errno == ENFILE || errno == ENOBUFS ||
          errno == ENOMEM) {
        Log(NetworkError("accepting connections; trying again"));
        workers_[0]->PostAt(options_.clock->Now() + absl::Milliseconds(100),
                            [this] { AcceptAll(); });
        return;
      }
      if (errno == EBADF || errno == EINVAL || errno == ENOTSOCK) return;
      continue;  // that connection has gone already
    }
    Worker& first = *workers_[0];
    ++handshakes_;
    ++connections_;
    Worker& worker = NextWorker();
    auto connection = std::make_unique<Connection>(worker, fd, [this, &first] {
      first.Post([this] {
        --connections_;
        AcceptAll();
      });
    });
    Task released = [this, &first] {
      first.Post([this] {
        --handshakes_;
        AcceptAll();
      });
    };
    worker.Post([this, &listener, connection = std::move(connection),
                 released = std::move(released),
                 peer = FormatSocketAddress(from)]() mutable {
      BeginAccepted(std::move(connection), *listener.service, std::move(peer),
                    std::move(released));
    });
  }
}

void StreamTransport::BeginAccepted(std::unique_ptr<Connection> connection,
                                    LinkService& service, std::string peer,
                                    Task released) {
  Handshake::Parts parts;
  parts.make = &make_;
  parts.connection = std::move(connection);
  parts.peer = peer;
  parts.accepting = true;
  parts.released = std::move(released);
  const Status late = absl::UnavailableError(
      absl::StrCat(peer, " did not show who it is within ",
                   absl::FormatDuration(options_.handshake_timeout)));
  parts.done = [this, &service, peer = std::move(peer)](
                   StatusOr<std::unique_ptr<Connection>> shown) mutable {
    if (!shown.ok()) {
      Log(shown.status());
    } else {
      StartLink(*std::move(shown), std::move(peer), service, std::nullopt);
    }
  };
  Handshake::Start(std::move(parts),
                   options_.clock->Now() + options_.handshake_timeout, late);
}

void StreamTransport::Connect(const std::string& address, std::string greeting,
                              LinkService& service, absl::Time deadline,
                              Connected connected) {
  Worker& worker = NextWorker();
  StatusOr<SocketAddress> parsed = ParseSocketAddress(address);
  if (parsed.ok() && greeting.size() > kMessageBytesMax) {
    parsed = absl::InvalidArgumentError("a greeting that is too long");
  }
  worker.Post([this, &worker, &service, parsed = std::move(parsed), address,
               opening = LinkCore::Opening{std::move(greeting), deadline,
                                           std::move(connected)}]() mutable {
    if (!parsed.ok()) {
      std::move(opening.connected)(parsed.status());
      return;
    }
    BeginConnecting(worker, *parsed, std::move(address), service,
                    std::move(opening));
  });
}

void StreamTransport::BeginConnecting(Worker& worker, const SocketAddress& to,
                                      std::string address, LinkService& service,
                                      LinkCore::Opening opening) {
  const int fd = ::socket(to.storage.ss_family,
                          SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
  if (fd < 0) {
    std::move(opening.connected)(NetworkError("a socket"));
    return;
  }
  Handshake::Parts parts;
  parts.connection = std::make_unique<Connection>(worker, fd, nullptr);
  if (::connect(fd, to.get(), to.length) != 0 && errno != EINPROGRESS) {
    std::move(opening.connected)(NetworkError(address.c_str()));
    return;
  }
  parts.make = &make_;
  parts.peer = address;
  absl::Time deadline = options_.clock->Now() + options_.handshake_timeout;
  Status late = absl::UnavailableError(
      absl::StrCat(address, " did not show who it is within ",
                   absl::FormatDuration(options_.handshake_timeout)));
  if (opening.deadline < deadline) {
    deadline = opening.deadline;
    late = absl::DeadlineExceededError("nobody answered in time");
  }
  parts.done = [this, address = std::move(address), &service,
                opening = std::move(opening)](
                   StatusOr<std::unique_ptr<Connection>> shown) mutable {
    if (!shown.ok()) {
      std::move(opening.connected)(shown.status());
    } else {
      StartLink(*std::move(shown), std::move(address), service,
                std::move(opening));
    }
  };
  Handshake::Start(std::move(parts), deadline, std::move(late));
}

void StreamTransport::StartLink(std::unique_ptr<Connection> connection,
                                std::string address, LinkService& service,
                                std::optional<LinkCore::Opening> opening) {
  Worker& worker = connection->worker();
  LinkCore::Parts parts;
  parts.strand = &worker;
  parts.clock = options_.clock;
  parts.service = &service;
  parts.options = options_;
  parts.peer = {std::move(address), connection->stream().identity()};
  const auto core = std::make_shared<LinkCore>(std::move(parts));
  auto wire = std::make_unique<StreamWire>(std::move(connection), core);
  worker.links().emplace(core.get(), core);
  core->Start(std::move(wire), std::move(opening),
              [&worker, key = core.get()] { worker.links().erase(key); });
}

}  // namespace

StatusOr<std::unique_ptr<Transport>> NewStreamTransport(
    const StreamOptions& options, const char* name, NewSocketStream make) {
  LARDER_RETURN_IF_ERROR(CheckOptions(options));
  if (options.handshakes_max == 0 || options.connections_max == 0) {
    return absl::InvalidArgumentError(
        "a transport that may not accept any connection");
  }
  auto transport =
      std::make_unique<StreamTransport>(options, name, std::move(make));
  LARDER_RETURN_IF_ERROR(transport->Start());
  return transport;
}

}  // namespace larder
