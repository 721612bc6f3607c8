#ifndef LARDER_STORE_EXPIRY_QUEUE_H_
#define LARDER_STORE_EXPIRY_QUEUE_H_

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "absl/time/time.h"

namespace larder {

// What falls due when. Entries are not taken back one by one: whoever handles
// one looks whether it still means anything, and Prune drops those that do not
// once they are many. Not thread-safe.
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
    if (when == absl::InfiniteFuture()) return;
    heap_.push_back({when, what, id});
    std::push_heap(heap_.begin(), heap_.end(), Later());
  }

  // Whether the queue has doubled since it was last pruned.
  bool WantsPruning() const { return heap_.size() >= prune_at_; }
  // Keeps the entries for which `means(entry)`. O(entries).
  template <class Means>
  void Prune(Means means) {
    std::erase_if(heap_, [&](const Entry& entry) { return !means(entry); });
    std::make_heap(heap_.begin(), heap_.end(), Later());
    prune_at_ = std::max(kPruneFrom, 2 * heap_.size());
  }

  std::optional<Entry> PopDue(absl::Time now) {
    if (Next() > now || heap_.empty()) return std::nullopt;
    std::pop_heap(heap_.begin(), heap_.end(), Later());
    const Entry entry = heap_.back();
    heap_.pop_back();
    return entry;
  }

  // InfiniteFuture if nothing waits.
  absl::Time Next() const {
    return heap_.empty() ? absl::InfiniteFuture() : heap_.front().when;
  }

 private:
  struct Later {
    bool operator()(const Entry& a, const Entry& b) const {
      return std::tie(a.when, a.what, a.id) > std::tie(b.when, b.what, b.id);
    }
  };
  static constexpr size_t kPruneFrom = 1024;

  std::vector<Entry> heap_;
  size_t prune_at_ = kPruneFrom;
};

}  // namespace larder

#endif  // LARDER_STORE_EXPIRY_QUEUE_H_
