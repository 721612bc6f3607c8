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
  LevelMask readable = chunk.visible != 0 ? (1 << kLevels) - 1 : 0;
  bool incomplete = false;
  for (const PartEntry& part : parts) {
    chunk.bytes += part.record_bytes;
    chunk.lineage = std::max(chunk.lineage, part.lineage);
    if (!chunk.Visible(part.group)) {
      incomplete = true;
      continue;
    }
    readable &= part.copies();
  }
  chunk.readable = readable;
  chunk.at_peer =
      std::any_of(parts.begin(), parts.end(),
                  [](const PartEntry& part) { return part.at_peer; });
  if (incomplete && !chunk.incomplete) incomplete_since_[index] = Now();
  if (!incomplete && chunk.incomplete) incomplete_since_.erase(index);
  chunk.incomplete = incomplete;
}

ChunkFeatures EngineImpl::FeaturesOf(const ChunkEntry& chunk,
                                     Level level) const {
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
  if (entry.Ranked(level) && entry.token_begin < chunk.token_begin) {
    features.parent = parent;
  }
  return features;
}

void EngineImpl::SettlePolicies(ChunkIndex index) {
  ChunkEntry& chunk = chunks_[index];
  LevelMask there = 0;
  for (const PartEntry& part : chunks_.Parts(index)) there |= part.copies();
  there &= static_cast<LevelMask>(~Bit(Level::kPeer));
  if (there == chunk.ranked) return;
  for (const Level level : kOwnLevels) {
    const bool has = (there & Bit(level)) != 0;
    if (has == chunk.Ranked(level)) continue;
    if (has) {
      Policy(level).Insert(index, FeaturesOf(chunk, level));
    } else {
      Policy(level).Remove(index);
    }
  }
  chunk.ranked = there;
}

void EngineImpl::Settle(ChunkIndex index, MissReason why, AfterUnlock& after,
                        const std::shared_ptr<const ChunkBlocks>& blocks) {
  ChunkEntry& chunk = chunks_[index];
  if (!chunk.live) return;
  const LevelMask before = chunk.readable;
  const GroupMask was_visible = chunk.visible;
  const bool was_incomplete = chunk.incomplete;
  if (chunk.part_count == 0) {
    Drop(index, why, after);
    return;
  }
  Summarize(index);
  SettlePolicies(index);
  for (const Level level : kOwnLevels) {
    if (((chunk.readable ^ before) & Bit(level)) == 0) continue;
    const bool has = chunk.Readable(level);
    EmitChunk(has ? EventType::kChunkStored : EventType::kChunkRemoved, chunk,
              KindOf(level), has ? MissReason::kNone : why,
              has ? blocks : nullptr);
  }
  Tell(index, was_visible, before);
  TellAwaiting(index, after);
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
    if (!chunk.Visible(part->group)) RemovePart(index, part, after);
  }
  Settle(index, MissReason::kIncomplete, after);
}

// ---- Parts and chunks go ----

void EngineImpl::Retire(ChunkIndex index, Level level, Extent extent,
                        AfterUnlock& after) {
  if (!extent) return;
  const ChunkEntry& chunk = chunks_[index];
  // Of a tier below DRAM a read may be about to be asked for.
  if (level == Level::kDram ? chunk.Idle() : chunk.busy == 0) {
    after.Free(tiers_[Raw(level)], extent);
  } else {
    retired_[index][Raw(level)].push_back(extent);
  }
}

void EngineImpl::ReleaseIfIdle(ChunkIndex index, AfterUnlock& after) {
  ChunkEntry& chunk = chunks_[index];
  if (chunk.busy > 0) return;
  if (const auto it = retired_.empty() ? retired_.end() : retired_.find(index);
      it != retired_.end()) {
    for (const Level level : kAllLevels) {
      if (level == Level::kDram && chunk.holds > 0) continue;
      for (const Extent extent : std::exchange(it->second[Raw(level)], {})) {
        after.Free(tiers_[Raw(level)], extent);
      }
    }
    if (chunk.holds == 0) retired_.erase(it);
  }
  if (chunk.holds > 0) return;
  if (chunk.live) {
    // Nobody fetches it any more.
    if (chunk.at_peer) {
      LoseCopies(index, Level::kPeer, MissReason::kUnavailable, after);
    }
    return;
  }
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
  for (const Level level : kAllLevels) {
    Retire(index, level, chunks_.Copy(index, *part, level), after);
  }
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
  for (const Level level : kOwnLevels) {
    if (chunk.Readable(level)) {
      EmitChunk(EventType::kChunkRemoved, chunk, KindOf(level), why);
    }
    if (chunk.Ranked(level)) Policy(level).Remove(index);
  }
  if (chunk.rooted) roots_.Remove(index);
  if (chunk.incomplete) incomplete_since_.erase(index);
  if (observer_ != nullptr && telling_ &&
      (chunk.readable & ~Bit(Level::kPeer)) != 0) {
    const Space& space = spaces_[chunk.space];
    observer_->OnRemoved(space.tenant, space.id, chunk.id);
  }
  chunk.ranked = 0;
  chunk.rooted = chunk.incomplete = false;
  misses_.Add(chunk.space, chunk.id, why);
  for (PartEntry& part : chunks_.Parts(index)) {
    Unqueue(part);
    TellWaiters(
        {index, part.version},
        absl::AbortedError("the chunk was dropped before it was durable"),
        after);
    // What is in DRAM goes with its last reader.
    for (const Level level : {Level::kDevice, Level::kDurable, Level::kPeer}) {
      Retire(index, level, chunks_.Copy(index, part, level), after);
      chunks_.DropCopy(index, part, level);
    }
  }
  chunks_.Unlist(index);
  ReleaseIfIdle(index, after);
}

void EngineImpl::LoseCopy(ChunkIndex index, PartEntry& part, Level level,
                          AfterUnlock& after) {
  if (level == Level::kDram) {
    Unqueue(part);
    if (part.unwritten()) {
      TellWaiters({index, part.version},
                  absl::AbortedError("it left memory before it was durable"),
                  after);
      part.wanted_durable = false;
    }
  }
  Retire(index, level, chunks_.Copy(index, part, level), after);
  chunks_.DropCopy(index, part, level);
}

void EngineImpl::LoseCopies(ChunkIndex index, Level level, MissReason why,
                            AfterUnlock& after) {
  const GroupMask before = chunks_[index].visible;
  for (size_t i = chunks_[index].part_count; i-- > 0;) {
    PartEntry* part = &chunks_.Parts(index)[i];
    if ((part->copies() & Bit(level)) == 0) continue;
    if (part->copies() == Bit(level)) {
      RemovePart(index, part, after);
      continue;
    }
    if (level == Level::kDurable && !part->durable_outdated) {
      part->writing = PartEntry::Writing::kSettled;  // it had its turn
    }
    LoseCopy(index, *part, level, after);
  }
  RemoveBroken(index, before, after);
  Settle(index, why, after);
}

void EngineImpl::DropCorrupt(ChunkIndex index, uint32_t version, Level level,
                             AfterUnlock& after) {
  ChunkEntry& chunk = chunks_[index];
  PartEntry* part = chunks_.FindPart(index, version);
  if (part == nullptr) return;
  ++counters_.corrupt;
  EmitChunk(EventType::kChunkCorrupt, chunk, KindOf(level),
            MissReason::kCorrupt);
  if (!chunk.live) return;
  const GroupMask before = chunk.visible;
  // One that is outdated is being replaced already.
  if (level == Level::kDurable && !part->durable_outdated) {
    part->writing = PartEntry::Writing::kNot;
  }
  LoseCopy(index, *part, level, after);
  if (part->copies() == 0) {
    RemovePart(index, part, after);
    RemoveBroken(index, before, after);
  } else if (level == Level::kDurable &&
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

// A chunk that may leave memory and loses nothing by it: what should be on the
// device is there. Looks no further than a few of the others: those that come
// after are not cold.
class EngineImpl::SpilledEvictable final : public EvictionPolicy::Evictable {
 public:
  explicit SpilledEvictable(const EngineImpl& engine)
      : engine_(engine),
        clean_(engine, DramEvictable::Want::kClean, ignored_) {}

  bool operator()(ChunkIndex index) const override
      ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (!clean_(index)) return false;
    return engine_.Spilled(index) || ++looked_ == kLooks;
  }

 private:
  static constexpr int kLooks = 32;

  const EngineImpl& engine_;
  Obstacles ignored_;
  const DramEvictable clean_;
  mutable int looked_ = 0;
};

// Below DRAM nothing is held.
class EngineImpl::LowerEvictable final : public EvictionPolicy::Evictable {
 public:
  explicit LowerEvictable(const EngineImpl& engine) : engine_(engine) {}
  bool operator()(ChunkIndex index) const override
      ABSL_NO_THREAD_SAFETY_ANALYSIS {
    const ChunkEntry& chunk = engine_.chunks_[index];
    return !chunk.pinned && chunk.busy == 0;
  }

 private:
  const EngineImpl& engine_;
};

void EngineImpl::EvictFrom(Level level, ChunkIndex index, AfterUnlock& after) {
  switch (level) {
    case Level::kDram:
      ++counters_.evicted_dram;
      if (!Spilled(index)) ++counters_.unspilled_evictions;
      break;
    case Level::kDevice:
      ++counters_.evicted_device;
      break;
    case Level::kDurable:
      ++counters_.evicted_durable;
      break;
    case Level::kPeer:  // has no policy
      break;
  }
  LoseCopies(index, level, MissReason::kEvicted, after);
}

// kOnEvict: the next to go is written first, and some after it with it.
bool EngineImpl::DemoteOne(Obstacles& obstacles, AfterUnlock& after) {
  constexpr int kTogether = 16;
  DramEvictable idle(*this, DramEvictable::Want::kIdle, obstacles);
  for (int i = 0; i < kTogether; ++i) {
    const std::optional<ChunkIndex> victim = Policy(Level::kDram).Victim(idle);
    if (!victim.has_value()) break;
    if (Clean(*victim)) {
      EvictFrom(Level::kDram, *victim, after);
      return true;
    }
    QueueWrites(*victim);
    ++obstacles.unwritten;
  }
  PumpWrites(after);
  // What it took out of the way by not admitting it may go now.
  const std::optional<ChunkIndex> victim =
      Policy(Level::kDram)
          .Victim(DramEvictable(*this, DramEvictable::Want::kClean, obstacles));
  if (victim.has_value()) EvictFrom(Level::kDram, *victim, after);
  return victim.has_value();
}

bool EngineImpl::EvictOneFromDram(Obstacles& obstacles, AfterUnlock& after) {
  if (device_ != nullptr && !device_lost_) {
    const std::optional<ChunkIndex> victim =
        Policy(Level::kDram).Victim(SpilledEvictable(*this));
    if (victim.has_value() && Spilled(*victim)) {
      EvictFrom(Level::kDram, *victim, after);
      return true;
    }
  }
  if (durable_ != nullptr && !degraded_ &&
      options_.write_back == EngineOptions::WriteBack::kOnEvict) {
    return DemoteOne(obstacles, after);
  }
  Obstacles first;
  std::optional<ChunkIndex> victim =
      Policy(Level::kDram)
          .Victim(DramEvictable(*this, DramEvictable::Want::kClean, first));
  if (!victim.has_value()) {
    victim =
        Policy(Level::kDram)
            .Victim(DramEvictable(*this, DramEvictable::Want::kAny, obstacles));
  }
  if (victim.has_value()) EvictFrom(Level::kDram, *victim, after);
  return victim.has_value();
}

StatusOr<Extent> EngineImpl::AllocateDram(TenantId tenant, uint64_t bytes) {
  for (;;) {
    StatusOr<Extent> extent = dram_.Allocate(tenant, bytes);
    if (extent.ok() || !absl::IsResourceExhausted(extent.status())) {
      if (device_ != nullptr) ScheduleSpill();
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

StatusOr<Extent> EngineImpl::AllocateLower(Level level, TenantId tenant,
                                           uint64_t bytes) {
  for (;;) {
    StatusOr<Extent> extent = tiers_[Raw(level)]->Allocate(tenant, bytes);
    if (extent.ok() || !absl::IsResourceExhausted(extent.status())) {
      return extent;
    }
    AfterUnlock after;
    absl::MutexLock lock(&mu_);
    const std::optional<ChunkIndex> victim =
        Policy(level).Victim(LowerEvictable(*this));
    if (!victim.has_value()) return extent;
    EvictFrom(level, *victim, after);
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
    const std::optional<ChunkIndex> next = Policy(Level::kDram).Victim(idle);
    if (!next.has_value()) break;
    if (!Clean(*next)) QueueWrites(*next);
    idle.Pass(*next);
  }
  PumpWrites(after);
}

// Of the next to go as many as an eighth of memory holds, or a quarter of the
// device, and no more than some. Only allocations lead here, never the end of a
// spill: one that pushes another out again would go on for ever.
void EngineImpl::SpillAhead() {
  constexpr int kAhead = 16;
  spill_scheduled_ = false;
  const TierUsage usage = dram_.Usage();
  const uint64_t eighth = usage.capacity_bytes / 8;
  const uint64_t device_bytes = device_->Usage().capacity_bytes;
  if (usage.used_bytes < usage.capacity_bytes - eighth || device_bytes == 0) {
    return;
  }
  const uint64_t most = std::min(eighth, device_bytes / 4);
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  if (device_lost_) return;
  Obstacles obstacles;
  DramEvictable next(*this, DramEvictable::Want::kAny, obstacles);
  uint64_t bytes = 0;
  for (int i = 0; i < kAhead && (i == 0 || bytes < most); ++i) {
    if (spilling_bytes_ >= options_.spill_bytes_in_flight) return;
    const std::optional<ChunkIndex> index = Policy(Level::kDram).Victim(next);
    if (!index.has_value()) return;
    next.Pass(*index);
    bytes += chunks_[*index].bytes;
    if (!Spilled(*index) &&
        Policy(Level::kDevice)
            .Admit(FeaturesOf(chunks_[*index], Level::kDevice))) {
      StartSpill(*index, after);
    }
  }
}

}  // namespace larder
