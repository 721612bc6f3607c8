#include <algorithm>
#include <utility>

#include "store/chunk_cover.h"
#include "store/engine_impl.h"

namespace larder {

std::string EngineImpl::Obstacles::ToString() const {
  if (held + pinned + busy + unwritten == 0) {
    return "no chunk is there to make room";
  }
  return absl::StrCat("of the next chunks to go ", held, " are held, ", pinned,
                      " pinned, ", unwritten,
                      " wait for write-back to the durable tier, ", busy,
                      " are being moved");
}

// ---- What a chunk is, from its parts ----

void EngineImpl::Summarize(ChunkIndex index) {
  ChunkEntry& chunk = chunks_[index];
  const std::span<const PartEntry> parts = chunks_.Parts(index);
  chunk.visible = VisibleGroups(spaces_[chunk.space], parts);
  chunk.bytes = 0;
  chunk.lineage = Lineage::kExact;
  bool dram = chunk.visible != 0;
  bool durable = chunk.visible != 0;
  bool incomplete = false;
  for (const PartEntry& part : parts) {
    chunk.bytes += part.record_bytes;
    chunk.lineage = std::max(chunk.lineage, part.lineage);
    if ((chunk.visible >> Raw(part.group) & 1) == 0) {
      incomplete = true;
      continue;
    }
    dram = dram && part.dram_handle != 0;
    durable = durable && part.durable_handle != 0;
  }
  chunk.dram_readable = dram;
  chunk.durable_readable = durable;
  if (incomplete && !chunk.incomplete) incomplete_since_[index] = Now();
  if (!incomplete && chunk.incomplete) incomplete_since_.erase(index);
  chunk.incomplete = incomplete;
}

ChunkFeatures EngineImpl::FeaturesOf(const ChunkEntry& chunk, bool dram) const {
  ChunkFeatures features;
  features.bytes = chunk.bytes;
  features.token_begin = chunk.token_begin;
  features.token_count = chunk.token_count;
  features.priority = chunk.priority;
  features.stop_reason = chunk.stop_reason;
  features.now = Now();
  if (chunk.parent.IsZero()) return features;
  const ChunkIndex parent = chunks_.Find(chunk.space, chunk.parent);
  if (parent == kNoChunk) return features;
  const ChunkEntry& entry = chunks_[parent];
  // Positions grow along a chain, so that no client can tie it into a ring.
  if ((dram ? entry.in_dram : entry.in_durable) &&
      entry.token_begin < chunk.token_begin) {
    features.parent = parent;
  }
  return features;
}

void EngineImpl::SettlePolicies(ChunkIndex index) {
  ChunkEntry& chunk = chunks_[index];
  bool dram = false;
  bool durable = false;
  for (const PartEntry& part : chunks_.Parts(index)) {
    dram = dram || part.dram_handle != 0;
    durable = durable || part.durable_handle != 0;
  }
  if (dram && !chunk.in_dram) {
    dram_policy_->Insert(index, FeaturesOf(chunk, true));
  } else if (!dram && chunk.in_dram) {
    dram_policy_->Remove(index);
  }
  if (durable && !chunk.in_durable) {
    durable_policy_->Insert(index, FeaturesOf(chunk, false));
  } else if (!durable && chunk.in_durable) {
    durable_policy_->Remove(index);
  }
  chunk.in_dram = dram;
  chunk.in_durable = durable;
}

void EngineImpl::Settle(ChunkIndex index, MissReason why, AfterUnlock& after) {
  ChunkEntry& chunk = chunks_[index];
  if (!chunk.live) return;
  const bool had_dram = chunk.dram_readable;
  const bool had_durable = chunk.durable_readable;
  const bool was_incomplete = chunk.incomplete;
  if (chunk.part_count == 0) {
    Drop(index, why, after);
    return;
  }
  Summarize(index);
  SettlePolicies(index);
  const auto tell = [&](bool had, bool has,
                        TierKind tier) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (had == has) return;
    EmitChunk(has ? EventType::kChunkStored : EventType::kChunkRemoved, chunk,
              tier, has ? MissReason::kNone : why);
  };
  tell(had_dram, chunk.dram_readable, dram_.kind());
  if (durable_ != nullptr) {
    tell(had_durable, chunk.durable_readable, durable_->kind());
  }
  if (chunk.incomplete && !was_incomplete) {
    Expire(Now() + options_.incomplete_ttl, ExpiryQueue::What::kIncomplete,
           Raw(index), after);
  }
}

void EngineImpl::ExpireIncomplete(ChunkIndex index, AfterUnlock& after) {
  if (Raw(index) >= chunks_.slots()) return;
  const ChunkEntry& chunk = chunks_[index];
  if (!chunk.live || !chunk.incomplete) return;
  const absl::Time due = incomplete_since_.at(index) + options_.incomplete_ttl;
  if (due > Now()) {
    // It was complete in between, or the slot has another chunk by now.
    expiries_.Add(due, ExpiryQueue::What::kIncomplete, Raw(index));
    return;
  }
  for (size_t i = chunk.part_count; i-- > 0;) {
    PartEntry* part = &chunks_.Parts(index)[i];
    if ((chunk.visible >> Raw(part->group) & 1) == 0) {
      RemovePart(index, part, after);
    }
  }
  Settle(index, MissReason::kIncomplete, after);
}

// ---- Parts and chunks go ----

void EngineImpl::RetireDram(ChunkIndex index, Extent extent,
                            AfterUnlock& after) {
  if (!extent) return;
  if (chunks_[index].Idle()) {
    after.Free(&dram_, extent);
  } else {
    retired_[index].dram.push_back(extent);
  }
}

// A read of it may be about to be asked for.
void EngineImpl::RetireDurable(ChunkIndex index, Extent extent,
                               AfterUnlock& after) {
  if (!extent) return;
  if (chunks_[index].busy == 0) {
    after.Free(durable_, extent);
  } else {
    retired_[index].durable.push_back(extent);
  }
}

void EngineImpl::ReleaseIfIdle(ChunkIndex index, AfterUnlock& after) {
  ChunkEntry& chunk = chunks_[index];
  if (chunk.busy > 0) return;
  if (const auto it = retired_.empty() ? retired_.end() : retired_.find(index);
      it != retired_.end()) {
    for (const Extent extent : std::exchange(it->second.durable, {})) {
      after.Free(durable_, extent);
    }
    if (chunk.holds == 0) {
      for (const Extent extent : it->second.dram) after.Free(&dram_, extent);
      retired_.erase(it);
    }
  }
  if (chunk.live || chunk.holds > 0) return;
  for (const PartEntry& part : chunks_.Parts(index)) {
    after.Free(&dram_, part.dram());
  }
  chunks_.Erase(index);
}

void EngineImpl::Unbusy(ChunkIndex index, AfterUnlock& after) {
  --chunks_[index].busy;
  ReleaseIfIdle(index, after);
}

void EngineImpl::Unhold(ChunkIndex index, AfterUnlock& after) {
  if (--chunks_[index].holds == 0) EndRestingPromotion(index, after);
  ReleaseIfIdle(index, after);
}

void EngineImpl::RemovePart(ChunkIndex index, PartEntry* part,
                            AfterUnlock& after) {
  Unqueue(*part);
  TellWaiters({index, part->version},
              absl::AbortedError("the part was dropped before it was durable"),
              after);
  RetireDram(index, part->dram(), after);
  RetireDurable(index, part->durable(), after);
  chunks_.RemovePart(index, part);
}

void EngineImpl::RemoveBroken(ChunkIndex index, GroupMask before,
                              AfterUnlock& after) {
  const ChunkEntry& chunk = chunks_[index];
  const GroupMask now =
      VisibleGroups(spaces_[chunk.space], chunks_.Parts(index));
  const int broken = before & ~now;
  for (size_t i = chunk.part_count; i-- > 0;) {
    PartEntry* part = &chunks_.Parts(index)[i];
    if ((broken >> Raw(part->group) & 1) != 0) RemovePart(index, part, after);
  }
}

void EngineImpl::Drop(ChunkIndex index, MissReason why, AfterUnlock& after) {
  ChunkEntry& chunk = chunks_[index];
  if (chunk.pinned) SetPinned(index, false, after);
  if (chunk.dram_readable) {
    EmitChunk(EventType::kChunkRemoved, chunk, dram_.kind(), why);
  }
  if (chunk.durable_readable) {
    EmitChunk(EventType::kChunkRemoved, chunk, durable_->kind(), why);
  }
  if (chunk.in_dram) dram_policy_->Remove(index);
  if (chunk.in_durable) durable_policy_->Remove(index);
  if (chunk.rooted) roots_.Remove(index);
  if (chunk.incomplete) incomplete_since_.erase(index);
  chunk.in_dram = chunk.in_durable = chunk.rooted = chunk.incomplete = false;
  misses_.Add(chunk.space, chunk.id, why);
  for (PartEntry& part : chunks_.Parts(index)) {
    Unqueue(part);
    TellWaiters(
        {index, part.version},
        absl::AbortedError("the chunk was dropped before it was durable"),
        after);
    RetireDurable(index, part.durable(), after);
    chunks_.DropDurableCopy(index, part);
  }
  chunks_.Unlist(index);
  ReleaseIfIdle(index, after);
}

// What is left of the part is its durable copy, if any. Who waits for another
// one will not get it.
void EngineImpl::LoseMemoryCopy(ChunkIndex index, PartEntry& part,
                                AfterUnlock& after) {
  Unqueue(part);
  if (part.unwritten()) {
    TellWaiters({index, part.version},
                absl::AbortedError("it left memory before it was durable"),
                after);
    part.wanted_durable = false;
  }
  RetireDram(index, part.dram(), after);
  chunks_.DropMemoryCopy(index, part);
}

void EngineImpl::DropCorrupt(ChunkIndex index, uint32_t version, TierKind tier,
                             AfterUnlock& after) {
  ChunkEntry& chunk = chunks_[index];
  PartEntry* part = chunks_.FindPart(index, version);
  if (part == nullptr) return;
  ++counters_.corrupt;
  EmitChunk(EventType::kChunkCorrupt, chunk, tier, MissReason::kCorrupt);
  if (!chunk.live) return;
  const GroupMask before = chunk.visible;
  if (tier == dram_.kind()) {
    LoseMemoryCopy(index, *part, after);
  } else {
    // One that is outdated is being replaced already.
    if (!part->durable_outdated) part->writing = PartEntry::Writing::kNot;
    RetireDurable(index, part->durable(), after);
    chunks_.DropDurableCopy(index, *part);
  }
  if (part->dram_handle == 0 && part->durable_handle == 0) {
    RemovePart(index, part, after);
    RemoveBroken(index, before, after);
  } else if (part->dram_handle != 0 &&
             options_.write_back == EngineOptions::WriteBack::kOnCommit) {
    QueueWrite(index, *part);
    PumpWrites(after);
  }
  Settle(index, MissReason::kCorrupt, after);
}

ExpectedRecord EngineImpl::Expect(ChunkIndex index, const PartEntry& part,
                                  const CopyFacts& facts) const {
  const ChunkEntry& chunk = chunks_[index];
  const Space& space = spaces_[chunk.space];
  return {space.tenant, space.id,           chunk.id,      part.group,
          part.shape,   facts.record_bytes, facts.checksum};
}

// ---- Eviction ----

bool EngineImpl::Clean(const PartEntry& part) const {
  return part.dram_handle == 0 || !part.unwritten() || durable_ == nullptr ||
         degraded_ || part.writing == PartEntry::Writing::kSettled;
}

bool EngineImpl::Clean(ChunkIndex index) const {
  const std::span<const PartEntry> parts = chunks_.Parts(index);
  return std::all_of(
      parts.begin(), parts.end(),
      [this](const PartEntry& part)
          ABSL_NO_THREAD_SAFETY_ANALYSIS { return Clean(part); });
}

// Which chunks may leave memory now. Called by policies under the engine's
// lock.
class EngineImpl::DramEvictable final : public EvictionPolicy::Evictable {
 public:
  enum class Want { kClean, kAny, kIdle };
  DramEvictable(const EngineImpl& engine, Want want, Obstacles& obstacles)
      : engine_(engine), want_(want), obstacles_(obstacles) {}

  void Pass(ChunkIndex chunk) { passed_.push_back(chunk); }

  bool operator()(ChunkIndex index) const override
      ABSL_NO_THREAD_SAFETY_ANALYSIS {
    const ChunkEntry& chunk = engine_.chunks_[index];
    if (chunk.holds > 0) return Refuse(obstacles_.held);
    if (chunk.pinned) return Refuse(obstacles_.pinned);
    if (chunk.busy > 0) {
      return Refuse(Writing(index) ? obstacles_.unwritten : obstacles_.busy);
    }
    if (want_ == Want::kClean) {
      return engine_.Clean(index) || Refuse(obstacles_.unwritten);
    }
    for (const PartEntry& part : engine_.chunks_.Parts(index)) {
      const bool waits = part.wanted_durable && part.unwritten();
      const bool queued = part.writing == PartEntry::Writing::kQueued;
      if (waits || (queued && want_ == Want::kIdle)) {
        return Refuse(obstacles_.unwritten);
      }
    }
    return std::find(passed_.begin(), passed_.end(), index) == passed_.end();
  }

 private:
  static bool Refuse(uint64_t& count) {
    ++count;
    return false;
  }
  bool Writing(ChunkIndex index) const ABSL_NO_THREAD_SAFETY_ANALYSIS {
    for (const PartEntry& part : engine_.chunks_.Parts(index)) {
      if (part.writing == PartEntry::Writing::kRunning) return true;
    }
    return false;
  }

  const EngineImpl& engine_;
  const Want want_;
  Obstacles& obstacles_;
  std::vector<ChunkIndex> passed_;
};

class EngineImpl::DurableEvictable final : public EvictionPolicy::Evictable {
 public:
  explicit DurableEvictable(const EngineImpl& engine) : engine_(engine) {}
  bool operator()(ChunkIndex index) const override
      ABSL_NO_THREAD_SAFETY_ANALYSIS {
    const ChunkEntry& chunk = engine_.chunks_[index];
    return !chunk.pinned && chunk.busy == 0;
  }

 private:
  const EngineImpl& engine_;
};

void EngineImpl::EvictFromDram(ChunkIndex index, AfterUnlock& after) {
  const GroupMask before = chunks_[index].visible;
  ++counters_.evicted_dram;
  for (size_t i = chunks_[index].part_count; i-- > 0;) {
    PartEntry* part = &chunks_.Parts(index)[i];
    if (part->durable_handle == 0) {
      RemovePart(index, part, after);
    } else {
      LoseMemoryCopy(index, *part, after);
    }
  }
  RemoveBroken(index, before, after);
  Settle(index, MissReason::kEvicted, after);
}

void EngineImpl::EvictFromDurable(ChunkIndex index, AfterUnlock& after) {
  const GroupMask before = chunks_[index].visible;
  ++counters_.evicted_durable;
  for (size_t i = chunks_[index].part_count; i-- > 0;) {
    PartEntry* part = &chunks_.Parts(index)[i];
    if (part->durable_handle == 0) continue;
    if (part->dram_handle == 0) {
      RemovePart(index, part, after);
      continue;
    }
    if (!part->durable_outdated) {
      part->writing = PartEntry::Writing::kSettled;  // it had its turn
    }
    RetireDurable(index, part->durable(), after);
    chunks_.DropDurableCopy(index, *part);
  }
  RemoveBroken(index, before, after);
  Settle(index, MissReason::kEvicted, after);
}

// kOnEvict: the next to go is written first, and some after it with it.
bool EngineImpl::DemoteOne(Obstacles& obstacles, AfterUnlock& after) {
  constexpr int kTogether = 16;
  DramEvictable idle(*this, DramEvictable::Want::kIdle, obstacles);
  for (int i = 0; i < kTogether; ++i) {
    const std::optional<ChunkIndex> victim = dram_policy_->Victim(idle);
    if (!victim.has_value()) break;
    if (Clean(*victim)) {
      EvictFromDram(*victim, after);
      return true;
    }
    QueueWrites(*victim);
    ++obstacles.unwritten;
  }
  PumpWrites(after);
  // What it took out of the way by not admitting it may go now.
  const std::optional<ChunkIndex> victim = dram_policy_->Victim(
      DramEvictable(*this, DramEvictable::Want::kClean, obstacles));
  if (victim.has_value()) EvictFromDram(*victim, after);
  return victim.has_value();
}

bool EngineImpl::EvictOneFromDram(Obstacles& obstacles, AfterUnlock& after) {
  if (durable_ != nullptr && !degraded_ &&
      options_.write_back == EngineOptions::WriteBack::kOnEvict) {
    return DemoteOne(obstacles, after);
  }
  Obstacles first;
  std::optional<ChunkIndex> victim = dram_policy_->Victim(
      DramEvictable(*this, DramEvictable::Want::kClean, first));
  if (!victim.has_value()) {
    victim = dram_policy_->Victim(
        DramEvictable(*this, DramEvictable::Want::kAny, obstacles));
  }
  if (victim.has_value()) EvictFromDram(*victim, after);
  return victim.has_value();
}

StatusOr<Extent> EngineImpl::AllocateDram(TenantId tenant, uint64_t bytes) {
  for (;;) {
    StatusOr<Extent> extent = dram_.Allocate(tenant, bytes);
    if (extent.ok() || !absl::IsResourceExhausted(extent.status())) {
      return extent;
    }
    AfterUnlock after;
    absl::MutexLock lock(&mu_);
    Obstacles obstacles;
    if (EvictOneFromDram(obstacles, after)) continue;
    ++counters_.refused_full;
    return absl::ResourceExhaustedError(
        absl::StrCat("memory is full: ", obstacles.ToString()));
  }
}

StatusOr<Extent> EngineImpl::AllocateDurable(TenantId tenant, uint64_t bytes) {
  for (;;) {
    StatusOr<Extent> extent = durable_->Allocate(tenant, bytes);
    if (extent.ok() || !absl::IsResourceExhausted(extent.status())) {
      return extent;
    }
    AfterUnlock after;
    absl::MutexLock lock(&mu_);
    const std::optional<ChunkIndex> victim =
        durable_policy_->Victim(DurableEvictable(*this));
    if (!victim.has_value()) return extent;
    EvictFromDurable(*victim, after);
  }
}

// kOnEvict: while memory is nearly full, the next to go are already written
// when their time comes.
void EngineImpl::DemoteAhead() {
  constexpr int kAhead = 16;
  const TierUsage usage = dram_.Usage();
  if (usage.used_bytes < usage.capacity_bytes - usage.capacity_bytes / 8)
    return;
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  if (degraded_) return;
  Obstacles obstacles;
  DramEvictable idle(*this, DramEvictable::Want::kIdle, obstacles);
  for (int i = 0; i < kAhead; ++i) {
    const std::optional<ChunkIndex> next = dram_policy_->Victim(idle);
    if (!next.has_value()) break;
    if (!Clean(*next)) QueueWrites(*next);
    idle.Pass(*next);
  }
  PumpWrites(after);
}

}  // namespace larder
