#include <algorithm>
#include <utility>

#include "store/chunk_cover.h"
#include "store/engine_impl.h"

namespace larder {

// ---- Reservations ----

const PartEntry* EngineImpl::PartThere(SpaceRef space, const ChunkId& id,
                                       GroupIndex group, const PartShape& shape,
                                       Lineage lineage) {
  const ChunkIndex index = chunks_.Find(space, id);
  if (index == kNoChunk || chunks_[index].epoch != spaces_[space].epoch) {
    return nullptr;
  }
  const PartEntry* part = chunks_.FindPart(index, group, shape);
  return part != nullptr && part->lineage <= lineage && !part->at_peer
             ? part
             : nullptr;
}

Status EngineImpl::CheckReserve(const ReserveRequest& request,
                                Reservation& reservation) {
  const ClientRecord* client = FindClient(request.client);
  if (client == nullptr) return absl::NotFoundError("no such client");
  if (draining_) return absl::UnavailableError("draining: no saves");
  const SpaceRef space = spaces_.Find(client->tenant, request.space);
  if (space == kNoSpace) return absl::NotFoundError("no such space");
  if (request.epoch.value_or(spaces_[space].epoch) != spaces_[space].epoch) {
    return absl::FailedPreconditionError("the space is of another epoch");
  }
  if (request.id.has_value() &&
      PartThere(space, *request.id, request.group, request.shape,
                request.lineage) != nullptr) {
    ++counters_.commits_present;
    return absl::AlreadyExistsError("the part is there");
  }
  const uint64_t bytes = RoundUp(request.record_bytes, kPageBytes);
  if (bytes > options_.reserved_bytes_per_client -
                  std::min(client->reserved_bytes,
                           options_.reserved_bytes_per_client)) {
    return absl::ResourceExhaustedError(
        "the client's reserved bytes are used up");
  }
  reservation.client = request.client;
  reservation.tenant = client->tenant;
  reservation.space = space;
  reservation.epoch = spaces_[space].epoch;
  reservation.id = request.id;
  reservation.group = request.group;
  reservation.shape = request.shape;
  reservation.lineage = request.lineage;
  return absl::OkStatus();
}

void EngineImpl::PendingSave(const Reservation& reservation, int by) {
  if (!reservation.id.has_value()) return;
  const SaveKey key(reservation.space, *reservation.id);
  uint32_t& count = pending_saves_[key];
  count += static_cast<uint32_t>(by);
  if (count == 0) pending_saves_.erase(key);
}

StatusOr<ReservationId> EngineImpl::Reserve(const ReserveRequest& request) {
  if (request.record_bytes == 0 ||
      request.record_bytes > dram_.MaxExtentBytes()) {
    return absl::InvalidArgumentError(absl::StrCat(
        "a record of ", request.record_bytes,
        " bytes does not fit; the most is ", dram_.MaxExtentBytes()));
  }
  // Counted before memory is found, so that calls at once cannot pass the
  // budget together.
  const uint64_t charge = RoundUp(request.record_bytes, kPageBytes);
  Reservation reservation;
  {
    absl::MutexLock lock(&mu_);
    LARDER_RETURN_IF_ERROR(CheckReserve(request, reservation));
    FindClient(request.client)->reserved_bytes += charge;
  }
  StatusOr<Extent> extent =
      AllocateDram(reservation.tenant, request.record_bytes);
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  ClientRecord* client = FindClient(request.client);
  if (client == nullptr) {
    if (extent.ok()) after.Free(&dram_, *extent);
    return absl::NotFoundError("no such client");
  }
  client->reserved_bytes -= charge;
  if (!extent.ok()) return extent.status();
  reservation.extent = *extent;
  reservation.charged = extent->bytes;
  client->reserved_bytes += extent->bytes;
  reserved_bytes_ += extent->bytes;
  PendingSave(reservation, 1);
  reservation.expires = Now() + options_.reservation_ttl;
  const absl::Time expires = reservation.expires;
  const ReservationId id = reservations_.Insert(std::move(reservation));
  client->reservations.insert(id);
  Expire(expires, ExpiryQueue::What::kReservation, Raw(id), after);
  return id;
}

// Ends a reservation and gives its memory back. Its client may be gone.
void EngineImpl::EndReservation(const Reservation& reservation,
                                AfterUnlock& after) {
  PendingSave(reservation, -1);
  reserved_bytes_ -= reservation.charged;
  if (ClientRecord* client = FindClient(reservation.client)) {
    client->reserved_bytes -= reservation.charged;
  }
  after.Free(&dram_, reservation.extent);
}

void EngineImpl::DropReservation(ReservationId id, AfterUnlock& after) {
  const Reservation reservation = reservations_.Take(id);
  FindClient(reservation.client)->reservations.erase(id);
  EndReservation(reservation, after);
}

StatusOr<Reservation*> EngineImpl::FindReservation(ClientId client,
                                                   ReservationId id) {
  const ClientRecord* record = FindClient(client);
  if (record == nullptr) return absl::NotFoundError("no such client");
  Reservation* reservation = reservations_.Find(id);
  if (reservation == nullptr || reservation->tenant != record->tenant) {
    return absl::NotFoundError("no such reservation");
  }
  if (reservation->client != client) {
    return absl::PermissionDeniedError("the reservation is another client's");
  }
  return reservation;
}

Status EngineImpl::Abort(ClientId client, ReservationId id) {
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  StatusOr<Reservation*> found = FindReservation(client, id);
  if (!found.ok()) return found.status();
  DropReservation(id, after);
  return absl::OkStatus();
}

StatusOr<MutableByteSpan> EngineImpl::ReservedMemory(ClientId client,
                                                     ReservationId id) {
  absl::MutexLock lock(&mu_);
  StatusOr<Reservation*> found = FindReservation(client, id);
  if (!found.ok()) return found.status();
  (*found)->expires = absl::InfiniteFuture();
  return dram_.Map((*found)->extent);
}

// ---- Commit ----

void EngineImpl::Commit(CommitRequest request, SaveProgress progress) {
  auto ticket =
      std::make_shared<SaveTicket>(std::move(progress), request.want_durable,
                                   !request.hints.destination.empty());
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  const Status status = StartSave(request, ticket, after);
  if (status.ok()) return;
  ++counters_.commits_rejected;
  after.Call(
      [ticket, status] { ticket->Fail(SaveStage::kSourceReusable, status); });
}

Status EngineImpl::StartSave(CommitRequest& request,
                             std::shared_ptr<SaveTicket> ticket,
                             AfterUnlock& after) {
  StatusOr<Reservation*> found =
      FindReservation(request.client, request.reservation);
  if (!found.ok()) return found.status();
  const Space& space = spaces_[(*found)->space];
  Status status;
  if (draining_) {
    status = absl::UnavailableError("draining: no saves");
  } else if ((*found)->epoch != space.epoch) {
    status = absl::AbortedError("the space's epoch has advanced");
  } else if (request.record.size() < kRecordHeaderBytes ||
             request.record.size() > (*found)->extent.bytes) {
    status = absl::InvalidArgumentError(
        "the record is not of the size that was reserved");
  }
  if (!status.ok()) {
    DropReservation(request.reservation, after);
    return status;
  }
  auto work = std::make_shared<SaveWork>();
  work->reservation = reservations_.Take(request.reservation);
  FindClient(request.client)->reservations.erase(request.reservation);
  work->descriptor = space.descriptor;
  work->space_id = space.id;
  work->source = request.record;
  work->keep_alive = std::move(request.keep_alive);
  work->hints = request.hints;
  work->ticket = std::move(ticket);
  const Reservation& reserved = work->reservation;
  if (reserved.id.has_value() &&
      PartThere(reserved.space, *reserved.id, reserved.group, reserved.shape,
                reserved.lineage) != nullptr) {
    AckPresent(*work, *reserved.id, reserved.group, reserved.shape, after);
    EndReservation(work->reservation, after);
    after.Call([work] {});  // what it owns of the caller's ends unlocked
    return absl::OkStatus();
  }
  ++copies_running_;
  after.Call([this, work = std::move(work)] {
    Post([this, work] { RunSave(work); });
  });
  return absl::OkStatus();
}

// On the executor: copies, checks, and only then shows it to others.
void EngineImpl::RunSave(std::shared_ptr<SaveWork> work) {
  const Status copied = CopyIn(*work);
  work->source = {};
  work->keep_alive.reset();
  if (!copied.ok()) {
    AfterUnlock after;
    absl::MutexLock lock(&mu_);
    RejectSave(*work, copied, SaveStage::kSourceReusable, after);
    return;
  }
  work->ticket->Reach(SaveStage::kSourceReusable);
  work->reservation.extent =
      dram_.Shrink(work->reservation.extent, work->meta.record_bytes);
  while (!TryPublish(*work)) {
  }
}

Status EngineImpl::CopyIn(SaveWork& work) {
  const Reservation& reserved = work.reservation;
  const MutableByteSpan memory = dram_.Map(reserved.extent);
  StatusOr<RecordMeta> meta =
      work.source.data() == memory.data()
          ? VerifyRecord(memory.first(work.source.size()))
          : CopyRecordVerified(work.source, memory);
  if (!meta.ok()) return meta.status();
  work.meta = *meta;
  work.own_lineage = meta->lineage;
  if (meta->space != work.space_id) {
    return absl::InvalidArgumentError("the record is of another space");
  }
  if (reserved.id.has_value() &&
      (meta->chunk != *reserved.id || meta->group != reserved.group ||
       meta->shape != reserved.shape)) {
    return absl::InvalidArgumentError("the record is not what was reserved");
  }
  if (meta->record_bytes > reserved.extent.bytes) {
    return absl::InvalidArgumentError("the record is larger than reserved");
  }
  StatusOr<RecordView> view =
      RecordView::Parse(memory.first(meta->record_bytes));
  if (!view.ok()) return view.status();
  return CheckGeometry(*work.descriptor, *meta, &*view);
}

// False if somebody else was quicker between stamping and publishing.
bool EngineImpl::TryPublish(SaveWork& work) {
  SaveStamp stamp;
  {
    AfterUnlock after;
    absl::MutexLock lock(&mu_);
    StatusOr<SaveStamp> looked = StampOf(work);
    if (!looked.ok()) {
      RejectSave(work, looked.status(), SaveStage::kVolatile, after);
      return true;
    }
    if (JoinPresent(work, *looked, after)) return true;
    stamp = *looked;
    work.meta.tenant = work.reservation.tenant;
    work.meta.epoch = stamp.epoch;
    work.meta.lineage = stamp.lineage;
    work.meta.generation = ++last_generation_;
  }
  RestampRecord(
      dram_.Map(work.reservation.extent).first(work.meta.record_bytes),
      work.meta);
  AfterUnlock after;
  absl::MutexLock lock(&mu_);
  StatusOr<SaveStamp> looked = StampOf(work);
  if (!looked.ok()) {
    RejectSave(work, looked.status(), SaveStage::kVolatile, after);
    return true;
  }
  if (*looked != stamp) return false;
  Publish(work, after);
  return true;
}

// What the record must say of itself if it were published now; or why it
// cannot be.
StatusOr<EngineImpl::SaveStamp> EngineImpl::StampOf(const SaveWork& work) {
  const Reservation& reserved = work.reservation;
  const RecordMeta& meta = work.meta;
  if (FindClient(reserved.client) == nullptr) {
    return absl::CancelledError("the writer is gone");
  }
  const Space& space = spaces_[reserved.space];
  if (reserved.epoch != space.epoch) {
    return absl::AbortedError("the space's epoch has advanced");
  }
  SaveStamp stamp;
  stamp.epoch = space.epoch;
  stamp.lineage = work.own_lineage;
  if (!meta.parent.IsZero()) {
    const ChunkIndex parent = chunks_.Find(reserved.space, meta.parent);
    if (parent != kNoChunk && chunks_[parent].epoch == space.epoch) {
      if (chunks_[parent].is_tail) {
        return absl::FailedPreconditionError("a tail cannot be a parent");
      }
      stamp.lineage = std::max(stamp.lineage, chunks_[parent].lineage);
    }
  }
  const ChunkIndex index = chunks_.Find(reserved.space, meta.chunk);
  if (index == kNoChunk || chunks_[index].epoch != space.epoch) return stamp;
  LARDER_RETURN_IF_ERROR(
      CheckJoins(chunks_[index], chunks_.Parts(index), meta));
  if (const PartEntry* part = chunks_.FindPart(index, meta.group, meta.shape)) {
    stamp.part_version = part->version;
  }
  return stamp;
}

// If the part is there in a lineage no worse: the first writer has won, and
// this one succeeds with it.
bool EngineImpl::JoinPresent(SaveWork& work, const SaveStamp& stamp,
                             AfterUnlock& after) {
  const RecordMeta& meta = work.meta;
  if (stamp.part_version == 0 ||
      PartThere(work.reservation.space, meta.chunk, meta.group, meta.shape,
                stamp.lineage) == nullptr) {
    return false;
  }
  AckPresent(work, meta.chunk, meta.group, meta.shape, after);
  EndReservation(work.reservation, after);
  EndCopy(after);
  return true;
}

void EngineImpl::AckPresent(SaveWork& work, const ChunkId& id, GroupIndex group,
                            const PartShape& shape, AfterUnlock& after) {
  ++counters_.commits_present;
  const ChunkIndex index = chunks_.Find(work.reservation.space, id);
  PartEntry* const part = chunks_.FindPart(index, group, shape);
  const uint32_t version = part->version;
  Acknowledge(index, *part, work.ticket, after);
  Deliver(index, version, work, after);
}

void EngineImpl::Deliver(ChunkIndex index, uint32_t version,
                         const SaveWork& work, AfterUnlock& after) {
  const std::string& destination = work.hints.destination;
  if (destination.empty()) return;
  const PartEntry* part = chunks_.FindPart(index, version);
  Status refused;
  if (sender_ == nullptr) {
    refused = absl::FailedPreconditionError(
        "this larderd is in no cluster, so that it cannot send to a node");
  } else if (part == nullptr) {
    refused = absl::AbortedError("the part went before it was sent");
  }
  if (!refused.ok()) {
    after.Call([ticket = work.ticket, refused] { ticket->Deliver(refused); });
    return;
  }
  after.Call([this, destination, meta = MetaOf(index, *part),
              descriptor = spaces_[chunks_[index].space].descriptor,
              ticket = work.ticket] {
    sender_->Send(destination, *descriptor, meta,
                  [ticket](const Status& status) { ticket->Deliver(status); });
  });
}

// The part is in a tier; and on its way to the durable one, if anybody wants.
void EngineImpl::Acknowledge(ChunkIndex index, PartEntry& part,
                             std::shared_ptr<SaveTicket> ticket,
                             AfterUnlock& after) {
  const bool on_commit =
      options_.write_back == EngineOptions::WriteBack::kOnCommit || draining_;
  if (durable_ != nullptr && (on_commit || ticket->want_durable()) &&
      part.writing != PartEntry::Writing::kSettled) {
    QueueWrite(index, part);
  }
  after.Call([ticket] { ticket->Reach(SaveStage::kVolatile); });
  if (!ticket->want_durable()) {
    PumpWrites(after);
    return;
  }
  if (!part.unwritten()) {
    after.Call([ticket] { ticket->Reach(SaveStage::kDurable); });
  } else if (durable_ == nullptr) {
    after.Call([ticket] {
      ticket->Fail(SaveStage::kDurable,
                   absl::FailedPreconditionError("there is no durable tier"));
    });
  } else {
    part.wanted_durable = true;
    QueueWrite(index, part);
    durable_waiters_[{index, part.version}].push_back(std::move(ticket));
  }
  PumpWrites(after);
}

ChunkIndex EngineImpl::NewChunk(SpaceRef space, const RecordMeta& meta,
                                const SaveHints& hints) {
  const ChunkIndex index = chunks_.Insert(space, meta.chunk);
  chunks_.ReserveParts(
      index, ExpectedParts(*spaces_[space].descriptor, meta.group, meta.shape));
  ChunkEntry& chunk = chunks_[index];
  chunk.parent = meta.parent;
  chunk.epoch = ChunkEpoch(spaces_[space].epoch);
  chunk.used_ns = absl::ToUnixNanos(Now());
  chunk.token_begin = meta.token_begin;
  chunk.token_count = meta.token_count;
  chunk.is_tail = meta.is_tail;
  chunk.priority = hints.priority;
  chunk.stop_reason = hints.stop_reason;
  if (!meta.root_content.IsZero() && meta.parent.IsZero()) {
    roots_.Add(meta.tenant, meta.root_content, index);
    chunk.rooted = true;
  }
  return index;
}

void EngineImpl::Publish(SaveWork& work, AfterUnlock& after) {
  const Reservation& reserved = work.reservation;
  const RecordMeta& meta = work.meta;
  ChunkIndex index = chunks_.Find(reserved.space, meta.chunk);
  if (index != kNoChunk && chunks_[index].epoch != reserved.epoch) {
    Drop(index, MissReason::kEpoch, after);
    index = kNoChunk;
  }
  if (index == kNoChunk) {
    index = NewChunk(reserved.space, meta, work.hints);
    chunks_[index].bytes = meta.record_bytes;
    const EvictionPolicy& policy = Policy(Level::kDram);
    if (!Policy(Level::kDram).Admit(FeaturesOf(chunks_[index], Level::kDram))) {
      Drop(index, MissReason::kEvicted, after);
      RejectSave(
          work,
          absl::ResourceExhaustedError(absl::StrCat(
              "not admitted by policy ",
              absl::string_view(policy.name().data(), policy.name().size()))),
          SaveStage::kVolatile, after);
      return;
    }
  }
  PartEntry* part = chunks_.FindPart(index, meta.group, meta.shape);
  std::vector<std::shared_ptr<SaveTicket>> waiters;
  Extent outdated;  // durable; stays until the better one is
  CopyFacts outdated_facts;
  CopyPlanes outdated_planes;
  if (part != nullptr) {  // a worse one; who waits for it gets the better one
    if (const auto it = durable_waiters_.find({index, part->version});
        it != durable_waiters_.end()) {
      waiters = std::move(it->second);
      durable_waiters_.erase(it);
    }
    outdated = part->durable();
    outdated_facts = chunks_.DurableFacts(index, *part);
    outdated_planes = chunks_.DurablePlanes(index, *part);
    chunks_.DropCopy(index, *part, Level::kDurable);
    RemovePart(index, part, after);
  }
  part = &chunks_.AddPart(index);
  part->set_facts(FactsOf(meta));
  part->shape = meta.shape;
  part->group = meta.group;
  part->version = ++last_version_;
  part->set_dram(reserved.extent);
  if (outdated) {
    chunks_.SetDurableCopy(index, *part, outdated, outdated_facts,
                           outdated_planes);
    part->durable_outdated = true;
  }
  const uint32_t version = part->version;
  if (!waiters.empty()) {
    part->wanted_durable = true;
    QueueWrite(index, *part);
    durable_waiters_.emplace(PartKey(index, version), std::move(waiters));
  }
  Settle(index, MissReason::kNone, after, work.hints.blocks);
  ++counters_.commits;
  counters_.saved_bytes += meta.record_bytes;
  Acknowledge(index, *chunks_.FindPart(index, version), work.ticket, after);
  Deliver(index, version, work, after);
  if (options_.write_back == EngineOptions::WriteBack::kOnEvict &&
      durable_ != nullptr) {
    after.Call([this] { DemoteAhead(); });
  }
  work.reservation.extent = {};  // it is the chunk's now
  EndReservation(work.reservation, after);
  EndCopy(after);
}

void EngineImpl::RejectSave(SaveWork& work, const Status& status,
                            SaveStage stage, AfterUnlock& after) {
  ++counters_.commits_rejected;
  const Reservation& reserved = work.reservation;
  Emit(EventType::kSaveRejected, reserved.tenant, work.space_id,
       work.meta.chunk, TierKind::kNone, MissReason::kNone,
       std::string(status.message()));
  after.Call(
      [ticket = work.ticket, stage, status] { ticket->Fail(stage, status); });
  EndReservation(reserved, after);
  EndCopy(after);
}

void EngineImpl::EndCopy(AfterUnlock& after) {
  --copies_running_;
  CheckDrained(after);
}

}  // namespace larder
