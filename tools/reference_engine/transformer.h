#ifndef LARDER_TOOLS_REFERENCE_ENGINE_TRANSFORMER_H_
#define LARDER_TOOLS_REFERENCE_ENGINE_TRANSFORMER_H_

#include <cstdint>
#include <span>
#include <vector>

#include "store/status.h"
#include "tools/reference_engine/checkpoint.h"
#include "tools/reference_engine/paged_cache.h"

namespace larder::reference {

// Told of a step's layers, on the step's thread.
class StepObserver {
 public:
  virtual ~StepObserver() = default;
  // Before the layer's attention reads KV of tokens before the step. A failure
  // ends the step: it is void.
  virtual Status BeforeAttention(uint32_t layer) { return absl::OkStatus(); }
  // The layer's KV of the step's tokens is in the cache.
  virtual Status AfterKv(uint32_t layer) { return absl::OkStatus(); }
  virtual void AfterLayer(uint32_t layer) {}
};

// The forward pass. Attention reads keys and values, the step's own too, from
// the paged cache alone, and every sum has an order of its own: logits are the
// same bits however a prompt is cut into steps, and wherever its blocks lie.
// Not thread-safe.
class Transformer {
 public:
  // `checkpoint` must outlive it.
  explicit Transformer(const Checkpoint& checkpoint);

  // Computes tokens [position, position + tokens.size()) over those before
  // them, whose KV is in the blocks of `table`; theirs goes there too. Returns
  // the last token's logits. InvalidArgument: no tokens, one outside of the
  // vocabulary, or too few blocks.
  StatusOr<std::vector<float>> Step(std::span<const uint32_t> tokens,
                                    uint32_t position,
                                    std::span<const int64_t> table,
                                    PagedCache& cache,
                                    StepObserver* observer = nullptr);

 private:
  void Attend(uint32_t layer, uint32_t position, uint32_t tokens,
              std::span<const int64_t> table, const PagedCache& cache);

  const Checkpoint& checkpoint_;
  const ModelConfig& config_;
  std::vector<float> frequencies_;  // of RoPE, per pair
  // Of the step: [tokens][...].
  std::vector<float> residual_, normed_, queries_, keys_, values_, attended_,
      hidden_, gate_, up_;
};

// RMSNorm of one token.
void Normalize(std::span<const float> in, std::span<const float> weights,
               float epsilon, float* out);

}  // namespace larder::reference

#endif  // LARDER_TOOLS_REFERENCE_ENGINE_TRANSFORMER_H_
