#include <algorithm>
#include <utility>

#include "store/engine_impl.h"

namespace larder {

// A hold is made in up to three steps. Under the lock: what is there is pinned
// at once, so that nothing of it goes while room is made. Without the lock:
// memory for what must come up. Under the lock again: the promotions start and
// the hold comes into being. If all is in memory, the second is left out.

absl::Duration EngineImpl::HoldTtl(absl::Duration wanted) const {
  if (wanted <= absl::ZeroDuration()) return options_.hold_ttl;
  return std::min(wanted, options_.hold_ttl_max);
}

StatusOr<HoldRecord*> EngineImpl::FindHold(ClientId client, HoldId id,
                                           bool must_own) {
  ClientRecord* const record = FindClient(client);
  if (record == nullptr) return absl::NotFoundError("no such client");
  HoldRecord* hold = holds_.Find(id);
  if (hold == nullptr || hold->tenant != record->tenant) {
    return absl::NotFoundError("no such hold");
  }
  if (must_own && hold->Owner(client) == nullptr) {
    return absl::PermissionDeniedError("the hold is another client's");
  }
  return hold;
}

Status EngineImpl::PlanHold(const HoldRequest& request, HoldPlan& plan,
                            AfterUnlock& after) {
  const ClientRecord* client = FindClient(request.client);
  if (client == nullptr) return absl::NotFoundError("no such client");
  plan.tenant = client->tenant;
  plan.space = spaces_.Find(client->tenant, request.space);
  plan.now = Now();
  if (plan.space == kNoSpace) return absl::NotFoundError("no such space");
  if (request.extend != HoldId{}) {
    StatusOr<HoldRecord*> hold = FindHold(request.client, request.extend, true);
    if (!hold.ok()) return hold.status();
    if ((*hold)->space != plan.space) {
      return absl::InvalidArgumentError("the hold is of another space");
    }
    if ((*hold)->revoked != MissReason::kNone) {
      return absl::FailedPreconditionError("the hold was revoked");
    }
  } else if (client->holds.size() >= options_.holds_per_client) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "a client may have ", options_.holds_per_client, " holds"));
  }
  uint64_t budget =
      options_.held_bytes_per_client -
      std::min(client->held_bytes, options_.held_bytes_per_client);
  MissReason stopped = MissReason::kNone;
  plan.slots.reserve(request.ids.size());
  for (const ChunkId& id : request.ids) {
    PlannedSlot& planned = plan.slots.emplace_back();
    if (stopped != MissReason::kNone) {
      planned.slot.reason = stopped;
      continue;
    }
    const MissReason reason =
        PlanSlot(request, id, budget, plan, planned, after);
    planned.slot.reason = reason;
    budget -= planned.slot.bytes;
    if (reason != MissReason::kNone && request.prefix_only) stopped = reason;
  }
  return absl::OkStatus();
}

MissReason EngineImpl::PlanSlot(const HoldRequest& request, const ChunkId& id,
                                uint64_t budget, HoldPlan& plan,
                                PlannedSlot& planned, AfterUnlock& after) {
  Found found = Look(plan.space, id, request.worst_lineage);
  if (found.state == ChunkState::kMiss && peers_ != nullptr && request.peers) {
    found.chunk = Adopt(plan.space, id, request.worst_lineage, after);
    found.state = ChunkState::kDurable;
  }
  if (found.state == ChunkState::kPending && request.layer_end < UINT16_MAX) {
    found.chunk = LookForLayers(plan.space, id, request);
    planned.slot.incomplete = found.chunk != kNoChunk;
  }
  if (found.chunk == kNoChunk) return found.reason;
  ChunkEntry& chunk = chunks_[found.chunk];
  if (chunk.bytes > budget) {
    plan.over_budget = true;
    ReleaseIfIdle(found.chunk, after);
    return MissReason::kBusy;
  }
  const uint8_t planes = request.planes == 0 ? kPlanesMax : request.planes;
  bool must_read = found.state == ChunkState::kDurable;
  if (must_read) {
    const auto it = promotions_.find(found.chunk);
    if (it == promotions_.end()) {
      planned.plan =
          PlanPromotion(found.chunk, request.layers_landed != nullptr);
      if (!planned.plan.has_value()) {
        ReleaseIfIdle(found.chunk, after);
        return MissReason::kBusy;
      }
      plan.must_allocate = true;
    } else {
      must_read = it->second->landed < planes;
    }
  }
  if (must_read && request.deadline <= plan.now) {
    return MissReason::kDeadline;  // comes up all the same, for the next one
  }
  ++chunk.holds;
  chunk.used_ns = absl::ToUnixNanos(plan.now);
  planned.slot.chunk = found.chunk;
  planned.slot.pending = must_read;
  planned.slot.planes = planes;
  planned.slot.layer_begin = request.layer_begin;
  planned.slot.layer_end = request.layer_end;
  planned.slot.bytes = chunk.bytes;
  return MissReason::kNone;
}

void EngineImpl::AllocatePlans(const HoldRequest& request, HoldPlan& plan) {
  for (PlannedSlot& planned : plan.slots) {
    if (!planned.plan.has_value()) continue;
    if (!AllocatePlan(*planned.plan).ok()) {
      planned.slot.reason = MissReason::kBusy;
      if (request.prefix_only) return;
    }
  }
}

// Starts what got its memory; lets go of the rest and, for a prefix, of all
// that comes after the first that cannot be had.
void EngineImpl::SettlePlans(const HoldRequest& request, HoldPlan& plan,
                             AfterUnlock& after) {
  MissReason stopped = MissReason::kNone;
  for (PlannedSlot& planned : plan.slots) {
    HoldSlot& slot = planned.slot;
    if (planned.plan.has_value()) {
      if (slot.reason == MissReason::kBusy || stopped != MissReason::kNone) {
        CancelPlan(*planned.plan, after);
      } else {
        StartPromotion(*planned.plan, slot.planes, after);
      }
      planned.plan.reset();
    }
    if (slot.reason == MissReason::kNone) slot.reason = stopped;
    if (slot.chunk != kNoChunk && slot.reason == MissReason::kNone) {
      const ChunkEntry& chunk = chunks_[slot.chunk];
      if (!chunk.live) {
        slot.reason = misses_.Find(chunk.space, chunk.id);
      } else if (chunk.epoch != spaces_[chunk.space].epoch) {
        slot.reason = MissReason::kEpoch;
      } else if (chunk.lineage > request.worst_lineage) {
        // Its best copy went while room was made.
        slot.reason = MissReason::kLineage;
      }
    }
    if (slot.chunk != kNoChunk && slot.reason == MissReason::kNone) {
      const auto it = promotions_.find(slot.chunk);
      slot.pending =
          it != promotions_.end() && it->second->landed < slot.planes;
      // Its promotion failed, or it was evicted, while room was made.
      if (it == promotions_.end() && !slot.incomplete &&
          !chunks_[slot.chunk].Readable(Level::kDram)) {
        slot.reason = MissReason::kBusy;
      }
      if (slot.pending && it->second->reading == 0) {
        ResumePromotion(it->second, slot.planes, after);
      }
    }
    if (slot.chunk != kNoChunk && slot.reason != MissReason::kNone) {
      const ChunkIndex chunk = std::exchange(slot.chunk, kNoChunk);
      slot.pending = false;
      slot.bytes = 0;
      Unhold(chunk, after);
    }
    if (slot.reason != MissReason::kNone && request.prefix_only) {
      stopped = slot.reason;
    }
  }
}

void EngineImpl::AbandonPlan(HoldPlan& plan, AfterUnlock& after) {
  for (PlannedSlot& planned : plan.slots) {
    if (planned.plan.has_value()) CancelPlan(*planned.plan, after);
    if (planned.slot.chunk != kNoChunk) Unhold(planned.slot.chunk, after);
  }
}

StatusOr<HoldReply> EngineImpl::FinishHold(const HoldRequest& request,
                                           HoldPlan& plan,
                                           HoldProgress progress,
                                           AfterUnlock& after) {
  ClientRecord* client = FindClient(request.client);
  HoldRecord* hold = nullptr;
  Status status;
  if (client == nullptr) {
    status = absl::NotFoundError("no such client");
  } else if (request.extend != HoldId{}) {
    hold = holds_.Find(request.extend);
    if (hold == nullptr || hold->Owner(request.client) == nullptr ||
        hold->revoked != MissReason::kNone) {
      status = absl::FailedPreconditionError("the hold was revoked");
    }
  }
  if (!status.ok()) {
    AbandonPlan(plan, after);
    return status;
  }
  SettlePlans(request, plan, after);
  const auto given = static_cast<uint64_t>(std::count_if(
      plan.slots.begin(), plan.slots.end(),
      [](const PlannedSlot& p) { return p.slot.chunk != kNoChunk; }));
  const bool any = given != 0;
  counters_.held_chunks += given;
  counters_.unheld_chunks += request.ids.size() - given;
  HoldReply reply;
  if (!any && plan.over_budget) {
    return absl::ResourceExhaustedError("the client's held bytes are used up");
  }
  if (!any && hold == nullptr) {
    for (const PlannedSlot& planned : plan.slots)
      DrawChunk(planned.slot, false, reply);
    return reply;
  }
  if (hold == nullptr) {
    hold = &holds_.New();
    hold->tenant = plan.tenant;
    hold->space = plan.space;
    hold->owners.push_back({request.client, {}, {}});
    client->holds.insert(hold->id);
  }
  const size_t from = hold->slots.size();
  hold->slots.reserve(from + plan.slots.size());
  uint64_t bytes = 0;
  for (const PlannedSlot& planned : plan.slots) {
    hold->slots.push_back(planned.slot);
    bytes += planned.slot.bytes;
  }
  hold->bytes += bytes;
  held_bytes_ += bytes;
  for (const HoldOwner& owner : hold->owners) {
    FindClient(owner.client)->held_bytes += bytes;
  }
  hold->expires = std::max(hold->expires, plan.now + HoldTtl(request.ttl));
  Expire(hold->expires, ExpiryQueue::What::kHold, Raw(hold->id), after);
  std::shared_ptr<LayersGate> layers;
  if (request.layers_landed != nullptr) {
    layers = std::make_shared<LayersGate>(request.layers_landed);
    hold->Owner(request.client)->layer_gates.push_back(layers);
  }
  WaitFor(*hold, from, request.client, request.deadline, std::move(progress),
          std::move(layers), after);
  std::vector<ChunkIndex> used;
  used.reserve(plan.slots.size());
  for (size_t i = from; i < hold->slots.size(); ++i) {
    used.push_back(hold->slots[i].chunk);
  }
  TouchPrefix(used, plan.now);
  Draw(*hold, from, request.map, reply);
  return reply;
}

// Registers the client for what is pending of the slots from `from` on.
void EngineImpl::WaitFor(HoldRecord& hold, size_t from, ClientId client,
                         std::optional<absl::Time> deadline,
                         HoldProgress progress,
                         std::shared_ptr<LayersGate> layers,
                         AfterUnlock& after) {
  std::shared_ptr<ProgressGate> gate;
  for (size_t i = from; i < hold.slots.size(); ++i) {
    const HoldSlot& slot = hold.slots[i];
    if (!slot.pending) continue;
    if (gate == nullptr) {
      gate = std::make_shared<ProgressGate>(std::move(progress));
      hold.Owner(client)->gates.push_back(gate);
    }
    std::vector<Waiter>& waiters = promotions_.at(slot.chunk)->waiters;
    Waiter waiter{hold.id,
                  client,
                  static_cast<uint32_t>(i),
                  slot.planes,
                  absl::InfiniteFuture(),
                  gate,
                  layers};
    if (deadline.has_value()) {
      waiter.deadline = *deadline;
    } else {
      // Who attaches waits as long as who made the hold.
      for (const Waiter& other : waiters) {
        if (other.hold == hold.id && other.index == i) {
          waiter.deadline = other.deadline;
        }
      }
    }
    Expire(waiter.deadline, ExpiryQueue::What::kWaiters, Raw(slot.chunk),
           after);
    waiters.push_back(std::move(waiter));
  }
}

void EngineImpl::DrawChunk(const HoldSlot& slot, bool map, HoldReply& reply) {
  HeldChunk& held = reply.chunks.emplace_back();
  held.reason = slot.reason;
  if (slot.chunk == kNoChunk || slot.reason != MissReason::kNone) return;
  held.state = slot.pending ? ChunkState::kPending : ChunkState::kReady;
  const ChunkEntry& chunk = chunks_[slot.chunk];
  const auto promotion = chunk.Readable(Level::kDram)
                             ? promotions_.end()
                             : promotions_.find(slot.chunk);
  for (const PartEntry& part : chunks_.Parts(slot.chunk)) {
    Extent extent = part.dram();
    uint64_t record_bytes = part.record_bytes;
    Checksum checksum = part.checksum;
    if (!extent && promotion != promotions_.end()) {
      for (const Promotion::Part& promoted : promotion->second->parts) {
        if (promoted.version != part.version) continue;
        extent = promoted.dram;
        record_bytes = promoted.expected.record_bytes;
        checksum = promoted.expected.checksum;
      }
    }
    if (!extent || !(slot.incomplete || chunk.Visible(part.group))) continue;
    if (part.shape.layer_begin >= slot.layer_end ||
        part.shape.layer_begin + part.shape.layer_count <= slot.layer_begin) {
      continue;
    }
    HeldPart& out = held.parts.emplace_back();
    out.group = part.group;
    out.shape = part.shape;
    out.record_bytes = record_bytes;
    out.checksum = checksum;
    out.address = dram_.Address(extent);
    if (map) out.memory = dram_.Map(extent).first(record_bytes);
  }
}

void EngineImpl::Draw(const HoldRecord& hold, size_t from, bool map,
                      HoldReply& reply) {
  reply.hold = hold.id;
  reply.expires = hold.expires;
  reply.chunks.reserve(hold.slots.size() - from);
  for (size_t i = from; i < hold.slots.size(); ++i) {
    DrawChunk(hold.slots[i], map, reply);
  }
}

StatusOr<HoldReply> EngineImpl::Hold(const HoldRequest& request,
                                     HoldProgress progress) {
  HoldPlan plan;
  {
    AfterUnlock after;
    absl::MutexLock lock(&mu_);
    LARDER_RETURN_IF_ERROR(PlanHold(request, plan, after));
    if (!plan.must_allocate) {
      return FinishHold(request, plan, std::move(progress), after);
    }
  }
  AllocatePlans(request, plan);
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  return FinishHold(request, plan, std::move(progress), after);
}

StatusOr<HoldReply> EngineImpl::AttachHold(ClientId client, HoldId id,
                                           HoldProgress progress) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  StatusOr<HoldRecord*> found = FindHold(client, id, false);
  if (!found.ok()) return found.status();
  HoldRecord& hold = **found;
  if (hold.revoked != MissReason::kNone) {
    return absl::FailedPreconditionError("the hold was revoked");
  }
  if (std::any_of(hold.slots.begin(), hold.slots.end(),
                  [](const HoldSlot& s) { return s.planes < kPlanesMax; })) {
    return absl::FailedPreconditionError(
        "a hold of first planes only is not shared");
  }
  if (hold.Owner(client) == nullptr) {
    ClientRecord& record = *FindClient(client);
    if (record.holds.size() >= options_.holds_per_client ||
        hold.bytes >
            options_.held_bytes_per_client -
                std::min(record.held_bytes, options_.held_bytes_per_client)) {
      return absl::ResourceExhaustedError("the client's holds are used up");
    }
    record.holds.insert(id);
    record.held_bytes += hold.bytes;
    hold.owners.push_back({client, {}, {}});
  }
  WaitFor(hold, 0, client, std::nullopt, std::move(progress), nullptr, after);
  HoldReply reply;
  Draw(hold, 0, false, reply);
  return reply;
}

StatusOr<absl::Time> EngineImpl::RenewHold(ClientId client, HoldId id,
                                           absl::Duration ttl) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  StatusOr<HoldRecord*> found = FindHold(client, id, true);
  if (!found.ok()) return found.status();
  HoldRecord& hold = **found;
  if (hold.revoked != MissReason::kNone) {
    return absl::FailedPreconditionError("the hold was revoked");
  }
  // Its entry in the queue finds the new time when it falls due.
  hold.expires = std::max(hold.expires, Now() + HoldTtl(ttl));
  return hold.expires;
}

Status EngineImpl::ReleaseHold(ClientId client, HoldId id) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  StatusOr<HoldRecord*> found = FindHold(client, id, true);
  if (!found.ok()) return found.status();
  ReleaseOwner(**found, client, after);
  return absl::OkStatus();
}

void EngineImpl::UnpinSlot(HoldRecord& hold, HoldSlot& slot,
                           AfterUnlock& after) {
  const ChunkIndex chunk = std::exchange(slot.chunk, kNoChunk);
  hold.bytes -= slot.bytes;
  held_bytes_ -= slot.bytes;
  for (const HoldOwner& owner : hold.owners) {
    FindClient(owner.client)->held_bytes -= slot.bytes;
  }
  slot.bytes = 0;
  Unhold(chunk, after);
}

void EngineImpl::ReleaseOwner(HoldRecord& hold, ClientId client,
                              AfterUnlock& after) {
  const auto owner =
      std::find_if(hold.owners.begin(), hold.owners.end(),
                   [client](const HoldOwner& o) { return o.client == client; });
  for (std::shared_ptr<ProgressGate>& gate : owner->gates) {
    after.Call([gate = std::move(gate)] { gate->Close(); });
  }
  for (std::shared_ptr<LayersGate>& gate : owner->layer_gates) {
    after.Call([gate = std::move(gate)] { gate->Close(); });
  }
  hold.owners.erase(owner);
  ClientRecord& record = *FindClient(client);
  record.holds.erase(hold.id);
  record.held_bytes -= hold.bytes;
  if (!hold.owners.empty()) return;
  for (HoldSlot& slot : hold.slots) {
    if (slot.chunk != kNoChunk) UnpinSlot(hold, slot, after);
  }
  holds_.Erase(hold.id);
}

void EngineImpl::Revoke(HoldRecord& hold, MissReason reason,
                        AfterUnlock& after) {
  if (hold.revoked != MissReason::kNone) return;
  hold.revoked = reason;
  for (const HoldOwner& owner : hold.owners) {
    after.Call([gate = FindClient(owner.client)->revoked, id = hold.id,
                reason] { gate->Call(id, reason); });
  }
}

void EngineImpl::ReportCorrupt(ClientId client, HoldId id,
                               const ChunkId& chunk_id) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  StatusOr<HoldRecord*> found = FindHold(client, id, true);
  if (!found.ok()) return;
  for (const HoldSlot& slot : (*found)->slots) {
    if (slot.chunk == kNoChunk || slot.pending) continue;
    ChunkEntry& chunk = chunks_[slot.chunk];
    if (chunk.id != chunk_id || !chunk.live || chunk.checking) continue;
    chunk.checking = true;
    ++chunk.busy;
    std::vector<WriteJob> parts;
    for (const PartEntry& part : chunks_.Parts(slot.chunk)) {
      if (part.dram_handle == 0) continue;
      parts.push_back({slot.chunk, part.version, part.dram(),
                       Expect(slot.chunk, part, part.facts()), nullptr});
    }
    after.Call([this, chunk = slot.chunk, parts = std::move(parts)]() mutable {
      Post([this, chunk, parts = std::move(parts)]() mutable {
        CheckReported(chunk, std::move(parts));
      });
    });
  }
}

}  // namespace larder
