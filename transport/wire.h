#ifndef LARDER_TRANSPORT_WIRE_H_
#define LARDER_TRANSPORT_WIRE_H_

// The messages between the client library and larderd on one host
// (transport/FORMAT.md is the normative description; this file is its C++).
//
// A message is one SOCK_SEQPACKET packet: a fixed header, then a fixed body
// for its type (a multiple of 8 bytes), then counted arrays. All little-endian,
// naturally aligned, no pointers. Sizes are bounded by kMaxMessageBytes;
// descriptors travel beside the packet (SCM_RIGHTS). A body may grow at its end
// with a minor version: a reader takes the bytes it knows and treats missing
// ones as zero. Array elements never change within a major version.
//
// Every struct here is on wire: do not reorder.

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "store/types.h"
#include "store/units.h"

namespace larder::wire {

inline constexpr uint32_t kMagic = 0x5244524c;  // "LRDR"
inline constexpr uint16_t kMajor = 0;
inline constexpr uint16_t kMinor = 2;
inline constexpr size_t kMaxMessageBytes = 64_KiB;
inline constexpr size_t kMaxDescriptors = 16;  // beside one packet
inline constexpr uint32_t kMaxIdsPerMessage = 1024;
inline constexpr uint32_t kMaxListed = 1024;         // chunks of one ListReply
inline constexpr size_t kMaxDetailBytes = 1024;      // text of one reply
inline constexpr uint32_t kRingEntries = 4096;       // completions
inline constexpr size_t kMaxDestinationBytes = 255;  // of one commit

enum class Type : uint16_t {
  // client -> daemon; answered by the Reply of the same request id, except
  // those marked one-way.
  kHello = 1,
  kOpenSpace = 2,
  kMatch = 3,
  kLookup = 4,
  kPrefetch = 5,  // one-way
  kHold = 6,
  kAttachHold = 7,
  kRenewHold = 8,
  kReleaseHold = 9,     // one-way
  kReportCorrupt = 10,  // one-way
  kShareStaging = 11,   // with one memfd, sealed against shrinking
  kReserve = 12,
  kCommit = 13,  // one-way: its stages arrive as completions
  kAbort = 14,   // one-way
  kAdvanceEpoch = 15,
  kDelete = 16,
  kList = 17,
  kStats = 18,
  kUnmappedSlab = 19,  // one-way: answers kSlabRetired
  kPing = 20,
  kWhyMiss = 21,
  kCredit = 22,          // one-way: header alone, for its `ring_consumed`
  kUnshareStaging = 23,  // one-way
  kProfile = 24,
  kAwait = 25,  // since minor 2; answered when it is over
  // daemon -> client
  kReply = 128,
  kSlab = 129,         // with one descriptor: a slab the client may map
  kSlabRetired = 130,  // unmap it, then say kUnmappedSlab
};

struct Header {
  uint32_t magic = kMagic;
  Type type{};
  uint16_t body_bytes = 0;  // of the fixed body that follows
  uint64_t request = 0;     // chosen by the client, > 0; 0 in kSlab*
  // Completions the client has read so far, modulo 2^32. A value behind what
  // was said before is old news; one ahead of `produced` ends the connection.
  uint32_t ring_consumed = 0;
  uint32_t reserved = 0;
};
static_assert(sizeof(Header) == 24);

// Every reply's body begins with this. `detail_bytes` of text end the packet.
// With a status other than OK it may be the whole body.
struct ReplyHead {
  uint16_t status = 0;  // absl::StatusCode
  uint16_t detail_bytes = 0;
  uint32_t reserved = 0;
};

// The first message of a connection, with request 1. Its first two fields never
// move, so that every version can refuse every other by name.
struct Hello {
  uint16_t major = kMajor;
  uint16_t minor = kMinor;
  uint32_t pid = 0;           // for people; the kernel's word is what counts
  uint8_t token[64] = {};     // tenant token, zero-padded; empty if none
  char client_name[64] = {};  // for people
};
// With two descriptors, in this order: the completion ring's memfd and its
// bell, the read end of a pipe that is readable when the ring or the socket has
// something new. (No eventfd: its open file would be shared, and a client that
// cleared O_NONBLOCK on it could block the daemon's writes.)
struct HelloReply {
  ReplyHead head;
  uint16_t major = kMajor;
  uint16_t minor = kMinor;  // the smaller of both is spoken
  uint32_t tenant = 0;
  uint64_t client = 0;
  uint64_t max_staging_bytes = 0;
  uint32_t max_holds = 0;
  uint32_t ring_entries = kRingEntries;
  uint8_t wants_blocks = 0;  // 1: of commits; the tenant's events are published
  uint8_t reserved[7] = {};
};

struct OpenSpace {  // then `encoded_bytes` of EncodeSpace
  uint32_t encoded_bytes = 0;
  uint32_t reserved = 0;
};
struct OpenSpaceReply {
  ReplyHead head;
  SpaceId id;
  uint64_t epoch = 0;
  uint32_t handle = 0;  // names the space in this connection's messages
  uint32_t reserved = 0;
};

struct Match {  // then id_count ChunkIds: those from `start` on and before
  uint32_t space = 0;
  uint32_t id_count = 0;
  uint32_t start = 0;
  uint8_t worst_lineage = 0;
  uint8_t has_root_content = 0;
  uint16_t reserved = 0;
  Sha256Digest root_content;
  // How long the answer may wait for what other nodes say of chunks that are
  // not here. Since minor 2.
  uint64_t wait_us = 0;
};
// then group_count u32 hits, then state_count bytes (ChunkState)
struct MatchReply {
  ReplyHead head;
  uint32_t usable = 0;
  uint32_t group_count = 0;
  uint32_t state_count = 0;
  uint32_t reason = 0;
  uint64_t load_estimate_us = 0;
  uint64_t epoch = 0;
};

struct Lookup {  // then id_count ChunkIds; also kPrefetch
  uint32_t space = 0;
  uint32_t id_count = 0;
  uint8_t describe = 0;       // 1: StoredChunks instead of states (kLookup)
  uint8_t worst_lineage = 0;  // of what is described
  uint8_t reserved[6] = {};
};
struct StoredChunk {
  uint64_t bytes_to_read = 0;  // from a slower tier; 0: none
  uint32_t token_count = 0;
  uint8_t state = 0;   // ChunkState
  uint8_t reason = 0;  // MissReason
  uint8_t lineage = 0;
  uint8_t planes = 1;                  // progressive ones, 1 to 3
  uint64_t cut_bytes_to_read[2] = {};  // with the first one or two of them only
  uint8_t cut_lineage[2] = {};
  uint8_t reserved[6] = {};
};
static_assert(sizeof(StoredChunk) == 40);
// then state_count bytes, or described_count StoredChunks. A daemon that does
// not know `describe` sends states.
struct LookupReply {
  ReplyHead head;
  uint32_t state_count = 0;
  uint32_t described_count = 0;
};

struct Await {  // then id_count ChunkIds, then id_count u16 group masks
  uint32_t space = 0;
  uint32_t id_count = 0;
  uint32_t layers = 0;  // 0xffffffff: all
  uint32_t reserved = 0;
  uint64_t wait_us = 0;
};
// then layers_count u32: of each id how many are here, 0xffffffff: all
struct AwaitReply {
  ReplyHead head;
  uint32_t layers_count = 0;
  uint32_t reserved = 0;
};

struct Hold {  // then id_count ChunkIds
  uint32_t space = 0;
  uint32_t id_count = 0;
  uint64_t extend = 0;
  uint64_t ttl_us = 0;       // 0 = the daemon's default
  uint64_t deadline_us = 0;  // from receipt; 0 = none
  uint8_t worst_lineage = 0;
  uint8_t prefix_only = 0;
  uint8_t planes = 0;  // that must be valid of what is coded in planes; 0: all
  uint8_t by_layer = 0;  // 1: bring it so, and say how far it is (kHoldLayers)
  // Parts with these layers alone, also of a chunk that is not complete; 0 and
  // 0: all. Since minor 2.
  uint16_t layer_begin = 0;
  uint16_t layer_end = 0;
};
struct HeldChunk {
  uint8_t state = 0;   // ChunkState
  uint8_t reason = 0;  // MissReason
  uint16_t part_count = 0;
  uint32_t part_begin = 0;  // index into the parts array
};
struct HeldPart {
  uint32_t slab = 0;
  uint16_t group = 0;
  uint16_t reserved = 0;
  PartShape shape;
  uint32_t reserved2 = 0;
  uint64_t offset = 0;
  uint64_t record_bytes = 0;
  Checksum checksum;
};
static_assert(sizeof(HeldPart) == 56);
// then chunk_count HeldChunks, then part_count HeldParts (part_begin counts
// within this packet). While first_index + chunk_count < end_index, the rest is
// held too and did not fit: ask for it with kAttachHold, first_index = where
// this packet ends.
struct HoldReply {
  ReplyHead head;
  uint64_t hold = 0;    // 0: nothing could be held
  uint64_t ttl_us = 0;  // left; in the first packet of an answer
  uint32_t chunk_count = 0;
  uint32_t part_count = 0;
  uint32_t first_index = 0;  // of these chunks within the hold
  uint32_t end_index = 0;    // one past the last chunk of this answer
};
struct HoldRef {  // kAttachHold, kRenewHold (ttl), kReleaseHold
  uint64_t hold = 0;
  uint64_t ttl_us = 0;
  // kAttachHold: 0 = attach; else the next chunks of an answer that did not
  // fit one packet (of the kHold or kAttachHold of this very connection).
  uint32_t first_index = 0;
  uint32_t reserved = 0;
};
struct RenewReply {
  ReplyHead head;
  uint64_t ttl_us = 0;
};
struct ReportCorrupt {
  uint64_t hold = 0;
  uint32_t space = 0;
  uint32_t reserved = 0;
  ChunkId id;
};

struct ShareStaging {
  uint64_t bytes = 0;
};
struct ShareStagingReply {
  ReplyHead head;
  uint32_t region = 0;
  uint32_t reserved = 0;
};
// Commits that read the region keep it alive; it may not be named any more.
struct UnshareStaging {
  uint32_t region = 0;
  uint32_t reserved = 0;
};

struct Reserve {
  uint32_t space = 0;
  uint16_t group = 0;
  uint8_t has_id = 0;
  uint8_t lineage = 0;
  uint64_t record_bytes = 0;
  PartShape shape;
  uint32_t reserved = 0;
  ChunkId id;
};
// Takes kCompletionsPerSave of the ring for the commit. Status AlreadyExists:
// nothing need be saved.
struct ReserveReply {
  ReplyHead head;
  uint64_t reservation = 0;
};

// then block_hash_count u64, token_count u32, destination_bytes of a name
struct Commit {
  uint64_t reservation = 0;
  uint32_t region = 0;
  uint8_t want_durable = 0;
  uint8_t priority = 0;
  uint16_t reserved = 0;
  uint64_t offset = 0;
  uint64_t bytes = 0;
  uint32_t stop_reason = 0;
  uint32_t reserved2 = 0;
  // What events say of the chunk (store/events.h, ChunkBlocks).
  uint32_t block_hash_count = 0;
  uint32_t token_count = 0;
  uint8_t signed_hashes = 0;
  uint8_t keyed = 0;
  // Of the name of the node that the part is to be sent to; 0: to none. Since
  // minor 2.
  uint16_t destination_bytes = 0;
  uint8_t reserved3[4] = {};
};
struct Abort {
  uint64_t reservation = 0;
};

struct SpaceRef {  // kAdvanceEpoch
  uint32_t space = 0;
  uint32_t reserved = 0;
};
struct EpochReply {
  ReplyHead head;
  uint64_t epoch = 0;
};
struct Delete {  // then id_count ChunkIds
  uint32_t space = 0;
  uint32_t id_count = 0;
};
struct DeleteReply {
  ReplyHead head;
  uint64_t deleted = 0;
};
struct List {
  uint32_t space = 0;
  uint32_t limit = 0;
  uint8_t has_after = 0;
  uint8_t reserved[7] = {};
  ChunkId after;
};
struct ListedChunk {
  ChunkId id;
  uint64_t bytes = 0;
  uint32_t token_count = 0;
  uint8_t best_tier = 0;
  uint8_t is_tail = 0;
  uint8_t lineage = 0;
  uint8_t reserved = 0;
};
struct ListReply {  // then chunk_count ListedChunks
  ReplyHead head;
  uint32_t chunk_count = 0;
  uint32_t more = 0;
};
struct StatsReply {
  ReplyHead head;
  uint64_t dram_used = 0, dram_capacity = 0;
  uint64_t durable_used = 0, durable_capacity = 0;
  uint64_t chunks = 0, matched = 0, missed = 0, commits = 0;
  uint64_t saved_bytes = 0, promoted_bytes = 0, corrupt = 0;
  uint64_t durable_backlog_bytes = 0;
};
struct SlabNotice {  // kSlab (with descriptor), kSlabRetired, kUnmappedSlab
  uint32_t slab = 0;
  uint32_t reserved = 0;
  uint64_t bytes = 0;
};
struct WhyMiss {
  uint32_t space = 0;
  uint32_t has_root_content = 0;
  ChunkId id;
  Sha256Digest root_content;
};
struct WhyMissReply {  // text in the detail
  ReplyHead head;
  uint32_t reason = 0;
  uint32_t reserved = 0;
};

// Some bytes of a profile that an encoded layer needs to be decoded. NotFound:
// the daemon does not keep it.
struct GetProfile {
  ProfileId id;
  uint64_t offset = 0;
};
// then `bytes` bytes, those from `offset` on: as many as fit or are left
struct ProfileReply {
  ReplyHead head;
  uint64_t total_bytes = 0;  // of the profile
  uint32_t bytes = 0;
  uint32_t reserved = 0;
};
inline constexpr uint32_t kMaxProfileBytesPerMessage = 60_KiB;

// ---- The completion ring: one memfd per client, mapped writable by the daemon
// alone. Entry i (counting from 0 for ever) lies at i % ring_entries. The
// daemon writes the entry, then `produced` (release), then rings the bell. The
// client says in every message how far it has read. The daemon starts no
// operation for whose completions there is no room (ResourceExhausted):
// kReserve sets aside kCompletionsPerSave until the commit's last stage, kHold
// one per chunk that is promoted. What nobody asked for (kHoldRevoked,
// kEpochAdvanced, kLookupChanged, the refusal of a commit without reservation)
// waits in the daemon, bounded, until there is room.
//
// An entry may be seen before the thread that waits for the reply that names
// its hold has seen that: keep it.
inline constexpr uint32_t kCompletionsPerSave = 4;

enum class Completion : uint32_t {
  kSave = 1,           // request = that of kCommit; value = SaveStage
  kHoldChunk = 2,      // request = hold; value = index, status 0 or miss reason
  kHoldRevoked = 3,    // request = hold; value = MissReason
  kEpochAdvanced = 4,  // request = space handle; value = new epoch
  kLookupChanged = 5,  // chunks were deleted, cached matches may be stale;
                       // request = space handle
  // Of a hold by layer: of chunk `value` the first `layers` layers are there,
  // as are headers and tables. Said where the ring has room, for kHoldChunk
  // comes in any case.
  kHoldLayers = 6,
};

struct RingEntry {
  uint64_t request = 0;
  Completion kind{};
  uint32_t status = 0;  // absl::StatusCode (kSave), MissReason (kHoldChunk)
  uint64_t value = 0;
  uint64_t layers = 0;  // kHoldLayers
};
static_assert(sizeof(RingEntry) == 32);

struct RingHeader {
  uint32_t magic = kMagic;
  uint32_t entries = kRingEntries;
  uint64_t produced = 0;  // accessed by atomic_ref
  // kSlabRetired packets sent so far (atomic_ref): a client that has received
  // fewer reads its socket, so that an idle one gives memory back too.
  uint64_t notices = 0;
  uint8_t reserved[40] = {};
};
static_assert(sizeof(RingHeader) == 64);

constexpr size_t RingBytes(uint32_t entries) {
  return sizeof(RingHeader) + size_t{entries} * sizeof(RingEntry);
}

}  // namespace larder::wire

#endif  // LARDER_TRANSPORT_WIRE_H_
