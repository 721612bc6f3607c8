#include "transport/link/strand.h"

#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <utility>

namespace larder {

Strand::~Strand() {
  if (wake_fd_ >= 0) ::close(wake_fd_);
}

Status Strand::Open() {
  wake_fd_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake_fd_ >= 0) return absl::OkStatus();
  return absl::ResourceExhaustedError(
      absl::StrCat("eventfd: ", std::strerror(errno)));
}

void Strand::Ring() {
  const uint64_t one = 1;
  (void)!::write(wake_fd_, &one, sizeof one);
}

void Strand::Post(Task task) {
  bool wake = false;
  {
    absl::MutexLock lock(&mu_);
    tasks_.push_back(std::move(task));
    wake = std::exchange(asleep_, false);
  }
  if (wake) Ring();
}

void Strand::PostAt(absl::Time when, Task task) {
  bool wake = false;
  {
    absl::MutexLock lock(&mu_);
    const auto it = timers_.emplace(when, std::move(task));
    wake = it == timers_.begin() && std::exchange(asleep_, false);
  }
  if (wake) Ring();
}

void Strand::Stop() {
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    asleep_ = false;
  }
  Ring();
}

bool Strand::RunDue() {
  {
    absl::MutexLock lock(&mu_);
    if (!timers_.empty()) {
      const absl::Time now = clock_.Now();
      while (!timers_.empty() && timers_.begin()->first <= now) {
        tasks_.push_back(std::move(timers_.begin()->second));
        timers_.erase(timers_.begin());
      }
    }
    running_.swap(tasks_);
  }
  const bool any = !running_.empty();
  for (Task& task : running_) std::move(task)();
  running_.clear();
  return any;
}

bool Strand::stopping() const {
  absl::MutexLock lock(&mu_);
  return stopping_;
}

int Strand::FallAsleep() {
  absl::MutexLock lock(&mu_);
  if (!tasks_.empty() || stopping_) return 0;
  asleep_ = true;
  if (timers_.empty()) return 1000;
  const absl::Duration left = timers_.begin()->first - clock_.Now();
  return static_cast<int>(std::clamp<int64_t>(
      absl::ToInt64Milliseconds(absl::Ceil(left, absl::Milliseconds(1))), 0,
      1000));
}

void Strand::WakeUp(bool rung) {
  uint64_t count;
  if (rung) (void)!::read(wake_fd_, &count, sizeof count);
  absl::MutexLock lock(&mu_);
  asleep_ = false;
}

void Strand::DropAll() {
  std::vector<Task> tasks;
  std::multimap<absl::Time, Task> timers;
  absl::MutexLock lock(&mu_);
  tasks.swap(tasks_);
  timers.swap(timers_);
}

}  // namespace larder
