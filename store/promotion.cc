#include <algorithm>
#include <utility>

#include "store/engine_impl.h"

namespace larder {
namespace {

// How quickly a measured throughput forgets.
constexpr double kSpeedWeight = 0.1;

// By layer no less is read at once, or promote_io_bytes if those are fewer:
// smaller reads cost more than they give.
constexpr uint64_t kLayerReadBytes = 128_KiB;
// At least as much as a part's header and tables take, and a layer of it if
// layers are alike.
uint64_t FirstLayerBytes(const PartShape& shape, uint64_t record_bytes) {
  const uint64_t layers = std::max<uint64_t>(shape.layer_count, 1);
  const uint64_t tables =
      kRecordHeaderBytes +
      layers *
          (64 + 2 * sizeof(Checksum) * std::max<uint64_t>(shape.head_count, 1));
  return RoundUp(tables, kPageBytes) + record_bytes / layers;
}

}  // namespace

uint64_t EngineImpl::Promotion::Part::PagesOf(uint8_t first) const {
  if (first == 0) return 0;
  if (first < planes.planes) return planes.cuts[first - 1].pages;
  return RoundUp(expected.record_bytes, kPageBytes) / kPageBytes;
}

uint64_t EngineImpl::Promotion::BytesOf(uint8_t from, uint8_t to) const {
  uint64_t pages = 0;
  for (const Part& part : parts) pages += part.PagesOf(to) - part.PagesOf(from);
  return pages * kPageBytes;
}

std::optional<EngineImpl::PromotionPlan> EngineImpl::PlanPromotion(
    ChunkIndex index, bool by_layer) {
  ChunkEntry& chunk = chunks_[index];
  PromotionPlan plan;
  plan.chunk = index;
  plan.tenant = spaces_[chunk.space].tenant;
  plan.by_layer = by_layer;
  uint64_t first_layers = 0;
  for (const PartEntry& part : chunks_.Parts(index)) {
    if (part.dram_handle != 0 || !chunk.Visible(part.group)) continue;
    plan.parts.push_back({part.version, part.record_bytes, {}});
    plan.bytes += part.record_bytes;
    first_layers += FirstReadBytes(part.shape, part.record_bytes);
  }
  if (by_layer) plan.bytes = first_layers;
  if (promoting_bytes_ > 0 &&
      promoting_bytes_ + plan.bytes > options_.promote_bytes_in_flight) {
    return std::nullopt;
  }
  promoting_bytes_ += plan.bytes;
  ++chunk.busy;
  return plan;
}

Status EngineImpl::AllocatePlan(PromotionPlan& plan) {
  for (PromotionPlan::Part& part : plan.parts) {
    StatusOr<Extent> extent = AllocateDram(plan.tenant, part.record_bytes);
    if (!extent.ok()) return extent.status();
    part.extent = *extent;
  }
  return absl::OkStatus();
}

void EngineImpl::CancelPlan(PromotionPlan& plan, AfterUnlock& after) {
  for (const PromotionPlan::Part& part : plan.parts) {
    after.Free(&dram_, part.extent);
  }
  promoting_bytes_ -= plan.bytes;
  Unbusy(plan.chunk, after);
}

// Takes over what the plan has. If the chunk came up in another way meanwhile,
// or went, nothing is read.
void EngineImpl::StartPromotion(PromotionPlan& plan, uint8_t planes,
                                AfterUnlock& after) {
  const ChunkEntry& chunk = chunks_[plan.chunk];
  // Where the device was lost meanwhile, the durable copy may be another
  // record.
  const auto changed =
      [&](const PromotionPlan::Part& planned) ABSL_NO_THREAD_SAFETY_ANALYSIS {
        const PartEntry* part = chunks_.FindPart(plan.chunk, planned.version);
        return part != nullptr && part->record_bytes != planned.record_bytes;
      };
  if (!chunk.live || chunk.Readable(Level::kDram) ||
      promotions_.contains(plan.chunk) ||
      std::any_of(plan.parts.begin(), plan.parts.end(), changed)) {
    CancelPlan(plan, after);
    return;
  }
  auto promotion = std::make_shared<Promotion>();
  promotion->chunk = plan.chunk;
  promotion->by_layer = plan.by_layer;
  for (const PromotionPlan::Part& planned : plan.parts) {
    const PartEntry* part = chunks_.FindPart(plan.chunk, planned.version);
    if (part == nullptr || part->dram_handle != 0) {
      after.Free(&dram_, planned.extent);
      continue;
    }
    const Level from = part->on_device ? Level::kDevice
                       : part->at_peer ? Level::kPeer
                                       : Level::kDurable;
    promotion->parts.push_back({planned.version, planned.extent, from,
                                chunks_.Copy(plan.chunk, *part, from),
                                Expect(plan.chunk, *part, part->facts()),
                                from == Level::kDurable
                                    ? chunks_.DurablePlanes(plan.chunk, *part)
                                    : chunks_.PeerPlanes(plan.chunk, *part),
                                0, absl::OkStatus()});
    // Of a coded copy on the device it is not known whether it is in planes.
    if (promotion->parts.back().planes.planes > 1 ||
        (from == Level::kDevice && part->codec != CodecId::kRaw)) {
      promotion->by_layer = false;
    }
  }
  promotions_.emplace(plan.chunk, promotion);
  promoting_bytes_ -= plan.bytes;  // ResumePromotion counts what it reads
  ResumePromotion(promotion, planes, after);
}

void EngineImpl::ResumePromotion(std::shared_ptr<Promotion> promotion,
                                 uint8_t planes, AfterUnlock& after) {
  // Where no part has more, these are all.
  uint8_t most = 1;
  for (const Promotion::Part& part : promotion->parts) {
    most = std::max(most, part.planes.planes);
  }
  promotion->reading = planes < most ? planes : kPlanesMax;
  for (Promotion::Part& part : promotion->parts) {
    part.from = part.PagesOf(promotion->landed) * kPageBytes;
    part.to = part.PagesOf(promotion->reading) * kPageBytes;
    if (!promotion->by_layer) continue;
    part.to = std::min(part.to, FirstReadBytes(part.expected.shape,
                                               part.expected.record_bytes));
  }
  promotion->started = Now();
  CountReading(*promotion);
  after.Call([this, promotion] { ReadPromotion(promotion); });
}

void EngineImpl::ReadPromotion(std::shared_ptr<Promotion> promotion) {
  struct Piece {
    size_t part;
    uint64_t offset;
    MutableByteSpan into;
  };
  std::vector<Piece> pieces;
  {
    absl::MutexLock lock(&mu_);
    promotion->parts_left = 0;
    for (Promotion::Part& part : promotion->parts) {
      part.reads_left = (part.to - part.from + options_.promote_io_bytes - 1) /
                        options_.promote_io_bytes;
      // A part that has no such plane is there already.
      if (part.reads_left > 0) ++promotion->parts_left;
    }
  }
  for (size_t i = 0; i < promotion->parts.size(); ++i) {
    const Promotion::Part& part = promotion->parts[i];
    const MutableByteSpan memory = dram_.Map(part.dram).first(part.to);
    for (uint64_t at = part.from; at < part.to;
         at += options_.promote_io_bytes) {
      pieces.push_back({i, at,
                        memory.subspan(at, std::min(options_.promote_io_bytes,
                                                    part.to - at))});
    }
  }
  if (pieces.empty()) {
    AfterUnlock after;
    absl::MutexLock lock(&mu_);
    EndReading(promotion, after);
    return;
  }
  const bool limited = !options_.promote_rate.steps.empty();
  for (const Piece& piece : pieces) {
    const Level level = promotion->parts[piece.part].from_level;
    const auto read = [this, promotion, piece, level,
                       from = promotion->parts[piece.part].source] {
      tiers_[Raw(level)]->Read(
          from, piece.offset, piece.into,
          Guard([this, promotion, i = piece.part](Status status) {
            OnPieceRead(promotion, i, status);
          }));
    };
    if (!limited || level != Level::kDurable) {
      read();
      continue;
    }
    absl::Time when;
    {
      absl::MutexLock lock(&mu_);
      when = promote_limit_.Finish(piece.into.size(), Now());
    }
    executor_.PostAt(when, Lifeline::Guard<>(lifeline_, Task(read)));
  }
}

void EngineImpl::OnPieceRead(std::shared_ptr<Promotion> promotion, size_t part,
                             const Status& status) {
  {
    absl::MutexLock lock(&mu_);
    promotion->parts[part].status.Update(status);
    if (--promotion->parts[part].reads_left > 0) return;
  }
  Post([this, promotion, part] { CheckPromoted(promotion, part); });
}

void EngineImpl::CheckPromoted(std::shared_ptr<Promotion> promotion,
                               size_t index) {
  Promotion::Part& part = promotion->parts[index];  // nobody else's by now
  if (promotion->by_layer) {
    CheckLayers(part);
  } else if (part.status.ok()) {
    // What is in one plane, or is taken for it, is there with the first.
    const bool whole = part.planes.planes == 1;
    part.status = CheckStoredPlanes(part.expected, dram_.Map(part.dram),
                                    whole ? 0 : promotion->landed,
                                    whole ? kPlanesMax : promotion->reading);
  }
  if (!part.status.ok() && part.from_level == Level::kDevice) LookAtDevice();
  if (part.status.ok() && part.from_level == Level::kPeer) {
    const ByteSpan memory = dram_.Map(part.dram).first(part.to);
    if (const auto front = ParseRecordFront(memory); front.ok()) {
      part.generation = front->meta.generation;
    }
  }
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  if (--promotion->parts_left == 0) EndReading(promotion, after);
}

void EngineImpl::CountReading(Promotion& promotion) {
  promoting_bytes_ -= std::exchange(promotion.bytes, 0);
  for (const Promotion::Part& part : promotion.parts) {
    promotion.bytes += part.to - part.from;
  }
  promoting_bytes_ += promotion.bytes;
}

uint64_t EngineImpl::LayerReadBytes() const {
  return std::min(kLayerReadBytes, options_.promote_io_bytes);
}

uint64_t EngineImpl::FirstReadBytes(const PartShape& shape,
                                    uint64_t record_bytes) const {
  return std::min(
      RoundUp(record_bytes, kPageBytes),
      RoundUp(std::max(LayerReadBytes(), FirstLayerBytes(shape, record_bytes)),
              kPageBytes));
}

void EngineImpl::CheckLayers(Promotion::Part& part) {
  if (!part.status.ok()) return;
  const bool whole = part.to == part.bytes();
  const StatusOr<RecordView> view =
      ParseStoredRecord(part.expected, dram_.Map(part.dram));
  part.next_to = std::min(part.bytes(), part.to + LayerReadBytes());
  if (!view.ok()) {
    // Or the tables have not come yet.
    if (whole) part.status = view.status();
    return;
  }
  const auto end_of = [&](size_t segment) {
    const SegmentEntry entry = view->segment(segment);
    return entry.offset + entry.k_bytes + entry.v_bytes;
  };
  size_t end = part.verified;
  while (end < view->segment_count() && end_of(end) <= part.to) ++end;
  if (end > part.verified || whole) {
    part.status = view->VerifySegments(part.verified, end);
  }
  part.verified = end;
  part.layers = end < view->segment_count() ? part.expected.shape.layer_begin +
                                                  static_cast<uint32_t>(end)
                                            : UINT32_MAX;
  if (end < view->segment_count()) {
    part.next_to = std::min(
        part.bytes(), std::max(part.next_to, RoundUp(end_of(end), kPageBytes)));
  }
}

void EngineImpl::ReadNextLayers(std::shared_ptr<Promotion> promotion,
                                AfterUnlock& after) {
  uint32_t landed = UINT32_MAX;
  for (const Promotion::Part& part : promotion->parts) {
    landed = std::min(landed, part.layers);
  }
  for (const Waiter& waiter : promotion->waiters) {
    if (waiter.layers == nullptr || landed == 0) continue;
    after.Call([gate = waiter.layers, index = waiter.index, landed] {
      gate->Call(index, landed);
    });
  }
  // Parts that are further ahead wait for the others.
  for (Promotion::Part& part : promotion->parts) {
    part.from = part.to;
    if (part.layers <= landed) part.to = std::max(part.to, part.next_to);
  }
  CountReading(*promotion);
  after.Call([this, promotion] { ReadPromotion(promotion); });
}

MissReason EngineImpl::LandPart(Promotion& promotion, Promotion::Part& part,
                                AfterUnlock& after) {
  const ChunkEntry& chunk = chunks_[promotion.chunk];
  PartEntry* entry = chunks_.FindPart(promotion.chunk, part.version);
  if (part.status.ok()) {
    if (chunk.live && entry != nullptr && entry->dram_handle == 0 &&
        entry->checksum == part.expected.checksum) {
      entry->set_dram(part.dram);
      if (part.from_level == Level::kDevice) {
        counters_.unspilled_bytes += part.expected.record_bytes;
        // It moves: two copies of what is in use are of no use.
        LoseCopy(promotion.chunk, *entry, Level::kDevice, after);
        if (options_.write_back == EngineOptions::WriteBack::kOnCommit &&
            entry->writing != PartEntry::Writing::kSettled) {
          QueueWrite(promotion.chunk, *entry);
        }
      }
      if (part.from_level == Level::kPeer) {
        counters_.fetched_bytes += part.expected.record_bytes;
        LoseCopy(promotion.chunk, *entry, Level::kPeer, after);
        // What is saved here later must win against it, should both become
        // durable.
        constexpr uint64_t kMost = uint64_t{1} << 62;
        last_generation_ =
            std::max(last_generation_, std::min(part.generation, kMost));
      }
      // Those of planes that landed before were counted.
      counters_.promoted_bytes += part.expected.record_bytes -
                                  part.PagesOf(promotion.landed) * kPageBytes;
    } else {
      // Replaced meanwhile; who waited for this copy may still read it.
      Retire(promotion.chunk, Level::kDram, part.dram, after);
    }
    return MissReason::kNone;
  }
  Retire(promotion.chunk, Level::kDram, part.dram, after);
  if (!absl::IsDataLoss(part.status)) return MissReason::kUnavailable;
  if (entry != nullptr &&
      chunks_.Copy(promotion.chunk, *entry, part.from_level) == part.source) {
    DropCorrupt(promotion.chunk, part.version, part.from_level, after);
  }
  return MissReason::kCorrupt;
}

MissReason EngineImpl::WhyUseless(const ChunkEntry& chunk) const {
  if (!chunk.live) {
    const MissReason reason = misses_.Find(chunk.space, chunk.id);
    return reason == MissReason::kNeverSeen ? MissReason::kEvicted : reason;
  }
  return chunk.epoch == spaces_[chunk.space].epoch ? MissReason::kNone
                                                   : MissReason::kEpoch;
}

bool EngineImpl::FallBack(Promotion& promotion, AfterUnlock& after) {
  const ChunkIndex index = promotion.chunk;
  bool any = false;
  for (Promotion::Part& part : promotion.parts) {
    // What its readers were told of must not be written to again.
    if (part.status.ok() || part.from_level != Level::kDevice ||
        part.layers > 0) {
      part.from = part.to;
      continue;
    }
    PartEntry* entry = chunks_.FindPart(index, part.version);
    if (absl::IsDataLoss(part.status) && entry != nullptr &&
        chunks_.Copy(index, *entry, Level::kDevice) == part.source) {
      DropCorrupt(index, part.version, Level::kDevice, after);
      entry = chunks_.FindPart(index, part.version);
    }
    if (!chunks_[index].live || entry == nullptr || entry->dram_handle != 0 ||
        entry->durable_handle == 0 ||
        chunks_.DurableFacts(index, *entry).checksum !=
            part.expected.checksum) {
      part.from = part.to;
      continue;
    }
    part.from_level = Level::kDurable;
    part.source = entry->durable();
    part.status = absl::OkStatus();
    part.from = 0;
    part.verified = 0;
    any = true;
  }
  return any;
}

void EngineImpl::EndReading(std::shared_ptr<Promotion> promotion,
                            AfterUnlock& after) {
  const ChunkIndex index = promotion->chunk;
  const bool read =
      std::all_of(promotion->parts.begin(), promotion->parts.end(),
                  [](const Promotion::Part& part) { return part.status.ok(); });
  if (promotion->by_layer && read &&
      WhyUseless(chunks_[index]) == MissReason::kNone &&
      std::any_of(
          promotion->parts.begin(), promotion->parts.end(),
          [](const Promotion::Part& part) { return part.to < part.bytes(); })) {
    ReadNextLayers(promotion, after);
    return;
  }
  if (!read && FallBack(*promotion, after)) {
    CountReading(*promotion);
    after.Call([this, promotion] { ReadPromotion(promotion); });
    return;
  }
  promoting_bytes_ -= std::exchange(promotion->bytes, 0);
  const uint64_t bytes =
      promotion->BytesOf(promotion->landed, promotion->reading);
  const double seconds = absl::ToDoubleSeconds(Now() - promotion->started);
  const auto from = [&](Level level) {
    return std::all_of(promotion->parts.begin(), promotion->parts.end(),
                       [level](const Promotion::Part& part) {
                         return part.from_level == level;
                       });
  };
  for (const Level level : {Level::kDevice, Level::kDurable, Level::kPeer}) {
    if (!read || seconds <= 0 || !from(level)) continue;
    double& speed = speeds_[Raw(level)];
    speed += kSpeedWeight * (static_cast<double>(bytes) / seconds - speed);
  }
  if (!read || promotion->reading >= kPlanesMax ||
      WhyUseless(chunks_[index]) != MissReason::kNone) {
    FinishPromotion(*promotion, after);
    return;
  }
  counters_.promoted_bytes += bytes;
  promotion->landed = std::exchange(promotion->reading, 0);
  std::vector<Waiter>& waiters = promotion->waiters;
  const auto served = std::stable_partition(
      waiters.begin(), waiters.end(),
      [&](const Waiter& waiter) { return waiter.planes > promotion->landed; });
  for (auto waiter = served; waiter != waiters.end(); ++waiter) {
    Answer(*waiter, index, MissReason::kNone, after);
  }
  waiters.erase(served, waiters.end());
  uint8_t wanted = 0;
  for (const Waiter& waiter : waiters) wanted = std::max(wanted, waiter.planes);
  if (wanted > 0) {
    ResumePromotion(promotion, wanted, after);
  } else if (chunks_[index].holds == 0) {
    EndRestingPromotion(index, after);
    ReleaseIfIdle(index, after);
  }
}

void EngineImpl::EndRestingPromotion(ChunkIndex index, AfterUnlock& after) {
  const auto it = promotions_.find(index);
  if (it == promotions_.end() || it->second->reading != 0) return;
  const std::shared_ptr<Promotion> promotion = it->second;
  promotions_.erase(it);
  for (const Promotion::Part& part : promotion->parts) {
    Retire(index, Level::kDram, part.dram, after);
  }
  --chunks_[index].busy;
  if (device_ != nullptr) after.Call([this] { EvictBeyondLimit(); });
}

void EngineImpl::FinishPromotion(Promotion& promotion, AfterUnlock& after) {
  const ChunkIndex index = promotion.chunk;
  promotions_.erase(index);
  const bool all = promotion.reading >= kPlanesMax;
  MissReason reason = MissReason::kNone;
  for (Promotion::Part& part : promotion.parts) {
    if ((!all || part.to < part.bytes()) && part.status.ok()) {
      Retire(index, Level::kDram, part.dram, after);
      continue;
    }
    const MissReason landed = LandPart(promotion, part, after);
    if (reason == MissReason::kNone) reason = landed;
  }
  if (reason == MissReason::kNone) reason = WhyUseless(chunks_[index]);
  Settle(index, MissReason::kCorrupt, after);
  PumpWrites(after);
  for (const Waiter& waiter : promotion.waiters) {
    Answer(waiter, index, reason, after);
  }
  Unbusy(index, after);
  // Its copies were left alone so far.
  if (device_ != nullptr) after.Call([this] { EvictBeyondLimit(); });
}

// REQUIRES: the chunk's slot is kept (it is busy).
void EngineImpl::Answer(const Waiter& waiter, ChunkIndex chunk,
                        MissReason reason, AfterUnlock& after) {
  HoldRecord* hold = holds_.Find(waiter.hold);
  if (hold == nullptr || hold->Owner(waiter.client) == nullptr) return;
  HoldSlot& slot = hold->slots[waiter.index];
  if (slot.chunk == chunk && slot.pending) {
    slot.pending = false;
    slot.reason = reason;
    // Whoever was told of layers may be reading them: until the release.
    if (reason != MissReason::kNone && waiter.layers == nullptr) {
      UnpinSlot(*hold, slot, after);
    }
  }
  after.Call([gate = waiter.gate, index = waiter.index, reason] {
    gate->Call(index, reason);
  });
}

void EngineImpl::AnswerLateWaiters(ChunkIndex chunk, AfterUnlock& after) {
  const auto it = promotions_.find(chunk);
  if (it == promotions_.end()) return;
  const absl::Time now = Now();
  std::vector<Waiter>& waiters = it->second->waiters;
  const auto late = std::stable_partition(
      waiters.begin(), waiters.end(),
      [now](const Waiter& w) { return w.deadline > now; });
  for (auto waiter = late; waiter != waiters.end(); ++waiter) {
    Answer(*waiter, chunk, MissReason::kDeadline, after);
  }
  waiters.erase(late, waiters.end());
}

// ---- Prefetch ----

void EngineImpl::Prefetch(TenantId tenant, const SpaceId& space,
                          std::span<const ChunkId> ids) {
  std::vector<PromotionPlan> plans;
  {
    AfterUnlock after;
    absl::MutexLock lock(&mu_);
    const SpaceRef ref = spaces_.Find(tenant, space);
    if (ref == kNoSpace) return;
    for (const ChunkId& id : ids) {
      Found found = Look(ref, id, Lineage::kUnknown);
      if (found.state == ChunkState::kMiss && peers_ != nullptr) {
        found.chunk = Adopt(ref, id, Lineage::kUnknown, after);
        if (found.chunk != kNoChunk) found.state = ChunkState::kDurable;
      }
      if (found.state != ChunkState::kDurable ||
          promotions_.contains(found.chunk)) {
        continue;
      }
      auto plan = PlanPromotion(found.chunk, /*by_layer=*/false);
      if (!plan.has_value()) {
        ReleaseIfIdle(found.chunk, after);
        break;
      }
      plans.push_back(*std::move(plan));
    }
  }
  bool room = true;
  for (PromotionPlan& plan : plans) {
    room = room && AllocatePlan(plan).ok();
    AfterUnlock after;
    absl::MutexLock lock(&mu_);
    if (room) {
      StartPromotion(plan, kPlanesMax, after);
    } else {
      CancelPlan(plan, after);
    }
  }
}

}  // namespace larder
