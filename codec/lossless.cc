// Every bit: of keys and values in tiles that know what the numbers are, of all
// else as bytes.

#include "codec/bytes.h"
#include "codec/codec.h"
#include "codec/kvc1/kvc1.h"

namespace larder {
namespace {

class Lossless final : public Codec {
 public:
  CodecId id() const override { return CodecId::kLossless; }
  std::string_view name() const override { return "lossless"; }
  bool lossless() const override { return true; }

  Status Supports(const CodedLayer& layer) const override {
    return ValidateCoded(layer, {});
  }

  uint64_t EncodedBytesMax(const CodedLayer& layer) const override {
    return InTiles(layer) ? tiles_.EncodedBytesMax(layer)
                          : bytes::EncodedBytesMax(layer);
  }

  StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                                Lineage quality,
                                MutableByteSpan encoded) const override {
    return InTiles(layer) ? tiles_.Encode(layer, plain, quality, encoded)
                          : bytes::Encode(layer, plain, encoded);
  }

  uint64_t IndexBytes(const CodedLayer& layer) const override {
    return InTiles(layer) ? tiles_.IndexBytes(layer) : bytes::IndexBytes(layer);
  }

  StatusOr<std::vector<CodedRange>> Ranges(
      const CodedLayer& layer, const CodedSelection& selection, ByteSpan index,
      uint64_t encoded_bytes) const override {
    return InTiles(layer)
               ? tiles_.Ranges(layer, selection, index, encoded_bytes)
               : bytes::Ranges(layer, selection, index, encoded_bytes);
  }

  Status Decode(const CodedLayer& layer, const CodedSelection& selection,
                ByteSpan encoded, MutableByteSpan plain) const override {
    return InTiles(layer) ? tiles_.Decode(layer, selection, encoded, plain)
                          : bytes::Decode(layer, selection, encoded, plain);
  }

  Status DecodeTo(const CodedLayer& layer, const CodedSelection& selection,
                  ByteSpan encoded, const CodedPlaces& places) const override {
    return InTiles(layer) ? tiles_.DecodeTo(layer, selection, encoded, places)
                          : Codec::DecodeTo(layer, selection, encoded, places);
  }

 private:
  // The same for who encodes and who decodes: it follows from the space.
  bool InTiles(const CodedLayer& layer) const {
    return tiles_.Supports(layer).ok();
  }

  const Codec& tiles_ = kvc1::LosslessTiles();
};

}  // namespace

const Codec& LosslessCodec() {
  static const auto* const kCodec = new Lossless;
  return *kCodec;
}

}  // namespace larder
