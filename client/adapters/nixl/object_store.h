#ifndef LARDER_CLIENT_ADAPTERS_NIXL_OBJECT_STORE_H_
#define LARDER_CLIENT_ADAPTERS_NIXL_OBJECT_STORE_H_

#include <chrono>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "client/adapters/nixl/abi.h"
#include "client/adapters/nixl/options.h"
#include "client/adapters/nixl/plan.h"
#include "client/larder.h"

namespace larder::nixl {

// One move of objects between memory and Larder, which may be started again
// when it is over. Owned by whoever asked for it; the store only looks at it
// inside calls that are given it, and while it is under way.
class Transfer {
 public:
  Transfer(Operation operation, Plan plan)
      : operation_(operation), plan_(std::move(plan)) {}

 private:
  friend class ObjectStore;

  // One submitted call, for objects [begin, begin + count) of a batch.
  struct Job {
    Transfer* transfer;
    const Batch* batch;
    uint32_t begin;
    uint32_t count;
    larder_job id = 0;
    bool done = false;
  };

  const Operation operation_;
  const Plan plan_;
  // Guarded by the store's mutex.
  std::vector<std::unique_ptr<Job>> jobs_;
  size_t jobs_left_ = 0;
  bool deleting_ = false;  // what is overwritten goes first
  Status status_ = kSuccess;
};

// Objects by name, in one space of a Larder daemon.
//
// Connects when it is first needed and keeps the connection for its life; the
// client library repairs it. A failed attempt is remembered for 100 ms, so that
// threads do not queue for a daemon that does not answer; no call takes longer
// than two deadlines. Any number of threads may use it, one at a time per
// transfer.
//
// Nothing throws but std::bad_alloc.
class ObjectStore {
 public:
  explicit ObjectStore(Options options) : options_(std::move(options)) {}
  // Transfers must be over.
  ~ObjectStore();

  const Options& options() const { return options_; }

  Outcome Connect();

  // Which of them are there.
  Result<std::vector<bool>> Find(const std::vector<ObjectName>& objects);

  // kInProgress, or why it could not be started. Connect must have succeeded.
  Status Start(Transfer& transfer);
  // Never waits. kInProgress, or how it ended: kSuccess if every object was
  // moved; kNotFound if some were missing; kMismatch if one was shorter than
  // what was asked of it, or longer than it was registered; kCancelled, or
  // kBackendError. Unless it is kSuccess, destinations may have been written
  // to or not.
  Status Check(Transfer& transfer);
  // Cancels; afterwards none of the transfer's memory is touched any more.
  // Waits for the object under way, no longer than the deadline.
  void Stop(Transfer& transfer);

 private:
  void TakeCompletions();
  void Finish(Transfer::Job& job, const larder_completion& completion);
  Status Submit(Transfer& transfer);
  Status SubmitJob(Transfer::Job& job);

  const Options options_;

  std::mutex mu_;
  // Guarded by mu_. Set once, all together; then the space may be used
  // without it.
  Client client_;
  Space space_;
  Queue queue_;
  std::chrono::steady_clock::time_point connect_again_{};
  Outcome connect_failure_;
};

}  // namespace larder::nixl

#endif  // LARDER_CLIENT_ADAPTERS_NIXL_OBJECT_STORE_H_
