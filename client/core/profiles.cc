#include "client/core/profiles.h"

#include <algorithm>
#include <span>
#include <utility>

#include "absl/strings/str_cat.h"

namespace larder::client {
namespace {

// How often a waiting load looks whether it was cancelled.
constexpr absl::Duration kCancelGrain = absl::Milliseconds(5);
// Failures that are remembered.
constexpr size_t kFailuresMax = 256;

}  // namespace

Profiles::Profiles(const Options& options, Clock& clock, Fetch fetch)
    : options_(options), clock_(clock), fetch_(std::move(fetch)) {}

StatusOr<std::shared_ptr<const Profile>> Profiles::Get(
    const ProfileId& id, absl::Time deadline, const Cancelled* cancelled) {
  absl::MutexLock lock(&mu_);
  std::shared_ptr<Entry>& known = entries_[id];
  const bool again = known != nullptr && known->done && !known->result.ok() &&
                     clock_.Now() >= known->failed_at + options_.retry_after;
  if (known == nullptr || again) {
    known = std::make_shared<Entry>();
    if (stopping_ || !fetcher_.Post([this, id] { Run(id); })) {
      entries_.erase(id);
      return absl::UnavailableError("too many profiles are wanted at once");
    }
  }
  const std::shared_ptr<Entry> entry = known;
  entry->used = ++gets_;
  while (!entry->done) {
    if (cancelled != nullptr && *cancelled) {
      return absl::CancelledError("cancelled");
    }
    if (stopping_) return absl::UnavailableError("the client is closing");
    const absl::Duration left = deadline - clock_.Now();
    if (left <= absl::ZeroDuration()) {
      return absl::DeadlineExceededError("deadline");
    }
    changed_.WaitWithTimeout(&mu_, std::min(left, kCancelGrain));
  }
  return entry->result;
}

void Profiles::Run(const ProfileId& id) {
  StatusOr<std::shared_ptr<const Profile>> result =
      absl::UnavailableError("the client is closing");
  if (!stopping_) {
    const StatusOr<std::string> bytes = fetch_(id, stopping_);
    result = bytes.ok()
                 ? Profile::Parse(std::as_bytes(std::span(*bytes)),
                                  Profile::Use::kDecoding)
                 : StatusOr<std::shared_ptr<const Profile>>(bytes.status());
    const bool other = result.ok() && (*result)->id() != id;
    if (bytes.ok() && (!result.ok() || other)) {
      result = absl::FailedPreconditionError(absl::StrCat(
          "needs profile ", ToHex(id), ": what the daemon gave is ",
          other ? "another" : result.status().message()));
    }
  }
  absl::MutexLock lock(&mu_);
  const auto found = entries_.find(id);
  if (found == entries_.end()) return;
  Entry& entry = *found->second;
  entry.result = std::move(result);
  entry.failed_at = clock_.Now();
  entry.done = true;
  // Whether the daemon comes back is asked again at once.
  if (absl::IsUnavailable(entry.result.status())) {
    entries_.erase(found);
  } else {
    MakeRoom(id);
  }
  changed_.SignalAll();
}

void Profiles::MakeRoom(const ProfileId& newest) {
  for (;;) {
    size_t kept = 0, failed = 0;
    uint64_t bytes = 0;
    auto oldest = entries_.end(), oldest_failed = entries_.end();
    for (auto it = entries_.begin(); it != entries_.end(); ++it) {
      const Entry& entry = *it->second;
      if (!entry.done) continue;
      const bool good = entry.result.ok();
      ++(good ? kept : failed);
      if (good) bytes += (*entry.result)->bytes().size();
      if (it->first == newest) continue;
      auto& first = good ? oldest : oldest_failed;
      if (first == entries_.end() || entry.used < first->second->used) {
        first = it;
      }
    }
    if (oldest != entries_.end() &&
        (kept > options_.profiles_max || bytes > options_.bytes_max)) {
      entries_.erase(oldest);
    } else if (oldest_failed != entries_.end() && failed > kFailuresMax) {
      entries_.erase(oldest_failed);
    } else {
      return;
    }
  }
}

}  // namespace larder::client
