#ifndef LARDER_STORE_CLUSTER_DIRECTORY_H_
#define LARDER_STORE_CLUSTER_DIRECTORY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/clock.h"
#include "store/cluster/directory_messages.h"
#include "store/cluster/rendezvous.h"
#include "store/slot_array.h"
#include "store/status.h"

namespace larder {

struct DirectoryOptions {
  // Of chunks times holders, 44 bytes each. What is announced beyond is not
  // taken, and the announcer is told so.
  uint64_t entries_max = 32'000'000;
  // What is not announced again for so long is forgotten.
  absl::Duration ttl = absl::Minutes(5);
  // Of one chunk. Further nodes that have it are not taken.
  uint32_t holders_max = 8;
  // An anchor that is asked about more often than this is told of at, and asked
  // about at, its first `hot_directories` homes.
  uint32_t hot_asks_per_second = 2'000;
  uint8_t hot_directories = 3;
  // A chunk that is found more than about 2^this times in ttl / 4 is hot;
  // at most 15.
  uint8_t hot_finds_log2 = 8;
};

// This node's shard of who has what: soft state. Nodes announce what they have
// to the homes of its anchors, again and again, and what they do not announce
// any more expires; nothing is kept over a restart. It can be behind (a chunk
// just saved or gone), never wrong for longer than a ttl.
//
// Whoever sends a message is known (`from`) and announces for nobody else. What
// one node can take is bounded: 8 times its share of entries_max, 4096 at
// least. No message makes it do more than work in proportion to its length and
// to the size of the cluster per section.
//
// Memory: 44 bytes per chunk and holder (an entry of 40 and its bucket), plus
// 24 per node; grows in small steps (linear hashing: Litwin 1980) and does not
// shrink. Thread-safe; takes no time worth mentioning, starts nothing.
class Directory {
 public:
  // `clock` must outlive it. `seed`: random, so that nobody can choose keys
  // that meet in one bucket.
  Directory(const Clock& clock, const DirectoryOptions& options, uint64_t seed);
  Directory(const Directory&) = delete;
  Directory& operator=(const Directory&) = delete;

  // From now on nodes that are not in the view are not told of, nor what nodes
  // had in an earlier life; both may come back until it expires.
  void SetView(std::shared_ptr<const Rendezvous> rendezvous);

  // The answer to a message of kind kAnnounce or kFind. FailedPrecondition: the
  // sender is not (yet) in this node's view in that life: it may try again;
  // Aborted: the sender said something newer before; InvalidArgument.
  StatusOr<std::string> Handle(NodeId from, std::string_view message);

  struct Stats {
    uint64_t entries = 0;  // expired ones too, until they are come by
    uint64_t refused = 0;  // announced, not taken
    uint64_t expired = 0;
    uint64_t finds = 0;  // keys asked for
    uint64_t found = 0;  // ... that somebody has
    uint64_t hot_anchors = 0;
    uint64_t memory_bytes = 0;
  };
  Stats GetStats() const;

 private:
  // A chunk at a node. Chains by key, entries of one key somewhere in one.
  struct Entry {
    ChunkKey key{};
    uint64_t groups = 0;
    uint32_t pages = 0;
    uint32_t tokens = 0;
    uint32_t epoch = 0;
    uint32_t next = 0;     // in the chain, or of what is free; 1 + index
    uint16_t expires = 0;  // in ticks
    uint16_t life = 0;     // index in lives_
    Lineage lineage{};
    CopyTier tier = CopyTier::kGone;  // kGone: free
    uint8_t copies = 0;
    uint8_t heat = 0;  // about log2 of how often it was found lately
  };
  static_assert(sizeof(Entry) == 40);

  // A node in one of its lives. Free if entries == 0 and not alive.
  struct Life {
    NodeId node{};
    uint64_t incarnation = 0;
    uint64_t sequence = 0;  // the highest it said
    uint32_t entries = 0;
    bool alive = false;  // in the view
    bool draining = false;
  };

  // One of the anchors that are asked for, with how often in this second:
  // the majority of those that share the cell.
  struct HeatCell {
    AnchorKey anchor{};
    uint32_t count = 0;
    uint32_t second = 0;
  };
  struct Hot {
    absl::Time since, last;
  };

  StatusOr<std::string> HandleAnnounce(NodeId from, std::string_view message)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  StatusOr<std::string> HandleFind(std::string_view message)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // The node's life of now; nullptr if it is not in the view in that one.
  Life* FindLife(NodeId node, uint64_t incarnation)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool Store(const ChunkRecord& record, uint16_t life)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Remove(ChunkKey key, uint16_t life) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  RecordVerdict Judge(AnchorKey anchor, ChunkKey key, NodeId from,
                      const Homes& homes) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  std::vector<Holder> Lookup(ChunkKey key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  // Whether somebody may be told of it; whether it means anything at all.
  bool Told(const Entry& entry) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return lives_[entry.life].alive && !Expired(entry);
  }
  bool Expired(const Entry& entry) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return static_cast<int16_t>(entry.expires - tick_) <= 0;
  }

  uint32_t& BucketOf(ChunkKey key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  uint64_t HashOf(ChunkKey key) const;
  void AddBucket() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // `link` is what points to the entry.
  void Free(uint32_t& link) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Time has passed: looks at the next entries in turn, all of them once in a
  // quarter of the ttl. `all`: forgets what it comes to.
  void Pass() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void VisitNext(bool all) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  void CountAsk(AnchorKey anchor) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  uint8_t Directories(AnchorKey anchor, bool asking) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  uint64_t Random() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Clock& clock_;
  const DirectoryOptions options_;
  const uint64_t seed_;
  const absl::Time start_;

  mutable absl::Mutex mu_;
  std::shared_ptr<const Rendezvous> rendezvous_ ABSL_GUARDED_BY(mu_);
  std::vector<Life> lives_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<NodeId, uint16_t> alive_ ABSL_GUARDED_BY(mu_);

  SlotArray<Entry, 256> entries_ ABSL_GUARDED_BY(mu_);
  SlotArray<uint32_t, 256> buckets_ ABSL_GUARDED_BY(mu_);  // 1 + index, or 0
  uint32_t level_ ABSL_GUARDED_BY(mu_) = 1;  // <= buckets < 2 * level_
  uint32_t free_ ABSL_GUARDED_BY(mu_) = 0;   // 1 + index
  uint32_t used_ ABSL_GUARDED_BY(mu_) = 0;
  uint16_t tick_ ABSL_GUARDED_BY(mu_) = 0;  // ttl / kTicksOfTtl each
  uint32_t hand_ ABSL_GUARDED_BY(mu_) = 0;
  double owed_ ABSL_GUARDED_BY(mu_) = 0;  // entries to look at
  absl::Time passed_ ABSL_GUARDED_BY(mu_);

  std::vector<HeatCell> cells_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<AnchorKey, Hot> hot_ ABSL_GUARDED_BY(mu_);
  uint64_t random_ ABSL_GUARDED_BY(mu_);
  Stats stats_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_DIRECTORY_H_
