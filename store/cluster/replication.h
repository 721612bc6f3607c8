#ifndef LARDER_STORE_CLUSTER_REPLICATION_H_
#define LARDER_STORE_CLUSTER_REPLICATION_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/after_unlock.h"
#include "store/clock.h"
#include "store/cluster/announcer.h"
#include "store/executor.h"
#include "store/lifeline.h"
#include "store/status.h"

namespace larder {

// Copies chunks to other nodes. Thread-safe.
class Replicator {
 public:
  using Done = absl::AnyInvocable<void(Status) &&>;
  virtual ~Replicator() = default;
  // `done` once, never from within the call: OK when `to` has it (and announces
  // it); AlreadyExists if it had it, no bytes were moved; any other error: it
  // is not tried again before the next announcement, or, if this node drains,
  // a moment.
  virtual void Copy(ChunkKey chunk, NodeId to, Done done) = 0;
  // Whether the node may have the chunk at all: if not, the next home in order
  // takes its place. Must not block nor call back.
  virtual bool MayHave(ChunkKey chunk, NodeId node) const = 0;
};

struct ReplicationOptions {
  // Of a chunk that is hot: copies at so many homes.
  uint8_t hot_copies = 2;
  // A copy that is missing must be missing still after so long: others may be
  // about to announce theirs, or to make it.
  absl::Duration settle = absl::Seconds(2);
  // Sent by this node for all of it; kPageBytes at least.
  double bytes_per_second = 1e9;
  size_t copies_max = 4;  // under way
  // Copies that wait. Those that come beyond are left for the next
  // announcement.
  size_t waiting_max = 100'000;
  // While this node drains a chunk is offered to its homes one after the other,
  // and to all of them so often, before it is given up: a minute or a few.
  uint8_t drain_rounds = 15;
};

// Sees to it that chunks have the copies that they shall have: at the first
// ChunkFacts::copies homes of their anchor that may have them, at hot_copies if
// they are hot, and at one if the only node that has it drains. The saver's own
// copy counts where the saver is such a home, and is a cache else.
//
// There is no plan and no leader. Whoever announces a chunk hears from the
// anchor's directory at which homes it is missing, and whether it is the one
// to act (of the live holders the one with the highest weight). It asks once
// more after `settle` and then makes the copies. Everything that can change
// what is missing makes somebody announce: a save, a home that came or went,
// the refresh. So a node that enters or leaves a cluster of N moves 1/N of the
// copied bytes, and copies that were lost come back as long as one is left.
// What a home has too much after a change is cache, and goes as such.
//
// Chunks with one holder are copied first. Thread-safe; nothing runs after
// destruction, which is before the announcer's.
class Replication {
 public:
  struct Parts {
    NodeId self{};
    Announcer* announcer = nullptr;
    Replicator* replicator = nullptr;
    Clock* clock = nullptr;
    Executor* executor = nullptr;
  };

  // Takes Announcer::SetOnTold.
  Replication(Parts parts, const ReplicationOptions& options);
  ~Replication();

  // What Announcer::OnTold is told.
  void Told(std::span<const Announcer::Told> told);
  // This node drains: what nobody else has gets a copy elsewhere. Set before
  // the announcer learns of the view that says so.
  void SetDraining(bool draining);

  struct Stats {
    uint64_t waiting = 0;  // copies to be made or confirmed
    uint64_t under_way = 0;
    uint64_t copied = 0;
    uint64_t copied_bytes = 0;
    uint64_t needless = 0;  // the other had it
    uint64_t failed = 0;
    uint64_t overflows = 0;  // of waiting_max
    // Chunks that only this node has, drains, and nobody took.
    uint64_t given_up = 0;
  };
  Stats GetStats() const;
  // Nothing waits or is under way. Together with Announcer::Quiet, after a view
  // in which this node drains: it may leave.
  bool Quiet() const;

 private:
  struct Copy {
    ChunkKey chunk{};
    NodeId to{};
    double bytes = 0;
  };
  // A chunk with copies missing: when they may be made, and when it is asked
  // for again.
  struct Missing {
    absl::Time due, confirm;
  };

  // Whom a chunk was offered to in vain while this node drains.
  struct Refused {
    std::vector<NodeId> by;  // in this round
    uint8_t rounds = 0;
    bool given_up = false;
  };

  // Ranks of the homes that shall have the chunk.
  uint32_t Wanted(const Announcer::Told& chunk)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Pump();
  void WakeAt(absl::Time when) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnCopied(const Copy& copy, const Status& status);

  const Parts parts_;
  const ReplicationOptions options_;
  const std::shared_ptr<Lifeline> lifeline_ = std::make_shared<Lifeline>();

  mutable absl::Mutex mu_;
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  absl::flat_hash_map<ChunkKey, Missing> missing_ ABSL_GUARDED_BY(mu_);
  // Of missing_, by time; entries may be outdated.
  std::deque<std::pair<absl::Time, ChunkKey>> confirm_ ABSL_GUARDED_BY(mu_);
  // Copies that wait: of chunks with one holder, and others.
  std::deque<Copy> urgent_ ABSL_GUARDED_BY(mu_);
  std::deque<Copy> normal_ ABSL_GUARDED_BY(mu_);
  // Chunks with copies that wait or are under way, and how many.
  absl::flat_hash_map<ChunkKey, uint32_t> copying_ ABSL_GUARDED_BY(mu_);
  absl::Time free_at_ ABSL_GUARDED_BY(mu_);
  absl::Time wake_at_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  size_t under_way_ ABSL_GUARDED_BY(mu_) = 0;
  absl::flat_hash_map<ChunkKey, Refused> refused_ ABSL_GUARDED_BY(mu_);
  Stats stats_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_REPLICATION_H_
