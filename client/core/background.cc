#include "client/core/background.h"

#include "client/core/jobs.h"
#include "store/clock.h"

namespace larder::client {

bool Background::PostAt(absl::Time when, absl::AnyInvocable<void() &&> task) {
  absl::MutexLock lock(&mu_);
  if (stopping_ || waiting_.size() >= kWaitingMax) return false;
  waiting_.emplace(when, std::move(task));
  if (!thread_.joinable()) {
    thread_ = StartThread("larder-refresh", [this] { Run(); });
  }
  posted_.Signal();
  return true;
}

void Background::Stop() {
  std::thread thread;
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    waiting_.clear();
    thread = std::move(thread_);
    posted_.Signal();
  }
  if (thread.joinable()) thread.join();
}

void Background::Run() {
  mu_.Lock();
  while (!stopping_) {
    if (waiting_.empty()) {
      posted_.Wait(&mu_);
      continue;
    }
    const absl::Time when = waiting_.begin()->first;
    if (when > Clock::Real().Now()) {
      posted_.WaitWithTimeout(&mu_, when - Clock::Real().Now());
      continue;
    }
    absl::AnyInvocable<void()&&> task = std::move(waiting_.begin()->second);
    waiting_.erase(waiting_.begin());
    mu_.Unlock();
    std::move(task)();
    task = nullptr;
    mu_.Lock();
  }
  mu_.Unlock();
}

}  // namespace larder::client
