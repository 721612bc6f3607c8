#include "store/cluster/directory.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

namespace larder {
namespace {

constexpr int kTicksOfTtl = 256;
constexpr size_t kHeatCells = 256;
constexpr size_t kHotAnchorsMax = 4096;
constexpr uint32_t kShareMin = 4096;
constexpr uint32_t kShares = 8;
// Entries that one call looks at beyond those it is about: so many, or one in
// kPassParts if that is more, so that nothing is passed over until ticks have
// gone round.
constexpr double kPassMin = 4096;
constexpr double kPassParts = 16;
constexpr int kVisitsForRoom = 64;
constexpr uint8_t kHeatMax = 15;

}  // namespace

Directory::Directory(const Clock& clock, const DirectoryOptions& options,
                     uint64_t seed)
    : clock_(clock),
      options_(options),
      seed_(seed),
      start_(clock.Now()),
      passed_(start_),
      cells_(kHeatCells),
      random_(seed | 1) {
  absl::MutexLock lock(&mu_);
  buckets_.Grow(1);
}

void Directory::SetView(std::shared_ptr<const Rendezvous> rendezvous) {
  absl::MutexLock lock(&mu_);
  rendezvous_ = std::move(rendezvous);
  const ClusterView& view = rendezvous_->view();
  alive_.clear();
  for (size_t i = 0; i < lives_.size(); ++i) {
    Life& life = lives_[i];
    const Node* const node = view.Find(life.node);
    life.alive = node != nullptr && node->incarnation == life.incarnation;
    life.draining = life.alive && node->draining;
    if (life.alive) alive_[life.node] = static_cast<uint16_t>(i);
  }
}

StatusOr<std::string> Directory::Handle(NodeId from, std::string_view message) {
  absl::MutexLock lock(&mu_);
  Pass();
  const auto kind = message.empty()
                        ? DirectoryMessageKind{}
                        : static_cast<DirectoryMessageKind>(message[0]);
  if (kind == DirectoryMessageKind::kAnnounce) {
    return HandleAnnounce(from, message);
  }
  if (kind == DirectoryMessageKind::kFind) return HandleFind(message);
  return absl::InvalidArgumentError("not a question to the directory");
}

StatusOr<std::string> Directory::HandleAnnounce(NodeId from,
                                                std::string_view message) {
  const StatusOr<Announce> announce = ParseAnnounce(message);
  if (!announce.ok()) return announce.status();
  Life* const life = FindLife(from, announce->incarnation);
  if (life == nullptr) {
    return absl::FailedPreconditionError("the directory does not know you");
  }
  if (announce->sequence <= life->sequence) {
    return absl::AbortedError("overtaken by a later announcement");
  }
  life->sequence = announce->sequence;
  const auto index = static_cast<uint16_t>(life - lives_.data());
  Announced answer;
  answer.digest = rendezvous_->digest();
  for (const Announce::Section& section : announce->sections) {
    Announced::Section said;
    said.directories = Directories(section.anchor, false);
    Homes homes;
    for (const ChunkRecord& record : section.records) {
      if (record.facts.tier == CopyTier::kGone) {
        Remove(record.key, index);
        said.verdicts.emplace_back();
        continue;
      }
      if (!Store(record, index)) {
        ++stats_.refused;
        said.verdicts.push_back({.refused = true});
        continue;
      }
      if (homes.empty()) homes = rendezvous_->Find(section.anchor, kHomesMax);
      said.verdicts.push_back(Judge(section.anchor, record.key, from, homes));
    }
    answer.sections.push_back(std::move(said));
  }
  return Encode(answer);
}

StatusOr<std::string> Directory::HandleFind(std::string_view message) {
  const StatusOr<FindQuery> find = ParseFind(message);
  if (!find.ok()) return find.status();
  FindAnswer answer;
  for (const FindQuery::Section& section : find->sections) {
    CountAsk(section.anchor);
    FindAnswer::Section said;
    said.directories = Directories(section.anchor, true);
    for (const ChunkKey key : section.keys) {
      said.holders.push_back(Lookup(key));
      stats_.found += said.holders.back().empty() ? 0 : 1;
    }
    stats_.finds += section.keys.size();
    answer.sections.push_back(std::move(said));
  }
  return Encode(answer);
}

Directory::Life* Directory::FindLife(NodeId node, uint64_t incarnation) {
  if (const auto it = alive_.find(node); it != alive_.end()) {
    Life& life = lives_[it->second];
    return life.incarnation == incarnation ? &life : nullptr;
  }
  if (rendezvous_ == nullptr) return nullptr;
  const Node* const member = rendezvous_->view().Find(node);
  if (member == nullptr || member->incarnation != incarnation) return nullptr;
  // Those that were left behind are taken once they are many.
  auto place = lives_.end();
  if (lives_.size() >= 2 * rendezvous_->view().nodes.size()) {
    place = std::find_if(lives_.begin(), lives_.end(), [](const Life& life) {
      return !life.alive && life.entries == 0;
    });
  }
  const auto index = static_cast<size_t>(place - lives_.begin());
  if (place == lives_.end()) {
    if (index > UINT16_MAX) return nullptr;
    lives_.emplace_back();
  }
  lives_[index] = {node, incarnation, 0, 0, true, member->draining};
  alive_[node] = static_cast<uint16_t>(index);
  return &lives_[index];
}

bool Directory::Store(const ChunkRecord& record, uint16_t life) {
  const auto expires = static_cast<uint16_t>(tick_ + kTicksOfTtl);
  uint32_t holders = 0;
  uint32_t* instead = nullptr;  // nobody is told of it any more
  Entry* mine = nullptr;
  for (uint32_t* link = &BucketOf(record.key); *link != 0;) {
    Entry& entry = entries_[*link - 1];
    if (entry.key == record.key) {
      if (entry.life == life) {
        mine = &entry;
        break;
      }
      ++holders;
      if (!Told(entry)) instead = link;
    }
    link = &entry.next;
  }
  if (mine == nullptr) {
    if (holders >= options_.holders_max) {
      if (instead == nullptr) return false;
      Free(*instead);
    }
    const uint64_t nodes =
        std::max<size_t>(1, rendezvous_->view().nodes.size());
    const uint64_t share =
        std::max<uint64_t>(kShareMin, options_.entries_max * kShares / nodes);
    if (lives_[life].entries >= share) return false;
    if (free_ == 0 && entries_.size() >= options_.entries_max) {
      for (int i = 0; i < kVisitsForRoom && free_ == 0; ++i) VisitNext(false);
      if (free_ == 0) return false;
    }
    if (free_ == 0) {
      entries_.Grow(entries_.size() + 1);
      free_ = entries_.size();
    }
    const uint32_t index = free_ - 1;
    mine = &entries_[index];
    free_ = mine->next;
    uint32_t& bucket = BucketOf(record.key);
    mine->next = bucket;
    bucket = index + 1;
    mine->key = record.key;
    mine->life = life;
    mine->heat = 0;
    ++used_;
    ++lives_[life].entries;
    if (buckets_.size() < used_) AddBucket();
  }
  mine->expires = expires;
  mine->groups = record.facts.groups;
  mine->pages = record.facts.pages;
  mine->tokens = record.facts.tokens;
  mine->epoch = record.facts.epoch;
  mine->lineage = record.facts.lineage;
  mine->tier = record.facts.tier;
  mine->copies = record.facts.copies;
  return true;
}

void Directory::Remove(ChunkKey key, uint16_t life) {
  for (uint32_t* link = &BucketOf(key); *link != 0;) {
    Entry& entry = entries_[*link - 1];
    if (entry.key == key && entry.life == life) {
      Free(*link);
      return;
    }
    link = &entry.next;
  }
}

RecordVerdict Directory::Judge(AnchorKey anchor, ChunkKey key, NodeId from,
                               const Homes& homes) {
  RecordVerdict verdict;
  uint32_t holders = 0;
  NodeId best = from;
  uint64_t most = 0;
  for (uint32_t at = BucketOf(key); at != 0; at = entries_[at - 1].next) {
    const Entry& entry = entries_[at - 1];
    if (entry.key != key || !Told(entry)) continue;
    const Life& life = lives_[entry.life];
    verdict.hot |= entry.heat >= options_.hot_finds_log2;
    if (life.draining) continue;
    ++holders;
    for (size_t rank = 0; rank < homes.size(); ++rank) {
      if (homes[rank] == life.node) verdict.held |= 1 << rank;
    }
    const uint64_t weight = Rendezvous::Weight(anchor, life.node);
    if (weight >= most) {
      most = weight;
      best = life.node;
    }
  }
  verdict.holders = static_cast<uint8_t>(std::min<uint32_t>(holders, 255));
  verdict.act = best == from;
  return verdict;
}

std::vector<Holder> Directory::Lookup(ChunkKey key) {
  std::vector<Holder> holders;
  for (uint32_t at = BucketOf(key); at != 0; at = entries_[at - 1].next) {
    Entry& entry = entries_[at - 1];
    if (entry.key != key || !Told(entry)) continue;
    // One of so many finds counts (Morris 1978).
    if (entry.heat < kHeatMax && std::countr_zero(Random()) >= entry.heat) {
      ++entry.heat;
    }
    holders.push_back({lives_[entry.life].node,
                       {entry.groups, entry.pages, entry.tokens, entry.epoch,
                        entry.tier, entry.lineage, entry.copies, 0}});
  }
  if (holders.size() > kHoldersToldMax) {
    // Others each time, so that all of them are asked.
    std::rotate(
        holders.begin(),
        holders.begin() + static_cast<ptrdiff_t>(Random() % holders.size()),
        holders.end());
    holders.resize(kHoldersToldMax);
  }
  return holders;
}

uint64_t Directory::HashOf(ChunkKey key) const {
  uint64_t x = (Raw(key) ^ seed_) * 0x9e3779b97f4a7c15;
  x = (x ^ (x >> 32)) * (seed_ | 1);
  return x ^ (x >> 29);
}

uint32_t& Directory::BucketOf(ChunkKey key) {
  const uint64_t hash = HashOf(key);
  uint32_t bucket = hash & (2 * uint64_t{level_} - 1);
  if (bucket >= buckets_.size()) bucket &= level_ - 1;
  return buckets_[bucket];
}

void Directory::AddBucket() {
  // The bucket at `from` is split in two.
  const uint32_t from = buckets_.size() - level_;
  buckets_.Grow(buckets_.size() + 1);
  uint32_t chain = std::exchange(buckets_[from], 0);
  while (chain != 0) {
    Entry& entry = entries_[chain - 1];
    const uint32_t at = chain;
    chain = entry.next;
    uint32_t& bucket = BucketOf(entry.key);
    entry.next = bucket;
    bucket = at;
  }
  if (buckets_.size() == 2 * level_) level_ *= 2;
}

void Directory::Free(uint32_t& link) {
  const uint32_t at = link;
  Entry& entry = entries_[at - 1];
  link = entry.next;
  --lives_[entry.life].entries;
  --used_;
  entry.tier = CopyTier::kGone;
  entry.next = free_;
  free_ = at;
}

void Directory::Pass() {
  const absl::Time now = clock_.Now();
  const absl::Duration since = now - std::exchange(passed_, now);
  tick_ = static_cast<uint16_t>((now - start_) / (options_.ttl / kTicksOfTtl));
  const double entries = entries_.size();
  if (since > options_.ttl) {  // nothing of before means anything
    while (used_ > 0) VisitNext(true);
    return;
  }
  owed_ = std::min(
      owed_ + absl::FDivDuration(since, options_.ttl / 4) * entries, entries);
  const double visits =
      std::floor(std::min(owed_, std::max(kPassMin, entries / kPassParts)));
  owed_ -= visits;
  for (double i = 0; i < visits; ++i) VisitNext(false);
}

void Directory::VisitNext(bool all) {
  if (entries_.size() == 0) return;
  hand_ = (hand_ + 1) % entries_.size();
  Entry& entry = entries_[hand_];
  if (entry.tier == CopyTier::kGone) return;
  if (entry.heat > 0) --entry.heat;
  if (!all && !Expired(entry)) return;
  uint32_t* link = &BucketOf(entry.key);
  while (*link != hand_ + 1) link = &entries_[*link - 1].next;
  Free(*link);
  ++stats_.expired;
}

void Directory::CountAsk(AnchorKey anchor) {
  const absl::Time now = clock_.Now();
  const auto second = static_cast<uint32_t>((now - start_) / absl::Seconds(1));
  HeatCell& cell = cells_[HashOf(ChunkKey{Raw(anchor)}) % kHeatCells];
  if (cell.second != second) {
    cell.count = 0;
    cell.second = second;
  }
  if (cell.anchor != anchor) {
    if (cell.count > 0) {
      --cell.count;
      return;
    }
    cell.anchor = anchor;
  }
  ++cell.count;
  // Once it is hot, others are asked too: fewer asks keep it so.
  const auto it = hot_.find(anchor);
  if (it != hot_.end() &&
      cell.count > options_.hot_asks_per_second / (2 * kHomesMax)) {
    it->second.last = now;
  } else if (it == hot_.end() && cell.count > options_.hot_asks_per_second) {
    if (hot_.size() >= kHotAnchorsMax) {
      absl::erase_if(hot_, [&](const auto& hot) {
        return now - hot.second.last > 2 * options_.ttl;
      });
    }
    if (hot_.size() < kHotAnchorsMax) hot_[anchor] = {now, now};
  }
}

// Who asks is told of the others only when whoever has a chunk of it was told
// before, and told them.
uint8_t Directory::Directories(AnchorKey anchor, bool asking) const {
  const auto it = hot_.find(anchor);
  if (it == hot_.end()) return 1;
  const absl::Time now = clock_.Now();
  if (now - it->second.last > (asking ? 1 : 2) * options_.ttl) return 1;
  if (asking && now - it->second.since < options_.ttl) return 1;
  return options_.hot_directories;
}

uint64_t Directory::Random() {
  random_ ^= random_ << 13;
  random_ ^= random_ >> 7;
  random_ ^= random_ << 17;
  return random_;
}

Directory::Stats Directory::GetStats() const {
  absl::MutexLock lock(&mu_);
  Stats stats = stats_;
  stats.entries = used_;
  stats.hot_anchors = hot_.size();
  stats.memory_bytes = entries_.MemoryBytes() + buckets_.MemoryBytes() +
                       lives_.capacity() * sizeof(lives_[0]) +
                       alive_.capacity() * (sizeof(*alive_.begin()) + 1) +
                       cells_.capacity() * sizeof(cells_[0]) +
                       hot_.capacity() * (sizeof(*hot_.begin()) + 1);
  return stats;
}

}  // namespace larder
