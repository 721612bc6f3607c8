#ifndef LARDER_TRANSPORT_LOCAL_COMPLETION_PORT_H_
#define LARDER_TRANSPORT_LOCAL_COMPLETION_PORT_H_

#include <cstdint>
#include <deque>
#include <memory>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "store/status.h"
#include "transport/local/os.h"
#include "transport/local/session.h"
#include "transport/wire.h"

namespace larder {

// The daemon's end of one client's completion ring (wire.h): writes entries,
// keeps account of room, rings the bell. Shared by the session and by the
// callbacks of operations under way; once closed, everything is dropped.
//
// Room: unread entries and reserved ones together never exceed the ring. What
// was reserved can always be written at once; what was not goes in while a
// quarter of the ring stays free, and else waits in a backlog.
//
// Thread-safe. Locks nothing else but the sink.
class CompletionPort {
 public:
  static StatusOr<std::shared_ptr<CompletionPort>> Create(
      uint32_t max_backlog, std::shared_ptr<PacketSink> sink);

  // For the handshake: the ring (sealed against writing by others) and the read
  // end of the bell. The ring's descriptor is closed by CloseRingFd.
  int ring_fd() const { return ring_fd_.get(); }
  int bell_fd() const { return bell_read_.get(); }
  void CloseRingFd() { ring_fd_.reset(); }

  // Sets room aside for `count` entries; false if there is none.
  bool Reserve(uint32_t count) ABSL_LOCKS_EXCLUDED(mu_);
  void Unreserve(uint32_t count) ABSL_LOCKS_EXCLUDED(mu_);
  // Writes an entry into room that was reserved.
  void PushReserved(const wire::RingEntry& entry) ABSL_LOCKS_EXCLUDED(mu_);
  // Writes an entry or lets it wait; when too many wait, closes the sink.
  void Push(const wire::RingEntry& entry) ABSL_LOCKS_EXCLUDED(mu_);

  // What the client says it has read (modulo 2^32). False: more than was
  // written.
  bool Consumed(uint32_t consumed) ABSL_LOCKS_EXCLUDED(mu_);

  // A notice was sent over the socket.
  void Notice() ABSL_LOCKS_EXCLUDED(mu_);

  void Close() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  CompletionPort(uint32_t max_backlog, std::shared_ptr<PacketSink> sink)
      : max_backlog_(max_backlog), sink_(std::move(sink)) {}

  uint64_t Free() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return wire::kRingEntries - (produced_ - consumed_) - reserved_;
  }
  void Write(const wire::RingEntry& entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool FlushBacklog() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RingBell();

  // Constant after construction.
  const uint32_t max_backlog_;
  const std::shared_ptr<PacketSink> sink_;
  UniqueFd ring_fd_;
  UniqueFd bell_read_;  // kept: a write never meets a pipe without readers
  UniqueFd bell_write_;
  Mapping ring_;

  absl::Mutex mu_;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  uint64_t produced_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t consumed_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t notices_ ABSL_GUARDED_BY(mu_) = 0;
  uint32_t reserved_ ABSL_GUARDED_BY(mu_) = 0;
  std::deque<wire::RingEntry> backlog_ ABSL_GUARDED_BY(mu_);
};

// Room in a port that is given back by whoever drops it. Movable.
class CompletionLease {
 public:
  CompletionLease() = default;
  CompletionLease(std::shared_ptr<CompletionPort> port, uint32_t count)
      : port_(std::move(port)), count_(count) {}
  CompletionLease(CompletionLease&& other) noexcept
      : port_(std::move(other.port_)), count_(std::exchange(other.count_, 0)) {}
  CompletionLease& operator=(CompletionLease&& other) noexcept {
    std::swap(port_, other.port_);
    std::swap(count_, other.count_);
    return *this;
  }
  ~CompletionLease() { Drop(); }

  uint32_t count() const { return count_; }
  // Uses one; nothing happens if none is left.
  void Push(const wire::RingEntry& entry) {
    if (count_ == 0) return;
    --count_;
    port_->PushReserved(entry);
  }
  void Drop() {
    if (count_ != 0) port_->Unreserve(std::exchange(count_, 0));
  }

 private:
  std::shared_ptr<CompletionPort> port_;
  uint32_t count_ = 0;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_LOCAL_COMPLETION_PORT_H_
