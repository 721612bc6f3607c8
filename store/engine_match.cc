#include <algorithm>
#include <utility>

#include "store/engine_impl.h"
#include "store/hit_rules.h"

namespace larder {

EngineImpl::Found EngineImpl::Look(SpaceRef space, const ChunkId& id,
                                   Lineage worst) const {
  const ChunkIndex index = chunks_.Find(space, id);
  if (index == kNoChunk || chunks_[index].visible == 0 ||
      chunks_[index].epoch != spaces_[space].epoch) {
    const bool old =
        index != kNoChunk && chunks_[index].epoch != spaces_[space].epoch;
    if ((index != kNoChunk && !old) ||
        pending_saves_.contains(SaveKey(space, id))) {
      return {kNoChunk, ChunkState::kPending, MissReason::kIncomplete};
    }
    return {kNoChunk, ChunkState::kMiss,
            old ? MissReason::kEpoch : misses_.Find(space, id)};
  }
  const ChunkEntry& chunk = chunks_[index];
  if (chunk.lineage > worst) {
    return {kNoChunk, ChunkState::kMiss, MissReason::kLineage};
  }
  return {
      index,
      chunk.Readable(Level::kDram) ? ChunkState::kReady : ChunkState::kDurable,
      MissReason::kNone};
}

std::shared_ptr<const SpaceDescriptor> EngineImpl::OtherSpaceOf(
    TenantId tenant, SpaceRef space, const Sha256Digest& content) const {
  if (content.IsZero()) return nullptr;
  const std::vector<ChunkIndex>* chunks = roots_.Find(tenant, content);
  if (chunks == nullptr) return nullptr;
  for (const ChunkIndex index : *chunks) {
    const ChunkEntry& chunk = chunks_[index];
    if (chunk.space != space && chunk.visible != 0 &&
        chunk.epoch == spaces_[chunk.space].epoch) {
      return spaces_[chunk.space].descriptor;
    }
  }
  return nullptr;
}

// Tail first: in the order of use a parent is then younger than its children.
void EngineImpl::TouchPrefix(std::span<const ChunkIndex> prefix,
                             absl::Time now) {
  const int64_t now_ns = absl::ToUnixNanos(now);
  for (size_t i = prefix.size(); i-- > 0;) {
    if (prefix[i] == kNoChunk) continue;
    ChunkEntry& chunk = chunks_[prefix[i]];
    chunk.used_ns = now_ns;
    // A copy on the device that is in DRAM too is of no use there: it ages.
    if (chunk.Ranked(Level::kDram)) {
      Policy(Level::kDram).Touch(prefix[i], now);
    } else if (chunk.Ranked(Level::kDevice)) {
      Policy(Level::kDevice).Touch(prefix[i], now);
    }
    if (chunk.Ranked(Level::kDurable)) {
      Policy(Level::kDurable).Touch(prefix[i], now);
    }
  }
}

absl::Duration EngineImpl::LoadEstimate(std::span<const ChunkIndex> prefix,
                                        uint64_t peer_bytes) const {
  uint64_t bytes[kLevels] = {};
  bytes[Raw(Level::kDram)] = bytes[Raw(Level::kPeer)] = peer_bytes;
  for (const ChunkIndex index : prefix) {
    if (index == kNoChunk) continue;
    const ChunkEntry& chunk = chunks_[index];
    bytes[Raw(Level::kDram)] += chunk.bytes;
    if (chunk.Readable(Level::kDram)) continue;
    bytes[Raw(chunk.Readable(Level::kDevice) ? Level::kDevice
              : chunk.at_peer                ? Level::kPeer
                                             : Level::kDurable)] += chunk.bytes;
  }
  double seconds = 0;
  for (size_t i = 0; i < kLevels; ++i) {
    seconds += static_cast<double>(bytes[i]) / speeds_[i];
  }
  return absl::Seconds(seconds);
}

MatchResult EngineImpl::Match(const MatchRequest& request) {
  const auto asked =
      request.ids.subspan(std::min<size_t>(request.start, request.ids.size()));
  const auto count = static_cast<uint32_t>(asked.size());
  MatchResult result;
  result.states.assign(count, ChunkState::kMiss);
  std::vector<GroupMask> present(count, 0);
  std::vector<ChunkIndex> found(count, kNoChunk);
  std::vector<PeerTier::Chunk> at_peers;
  std::shared_ptr<const SpaceDescriptor> mine, other;
  {
    absl::MutexLock lock(&mu_);
    ++counters_.matches;
    const SpaceRef ref = spaces_.Find(request.tenant, request.space);
    if (ref == kNoSpace) {
      result.reason = count == 0 ? MissReason::kNone : MissReason::kNeverSeen;
      counters_.missed_chunks += count;
      return result;
    }
    const Space& space = spaces_[ref];
    result.epoch = space.epoch;
    HitQuery query;
    query.chunk_tokens = space.descriptor->chunk_tokens;
    uint32_t reach = count;  // nothing is usable beyond a tail
    MissReason first_reason = MissReason::kNone;
    constexpr uint32_t kAhead = 8;
    for (uint32_t i = 0; i < count; ++i) {
      if (i + kAhead < count) chunks_.Prefetch(ref, asked[i + kAhead]);
      const Found one = Look(ref, asked[i], request.worst_lineage);
      result.states[i] = one.state;
      if (one.chunk == kNoChunk || i >= reach) continue;
      const ChunkEntry& chunk = chunks_[one.chunk];
      found[i] = one.chunk;
      present[i] = chunk.visible;
      if (chunk.is_tail) {
        reach = i + 1;
        query.tail_tokens = chunk.token_count;
      }
    }
    if (peers_ != nullptr) FindAtPeers(ref, asked, result.states, at_peers);
    for (uint32_t i = 0; i < at_peers.size() && i < reach; ++i) {
      const PeerTier::Chunk& chunk = at_peers[i];
      if (chunk.groups == 0 || chunk.lineage > request.worst_lineage) continue;
      result.states[i] = ChunkState::kPeer;
      present[i] = chunk.groups;
      if (chunk.is_tail) {
        reach = i + 1;
        query.tail_tokens = chunk.token_count;
      }
    }
    query.present = std::span(present).first(reach);
    HitAnswer hits = ApplyHitRules(space.descriptor->groups, query);
    result.group_hits = std::move(hits.group_hits);
    result.usable = hits.usable;
    if (result.usable < count) {
      first_reason =
          Look(ref, asked[result.usable], request.worst_lineage).reason;
      // It is there, but not all groups can serve a prefix that ends with it.
      if (first_reason == MissReason::kNone) {
        first_reason = MissReason::kIncomplete;
      }
      if (first_reason == MissReason::kNeverSeen && request.start == 0 &&
          result.usable == 0) {
        other = OtherSpaceOf(request.tenant, ref, request.root_content);
        mine = space.descriptor;
      }
    }
    result.reason = other != nullptr ? MissReason::kSpaceDiffers : first_reason;
    const auto prefix = std::span(found).first(result.usable);
    TouchPrefix(prefix, Now());
    uint64_t peer_bytes = 0;
    for (uint32_t i = 0; i < std::min<size_t>(result.usable, at_peers.size());
         ++i) {
      peer_bytes += at_peers[i].bytes;
    }
    result.load_estimate = LoadEstimate(prefix, peer_bytes);
    counters_.matched_chunks += result.usable;
    counters_.missed_chunks += count - result.usable;
  }
  if (other != nullptr) result.detail = FirstDifference(*mine, *other);
  return result;
}

std::vector<ChunkState> EngineImpl::Lookup(TenantId tenant,
                                           const SpaceId& space,
                                           std::span<const ChunkId> ids) {
  std::vector<ChunkState> states(ids.size(), ChunkState::kMiss);
  absl::MutexLock lock(&mu_);
  const SpaceRef ref = spaces_.Find(tenant, space);
  if (ref == kNoSpace) return states;
  for (size_t i = 0; i < ids.size(); ++i) {
    states[i] = Look(ref, ids[i], Lineage::kUnknown).state;
  }
  std::vector<PeerTier::Chunk> at_peers;
  if (peers_ != nullptr) FindAtPeers(ref, ids, states, at_peers);
  for (size_t i = 0; i < at_peers.size(); ++i) {
    if (at_peers[i].groups != 0) states[i] = ChunkState::kPeer;
  }
  return states;
}

std::vector<StoredChunk> EngineImpl::Describe(TenantId tenant,
                                              const SpaceId& space,
                                              std::span<const ChunkId> ids,
                                              Lineage worst) const {
  std::vector<StoredChunk> chunks(ids.size());
  absl::MutexLock lock(&mu_);
  const SpaceRef ref = spaces_.Find(tenant, space);
  for (size_t i = 0; i < ids.size(); ++i) {
    StoredChunk& out = chunks[i];
    out.reason = MissReason::kNeverSeen;
    if (ref == kNoSpace) continue;
    const Found found = Look(ref, ids[i], worst);
    out.state = found.state;
    out.reason = found.reason;
    if (found.chunk == kNoChunk) {
      if (found.state == ChunkState::kMiss && peers_ != nullptr) {
        DescribeAtPeer(ref, ids[i], worst, out);
      }
      continue;
    }
    const ChunkEntry& chunk = chunks_[found.chunk];
    out.lineage = chunk.lineage;
    out.token_count = chunk.token_count;
    if (found.state == ChunkState::kDurable) DescribeBelow(found.chunk, out);
  }
  return chunks;
}

// What a hold of the chunk would have to read, by planes.
void EngineImpl::DescribeBelow(ChunkIndex index, StoredChunk& out) const {
  const ChunkEntry& chunk = chunks_[index];
  const auto it = promotions_.find(index);
  const uint8_t landed = it == promotions_.end() ? 0 : it->second->landed;
  out.planes = kPlanesMax;
  for (const PartEntry& part : chunks_.Parts(index)) {
    if (part.dram_handle != 0 || (chunk.visible >> Raw(part.group) & 1) == 0) {
      continue;
    }
    const CopyPlanes planes =
        part.on_device ? CopyPlanes{} : chunks_.DurablePlanes(index, part);
    const uint64_t there =
        landed == 0 ? 0 : planes.cuts[landed - 1].pages * kPageBytes;
    out.bytes_to_read += part.record_bytes - std::min(part.record_bytes, there);
    out.planes = std::min(out.planes, planes.planes);
    for (size_t i = 0; i + 1 < planes.planes; ++i) {
      const uint64_t bytes =
          std::min(part.record_bytes, planes.cuts[i].pages * kPageBytes);
      out.cuts[i].bytes_to_read += bytes - std::min(bytes, there);
      out.cuts[i].lineage = std::max(
          {out.cuts[i].lineage, chunk.lineage, planes.cuts[i].lineage});
    }
  }
  // Parts in unlike numbers of planes are brought whole.
  for (size_t i = 0; i < out.cuts.size(); ++i) {
    if (i + 1u >= out.planes) out.cuts[i] = {};
  }
}

EngineImpl::MissAnswer EngineImpl::WhyMiss(
    TenantId tenant, const SpaceId& space, const ChunkId& id,
    const Sha256Digest& root_content) const {
  MissAnswer answer;
  std::shared_ptr<const SpaceDescriptor> mine, other;
  {
    absl::MutexLock lock(&mu_);
    const SpaceRef ref = spaces_.Find(tenant, space);
    if (ref == kNoSpace) return {MissReason::kNeverSeen, "space not open"};
    answer.reason = Look(ref, id, Lineage::kUnknown).reason;
    if (answer.reason == MissReason::kNeverSeen) {
      other = OtherSpaceOf(tenant, ref, root_content);
      mine = spaces_[ref].descriptor;
    }
  }
  if (other != nullptr) {
    answer.reason = MissReason::kSpaceDiffers;
    answer.detail = FirstDifference(*mine, *other);
  }
  return answer;
}

}  // namespace larder
