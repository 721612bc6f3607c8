#ifndef LARDER_STORE_TYPES_H_
#define LARDER_STORE_TYPES_H_

// The words of Larder (README.md has the glossary), as types that do not
// convert into each other by accident.

#include <array>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

#include "store/status.h"

namespace larder {

// 32 bytes that name something by content. `Tag` keeps the kinds apart.
template <class Tag>
struct Digest {
  std::array<uint8_t, 32> bytes{};

  auto operator<=>(const Digest&) const = default;
  bool IsZero() const { return *this == Digest{}; }

  // Ids are already uniformly distributed: eight of their bytes are a hash.
  template <typename H>
  friend H AbslHashValue(H h, const Digest& digest) {
    uint64_t word;
    std::memcpy(&word, digest.bytes.data(), sizeof word);
    return H::combine(std::move(h), word);
  }
};

// Lower-case hexadecimal of any bytes.
std::string ToHex(const void* data, size_t size);
// Exactly `size` bytes from 2*size hexadecimal digits, or InvalidArgument.
Status FromHex(std::string_view hex, void* out, size_t size);

template <class Tag>
std::string ToHex(const Digest<Tag>& digest) {
  return ToHex(digest.bytes.data(), digest.bytes.size());
}

using SpaceId = Digest<struct SpaceIdTag>;
using ChunkId = Digest<struct ChunkIdTag>;
using Sha256Digest = Digest<struct Sha256Tag>;
// SHA-256 of the bytes of what a codec may know of a model beforehand
// (codec/profile.h): the same profile has the same id everywhere.
using ProfileId = Digest<struct ProfileTag>;

// The owner of chunks, slabs and quotas: decided by the daemon from the peer's
// credentials, never by a payload.
enum class TenantId : uint32_t {};
// One connection of one engine process, unique while the daemon lives.
enum class ClientId : uint64_t {};
// A set of held chunks; unguessable, so that workers may attach by value.
enum class HoldId : uint64_t {};
enum class ReservationId : uint64_t {};
// A space's weights version; grows by advance_epoch, never shrinks.
enum class Epoch : uint64_t {};
// Index into SpaceDescriptor::groups.
enum class GroupIndex : uint16_t {};

template <typename Enum>
constexpr auto Raw(Enum value) {
  return static_cast<std::underlying_type_t<Enum>>(value);
}

// Coded KV may be made of progressive planes: the first alone is coarse, each
// further one refines those before it (codec/codec.h). At most so many.
inline constexpr uint8_t kPlanesMax = 3;

// How far from exact the KV of a chunk is: the worst of its own copy and of
// everything beneath it when it was computed. Ordered, smaller is better.
// On disk and on wire.
enum class Lineage : uint8_t {
  kExact = 0,          // bit for bit what the engine computed over exact KV
  kLossyFinest = 1,    // 1..199: codec quality levels, finest first
  kApproximate = 200,  // reuse at another position, token selection and such
  kUnknown = 255,
};

// Kinds of layer groups. On disk and on wire.
enum class GroupKind : uint8_t {
  kFullAttention = 1,   // a prefix is usable when every chunk of it is there
  kSlidingWindow = 2,   // ... when the trailing window is there
  kRecurrentState = 3,  // ... when the state at its end is there
  kLatent = 4,          // MLA: as full attention, identical on every rank
  kIndexer = 5,         // sparse attention's key index: as full attention
};

// Media, fastest first. On disk and on wire.
enum class TierKind : uint8_t {
  kNone = 0,
  kHbm = 1,
  kDram = 2,
  kCxl = 3,
  kNvme = 4,
  kPeer = 5,
};

// How the payload of a part is coded. On disk and on wire.
enum class CodecId : uint8_t {
  kRaw = 0,
  kLossless = 1,
  kKvc1 = 2,
  kFp8 = 3,
  kInt8 = 4,
  kInt4 = 5,
};

// Why a chunk that was asked for is not served. On wire.
enum class MissReason : uint8_t {
  kNone = 0,          // it is served
  kNeverSeen = 1,     // no such chunk was committed (as far as is remembered)
  kEvicted = 2,       // made room for others, or was deleted by an operator
  kSpaceDiffers = 3,  // the same tokens exist in a space that differs
  kIncomplete = 4,    // some rank's part is still missing
  kLineage = 5,       // only a copy worse than was asked for
  kDeadline = 6,      // would have come too late
  kCorrupt = 7,       // a checksum did not match; the copy was dropped
  kEpoch = 8,         // computed with weights that were replaced since
  kBusy = 9,          // no room to bring it up now; everything is held
  kUnavailable = 10,  // the daemon or the tier is gone
};

std::string_view ToString(MissReason reason);
std::string_view ToString(TierKind kind);
std::string_view ToString(GroupKind kind);

// XXH3-128 of some bytes.
struct Checksum {
  uint64_t low = 0;
  uint64_t high = 0;
  bool operator==(const Checksum&) const = default;
};

// Which part of a chunk's group one rank wrote: a box of layers x heads, and
// of tokens taken in turn (token t belongs to `interleave_index` when
// t % interleave_count equals it). An opaque part is one of `interleave_count`
// pieces that are read back only in the same shape. On disk and on wire.
struct PartShape {
  uint16_t layer_begin = 0;
  uint16_t layer_count = 0;
  uint16_t head_begin = 0;
  uint16_t head_count = 0;
  uint16_t interleave_index = 0;
  uint16_t interleave_count = 1;
  auto operator<=>(const PartShape&) const = default;
};
static_assert(sizeof(PartShape) == 12);

}  // namespace larder

template <class Tag>
struct std::hash<larder::Digest<Tag>> {
  size_t operator()(const larder::Digest<Tag>& digest) const {
    size_t word;
    std::memcpy(&word, digest.bytes.data(), sizeof word);
    return word;
  }
};

#endif  // LARDER_STORE_TYPES_H_
