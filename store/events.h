#ifndef LARDER_STORE_EVENTS_H_
#define LARDER_STORE_EVENTS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/types.h"

namespace larder {

// What operators (and, later, routers that follow the cache) can watch.
// On wire.
enum class EventType : uint8_t {
  kChunkStored = 1,   // became readable in `tier`
  kChunkRemoved = 2,  // its copy left `tier`
  kChunkCorrupt = 3,  // a copy in `tier` failed its checksum and was dropped
  kSaveRejected = 4,  // a commit was refused; `detail` says why
  kHoldExpired = 5,   // revoked; its memory waits for the reader
  kEpochAdvanced = 6,
  kTierDegraded = 7,  // a tier refuses writes; `detail` says why
  kTierRecovered = 8,
  kClientGone = 9,  // a client died or left; what it held was given back
  kSpaceOpened = 10,
  // Of a cluster, as one node sees it; `node` says which.
  kNodeJoined = 11,
  kNodeDraining = 12,
  kNodeLeft = 13,
  kLinkMade = 14,
  kLinkFailed = 15,    // could not be made; `detail` says why
  kLinkLost = 16,      // ended; `detail` says why
  kRegistryLost = 17,  // does not answer: nodes are those known last
  kRegistryBack = 18,
  kKeyRefused = 19,   // a node asked about a tenant with another key
  kJoinRefused = 20,  // this node is not let in; `detail` says why
};

std::string_view ToString(EventType type);

// What an engine says of the blocks in a chunk that it saves, so that routers
// which follow the events can tell which prompts it serves
// (transport/kv_events). Only events have it: it is in no index, no log and no
// file.
struct ChunkBlocks {
  static constexpr size_t kMaxHashes = 2048;
  static constexpr size_t kMaxTokens = 8192;

  // Either may be empty: the engine's own hash of each block, and the tokens of
  // the whole chunk.
  std::vector<uint64_t> hashes;
  std::vector<uint32_t> tokens;
  bool signed_hashes = false;  // they are int64_t
  // The KV depends on more than tokens (a salt, an adapter, an image ...), in
  // this chunk or one before it.
  bool keyed = false;
};

struct Event {
  uint64_t sequence = 0;  // 1, 2, 3 ... without gaps while the daemon lives
  absl::Time time;        // calendar
  EventType type{};
  TenantId tenant{};
  SpaceId space;
  ChunkId chunk;
  TierKind tier = TierKind::kNone;
  MissReason reason = MissReason::kNone;
  std::string detail;
  std::string node;  // of the cluster
  // Of a chunk.
  ChunkId parent;  // zero if none was given
  uint32_t token_count = 0;
  // kChunkStored, if the save that made it readable said so; or null.
  std::shared_ptr<const ChunkBlocks> blocks;
};

// The last `capacity` events. Publishing never blocks on readers: one that
// falls behind sees a gap in the sequence. Thread-safe.
class EventLog {
 public:
  // How many of them have their `blocks`, which are large.
  static constexpr size_t kWithBlocks = 2048;

  // Takes its memory at once.
  explicit EventLog(size_t capacity) : capacity_(capacity), ring_(capacity) {}

  void Publish(Event event);  // sets the sequence

  // Up to `limit` events with sequence > `after`, oldest first. Waits until
  // there is one or `timeout` passed (zero: does not wait). Real time: for
  // serving threads, not for the engine.
  std::vector<Event> Read(uint64_t after, size_t limit, absl::Duration timeout);

  uint64_t last_sequence() const;

 private:
  const size_t capacity_;
  mutable absl::Mutex mu_;
  std::vector<Event> ring_ ABSL_GUARDED_BY(mu_);
  uint64_t last_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace larder

#endif  // LARDER_STORE_EVENTS_H_
