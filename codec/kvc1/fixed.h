#ifndef LARDER_CODEC_KVC1_FIXED_H_
#define LARDER_CODEC_KVC1_FIXED_H_

#include <cstddef>
#include <cstdint>

#include "codec/codec.h"
#include "codec/kvc1/layer_format.h"
#include "kernels/kvc1.h"
#include "store/status.h"
#include "store/units.h"

namespace larder::kvc1 {

// Tiles of a fixed rate, as FORMAT.md says: fp8 with a power of two for each
// head; 8 or 4 bits between the smallest and the largest of 64 numbers, which
// are rows of one channel of keys, channels of one row of values (the shape of
// KIVI, arXiv 2402.02750). `tile` is of 16-bit elements, `rows` are those of
// its rows that are coded, at least one.

// What they take.
size_t FixedBytes(TileMode mode, const TileGrid::Tile& tile, size_t rows);
// The exact rows that are before them in a tile of so many bytes. DataLoss: a
// tile of this mode has another size, or is not of such elements.
StatusOr<uint32_t> FixedExactRows(const TileGrid& grid,
                                  const LayerHeader& header,
                                  const TileGrid::Tile& tile, TileMode mode,
                                  size_t bytes);

// REQUIRES: all elements are finite.
void EncodeFixed(TileMode mode, const TileGrid::Tile& tile,
                 const kernels::ConstTileRows& rows, std::byte* encoded);
// Of any bytes; they may give infinities and NaNs.
void DecodeFixed(TileMode mode, const TileGrid::Tile& tile,
                 const std::byte* encoded, const kernels::TileRows& rows);

// A layer in tiles of this mode; a tile that has what is not finite, or would
// not get smaller, stays as it is. `quality` is what the layer then is of, or
// exact if no tile lost anything. InvalidArgument if `encoded` is too small.
StatusOr<EncodedLayer> EncodeFixedLayer(const CodedLayer& layer,
                                        Element element, TileMode mode,
                                        Lineage quality, ByteSpan plain,
                                        MutableByteSpan encoded);

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_FIXED_H_
