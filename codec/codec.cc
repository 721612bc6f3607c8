#include "codec/codec.h"

#include <cstring>

#include "codec/selection.h"
#include "store/record.h"

namespace larder {

Status ValidateCoded(const CodedLayer& layer, const CodedSelection& selection) {
  const auto refuse = [](absl::string_view why) {
    return absl::InvalidArgumentError(absl::StrCat("codec: ", why));
  };
  if (layer.space == nullptr ||
      Raw(layer.group) >= layer.space->groups.size()) {
    return refuse("no such group");
  }
  const GroupDescriptor& group = layer.group_descriptor();
  const PartShape& shape = layer.shape;
  if (layer.layer < shape.layer_begin ||
      layer.layer - shape.layer_begin >= shape.layer_count) {
    return refuse("the layer does not lie in the part");
  }
  // One layer is looked at alone, so the record as a whole may be any size.
  PartShape one = shape;
  one.layer_begin = static_cast<uint16_t>(layer.layer);
  one.layer_count = 1;
  const auto layout = LayoutRecord(group, one, layer.token_count);
  if (!layout.ok()) return Annotate(layout.status(), "codec");
  const uint32_t rows = PartTokens(group, shape, layer.token_count);
  if (selection.head_begin >= shape.head_count ||
      selection.head_count > shape.head_count - selection.head_begin ||
      selection.row_begin >= rows ||
      selection.row_count > rows - selection.row_begin) {
    return refuse("the selection does not lie in the layer");
  }
  const bool whole =
      selection.head_begin == 0 && selection.row_begin == 0 &&
      (selection.head_count == 0 || selection.head_count == shape.head_count) &&
      (selection.row_count == 0 || selection.row_count == rows);
  if (!whole && !HasRows(group)) {
    return refuse("opaque layers and states are decoded whole");
  }
  return absl::OkStatus();
}

uint64_t PlainBytes(const CodedLayer& layer) {
  const GroupDescriptor& group = layer.group_descriptor();
  return SegmentBytes(group, layer.shape,
                      PartTokens(group, layer.shape, layer.token_count));
}

uint64_t PlainBytes(const CodedLayer& layer, const CodedSelection& selection) {
  const SelectedBox box(layer, selection);
  PartShape shape = layer.shape;
  shape.head_count = static_cast<uint16_t>(box.heads());
  return SegmentBytes(layer.group_descriptor(), shape, box.rows());
}

Status Codec::DecodeTo(const CodedLayer& layer, const CodedSelection& selection,
                       ByteSpan encoded, const CodedPlaces& places) const {
  LARDER_RETURN_IF_ERROR(ValidateCoded(layer, selection));
  const GroupDescriptor& group = layer.group_descriptor();
  if (!HasRows(group)) {
    return absl::InvalidArgumentError("codec: a layer without rows");
  }
  std::vector<std::byte> plain(PlainBytes(layer, selection));
  LARDER_RETURN_IF_ERROR(
      Decode(layer, selection, encoded, MutableByteSpan(plain)));
  const SelectedBox box(layer, selection);
  const std::byte* from = plain.data();
  const auto place = [&](const CodedPlaces::Half& half, uint64_t bytes) {
    if (bytes == 0) return;
    const bool by_head = group.layout == SegmentLayout::kHeadMajor;
    const uint32_t outer = by_head ? box.heads() : box.rows();
    const uint32_t inner = by_head ? box.rows() : box.heads();
    for (uint32_t i = 0; i < outer; ++i) {
      for (uint32_t j = 0; j < inner; ++j, from += bytes) {
        std::memcpy(by_head ? half.At(j, i) : half.At(i, j), from, bytes);
      }
    }
  };
  place(places.keys, group.k_head_bytes);
  place(places.values, group.v_head_bytes);
  return absl::OkStatus();
}

Status Codec::FitsProfile(const CodedLayer&, Lineage) const {
  return absl::InvalidArgumentError(
      absl::StrCat("codec ", std::string(name()), " uses no profiles"));
}

const Codec* FindCodec(CodecId id) {
  switch (id) {
    case CodecId::kRaw:
      return &RawCodec();
    case CodecId::kLossless:
      return &LosslessCodec();
    case CodecId::kKvc1:
      return &Kvc1Codec();
    case CodecId::kFp8:
      return &Fp8Codec();
    case CodecId::kInt8:
      return &Int8Codec();
    case CodecId::kInt4:
      return &Int4Codec();
  }
  return nullptr;
}

}  // namespace larder
