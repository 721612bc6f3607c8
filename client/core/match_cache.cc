#include "client/core/match_cache.h"

#include <cstring>
#include <utility>

#include "store/checksum.h"

namespace larder::client {

Checksum MatchCache::KeyOf(const MatchQuery& query) {
  // The ids hashed where they lie, then what else there is.
  struct {
    Checksum ids;
    Sha256Digest root_content;
    uint32_t start;
    uint32_t lineage;
  } all{ComputeChecksum(std::as_bytes(query.ids)), query.root_content,
        query.start, Raw(query.worst_lineage)};
  static_assert(sizeof all == 16 + 32 + 8, "no padding to be hashed");
  return ComputeChecksum(std::as_bytes(std::span(&all, 1)));
}

MatchCache::Entry& MatchCache::Touch(const Checksum& key) {
  const auto [found, is_new] = answers_.try_emplace(key);
  Entry& entry = found->second;
  if (is_new) {
    entry.order = order_.insert(order_.end(), key);
    if (answers_.size() > answers_max_) {
      answers_.erase(order_.front());  // never the new one: it is the last
      order_.pop_front();
    }
  } else {
    order_.splice(order_.end(), order_, entry.order);
  }
  return answers_.find(key)->second;
}

MatchCache::Found MatchCache::Find(const MatchQuery& query, absl::Time now,
                                   absl::Duration age) {
  Found found;
  found.key = KeyOf(query);
  absl::MutexLock lock(&mu_);
  Entry& entry = Touch(found.key);
  const absl::Duration old = now - entry.at;
  if (entry.answer != nullptr && old <= kGrace * age) {
    found.answer = entry.answer;
  }
  if ((found.answer == nullptr || entry.aged || old > age) && !entry.asking) {
    entry.asking = true;
    found.refresh = true;
  }
  return found;
}

void MatchCache::Store(const MatchQuery& query, MatchAnswer answer,
                       absl::Time now) {
  const Checksum key = KeyOf(query);
  auto shared = std::make_shared<const MatchAnswer>(std::move(answer));
  absl::MutexLock lock(&mu_);
  Entry& entry = Touch(key);
  entry.answer = std::move(shared);
  entry.at = now;
  entry.aged = false;
  entry.asking = false;
}

void MatchCache::GiveUp(const Checksum& key) {
  absl::MutexLock lock(&mu_);
  const auto found = answers_.find(key);
  if (found != answers_.end()) found->second.asking = false;
}

bool MatchCache::FindPresence(std::span<const ChunkId> ids, absl::Time now,
                              absl::Duration age,
                              std::span<std::optional<ChunkState>> states) {
  absl::MutexLock lock(&mu_);
  for (size_t i = 0; i < ids.size(); ++i) {
    const auto found = presence_.find(ids[i]);
    states[i].reset();
    bool ask = true;
    if (found != presence_.end()) {
      const absl::Duration old = now - found->second.at;
      if (old <= kGrace * age) states[i] = found->second.state;
      ask = found->second.aged || old > age;
    }
    if (ask && wanted_.size() < presence_max_) wanted_.insert(ids[i]);
  }
  if (wanted_.empty() || fetching_) return false;
  fetching_ = true;
  return true;
}

std::vector<ChunkId> MatchCache::TakeWanted(size_t limit) {
  std::vector<ChunkId> taken;
  absl::MutexLock lock(&mu_);
  while (!wanted_.empty() && taken.size() < limit) {
    taken.push_back(*wanted_.begin());
    wanted_.erase(wanted_.begin());
  }
  if (taken.empty()) fetching_ = false;
  return taken;
}

void MatchCache::StorePresence(std::span<const ChunkId> ids,
                               std::span<const ChunkState> states,
                               absl::Time now) {
  absl::MutexLock lock(&mu_);
  // Refilled within one refresh: not worth an order of its own.
  if (presence_.size() + ids.size() > presence_max_) presence_.clear();
  for (size_t i = 0; i < ids.size(); ++i) {
    presence_[ids[i]] = {states[i], now, false};
  }
}

void MatchCache::FetchEnded() {
  absl::MutexLock lock(&mu_);
  fetching_ = false;
}

void MatchCache::Age() {
  absl::MutexLock lock(&mu_);
  for (auto& [key, entry] : answers_) entry.aged = true;
  for (auto& [id, presence] : presence_) presence.aged = true;
}

void MatchCache::Clear() {
  absl::MutexLock lock(&mu_);
  for (auto& [key, entry] : answers_) entry.answer = nullptr;
  presence_.clear();
}

}  // namespace larder::client
