#ifndef LARDER_STORE_EXECUTOR_H_
#define LARDER_STORE_EXECUTOR_H_

#include <cstddef>
#include <memory>
#include <string>

#include "absl/functional/any_invocable.h"
#include "absl/time/time.h"

namespace larder {

using Task = absl::AnyInvocable<void() &&>;

// Runs tasks, now or later. The engine, tiers and sessions never start a
// thread: what they must not do inside a call they post here, so that a test
// with a ManualExecutor decides what runs, when, and in which order.
//
// Thread-safe. Tasks may post further tasks. A task that is posted after
// shutdown began is destroyed without being run.
class Executor {
 public:
  virtual ~Executor() = default;

  // Runs `task` as soon as a worker is free. Tasks may run at the same time as
  // each other, in any order.
  virtual void Post(Task task) = 0;

  // Runs `task` once `clock.Now() >= when`, not before. Cannot be recalled: a
  // task checks whether it is still wanted.
  virtual void PostAt(absl::Time when, Task task) = 0;
};

// `threads` workers (at least one) and one timer thread on Clock::Real().
// `name` (at most 12 characters) names the threads for `top -H`. `niceness` is
// added to the workers' (Linux gives each thread its own). Destruction runs
// what is queued, drops what waits for a later time, and joins.
std::unique_ptr<Executor> NewThreadPool(std::string name, size_t threads,
                                        int niceness = 0);

}  // namespace larder

#endif  // LARDER_STORE_EXECUTOR_H_
