#include "codec/kvc1/kvc1.h"

#include <algorithm>
#include <string_view>
#include <vector>

#include "codec/kvc1/fixed.h"
#include "codec/kvc1/layer_context.h"
#include "codec/kvc1/layer_decoder.h"
#include "codec/kvc1/layer_encoder.h"
#include "codec/kvc1/layer_format.h"
#include "kernels/kvc1.h"

namespace larder::kvc1 {
namespace {

class TiledCodec : public Codec {
 public:
  TiledCodec(CodecId id, std::string_view name, bool lossless)
      : id_(id), name_(name), lossless_(lossless) {}

  CodecId id() const override { return id_; }
  std::string_view name() const override { return name_; }
  bool lossless() const override { return lossless_; }

  uint8_t planes_max() const override { return lossless_ ? 1 : kPlanesMax; }

  bool uses_profiles() const override { return !lossless_; }
  // Measured on SmolLM2 (tools/quality): at levels 7 and 8 without a profile
  // the mean KL divergence is 1.5 and 0.9.
  Lineage worst_without_profile() const override {
    return lossless_ ? Lineage::kUnknown : Lineage{6};
  }

  Status FitsProfile(const CodedLayer& layer, Lineage quality) const override {
    if (lossless_) return Codec::FitsProfile(layer, quality);
    const int level = LevelOf(quality);
    const Profile::Contents& contents = layer.profile->contents();
    if (level < 1 || level > contents.level_count) {
      return absl::InvalidArgumentError(
          absl::StrCat("the profile has levels 1 to ",
                       int{contents.level_count}, ", not ", level));
    }
    LayerContext context(layer, *ElementOf(*layer.space));
    context.UseProfile(*layer.profile);
    if (context.tensors[0] == nullptr) {
      return absl::InvalidArgumentError(
          "the profile is of other layers, heads or head sizes");
    }
    if (contents.unrotated_keys && HasRotatedKeys(layer)) {
      uint64_t fingerprint = 0;
      return Annotate(
          RopeOf(layer, context.grid.head_dim(false), fingerprint).status(),
          "the profile is of keys before rotation");
    }
    return absl::OkStatus();
  }

  ProfileId ProfileOf(ByteSpan front) const override {
    return {ProfileIn(front)};
  }

  Status Supports(const CodedLayer& layer) const override {
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, {}));
    LARDER_ASSIGN_OR_RETURN(const Element element, ElementOf(*layer.space));
    const GroupDescriptor& group = layer.group_descriptor();
    if (!HasRows(group)) {
      return absl::InvalidArgumentError(
          "kvc1 codes keys and values, not opaque pages or states");
    }
    const uint32_t bytes = ElementBytes(element);
    if (!lossless_ && bytes != 2) {
      return absl::InvalidArgumentError(
          "kvc1 quantizes float16 and bfloat16; fp8 can be kept lossless");
    }
    for (const uint32_t head_bytes : {group.k_head_bytes, group.v_head_bytes}) {
      if (head_bytes % bytes != 0 ||
          head_bytes / bytes > kernels::kTileChannelsMax) {
        return absl::InvalidArgumentError(
            "kvc1: heads of 1 to 1024 whole elements");
      }
    }
    return absl::OkStatus();
  }

  uint64_t EncodedBytesMax(const CodedLayer& layer) const override {
    const TileGrid grid(layer, *ElementOf(*layer.space));
    return kvc1::IndexBytes(grid) + PlainBytes(layer);
  }

  StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                                Lineage quality,
                                MutableByteSpan encoded) const override {
    EncodeOptions options;
    if (!lossless_) options.level = LevelOf(quality);
    options.planes = layer.planes;
    return EncodeWith(layer, plain, options, encoded);
  }

  StatusOr<EncodedLayer> EncodeWith(const CodedLayer& layer, ByteSpan plain,
                                    const EncodeOptions& options,
                                    MutableByteSpan encoded) const {
    LARDER_RETURN_IF_ERROR(Supports(layer));
    if (plain.size() != PlainBytes(layer)) {
      return absl::InvalidArgumentError("kvc1: wrong size of the layer");
    }
    if (options.level < 0 || options.level > kMaxLevel || options.planes < 1 ||
        options.planes > kMaxPlanes) {
      return absl::InvalidArgumentError(
          "kvc1: levels are 0 to 9, planes 1 to 3");
    }
    return EncodeLayer(layer, *ElementOf(*layer.space), options, plain,
                       encoded);
  }

  uint64_t IndexBytes(const CodedLayer& layer) const override {
    return kvc1::IndexBytes(TileGrid(layer, *ElementOf(*layer.space)));
  }

  StatusOr<std::vector<CodedRange>> Ranges(
      const CodedLayer& layer, const CodedSelection& selection, ByteSpan front,
      uint64_t encoded_bytes) const override {
    LARDER_RETURN_IF_ERROR(Supports(layer));
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, selection));
    const TileGrid grid(layer, *ElementOf(*layer.space));
    LARDER_ASSIGN_OR_RETURN(const LayerIndex index,
                            ReadIndex(grid, front, encoded_bytes));
    const SelectedBox box(layer, selection);
    const int planes = selection.planes != 0
                           ? std::min(selection.planes, index.header.planes)
                           : index.header.planes;
    std::vector<CodedRange> ranges = {{0, kvc1::IndexBytes(grid)}};
    for (int plane = 0; plane < planes; ++plane) {
      for (uint32_t i = 0; i < grid.count(); ++i) {
        const TileGrid::Tile tile = grid.At(i);
        const uint64_t bytes = index.entries[i].PlaneBytes(plane);
        if (bytes == 0 || !tile.Overlaps(box)) continue;
        const uint64_t offset = index.Offset(plane, i);
        CodedRange& last = ranges.back();
        if (last.offset + last.bytes == offset) {
          last.bytes += bytes;
        } else {
          ranges.push_back({offset, bytes});
        }
      }
    }
    return ranges;
  }

  Status Decode(const CodedLayer& layer, const CodedSelection& selection,
                ByteSpan encoded, MutableByteSpan plain) const override {
    LARDER_RETURN_IF_ERROR(Supports(layer));
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, selection));
    if (plain.size() != PlainBytes(layer, selection)) {
      return absl::InvalidArgumentError("kvc1: wrong size of the destination");
    }
    return DecodeLayer(layer, *ElementOf(*layer.space), selection, encoded,
                       plain);
  }

  Status DecodeTo(const CodedLayer& layer, const CodedSelection& selection,
                  ByteSpan encoded, const CodedPlaces& places) const override {
    LARDER_RETURN_IF_ERROR(Supports(layer));
    LARDER_RETURN_IF_ERROR(ValidateCoded(layer, selection));
    if (!HasRows(layer.group_descriptor())) {
      return absl::InvalidArgumentError("kvc1: a layer without rows");
    }
    return DecodeLayer(layer, *ElementOf(*layer.space), selection, encoded,
                       places);
  }

 private:
  const CodecId id_;
  const std::string_view name_;
  const bool lossless_;
};

// Of one quality, which is that of its tiles. Who asks for a better one gets
// every bit.
class FixedCodec final : public TiledCodec {
 public:
  FixedCodec(CodecId id, std::string_view name, TileMode mode, Lineage quality)
      : TiledCodec(id, name, false), mode_(mode), quality_(quality) {}

  Lineage default_quality() const override { return quality_; }
  uint8_t planes_max() const override { return 1; }

  StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                                Lineage quality,
                                MutableByteSpan encoded) const override {
    if (quality < quality_) return EncodeWith(layer, plain, {}, encoded);
    LARDER_RETURN_IF_ERROR(Supports(layer));
    return EncodeFixedLayer(layer, *ElementOf(*layer.space), mode_, quality_,
                            plain, encoded);
  }

 private:
  const TileMode mode_;
  const Lineage quality_;
};

const TiledCodec& Lossy() {
  static const auto* const kCodec =
      new TiledCodec(CodecId::kKvc1, "kvc1", false);
  return *kCodec;
}

}  // namespace

int LevelOf(Lineage quality) {
  return std::min(static_cast<int>(Raw(quality)), kMaxLevel);
}

const Codec& LosslessTiles() {
  static const auto* const kCodec =
      new TiledCodec(CodecId::kLossless, "lossless", true);
  return *kCodec;
}

StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                              const EncodeOptions& options,
                              MutableByteSpan encoded) {
  return Lossy().EncodeWith(layer, plain, options, encoded);
}

StatusOr<Description> Describe(const CodedLayer& layer, ByteSpan front,
                               uint64_t encoded_bytes) {
  LARDER_RETURN_IF_ERROR(LosslessTiles().Supports(layer));
  const TileGrid grid(layer, *ElementOf(*layer.space));
  LARDER_ASSIGN_OR_RETURN(const LayerIndex index,
                          ReadIndex(grid, front, encoded_bytes));
  Description out;
  out.level = index.header.level;
  out.planes = index.header.planes;
  out.unrotated = index.header.unrotated;
  out.profile.bytes = index.header.profile;
  out.max_error[0] = index.header.max_error[0];
  out.max_error[1] = index.header.max_error[1];
  out.tiles = grid.count();
  out.plane_bytes[0] = IndexBytes(grid);
  for (const TileEntry& entry : index.entries) {
    ++out.tiles_by_mode[static_cast<size_t>(entry.mode)];
    out.escapes += entry.escapes;
    for (int plane = 0; plane < out.planes; ++plane) {
      out.plane_bytes[plane] += entry.PlaneBytes(plane);
    }
  }
  return out;
}

}  // namespace larder::kvc1

namespace larder {

const Codec& Kvc1Codec() {
  return kvc1::Lossy();
}

// Qualities as measured on SmolLM2 (README.md): levels have mean KL divergences
// of 0.001, 0.003 and 0.01.
const Codec& Fp8Codec() {
  static const auto* const kCodec = new kvc1::FixedCodec(
      CodecId::kFp8, "fp8", kvc1::TileMode::kFp8, Lineage{2});
  return *kCodec;
}

const Codec& Int8Codec() {
  static const auto* const kCodec = new kvc1::FixedCodec(
      CodecId::kInt8, "int8", kvc1::TileMode::kInt8, Lineage{1});
  return *kCodec;
}

const Codec& Int4Codec() {
  static const auto* const kCodec = new kvc1::FixedCodec(
      CodecId::kInt4, "int4", kvc1::TileMode::kInt4, Lineage{3});
  return *kCodec;
}

}  // namespace larder
