#ifndef LARDER_CODEC_BYTES_H_
#define LARDER_CODEC_BYTES_H_

#include <cstdint>
#include <vector>

#include "codec/codec.h"
#include "store/status.h"
#include "store/units.h"

namespace larder::bytes {

// Layers whose bytes mean nothing to us: opaque pages, states, block formats.
// Cut into frames of 64 KiB, the first, second, ... bytes of their numbers
// apart, each compressed with zstd (FORMAT.md). As Codec's functions of the
// same names; every layer is supported.

uint64_t EncodedBytesMax(const CodedLayer& layer);
StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                              MutableByteSpan encoded);
uint64_t IndexBytes(const CodedLayer& layer);
StatusOr<std::vector<CodedRange>> Ranges(const CodedLayer& layer,
                                         const CodedSelection& selection,
                                         ByteSpan index,
                                         uint64_t encoded_bytes);
Status Decode(const CodedLayer& layer, const CodedSelection& selection,
              ByteSpan encoded, MutableByteSpan plain);

}  // namespace larder::bytes

#endif  // LARDER_CODEC_BYTES_H_
