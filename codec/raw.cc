#include <cstring>

#include "codec/codec.h"
#include "codec/selection.h"

namespace larder {
namespace {

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
