#include <algorithm>
#include <utility>

#include "store/chunk_cover.h"
#include "store/cluster/chunk_key.h"
#include "store/engine_impl.h"

namespace larder {

// A chunk that another node has is fetched as one is promoted: it becomes part
// of the index when somebody asks for it, with copies at a peer, and a
// promotion reads these. When that ends, and nobody holds it, what is still at
// the peer alone is forgotten again (ReleaseIfIdle), so that the index is of
// this node.

// ---- What others are told

ChunkId EngineImpl::AnchorOf(const ChunkEntry& chunk) const {
  const uint32_t tokens = spaces_[chunk.space].descriptor->chunk_tokens;
  const ChunkEntry* at = &chunk;
  for (uint32_t steps = chunk.token_begin / tokens % kAnchorSpacing; steps > 0;
       --steps) {
    const ChunkIndex parent = chunks_.Find(at->space, at->parent);
    if (parent == kNoChunk) return {};
    at = &chunks_[parent];
  }
  return at->id;
}

void EngineImpl::Tell(ChunkIndex index, GroupMask visible, LevelMask readable) {
  if (observer_ == nullptr || !telling_) return;
  const ChunkEntry& chunk = chunks_[index];
  constexpr auto kOwn = static_cast<LevelMask>(~Bit(Level::kPeer));
  const auto before = static_cast<LevelMask>(readable & kOwn);
  const auto now = static_cast<LevelMask>(chunk.readable & kOwn);
  if (chunk.visible == visible && now == before) return;
  const Space& space = spaces_[chunk.space];
  if (now == 0) {
    if (before != 0) observer_->OnRemoved(space.tenant, space.id, chunk.id);
    return;
  }
  ChunkObserver::Chunk told;
  told.tenant = space.tenant;
  told.space = space.id;
  told.id = chunk.id;
  told.anchor = AnchorOf(chunk);
  told.epoch = space.epoch;
  told.groups = chunk.visible;
  told.lineage = chunk.lineage;
  told.token_count = chunk.token_count;
  told.bytes = chunk.bytes;
  told.in_memory = chunk.Readable(Level::kDram);
  told.priority = chunk.priority;
  observer_->OnStored(told);
}

void EngineImpl::TellAll() {
  if (observer_ == nullptr) return;
  absl::MutexLock lock(&mu_);
  telling_ = true;
  for (uint32_t i = 0; i < chunks_.slots(); ++i) {
    const ChunkEntry& chunk = chunks_[ChunkIndex{i}];
    if (chunk.live && chunk.epoch == spaces_[chunk.space].epoch) {
      Tell(ChunkIndex{i}, 0, 0);
    }
  }
}

// ---- What others have

bool EngineImpl::Here(SpaceRef space, const ChunkId& id) const {
  const ChunkIndex index = chunks_.Find(space, id);
  return index != kNoChunk && chunks_[index].epoch == spaces_[space].epoch;
}

void EngineImpl::FindAtPeers(SpaceRef space, std::span<const ChunkId> ids,
                             std::span<const ChunkState> states,
                             std::vector<PeerTier::Chunk>& out) const {
  std::vector<ChunkId> missing;
  std::vector<size_t> at;
  for (size_t i = 0; i < ids.size(); ++i) {
    if (states[i] != ChunkState::kMiss || Here(space, ids[i])) continue;
    missing.push_back(ids[i]);
    at.push_back(i);
  }
  if (missing.empty()) return;
  const Space& its = spaces_[space];
  std::vector<PeerTier::Chunk> found(missing.size());
  peers_->Find(its.tenant, its.id, its.epoch, missing, found);
  out.resize(ids.size());
  for (size_t i = 0; i < at.size(); ++i) out[at[i]] = found[i];
}

void EngineImpl::DescribeAtPeer(SpaceRef space, const ChunkId& id,
                                Lineage worst, StoredChunk& out) const {
  if (Here(space, id)) return;
  const Space& its = spaces_[space];
  PeerTier::Chunk found;
  peers_->Find(its.tenant, its.id, its.epoch, {&id, 1}, {&found, 1});
  if (found.groups == 0 || found.lineage > worst) return;
  out.state = ChunkState::kPeer;
  out.reason = MissReason::kNone;
  out.lineage = found.lineage;
  out.token_count = found.token_count;
  out.bytes_to_read = found.bytes;
}

ChunkIndex EngineImpl::Adopt(SpaceRef ref, const ChunkId& id, Lineage worst,
                             AfterUnlock& after) {
  if (Here(ref, id)) return kNoChunk;
  const Space& space = spaces_[ref];
  std::vector<PeerTier::Part> parts =
      peers_->Take(space.tenant, space.id, space.epoch, id);
  if (parts.empty()) return kNoChunk;
  // What is left of another epoch's is in the way.
  if (const ChunkIndex old = chunks_.Find(ref, id); old != kNoChunk) {
    Drop(old, MissReason::kEpoch, after);
  }
  ChunkIndex index = kNoChunk;
  bool sound = true;
  for (PeerTier::Part& taken : parts) {
    RecordMeta& meta = taken.meta;
    meta.tenant = space.tenant;
    meta.root_content = {};
    sound = sound && meta.space == space.id && meta.chunk == id &&
            meta.epoch == space.epoch &&
            meta.record_bytes <= dram_.MaxExtentBytes() &&
            CheckGeometry(*space.descriptor, meta, nullptr).ok();
    if (sound && index == kNoChunk) index = NewChunk(ref, meta, {});
    sound = sound &&
            CheckJoins(chunks_[index], chunks_.Parts(index), meta).ok() &&
            chunks_.FindPart(index, meta.group, meta.shape) == nullptr;
    if (!sound) {
      after.Free(peers_, taken.extent);
      continue;
    }
    PartEntry& part = chunks_.AddPart(index);
    part.set_facts(FactsOf(meta));
    part.shape = meta.shape;
    part.group = meta.group;
    part.version = ++last_version_;
    // Whoever has it keeps it: nothing is owed to it here.
    part.writing = PartEntry::Writing::kSettled;
    chunks_.SetPeerCopy(index, part, taken.extent, PlanesOf(meta));
  }
  if (index == kNoChunk) return kNoChunk;
  Settle(index, MissReason::kUnavailable, after);
  const ChunkEntry& chunk = chunks_[index];
  if (!sound || chunk.visible == 0 || chunk.lineage > worst) {
    LoseCopies(index, Level::kPeer, MissReason::kUnavailable, after);
    return kNoChunk;
  }
  return index;
}

void EngineImpl::Locate(const MatchRequest& request, absl::Time deadline,
                        Task done) {
  Epoch epoch{};
  bool known = false;
  if (peers_ != nullptr) {
    absl::MutexLock lock(&mu_);
    const SpaceRef ref = spaces_.Find(request.tenant, request.space);
    known = ref != kNoSpace;
    if (known) epoch = spaces_[ref].epoch;
  }
  if (!known) return std::move(done)();
  peers_->Locate(request.tenant, request.space, epoch,
                 {request.ids.begin(), request.ids.end()}, request.start,
                 deadline, Lifeline::Guard<>(lifeline_, std::move(done)));
}

RecordMeta EngineImpl::MetaOf(ChunkIndex index, const PartEntry& part) const {
  const ChunkEntry& chunk = chunks_[index];
  const Space& space = spaces_[chunk.space];
  RecordMeta meta;
  meta.space = space.id;
  meta.chunk = chunk.id;
  meta.parent = chunk.parent;
  meta.tenant = space.tenant;
  meta.epoch = space.epoch;
  meta.group = part.group;
  meta.shape = part.shape;
  meta.codec = part.codec;
  meta.lineage = part.lineage;
  meta.is_tail = chunk.is_tail;
  meta.token_count = chunk.token_count;
  meta.token_begin = chunk.token_begin;
  meta.record_bytes = part.record_bytes;
  meta.checksum = part.checksum;
  if (part.copies() == Bit(Level::kDurable)) {
    const CopyPlanes planes = chunks_.DurablePlanes(index, part);
    meta.planes = planes.planes;
    meta.cuts = planes.cuts;
  }
  return meta;
}

std::vector<Engine::StoredRecords> EngineImpl::Records(
    TenantId tenant, const SpaceId& space_id,
    std::span<const ChunkId> ids) const {
  std::vector<StoredRecords> all(ids.size());
  absl::MutexLock lock(&mu_);
  const SpaceRef ref = spaces_.Find(tenant, space_id);
  if (ref == kNoSpace) return all;
  for (size_t i = 0; i < ids.size(); ++i) {
    const Found found = Look(ref, ids[i], Lineage::kUnknown);
    // What is being fetched is nobody's source.
    if (found.chunk == kNoChunk || chunks_[found.chunk].at_peer) continue;
    const ChunkEntry& chunk = chunks_[found.chunk];
    all[i].groups = chunk.visible;
    for (const PartEntry& part : chunks_.Parts(found.chunk)) {
      if (!chunk.Visible(part.group)) continue;
      all[i].parts.push_back(MetaOf(found.chunk, part));
    }
  }
  return all;
}

}  // namespace larder
