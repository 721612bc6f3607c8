#ifndef LARDER_CLIENT_CORE_FIND_H_
#define LARDER_CLIENT_CORE_FIND_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "client/core/hold.h"
#include "client/core/jobs.h"
#include "client/core/space.h"
#include "store/chunk_id.h"
#include "store/status.h"
#include "store/types.h"

namespace larder::client {

// A scheduler's whole question about one prompt.
struct FindRequest {
  std::shared_ptr<Space> space;
  std::vector<uint32_t> tokens;
  std::vector<RequestKey> keys;
  // No more than so many are of use; rounded down to whole blocks.
  size_t tokens_max = 0;
  HoldOptions hold;
};

struct FindOutcome {
  Status status;      // what cut it short; a miss is OK
  size_t tokens = 0;  // there, from the first token on, and held
  // Why no more are; kNone if all that were wanted are.
  MissReason reason = MissReason::kNone;
  // Of whole chunks, and at most one tail behind them; null if tokens == 0.
  std::shared_ptr<Hold> hold;
};

// On the calling thread: ids, a match, a lookup of the tails that may go on
// where the whole chunks end, a hold of what was found. Three round trips.
FindOutcome RunFind(const FindRequest& request, const Cancelled* cancelled);

// A find on the client's workers. Thread-safe. Unlike a load it writes nothing
// of the caller's, so dropping it need not wait.
class FindJob {
 public:
  // Called once, by the worker. Not to keep the outcome's hold.
  using Finished = absl::AnyInvocable<void(JobId, const FindOutcome&) &&>;
  static StatusOr<std::shared_ptr<FindJob>> Start(FindRequest request,
                                                  Finished finished);

  JobId id() const { return id_; }
  Client& client() const { return client_; }
  void Cancel() { *cancelled_ = true; }
  // The outcome if it ended, else null. Never blocks.
  const FindOutcome* Ended() ABSL_LOCKS_EXCLUDED(mu_);
  // The same, waiting for the end at most `longest`.
  const FindOutcome* Wait(absl::Duration longest) ABSL_LOCKS_EXCLUDED(mu_);

 private:
  explicit FindJob(Client& client)
      : client_(client), id_(client.jobs().NewId()) {}

  Client& client_;
  const JobId id_;
  const std::shared_ptr<Cancelled> cancelled_ =
      std::make_shared<Cancelled>(false);
  absl::Mutex mu_;
  bool finished_ ABSL_GUARDED_BY(mu_) = false;
  FindOutcome outcome_;  // written once, before finished_
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_FIND_H_
