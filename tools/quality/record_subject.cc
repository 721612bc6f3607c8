#include "tools/quality/record_subject.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "store/record.h"

namespace larder::quality {

RecordSubject::RecordSubject(const Codec& codec, SpaceDescriptor space)
    : codec_(codec), space_(std::move(space)) {}

StatusOr<Rate> RecordSubject::Apply(KvPrefix& prefix) const {
  Rate sum;
  for (uint32_t begin = 0; begin < prefix.tokens; begin += kChunkTokens) {
    const uint32_t tokens = std::min(kChunkTokens, prefix.tokens - begin);
    // A record of one stripe per layer has tables no larger than raw's.
    LARDER_ASSIGN_OR_RETURN(const RecordLayout layout,
                            LayoutRecord(space_.groups[0], Part(), tokens));
    uint64_t record = layout.payload_offset;
    for (uint32_t layer = 0; layer < prefix.shape.layers; ++layer) {
      LARDER_ASSIGN_OR_RETURN(const uint64_t bytes,
                              ApplyTo(prefix, layer, begin, tokens));
      record = RoundUp(record, kSegmentAlign) + bytes;
    }
    if (CountsChunk(prefix, begin)) {
      sum += Rate{8 * record, tokens * ElementsPerToken(prefix.shape)};
    }
  }
  return sum;
}

PartShape RecordSubject::Part() const {
  return {.layer_begin = 0,
          .layer_count = space_.groups[0].layer_count,
          .head_begin = 0,
          .head_count = space_.groups[0].kv_head_count};
}

StatusOr<uint64_t> RecordSubject::ApplyTo(KvPrefix& prefix, uint32_t index,
                                          uint32_t begin,
                                          uint32_t tokens) const {
  const CodedLayer layer{.space = &space_,
                         .group = GroupIndex{0},
                         .shape = Part(),
                         .layer = index,
                         .token_begin = begin,
                         .token_count = tokens,
                         .profile = profile()};
  LARDER_RETURN_IF_ERROR(ValidateCoded(layer, {}));
  LARDER_RETURN_IF_ERROR(codec_.Supports(layer));
  const size_t row = prefix.shape.row();
  const size_t half = tokens * row * sizeof(uint16_t);
  uint16_t* const keys = prefix.layers[index].keys.data() + begin * row;
  uint16_t* const values = prefix.layers[index].values.data() + begin * row;
  std::vector<std::byte> plain(2 * half);
  std::memcpy(plain.data(), keys, half);
  std::memcpy(plain.data() + half, values, half);
  std::vector<std::byte> encoded(codec_.EncodedBytesMax(layer));
  LARDER_ASSIGN_OR_RETURN(const EncodedLayer result,
                          Encode(layer, plain, encoded));
  LARDER_RETURN_IF_ERROR(
      codec_.Decode(layer, {}, ByteSpan(encoded).first(result.bytes), plain));
  std::memcpy(keys, plain.data(), half);
  std::memcpy(values, plain.data() + half, half);
  return result.bytes;
}

}  // namespace larder::quality
