#include "client/core/staging.h"

namespace larder::client {

std::optional<uint64_t> StagingRing::Allocate(uint64_t bytes) {
  bytes = RoundUp(bytes == 0 ? 1 : bytes, kPageBytes);
  absl::MutexLock lock(&mu_);
  if (bytes > capacity_) return std::nullopt;
  uint64_t offset;
  if (pieces_.empty()) {
    offset = 0;
  } else {
    const uint64_t oldest = pieces_.front().offset;
    if (next_ > oldest) {  // used: [oldest, next_)
      if (capacity_ - next_ >= bytes) {
        offset = next_;
      } else if (oldest >= bytes) {
        offset = 0;
      } else {
        return std::nullopt;
      }
    } else if (oldest - next_ >= bytes) {  // used: [oldest, end), [0, next_)
      offset = next_;
    } else {
      return std::nullopt;
    }
  }
  pieces_.push_back({offset, bytes, false});
  next_ = offset + bytes;
  return offset;
}

void StagingRing::Free(uint64_t offset) {
  absl::MutexLock lock(&mu_);
  for (Piece& piece : pieces_) {
    if (piece.offset == offset && !piece.is_free) {
      piece.is_free = true;
      break;
    }
  }
  while (!pieces_.empty() && pieces_.front().is_free) pieces_.pop_front();
  if (pieces_.empty()) next_ = 0;
  ++frees_;
  freed_.SignalAll();
}

void StagingRing::WaitForFree(uint64_t frees, absl::Duration longest) {
  const absl::Time until = absl::Now() + longest;
  absl::MutexLock lock(&mu_);
  while (frees_ == frees) {
    if (freed_.WaitWithDeadline(&mu_, until)) return;
  }
}

uint64_t StagingRing::frees() const {
  absl::MutexLock lock(&mu_);
  return frees_;
}

}  // namespace larder::client
