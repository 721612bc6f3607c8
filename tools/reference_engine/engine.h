#ifndef LARDER_TOOLS_REFERENCE_ENGINE_ENGINE_H_
#define LARDER_TOOLS_REFERENCE_ENGINE_ENGINE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "store/status.h"
#include "tools/reference_engine/checkpoint.h"
#include "tools/reference_engine/paged_cache.h"
#include "tools/reference_engine/prefix_cache.h"
#include "tools/reference_engine/timeline.h"
#include "tools/reference_engine/transformer.h"

namespace larder::reference {

struct Request {
  std::vector<uint32_t> prompt;
  uint32_t answer_tokens = 8;
  uint32_t step_tokens = 64;  // of the prompt, computed at once
  bool load = true;           // what Larder has of it
  bool save = true;           // what of it Larder has not
  SaveWish wish;  // ... and, if durable, wait until it survives power loss
  // The prompt's KV is being computed elsewhere: it is not asked what there is
  // of it, all of it is waited for.
  bool arriving = false;
  Timeline* timeline = nullptr;
};

struct Answer {
  std::vector<uint32_t> tokens;      // the most likely ones
  std::vector<float> prompt_logits;  // of the prompt's last token
  uint32_t loaded_tokens = 0;
  uint32_t saved_chunks = 0;
  // A load was begun and did not come: what was computed over it was thrown
  // away, the prompt was computed. `problem` says why.
  bool voided = false;
  uint8_t lineage = LARDER_LINEAGE_EXACT;  // of what was loaded
  std::string problem;  // Larder's; the answer is right all the same
  double first_token_seconds = 0;
};

// One request after the other: match, load layer by layer into attention,
// compute the rest, save. Nothing that happens to Larder changes an answer over
// exact KV. Not thread-safe.
class Engine {
 public:
  // `checkpoint` must outlive it; `prefixes`, too, or null for none. `blocks`
  // of 16 tokens.
  Engine(const Checkpoint& checkpoint, uint32_t blocks, PrefixCache* prefixes);

  // InvalidArgument, ResourceExhausted (no room in the paged cache).
  StatusOr<Answer> Run(const Request& request);

  // For tests: called when a load has been started, before any of its layers is
  // waited for, and before each layer's wait.
  void OnLoad(std::function<void(uint32_t layer)> told) {
    told_ = std::move(told);
  }

 private:
  class Step;
  // Computes the prompt from `position` on; logits of its last token.
  StatusOr<std::vector<float>> Prefill(const Request& request,
                                       uint32_t position, PrefixLoad* load,
                                       std::unique_ptr<PrefixSave>& save,
                                       Answer& answer);

  const Checkpoint& checkpoint_;
  Transformer transformer_;
  PagedCache cache_;
  PrefixCache* const prefixes_;
  std::vector<int64_t> table_;  // of the request under way
  std::function<void(uint32_t layer)> told_;
};

// The most likely token; of equals the first.
uint32_t MostLikely(const std::vector<float>& logits);
// Kullback-Leibler divergence of softmax(other) from softmax(logits), in nats.
double Divergence(const std::vector<float>& logits,
                  const std::vector<float>& other);

}  // namespace larder::reference

#endif  // LARDER_TOOLS_REFERENCE_ENGINE_ENGINE_H_
