#ifndef LARDER_STORE_ENGINE_H_
#define LARDER_STORE_ENGINE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/functional/any_invocable.h"
#include "absl/time/time.h"

#include "store/clock.h"
#include "store/events.h"
#include "store/executor.h"
#include "store/hit_rules.h"
#include "store/policy.h"
#include "store/rate_limit.h"
#include "store/record.h"
#include "store/record_coder.h"
#include "store/space.h"
#include "store/status.h"
#include "store/tier.h"
#include "store/types.h"

namespace larder {

struct EngineOptions {
  // One client's budget; the next hold or reservation is ResourceExhausted.
  uint32_t holds_per_client = 4096;
  uint64_t held_bytes_per_client = UINT64_MAX;
  uint64_t reserved_bytes_per_client = UINT64_MAX;

  // A hold without a given time to live, and the most a client may ask for.
  absl::Duration hold_ttl = absl::Seconds(30);
  absl::Duration hold_ttl_max = absl::Minutes(10);
  // A reservation that is never committed, and a chunk that never completes.
  absl::Duration reservation_ttl = absl::Seconds(60);
  absl::Duration incomplete_ttl = absl::Seconds(60);

  // How many ids of chunks that left are remembered, to say why.
  size_t remembered_misses = 1 << 16;
  size_t event_capacity = 1 << 14;

  // kOnCommit: every committed chunk is written to the durable tier in the
  // background, so that leaving DRAM costs nothing and little is lost by a
  // crash. kOnEvict: only when it leaves DRAM or its saver asked for `durable`.
  enum class WriteBack : uint8_t { kOnCommit, kOnEvict };
  WriteBack write_back = WriteBack::kOnCommit;

  // Bytes of durable writes and of promotions under way at most; the rest
  // queues (writes) or is answered kBusy (promotions).
  uint64_t write_back_bytes_in_flight = 256_MiB;
  uint64_t promote_bytes_in_flight = 1_GiB;
  uint64_t promote_io_bytes = 1_MiB;
  // How quickly promotions may read.
  RateSchedule promote_rate;

  // Spaces that one tenant may open; the next is ResourceExhausted.
  uint32_t spaces_per_tenant = 1024;

  // Where hold ids come from: 0 = the kernel's entropy. Anything else makes
  // them a sequence of this seed alone, for simulations; guessable.
  uint64_t id_seed = 0;

  // Bytes on their way from memory to the device at most.
  uint64_t spill_bytes_in_flight = 256_MiB;

  // Measured throughputs for the load estimate of a match, bytes per second;
  // refined while running.
  double dram_bytes_per_second = 10e9;
  double device_bytes_per_second = 8e9;
  double durable_bytes_per_second = 2e9;
  double peer_bytes_per_second = 1e9;
};

// ---- What callers say and get ----

struct SpaceInfo {
  SpaceId id;
  SpaceDescriptor descriptor;
  Epoch epoch{};
};

struct MatchRequest {
  TenantId tenant{};
  SpaceId space;
  std::span<const ChunkId> ids;  // of the prompt, chunk 0 first
  uint32_t start = 0;  // chunks before it are the engine's own already
  Lineage worst_lineage = Lineage::kExact;
  // If given and chunk 0 misses: is it in another space? (ComputeRootContent)
  Sha256Digest root_content;
};

// One byte per chunk of an answer. On wire.
enum class ChunkState : uint8_t {
  kMiss = 0,
  kReady = 1,    // in memory, can be held at once
  kDurable = 2,  // in another tier, will be promoted by a hold or prefetch
  kPending = 3,  // a save of it is under way (or parts are missing still)
  kPeer = 5,     // another node has it; will be fetched by a hold or prefetch
};
// A hold would have it, now or soon.
inline bool IsThere(ChunkState state) {
  return state == ChunkState::kReady || state == ChunkState::kDurable ||
         state == ChunkState::kPeer;
}

struct MatchResult {
  // For every group: how many chunks from `start` on it could serve by its own
  // hit rule; `usable` is the largest prefix that all groups can serve.
  std::vector<uint32_t> group_hits;
  uint32_t usable = 0;
  std::vector<ChunkState> states;         // ids[start..]
  MissReason reason = MissReason::kNone;  // why ids[start+usable] is not served
  std::string detail;            // e.g. the field in which spaces differ
  absl::Duration load_estimate;  // for the usable prefix
  Epoch epoch{};
};

// A chunk as it is now, and what a hold of it would have to wait for.
struct StoredChunk {
  ChunkState state = ChunkState::kMiss;
  MissReason reason = MissReason::kNone;  // kMiss: why
  Lineage lineage = Lineage::kExact;      // of the best copies
  uint32_t token_count = 0;
  uint64_t bytes_to_read = 0;  // from a slower tier; 0 = in memory, or a miss
  // If its parts have progressive planes: with the first i + 1 of them only,
  // what has to be read and what that gives.
  uint8_t planes = 1;
  struct Cut {
    uint64_t bytes_to_read = 0;
    Lineage lineage = Lineage::kExact;
    bool operator==(const Cut&) const = default;
  };
  std::array<Cut, kPlanesMax - 1> cuts{};
};

struct HeldPart {
  ByteSpan memory;  // in this process, if HoldRequest::map
  GroupIndex group{};
  PartShape shape;
  ExtentAddress address;
  uint64_t record_bytes = 0;
  Checksum checksum;  // the record header's: binds what is mapped to this reply
};

struct HeldChunk {
  ChunkState state = ChunkState::kMiss;  // kReady, kPending (promoting), kMiss
  MissReason reason = MissReason::kNone;
  absl::InlinedVector<HeldPart, 1> parts;  // for kReady and kPending
};

struct HoldRequest {
  ClientId client{};
  SpaceId space;
  std::span<const ChunkId> ids;
  // Extend this hold instead of making a new one (0 = new).
  HoldId extend{};
  absl::Duration ttl = absl::ZeroDuration();  // zero = default
  // Promotions that are not done by then are answered kDeadline.
  absl::Time deadline = absl::InfiniteFuture();
  Lineage worst_lineage = Lineage::kExact;
  // Stop at the first chunk that cannot be had (a prefix); otherwise every
  // chunk is tried on its own.
  bool prefix_only = true;
  // Of each chunk only parts with these layers (indices within their groups)
  // are given. Then also those, in memory, of a chunk that is not complete
  // yet; what of the layers they have, their shapes say (Await).
  uint16_t layer_begin = 0;
  uint16_t layer_end = UINT16_MAX;
  // Of chunks that must be brought up: so many planes of coded parts at least,
  // and no more need be valid in what is held. 0: all. Holds of fewer cannot be
  // attached to.
  uint8_t planes = 0;
  // If set: chunks that must be brought up are read layer by layer, the first
  // layers of all of them before the next ones, and this is told how far each
  // is: layers [0, layers) of chunk `index` (as HoldProgress counts) are there
  // and verified, as are headers and tables. A hint, not told of what is
  // brought otherwise; HoldProgress still says when all is there. Called like
  // it.
  std::function<void(uint32_t index, uint32_t layers)> layers_landed;
  // For readers in this process: HeldPart::memory is wanted.
  bool map = false;
  // Whether other nodes are asked for what is missing here (and known to be
  // there).
  bool peers = true;
};

struct HoldReply {
  HoldId hold{};  // 0 if nothing could be held
  absl::Time expires;
  std::vector<HeldChunk> chunks;  // one per id; after a stop: kMiss
};

// Chunks that are being saved, part after part, here or by another node that
// sends them.
struct AwaitRequest {
  TenantId tenant{};
  SpaceId space;
  std::span<const ChunkId> ids;
  // Of each id, the groups that are waited for; 0: nothing of it is.
  std::span<const GroupMask> groups;
  // Layers [0, layers) of these groups; UINT32_MAX: all they have.
  uint32_t layers = UINT32_MAX;
  absl::Time deadline;
};
// Of each id, how many layers of its groups are here, from the first on;
// UINT32_MAX: all.
using Arrived = absl::AnyInvocable<void(std::vector<uint32_t> layers) &&>;

// Called once per kPending chunk of a hold, from any thread, without locks,
// possibly before Hold has returned: `index` counts all ids the hold was asked
// for, misses too, in the order of asking. kNone =
// the extents of the reply now hold the verified chunk. Never called after
// ReleaseHold returned for the last owner.
using HoldProgress =
    absl::AnyInvocable<void(uint32_t index, MissReason reason)>;

// Called when a hold was revoked (expiry, epoch, operator): the reader must
// stop and release. Its memory is not reused before.
using HoldRevoked = absl::AnyInvocable<void(HoldId hold, MissReason reason)>;

struct SaveHints {
  uint8_t priority = 0;
  uint32_t stop_reason = 0;
  // For the event that says that the chunk can be read; may be null. Of a chunk
  // of several parts, that of the last one counts.
  std::shared_ptr<const ChunkBlocks> blocks;
  // A node's name: the part is sent there as soon as it is here (ChunkSender).
  std::string destination;
};

struct ReserveRequest {
  ClientId client{};
  SpaceId space;
  uint64_t record_bytes = 0;  // of the largest record that will be committed
  // If the id is known already and the chunk is there with this part, in a
  // lineage no worse: AlreadyExists, and nothing need be gathered.
  std::optional<ChunkId> id;
  GroupIndex group{};
  PartShape shape;
  Lineage lineage = Lineage::kExact;
  // FailedPrecondition if the space's epoch is another one.
  std::optional<Epoch> epoch;
};

struct CommitRequest {
  ClientId client{};
  ReservationId reservation{};
  // A complete part record in the client's staging memory, which it may be
  // changing: read once, verified on the copy. `keep_alive` owns the mapping.
  // Or where ReservedMemory begins: verified there.
  ByteSpan record;
  std::shared_ptr<void> keep_alive;
  bool want_durable = false;  // false: kDurable is not reported
  SaveHints hints;
};

// What a saver learns, in this order; an error at any stage is the last call.
// Staging may be reused from kSourceReusable on (or from an error on). But
// kDelivered, where there is a destination, comes at any time after kVolatile,
// is never the save's failure, and is left out where kVolatile was. On wire.
enum class SaveStage : uint8_t {
  kSourceReusable = 1,
  kVolatile = 2,   // visible (if complete) and safe from the writer's death
  kDurable = 3,    // survives power loss
  kDelivered = 4,  // SaveHints::destination has it, or the status says why not
};
using SaveProgress = absl::AnyInvocable<void(SaveStage stage, Status status)>;

// Copies of a chunk's parts in one tier that are coded alike.
struct CopySummary {
  TierKind tier{};
  CodecId codec = CodecId::kRaw;
  Lineage lineage = Lineage::kExact;
  // What they were coded with, zeros: no profile. Only Inspect looks for it;
  // without a value it did not, or could not read it.
  std::optional<ProfileId> profile;
  uint32_t parts = 0;
  uint64_t bytes = 0;        // of their records
  uint64_t plain_bytes = 0;  // that the records would have if they were raw
};

struct ChunkSummary {
  TenantId tenant{};
  SpaceId space;
  ChunkId id;
  ChunkId parent;
  uint32_t token_begin = 0;
  uint32_t token_count = 0;
  bool is_tail = false;
  bool complete = false;
  bool pinned = false;
  Lineage lineage = Lineage::kExact;  // of the best copies
  uint32_t holds = 0;
  uint64_t bytes = 0;  // of one copy, the best
  uint32_t parts = 0;
  std::vector<TierKind> tiers;      // where complete copies are
  std::vector<CopySummary> copies;  // of every part, complete or not
  absl::Duration idle;              // since last used
};

struct EngineStats {
  uint64_t chunks = 0, incomplete_chunks = 0, holds = 0, held_bytes = 0;
  uint64_t reservations = 0, reserved_bytes = 0, clients = 0, spaces = 0;
  uint64_t matches = 0, matched_chunks = 0, missed_chunks = 0;
  // Chunks that holds gave, and that they were asked for in vain.
  uint64_t held_chunks = 0, unheld_chunks = 0;
  uint64_t holds_expired = 0;
  uint64_t commits = 0, commits_rejected = 0, commits_present = 0;
  uint64_t saved_bytes = 0, promoted_bytes = 0, demoted_bytes = 0;
  uint64_t fetched_bytes = 0;  // of promoted_bytes: from other nodes
  uint64_t evicted_dram = 0, evicted_durable = 0, corrupt = 0;
  // The device: record bytes moved to it and from it (these are in
  // promoted_bytes too), chunks that left it for others or a lower limit, and
  // chunks that left memory before they could be spilled.
  uint64_t spilled_bytes = 0, unspilled_bytes = 0;
  uint64_t evicted_device = 0, unspilled_evictions = 0;
  uint64_t spill_backlog_bytes = 0;  // on their way
  uint64_t refused_full = 0;
  // Records that were to be encoded for the durable tier: what became smaller
  // (how many, their bytes before and after), and what was stored raw because
  // it would not, because the codec does not take it, because of an error.
  uint64_t encoded_records = 0, encoded_plain_bytes = 0, encoded_bytes = 0;
  uint64_t encode_not_smaller = 0, encode_unsupported = 0, encode_failed = 0;
  double encode_seconds = 0;           // of one core
  uint64_t durable_backlog_bytes = 0;  // accepted, not yet durable
  uint64_t index_bytes = 0;            // memory of the index itself
  TierUsage dram, device, durable;
  DurableTier::WriteCounters writes;
  bool has_device = false;
  std::string device_health;  // empty = well
  bool has_durable = false;
  std::string durable_health;  // empty = well
};

// Told of the chunks that this node has, as they come and go: for those who
// tell other nodes. Called under the engine's lock: must not block, nor call
// the engine.
class ChunkObserver {
 public:
  struct Chunk {
    TenantId tenant{};
    SpaceId space;
    ChunkId id;
    // The chunk of the same prompt whose place is the last multiple of
    // kAnchorSpacing (cluster/chunk_key.h); zero if some parent on the way to
    // it is not known.
    ChunkId anchor;
    Epoch epoch{};
    GroupMask groups = 0;  // that are complete
    Lineage lineage = Lineage::kExact;
    uint32_t token_count = 0;
    uint64_t bytes = 0;
    bool in_memory = false;  // else in a slower tier
    uint8_t priority = 0;
  };
  virtual ~ChunkObserver() = default;
  // It is here, with these facts from now on.
  virtual void OnStored(const Chunk& chunk) = 0;
  virtual void OnRemoved(TenantId tenant, const SpaceId& space,
                         const ChunkId& id) = 0;
};

// Sends chunks to other nodes. Thread-safe.
class ChunkSender {
 public:
  using Done = absl::AnyInvocable<void(Status) &&>;
  virtual ~ChunkSender() = default;
  // Of the record that `meta` names, which this node has, a copy to the node
  // `destination`, soon. `done` once, from any thread, possibly within the
  // call: OK when it has it, in memory; NotFound: there is no such node; or why
  // it does not.
  virtual void Send(const std::string& destination,
                    const SpaceDescriptor& space, const RecordMeta& meta,
                    Done done) = 0;
};

// The heart of Larder: which chunks there are, where, and who may read them.
// Placement DRAM -> device, durable tier and back, holds, reservations,
// lineage, epochs, eviction. Knows media, time and threads only through the
// contracts.
//
// Thread-safe; a metadata call takes one lock for microseconds and never waits
// for I/O or for another client. Data is moved on the executor. Every miss is a
// value with a reason, never an error.
class Engine {
 public:
  struct Dependencies {
    Clock* clock = nullptr;
    Executor* executor = nullptr;  // copies, verification, timers
    Executor* encoder = nullptr;   // encodes; null: executor does
    RecordCoder* coder = nullptr;  // null: the durable tier's copies are raw
    MemoryTier* dram = nullptr;
    DeviceTier* device = nullptr;       // takes what leaves DRAM; may be null
    DurableTier* durable = nullptr;     // may be null
    PeerTier* peers = nullptr;          // null: alone
    ChunkObserver* observer = nullptr;  // told after Open what was recovered
    ChunkSender* sender = nullptr;      // null: no save has a destination
    std::unique_ptr<EvictionPolicy> dram_policy;
    std::unique_ptr<EvictionPolicy> device_policy;
    std::unique_ptr<EvictionPolicy> durable_policy;
  };

  // Recovers the durable tier. What is passed by pointer must outlive the
  // engine; the engine must be destroyed before its executor stops.
  static StatusOr<std::unique_ptr<Engine>> Open(EngineOptions options,
                                                Dependencies dependencies);
  virtual ~Engine() = default;

  // Stops accepting saves, makes every committed chunk durable if there is a
  // durable tier, then calls `done`. Matches and holds keep working.
  virtual void Drain(absl::AnyInvocable<void(Status) &&> done) = 0;

  // -- Clients. Everything a client holds or reserved is given back by
  // RemoveClient: holds it shares live on with the others.
  virtual ClientId AddClient(TenantId tenant, HoldRevoked revoked) = 0;
  virtual void RemoveClient(ClientId client) = 0;

  // -- Spaces. Opening is idempotent. InvalidArgument names the field that is
  // missing or absurd.
  virtual StatusOr<SpaceInfo> OpenSpace(TenantId tenant,
                                        const SpaceDescriptor& descriptor) = 0;
  // Weights changed: from the return on nothing older matches, holds on it are
  // revoked, and saves begun before are refused. Durable before `done`.
  virtual void AdvanceEpoch(
      TenantId tenant, const SpaceId& space,
      absl::AnyInvocable<void(StatusOr<Epoch>) &&> done) = 0;
  virtual std::vector<SpaceInfo> Spaces(TenantId tenant) const = 0;

  // -- Reading.
  virtual MatchResult Match(const MatchRequest& request) = 0;
  // Whether there are other nodes to be asked (Dependencies::peers).
  virtual bool has_peers() const = 0;
  // Asks them for what Match(request) misses: when `done` is called, it knows
  // what they have. Once, by `deadline`, from any thread, possibly within the
  // call; or never, if the engine goes before.
  virtual void Locate(const MatchRequest& request, absl::Time deadline,
                      Task done) = 0;
  // Presence alone, for engines that ask about unrelated keys.
  virtual std::vector<ChunkState> Lookup(TenantId tenant, const SpaceId& space,
                                         std::span<const ChunkId> ids) = 0;
  // One element per id; copies worse than `worst` are a miss.
  virtual std::vector<StoredChunk> Describe(TenantId tenant,
                                            const SpaceId& space,
                                            std::span<const ChunkId> ids,
                                            Lineage worst) const = 0;
  // The records that a hold would give of each chunk, for nodes that ask;
  // empty where it is a miss. Of what their headers say, generation and
  // root_content are left out.
  struct StoredRecords {
    GroupMask groups = 0;
    std::vector<RecordMeta> parts;
  };
  virtual std::vector<StoredRecords> Records(
      TenantId tenant, const SpaceId& space,
      std::span<const ChunkId> ids) const = 0;
  // Waits until all that was asked for is here: whole chunks in any tier, or
  // known to be at another node, parts of others in memory. Then, or at the
  // deadline, `arrived` is told what is; once, from any thread, possibly within
  // the call; or never, if the engine goes before.
  virtual void Await(const AwaitRequest& request, Arrived arrived) = 0;
  // Brings chunks up to memory without holding them. Best effort.
  virtual void Prefetch(TenantId tenant, const SpaceId& space,
                        std::span<const ChunkId> ids) = 0;
  virtual StatusOr<HoldReply> Hold(const HoldRequest& request,
                                   HoldProgress progress) = 0;
  // A second process of the same tenant joins; it must release or die too.
  // Returns what Hold returned (pending chunks report to `progress`).
  virtual StatusOr<HoldReply> AttachHold(ClientId client, HoldId hold,
                                         HoldProgress progress) = 0;
  // FailedPrecondition if it was revoked: stop reading and release.
  virtual StatusOr<absl::Time> RenewHold(ClientId client, HoldId hold,
                                         absl::Duration ttl) = 0;
  virtual Status ReleaseHold(ClientId client, HoldId hold) = 0;
  // A consumer found that a held part's bytes do not match their checksums:
  // the copy is checked again and dropped if that is true.
  virtual void ReportCorrupt(ClientId client, HoldId hold,
                             const ChunkId& id) = 0;

  // -- Saving.
  virtual StatusOr<ReservationId> Reserve(const ReserveRequest& request) = 0;
  // Returns at once; the copy runs on the executor. `progress` is called as
  // SaveStage says. Atomic and idempotent: committing what is there already
  // succeeds. Consumes the reservation whatever happens.
  virtual void Commit(CommitRequest request, SaveProgress progress) = 0;
  virtual Status Abort(ClientId client, ReservationId reservation) = 0;
  // For who writes in this process: what was reserved, to be filled where it
  // lies. From now on it does not expire; the caller commits or aborts it, when
  // nothing writes to it any more, and removes the client after that.
  virtual StatusOr<MutableByteSpan> ReservedMemory(
      ClientId client, ReservationId reservation) = 0;

  // -- Administration. `tenant` nullopt = every tenant.
  virtual std::vector<ChunkSummary> List(std::optional<TenantId> tenant,
                                         const std::optional<SpaceId>& space,
                                         const std::optional<ChunkId>& after,
                                         size_t limit) const = 0;
  virtual StatusOr<ChunkSummary> Stat(std::optional<TenantId> tenant,
                                      const ChunkId& id) const = 0;
  // As Stat, and with which profile each copy was coded, for which the first
  // bytes of coded records are read. `done` is called once, on any thread,
  // possibly before this returns; or never, if the engine goes before.
  virtual void Inspect(
      std::optional<TenantId> tenant, const ChunkId& id,
      absl::AnyInvocable<void(StatusOr<ChunkSummary>) &&> done) = 0;
  // A pinned chunk is never evicted; remembered across restarts.
  virtual Status Pin(std::optional<TenantId> tenant, const ChunkId& id,
                     bool pinned) = 0;
  // Drops a chunk from every tier (held copies go when released). With
  // `subtree` its descendants too. Returns how many.
  virtual StatusOr<uint64_t> Evict(std::optional<TenantId> tenant,
                                   const ChunkId& id, bool subtree) = 0;
  virtual StatusOr<uint64_t> EvictSpace(std::optional<TenantId> tenant,
                                        const SpaceId& space) = 0;
  // How much a tier may hold from now on (the device's alone can be set):
  // evicts what is in the way, so that memory is given back before the return,
  // or when work on it that is under way ends. Returns the limit, which may be
  // lower. NotFound if there is no such tier.
  virtual StatusOr<uint64_t> SetTierLimit(TierKind tier, uint64_t bytes) = 0;
  // Why is this chunk not served? kNone if it would be.
  struct MissAnswer {
    MissReason reason = MissReason::kNone;
    std::string detail;
  };
  virtual MissAnswer WhyMiss(TenantId tenant, const SpaceId& space,
                             const ChunkId& id,
                             const Sha256Digest& root_content) const = 0;
  // Reads and checks every byte of a tier, in the background, bypassing caches;
  // corrupt copies are dropped and counted. `progress` is called now and then
  // and once at the end; returning false cancels.
  struct VerifyProgress {
    uint64_t chunks_done = 0, chunks_total = 0;
    uint64_t bytes_done = 0, bytes_total = 0, corrupt = 0;
    bool finished = false;
    Status status;
  };
  virtual void Verify(
      TierKind tier,
      absl::AnyInvocable<bool(const VerifyProgress&)> progress) = 0;

  virtual EngineStats Stats() const = 0;
  virtual EventLog& Events() = 0;
};

}  // namespace larder

#endif  // LARDER_STORE_ENGINE_H_
