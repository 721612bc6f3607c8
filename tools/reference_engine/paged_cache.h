#ifndef LARDER_TOOLS_REFERENCE_ENGINE_PAGED_CACHE_H_
#define LARDER_TOOLS_REFERENCE_ENGINE_PAGED_CACHE_H_

#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "kernels/paged.h"
#include "store/status.h"
#include "tools/reference_engine/checkpoint.h"

namespace larder::reference {

inline constexpr uint32_t kBlockTokens = 16;

// KV of a model's layers in blocks of 16 tokens, fp16, as vLLM has it: per
// layer a plane of keys and one of values, [block][token][head][dim]. Blocks
// are handed out in an order that is not that of memory, so that whoever takes
// neighbouring tokens for neighbouring bytes is seen at once. Not thread-safe,
// but different bytes may be written by different threads.
class PagedCache {
 public:
  PagedCache(const ModelConfig& config, uint32_t blocks);

  const ModelConfig& config() const { return config_; }
  uint32_t blocks() const { return blocks_; }
  uint32_t blocks_free() const { return static_cast<uint32_t>(free_.size()); }

  kernels::PagedPlane Keys(uint32_t layer) const;
  kernels::PagedPlane Values(uint32_t layer) const;
  uint64_t plane_bytes() const { return plane_bytes_; }

  // Appends blocks until `tokens` fit the table. ResourceExhausted, and the
  // table as it was, if there are not so many.
  Status Grow(uint32_t tokens, std::vector<int64_t>& table);
  // Back to the cache, all of them.
  void Free(std::vector<int64_t>& table);

 private:
  const ModelConfig config_;
  const uint32_t blocks_;
  const uint64_t plane_bytes_;
  std::unique_ptr<std::byte[]> memory_;
  std::vector<int64_t> free_;
};

// The place of a token's head in a plane.
inline uint16_t* At(const kernels::PagedPlane& plane,
                    std::span<const int64_t> table, uint32_t token,
                    uint32_t head) {
  return reinterpret_cast<uint16_t*>(
      static_cast<std::byte*>(plane.base) +
      table[token / kBlockTokens] * plane.block_stride +
      token % kBlockTokens * plane.token_stride + head * plane.head_stride);
}

}  // namespace larder::reference

#endif  // LARDER_TOOLS_REFERENCE_ENGINE_PAGED_CACHE_H_
