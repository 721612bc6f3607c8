#ifndef LARDER_STORE_ROOT_CONTENTS_H_
#define LARDER_STORE_ROOT_CONTENTS_H_

#include <cstdint>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"

#include "store/policy.h"
#include "store/types.h"

namespace larder {

// Which root chunks of a tenant have the same content, whatever their space:
// what explains kSpaceDiffers. Not thread-safe.
class RootContents {
 public:
  void Add(TenantId tenant, const Sha256Digest& content, ChunkIndex chunk) {
    by_content_[{tenant, content}].push_back(chunk);
    by_chunk_.emplace(chunk, std::pair(tenant, content));
  }

  void Remove(ChunkIndex chunk) {
    const auto it = by_chunk_.find(chunk);
    if (it == by_chunk_.end()) return;
    const auto chunks = by_content_.find(it->second);
    std::erase(chunks->second, chunk);
    if (chunks->second.empty()) by_content_.erase(chunks);
    by_chunk_.erase(it);
  }

  // nullptr if there is none.
  const std::vector<ChunkIndex>* Find(TenantId tenant,
                                      const Sha256Digest& content) const {
    const auto it = by_content_.find(std::pair(tenant, content));
    return it == by_content_.end() ? nullptr : &it->second;
  }

  uint64_t MemoryBytes() const {
    return by_content_.capacity() * (sizeof(*by_content_.begin()) + 1) +
           by_content_.size() * (sizeof(ChunkIndex) + 16) +
           by_chunk_.capacity() * (sizeof(*by_chunk_.begin()) + 1);
  }

 private:
  using Key = std::pair<TenantId, Sha256Digest>;
  absl::flat_hash_map<Key, std::vector<ChunkIndex>> by_content_;
  absl::flat_hash_map<ChunkIndex, Key> by_chunk_;
};

}  // namespace larder

#endif  // LARDER_STORE_ROOT_CONTENTS_H_
