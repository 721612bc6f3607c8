#include "tools/reference_engine/paged_cache.h"

#include <algorithm>
#include <numeric>
#include <random>

namespace larder::reference {
namespace {

uint64_t PlaneBytes(const ModelConfig& config, uint32_t blocks) {
  return uint64_t{blocks} * kBlockTokens * config.kv_heads * config.head_size *
         sizeof(uint16_t);
}

}  // namespace

PagedCache::PagedCache(const ModelConfig& config, uint32_t blocks)
    : config_(config),
      blocks_(blocks),
      plane_bytes_(PlaneBytes(config, blocks)),
      memory_(std::make_unique<std::byte[]>(2 * config.layers * plane_bytes_)),
      free_(blocks) {
  std::iota(free_.begin(), free_.end(), 0);
  std::shuffle(free_.begin(), free_.end(), std::mt19937(blocks));
}

kernels::PagedPlane PagedCache::Keys(uint32_t layer) const {
  const auto head = static_cast<int64_t>(config_.head_size * sizeof(uint16_t));
  const int64_t token = head * config_.kv_heads;
  return {.base = memory_.get() + uint64_t{2} * layer * plane_bytes_,
          .block_stride = token * kBlockTokens,
          .token_stride = token,
          .head_stride = head};
}

kernels::PagedPlane PagedCache::Values(uint32_t layer) const {
  kernels::PagedPlane plane = Keys(layer);
  plane.base = static_cast<std::byte*>(plane.base) + plane_bytes_;
  return plane;
}

Status PagedCache::Grow(uint32_t tokens, std::vector<int64_t>& table) {
  const size_t wanted = (uint64_t{tokens} + kBlockTokens - 1) / kBlockTokens;
  if (wanted <= table.size()) return absl::OkStatus();
  if (wanted - table.size() > free_.size()) {
    return absl::ResourceExhaustedError(
        absl::StrCat(wanted, " blocks of KV are needed, ",
                     table.size() + free_.size(), " are there"));
  }
  while (table.size() < wanted) {
    table.push_back(free_.back());
    free_.pop_back();
  }
  return absl::OkStatus();
}

void PagedCache::Free(std::vector<int64_t>& table) {
  free_.insert(free_.end(), table.begin(), table.end());
  table.clear();
}

}  // namespace larder::reference
