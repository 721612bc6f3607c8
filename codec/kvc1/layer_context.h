#ifndef LARDER_CODEC_KVC1_LAYER_CONTEXT_H_
#define LARDER_CODEC_KVC1_LAYER_CONTEXT_H_

#include <array>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "codec/codec.h"
#include "codec/kvc1/layer_format.h"
#include "codec/kvc1/lossless.h"
#include "codec/kvc1/rope.h"
#include "codec/kvc1/scratch.h"
#include "codec/kvc1/steps.h"
#include "codec/profile.h"
#include "kernels/kvc1.h"
#include "store/status.h"

namespace larder::kvc1 {

// What encoding and decoding a layer have in common: where rows lie, what the
// space and the profile say of them, what a thread keeps.

// How the rows of keys and values lie in a dense block of the group's layout.
class DenseBlock {
 public:
  DenseBlock(const TileGrid& grid, SegmentLayout layout, uint32_t heads,
             uint32_t rows)
      : grid_(grid), layout_(layout), heads_(heads), rows_(rows) {}

  // Of (head, row) of keys or values, in bytes.
  uint64_t Offset(bool values, uint32_t head, uint32_t row) const {
    const uint64_t begin = values ? HalfBytes(false) : 0;
    return begin + head * HeadStride(values) + row * TokenStride(values);
  }
  uint64_t TokenStride(bool values) const {
    const uint64_t bytes = HeadBytes(values);
    return layout_ == SegmentLayout::kTokenMajor ? heads_ * bytes : bytes;
  }
  uint64_t HeadStride(bool values) const {
    const uint64_t bytes = HeadBytes(values);
    return layout_ == SegmentLayout::kTokenMajor ? bytes : rows_ * bytes;
  }
  uint64_t HeadBytes(bool values) const {
    return uint64_t{grid_.head_dim(values)} * ElementBytes(grid_.element());
  }

 private:
  uint64_t HalfBytes(bool values) const {
    return uint64_t{heads_} * rows_ * HeadBytes(values);
  }
  const TileGrid& grid_;
  SegmentLayout layout_;
  uint64_t heads_, rows_;
};

// Rows of a tile, in no other order than token by token, head by head.
inline uint64_t RawBytes(const TileGrid& grid, const TileGrid::Tile& tile,
                         uint32_t rows) {
  return uint64_t{rows} * tile.channels() * ElementBytes(grid.element());
}

inline void CopyRows(const TileGrid::Tile& tile, size_t head_bytes,
                     uint32_t rows, const PlainRows& from, std::byte* to) {
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t head = 0; head < tile.head_count; ++head) {
      std::memcpy(to,
                  from.data + row * from.token_stride + head * from.head_stride,
                  head_bytes);
      to += head_bytes;
    }
  }
}

inline void PlaceRows(const TileGrid::Tile& tile, size_t head_bytes,
                      uint32_t rows, const std::byte* from,
                      const PlainRows& to) {
  for (uint32_t row = 0; row < rows; ++row) {
    for (uint32_t head = 0; head < tile.head_count; ++head) {
      std::memcpy(to.At(row, head), from, head_bytes);
      from += head_bytes;
    }
  }
}

// The one element that all rows are, if they are: it is the first.
bool IsConst(const TileGrid::Tile& tile, size_t element_bytes,
             const PlainRows& rows);

// Whether its first row is a sequence's: an attention sink, whose every error
// is felt by all tokens after it.
inline bool BeginsSequence(const CodedLayer& layer) {
  return layer.token_begin == 0 && layer.shape.interleave_index == 0;
}

// `count` rows of a tile, from row `begin`.
template <typename Rows>
Rows SomeRows(const Rows& rows, size_t begin, size_t count) {
  Rows some = rows;
  if (rows.token_offsets != nullptr) {
    some.token_offsets += begin;
  } else {
    some.data += static_cast<ptrdiff_t>(begin) * rows.token_stride;
  }
  some.tokens = count;
  return some;
}

kernels::ConstTileRows ReadableRows(const TileGrid& grid,
                                    const TileGrid::Tile& tile,
                                    const PlainRows& rows);
kernels::TileRows WritableRows(const TileGrid& grid, const TileGrid::Tile& tile,
                               const PlainRows& rows);
// Rows of a tile without holes.
PlainRows DenseRows(const TileGrid& grid, const TileGrid::Tile& tile,
                    std::byte* data);

// What a thread keeps from layer to layer, so that nothing is allocated for a
// tile: a few MiB for the largest tiles.
struct Queued {
  TileGrid::Tile tile;
  StepsPlan plan;
  uint32_t exact_rows = 0;
  ByteSpan exact;
};
struct Workspace {
  StepsEncoder steps_encoder;
  StepsDecoder steps_decoder;
  LosslessEncoder lossless_encoder;
  LosslessDecoder lossless_decoder;
  std::array<Queued, StepsEncoder::kTogether> queue;
  std::array<OwnSteps, StepsEncoder::kTogether> own;
  std::vector<std::byte> planes[kMaxPlanes - 1];  // encoder: 1 and 2
  Scratch<std::byte> rows;  // decoded to be looked at, or cut from
};
Workspace& ThreadWorkspace();

// The rotation of a layer's keys, as the space's text describes it. Layers of a
// space say the same and are coded one after the other, so a thread keeps the
// last. Unimplemented: keys are coded as they are.
StatusOr<std::shared_ptr<const Rope>> RopeOf(const CodedLayer& layer,
                                             uint32_t head_dim,
                                             uint64_t& fingerprint);

// Whether keys of this group may be turned back at all: MLA keeps latents, an
// indexer its own.
bool HasRotatedKeys(const CodedLayer& layer);

// What of one layer every tile needs: its rotation and its profile's tensors.
struct LayerContext {
  const CodedLayer& layer;
  TileGrid grid;
  const TensorProfile* tensors[2] = {nullptr, nullptr};
  std::shared_ptr<const Rotation> rotation;  // null: keys as they are
  std::shared_ptr<const Rope> rope;

  LayerContext(const CodedLayer& l, Element element)
      : layer(l), grid(l, element) {}

  // Leaves `tensors` null if the profile is of other sizes.
  void UseProfile(const Profile& profile);
  void UseRotation(std::shared_ptr<const Rope> described);
  kernels::Rotary RotaryOf(const TileGrid::Tile& tile) const;
};

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_LAYER_CONTEXT_H_
