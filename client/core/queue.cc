#include "client/core/queue.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <utility>

namespace larder::client {

StatusOr<std::shared_ptr<Queue>> Queue::Make() {
  const int fd = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (fd < 0) {
    return absl::ResourceExhaustedError(
        absl::StrCat("eventfd: ", std::strerror(errno)));
  }
  return std::shared_ptr<Queue>(new Queue(fd));
}

Queue::~Queue() {
  close(fd_);
}

void Queue::Push(Done done) {
  absl::MutexLock lock(&mu_);
  waiting_.push_back(std::move(done));
  const uint64_t one = 1;
  // Cannot fail but by overflow, which leaves it readable.
  [[maybe_unused]] const ssize_t written = write(fd_, &one, sizeof one);
  pushed_.Signal();
}

std::span<const Done> Queue::Poll(size_t capacity, absl::Duration longest) {
  taken_.clear();
  const absl::Time until = absl::Now() + longest;
  absl::MutexLock lock(&mu_);
  while (waiting_.empty()) {
    if (longest <= absl::ZeroDuration() ||
        pushed_.WaitWithDeadline(&mu_, until)) {
      break;
    }
  }
  while (!waiting_.empty() && taken_.size() < capacity) {
    taken_.push_back(std::move(waiting_.front()));
    waiting_.pop_front();
  }
  if (waiting_.empty()) {
    uint64_t count;
    [[maybe_unused]] const ssize_t got = read(fd_, &count, sizeof count);
  }
  return taken_;
}

}  // namespace larder::client
