#ifndef LARDER_TRANSPORT_KV_EVENTS_BATCH_ENCODER_H_
#define LARDER_TRANSPORT_KV_EVENTS_BATCH_ENCODER_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "absl/time/time.h"

namespace larder::kv_events {

// How events look within a batch: both forms are in the wild (FORMAT.md).
enum class Encoding : uint8_t { kArrays, kMaps };

// 64 bits that name a block.
struct BlockHash {
  uint64_t bits = 0;
  bool is_signed = false;  // written as int64_t, as SGLang does
  bool operator==(const BlockHash&) const = default;
};

struct BlockStored {
  std::span<const BlockHash> hashes;
  std::optional<BlockHash> parent;
  std::span<const uint32_t> tokens;  // block_size of each block, or none
  uint32_t block_size = 0;
  std::string_view medium;
};

// Builds one batch of vLLM's KV events in MessagePack.
class BatchEncoder {
 public:
  explicit BatchEncoder(Encoding encoding) : encoding_(encoding) {}

  void Stored(const BlockStored& event);
  void Removed(std::span<const BlockHash> hashes, std::string_view medium);
  void Cleared();

  size_t count() const { return count_; }  // events since the last Take
  size_t bytes() const { return events_.size(); }

  // The batch, and starts the next.
  std::string Take(absl::Time time);

 private:
  void Begin(std::string_view tag, uint32_t fields);
  void Field(std::string_view name);
  void Hashes(std::span<const BlockHash> hashes);

  const Encoding encoding_;
  std::string events_;
  size_t count_ = 0;
};

}  // namespace larder::kv_events

#endif  // LARDER_TRANSPORT_KV_EVENTS_BATCH_ENCODER_H_
