#include "store/engine.h"

#include <utility>

#include "store/engine_impl.h"

namespace larder {

StatusOr<std::unique_ptr<Engine>> Engine::Open(EngineOptions options,
                                               Dependencies dependencies) {
  if (!options.promote_rate.Moves()) {
    return absl::InvalidArgumentError("engine: promote_rate moves nothing");
  }
  for (const RateSchedule::Step& step : options.promote_rate.steps) {
    if (step.time <= absl::ZeroDuration()) {
      return absl::InvalidArgumentError("engine: promote_rate has empty steps");
    }
  }
  if (dependencies.clock == nullptr || dependencies.executor == nullptr ||
      dependencies.dram == nullptr || dependencies.dram_policy == nullptr ||
      (dependencies.durable != nullptr &&
       dependencies.durable_policy == nullptr) ||
      (dependencies.device != nullptr &&
       dependencies.device_policy == nullptr)) {
    return absl::InvalidArgumentError("engine: a dependency is missing");
  }
  if (options.promote_io_bytes == 0 ||
      options.promote_io_bytes % kPageBytes != 0) {
    return absl::InvalidArgumentError(
        "engine: promote_io_bytes is not a multiple of the page");
  }
  if (options.hold_ttl <= absl::ZeroDuration() ||
      options.hold_ttl_max < options.hold_ttl ||
      options.reservation_ttl <= absl::ZeroDuration() ||
      options.incomplete_ttl <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError("engine: a time to live is absurd");
  }
  auto engine = std::make_unique<EngineImpl>(options, std::move(dependencies));
  LARDER_RETURN_IF_ERROR(engine->Recover());
  engine->TellAll();
  return engine;
}

EngineImpl::EngineImpl(EngineOptions options, Dependencies dependencies)
    : options_(options),
      clock_(*dependencies.clock),
      executor_(*dependencies.executor),
      encoder_(dependencies.encoder != nullptr ? *dependencies.encoder
                                               : *dependencies.executor),
      coder_(dependencies.coder),
      dram_(*dependencies.dram),
      device_(dependencies.device),
      durable_(dependencies.durable),
      peers_(dependencies.peers),
      observer_(dependencies.observer),
      sender_(dependencies.sender),
      tiers_{&dram_, device_, durable_, peers_},
      spill_record_max_(device_ == nullptr ? 0 : device_->MaxExtentBytes()),
      events_(options.event_capacity),
      policies_{std::move(dependencies.dram_policy),
                std::move(dependencies.device_policy),
                std::move(dependencies.durable_policy), nullptr},
      holds_(options.id_seed),
      misses_(options.remembered_misses),
      speeds_{options.dram_bytes_per_second, options.device_bytes_per_second,
              options.durable_bytes_per_second, options.peer_bytes_per_second} {
}

EngineImpl::~EngineImpl() {
  lifeline_->Cut();
}

// ---- Work outside, and time ----

void EngineImpl::Post(Task task) {
  executor_.Post(Lifeline::Guard<>(lifeline_, std::move(task)));
}

Tier::Done EngineImpl::Guard(Tier::Done done) {
  return Lifeline::Guard<Status>(lifeline_, std::move(done));
}

void EngineImpl::Expire(absl::Time when, ExpiryQueue::What what, uint64_t id,
                        AfterUnlock& after) {
  expiries_.Add(when, what, id);
  if (expiries_.WantsPruning()) {
    expiries_.Prune(
        [this](const ExpiryQueue::Entry& entry)
            ABSL_NO_THREAD_SAFETY_ANALYSIS { return StillMeans(entry); });
  }
  ArmTimer(after);
}

bool EngineImpl::StillMeans(const ExpiryQueue::Entry& entry) {
  const ChunkIndex index{static_cast<uint32_t>(entry.id)};
  switch (entry.what) {
    case ExpiryQueue::What::kHold:
      return holds_.Find(HoldId{entry.id}) != nullptr;
    case ExpiryQueue::What::kReservation:
      return reservations_.Find(ReservationId{entry.id}) != nullptr;
    case ExpiryQueue::What::kIncomplete:
      return incomplete_since_.contains(index);
    case ExpiryQueue::What::kWaiters:
      return promotions_.contains(index);
  }
  return false;
}

void EngineImpl::ArmTimer(AfterUnlock& after) {
  const absl::Time next = expiries_.Next();
  if (next >= armed_) return;
  armed_ = next;
  after.Call([this, next] {
    executor_.PostAt(next,
                     Lifeline::Guard<>(lifeline_, Task([this] { OnTimer(); })));
  });
}

void EngineImpl::OnTimer() {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  armed_ = absl::InfiniteFuture();
  const absl::Time now = Now();
  while (const auto due = expiries_.PopDue(now)) OnDue(*due, after);
  ArmTimer(after);
}

void EngineImpl::OnDue(const ExpiryQueue::Entry& entry, AfterUnlock& after) {
  const absl::Time now = Now();
  switch (entry.what) {
    case ExpiryQueue::What::kHold: {
      HoldRecord* hold = holds_.Find(HoldId{entry.id});
      if (hold == nullptr || hold->revoked != MissReason::kNone) return;
      if (hold->expires > now) {
        expiries_.Add(hold->expires, entry.what, entry.id);  // was renewed
        return;
      }
      ++counters_.holds_expired;
      Emit(EventType::kHoldExpired, hold->tenant, spaces_[hold->space].id, {},
           TierKind::kNone, MissReason::kDeadline, "");
      Revoke(*hold, MissReason::kDeadline, after);
      return;
    }
    case ExpiryQueue::What::kReservation: {
      const Reservation* reservation =
          reservations_.Find(ReservationId{entry.id});
      if (reservation != nullptr && reservation->expires <= now) {
        DropReservation(ReservationId{entry.id}, after);
      }
      return;
    }
    case ExpiryQueue::What::kIncomplete:
      ExpireIncomplete(ChunkIndex{static_cast<uint32_t>(entry.id)}, after);
      return;
    case ExpiryQueue::What::kWaiters:
      AnswerLateWaiters(ChunkIndex{static_cast<uint32_t>(entry.id)}, after);
      return;
  }
}

void EngineImpl::Emit(EventType type, TenantId tenant, const SpaceId& space,
                      const ChunkId& chunk, TierKind tier, MissReason reason,
                      std::string detail) {
  Event event;
  event.time = clock_.WallNow();
  event.type = type;
  event.tenant = tenant;
  event.space = space;
  event.chunk = chunk;
  event.tier = tier;
  event.reason = reason;
  event.detail = std::move(detail);
  events_.Publish(std::move(event));
}

std::optional<Level> EngineImpl::LevelOf(TierKind kind) const {
  for (const Level level : kOwnLevels) {
    if (tiers_[Raw(level)] != nullptr && KindOf(level) == kind) return level;
  }
  return std::nullopt;
}

void EngineImpl::EmitChunk(EventType type, const ChunkEntry& chunk,
                           TierKind tier, MissReason reason,
                           std::shared_ptr<const ChunkBlocks> blocks) {
  const Space& space = spaces_[chunk.space];
  Event event;
  event.time = clock_.WallNow();
  event.type = type;
  event.tenant = space.tenant;
  event.space = space.id;
  event.chunk = chunk.id;
  event.tier = tier;
  event.reason = reason;
  event.parent = chunk.parent;
  event.token_count = chunk.token_count;
  event.blocks = std::move(blocks);
  events_.Publish(std::move(event));
}

// ---- Clients ----

EngineImpl::ClientRecord* EngineImpl::FindClient(ClientId client) {
  const auto it = clients_.find(client);
  return it == clients_.end() ? nullptr : &it->second;
}

ClientId EngineImpl::AddClient(TenantId tenant, HoldRevoked revoked) {
  absl::MutexLock lock(&mu_);
  const auto id = ClientId{++last_client_};
  ClientRecord& client = clients_[id];
  client.tenant = tenant;
  client.revoked = std::make_shared<RevokedGate>(std::move(revoked));
  return id;
}

void EngineImpl::RemoveClient(ClientId id) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  ClientRecord* client = FindClient(id);
  if (client == nullptr) return;
  const std::set<HoldId> holds = client->holds;
  for (const HoldId hold : holds) ReleaseOwner(*holds_.Find(hold), id, after);
  const std::set<ReservationId> reservations = client->reservations;
  for (const ReservationId reservation : reservations) {
    DropReservation(reservation, after);
  }
  Emit(EventType::kClientGone, client->tenant, {}, {}, TierKind::kNone,
       MissReason::kNone, absl::StrCat("client ", Raw(id)));
  after.Call([revoked = client->revoked] { revoked->Close(); });
  clients_.erase(id);
}

// ---- Spaces ----

StatusOr<SpaceInfo> EngineImpl::OpenSpace(TenantId tenant,
                                          const SpaceDescriptor& descriptor) {
  LARDER_RETURN_IF_ERROR(Validate(descriptor));
  const SpaceId id = ComputeSpaceId(descriptor);
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  SpaceRef ref = spaces_.Find(tenant, id);
  if (ref == kNoSpace) {
    if (spaces_.CountOf(tenant) >= options_.spaces_per_tenant) {
      return absl::ResourceExhaustedError(absl::StrCat(
          "a tenant may open ", options_.spaces_per_tenant, " spaces"));
    }
    ref = spaces_.Insert(tenant, id, descriptor);
    Emit(EventType::kSpaceOpened, tenant, id, {}, TierKind::kNone,
         MissReason::kNone, descriptor.model_name);
  }
  StoreSpace(ref, after);
  const Space& space = spaces_[ref];
  return SpaceInfo{id, *space.descriptor, space.epoch};
}

std::vector<SpaceInfo> EngineImpl::Spaces(TenantId tenant) const {
  absl::MutexLock lock(&mu_);
  std::vector<SpaceInfo> infos;
  for (uint32_t i = 0; i < spaces_.size(); ++i) {
    const Space& space = spaces_[SpaceRef{i}];
    if (space.tenant != tenant) continue;
    infos.push_back({space.id, *space.descriptor, space.epoch});
  }
  return infos;
}

void EngineImpl::AdvanceEpoch(
    TenantId tenant, const SpaceId& id,
    absl::AnyInvocable<void(StatusOr<Epoch>) &&> done) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  const SpaceRef ref = spaces_.Find(tenant, id);
  if (ref == kNoSpace) {
    after.Call([done = std::move(done)]() mutable {
      std::move(done)(absl::NotFoundError("no such space"));
    });
    return;
  }
  Space& space = spaces_[ref];
  const auto epoch = Epoch{Raw(space.epoch) + 1};
  space.epoch = epoch;
  Emit(EventType::kEpochAdvanced, tenant, id, {}, TierKind::kNone,
       MissReason::kEpoch, absl::StrCat("epoch ", Raw(epoch)));
  holds_.ForEach([&](HoldRecord& hold) ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (hold.space == ref) Revoke(hold, MissReason::kEpoch, after);
  });
  after.Call([this, ref] { Post([this, ref] { SweepEpoch(ref, 0); }); });
  PutControl(
      absl::StrCat("epoch/", absl::Hex(Raw(tenant), absl::kZeroPad8), "/",
                   ToHex(id)),
      absl::StrCat(Raw(epoch)),
      [done = std::move(done), epoch](Status status) mutable {
        if (status.ok()) {
          std::move(done)(epoch);
        } else {
          std::move(done)(Annotate(status, "remembering the epoch"));
        }
      },
      after);
}

// Nothing of an older epoch is found since the advance; this gives its memory
// back, in pieces, so that no call waits.
void EngineImpl::SweepEpoch(SpaceRef ref, uint32_t from) {
  constexpr uint32_t kPiece = 1024;
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  const uint32_t end = std::min(chunks_.slots(), from + kPiece);
  for (uint32_t i = from; i < end; ++i) {
    const ChunkEntry& chunk = chunks_[ChunkIndex{i}];
    if (chunk.live && chunk.space == ref && chunk.epoch != spaces_[ref].epoch) {
      Drop(ChunkIndex{i}, MissReason::kEpoch, after);
    }
  }
  if (end == chunks_.slots()) return;
  after.Call(
      [this, ref, end] { Post([this, ref, end] { SweepEpoch(ref, end); }); });
}

// ---- Statistics ----

uint64_t EngineImpl::IndexBytes() const {
  uint64_t bytes = chunks_.MemoryBytes() + spaces_.MemoryBytes() +
                   misses_.MemoryBytes() + roots_.MemoryBytes();
  for (const auto& policy : policies_) {
    if (policy != nullptr) bytes += policy->MemoryBytes();
  }
  return bytes;
}

EngineStats EngineImpl::Stats() const {
  EngineStats stats;
  {
    absl::MutexLock lock(&mu_);
    stats = counters_;
    stats.chunks = chunks_.live();
    stats.incomplete_chunks = incomplete_since_.size();
    stats.holds = holds_.size();
    stats.held_bytes = held_bytes_;
    stats.reservations = reservations_.size();
    stats.reserved_bytes = reserved_bytes_;
    stats.clients = clients_.size();
    stats.spaces = spaces_.size();
    stats.durable_backlog_bytes = backlog_bytes_;
    stats.spill_backlog_bytes = spilling_bytes_;
    stats.index_bytes = IndexBytes();
  }
  stats.dram = dram_.Usage();
  if (device_ != nullptr) {
    stats.has_device = true;
    stats.device = device_->Usage();
    const Status health = device_->Health();
    if (!health.ok()) stats.device_health = std::string(health.message());
  }
  if (durable_ != nullptr) {
    stats.has_durable = true;
    stats.durable = durable_->Usage();
    stats.writes = durable_->Writes();
    const Status health = durable_->Health();
    if (!health.ok()) stats.durable_health = std::string(health.message());
  }
  return stats;
}

}  // namespace larder
