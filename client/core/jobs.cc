#include "client/core/jobs.h"

#include <pthread.h>
#include <signal.h>

#include <algorithm>
#include <utility>

namespace larder::client {

std::thread StartThread(const char* name, absl::AnyInvocable<void() &&> body) {
  sigset_t all;
  sigset_t before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);  // inherited by the new thread
  std::thread thread([name, body = std::move(body)]() mutable {
    pthread_setname_np(pthread_self(), name);
    std::move(body)();
  });
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  return thread;
}

Jobs::~Jobs() {
  std::vector<std::thread> threads;
  {
    absl::MutexLock lock(&mu_);
    stopping_ = true;
    for (auto& [id, cancelled] : open_) *cancelled = true;
    threads.swap(threads_);
    changed_.SignalAll();
  }
  for (std::thread& thread : threads) thread.join();
}

Status Jobs::Submit(JobId id, std::shared_ptr<Cancelled> cancelled, Work work) {
  absl::MutexLock lock(&mu_);
  if (stopping_) return absl::CancelledError("the client is being closed");
  if (queued_.size() >= queued_max_) {
    return absl::ResourceExhaustedError(
        absl::StrCat(queued_max_, " jobs are waiting already"));
  }
  open_.emplace(id, cancelled);
  queued_.push_back({id, std::move(cancelled), std::move(work)});
  if (idle_ < queued_.size() && threads_.size() < threads_max_) {
    threads_.push_back(StartThread("larder-work", [this] { Run(); }));
  }
  changed_.SignalAll();
  return absl::OkStatus();
}

void Jobs::Run() {
  mu_.Lock();
  for (;;) {
    while (queued_.empty() && !stopping_) {
      ++idle_;
      changed_.Wait(&mu_);
      --idle_;
    }
    if (queued_.empty()) break;
    Job job = std::move(queued_.front());
    queued_.pop_front();
    mu_.Unlock();
    std::move(job.work)(*job.cancelled);
    job.work = nullptr;  // what it owns goes before it counts as done
    mu_.Lock();
    open_.erase(job.id);
    changed_.SignalAll();
  }
  mu_.Unlock();
}

Status Jobs::Cancel(JobId id) {
  absl::MutexLock lock(&mu_);
  const auto found = open_.find(id);
  if (found == open_.end()) return absl::NotFoundError("no such job");
  *found->second = true;
  return absl::OkStatus();
}

Status Jobs::Drain(absl::Duration longest) {
  const absl::Time until = absl::Now() + longest;
  absl::MutexLock lock(&mu_);
  bool late = false;
  while (!open_.empty()) {
    if (late) {
      changed_.Wait(&mu_);
    } else if (changed_.WaitWithDeadline(&mu_, until)) {
      late = true;
      for (auto& [id, cancelled] : open_) *cancelled = true;
    }
  }
  return late ? absl::DeadlineExceededError("jobs were cancelled")
              : absl::OkStatus();
}

}  // namespace larder::client
