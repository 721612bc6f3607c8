#ifndef LARDER_TRANSPORT_REMOTE_FETCHER_H_
#define LARDER_TRANSPORT_REMOTE_FETCHER_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/container/flat_hash_map.h"
#include "absl/synchronization/mutex.h"

#include "store/engine.h"
#include "store/executor.h"
#include "store/transport.h"
#include "store/types.h"
#include "store/units.h"
#include "transport/remote/pages.h"
#include "transport/remote/remote_messages.h"
#include "transport/wire.h"

namespace larder {

// Brings the parts of held chunks into this process, and says of them what a
// daemon says of chunks that come from a slower tier: pending in the hold's
// answer, kHoldLayers while they come, kHoldChunk when they are there.
//
// Holds are served in the order in which they came. Of a hold by layer the
// first layers of all its chunks come first (the parts' tables, which come with
// them, say where layers end), then the second; of another one chunk after the
// other. At most kBytesMax are under way, so that what is asked for next does
// not wait for much.
//
// What the daemon says is not believed where it matters: nothing lands outside
// of the parts' memory, and who reads there verifies what he takes out.
//
// Thread-safe. Calls the door with its lock held.
class Fetcher {
 public:
  // The rest of the channel. Calls nothing of the fetcher within a call.
  class Door {
   public:
    virtual ~Door() = default;
    // The memory of a slab that was announced; null: there is none.
    virtual std::shared_ptr<Pages> PagesOf(uint32_t slab) = 0;
    // As Link has them; a landing 0 is none.
    virtual LandingId OpenLanding(MutableByteSpan memory,
                                  Link::Landed landed) = 0;
    virtual void CloseLanding(LandingId landing, Task closed) = 0;
    virtual void Fetch(const FetchRequest& request, Link::Done done) = 0;
    // For the client.
    virtual void Complete(const wire::RingEntry& entry) = 0;
  };

  // Bytes that are asked for at once, and calls for them.
  static constexpr uint64_t kBytesMax = 8_MiB;
  static constexpr size_t kCallsMax = 64;
  // Of one call; and as much of the next layers as makes a call worth its
  // while.
  static constexpr uint64_t kPieceBytes = 4_MiB;
  static constexpr uint64_t kLayerBytes = 256_KiB;

  // `owner` has both, and is kept by callbacks while they run.
  Fetcher(Door& door, std::weak_ptr<void> owner)
      : door_(door), owner_(std::move(owner)) {}

  // A packet that answers kHold or kAttachHold: chunks that the daemon has in
  // memory become pending in it, and are brought. `by_layer`: the hold is.
  void OnHold(std::string& reply, bool by_layer) ABSL_LOCKS_EXCLUDED(mu_);
  // A completion of a hold from the daemon.
  void OnCompletion(const wire::RingEntry& entry) ABSL_LOCKS_EXCLUDED(mu_);
  // The client is done with it. `released`: nothing of it lands here any more;
  // now, if it is no hold that is known.
  void Release(uint64_t hold, Task released) ABSL_LOCKS_EXCLUDED(mu_);

  // Parts that take memory here.
  size_t parts() const ABSL_LOCKS_EXCLUDED(mu_) {
    absl::MutexLock lock(&mu_);
    return parts_.size();
  }

 private:
  using PartKey = std::pair<uint32_t, uint64_t>;   // slab, offset
  using ChunkKey = std::pair<uint64_t, uint32_t>;  // hold, index
  // Hold, layer, order of asking: what is fetched first.
  using Turn = std::tuple<uint64_t, uint32_t, uint64_t>;

  struct Piece {
    uint64_t begin = 0, end = 0;  // within the part
    uint32_t layers = 0;          // that are whole with it and those before
    uint64_t landed = 0;
  };
  // A part's bytes here, as long as a hold has it, and until nothing lands in
  // them any more.
  struct Part {
    std::shared_ptr<Pages> pages;
    uint64_t number = 0;  // tells it from one that lay there before
    uint64_t bytes = 0;
    uint64_t first_bytes = 0;  // of its first piece
    uint32_t holds = 0;
    bool wanted = false;   // as soon as what lay there has gone
    bool closing = false;  // its landing, after the last hold
    bool failed = false;
    LandingId landing = 0;
    std::vector<Piece> pieces;  // asked for, one behind the other
    size_t there = 0;           // of them, from the first on
    uint32_t layers = 0;        // that are there; kAllLayers: all of it
    uint64_t order = 0;         // of the hold that it is brought for
    std::vector<ChunkKey> waiting;
  };
  struct Chunk {
    std::vector<PartKey> parts;
    bool impossible = false;  // a part is nowhere in memory that is known
    bool wanted = false, settled = false;
    uint32_t layers_told = 0;
  };
  struct Hold {
    uint64_t order = 0;
    bool by_layer = false;
    absl::flat_hash_map<uint32_t, Chunk> chunks;
  };
  struct Asking {
    PartKey key;
    uint64_t number = 0;
    size_t piece = 0;
  };

  static constexpr uint32_t kAllLayers = UINT32_MAX;

  void Take(const wire::RingEntry& entry) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Want(uint64_t hold, uint32_t index) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Begin(PartKey key, Part& part) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Ask(PartKey key, Part& part, uint64_t end, uint32_t layers)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AskForLayers(PartKey key, Part& part) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void AskForMore() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnLanded(PartKey key, uint64_t number, uint64_t offset, uint64_t size)
      ABSL_LOCKS_EXCLUDED(mu_);
  void OnFetched(PartKey key, uint64_t number, uint64_t bytes,
                 const Status& status) ABSL_LOCKS_EXCLUDED(mu_);
  void OnClosed(PartKey key, uint64_t number) ABSL_LOCKS_EXCLUDED(mu_);
  void Tell(ChunkKey chunk) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Settle(ChunkKey key, Chunk& chunk, MissReason reason)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  Door& door_;
  const std::weak_ptr<void> owner_;

  mutable absl::Mutex mu_;
  absl::flat_hash_map<uint64_t, Hold> holds_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<PartKey, Part> parts_ ABSL_GUARDED_BY(mu_);
  std::map<Turn, Asking> to_ask_ ABSL_GUARDED_BY(mu_);
  uint64_t bytes_asked_ ABSL_GUARDED_BY(mu_) = 0;
  size_t calls_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t next_ ABSL_GUARDED_BY(mu_) = 1;  // of holds, parts and askings
  // Completions of holds whose answer was not seen yet; the oldest go first.
  std::deque<wire::RingEntry> early_ ABSL_GUARDED_BY(mu_);
};

}  // namespace larder

#endif  // LARDER_TRANSPORT_REMOTE_FETCHER_H_
