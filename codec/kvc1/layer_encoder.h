#ifndef LARDER_CODEC_KVC1_LAYER_ENCODER_H_
#define LARDER_CODEC_KVC1_LAYER_ENCODER_H_

#include "codec/codec.h"
#include "codec/kvc1/kvc1.h"
#include "codec/kvc1/layer_format.h"

namespace larder::kvc1 {

// Encodes a layer of KVC1. REQUIRES: the layer is supported, `plain` is of its
// size and the options are in range. InvalidArgument if `encoded` is too small.
StatusOr<EncodedLayer> EncodeLayer(const CodedLayer& layer, Element element,
                                   const EncodeOptions& options, ByteSpan plain,
                                   MutableByteSpan encoded);

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_LAYER_ENCODER_H_
