#ifndef LARDER_TRANSPORT_KV_EVENTS_REPLAY_RING_H_
#define LARDER_TRANSPORT_KV_EVENTS_REPLAY_RING_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>

namespace larder::kv_events {

// The last batches, numbered from 0 without gaps: as many as fit, the newest in
// any case.
class ReplayRing {
 public:
  using Payload = std::shared_ptr<const std::string>;

  ReplayRing(size_t batches_max, uint64_t bytes_max)
      : batches_max_(batches_max), bytes_max_(bytes_max) {}

  // Returns its number.
  uint64_t Add(Payload payload) {
    bytes_ += payload->size();
    batches_.push_back(std::move(payload));
    while (batches_.size() > 1 &&
           (batches_.size() > batches_max_ || bytes_ > bytes_max_)) {
      bytes_ -= batches_.front()->size();
      batches_.pop_front();
      ++oldest_;
    }
    return end() - 1;
  }

  uint64_t oldest() const { return oldest_; }
  uint64_t end() const { return oldest_ + batches_.size(); }
  uint64_t bytes() const { return bytes_; }
  // Of [oldest, end).
  const Payload& at(uint64_t number) const {
    return batches_[static_cast<size_t>(number - oldest_)];
  }

 private:
  const size_t batches_max_;
  const uint64_t bytes_max_;
  std::deque<Payload> batches_;
  uint64_t oldest_ = 0;
  uint64_t bytes_ = 0;
};

}  // namespace larder::kv_events

#endif  // LARDER_TRANSPORT_KV_EVENTS_REPLAY_RING_H_
