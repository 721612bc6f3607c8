#ifndef LARDER_STORE_ENGINE_IMPL_H_
#define LARDER_STORE_ENGINE_IMPL_H_

// The engine's private half. One class, whose methods lie in a file per noun:
//
//   engine.cc           opening, clients, spaces, timers, statistics
//   engine_match.cc     match, lookup, why-miss
//   engine_hold.cc      holds
//   engine_save.cc      reservations and commits
//   engine_admin.cc     list, stat, pin, evict
//   engine_scrub.cc     verification of reported and of all copies
//   placement.cc        what is where: parts come and go, eviction
//   promotion.cc        device and durable tier -> memory
//   write_back.cc       memory -> durable tier, drain
//   spill.cc            memory -> device; its limit, its loss
//   fetch.cc            what other nodes have
//   arrival.cc          waiting for chunks that come part after part
//   recovery.cc         the index from the durable tier; controls
//
// Discipline: everything mutable is guarded by one mutex, under which there is
// no I/O, no copying, no call of a tier that may work and no callback. What a
// method decides to do outside goes into an AfterUnlock declared before the
// lock. Work on the executor and tier callbacks hold no pointers into tables:
// they name a chunk by index and a part by version, and look again.

#include <array>
#include <atomic>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

#include "store/after_unlock.h"
#include "store/callback_gate.h"
#include "store/chunk_table.h"
#include "store/engine.h"
#include "store/expiry_queue.h"
#include "store/hold_table.h"
#include "store/lifeline.h"
#include "store/remembered_misses.h"
#include "store/reservation_table.h"
#include "store/root_contents.h"
#include "store/space_table.h"

namespace larder {

// What a record must be to be the one that the index means. The header's
// checksum binds everything else to it.
struct ExpectedRecord {
  TenantId tenant{};
  SpaceId space;
  ChunkId chunk;
  GroupIndex group{};
  PartShape shape;
  uint64_t record_bytes = 0;
  Checksum checksum;
};
// DataLoss unless `memory` starts with that record, payload included (if
// asked for). Reads every byte: for the executor.
Status CheckStoredRecord(const ExpectedRecord& expected, ByteSpan memory,
                         bool payload, RecordMeta* meta = nullptr);
// The same without the payload; the record as it lies there.
StatusOr<RecordView> ParseStoredRecord(const ExpectedRecord& expected,
                                       ByteSpan memory);
// The same of planes [from, to) of the payload.
Status CheckStoredPlanes(const ExpectedRecord& expected, ByteSpan memory,
                         uint8_t from, uint8_t to, RecordMeta* meta = nullptr);

class EngineImpl final : public Engine {
 public:
  EngineImpl(EngineOptions options, Dependencies dependencies);
  ~EngineImpl() override;

  // Reads what the durable tier kept. Once, before anything else.
  Status Recover() ABSL_LOCKS_EXCLUDED(mu_);
  // Tells the observer what there is; from then on it is told what changes.
  // Once, after Recover.
  void TellAll() ABSL_LOCKS_EXCLUDED(mu_);

  void Drain(absl::AnyInvocable<void(Status) &&> done) override;
  ClientId AddClient(TenantId tenant, HoldRevoked revoked) override;
  void RemoveClient(ClientId client) override;
  StatusOr<SpaceInfo> OpenSpace(TenantId tenant,
                                const SpaceDescriptor& descriptor) override;
  void AdvanceEpoch(TenantId tenant, const SpaceId& space,
                    absl::AnyInvocable<void(StatusOr<Epoch>) &&> done) override;
  std::vector<SpaceInfo> Spaces(TenantId tenant) const override;

  MatchResult Match(const MatchRequest& request) override;
  std::vector<StoredChunk> Describe(TenantId tenant, const SpaceId& space,
                                    std::span<const ChunkId> ids,
                                    Lineage worst) const override
      ABSL_LOCKS_EXCLUDED(mu_);
  bool has_peers() const override { return peers_ != nullptr; }
  void Locate(const MatchRequest& request, absl::Time deadline,
              Task done) override ABSL_LOCKS_EXCLUDED(mu_);
  void Await(const AwaitRequest& request, Arrived arrived) override
      ABSL_LOCKS_EXCLUDED(mu_);
  std::vector<StoredRecords> Records(
      TenantId tenant, const SpaceId& space,
      std::span<const ChunkId> ids) const override ABSL_LOCKS_EXCLUDED(mu_);
  std::vector<ChunkState> Lookup(TenantId tenant, const SpaceId& space,
                                 std::span<const ChunkId> ids) override;
  void Prefetch(TenantId tenant, const SpaceId& space,
                std::span<const ChunkId> ids) override;
  StatusOr<HoldReply> Hold(const HoldRequest& request,
                           HoldProgress progress) override;
  StatusOr<HoldReply> AttachHold(ClientId client, HoldId hold,
                                 HoldProgress progress) override;
  StatusOr<absl::Time> RenewHold(ClientId client, HoldId hold,
                                 absl::Duration ttl) override;
  Status ReleaseHold(ClientId client, HoldId hold) override;
  void ReportCorrupt(ClientId client, HoldId hold, const ChunkId& id) override;

  StatusOr<ReservationId> Reserve(const ReserveRequest& request) override;
  void Commit(CommitRequest request, SaveProgress progress) override;
  StatusOr<MutableByteSpan> ReservedMemory(ClientId client,
                                           ReservationId reservation) override
      ABSL_LOCKS_EXCLUDED(mu_);
  Status Abort(ClientId client, ReservationId reservation) override;

  std::vector<ChunkSummary> List(std::optional<TenantId> tenant,
                                 const std::optional<SpaceId>& space,
                                 const std::optional<ChunkId>& after,
                                 size_t limit) const override;
  StatusOr<ChunkSummary> Stat(std::optional<TenantId> tenant,
                              const ChunkId& id) const override;
  void Inspect(std::optional<TenantId> tenant, const ChunkId& id,
               absl::AnyInvocable<void(StatusOr<ChunkSummary>) &&> done)
      override ABSL_LOCKS_EXCLUDED(mu_);
  Status Pin(std::optional<TenantId> tenant, const ChunkId& id,
             bool pinned) override;
  StatusOr<uint64_t> Evict(std::optional<TenantId> tenant, const ChunkId& id,
                           bool subtree) override;
  StatusOr<uint64_t> EvictSpace(std::optional<TenantId> tenant,
                                const SpaceId& space) override;
  StatusOr<uint64_t> SetTierLimit(TierKind tier, uint64_t bytes) override
      ABSL_LOCKS_EXCLUDED(mu_);
  MissAnswer WhyMiss(TenantId tenant, const SpaceId& space, const ChunkId& id,
                     const Sha256Digest& root_content) const override;
  void Verify(
      TierKind tier,
      absl::AnyInvocable<bool(const VerifyProgress&)> progress) override;

  EngineStats Stats() const override;
  EventLog& Events() override { return events_; }

 private:
  struct ClientRecord {
    TenantId tenant{};
    std::shared_ptr<RevokedGate> revoked;
    std::set<HoldId> holds;
    std::set<ReservationId> reservations;
    uint64_t held_bytes = 0;
    uint64_t reserved_bytes = 0;
  };

  // What is known of one id at this moment.
  struct Found {
    ChunkIndex chunk = kNoChunk;  // unless state is kMiss or kPending
    ChunkState state = ChunkState::kMiss;
    MissReason reason = MissReason::kNone;
  };

  // A promotion that is being prepared: the chunk is kept busy, what it reads
  // first is counted, memory for all of it is found without the lock.
  struct PromotionPlan {
    struct Part {
      uint32_t version = 0;
      uint64_t record_bytes = 0;
      Extent extent;
    };
    ChunkIndex chunk = kNoChunk;
    TenantId tenant{};
    std::vector<Part> parts;
    bool by_layer = false;
    uint64_t bytes = 0;  // in promoting_bytes_
  };
  // One that reads. It brings as many planes as are waited for; then it rests,
  // verified so far, for as long as a hold is on the chunk, and goes on if more
  // are wanted. Only with all planes does the chunk have a copy in memory.
  // Where somebody wants to know of layers, and there is one plane, it reads
  // some layers after the other, without rest.
  struct Waiter {
    HoldId hold{};
    ClientId client{};
    uint32_t index = 0;  // of the slot
    uint8_t planes = 0;  // that it wants
    absl::Time deadline;
    std::shared_ptr<ProgressGate> gate;
    std::shared_ptr<LayersGate> layers;  // null: wants the whole alone
  };
  struct Promotion {
    struct Part {
      uint32_t version = 0;
      Extent dram;
      // Where it is read from: the device, else durable, else a peer.
      Level from_level{};
      Extent source;
      ExpectedRecord expected;
      CopyPlanes planes;  // one where it is brought whole
      size_t reads_left = 0;
      Status status;
      uint64_t from = 0, to = 0;  // what is being read, in bytes
      // By layer:
      uint32_t layers = 0;   // [0, layers) are there, of those it has
      size_t verified = 0;   // segments
      uint64_t next_to = 0;  // one more would be there with so many bytes
      // From a peer:
      uint64_t generation = 0;  // that its header says

      // That hold its first planes.
      uint64_t PagesOf(uint8_t first) const;
      uint64_t bytes() const {
        return RoundUp(expected.record_bytes, kPageBytes);
      }
    };
    ChunkIndex chunk = kNoChunk;
    std::vector<Part> parts;
    size_t parts_left = 0;
    uint64_t bytes = 0;   // in promoting_bytes_
    uint8_t landed = 0;   // planes that are there; kPlanesMax: all
    uint8_t reading = 0;  // ... that are to be there next; 0: it rests
    bool by_layer = false;
    absl::Time started;
    std::vector<Waiter> waiters;

    uint64_t BytesOf(uint8_t from, uint8_t to) const;  // of planes, to be read
  };

  // Somebody who waits for chunks to come.
  struct Awaiting {
    SpaceRef space{};
    std::vector<ChunkId> ids;
    std::vector<GroupMask> groups;
    std::vector<uint32_t> layers;  // that are here
    uint32_t wanted = 0;
    size_t missing = 0;  // ids with fewer layers than wanted
    Arrived arrived;     // null: was told
  };

  struct PlannedSlot {
    HoldSlot slot;
    std::optional<PromotionPlan> plan;
  };
  struct HoldPlan {
    TenantId tenant{};
    SpaceRef space = kNoSpace;
    absl::Time now;
    std::vector<PlannedSlot> slots;
    bool must_allocate = false;
    bool over_budget = false;
  };

  // A commit whose copy is under way.
  struct SaveWork {
    std::shared_ptr<const SpaceDescriptor> descriptor;
    SpaceId space_id;
    Reservation reservation;  // owns the extent until published
    ByteSpan source;
    std::shared_ptr<void> keep_alive;
    SaveHints hints;
    std::shared_ptr<SaveTicket> ticket;
    RecordMeta meta;
    Lineage own_lineage = Lineage::kExact;  // as the client said
  };
  // What the first look under the lock said; if the second one differs, the
  // header is stamped again.
  struct SaveStamp {
    Epoch epoch{};
    Lineage lineage{};
    uint32_t part_version = 0;  // of the part that is there already; 0 = none
    bool operator==(const SaveStamp&) const = default;
  };

  struct WriteJob {
    ChunkIndex chunk = kNoChunk;
    uint32_t version = 0;
    Extent dram;
    ExpectedRecord expected;
    // Set if the record is raw and there is a coder.
    std::shared_ptr<const SpaceDescriptor> descriptor;
  };
  struct EncodedRecord;  // a coded record in memory, for a write

  // A chunk on its way to the device; it is kept busy.
  struct Spill {
    struct Part {
      uint32_t version = 0;
      Extent dram, device;
      ExpectedRecord expected;
      Status status;
    };
    ChunkIndex chunk = kNoChunk;
    TenantId tenant{};
    std::vector<Part> parts;
    size_t parts_left = 0;
    uint64_t bytes = 0;
  };

  struct Control {
    std::string key, value;
    absl::AnyInvocable<void(Status) &&> done;
  };

  // Why nothing could be evicted, for the message.
  struct Obstacles {
    uint64_t held = 0, pinned = 0, busy = 0, unwritten = 0;
    std::string ToString() const;
  };
  class DramEvictable;
  class SpilledEvictable;
  class LowerEvictable;
  struct Scan;
  struct Inspection;
  // Of coded copies, by the part's version and the tier.
  using CopyProfiles =
      absl::flat_hash_map<std::pair<uint32_t, TierKind>, ProfileId>;

  using PartKey = std::pair<ChunkIndex, uint32_t>;
  using SaveKey = std::pair<SpaceRef, ChunkId>;

  // -- engine.cc
  void Post(Task task);
  Tier::Done Guard(Tier::Done done);
  absl::Time Now() const { return clock_.Now(); }
  void Expire(absl::Time when, ExpiryQueue::What what, uint64_t id,
              AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool StillMeans(const ExpiryQueue::Entry& entry)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ArmTimer(AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnTimer() ABSL_LOCKS_EXCLUDED(mu_);
  void OnDue(const ExpiryQueue::Entry& entry, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  ClientRecord* FindClient(ClientId client) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Emit(EventType type, TenantId tenant, const SpaceId& space,
            const ChunkId& chunk, TierKind tier, MissReason reason,
            std::string detail) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EmitChunk(EventType type, const ChunkEntry& chunk, TierKind tier,
                 MissReason reason,
                 std::shared_ptr<const ChunkBlocks> blocks = nullptr)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SweepEpoch(SpaceRef space, uint32_t from) ABSL_LOCKS_EXCLUDED(mu_);
  uint64_t IndexBytes() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  TierKind KindOf(Level level) const { return tiers_[Raw(level)]->kind(); }
  std::optional<Level> LevelOf(TierKind kind) const;
  EvictionPolicy& Policy(Level level) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return *policies_[Raw(level)];
  }

  // -- engine_match.cc
  Found Look(SpaceRef space, const ChunkId& id, Lineage worst) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The space in which a visible root chunk of this content lies, if it is
  // another one.
  std::shared_ptr<const SpaceDescriptor> OtherSpaceOf(
      TenantId tenant, SpaceRef space, const Sha256Digest& content) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DescribeBelow(ChunkIndex index, StoredChunk& out) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TouchPrefix(std::span<const ChunkIndex> prefix, absl::Time now)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Duration LoadEstimate(std::span<const ChunkIndex> prefix,
                              uint64_t peer_bytes) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // -- engine_hold.cc
  Status PlanHold(const HoldRequest& request, HoldPlan& plan,
                  AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  MissReason PlanSlot(const HoldRequest& request, const ChunkId& id,
                      uint64_t budget, HoldPlan& plan, PlannedSlot& planned,
                      AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AllocatePlans(const HoldRequest& request, HoldPlan& plan)
      ABSL_LOCKS_EXCLUDED(mu_);
  StatusOr<HoldReply> FinishHold(const HoldRequest& request, HoldPlan& plan,
                                 HoldProgress progress, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SettlePlans(const HoldRequest& request, HoldPlan& plan,
                   AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AbandonPlan(HoldPlan& plan, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Draw(const HoldRecord& hold, size_t from, bool map, HoldReply& reply)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void WaitFor(HoldRecord& hold, size_t from, ClientId client,
               std::optional<absl::Time> deadline, HoldProgress progress,
               std::shared_ptr<LayersGate> layers, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DrawChunk(const HoldSlot& slot, bool map, HoldReply& reply)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void UnpinSlot(HoldRecord& hold, HoldSlot& slot, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ReleaseOwner(HoldRecord& hold, ClientId client, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Revoke(HoldRecord& hold, MissReason reason, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  StatusOr<HoldRecord*> FindHold(ClientId client, HoldId hold, bool must_own)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Duration HoldTtl(absl::Duration wanted) const;

  // -- engine_save.cc
  const PartEntry* PartThere(SpaceRef space, const ChunkId& id,
                             GroupIndex group, const PartShape& shape,
                             Lineage lineage)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Status CheckReserve(const ReserveRequest& request, Reservation& reservation)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void PendingSave(const Reservation& reservation, int by)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  StatusOr<Reservation*> FindReservation(ClientId client, ReservationId id)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndReservation(const Reservation& reservation, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DropReservation(ReservationId id, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Status StartSave(CommitRequest& request, std::shared_ptr<SaveTicket> ticket,
                   AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RunSave(std::shared_ptr<SaveWork> work) ABSL_LOCKS_EXCLUDED(mu_);
  Status CopyIn(SaveWork& work) ABSL_LOCKS_EXCLUDED(mu_);
  bool TryPublish(SaveWork& work) ABSL_LOCKS_EXCLUDED(mu_);
  StatusOr<SaveStamp> StampOf(const SaveWork& work)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool JoinPresent(SaveWork& work, const SaveStamp& stamp, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AckPresent(SaveWork& work, const ChunkId& id, GroupIndex group,
                  const PartShape& shape, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // To where the save is to go.
  void Deliver(ChunkIndex index, uint32_t version, const SaveWork& work,
               AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Acknowledge(ChunkIndex index, PartEntry& part,
                   std::shared_ptr<SaveTicket> ticket, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  ChunkIndex NewChunk(SpaceRef space, const RecordMeta& meta,
                      const SaveHints& hints)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Publish(SaveWork& work, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RejectSave(SaveWork& work, const Status& status, SaveStage stage,
                  AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndCopy(AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // -- placement.cc
  // After the parts of a chunk changed: puts its summary, the policies, the
  // events (saying `blocks`) and its expiry right, and drops it if nothing is
  // left.
  void Settle(ChunkIndex index, MissReason why, AfterUnlock& after,
              const std::shared_ptr<const ChunkBlocks>& blocks = nullptr)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Summarize(ChunkIndex index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SettlePolicies(ChunkIndex index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  ChunkFeatures FeaturesOf(const ChunkEntry& chunk, Level level) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Drop(ChunkIndex index, MissReason why, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RemovePart(ChunkIndex index, PartEntry* part, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The part is left with its other copies, if it has any.
  void LoseCopy(ChunkIndex index, PartEntry& part, Level level,
                AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // All that the chunk has there goes, and what was only there.
  void LoseCopies(ChunkIndex index, Level level, MissReason why,
                  AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Removes what is left of the groups in `before` that are visible no more.
  void RemoveBroken(ChunkIndex index, GroupMask before, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Frees what nobody finds any more, when nobody reads it any more.
  void Retire(ChunkIndex index, Level level, Extent extent, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Unbusy(ChunkIndex index, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Unhold(ChunkIndex index, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ReleaseIfIdle(ChunkIndex index, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ExpireIncomplete(ChunkIndex index, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  StatusOr<Extent> AllocateDram(TenantId tenant, uint64_t bytes)
      ABSL_LOCKS_EXCLUDED(mu_);
  // In a tier below DRAM.
  StatusOr<Extent> AllocateLower(Level level, TenantId tenant, uint64_t bytes)
      ABSL_LOCKS_EXCLUDED(mu_);
  bool EvictOneFromDram(Obstacles& obstacles, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool DemoteOne(Obstacles& obstacles, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool Clean(const PartEntry& part) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool Clean(ChunkIndex index) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EvictFrom(Level level, ChunkIndex index, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DemoteAhead() ABSL_LOCKS_EXCLUDED(mu_);
  // The copy there is bad: it goes, and what was covered only by it.
  void DropCorrupt(ChunkIndex index, uint32_t version, Level level,
                   AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  ExpectedRecord Expect(ChunkIndex index, const PartEntry& part,
                        const CopyFacts& facts) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // -- promotion.cc
  // nullopt: too much is being read.
  std::optional<PromotionPlan> PlanPromotion(ChunkIndex index, bool by_layer)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  Status AllocatePlan(PromotionPlan& plan) ABSL_LOCKS_EXCLUDED(mu_);
  void CancelPlan(PromotionPlan& plan, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void StartPromotion(PromotionPlan& plan, uint8_t planes, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // REQUIRES: it rests, and has fewer planes.
  void ResumePromotion(std::shared_ptr<Promotion> promotion, uint8_t planes,
                       AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // If there is one: nobody holds the chunk any more. Then ReleaseIfIdle.
  void EndRestingPromotion(ChunkIndex index, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ReadPromotion(std::shared_ptr<Promotion> promotion)
      ABSL_LOCKS_EXCLUDED(mu_);
  void OnPieceRead(std::shared_ptr<Promotion> promotion, size_t part,
                   const Status& status) ABSL_LOCKS_EXCLUDED(mu_);
  void CheckPromoted(std::shared_ptr<Promotion> promotion, size_t part)
      ABSL_LOCKS_EXCLUDED(mu_);
  // What it reads now is what counts as under way.
  void CountReading(Promotion& promotion) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  uint64_t LayerReadBytes() const;
  uint64_t FirstReadBytes(const PartShape& shape, uint64_t record_bytes) const;
  // Verifies the layers that have come with what was read.
  void CheckLayers(Promotion::Part& part) ABSL_LOCKS_EXCLUDED(mu_);
  // Of a promotion by layer, some of which are there: tells, and reads on.
  void ReadNextLayers(std::shared_ptr<Promotion> promotion, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Parts that the device did not give are read from the durable tier instead,
  // where that has the same record. False if there are none.
  bool FallBack(Promotion& promotion, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What was to be read is there, or not.
  void EndReading(std::shared_ptr<Promotion> promotion, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Why a promoted chunk is of no use to who waited for it.
  MissReason WhyUseless(const ChunkEntry& chunk) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FinishPromotion(Promotion& promotion, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  MissReason LandPart(Promotion& promotion, Promotion::Part& part,
                      AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Answer(const Waiter& waiter, ChunkIndex chunk, MissReason reason,
              AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AnswerLateWaiters(ChunkIndex chunk, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // -- write_back.cc
  void QueueWrite(ChunkIndex index, PartEntry& part)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void QueueWrites(ChunkIndex index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Unqueue(PartEntry& part) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void PumpWrites(AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool StartWrite(const PartKey& key, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RunWrite(const WriteJob& job) ABSL_LOCKS_EXCLUDED(mu_);
  StatusOr<std::shared_ptr<const EncodedRecord>> Encode(const WriteJob& job,
                                                        const RecordMeta& meta,
                                                        ByteSpan memory)
      ABSL_LOCKS_EXCLUDED(mu_);
  void FinishWrite(const WriteJob& job, Extent extent, const RecordMeta& meta,
                   const Status& status) ABSL_LOCKS_EXCLUDED(mu_);
  void WriteFailed(const WriteJob& job, PartEntry* part, const Status& status,
                   AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void NoteHealth(const Status& status, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TellWaiters(PartKey key, const Status& status, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void QueueAllUnwritten(uint32_t from) ABSL_LOCKS_EXCLUDED(mu_);
  void CheckDrained(AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // -- spill.cc
  bool WantsSpill(const ChunkEntry& chunk, const PartEntry& part) const;
  // Whether all that should be on the device is, or nothing should.
  bool Spilled(ChunkIndex index) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // From any thread: SpillAhead soon, unless it is going to run anyway.
  void ScheduleSpill();
  void SpillAhead() ABSL_LOCKS_EXCLUDED(mu_);
  void StartSpill(ChunkIndex index, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RunSpill(std::shared_ptr<Spill> spill) ABSL_LOCKS_EXCLUDED(mu_);
  void FinishSpill(std::shared_ptr<Spill> spill) ABSL_LOCKS_EXCLUDED(mu_);
  // After a call of the device failed: is it lost?
  void LookAtDevice() ABSL_LOCKS_EXCLUDED(mu_);
  void SweepDevice(uint32_t from) ABSL_LOCKS_EXCLUDED(mu_);
  void EvictBeyondLimit() ABSL_LOCKS_EXCLUDED(mu_);

  // -- fetch.cc
  // A chunk that is not here becomes one whose parts are at a peer, for as long
  // as something brings it up or waits for it. kNoChunk if none is known to
  // have it, or not in this lineage.
  ChunkIndex Adopt(SpaceRef space, const ChunkId& id, Lineage worst,
                   AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Tells the observer, if what others may know of the chunk has changed since
  // `visible` and `readable` were so.
  void Tell(ChunkIndex index, GroupMask visible, LevelMask readable)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What the header of a part's record says, as Records gives it.
  RecordMeta MetaOf(ChunkIndex index, const PartEntry& part) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  ChunkId AnchorOf(const ChunkEntry& chunk) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // In the index, in a lineage too bad or incomplete though it may be: nothing
  // of it is fetched.
  bool Here(SpaceRef space, const ChunkId& id) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // What others have of the chunks that are missing here: one element per id,
  // or none at all if none is missing.
  void FindAtPeers(SpaceRef space, std::span<const ChunkId> ids,
                   std::span<const ChunkState> states,
                   std::vector<PeerTier::Chunk>& out) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DescribeAtPeer(SpaceRef space, const ChunkId& id, Lineage worst,
                      StoredChunk& out) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // -- arrival.cc
  uint32_t LayersHere(SpaceRef space, const ChunkId& id, GroupMask groups) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The chunk if parts with layers of the hold are in memory, else kNoChunk.
  ChunkIndex LookForLayers(SpaceRef space, const ChunkId& id,
                           const HoldRequest& request) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Something of the chunk is here that was not.
  void TellAwaiting(ChunkIndex index, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Other nodes answered, or its time is over.
  void LookAgain(const std::shared_ptr<Awaiting>& awaiting, bool over)
      ABSL_LOCKS_EXCLUDED(mu_);
  void Forget(const std::shared_ptr<Awaiting>& awaiting, size_t place)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndAwaiting(const std::shared_ptr<Awaiting>& awaiting,
                   AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // -- recovery.cc
  void RecoverSpaces(const std::map<std::string, std::string>& controls)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RecoverPins(const std::map<std::string, std::string>& controls)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void RecoverRecord(const RecordMeta& meta, Extent extent, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void PutControl(std::string key, std::string value, Tier::Done done,
                  AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void PumpControls(AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void StoreSpace(SpaceRef ref, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static std::string PinKey(const Space& space, const ChunkId& id);

  // -- engine_admin.cc
  ChunkSummary Summary(ChunkIndex index,
                       const CopyProfiles* profiles = nullptr) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void EndInspection(Inspection& inspection) ABSL_LOCKS_EXCLUDED(mu_);
  std::vector<ChunkIndex> FindEverywhere(std::optional<TenantId> tenant,
                                         const ChunkId& id) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AddDescendants(std::vector<ChunkIndex>& chunks) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void SetPinned(ChunkIndex index, bool pinned, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // -- engine_scrub.cc
  void CheckReported(ChunkIndex chunk, std::vector<WriteJob> parts)
      ABSL_LOCKS_EXCLUDED(mu_);
  void CountForScan(std::shared_ptr<Scan> scan, uint32_t from)
      ABSL_LOCKS_EXCLUDED(mu_);
  void ScanNext(std::shared_ptr<Scan> scan) ABSL_LOCKS_EXCLUDED(mu_);
  bool PickForScan(Scan& scan) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ScanPart(std::shared_ptr<Scan> scan) ABSL_LOCKS_EXCLUDED(mu_);
  void OnScanRead(std::shared_ptr<Scan> scan, Status status)
      ABSL_LOCKS_EXCLUDED(mu_);
  void EndScanPart(std::shared_ptr<Scan> scan, const Status& status)
      ABSL_LOCKS_EXCLUDED(mu_);

  // Constant after construction.
  const EngineOptions options_;
  Clock& clock_;
  Executor& executor_;
  Executor& encoder_;
  const RecordCoder* const coder_;  // may be null
  MemoryTier& dram_;
  DeviceTier* const device_;       // may be null
  DurableTier* const durable_;     // may be null
  PeerTier* const peers_;          // may be null
  ChunkObserver* const observer_;  // may be null
  ChunkSender* const sender_;      // may be null
  Tier* const tiers_[kLevels];     // the same, by level
  const uint64_t spill_record_max_;
  const std::shared_ptr<Lifeline> lifeline_ = std::make_shared<Lifeline>();

  // Synchronizes itself.
  EventLog events_;

  mutable absl::Mutex mu_;
  // By level; null where there is no tier.
  const std::unique_ptr<EvictionPolicy> policies_[kLevels] ABSL_GUARDED_BY(mu_);
  ChunkTable chunks_ ABSL_GUARDED_BY(mu_);
  SpaceTable spaces_ ABSL_GUARDED_BY(mu_);
  HoldTable holds_ ABSL_GUARDED_BY(mu_);
  ReservationTable reservations_ ABSL_GUARDED_BY(mu_);
  std::map<ClientId, ClientRecord> clients_ ABSL_GUARDED_BY(mu_);
  RememberedMisses misses_ ABSL_GUARDED_BY(mu_);
  RootContents roots_ ABSL_GUARDED_BY(mu_);
  ExpiryQueue expiries_ ABSL_GUARDED_BY(mu_);
  absl::Time armed_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();

  absl::flat_hash_map<ChunkIndex, absl::Time> incomplete_since_
      ABSL_GUARDED_BY(mu_);
  // Saves of known ids that are under way: kPending.
  absl::flat_hash_map<SaveKey, uint32_t> pending_saves_ ABSL_GUARDED_BY(mu_);
  // By what they wait for, and which of their ids that is.
  using Awaited = std::pair<std::shared_ptr<Awaiting>, size_t>;
  absl::flat_hash_map<SaveKey, std::vector<Awaited>> awaited_
      ABSL_GUARDED_BY(mu_);
  // What is not the chunk's any more, but may still be looked at, by level:
  // DRAM by its readers, other records by work that has not asked for the read
  // yet.
  using Retired = std::array<std::vector<Extent>, kLevels>;
  absl::flat_hash_map<ChunkIndex, Retired> retired_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<ChunkIndex, std::shared_ptr<Promotion>> promotions_
      ABSL_GUARDED_BY(mu_);
  uint64_t promoting_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  RateLimit promote_limit_ ABSL_GUARDED_BY(mu_){options_.promote_rate};
  uint64_t reserved_bytes_ ABSL_GUARDED_BY(mu_) = 0;

  std::deque<PartKey> write_queue_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<PartKey, std::vector<std::shared_ptr<SaveTicket>>>
      durable_waiters_ ABSL_GUARDED_BY(mu_);
  uint64_t writing_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t backlog_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  bool degraded_ ABSL_GUARDED_BY(mu_) = false;  // the durable tier refuses
  bool sweeping_unwritten_ ABSL_GUARDED_BY(mu_) = false;
  uint64_t copies_running_ ABSL_GUARDED_BY(mu_) = 0;
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  bool telling_ ABSL_GUARDED_BY(mu_) = false;  // what was recovered was told
  Status drain_status_ ABSL_GUARDED_BY(mu_);
  std::vector<absl::AnyInvocable<void(Status) &&>> drained_
      ABSL_GUARDED_BY(mu_);

  std::atomic<bool> spill_scheduled_{false};
  uint64_t spilling_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  bool device_lost_ ABSL_GUARDED_BY(mu_) = false;

  std::deque<Control> controls_ ABSL_GUARDED_BY(mu_);
  bool control_running_ ABSL_GUARDED_BY(mu_) = false;

  uint64_t last_client_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t last_generation_ ABSL_GUARDED_BY(mu_) = 0;
  uint32_t last_version_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t held_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  double speeds_[kLevels] ABSL_GUARDED_BY(mu_);  // bytes per second
  EngineStats counters_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_STORE_ENGINE_IMPL_H_
