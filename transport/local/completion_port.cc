#include "transport/local/completion_port.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <new>
#include <utility>

namespace larder {
namespace {

constexpr size_t kRingMapBytes =
    RoundUp(wire::RingBytes(wire::kRingEntries), kPageBytes);
// Entries that were not reserved leave this much for those that will be.
constexpr uint64_t kKeepFree = wire::kRingEntries / 4;

}  // namespace

StatusOr<std::shared_ptr<CompletionPort>> CompletionPort::Create(
    uint32_t max_backlog, std::shared_ptr<PacketSink> sink) {
  std::shared_ptr<CompletionPort> port(
      new CompletionPort(max_backlog, std::move(sink)));
  port->ring_fd_.reset(
      memfd_create("larder-ring", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!port->ring_fd_ || ftruncate(port->ring_fd_.get(), kRingMapBytes) != 0) {
    return ErrnoStatus(absl::StatusCode::kResourceExhausted,
                       "cannot make a completion ring");
  }
  LARDER_ASSIGN_OR_RETURN(port->ring_,
                          Mapping::Map(port->ring_fd_.get(), kRingMapBytes,
                                       PROT_READ | PROT_WRITE));
  // From here on no other mapping of it can be written.
  if (fcntl(port->ring_fd_.get(), F_ADD_SEALS,
            F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_FUTURE_WRITE | F_SEAL_SEAL) !=
      0) {
    return ErrnoStatus(absl::StatusCode::kInternal,
                       "cannot seal a completion ring");
  }
  new (port->ring_.data()) wire::RingHeader;
  int bell[2];
  if (pipe2(bell, O_CLOEXEC | O_NONBLOCK) != 0) {
    return ErrnoStatus(absl::StatusCode::kResourceExhausted,
                       "cannot make a completion bell");
  }
  port->bell_read_.reset(bell[0]);
  port->bell_write_.reset(bell[1]);
  fcntl(bell[1], F_SETPIPE_SZ, kPageBytes);  // a courtesy: it may be refused
  return port;
}

bool CompletionPort::Reserve(uint32_t count) {
  absl::MutexLock lock(&mu_);
  if (Free() < count) return false;
  reserved_ += count;
  return true;
}

void CompletionPort::Unreserve(uint32_t count) {
  bool ring;
  {
    absl::MutexLock lock(&mu_);
    reserved_ -= std::min(count, reserved_);
    ring = FlushBacklog();
  }
  if (ring) RingBell();
}

void CompletionPort::Write(const wire::RingEntry& entry) {
  std::byte* at = ring_.data() + sizeof(wire::RingHeader) +
                  (produced_ % wire::kRingEntries) * sizeof(entry);
  std::memcpy(at, &entry, sizeof entry);
  ++produced_;
  auto* header = reinterpret_cast<wire::RingHeader*>(ring_.data());
  std::atomic_ref(header->produced).store(produced_, std::memory_order_release);
}

void CompletionPort::PushReserved(const wire::RingEntry& entry) {
  {
    absl::MutexLock lock(&mu_);
    if (closed_ || reserved_ == 0) return;
    --reserved_;
    Write(entry);
  }
  RingBell();
}

void CompletionPort::Push(const wire::RingEntry& entry) {
  bool overflowed = false;
  {
    absl::MutexLock lock(&mu_);
    if (closed_) return;
    if (!backlog_.empty() || Free() <= kKeepFree) {
      // What is unread anyway need not be said twice.
      if (entry.kind == wire::Completion::kLookupChanged ||
          entry.kind == wire::Completion::kEpochAdvanced) {
        for (wire::RingEntry& waiting : backlog_) {
          if (waiting.kind != entry.kind || waiting.request != entry.request) {
            continue;
          }
          waiting = entry;
          return;
        }
      }
      if (backlog_.size() < max_backlog_) {
        backlog_.push_back(entry);
        return;
      }
      overflowed = closed_ = true;
      backlog_.clear();
    } else {
      Write(entry);
    }
  }
  if (overflowed) {
    sink_->Close("it does not read its completions");
    return;
  }
  RingBell();
}

bool CompletionPort::FlushBacklog() {
  bool wrote = false;
  while (!closed_ && !backlog_.empty() && Free() > kKeepFree) {
    Write(backlog_.front());
    backlog_.pop_front();
    wrote = true;
  }
  return wrote;
}

bool CompletionPort::Consumed(uint32_t consumed) {
  bool ring;
  {
    absl::MutexLock lock(&mu_);
    // Callers of one client may overtake each other on the way to the socket:
    // what is behind is old news.
    const uint32_t ahead = consumed - static_cast<uint32_t>(consumed_);
    if (ahead == 0 || ahead > UINT32_MAX / 2) return true;
    if (ahead > produced_ - consumed_) return false;
    consumed_ += ahead;
    ring = FlushBacklog();
  }
  if (ring) RingBell();
  return true;
}

void CompletionPort::Notice() {
  {
    absl::MutexLock lock(&mu_);
    auto* header = reinterpret_cast<wire::RingHeader*>(ring_.data());
    std::atomic_ref(header->notices)
        .store(++notices_, std::memory_order_release);
  }
  RingBell();
}

void CompletionPort::Close() {
  absl::MutexLock lock(&mu_);
  closed_ = true;
  backlog_.clear();
}

void CompletionPort::RingBell() {
  if (sink_->Rang()) return;
  const char bell = 1;
  // A full pipe is readable as it is.
  [[maybe_unused]] const ssize_t written = write(bell_write_.get(), &bell, 1);
}

}  // namespace larder
