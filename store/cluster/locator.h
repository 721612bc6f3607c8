#ifndef LARDER_STORE_CLUSTER_LOCATOR_H_
#define LARDER_STORE_CLUSTER_LOCATOR_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/inlined_vector.h"
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

// What is known of where a chunk is, besides here.
struct Location {
  enum class State : uint8_t {
    kUnknown = 0,  // nobody was asked lately, or did not answer
    kAbsent = 1,   // no other node has it
    kHeld = 2,
  };
  State state = State::kUnknown;
  // Live nodes, not this one; at least one if kHeld. That they have it was so
  // when they said so: who asks one may hear that it is gone (Forget).
  absl::InlinedVector<Holder, 2> holders;
};

struct LocatorOptions {
  absl::Duration held_for = absl::Seconds(10);  // answers that name somebody
  absl::Duration absent_for = absl::Seconds(1);
  // A question that nobody answered by then failed.
  absl::Duration call_timeout = absl::Seconds(1);
  // Whose question failed is not asked for so long: its chunks are unknown.
  absl::Duration suspect_for = absl::Seconds(1);
  // Chunks that something is remembered of. The oldest half goes first.
  size_t chunks_max = 200'000;
};

// Finds out which other nodes have the chunks of a prompt: asks the homes of
// its anchors, in parallel, one message each (a prompt of 512 chunks has at
// most 9 anchors, and homes that coincide get one message, of at most
// kFindKeysMax chunks), remembers what they said for a while, and asks nothing
// that is being asked already. Thread-safe. Callbacks run on the executor or a
// thread of the PeerCalls, none of its locks held; none after destruction,
// those that wait are destroyed unrun.
class Locator {
 public:
  struct Parts {
    NodeId self{};
    PeerCalls* calls = nullptr;
    Clock* clock = nullptr;
    Executor* executor = nullptr;
    Directory* directory = nullptr;  // this node's own
  };
  using Done = absl::AnyInvocable<void(std::vector<Location>) &&>;

  Locator(Parts parts, const LocatorOptions& options);
  ~Locator();

  void SetView(std::shared_ptr<const Rendezvous> rendezvous);

  // Of ids[start...]: what is known at this moment. `ids` are a prompt's from
  // its first chunk on, since positions tell anchors.
  std::vector<Location> Find(const Scope& scope, std::span<const ChunkId> ids,
                             size_t start);

  // Asks what is unknown of ids[start...]; `done` gets what is known then: once
  // all answered, or failed, or at `deadline`. Never from within the call.
  void Locate(const Scope& scope, std::span<const ChunkId> ids, size_t start,
              absl::Time deadline, Done done);

  // `node` turned out not to have it.
  void Forget(ChunkKey chunk, NodeId node);

  struct Stats {
    uint64_t messages = 0;  // to other nodes
    uint64_t asked = 0;     // chunks in them
    uint64_t merged = 0;    // chunks that were being asked for already
    uint64_t failures = 0;  // messages
    uint64_t remembered = 0;
  };
  Stats GetStats() const;

 private:
  struct Known {
    absl::Time until;
    absl::InlinedVector<Holder, 1> holders;
  };
  // A Locate under way.
  struct Wait {
    std::vector<ChunkKey> keys;
    size_t questions = 0;  // that have not ended
    Done done;             // null: it was called
  };
  // A message under way.
  struct Question {
    NodeId home{};
    FindQuery find;
    std::vector<std::shared_ptr<Wait>> waits;
  };

  Location Look(ChunkKey key, absl::Time now)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Remember(ChunkKey key, Known known) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Which of the anchor's directories this node asks; false if there is none
  // that may be asked now.
  bool ChooseHome(AnchorKey anchor, absl::Time now, NodeId& home)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Ask(std::shared_ptr<Question> question, absl::Time now,
           AfterUnlock& after) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnAnswer(const std::shared_ptr<Question>& question,
                StatusOr<std::string> answer);
  // Calls done with what is known.
  void Finish(const std::shared_ptr<Wait>& wait, AfterUnlock& after)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Parts parts_;
  const LocatorOptions options_;
  const std::shared_ptr<Lifeline> lifeline_ = std::make_shared<Lifeline>();

  mutable absl::Mutex mu_;
  std::shared_ptr<const Rendezvous> rendezvous_ ABSL_GUARDED_BY(mu_);
  // New answers go to the first; when it is half of chunks_max it becomes the
  // second, whose contents go.
  absl::flat_hash_map<ChunkKey, Known> young_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<ChunkKey, Known> old_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<ChunkKey, std::shared_ptr<Question>> asking_
      ABSL_GUARDED_BY(mu_);
  struct HotAnchor {
    uint8_t directories = 1;
    absl::Time until;
  };
  absl::flat_hash_map<AnchorKey, HotAnchor> hot_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<NodeId, absl::Time> suspects_ ABSL_GUARDED_BY(mu_);
  Stats stats_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_STORE_CLUSTER_LOCATOR_H_
