#ifndef LARDER_CODEC_KVC1_LOSSLESS_H_
#define LARDER_CODEC_KVC1_LOSSLESS_H_

#include <cstddef>
#include <vector>

#include "codec/kvc1/layer_format.h"
#include "kernels/kvc1.h"
#include "store/status.h"

namespace larder::kvc1 {

// Mode kLossless: exponents are entropy-coded, signs and mantissas are kept.
// FORMAT.md, "Lossless".

// Where the rows of a tile lie, of any element type.
struct PlainRows {
  std::byte* data = nullptr;
  ptrdiff_t token_stride = 0, head_stride = 0;
};

// Appends the tile to `out`. False if it would not become smaller than
// `raw_bytes`; `out` is then as it was.
bool EncodeLossless(const TileGrid::Tile& tile, Element element,
                    const PlainRows& rows, size_t raw_bytes,
                    std::vector<std::byte>& out, uint16_t& escapes);

// Decodes what is untrusted. DataLoss.
Status DecodeLossless(const TileGrid::Tile& tile, Element element,
                      ByteSpan bytes, uint16_t escapes, const PlainRows& rows);

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_LOSSLESS_H_
