#ifndef LARDER_CLIENT_CORE_JOBS_H_
#define LARDER_CLIENT_CORE_JOBS_H_

#include <atomic>
#include <cstdint>
#include <deque>
#include <memory>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "client/core/queue.h"
#include "store/status.h"

namespace larder::client {

// Set once the caller wants an operation to end. Operations look at it between
// pieces; whoever waits long looks every few milliseconds.
using Cancelled = std::atomic<bool>;

// A new thread of the library: named, with every signal blocked, since signals
// are the engine's business.
std::thread StartThread(const char* name, absl::AnyInvocable<void() &&> body);

// The client's worker threads and what waits for them. Threads start with the
// first job that needs one. Thread-safe.
class Jobs {
 public:
  using Work = absl::AnyInvocable<void(const Cancelled& cancelled) &&>;

  Jobs(uint32_t threads, uint32_t queued_max)
      : threads_max_(threads), queued_max_(queued_max) {}
  // Cancels everything, waits for what runs.
  ~Jobs();
  Jobs(const Jobs&) = delete;
  Jobs& operator=(const Jobs&) = delete;

  JobId NewId() { return next_id_.fetch_add(1, std::memory_order_relaxed); }

  // Runs `work` exactly once on a worker; after a cancel or a shutdown with
  // the flag set. ResourceExhausted beyond queued_max: then never.
  Status Submit(JobId id, std::shared_ptr<Cancelled> cancelled, Work work)
      ABSL_LOCKS_EXCLUDED(mu_);
  // NotFound if it is done (or never was).
  Status Cancel(JobId id) ABSL_LOCKS_EXCLUDED(mu_);
  // Waits until nothing is left. At the deadline everything is cancelled and
  // still waited for; then DeadlineExceeded.
  Status Drain(absl::Duration longest) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  struct Job {
    JobId id = 0;
    std::shared_ptr<Cancelled> cancelled;
    Work work;
  };

  void Run() ABSL_LOCKS_EXCLUDED(mu_);

  const uint32_t threads_max_;
  const uint32_t queued_max_;
  std::atomic<JobId> next_id_{1};

  absl::Mutex mu_;
  absl::CondVar changed_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  uint32_t idle_ ABSL_GUARDED_BY(mu_) = 0;
  std::deque<Job> queued_ ABSL_GUARDED_BY(mu_);
  // Queued and running.
  absl::flat_hash_map<JobId, std::shared_ptr<Cancelled>> open_
      ABSL_GUARDED_BY(mu_);
  std::vector<std::thread> threads_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_JOBS_H_
