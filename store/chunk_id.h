#ifndef LARDER_STORE_CHUNK_ID_H_
#define LARDER_STORE_CHUNK_ID_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "store/types.h"
#include "store/units.h"

namespace larder {

// What else than its tokens a request's KV depends on. On wire and in ids.
enum class RequestKeyKind : uint8_t {
  kSalt = 1,    // isolation the caller asks for, on top of the tenant
  kLora = 2,    // digest of the adapter's weights
  kImage = 3,   // digest of a multimodal item; `offset` = its first token
  kPrompt = 4,  // digest of prompt embeddings
};

struct RequestKey {
  RequestKeyKind kind = RequestKeyKind::kSalt;
  uint32_t offset = 0;  // token offset in the prompt; 0 where it has none
  std::string value;    // at most kMaxRequestKeyBytes
  bool operator==(const RequestKey&) const = default;
};

inline constexpr size_t kMaxRequestKeys = 64;
inline constexpr size_t kMaxRequestKeyBytes = 256;

// Chunk ids of a prompt (store/FORMAT.md has the encoding and test vectors):
//
//   id_i = SHA-256("larder.chunk.1" | space | parent? | tokens | request keys)
//
// The parent of chunk 0 is none. Request keys with an offset enter the chunk
// that contains it (and, through the parent, all later ones); those without
// enter chunk 0. Every variable-length field is preceded by its length and
// kind, so that no two different inputs have one encoding; the order in which
// keys are given means nothing.
//
// Returns one id per whole chunk of `chunk_tokens` tokens, and, when
// `block_tokens` is not 0 and at least one whole block is left over, one more
// for the tail (a multiple of the block, never a parent). At 1.3 GB/s of
// SHA-256, 512 chunks of 256 tokens take 0.5 ms.
struct PromptIds {
  std::vector<ChunkId> ids;
  uint32_t tail_tokens = 0;  // of the last id, if it is a tail; else 0
};
PromptIds ComputeChunkIds(const SpaceId& space,
                          std::span<const uint32_t> tokens,
                          uint32_t chunk_tokens, uint32_t block_tokens,
                          std::span<const RequestKey> keys);

// One link of the chain, for callers that hold the parent.
ChunkId ComputeChunkId(const SpaceId& space,
                       const std::optional<ChunkId>& parent,
                       std::span<const uint32_t> tokens,
                       std::span<const RequestKey> keys);

// Those that enter the id of tokens [begin, end) of a prompt.
std::vector<RequestKey> KeysWithin(std::span<const RequestKey> keys,
                                   size_t begin, size_t end);

// An engine's own hash of a chunk's last block, bound to the space:
// SHA-256("larder.engine-hash.1" | space | length | hash).
ChunkId ChunkIdFromEngineHash(const SpaceId& space, ByteSpan hash);

// What a root chunk (chunk 0) contains, whatever its space: lets the daemon say
// "the same tokens exist in a space that differs in field X".
// SHA-256("larder.content.1" | tokens | request keys).
Sha256Digest ComputeRootContent(std::span<const uint32_t> tokens,
                                std::span<const RequestKey> keys);

}  // namespace larder

#endif  // LARDER_STORE_CHUNK_ID_H_
