#ifndef LARDER_STORE_SPACE_H_
#define LARDER_STORE_SPACE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder {

// How the bytes of a group lie in a segment. On disk and on wire.
enum class SegmentLayout : uint8_t {
  // Larder's own order [K|V][head][token][dim]: heads are separate stripes, so
  // that another tensor-parallel size reads only its heads.
  kHeadMajor = 1,
  // [K|V][token][head*dim]: one stripe for K and one for V (llama.cpp rows).
  kTokenMajor = 2,
  // Engine pages of unknown inner order; read back only in the same shape.
  kOpaque = 3,
};

// Layers of one kind. A space has at least one group.
struct GroupDescriptor {
  GroupKind kind = GroupKind::kFullAttention;
  SegmentLayout layout = SegmentLayout::kHeadMajor;
  uint16_t layer_count = 0;    // layers of this group, 1..4096
  uint16_t kv_head_count = 0;  // over all ranks; 1 for latent and opaque
  uint32_t k_head_bytes = 0;   // of one head, one token, keys (or opaque page)
  uint32_t v_head_bytes = 0;   // values; 0 where keys hold all (latent, state)
  uint32_t window_tokens = 0;  // kSlidingWindow only
  // Token interleave (context parallelism) or, for opaque parts, how many
  // pieces a chunk has: the parts of a chunk must cover
  // layer_count x kv_head_count x interleave_count.
  uint16_t interleave_count = 1;
  // Groups with equal non-zero `joint` are committed, moved, evicted together
  // and become visible together.
  uint16_t joint = 0;
  std::string layer_digest;  // which layers: free text, e.g. "0-29"

  bool operator==(const GroupDescriptor&) const = default;
};

// Everything that must agree for KV bytes to be interchangeable between two
// engines. A field left unknown is refused by Validate: guessing here is how
// caches serve wrong KV.
struct SpaceDescriptor {
  std::string model_name;     // for people; enters the id all the same
  Sha256Digest weights;       // of the weights themselves, never of a name
  std::string cache_dtype;    // "f16", "bf16", "fp8_e4m3", "q8_0" ...
  std::string kv_scales;      // digest of KV scales, or "none"
  std::string rope;           // every RoPE parameter, or "none"
  std::string engine_layout;  // engine and version whose layout this is
  std::string hash_scheme;    // "larder", "vllm:sha256_cbor:seed=0" ...
  uint32_t block_tokens = 0;  // the engine's page
  uint32_t chunk_tokens = 0;  // a multiple of block_tokens
  std::vector<GroupDescriptor> groups;

  bool operator==(const SpaceDescriptor&) const = default;
};

inline constexpr size_t kMaxGroups = 16;
inline constexpr size_t kMaxSpaceFieldBytes = 1024;
inline constexpr size_t kMaxSpaceBytes = 32_KiB;

// OK, or InvalidArgument naming the first field that is missing or absurd.
Status Validate(const SpaceDescriptor& space);

// The canonical encoding (store/FORMAT.md): equal spaces, equal bytes.
// REQUIRES: Validate(space).ok().
std::string EncodeSpace(const SpaceDescriptor& space);

// The reverse. Refuses anything that EncodeSpace would not have written:
// truncated, trailing or out-of-order bytes, sizes over the limits.
StatusOr<SpaceDescriptor> DecodeSpace(ByteSpan encoded);

// SHA-256 of "larder.space.1" and the canonical encoding.
SpaceId ComputeSpaceId(const SpaceDescriptor& space);

// The name of the first field in which the two differ ("cache_dtype",
// "groups[1].kv_head_count"); empty if they are equal.
std::string FirstDifference(const SpaceDescriptor& a, const SpaceDescriptor& b);

// Bytes of one segment (one layer of one part) that holds `tokens` tokens.
// For kOpaque: k_head_bytes + v_head_bytes per token, all heads of the shape.
// For kRecurrentState: k_head_bytes + v_head_bytes once, the state at the
// chunk's end. Saturates instead of wrapping round.
uint64_t SegmentBytes(const GroupDescriptor& group, const PartShape& shape,
                      uint32_t tokens);

}  // namespace larder

#endif  // LARDER_STORE_SPACE_H_
