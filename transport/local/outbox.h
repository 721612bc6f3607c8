#ifndef LARDER_TRANSPORT_LOCAL_OUTBOX_H_
#define LARDER_TRANSPORT_LOCAL_OUTBOX_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

#include "transport/local/os.h"
#include "transport/local/session.h"

namespace larder {

// The sending half of one client's socket: sends at once while the socket
// takes it, then queues up to a bound and asks its epoll for EPOLLOUT.
// Shared by the connection, its session and callbacks; after Detach it touches
// nothing. Thread-safe.
class Outbox final : public PacketSink {
 public:
  struct Options {
    uint64_t queue_bytes = 0;
    int epoll_fd = -1;
    uint64_t epoll_tag = 0;
    std::atomic<uint64_t>* sent = nullptr;  // outlives Detach
  };

  Outbox(UniqueFd socket, Options options)
      : options_(options), socket_(std::move(socket)) {}

  bool Send(ByteSpan packet, std::span<const int> fds) override
      ABSL_LOCKS_EXCLUDED(mu_);
  void Close(std::string_view reason) override ABSL_LOCKS_EXCLUDED(mu_);

  // The socket takes packets again (EPOLLOUT). True: nothing is left to send.
  bool Flush() ABSL_LOCKS_EXCLUDED(mu_);
  // Closes the socket; returns why Close was called, empty if it was not.
  std::string Detach() ABSL_LOCKS_EXCLUDED(mu_);

  bool closing() const { return closing_.load(std::memory_order_relaxed); }

 private:
  struct Queued {
    std::vector<std::byte> packet;
    std::vector<UniqueFd> fds;
  };
  enum class Outcome { kSent, kFull, kGone };

  Outcome TrySend(ByteSpan packet, std::span<const int> fds)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool Enqueue(ByteSpan packet, std::span<const int> fds)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void BeginClose(std::string_view reason) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Watch(uint32_t events) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  std::atomic<bool> closing_{false};

  absl::Mutex mu_;
  UniqueFd socket_ ABSL_GUARDED_BY(mu_);
  std::string reason_ ABSL_GUARDED_BY(mu_);
  std::deque<Queued> queue_ ABSL_GUARDED_BY(mu_);
  uint64_t queued_bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_LOCAL_OUTBOX_H_
