#ifndef LARDER_CLIENT_CORE_PROFILES_H_
#define LARDER_CLIENT_CORE_PROFILES_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "client/core/background.h"
#include "client/core/jobs.h"
#include "codec/profile.h"
#include "store/clock.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder::client {

// The profiles that coded copies are decoded with. Each is fetched once, on a
// thread of its own, however many loads wait for it and whether they still do
// when it comes; what does not need it is not delayed. Thread-safe.
class Profiles {
 public:
  struct Options {
    // What is kept for the next load; the one that was used longest ago goes
    // first, but never the last one.
    size_t profiles_max = 16;
    uint64_t bytes_max = 512_MiB;
    // After it was said that there is none, it is not asked for again so long.
    absl::Duration retry_after = absl::Seconds(1);
  };
  // The bytes of a profile, untrusted. FailedPrecondition: it is not to be had;
  // Unavailable: not now. Ends soon after `stopping` was set.
  using Fetch = std::function<StatusOr<std::string>(
      const ProfileId& id, const std::atomic<bool>& stopping)>;

  Profiles(const Options& options, Clock& clock, Fetch fetch);
  ~Profiles() { Stop(); }
  Profiles(const Profiles&) = delete;
  Profiles& operator=(const Profiles&) = delete;

  // Waits for it if it must. DeadlineExceeded, Cancelled; FailedPrecondition:
  // there is no such profile, or what came is another; Unavailable.
  StatusOr<std::shared_ptr<const Profile>> Get(const ProfileId& id,
                                               absl::Time deadline,
                                               const Cancelled* cancelled)
      ABSL_LOCKS_EXCLUDED(mu_);

  // What is being fetched is given up; nothing is fetched any more.
  void Cancel() { stopping_ = true; }
  void Stop() {
    Cancel();
    fetcher_.Stop();
  }

 private:
  struct Entry {
    bool done = false;
    StatusOr<std::shared_ptr<const Profile>> result = nullptr;
    uint64_t used = 0;     // when, in gets
    absl::Time failed_at;  // where there is no result
  };
  void Run(const ProfileId& id) ABSL_LOCKS_EXCLUDED(mu_);
  void MakeRoom(const ProfileId& newest) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  Clock& clock_;
  const Fetch fetch_;
  std::atomic<bool> stopping_{false};

  absl::Mutex mu_;
  absl::CondVar changed_;
  uint64_t gets_ ABSL_GUARDED_BY(mu_) = 0;
  // Those that wait have the entry, even if it is forgotten meanwhile.
  absl::flat_hash_map<ProfileId, std::shared_ptr<Entry>> entries_
      ABSL_GUARDED_BY(mu_);

  Background fetcher_;  // stops before all else goes
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_PROFILES_H_
