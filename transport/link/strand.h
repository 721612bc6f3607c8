#ifndef LARDER_TRANSPORT_LINK_STRAND_H_
#define LARDER_TRANSPORT_LINK_STRAND_H_

#include <map>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/clock.h"
#include "store/executor.h"
#include "store/status.h"

namespace larder {

// Tasks and timers of a thread that waits for other things too: the thread runs
// what is due, asks how long it may sleep, and polls wake_fd() with the rest.
class Strand : public Executor {
 public:
  explicit Strand(Clock& clock) : clock_(clock) {}
  ~Strand() override;
  // Before anything else.
  Status Open();

  // One after the other, in the order of Post.
  void Post(Task task) override ABSL_LOCKS_EXCLUDED(mu_);
  void PostAt(absl::Time when, Task task) override ABSL_LOCKS_EXCLUDED(mu_);
  // Tells the thread to leave its loop.
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);

  // -- on the thread
  // What is due and was posted until now. False if there was nothing.
  bool RunDue() ABSL_LOCKS_EXCLUDED(mu_);
  bool stopping() const ABSL_LOCKS_EXCLUDED(mu_);
  // How many milliseconds the thread may sleep, at most 1000: other clocks than
  // the real one do not wake it. From now until WakeUp, wake_fd() becomes
  // readable when there is something to do.
  int FallAsleep() ABSL_LOCKS_EXCLUDED(mu_);
  // `rung`: it has become so.
  void WakeUp(bool rung) ABSL_LOCKS_EXCLUDED(mu_);
  int wake_fd() const { return wake_fd_; }

  // Destroys what was not run. REQUIRES: the thread has left its loop.
  void DropAll() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  void Ring();

  Clock& clock_;
  int wake_fd_ = -1;
  std::vector<Task> running_;  // the thread's, kept for its memory
  mutable absl::Mutex mu_;
  std::vector<Task> tasks_ ABSL_GUARDED_BY(mu_);
  std::multimap<absl::Time, Task> timers_ ABSL_GUARDED_BY(mu_);
  bool asleep_ ABSL_GUARDED_BY(mu_) = false;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_LINK_STRAND_H_
