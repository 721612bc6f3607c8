#ifndef LARDER_CLIENT_CORE_CLIENT_H_
#define LARDER_CLIENT_CORE_CLIENT_H_

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "client/core/background.h"
#include "client/core/jobs.h"
#include "client/core/link.h"
#include "client/core/profiles.h"
#include "codec/codec.h"
#include "store/clock.h"
#include "store/status.h"
#include "store/units.h"

namespace larder::client {

struct ClientOptions {
  std::string socket_path = "/run/larder/larderd.sock";
  std::string token;
  std::string name;
  absl::Duration default_deadline = absl::Seconds(1);
  uint64_t staging_bytes = 256_MiB;
  uint32_t worker_threads = 1;
  absl::Duration cached_age = absl::Milliseconds(50);
  uint64_t ahead_bytes = 256_MiB;
  uint32_t queued_jobs_max = 4096;
  CodecLookup codecs = FindCodec;  // that what is loaded may be coded by
  Profiles::Options profiles;

  // After a failed connect the next one waits so long, twice as long each time;
  // calls meanwhile fail at once.
  absl::Duration first_pause = absl::Milliseconds(20);
  absl::Duration longest_pause = absl::Seconds(1);
};

// What this client did. Relaxed counters.
struct Counters {
  std::atomic<uint64_t> loaded_bytes{0};
  std::atomic<uint64_t> saved_bytes{0};
  std::atomic<uint64_t> missed_chunks{0};
  std::atomic<uint64_t> corrupt_chunks{0};
  std::atomic<uint64_t> reconnects{0};
};

// A connection to the daemon that mends itself: one Link after the other.
// Thread-safe; must outlive what was opened from it.
class Client {
 public:
  // Unavailable, PermissionDenied, FailedPrecondition (versions do not fit).
  static StatusOr<std::unique_ptr<Client>> Open(ClientOptions options,
                                                absl::Time deadline);
  ~Client();
  Client(const Client&) = delete;
  Client& operator=(const Client&) = delete;

  const ClientOptions& options() const { return options_; }
  Clock& clock() { return Clock::Real(); }
  Jobs& jobs() { return jobs_; }
  Background& background() { return background_; }
  Counters& counters() { return counters_; }
  Profiles& profiles() { return profiles_; }
  // Bytes per second that the last streaming load got; 0 before any.
  double goodput() const { return goodput_; }
  void set_goodput(double bytes_per_second) { goodput_ = bytes_per_second; }

  // The link, connected anew if it broke. Unavailable at once while a pause
  // after a failed attempt lasts.
  StatusOr<std::shared_ptr<Link>> GetLink(absl::Time deadline)
      ABSL_LOCKS_EXCLUDED(mu_);
  // The link if it works, else null; never connects.
  std::shared_ptr<Link> PeekLink() const ABSL_LOCKS_EXCLUDED(mu_);

  // What was left for the next message (Link::ReleaseHold) goes out by itself
  // if none comes within some milliseconds. Cheap when called often.
  void FlushSoon();

  Status Ping(absl::Time deadline);
  StatusOr<wire::StatsReply> Stats(absl::Time deadline);

 private:
  explicit Client(ClientOptions options);
  LocalChannel::Options ChannelOptions(absl::Time deadline) const;
  StatusOr<std::string> FetchProfile(const ProfileId& id,
                                     const std::atomic<bool>& stopping);

  const ClientOptions options_;
  Counters counters_;
  std::atomic<double> goodput_{0};

  mutable absl::Mutex mu_;
  absl::CondVar connected_;
  std::shared_ptr<Link> link_ ABSL_GUARDED_BY(mu_);
  bool connecting_ ABSL_GUARDED_BY(mu_) = false;
  absl::Time not_before_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Duration pause_ ABSL_GUARDED_BY(mu_);
  Status last_failure_ ABSL_GUARDED_BY(mu_);

  std::atomic<bool> flush_posted_{false};
  Background background_;
  Profiles profiles_;
  Jobs jobs_;
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_CLIENT_H_
