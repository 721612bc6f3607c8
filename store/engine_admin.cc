#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <set>
#include <tuple>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"

#include "store/engine_impl.h"

namespace larder {
namespace {

struct FreeDeleter {
  void operator()(std::byte* memory) const { std::free(memory); }
};

}  // namespace

ChunkSummary EngineImpl::Summary(ChunkIndex index,
                                 const CopyProfiles* profiles) const {
  const ChunkEntry& chunk = chunks_[index];
  const Space& space = spaces_[chunk.space];
  ChunkSummary summary;
  summary.tenant = space.tenant;
  summary.space = space.id;
  summary.id = chunk.id;
  summary.parent = chunk.parent;
  summary.token_begin = chunk.token_begin;
  summary.token_count = chunk.token_count;
  summary.is_tail = chunk.is_tail;
  summary.complete = chunk.visible != 0 && !chunk.incomplete;
  summary.pinned = chunk.pinned;
  summary.lineage = chunk.lineage;
  summary.holds = chunk.holds;
  summary.bytes = chunk.bytes;
  summary.parts = chunk.part_count;
  const GroupDescriptor* group = nullptr;
  const auto add = [&](TierKind tier, const PartEntry& part,
                       const CopyFacts& facts) {
    CopySummary wanted{
        .tier = tier, .codec = facts.codec, .lineage = facts.lineage};
    if (facts.codec == CodecId::kRaw) {
      wanted.profile = ProfileId{};
    } else if (profiles != nullptr) {
      const auto found = profiles->find({part.version, tier});
      if (found != profiles->end()) wanted.profile = found->second;
    }
    auto copy = std::find_if(summary.copies.begin(), summary.copies.end(),
                             [&](const CopySummary& one) {
                               return one.tier == tier &&
                                      one.codec == wanted.codec &&
                                      one.lineage == wanted.lineage &&
                                      one.profile == wanted.profile;
                             });
    if (copy == summary.copies.end()) {
      copy = summary.copies.insert(copy, wanted);
    }
    ++copy->parts;
    copy->bytes += facts.record_bytes;
    const auto plain = LayoutRecord(*group, part.shape, chunk.token_count);
    copy->plain_bytes += plain.ok() ? plain->record_bytes : 0;
  };
  for (const PartEntry& part : chunks_.Parts(index)) {
    group = &space.descriptor->groups[Raw(part.group)];
    for (const Level level : kOwnLevels) {
      if ((part.copies() & Bit(level)) == 0) continue;
      add(KindOf(level), part, chunks_.Facts(index, part, level));
    }
  }
  std::stable_sort(summary.copies.begin(), summary.copies.end(),
                   [](const CopySummary& a, const CopySummary& b) {
                     return a.tier < b.tier;
                   });
  for (const Level level : kOwnLevels) {
    if (chunk.Readable(level)) summary.tiers.push_back(KindOf(level));
  }
  std::sort(summary.tiers.begin(), summary.tiers.end());
  summary.idle = Now() - absl::FromUnixNanos(chunk.used_ns);
  return summary;
}

std::vector<ChunkIndex> EngineImpl::FindEverywhere(
    std::optional<TenantId> tenant, const ChunkId& id) const {
  std::vector<ChunkIndex> found;
  for (uint32_t i = 0; i < spaces_.size(); ++i) {
    const Space& space = spaces_[SpaceRef{i}];
    if (tenant.has_value() && space.tenant != *tenant) continue;
    const ChunkIndex index = chunks_.Find(SpaceRef{i}, id);
    if (index != kNoChunk && chunks_[index].epoch == space.epoch &&
        !chunks_[index].at_peer) {
      found.push_back(index);
    }
  }
  return found;
}

// In the order of ids. The lock is taken for a piece of the table at a time.
std::vector<ChunkSummary> EngineImpl::List(std::optional<TenantId> tenant,
                                           const std::optional<SpaceId>& space,
                                           const std::optional<ChunkId>& after,
                                           size_t limit) const {
  constexpr uint32_t kPiece = 4096;
  using Place = std::tuple<ChunkId, SpaceRef>;
  std::set<Place> places;
  if (limit == 0) return {};
  for (uint32_t from = 0, end = kPiece; from < end; from = end) {
    absl::MutexLock lock(&mu_);
    end = std::min(chunks_.slots(), from + kPiece);
    for (uint32_t i = from; i < end; ++i) {
      const ChunkEntry& chunk = chunks_[ChunkIndex{i}];
      if (!chunk.live || chunk.at_peer ||
          (after.has_value() && chunk.id <= *after)) {
        continue;
      }
      const Space& its = spaces_[chunk.space];
      if (chunk.epoch != its.epoch ||
          (tenant.has_value() && its.tenant != *tenant) ||
          (space.has_value() && its.id != *space)) {
        continue;
      }
      places.emplace(chunk.id, chunk.space);
      // Equal ids stay together: the next page begins after an id.
      while (places.size() > limit &&
             std::get<0>(*places.rbegin()) !=
                 std::get<0>(*std::next(places.begin(), limit - 1))) {
        places.erase(std::prev(places.end()));
      }
    }
  }
  absl::MutexLock lock(&mu_);
  std::vector<ChunkSummary> summaries;
  for (const auto& [id, ref] : places) {
    const ChunkIndex index = chunks_.Find(ref, id);
    if (index != kNoChunk) summaries.push_back(Summary(index));
  }
  return summaries;
}

StatusOr<ChunkSummary> EngineImpl::Stat(std::optional<TenantId> tenant,
                                        const ChunkId& id) const {
  absl::MutexLock lock(&mu_);
  const std::vector<ChunkIndex> found = FindEverywhere(tenant, id);
  if (found.empty()) return absl::NotFoundError("no such chunk");
  return Summary(found.front());
}

// What the first bytes of a chunk's coded records say. The chunk is kept busy.
struct EngineImpl::Inspection {
  struct Copy {
    uint32_t version = 0;
    Level level{};
    Extent extent;
    CopyFacts facts;
    std::unique_ptr<std::byte, FreeDeleter> read;  // of a tier below DRAM
    ByteSpan front;                                // empty: not to be had
  };
  ChunkIndex chunk = kNoChunk;
  std::vector<Copy> copies;
  std::atomic<size_t> reads_left = 0;
  absl::AnyInvocable<void(StatusOr<ChunkSummary>) &&> done;
};

void EngineImpl::Inspect(
    std::optional<TenantId> tenant, const ChunkId& id,
    absl::AnyInvocable<void(StatusOr<ChunkSummary>) &&> done) {
  auto inspection = std::make_shared<Inspection>();
  {
    absl::MutexLock lock(&mu_);
    const std::vector<ChunkIndex> found = FindEverywhere(tenant, id);
    if (!found.empty()) {
      inspection->chunk = found.front();
      ++chunks_[inspection->chunk].busy;
      for (const PartEntry& part : chunks_.Parts(inspection->chunk)) {
        for (const Level level : kOwnLevels) {
          const Extent extent = chunks_.Copy(inspection->chunk, part, level);
          const CopyFacts facts = chunks_.Facts(inspection->chunk, part, level);
          if (!extent || facts.codec == CodecId::kRaw) continue;
          inspection->copies.push_back(
              {part.version, level, extent, facts, {}, {}});
        }
      }
    }
  }
  if (inspection->chunk == kNoChunk) {
    std::move(done)(absl::NotFoundError("no such chunk"));
    return;
  }
  inspection->done = std::move(done);
  // One more than there are reads, so that none of them is the last before all
  // have begun.
  inspection->reads_left = 1;
  const auto ended = [this, inspection](Status) {
    if (--inspection->reads_left == 0) EndInspection(*inspection);
  };
  for (Inspection::Copy& copy : inspection->copies) {
    const uint64_t bytes = RoundUp(
        std::min(copy.facts.record_bytes, kRecordFrontBytes), kPageBytes);
    if (copy.level == Level::kDram) {
      copy.front = dram_.Map(copy.extent).first(bytes);
      continue;
    }
    copy.read.reset(
        static_cast<std::byte*>(std::aligned_alloc(kPageBytes, bytes)));
    if (copy.read == nullptr) continue;
    ++inspection->reads_left;
    tiers_[Raw(copy.level)]->Read(copy.extent, 0,
                                  MutableByteSpan(copy.read.get(), bytes),
                                  Guard([ended, &copy, bytes](Status status) {
                                    if (status.ok())
                                      copy.front = {copy.read.get(), bytes};
                                    ended(std::move(status));
                                  }));
  }
  ended(absl::OkStatus());
}

void EngineImpl::EndInspection(Inspection& inspection) {
  CopyProfiles profiles;
  for (const Inspection::Copy& copy : inspection.copies) {
    const auto front = ParseRecordFront(copy.front);
    if (coder_ == nullptr || !front.ok() ||
        front->meta.checksum != copy.facts.checksum) {
      continue;
    }
    const auto profile = coder_->ProfileOf(front->meta.codec, front->payload);
    if (profile.ok()) profiles[{copy.version, KindOf(copy.level)}] = *profile;
  }
  StatusOr<ChunkSummary> summary = absl::NotFoundError("no such chunk");
  {
    AfterUnlock after;
    absl::MutexLock lock(&mu_);
    if (chunks_[inspection.chunk].live) {
      summary = Summary(inspection.chunk, &profiles);
    }
    Unbusy(inspection.chunk, after);
  }
  std::move(inspection.done)(std::move(summary));
}

void EngineImpl::SetPinned(ChunkIndex index, bool pinned, AfterUnlock& after) {
  ChunkEntry& chunk = chunks_[index];
  if (chunk.pinned == pinned) return;
  chunk.pinned = pinned;
  const Space& space = spaces_[chunk.space];
  std::string value;
  if (pinned) value.assign(space.id.bytes.begin(), space.id.bytes.end());
  PutControl(
      PinKey(space, chunk.id), std::move(value),
      [this](Status status) {
        AfterUnlock then;
        absl::MutexLock lock(&mu_);
        NoteHealth(status, then);
      },
      after);
}

Status EngineImpl::Pin(std::optional<TenantId> tenant, const ChunkId& id,
                       bool pinned) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  const std::vector<ChunkIndex> found = FindEverywhere(tenant, id);
  if (found.empty()) return absl::NotFoundError("no such chunk");
  for (const ChunkIndex index : found) SetPinned(index, pinned, after);
  return absl::OkStatus();
}

void EngineImpl::AddDescendants(std::vector<ChunkIndex>& chunks) const {
  using Link = std::pair<SpaceRef, ChunkId>;
  absl::flat_hash_map<Link, std::vector<ChunkIndex>> children;
  for (uint32_t i = 0; i < chunks_.slots(); ++i) {
    const ChunkEntry& chunk = chunks_[ChunkIndex{i}];
    if (!chunk.live || chunk.parent.IsZero()) continue;
    children[Link(chunk.space, chunk.parent)].push_back(ChunkIndex{i});
  }
  absl::flat_hash_set<ChunkIndex> seen(chunks.begin(), chunks.end());
  for (size_t i = 0; i < chunks.size(); ++i) {
    const ChunkEntry& chunk = chunks_[chunks[i]];
    const auto it = children.find(Link(chunk.space, chunk.id));
    if (it == children.end()) continue;
    for (const ChunkIndex child : it->second) {
      if (seen.insert(child).second) chunks.push_back(child);
    }
  }
}

StatusOr<uint64_t> EngineImpl::Evict(std::optional<TenantId> tenant,
                                     const ChunkId& id, bool subtree) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  std::vector<ChunkIndex> chunks = FindEverywhere(tenant, id);
  if (chunks.empty()) return absl::NotFoundError("no such chunk");
  if (subtree) AddDescendants(chunks);
  for (const ChunkIndex index : chunks) {
    Drop(index, MissReason::kEvicted, after);
  }
  return chunks.size();
}

StatusOr<uint64_t> EngineImpl::EvictSpace(std::optional<TenantId> tenant,
                                          const SpaceId& space) {
  constexpr uint32_t kPiece = 1024;
  bool known = false;
  uint64_t count = 0;
  for (uint32_t from = 0, end = kPiece; from < end; from = end) {
    AfterUnlock after;
    absl::MutexLock lock(&mu_);
    for (uint32_t i = 0; i < spaces_.size() && !known; ++i) {
      const Space& one = spaces_[SpaceRef{i}];
      known = one.id == space && (!tenant.has_value() || one.tenant == *tenant);
    }
    if (!known) return absl::NotFoundError("no such space");
    end = std::min(chunks_.slots(), from + kPiece);
    for (uint32_t i = from; i < end; ++i) {
      const ChunkEntry& chunk = chunks_[ChunkIndex{i}];
      const Space& its = spaces_[chunk.space];
      if (!chunk.live || its.id != space ||
          (tenant.has_value() && its.tenant != *tenant)) {
        continue;
      }
      Drop(ChunkIndex{i}, MissReason::kEvicted, after);
      ++count;
    }
  }
  return count;
}

}  // namespace larder
