#include "store/cluster/replication.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "store/units.h"

namespace larder {

Replication::Replication(Parts parts, const ReplicationOptions& options)
    : parts_(parts), options_(options), free_at_(parts_.clock->Now()) {
  parts_.announcer->SetOnTold(
      [this](std::span<const Announcer::Told> told) { Told(told); });
}

Replication::~Replication() {
  parts_.announcer->SetOnTold(nullptr);
  lifeline_->Cut();
}

void Replication::SetDraining(bool draining) {
  absl::MutexLock lock(&mu_);
  draining_ = draining;
  if (!draining) refused_.clear();
}

uint32_t Replication::Wanted(const Announcer::Told& chunk) {
  const RecordVerdict& verdict = chunk.verdict;
  size_t copies = chunk.facts.copies;
  if (verdict.hot) copies = std::max<size_t>(copies, options_.hot_copies);
  const bool last = draining_ && verdict.holders == 0;
  if (last) copies = std::max<size_t>(copies, 1);
  std::vector<size_t> ranks;
  for (size_t rank = 0; rank < chunk.homes.size(); ++rank) {
    const NodeId home = chunk.homes[rank];
    if (last && home == parts_.self) continue;
    if (parts_.replicator->MayHave(chunk.chunk, home)) ranks.push_back(rank);
  }
  const auto refused = last ? refused_.find(chunk.chunk) : refused_.end();
  if (last && ranks.empty()) refused_[chunk.chunk].given_up = true;
  if (refused != refused_.end() && !ranks.empty()) {
    auto& [by, rounds, given_up] = refused->second;
    const auto asked = [&by = by, &chunk](size_t rank) {
      return std::find(by.begin(), by.end(), chunk.homes[rank]) != by.end();
    };
    if (std::all_of(ranks.begin(), ranks.end(), asked)) {
      given_up = given_up || ++rounds >= options_.drain_rounds;
      by.clear();
    }
    if (given_up) return 0;
    // Who has not refused it yet comes first.
    std::stable_partition(ranks.begin(), ranks.end(),
                          [&](size_t rank) { return !asked(rank); });
  }
  uint32_t wanted = 0;
  for (size_t i = 0; i < std::min(copies, ranks.size()); ++i) {
    wanted |= 1u << ranks[i];
  }
  return wanted;
}

void Replication::Told(std::span<const Announcer::Told> told) {
  absl::MutexLock lock(&mu_);
  const absl::Time now = parts_.clock->Now();
  for (const Announcer::Told& chunk : told) {
    if (copying_.contains(chunk.chunk)) continue;
    const RecordVerdict& verdict = chunk.verdict;
    const uint32_t wanted = verdict.act ? Wanted(chunk) : 0;
    if ((wanted & ~verdict.held) == 0) {
      missing_.erase(chunk.chunk);
      continue;
    }
    if (missing_.size() + copying_.size() >= options_.waiting_max &&
        !missing_.contains(chunk.chunk)) {
      ++stats_.overflows;
      continue;
    }
    const absl::Time due = now + options_.settle;
    const auto [it, fresh] =
        missing_.try_emplace(chunk.chunk, Missing{due, due});
    if (fresh) confirm_.emplace_back(due, chunk.chunk);
    if (now < it->second.due) continue;
    missing_.erase(it);
    for (size_t rank = 0; rank < chunk.homes.size(); ++rank) {
      if (((wanted & ~verdict.held) >> rank & 1) == 0 ||
          chunk.homes[rank] == parts_.self) {
        continue;
      }
      ++copying_[chunk.chunk];
      const double bytes =
          std::max<uint64_t>(1, chunk.facts.pages) * double{kPageBytes};
      (verdict.holders <= 1 ? urgent_ : normal_)
          .push_back({chunk.chunk, chunk.homes[rank], bytes});
    }
  }
  if (!confirm_.empty()) WakeAt(confirm_.front().first);
  if (!urgent_.empty() || !normal_.empty()) WakeAt(std::max(now, free_at_));
}

void Replication::WakeAt(absl::Time when) {
  if (when >= wake_at_) return;
  wake_at_ = when;
  parts_.executor->PostAt(
      when, Lifeline::Guard<>(lifeline_, Task([this] { Pump(); })));
}

void Replication::Pump() {
  std::vector<ChunkKey> confirm;
  std::vector<Copy> copies;
  {
    absl::MutexLock lock(&mu_);
    const absl::Time now = parts_.clock->Now();
    if (now < wake_at_) return;  // another will come
    wake_at_ = absl::InfiniteFuture();
    while (!confirm_.empty() && confirm_.front().first <= now) {
      const auto [when, chunk] = confirm_.front();
      confirm_.pop_front();
      const auto it = missing_.find(chunk);
      if (it == missing_.end() || it->second.confirm != when) continue;
      confirm.push_back(chunk);
      // In case that no answer comes.
      it->second.confirm = now + options_.settle;
      confirm_.emplace_back(it->second.confirm, chunk);
    }
    while (under_way_ < options_.copies_max && free_at_ <= now &&
           (!urgent_.empty() || !normal_.empty())) {
      std::deque<Copy>& queue = urgent_.empty() ? normal_ : urgent_;
      copies.push_back(queue.front());
      queue.pop_front();
      ++under_way_;
      free_at_ = std::max(free_at_, now) +
                 absl::Seconds(copies.back().bytes / options_.bytes_per_second);
    }
    if (!confirm_.empty()) WakeAt(confirm_.front().first);
    if (under_way_ < options_.copies_max &&
        (!urgent_.empty() || !normal_.empty())) {
      WakeAt(free_at_);
    }
  }
  for (const ChunkKey chunk : confirm) {
    if (parts_.announcer->Confirm(chunk)) continue;
    absl::MutexLock lock(&mu_);
    missing_.erase(chunk);
  }
  for (const Copy& copy : copies) {
    parts_.replicator->Copy(
        copy.chunk, copy.to,
        Lifeline::Guard<Status>(
            lifeline_, Replicator::Done([this, copy](const Status& status) {
              OnCopied(copy, status);
            })));
  }
}

void Replication::OnCopied(const Copy& copy, const Status& status) {
  absl::MutexLock lock(&mu_);
  --under_way_;
  const auto it = copying_.find(copy.chunk);
  if (--it->second == 0) copying_.erase(it);
  if (status.ok()) {
    refused_.erase(copy.chunk);
    ++stats_.copied;
    stats_.copied_bytes += static_cast<uint64_t>(copy.bytes);
  } else {
    ++(absl::IsAlreadyExists(status) ? stats_.needless : stats_.failed);
    // Nothing, or not all of it, was sent.
    free_at_ -= absl::Seconds(copy.bytes / options_.bytes_per_second);
  }
  if (draining_ && !status.ok() && !absl::IsAlreadyExists(status)) {
    // This node may be gone before the next announcement.
    refused_[copy.chunk].by.push_back(copy.to);
    const absl::Time due = parts_.clock->Now() + options_.settle;
    if (missing_.try_emplace(copy.chunk, Missing{due, due}).second) {
      confirm_.emplace_back(due, copy.chunk);
      WakeAt(confirm_.front().first);
    }
  }
  if (!urgent_.empty() || !normal_.empty()) {
    WakeAt(std::max(parts_.clock->Now(), free_at_));
  }
}

Replication::Stats Replication::GetStats() const {
  absl::MutexLock lock(&mu_);
  Stats stats = stats_;
  stats.waiting = missing_.size() + urgent_.size() + normal_.size();
  stats.under_way = under_way_;
  for (const auto& [chunk, refused] : refused_) {
    stats.given_up += refused.given_up;
  }
  return stats;
}

bool Replication::Quiet() const {
  absl::MutexLock lock(&mu_);
  return missing_.empty() && copying_.empty();
}

}  // namespace larder
