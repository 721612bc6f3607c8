#include "client/core/staging.h"

#include <algorithm>
#include <iterator>

namespace larder::client {

StagingPool::StagingPool(uint64_t bytes)
    : capacity_(bytes & ~(kPageBytes - 1)) {
  if (capacity_ != 0) gaps_.emplace(0, capacity_);
}

std::optional<uint64_t> StagingPool::Allocate(uint64_t bytes) {
  bytes = RoundUp(bytes == 0 ? 1 : bytes, kPageBytes);
  absl::MutexLock lock(&mu_);
  const auto gap =
      std::find_if(gaps_.begin(), gaps_.end(),
                   [bytes](const auto& one) { return one.second >= bytes; });
  if (gap == gaps_.end()) return std::nullopt;
  const auto [offset, size] = *gap;
  gaps_.erase(gap);
  if (size > bytes) gaps_.emplace(offset + bytes, size - bytes);
  live_.emplace(offset, bytes);
  return offset;
}

void StagingPool::Free(uint64_t offset) {
  absl::MutexLock lock(&mu_);
  const auto live = live_.find(offset);
  if (live == live_.end()) return;
  uint64_t end = offset + live->second;
  live_.erase(live);
  auto after = gaps_.lower_bound(offset);
  if (after != gaps_.end() && after->first == end) {
    end += after->second;
    after = gaps_.erase(after);
  }
  if (after != gaps_.begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second == offset) {
      offset = before->first;
      gaps_.erase(before);
    }
  }
  gaps_.emplace(offset, end - offset);
  ++frees_;
  freed_.SignalAll();
}

void StagingPool::WaitForFree(uint64_t frees, absl::Duration longest) {
  const absl::Time until = absl::Now() + longest;
  absl::MutexLock lock(&mu_);
  while (frees_ == frees) {
    if (freed_.WaitWithDeadline(&mu_, until)) return;
  }
}

uint64_t StagingPool::frees() const {
  absl::MutexLock lock(&mu_);
  return frees_;
}

}  // namespace larder::client
