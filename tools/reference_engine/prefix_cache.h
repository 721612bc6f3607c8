#ifndef LARDER_TOOLS_REFERENCE_ENGINE_PREFIX_CACHE_H_
#define LARDER_TOOLS_REFERENCE_ENGINE_PREFIX_CACHE_H_

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "client/larder.h"
#include "store/status.h"
#include "tools/reference_engine/checkpoint.h"
#include "tools/reference_engine/paged_cache.h"
#include "tools/reference_engine/timeline.h"

namespace larder::reference {

struct PrefixCacheOptions {
  std::string socket;
  uint32_t chunk_tokens = 256;
  uint32_t worst_lineage = LARDER_LINEAGE_EXACT;
  uint32_t load_threads = 1;
  // Of a whole load, and so of every wait for one of its layers.
  std::chrono::milliseconds deadline{10'000};
};

// A prefix on its way into a paged cache, layer after layer. Destroyed, it
// writes nothing any more. Not thread-safe.
class PrefixLoad {
 public:
  ~PrefixLoad();

  uint32_t tokens() const { return tokens_; }
  // Until every chunk's KV of the layer lies in the cache, verified. NotFound,
  // DeadlineExceeded or Unavailable: it will not; whatever was computed over
  // this load is void.
  Status WaitLayer(uint32_t layer);
  // After the last layer: the worst lineage of what landed.
  StatusOr<uint8_t> Finish();

 private:
  friend class PrefixCache;
  class Watcher;
  PrefixLoad() = default;

  uint32_t tokens_ = 0;
  size_t chunks_ = 0;
  Deadline deadline_;
  Load load_;
  std::unique_ptr<Watcher> watcher_;  // before load_ goes
};

struct SaveWish {
  bool durable = false;  // will be asked for
  // Each layer of a chunk is a part, committed at once, for who waits for it;
  // and the last chunk may be a tail (SharedTokens). Else chunks are whole, and
  // committed with their last layer.
  bool by_layer = false;
  // The node that they are sent to at once, by its name; empty: none.
  std::string destination;
};

// The chunks of one prompt that are being saved, each layer as soon as it is
// computed. Destroyed, what is not committed was never there.
class PrefixSave {
 public:
  // The step of tokens [begin, end) is about to be computed: room in staging
  // for the chunks that end in it, unless they are there already.
  Status BeginStep(uint32_t begin, uint32_t end);
  // Their KV of that layer is in the cache.
  Status SaveLayer(uint32_t layer);
  Status CommitStep(uint8_t lineage);
  // Until all that was committed is that safe. The number of chunks.
  StatusOr<uint32_t> Wait(larder_stage stage);

 private:
  friend class PrefixCache;
  struct Chunk {
    uint32_t index = 0;
    Saver saver;  // by layer: none
  };
  PrefixSave() = default;
  // Null: it is there.
  StatusOr<std::optional<Saver>> Begin(uint32_t chunk, SaveOptions options);
  Status Gather(Saver& saver, uint32_t chunk, uint32_t layer);
  Status Commit(Saver saver, uint32_t chunk, uint8_t lineage);
  uint32_t EndOf(uint32_t chunk) const {
    return std::min((chunk + 1) * chunk_tokens_, tokens_);
  }

  Space* space_ = nullptr;
  uint32_t chunk_tokens_ = 0;
  uint32_t tokens_ = 0;  // of all chunks
  SaveWish wish_;
  Deadline deadline_;
  std::vector<Id> ids_;
  std::vector<int64_t> table_;
  std::vector<larder_plane> keys_, values_;
  std::vector<Chunk> step_;
  std::vector<Saver> committed_;
  uint32_t chunks_ = 0;  // committed
};

// How much of a prompt one engine can give another: whole blocks, and never the
// last token, whose logits are wanted.
inline uint32_t SharedTokens(std::span<const uint32_t> prompt) {
  return prompt.empty() ? 0
                        : static_cast<uint32_t>(prompt.size() - 1) /
                              kBlockTokens * kBlockTokens;
}

// What Larder keeps of an engine's prompts.
class PrefixCache {
 public:
  // Unavailable, as a client's open. `checkpoint`: whose KV it is.
  static StatusOr<std::unique_ptr<PrefixCache>> Open(
      const PrefixCacheOptions& options, const Checkpoint& checkpoint);

  const PrefixCacheOptions& options() const { return options_; }

  // How many of the prompt's first tokens are there; whole chunks, and never
  // its last token, whose logits are wanted.
  StatusOr<uint32_t> Match(std::span<const uint32_t> prompt);
  // Begins to put the KV of the prompt's first `tokens` tokens, whole chunks or
  // SharedTokens, into the blocks of `table`, layer by layer. `arriving`: each
  // is waited for until somebody has saved it. `cache`, and `timeline` if not
  // null, must outlive the load.
  StatusOr<std::unique_ptr<PrefixLoad>> StartLoad(
      std::span<const uint32_t> prompt, uint32_t tokens,
      std::span<const int64_t> table, const PagedCache& cache,
      Timeline* timeline, bool arriving = false);
  StatusOr<std::unique_ptr<PrefixSave>> StartSave(
      std::span<const uint32_t> prompt, std::span<const int64_t> table,
      const PagedCache& cache, const SaveWish& wish);

 private:
  PrefixCache() = default;
  // Of these tokens, a tail's too.
  StatusOr<std::vector<Id>> Ids(std::span<const uint32_t> tokens) const;
  std::span<const uint32_t> WholeChunks(
      std::span<const uint32_t> prompt) const {
    return prompt.first(prompt.size() - prompt.size() % options_.chunk_tokens);
  }

  PrefixCacheOptions options_;
  Client client_;
  Space space_;
};

}  // namespace larder::reference

#endif  // LARDER_TOOLS_REFERENCE_ENGINE_PREFIX_CACHE_H_
