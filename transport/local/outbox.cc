#include "transport/local/outbox.h"

#include <fcntl.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/uio.h>

#include <cerrno>
#include <cstring>
#include <utility>

#include "transport/local/datagram.h"
#include "transport/wire.h"

namespace larder {
namespace {

// What a queued packet costs beside its bytes.
constexpr uint64_t kQueuedOverhead = 256;

}  // namespace

Outbox::Outcome Outbox::TrySend(ByteSpan packet, std::span<const int> fds) {
  const iovec piece = {const_cast<std::byte*>(packet.data()), packet.size()};
  switch (SendDatagram(socket_.get(), {&piece, 1}, fds)) {
    case 0:
      options_.sent->fetch_add(1, std::memory_order_relaxed);
      return Outcome::kSent;
    case EAGAIN:
    case ENOBUFS:
    case ENOMEM:
    case ETOOMANYREFS:  // too many descriptors under way to slow readers
      return Outcome::kFull;
    default:
      return Outcome::kGone;
  }
}

bool Outbox::Send(ByteSpan packet, std::span<const int> fds) {
  absl::MutexLock lock(&mu_);
  if (closing() || !socket_) return false;
  if (!queue_.empty()) return Enqueue(packet, fds);
  switch (TrySend(packet, fds)) {
    case Outcome::kSent:
      return true;
    case Outcome::kFull:
      if (!Enqueue(packet, fds)) return false;
      Watch(EPOLLIN | EPOLLRDHUP | EPOLLOUT);
      return true;
    case Outcome::kGone:
      break;
  }
  BeginClose("");
  return false;
}

bool Outbox::Enqueue(ByteSpan packet, std::span<const int> fds) {
  const uint64_t cost = packet.size() + kQueuedOverhead * (1 + fds.size());
  if (queued_bytes_ + cost > options_.queue_bytes) {
    BeginClose("it does not read its socket");
    return false;
  }
  Queued queued{{packet.begin(), packet.end()}, {}};
  for (const int fd : fds) {
    queued.fds.emplace_back(fcntl(fd, F_DUPFD_CLOEXEC, 0));
    if (queued.fds.back()) continue;
    BeginClose("no descriptor is left to send it");
    return false;
  }
  queued_bytes_ += cost;
  queue_.push_back(std::move(queued));
  return true;
}

bool Outbox::Flush() {
  absl::MutexLock lock(&mu_);
  if (closing() || !socket_) return true;
  while (!queue_.empty()) {
    const Queued& next = queue_.front();
    int fds[wire::kMaxDescriptors];
    size_t fd_count = 0;
    for (const UniqueFd& fd : next.fds) fds[fd_count++] = fd.get();
    const Outcome outcome = TrySend(next.packet, {fds, fd_count});
    if (outcome == Outcome::kFull) return false;
    if (outcome == Outcome::kGone) {
      BeginClose("");
      return true;
    }
    queued_bytes_ -= next.packet.size() + kQueuedOverhead * (1 + fd_count);
    queue_.pop_front();
  }
  Watch(EPOLLIN | EPOLLRDHUP);
  return true;
}

void Outbox::Close(std::string_view reason) {
  absl::MutexLock lock(&mu_);
  if (closing() || !socket_) return;
  BeginClose(reason);
}

void Outbox::BeginClose(std::string_view reason) {
  closing_.store(true, std::memory_order_relaxed);
  reason_ = reason;
  queue_.clear();
  queued_bytes_ = 0;
  // What is under way still reaches the peer; our epoll sees a hang-up.
  shutdown(socket_.get(), SHUT_RDWR);
}

void Outbox::Watch(uint32_t events) {
  epoll_event event = {};
  event.events = events;
  event.data.u64 = options_.epoll_tag;
  epoll_ctl(options_.epoll_fd, EPOLL_CTL_MOD, socket_.get(), &event);
}

std::string Outbox::Detach() {
  absl::MutexLock lock(&mu_);
  closing_.store(true, std::memory_order_relaxed);
  socket_.reset();
  queue_.clear();
  return std::move(reason_);
}

}  // namespace larder
