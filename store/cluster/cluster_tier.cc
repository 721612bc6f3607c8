#include "store/cluster/cluster_tier.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <map>
#include <optional>

#include "store/cluster/peer_messages.h"
#include "store/cluster/record_read.h"

namespace larder {

// A Locate, from the directories' answers to the last holder's.
struct ClusterTier::Locating {
  TenantId tenant{};
  SpaceId space;
  Epoch epoch{};
  std::vector<ChunkId> ids;
  uint32_t start = 0;
  absl::Time deadline;
  std::atomic<size_t> questions = 1;  // without an answer
  std::atomic<bool> ended = false;
  Task done;

  // All is known that will be, or it is too late. Once.
  void End() {
    if (!ended.exchange(true)) std::move(done)();
  }
  void EndQuestion() {
    if (--questions == 0) End();
  }
};

struct ClusterTier::Reading {
  Taken taken;
  uint64_t offset = 0;
  MutableByteSpan into;  // as much of it as the record has
  absl::Time deadline;
  Done done;
};

ClusterTier::ClusterTier(Parts parts, const ClusterTierOptions& options)
    : parts_(std::move(parts)), options_(options) {}

ClusterTier::~ClusterTier() {
  lifeline_->Cut();
}

StatusOr<Extent> ClusterTier::Allocate(TenantId, uint64_t) {
  return absl::ResourceExhaustedError("other nodes store for themselves");
}

void ClusterTier::Write(Extent, const RecordMeta&, ByteSpan, Done done) {
  std::move(done)(absl::UnimplementedError("other nodes store for themselves"));
}

// ---- What is known

const ClusterTier::Known* ClusterTier::Look(const Key& key, Epoch epoch) {
  for (const auto* map : {&young_, &old_}) {
    const auto it = map->find(key);
    if (it == map->end()) continue;
    const Known& known = it->second;
    return known.epoch == epoch && known.until > parts_.clock->Now() ? &known
                                                                     : nullptr;
  }
  return nullptr;
}

void ClusterTier::Remember(const Key& key, Known known) {
  const size_t half = std::max<size_t>(options_.records_max / 2, 1);
  if (young_records_ >= half) {
    old_ = std::exchange(young_, {});
    old_records_ = std::exchange(young_records_, 0);
  }
  young_records_ += known.parts.size();
  young_.insert_or_assign(key, std::move(known));
}

void ClusterTier::ForgetChunk(const Taken& taken) {
  parts_.locator->Forget(taken.key, taken.node);
  const Key key{taken.meta.tenant, taken.meta.space, taken.meta.chunk};
  absl::MutexLock lock(&mu_);
  for (auto* map : {&young_, &old_}) {
    const auto it = map->find(key);
    if (it != map->end() && it->second.node == taken.node) map->erase(it);
  }
}

void ClusterTier::Find(TenantId tenant, const SpaceId& space, Epoch epoch,
                       std::span<const ChunkId> ids, std::span<Chunk> out) {
  absl::MutexLock lock(&mu_);
  for (size_t i = 0; i < ids.size(); ++i) {
    const Known* known = Look({tenant, space, ids[i]}, epoch);
    out[i] = known != nullptr ? known->chunk : Chunk{};
  }
}

std::vector<PeerTier::Part> ClusterTier::Take(TenantId tenant,
                                              const SpaceId& space, Epoch epoch,
                                              const ChunkId& chunk) {
  absl::MutexLock lock(&mu_);
  std::vector<Part> parts;
  const Known* known = Look({tenant, space, chunk}, epoch);
  if (known == nullptr) return parts;
  for (const RecordMeta& meta : known->parts) {
    const uint64_t handle = ++last_handle_;
    taken_[handle] = {known->node, known->key, meta};
    parts.push_back({meta, {handle, RoundUp(meta.record_bytes, kPageBytes)}});
  }
  return parts;
}

void ClusterTier::Free(Extent extent) {
  absl::MutexLock lock(&mu_);
  taken_.erase(extent.handle);
}

// ---- Finding out

void ClusterTier::Locate(TenantId tenant, const SpaceId& space, Epoch epoch,
                         std::vector<ChunkId> ids, uint32_t start,
                         absl::Time deadline, Task done) {
  if (!parts_.policies->AllowsSelf(tenant)) {
    return std::move(done)();
  }
  auto locating = std::make_shared<Locating>();
  locating->tenant = tenant;
  locating->space = space;
  locating->epoch = epoch;
  locating->ids = std::move(ids);
  locating->start =
      std::min(start, static_cast<uint32_t>(locating->ids.size()));
  locating->deadline = deadline;
  locating->done = std::move(done);
  {
    absl::MutexLock lock(&mu_);
    ++stats_.locates;
  }
  // Of the time there is, some is left for the holders.
  const absl::Time now = parts_.clock->Now();
  parts_.locator->Locate(
      ScopeOf(tenant, space), locating->ids, locating->start,
      std::min(deadline, now + options_.call_timeout),
      Lifeline::Guard<std::vector<Location>>(
          lifeline_,
          Locator::Done([this, locating](std::vector<Location> locations) {
            OnLocated(locating, locations);
          })));
  if (deadline == absl::InfiniteFuture()) return;
  parts_.executor->PostAt(deadline, [locating] { locating->End(); });
}

void ClusterTier::OnLocated(const std::shared_ptr<Locating>& locating,
                            const std::vector<Location>& locations) {
  // The holder that has the best of it, from memory if it can be; among those
  // that are alike, as many different ones as possible share a prompt.
  std::map<NodeId, std::vector<uint32_t>> wanted;
  {
    absl::MutexLock lock(&mu_);
    for (uint32_t i = 0; i < locations.size(); ++i) {
      const uint32_t place = locating->start + i;
      if (Look({locating->tenant, locating->space, locating->ids[place]},
               locating->epoch) != nullptr) {
        continue;
      }
      const Holder* best = nullptr;
      size_t best_load = 0;
      for (const Holder& holder : locations[i].holders) {
        if (holder.facts.epoch != static_cast<uint32_t>(Raw(locating->epoch)) ||
            !parts_.policies->Allows(locating->tenant, holder.node)) {
          continue;
        }
        const auto it = wanted.find(holder.node);
        const size_t load = it == wanted.end() ? 0 : it->second.size();
        const auto rank = [](const Holder& h, size_t l) {
          return std::make_tuple(
              h.facts.lineage, -std::popcount(h.facts.groups), h.facts.tier, l);
        };
        if (best == nullptr || rank(holder, load) < rank(*best, best_load)) {
          best = &holder;
          best_load = load;
        }
      }
      if (best != nullptr) wanted[best->node].push_back(place);
    }
  }
  for (auto& [node, places] : wanted) {
    for (size_t at = 0; at < places.size(); at += kRecordsIdsMax) {
      const size_t end = std::min(places.size(), at + kRecordsIdsMax);
      AskRecords(locating, node, {places.begin() + at, places.begin() + end});
    }
  }
  locating->EndQuestion();
}

void ClusterTier::AskRecords(const std::shared_ptr<Locating>& locating,
                             NodeId node, std::vector<uint32_t> places) {
  RecordsQuery query;
  query.tenant = locating->tenant;
  query.space = locating->space;
  for (const uint32_t place : places) query.ids.push_back(locating->ids[place]);
  ++locating->questions;
  {
    absl::MutexLock lock(&mu_);
    ++stats_.record_questions;
  }
  const absl::Time until =
      std::min(locating->deadline, parts_.clock->Now() + options_.call_timeout);
  std::string message = Encode(query);
  auto replied = Lifeline::Guard<StatusOr<std::string>>(
      lifeline_,
      PeerCalls::Replied([this, locating, node, places = std::move(places)](
                             StatusOr<std::string> answer) {
        OnRecords(locating, node, places, answer);
      }));
  const Status sealed =
      parts_.policies->Seal(locating->tenant, node, message, replied);
  if (!sealed.ok()) return std::move(replied)(sealed);
  parts_.links->Call(node, std::move(message), until, std::move(replied));
}

void ClusterTier::OnRecords(const std::shared_ptr<Locating>& locating,
                            NodeId node, const std::vector<uint32_t>& places,
                            const StatusOr<std::string>& answer) {
  StatusOr<RecordsAnswer> said =
      answer.ok() ? ParseRecordsAnswer(*answer) : answer.status();
  if (absl::IsNotFound(answer.status())) {
    said = RecordsAnswer{};  // not for this node
    said->chunks.resize(places.size());
  }
  if (said.ok()) {
    const size_t told = std::min(said->chunks.size(), places.size());
    const Scope scope = ScopeOf(locating->tenant, locating->space);
    for (size_t i = 0; i < told; ++i) {
      const ChunkId& id = locating->ids[places[i]];
      Engine::StoredRecords& records = said->chunks[i];
      Known known;
      known.node = node;
      known.key = ComputeChunkKey(scope, id);
      if (records.parts.empty()) {
        parts_.locator->Forget(known.key, node);
        continue;
      }
      if (records.parts[0].epoch != locating->epoch) continue;
      known.until = parts_.clock->Now() + options_.known_for;
      known.epoch = locating->epoch;
      known.chunk.groups = records.groups;
      for (const RecordMeta& meta : records.parts) {
        known.chunk.lineage = std::max(known.chunk.lineage, meta.lineage);
        known.chunk.token_count = meta.token_count;
        known.chunk.is_tail = meta.is_tail;
        known.chunk.bytes += meta.record_bytes;
      }
      known.parts = std::move(records.parts);
      absl::MutexLock lock(&mu_);
      Remember({locating->tenant, locating->space, id}, std::move(known));
    }
    // What did not fit is asked for again, unless nothing did.
    if (told > 0 && told < places.size()) {
      AskRecords(locating, node, {places.begin() + told, places.end()});
    }
  }
  locating->EndQuestion();
}

// ---- Reading

void ClusterTier::Read(Extent extent, uint64_t offset, MutableByteSpan into,
                       Done done) {
  auto reading = std::make_shared<Reading>();
  reading->done = std::move(done);
  reading->offset = offset;
  {
    absl::MutexLock lock(&mu_);
    ++stats_.reads;
    const auto it = taken_.find(extent.handle);
    if (it != taken_.end()) reading->taken = it->second;
  }
  const uint64_t all = reading->taken.meta.record_bytes;
  if (offset >= all) {
    std::move(reading->done)(absl::UnavailableError("nothing is there"));
    return;
  }
  // Behind the record is nothing that anybody reads; but what was there before
  // is nobody's business.
  const uint64_t bytes = std::min<uint64_t>(into.size(), all - offset);
  std::memset(into.data() + bytes, 0, into.size() - bytes);
  reading->into = into.first(bytes);
  reading->deadline = parts_.clock->Now() + options_.read_timeout;
  parts_.links->Get(reading->taken.node, reading->deadline,
                    [this, reading, lifeline = lifeline_](
                        StatusOr<std::shared_ptr<Link>> link) mutable {
                      Begin(reading, std::move(link));
                    });
}

void ClusterTier::Begin(const std::shared_ptr<Reading>& reading,
                        StatusOr<std::shared_ptr<Link>> link) {
  if (!link.ok()) return End(reading, link.status());
  ReadQuery query = ReadOf(reading->taken.meta);
  query.offset = reading->offset;
  ReadRecord(
      *link, reading->taken.node, *parts_.policies, std::move(query),
      reading->into, reading->deadline, *parts_.executor,
      parts_.links->MeterOf(reading->taken.node),
      [this, reading](Status status) { End(reading, std::move(status)); });
}

void ClusterTier::End(const std::shared_ptr<Reading>& reading, Status status) {
  if (!status.ok()) ForgetChunk(reading->taken);
  {
    absl::MutexLock lock(&mu_);
    if (status.ok()) {
      stats_.read_bytes += reading->into.size();
    } else {
      ++stats_.failed_reads;
    }
  }
  if (!status.ok()) {
    const std::string why =
        absl::StrCat("fetching from another node: ", status.message());
    // Of what is lost the engine tells people.
    status = absl::IsDataLoss(status) ? absl::DataLossError(why)
                                      : absl::UnavailableError(why);
  }
  std::move(reading->done)(std::move(status));
}

ClusterTier::Stats ClusterTier::GetStats() const {
  absl::MutexLock lock(&mu_);
  Stats stats = stats_;
  stats.remembered_records = young_records_ + old_records_;
  return stats;
}

}  // namespace larder
