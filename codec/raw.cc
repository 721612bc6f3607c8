#include <cstring>

#include "codec/codec.h"
#include "store/record.h"

namespace larder {
namespace {

// Runs of bytes that are wanted of a plain layer, in order: `visit(offset,
// bytes)`. Adjacent runs are joined.
template <typename Visit>
void ForEachRun(const CodedLayer& layer, const CodedSelection& selection,
                Visit visit) {
  CodedRange run;
  const auto add = [&](uint64_t offset, uint64_t bytes) {
    if (bytes == 0) return;
    if (run.bytes != 0 && run.offset + run.bytes == offset) {
      run.bytes += bytes;
      return;
    }
    if (run.bytes != 0) visit(run.offset, run.bytes);
    run = {offset, bytes};
  };
  const GroupDescriptor& group = layer.group_descriptor();
  if (group.layout == SegmentLayout::kOpaque ||
      group.kind == GroupKind::kRecurrentState) {
    add(0, PlainBytes(layer));
  } else {
    const uint64_t heads = layer.shape.head_count;
    const uint64_t rows = PartTokens(group, layer.shape, layer.token_count);
    const uint64_t wanted_heads = selection.head_count != 0
                                      ? selection.head_count
                                      : heads - selection.head_begin;
    const uint64_t wanted_rows = selection.row_count != 0
                                     ? selection.row_count
                                     : rows - selection.row_begin;
    uint64_t half = 0;
    for (const uint64_t bytes : {group.k_head_bytes, group.v_head_bytes}) {
      if (group.layout == SegmentLayout::kHeadMajor) {
        for (uint64_t h = 0; h < wanted_heads; ++h) {
          const uint64_t stripe = (selection.head_begin + h) * rows;
          add(half + (stripe + selection.row_begin) * bytes,
              wanted_rows * bytes);
        }
      } else {
        for (uint64_t r = 0; r < wanted_rows; ++r) {
          const uint64_t row = (selection.row_begin + r) * heads;
          add(half + (row + selection.head_begin) * bytes,
              wanted_heads * bytes);
        }
      }
      half += heads * rows * bytes;
    }
  }
  if (run.bytes != 0) visit(run.offset, run.bytes);
}

Status WrongSize(const char* what) {
  return absl::InvalidArgumentError(
      absl::StrCat("raw codec: wrong size of ", what));
}

class RawBytes final : public Codec {
 public:
  CodecId id() const override { return CodecId::kRaw; }
  std::string_view name() const override { return "raw"; }
  bool lossless() const override { return true; }

  Status Supports(const CodedLayer& layer) const override {
    return ValidateCoded(layer, {});
  }

  uint64_t EncodedBytesMax(const CodedLayer& layer) const override {
    return PlainBytes(layer);
  }

  StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                                Lineage quality,
                                MutableByteSpan encoded) const override {
    LARDER_RETURN_IF_ERROR(Supports(layer));
    if (plain.size() != PlainBytes(layer)) return WrongSize("the layer");
    if (encoded.size() < plain.size()) return WrongSize("the destination");
    std::memcpy(encoded.data(), plain.data(), plain.size());
    return EncodedLayer{plain.size(), Lineage::kExact};
  }

  uint64_t IndexBytes(const CodedLayer& layer) const override { return 0; }

  StatusOr<std::vector<CodedRange>> Ranges(
      const CodedLayer& layer, const CodedSelection& selection, ByteSpan index,
      uint64_t encoded_bytes) const override {
    LARDER_RETURN_IF_ERROR(Check(layer, selection, encoded_bytes));
    std::vector<CodedRange> ranges;
    ForEachRun(layer, selection, [&ranges](uint64_t offset, uint64_t bytes) {
      ranges.push_back({offset, bytes});
    });
    return ranges;
  }

  Status Decode(const CodedLayer& layer, const CodedSelection& selection,
                ByteSpan encoded, MutableByteSpan plain) const override {
    LARDER_RETURN_IF_ERROR(Check(layer, selection, encoded.size()));
    if (plain.size() != PlainBytes(layer, selection)) {
      return WrongSize("the destination");
    }
    std::byte* to = plain.data();
    ForEachRun(layer, selection, [&](uint64_t offset, uint64_t bytes) {
      std::memcpy(to, encoded.data() + offset, bytes);
      to += bytes;
    });
    return absl::OkStatus();
  }

 private:
  static Status Check(const CodedLayer& layer, const CodedSelection& selection,
                      uint64_t encoded_bytes) {
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, selection));
    if (encoded_bytes != PlainBytes(layer)) {
      return absl::DataLossError("raw codec: wrong size of the encoded layer");
    }
    return absl::OkStatus();
  }
};

}  // namespace

const Codec& RawCodec() {
  static const RawBytes* const kCodec = new RawBytes;
  return *kCodec;
}

}  // namespace larder
