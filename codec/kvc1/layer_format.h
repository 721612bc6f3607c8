#ifndef LARDER_CODEC_KVC1_LAYER_FORMAT_H_
#define LARDER_CODEC_KVC1_LAYER_FORMAT_H_

#include <array>
#include <cstdint>
#include <vector>

#include "codec/codec.h"
#include "codec/selection.h"
#include "store/status.h"
#include "store/units.h"

namespace larder::kvc1 {

// What an encoded layer consists of, as FORMAT.md says: header, index, tiles.
// This file knows where things lie; what a tile's bytes mean is for the modes.

inline constexpr uint32_t kHeaderBytes = 80;
inline constexpr uint32_t kTileEntryBytes = 24;
inline constexpr uint32_t kGroupRows = 128;
inline constexpr uint32_t kLanes = 32;
inline constexpr int kMaxPlanes = kPlanesMax;
// Numbers along a trellis can be told in so many.
inline constexpr int kTrellisPlanes = 2;

// The numbers that a tile is made of. On disk.
enum class Element : uint8_t {
  kF16 = 1,
  kBf16 = 2,
  kF8E4m3 = 3,
  kF8E5m2 = 4,
};

constexpr uint32_t ElementBytes(Element element) {
  return element == Element::kF16 || element == Element::kBf16 ? 2 : 1;
}

// The element of a space's keys and values, or InvalidArgument: KVC1 does not
// code others (float32, block formats, packed pages).
StatusOr<Element> ElementOf(const SpaceDescriptor& space);

// How the bytes of a tile are to be understood. On disk.
enum class TileMode : uint8_t {
  kRaw = 0,       // the rows as they are
  kConst = 1,     // every element is the one that is stored
  kLossless = 2,  // exponents entropy-coded, the rest as it is
  kSteps = 3,     // uniform steps, described by the profile
  kStepsKlt = 4,  // the same, of the profile's transform of a token's channels
  kStepsOwn = 5,  // uniform steps, described by the tile itself
  kStepsPredicted = 6,  // as kSteps, integers told by what differs from a guess
  kStepsTrellis = 7,    // likewise, in smaller steps along a trellis
  // Fixed rates (fixed.h).
  kFp8 = 16,   // e4m3, a power of two for each head
  kInt8 = 17,  // 8 bits between the least and the most of a group
  kInt4 = 18,  // 4 bits
};
inline constexpr size_t kTileModesEnd = 19;

constexpr bool IsFixed(TileMode mode) {
  return mode >= TileMode::kFp8 && mode <= TileMode::kInt4;
}
constexpr bool IsKnown(TileMode mode) {
  return mode <= TileMode::kStepsTrellis || IsFixed(mode);
}

// The tiles of a layer: [K|V][group of rows][block of heads], in this order. A
// block has as many heads (a power of two, fewer at the end) as it takes for
// 256 channels: smaller tiles would cost more in coder states.
class TileGrid {
 public:
  struct Tile {
    bool values = false;  // of V
    uint32_t row_begin = 0, row_count = 0;
    uint32_t head_begin = 0, head_count = 0;  // within the part
    uint32_t head_dim = 0;

    uint32_t channels() const { return head_count * head_dim; }
    uint32_t rounds() const { return (row_count + kLanes - 1) / kLanes; }
    bool Overlaps(const SelectedBox& box) const {
      return head_begin < box.head_end &&
             head_begin + head_count > box.head_begin &&
             row_begin < box.row_end && row_begin + row_count > box.row_begin;
    }
  };

  // REQUIRES: ElementOf(*layer.space) is OK and Kvc1 supports the layer.
  TileGrid(const CodedLayer& layer, Element element);

  uint32_t count() const { return per_half_[0] + per_half_[1]; }
  Tile At(uint32_t index) const;

  uint32_t rows() const { return rows_; }
  uint32_t heads() const { return heads_; }
  uint32_t head_dim(bool values) const { return dims_[values]; }
  Element element() const { return element_; }

  static uint32_t BlockHeads(uint32_t head_dim);

 private:
  Element element_;
  uint32_t rows_, heads_, groups_;
  uint32_t dims_[2], blocks_[2], per_half_[2];
};

struct LayerHeader {
  uint8_t planes = 1;
  Element element = Element::kF16;
  bool unrotated = false;  // keys are coded as they were before RoPE
  uint8_t level = 0;       // 0 where there is none
  uint8_t exact_rows = 0;  // rows of the layer's beginning that are kept as is
  std::array<uint8_t, 32> profile{};  // zeros: none
  uint64_t rope = 0;                  // Fingerprint, where unrotated
  float max_error[2] = {0, 0};        // largest |decoded - given| of K, of V
};

struct TileEntry {
  TileMode mode = TileMode::kRaw;
  uint16_t escapes = 0;
  uint32_t bytes = 0;                // of plane 0
  std::array<uint16_t, 2> words{};   // of planes 1 and 2, 16 bits each
  std::array<uint32_t, 3> checks{};  // of each plane's bytes

  uint32_t PlaneBytes(int plane) const {
    return plane == 0 ? bytes : 2u * words[plane - 1];
  }
};

// XXH3-64 of the bytes, its low half.
uint32_t PlaneCheck(ByteSpan bytes);

// What the front of an encoded layer takes: header and index.
uint64_t IndexBytes(const TileGrid& grid);

// Writes header and index to the front of `encoded`.
// REQUIRES: entries.size() == grid.count().
void WriteIndex(const TileGrid& grid, const LayerHeader& header,
                const std::vector<TileEntry>& entries, MutableByteSpan encoded);

// The index of an encoded layer, and where its tiles lie.
struct LayerIndex {
  LayerHeader header;
  std::vector<TileEntry> entries;
  std::vector<uint64_t> offsets;  // [plane][tile], and the end

  uint64_t Offset(int plane, size_t tile) const {
    return offsets[static_cast<size_t>(plane) * entries.size() + tile];
  }
};

// What the header says of the profile, nothing else of it being looked at;
// zeros where there is no header.
std::array<uint8_t, 32> ProfileIn(ByteSpan front);

// Reads the front of an encoded layer of `encoded_bytes` bytes, untrusted.
// DataLoss if it is not what WriteIndex would have written for this grid.
StatusOr<LayerIndex> ReadIndex(const TileGrid& grid, ByteSpan front,
                               uint64_t encoded_bytes);

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_LAYER_FORMAT_H_
