#ifndef LARDER_STORE_CLUSTER_ANNOUNCER_H_
#define LARDER_STORE_CLUSTER_ANNOUNCER_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/functional/any_invocable.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/after_unlock.h"
#include "store/clock.h"
#include "store/cluster/directory.h"
#include "store/cluster/peer_calls.h"
#include "store/cluster/rendezvous.h"
#include "store/executor.h"
#include "store/lifeline.h"

namespace larder {

struct AnnouncerOptions {
  // Changes wait so long for others to go with them.
  absl::Duration batch_delay = absl::Milliseconds(5);
  // Everything is told again in so long. Below half of DirectoryOptions::ttl,
  // so that one loss is no hole.
  absl::Duration refresh = absl::Minutes(2);
  // Records told in all. What does not fit waits; with more chunks than
  // this times `refresh`, some expire in the directories.
  double records_per_second = 200'000;
  // In one message: at most kAnnounceRecordsMax.
  size_t message_records_max = 2048;
  absl::Duration call_timeout = absl::Seconds(2);
  // After a failure the home is left alone for so long.
  absl::Duration retry = absl::Seconds(1);
  // Changes that wait for one home. Beyond, they are dropped, and all that is
  // there is told to it again: of what is gone it learns by expiry.
  size_t changes_max = 100'000;
};

// What this node has, told to the directories of its chunks' anchors: soon
// after it changes, again at a low rate before it expires, and to new homes
// when the view changes. A lost message is told again, as things are then: a
// directory that can be reached knows what this node has soon after it stopped
// changing.
//
// One message at a time is under way to each home. Memory: about 70 to 110
// bytes per chunk and 200 per anchor. Thread-safe; calls and tasks, none of its
// locks held, go to the PeerCalls and the executor that it is given. Nothing
// runs after destruction.
class Announcer {
 public:
  // What an anchor's first home said of a chunk that this node has. `homes`:
  // as verdict.held counts them.
  struct Told {
    AnchorKey anchor{};
    ChunkKey chunk{};
    ChunkFacts facts;
    Homes homes;
    RecordVerdict verdict;
  };
  using OnTold = absl::AnyInvocable<void(std::span<const Told>)>;

  struct Parts {
    Node self;  // id and incarnation count
    PeerCalls* calls = nullptr;
    Clock* clock = nullptr;
    Executor* executor = nullptr;
    Directory* directory = nullptr;  // this node's own
  };

  Announcer(Parts parts, const AnnouncerOptions& options);
  ~Announcer();

  void SetView(std::shared_ptr<const Rendezvous> rendezvous);
  // Not called twice at a time; the one before is not called any more once
  // this returns. May be null. Not from within it.
  void SetOnTold(OnTold on_told);

  // This node has the chunk, with these facts from now on: it was saved, came
  // to another tier, more of it is visible. `facts.tier` is not kGone.
  void Stored(AnchorKey anchor, ChunkKey chunk, const ChunkFacts& facts);
  // It has not any more.
  void Removed(ChunkKey chunk);
  // Tells of it again now, for what the directory says to it. False: this node
  // does not have it.
  bool Confirm(ChunkKey chunk);

  struct Stats {
    uint64_t chunks = 0;
    uint64_t anchors = 0;
    uint64_t waiting = 0;   // records and anchors to be told, over all homes
    uint64_t messages = 0;  // sent, to this node's own directory too
    uint64_t records = 0;
    uint64_t failures = 0;
    uint64_t overflows = 0;  // of changes_max
  };
  Stats GetStats() const;
  // Everything was told and answered: no home is left that could not be
  // reached.
  bool Quiet() const;

 private:
  struct Anchor {
    std::vector<ChunkRecord> chunks;
    Homes homes;         // the first kHomesMax
    uint32_t views = 0;  // views_ that they are from
    uint32_t place = 0;  // in order_
    uint8_t directories = 1;
    bool copied = false;  // has chunks that homes shall have copies of
  };
  struct Place {
    AnchorKey anchor{};
    uint32_t index = 0;  // in Anchor::chunks
  };

  // First in, first out, and nothing twice.
  template <class T>
  class UniqueQueue {
   public:
    void Push(T value) {
      if (set_.insert(value).second) queue_.push_back(value);
    }
    T Pop() {
      const T value = queue_.front();
      queue_.pop_front();
      set_.erase(value);
      return value;
    }
    bool empty() const { return queue_.empty(); }
    size_t size() const { return queue_.size(); }
    void Clear() {
      queue_.clear();
      set_.clear();
    }

   private:
    std::deque<T> queue_;
    absl::flat_hash_set<T> set_;
  };

  // An anchor that is being told of as a whole, from the last record down: what
  // comes meanwhile goes behind, and what takes the place of a removed one was
  // told already or is still to come.
  struct Whole {
    AnchorKey anchor{};
    size_t left = 0;  // records [0, left) are still to be told
  };

  struct Home {
    UniqueQueue<ChunkKey> changed;
    UniqueQueue<AnchorKey> wholes;
    std::optional<Whole> current;
    // In the message that is under way.
    std::vector<ChunkKey> sent_changed;
    std::vector<AnchorKey> sent_wholes;
    bool calling = false;
    bool queued = false;  // in ready_ or waits for its retry

    bool HasWork() const {
      return !changed.empty() || !wholes.empty() || current.has_value();
    }
  };

  void Changed(const Anchor& anchor, ChunkKey chunk)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void TellWhole(AnchorKey key, NodeId home) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void MakeReady(NodeId id, Home& home) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  size_t DirectoriesOf(const Anchor& anchor) const;

  void WakeAt(absl::Time when) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Pump();
  // Some anchors whose homes were not looked at in the new view.
  void FindHomes() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void FindHomes(AnchorKey key, Anchor& anchor)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Refresh(absl::Time now) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Send(NodeId id, Home& home, absl::Time now, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnAnswer(NodeId id, const Announce& said, StatusOr<std::string> answer);

  const Parts parts_;
  const AnnouncerOptions options_;
  const std::shared_ptr<Lifeline> lifeline_ = std::make_shared<Lifeline>();

  absl::Mutex told_mu_;
  OnTold on_told_ ABSL_GUARDED_BY(told_mu_);

  mutable absl::Mutex mu_;
  std::shared_ptr<const Rendezvous> rendezvous_ ABSL_GUARDED_BY(mu_);
  uint32_t views_ ABSL_GUARDED_BY(mu_) = 0;  // how many there were
  // The view differs from the one before as its Rendezvous says.
  bool steady_ ABSL_GUARDED_BY(mu_) = false;
  absl::flat_hash_map<ChunkKey, Place> places_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<AnchorKey, std::unique_ptr<Anchor>> anchors_
      ABSL_GUARDED_BY(mu_);
  std::vector<AnchorKey> order_ ABSL_GUARDED_BY(mu_);  // of anchors_
  // Both go down through order_, as Whole does.
  size_t rehome_left_ ABSL_GUARDED_BY(mu_) = 0;
  size_t refresh_left_ ABSL_GUARDED_BY(mu_) = 0;
  double refresh_owed_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Time refreshed_ ABSL_GUARDED_BY(mu_);

  absl::flat_hash_map<NodeId, std::unique_ptr<Home>> homes_
      ABSL_GUARDED_BY(mu_);
  std::deque<NodeId> ready_ ABSL_GUARDED_BY(mu_);
  std::multimap<absl::Time, NodeId> retries_ ABSL_GUARDED_BY(mu_);
  absl::Time free_at_ ABSL_GUARDED_BY(mu_);  // records_per_second
  absl::Time wake_at_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  uint64_t sequence_ ABSL_GUARDED_BY(mu_) = 0;
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  Stats stats_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_ANNOUNCER_H_
