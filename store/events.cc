#include "store/events.h"

#include <algorithm>
#include <utility>

namespace larder {

std::string_view ToString(EventType type) {
  switch (type) {
    case EventType::kChunkStored:
      return "chunk stored";
    case EventType::kChunkRemoved:
      return "chunk removed";
    case EventType::kChunkCorrupt:
      return "chunk corrupt";
    case EventType::kSaveRejected:
      return "save rejected";
    case EventType::kHoldExpired:
      return "hold expired";
    case EventType::kEpochAdvanced:
      return "epoch advanced";
    case EventType::kTierDegraded:
      return "tier degraded";
    case EventType::kTierRecovered:
      return "tier recovered";
    case EventType::kClientGone:
      return "client gone";
    case EventType::kSpaceOpened:
      return "space opened";
    case EventType::kNodeJoined:
      return "node joined";
    case EventType::kNodeDraining:
      return "node draining";
    case EventType::kNodeLeft:
      return "node left";
    case EventType::kLinkMade:
      return "link made";
    case EventType::kLinkFailed:
      return "link failed";
    case EventType::kLinkLost:
      return "link lost";
    case EventType::kRegistryLost:
      return "registry lost";
    case EventType::kRegistryBack:
      return "registry back";
    case EventType::kKeyRefused:
      return "key refused";
    case EventType::kJoinRefused:
      return "join refused";
  }
  return "invalid";
}

void EventLog::Publish(Event event) {
  absl::MutexLock lock(&mu_);
  event.sequence = ++last_;
  if (capacity_ == 0) return;
  // Event n stands at place (n - 1) % capacity.
  ring_[(last_ - 1) % capacity_] = std::move(event);
  if (capacity_ > kWithBlocks && last_ > kWithBlocks) {
    ring_[(last_ - 1 - kWithBlocks) % capacity_].blocks.reset();
  }
}

std::vector<Event> EventLog::Read(uint64_t after, size_t limit,
                                  absl::Duration timeout) {
  struct Newer {
    EventLog* log;
    uint64_t after;
    bool operator()() const ABSL_NO_THREAD_SAFETY_ANALYSIS {
      return log->last_ > after;
    }
  } newer{this, after};
  absl::MutexLock lock(&mu_);
  if (timeout > absl::ZeroDuration()) {
    mu_.AwaitWithTimeout(absl::Condition(&newer, &Newer::operator()), timeout);
  }
  std::vector<Event> events;
  const uint64_t oldest = last_ - std::min<uint64_t>(last_, capacity_);
  for (uint64_t n = std::max(after, oldest); n < last_ && events.size() < limit;
       ++n) {
    events.push_back(ring_[n % capacity_]);
  }
  return events;
}

uint64_t EventLog::last_sequence() const {
  absl::MutexLock lock(&mu_);
  return last_;
}

}  // namespace larder
