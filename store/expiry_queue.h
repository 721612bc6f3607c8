#ifndef LARDER_STORE_EXPIRY_QUEUE_H_
#define LARDER_STORE_EXPIRY_QUEUE_H_

#include <cstdint>
#include <optional>
#include <queue>
#include <tuple>
#include <vector>

#include "absl/time/time.h"

namespace larder {

// What falls due when. Entries are not taken back: whoever handles one looks
// whether it still means anything. Not thread-safe.
class ExpiryQueue {
 public:
  enum class What : uint8_t {
    kHold,         // id = HoldId
    kReservation,  // id = ReservationId
    kIncomplete,   // id = ChunkIndex
    kWaiters,      // id = ChunkIndex of the promotion
  };
  struct Entry {
    absl::Time when;
    What what{};
    uint64_t id = 0;
  };

  void Add(absl::Time when, What what, uint64_t id) {
    if (when < absl::InfiniteFuture()) queue_.push({when, what, id});
  }

  std::optional<Entry> PopDue(absl::Time now) {
    if (queue_.empty() || queue_.top().when > now) return std::nullopt;
    const Entry entry = queue_.top();
    queue_.pop();
    return entry;
  }

  // InfiniteFuture if nothing waits.
  absl::Time Next() const {
    return queue_.empty() ? absl::InfiniteFuture() : queue_.top().when;
  }

 private:
  struct Later {
    bool operator()(const Entry& a, const Entry& b) const {
      return std::tie(a.when, a.what, a.id) > std::tie(b.when, b.what, b.id);
    }
  };
  std::priority_queue<Entry, std::vector<Entry>, Later> queue_;
};

}  // namespace larder

#endif  // LARDER_STORE_EXPIRY_QUEUE_H_
