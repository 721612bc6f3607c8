#ifndef LARDER_CLIENT_CORE_MATCH_CACHE_H_
#define LARDER_CLIENT_CORE_MATCH_CACHE_H_

#include <cstdint>
#include <list>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/container/flat_hash_set.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

#include "store/engine.h"
#include "store/types.h"

namespace larder::client {

// A question to Match, by value of everything that the answer depends on.
struct MatchQuery {
  std::span<const ChunkId> ids;
  uint32_t start = 0;
  Lineage worst_lineage = Lineage::kExact;
  Sha256Digest root_content;
};

struct MatchAnswer {
  uint32_t usable = 0;
  uint32_t consecutive = 0;
  MissReason reason = MissReason::kNone;
  absl::Duration load_estimate;
  Epoch epoch{};
  std::vector<uint32_t> group_hits;
  std::vector<ChunkState> states;
};

// What a scheduler may hear without waiting: recent answers of one space, by
// content of the question. Bounded; least recently used go first. Says which
// answers ought to be asked for again and remembers that somebody does.
//
// Thread-safe. An answer of 512 ids costs a hash of 16 KiB and a copy.
class MatchCache {
 public:
  explicit MatchCache(size_t answers_max = 1024, size_t presence_max = 1 << 16)
      : answers_max_(answers_max), presence_max_(presence_max) {}

  struct Found {
    std::shared_ptr<const MatchAnswer> answer;  // null: nothing known
    // Nobody is asking yet, and the caller is to: then Store or GiveUp.
    bool refresh = false;
    Checksum key;
  };
  // Answers older than `age` are still given, for `kGrace` times that, but are
  // to be refreshed.
  Found Find(const MatchQuery& query, absl::Time now, absl::Duration age)
      ABSL_LOCKS_EXCLUDED(mu_);
  void Store(const MatchQuery& query, MatchAnswer answer, absl::Time now)
      ABSL_LOCKS_EXCLUDED(mu_);
  void GiveUp(const Checksum& key) ABSL_LOCKS_EXCLUDED(mu_);

  // Presence of single ids; nullopt = not known. Those to ask for are added to
  // `wanted` by the call and taken by TakeWanted; true if there are any that
  // nobody fetches yet.
  bool FindPresence(std::span<const ChunkId> ids, absl::Time now,
                    absl::Duration age,
                    std::span<std::optional<ChunkState>> states)
      ABSL_LOCKS_EXCLUDED(mu_);
  std::vector<ChunkId> TakeWanted(size_t limit) ABSL_LOCKS_EXCLUDED(mu_);
  void StorePresence(std::span<const ChunkId> ids,
                     std::span<const ChunkState> states, absl::Time now)
      ABSL_LOCKS_EXCLUDED(mu_);
  // TakeWanted failed or found nothing: the next FindPresence says true again.
  void FetchEnded() ABSL_LOCKS_EXCLUDED(mu_);

  // Something changed: everything is old, though still told within its grace.
  void Age() ABSL_LOCKS_EXCLUDED(mu_);
  // Nothing may be told any more.
  void Clear() ABSL_LOCKS_EXCLUDED(mu_);

 private:
  static constexpr int kGrace = 20;

  struct Entry {
    std::shared_ptr<const MatchAnswer> answer;
    absl::Time at = absl::InfinitePast();
    bool aged = false;
    bool asking = false;
    std::list<Checksum>::iterator order;
  };
  struct Presence {
    ChunkState state = ChunkState::kMiss;
    absl::Time at;
    bool aged = false;
  };
  struct KeyHash {
    size_t operator()(const Checksum& key) const { return key.low; }
  };

  static Checksum KeyOf(const MatchQuery& query);
  Entry& Touch(const Checksum& key) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const size_t answers_max_;
  const size_t presence_max_;
  absl::Mutex mu_;
  absl::flat_hash_map<Checksum, Entry, KeyHash> answers_ ABSL_GUARDED_BY(mu_);
  std::list<Checksum> order_ ABSL_GUARDED_BY(mu_);  // least recent first
  absl::flat_hash_map<ChunkId, Presence> presence_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_set<ChunkId> wanted_ ABSL_GUARDED_BY(mu_);
  bool fetching_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace larder::client

#endif  // LARDER_CLIENT_CORE_MATCH_CACHE_H_
