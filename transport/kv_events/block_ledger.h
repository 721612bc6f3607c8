#ifndef LARDER_TRANSPORT_KV_EVENTS_BLOCK_LEDGER_H_
#define LARDER_TRANSPORT_KV_EVENTS_BLOCK_LEDGER_H_

#include <cstdint>
#include <functional>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"

#include "store/engine.h"
#include "store/events.h"
#include "store/types.h"
#include "transport/kv_events/batch_encoder.h"

namespace larder::kv_events {

// What routers call the media of tiers.
std::string_view MediumOf(TierKind tier);

// Larder's own name of a chunk: the low 64 bits of its id.
BlockHash OwnName(const ChunkId& chunk);

// Turns what happens to one tenant's chunks into events about blocks, and
// remembers under which names it told of each, so that the same are taken back.
//
// A chunk whose save said what the engine's blocks in it are is told block by
// block, in every tier that it comes to while it is in one. Any other, and
// those for which there is no memory left, is told as one block of its own
// name, without tokens. Not thread-safe.
class BlockLedger {
 public:
  struct Options {
    uint64_t memory = 256_MiB;  // for what saves said
    bool keyed_tokens = false;  // tell the tokens of keyed chunks, too
    // A space's block_tokens, 0 if it is not known.
    std::function<uint32_t(const SpaceId& space)> block_tokens;
  };

  explicit BlockLedger(Options options) : options_(std::move(options)) {}

  // kChunkStored and kChunkRemoved; others are none of its business.
  void Apply(const Event& event, BatchEncoder& out);

  // Everything anew: BeginListing, every chunk that there is, EndListing with
  // the last event's number, and Apply for all events since the beginning,
  // although the list may know of them already.
  void BeginListing(BatchEncoder& out);
  void List(const ChunkSummary& chunk, BatchEncoder& out);
  void EndListing(uint64_t last_sequence);

  uint64_t known() const { return told_.size(); }
  uint64_t memory() const { return memory_; }
  // Chunks of which less was told than was said, for want of memory.
  uint64_t untold() const { return untold_; }

 private:
  using Key = std::pair<SpaceId, ChunkId>;
  struct Told {
    std::vector<BlockHash> names;
    std::vector<uint32_t> tokens;
    uint32_t block_size = 0;
    std::optional<BlockHash> parent;
    uint32_t tiers = 0;  // bit TierKind: told of under these names
  };

  std::optional<BlockHash> ParentOf(const SpaceId& space,
                                    const ChunkId& parent) const;
  Told* Remember(const Event& event);
  void Forget(absl::flat_hash_map<Key, Told>::iterator it);
  static uint64_t BytesOf(const Told& told);
  void TellOwn(const SpaceId& space, const ChunkId& chunk,
               const ChunkId& parent, TierKind tier, BatchEncoder& out) const;
  static void Tell(Told& told, TierKind tier, BatchEncoder& out);

  const Options options_;
  absl::flat_hash_map<Key, Told> told_;
  uint64_t memory_ = 0;
  uint64_t untold_ = 0;
  uint64_t listed_until_ = 0;
};

}  // namespace larder::kv_events

#endif  // LARDER_TRANSPORT_KV_EVENTS_BLOCK_LEDGER_H_
