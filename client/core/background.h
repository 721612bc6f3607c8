#ifndef LARDER_CLIENT_CORE_BACKGROUND_H_
#define LARDER_CLIENT_CORE_BACKGROUND_H_

#include <cstddef>
#include <map>
#include <thread>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace larder::client {

// One thread for what must happen behind callers that must not wait; started
// by the first Post. Thread-safe.
class Background {
 public:
  Background() = default;
  ~Background() { Stop(); }
  Background(const Background&) = delete;
  Background& operator=(const Background&) = delete;

  // False if too much waits already (or after Stop): ask again later.
  bool Post(absl::AnyInvocable<void() &&> task) ABSL_LOCKS_EXCLUDED(mu_) {
    return PostAt(absl::InfinitePast(), std::move(task));
  }
  // Not before `when`.
  bool PostAt(absl::Time when, absl::AnyInvocable<void() &&> task)
      ABSL_LOCKS_EXCLUDED(mu_);
  // Drops what waits, waits for what runs.
  void Stop() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  static constexpr size_t kWaitingMax = 1024;
  void Run() ABSL_LOCKS_EXCLUDED(mu_);

  absl::Mutex mu_;
  absl::CondVar posted_;
  bool stopping_ ABSL_GUARDED_BY(mu_) = false;
  std::multimap<absl::Time, absl::AnyInvocable<void() &&>> waiting_
      ABSL_GUARDED_BY(mu_);  // by when it may run
  std::thread thread_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_BACKGROUND_H_
