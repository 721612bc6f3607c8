#ifndef LARDER_STORE_RESERVATION_TABLE_H_
#define LARDER_STORE_RESERVATION_TABLE_H_

#include <cstdint>
#include <map>
#include <optional>
#include <utility>

#include "absl/time/time.h"

#include "store/space_table.h"
#include "store/tier.h"
#include "store/types.h"

namespace larder {

// Memory that a client may fill by one commit.
struct Reservation {
  ClientId client{};
  TenantId tenant{};
  SpaceRef space{};
  Epoch epoch{};  // when it was made: a commit after the next one is refused
  Extent extent;
  uint64_t charged = 0;  // to the client, while it lasts
  absl::Time expires;
  // What the client said it would commit, if it knew.
  std::optional<ChunkId> id;
  GroupIndex group{};
  PartShape shape;
  Lineage lineage = Lineage::kExact;
};

// Not thread-safe.
class ReservationTable {
 public:
  ReservationId Insert(Reservation reservation) {
    const auto id = ReservationId{++last_};
    reservations_.emplace(id, std::move(reservation));
    return id;
  }
  Reservation* Find(ReservationId id) {
    const auto it = reservations_.find(id);
    return it == reservations_.end() ? nullptr : &it->second;
  }
  // REQUIRES: it is there.
  Reservation Take(ReservationId id) {
    return std::move(reservations_.extract(id).mapped());
  }
  size_t size() const { return reservations_.size(); }

 private:
  uint64_t last_ = 0;
  std::map<ReservationId, Reservation> reservations_;
};

}  // namespace larder

#endif  // LARDER_STORE_RESERVATION_TABLE_H_
