#ifndef LARDER_CLIENT_CORE_QUEUE_H_
#define LARDER_CLIENT_CORE_QUEUE_H_

#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/status.h"

namespace larder::client {

using JobId = uint64_t;

enum class Operation : uint32_t {
  kMatch = 1,
  kLookup = 2,
  kLoad = 3,
  kSave = 4,
  kPut = 5,
  kGet = 6,
  kDelete = 7,
  kFind = 8,
};

struct Done {
  JobId job = 0;
  uint64_t user_data = 0;
  Operation operation{};
  uint32_t stage = 0;
  Status status;
  uint32_t count = 0;
  uint32_t good = 0;
  uint64_t bytes = 0;
  uint8_t lineage = 0;  // kLoad: of what was delivered
  std::vector<uint8_t> per_key;
  std::vector<uint64_t> per_key_bytes;
};

// What finished, for one consumer, with an eventfd that is readable while
// something waits. Producers share it, so that it may be closed before them.
class Queue {
 public:
  // ResourceExhausted: no descriptor left.
  static StatusOr<std::shared_ptr<Queue>> Make();
  ~Queue();
  Queue(const Queue&) = delete;
  Queue& operator=(const Queue&) = delete;

  int fd() const { return fd_; }
  void Push(Done done) ABSL_LOCKS_EXCLUDED(mu_);
  // Up to `capacity` of them; waits for the first at most `longest`. They live
  // until the next call.
  std::span<const Done> Poll(size_t capacity, absl::Duration longest)
      ABSL_LOCKS_EXCLUDED(mu_);

 private:
  explicit Queue(int fd) : fd_(fd) {}

  const int fd_;
  absl::Mutex mu_;
  absl::CondVar pushed_;
  std::deque<Done> waiting_ ABSL_GUARDED_BY(mu_);
  std::vector<Done> taken_;  // the consumer's
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_QUEUE_H_
