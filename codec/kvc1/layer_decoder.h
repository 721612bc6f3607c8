#ifndef LARDER_CODEC_KVC1_LAYER_DECODER_H_
#define LARDER_CODEC_KVC1_LAYER_DECODER_H_

#include "codec/codec.h"
#include "codec/kvc1/layer_format.h"

namespace larder::kvc1 {

// Decodes what is selected of an encoded layer, untrusted, into `plain`.
// REQUIRES: the layer is supported, the selection lies in it and `plain` is of
// its size. DataLoss; FailedPrecondition for a profile or rotation that is not
// there.
Status DecodeLayer(const CodedLayer& layer, Element element,
                   const CodedSelection& selection, ByteSpan encoded,
                   MutableByteSpan plain);
// The same to `places`. REQUIRES: the layer has rows.
Status DecodeLayer(const CodedLayer& layer, Element element,
                   const CodedSelection& selection, ByteSpan encoded,
                   const CodedPlaces& places);

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_LAYER_DECODER_H_
