#include "codec/record_coder.h"

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace larder {
namespace {

class CodecRecordCoder final : public RecordCoder {
 public:
  CodecRecordCoder(ChooseCoding choose, CodecLookup lookup,
                   FindProfile profiles)
      : choose_(std::move(choose)),
        lookup_(lookup),
        profiles_(std::move(profiles)) {}

  CodingSpec DurableSpec(TenantId tenant, const SpaceId& space,
                         const SpaceDescriptor& descriptor,
                         GroupIndex group) const override {
    return choose_(tenant, space, descriptor, group);
  }

  StatusOr<uint64_t> EncodedBytesMax(const CodingSpec& spec,
                                     const SpaceDescriptor& descriptor,
                                     const RecordMeta& raw) const override {
    LARDER_ASSIGN_OR_RETURN(const Codec* codec, Find(spec, descriptor, raw));
    // Room for every layer alone, one after the other, and for the tables of
    // all planes.
    std::vector<uint64_t> most;
    for (uint32_t i = 0; i < raw.shape.layer_count; ++i) {
      CodedLayer layer =
          CodedLayerOf(descriptor, raw, raw.shape.layer_begin + i);
      layer.planes = spec.planes;
      LARDER_RETURN_IF_ERROR(codec->Supports(layer));
      most.push_back(codec->EncodedBytesMax(layer));
    }
    most.resize(most.size() * std::clamp<uint8_t>(spec.planes, 1, kPlanesMax));
    LARDER_ASSIGN_OR_RETURN(const RecordLayout layout,
                            LayoutCodedRecord(raw.shape, most));
    return layout.record_bytes;
  }

  StatusOr<std::optional<RecordMeta>> Encode(
      const CodingSpec& spec, const SpaceDescriptor& descriptor, ByteSpan raw,
      MutableByteSpan encoded) const override {
    LARDER_ASSIGN_OR_RETURN(const RecordView view, RecordView::Parse(raw));
    RecordMeta meta = view.meta();
    LARDER_ASSIGN_OR_RETURN(const Codec* codec, Find(spec, descriptor, meta));
    std::shared_ptr<const Profile> profile;
    if (!spec.profile.IsZero() && profiles_) profile = profiles_(spec.profile);
    const uint64_t raw_pages = RoundUp(meta.record_bytes, kPageBytes);
    const size_t layers = view.segment_count();
    std::vector<EncodedLayer> made(layers);
    std::vector<uint64_t> begins(layers);
    LARDER_ASSIGN_OR_RETURN(
        RecordLayout layout,
        LayoutCodedRecord(meta.shape, std::vector<uint64_t>(layers, 1)));
    uint64_t at = layout.payload_offset;
    for (size_t i = 0; i < layers; ++i) {
      const SegmentEntry segment = view.segment(i);
      CodedLayer layer = CodedLayerOf(descriptor, meta, segment.layer);
      layer.profile = profile.get();
      layer.planes = spec.planes;
      LARDER_RETURN_IF_ERROR(codec->Supports(layer));
      const ByteSpan plain =
          raw.subspan(segment.offset, segment.k_bytes + segment.v_bytes);
      at = RoundUp(at, kSegmentAlign);
      if (at > encoded.size() ||
          codec->EncodedBytesMax(layer) > encoded.size() - at) {
        return absl::InternalError("coder: too little room");
      }
      // While it is in the cache.
      LARDER_RETURN_IF_ERROR(view.VerifySegment(i));
      LARDER_ASSIGN_OR_RETURN(made[i], codec->Encode(layer, plain, spec.quality,
                                                     encoded.subspan(at)));
      if (made[i].bytes == 0 || made[i].bytes > encoded.size() - at) {
        return absl::InternalError("coder: a codec wrote past its room");
      }
      begins[i] = at;
      at += made[i].bytes;
      meta.lineage = std::max(meta.lineage, made[i].quality);
      if (RoundUp(at, kPageBytes) >= raw_pages) return std::nullopt;
    }
    LARDER_ASSIGN_OR_RETURN(
        layout, LayoutCodedRecord(meta.shape, PlaneSizes(made, meta)));
    // Tables of several planes take more room, and so may the gaps.
    if (RoundUp(layout.record_bytes, kPageBytes) >= raw_pages ||
        layout.record_bytes > encoded.size()) {
      return std::nullopt;
    }
    if (meta.planes > 1) PlaneByPlane(layout, made, begins, at, encoded);
    at = layout.record_bytes;
    meta.codec = spec.codec;
    SealRecord(layout, meta, {}, encoded);
    const uint64_t end =
        std::min<uint64_t>(RoundUp(at, kPageBytes), encoded.size());
    std::memset(encoded.data() + at, 0, end - at);
    return meta;
  }

  StatusOr<ProfileId> ProfileOf(CodecId id, ByteSpan payload) const override {
    const Codec* const codec = lookup_(id);
    if (codec == nullptr || payload.empty()) {
      return absl::NotFoundError("coder: cannot say what a copy is coded with");
    }
    return codec->ProfileOf(payload);
  }

 private:
  // Bytes of every layer's first plane, then of every layer's second, and so
  // on; says in the meta how many there are and what each gives.
  static std::vector<uint64_t> PlaneSizes(
      const std::vector<EncodedLayer>& layers, RecordMeta& meta) {
    meta.planes = 1;
    for (const EncodedLayer& layer : layers) {
      meta.planes = std::max(meta.planes, layer.planes);
    }
    meta.cuts = {};
    std::vector<uint64_t> sizes;
    uint8_t begin = 0;
    for (uint8_t end = 1; end <= meta.planes; begin = end++) {
      for (const EncodedLayer& layer : layers) {
        sizes.push_back(BytesOf(layer, end) - BytesOf(layer, begin));
        if (end >= layer.planes) continue;
        Lineage& worst = meta.cuts[end - 1].lineage;
        worst = std::max(worst, layer.cuts[end - 1].quality);
      }
    }
    return sizes;
  }

  // Of a layer's first planes.
  static uint64_t BytesOf(const EncodedLayer& layer, uint8_t planes) {
    if (planes == 0) return 0;
    return planes < layer.planes ? layer.cuts[planes - 1].bytes : layer.bytes;
  }

  // Layers that lie one after the other, up to `end`, to where the layout has
  // their planes.
  static void PlaneByPlane(const RecordLayout& layout,
                           const std::vector<EncodedLayer>& layers,
                           const std::vector<uint64_t>& begins, uint64_t end,
                           MutableByteSpan record) {
    const std::vector<std::byte> whole(record.begin() + begins[0],
                                       record.begin() + end);
    for (size_t i = 0; i < layout.segments.size(); ++i) {
      const size_t layer = i % layers.size();
      const auto plane = static_cast<uint8_t>(i / layers.size());
      const uint64_t from =
          begins[layer] - begins[0] + BytesOf(layers[layer], plane);
      std::memcpy(record.data() + layout.segments[i].offset,
                  whole.data() + from, layout.segments[i].k_bytes);
    }
  }

  // The codec that is wanted, if the record is one that can be coded.
  StatusOr<const Codec*> Find(const CodingSpec& spec,
                              const SpaceDescriptor& descriptor,
                              const RecordMeta& raw) const {
    const Codec* codec = lookup_(spec.codec);
    if (codec == nullptr) {
      return absl::InvalidArgumentError(
          absl::StrCat("coder: no codec ", int{Raw(spec.codec)}));
    }
    if (raw.codec != CodecId::kRaw ||
        Raw(raw.group) >= descriptor.groups.size()) {
      return absl::InvalidArgumentError("coder: not a raw record of the space");
    }
    return codec;
  }

  const ChooseCoding choose_;
  const CodecLookup lookup_;
  const FindProfile profiles_;
};

absl::string_view Absl(std::string_view text) {
  return {text.data(), text.size()};
}

// Every codec there is, in the order of ids.
std::vector<const Codec*> All(CodecLookup lookup) {
  std::vector<const Codec*> codecs;
  for (int id = 0; id <= UINT8_MAX; ++id) {
    const Codec* codec = lookup(CodecId{static_cast<uint8_t>(id)});
    if (codec != nullptr) codecs.push_back(codec);
  }
  return codecs;
}

// What stands behind the colon of `text`.
StatusOr<Lineage> ParseLevel(const Codec& codec, std::string_view text,
                             std::string_view digits) {
  if (codec.default_quality() != Lineage::kUnknown) {
    return absl::InvalidArgumentError(
        absl::StrCat("codec ", Absl(codec.name()), " has no levels"));
  }
  uint32_t level = 0;
  if (!absl::SimpleAtoi(Absl(digits), &level) || level < 1 ||
      level >= Raw(Lineage::kApproximate)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "\"", Absl(text.substr(0, 100)), "\": levels are 1 (finest) to 199"));
  }
  return static_cast<Lineage>(level);
}

// What stands behind the slash of `text`.
StatusOr<uint8_t> ParsePlanes(const Codec& codec, std::string_view text,
                              std::string_view digits) {
  if (codec.planes_max() == 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("codec ", Absl(codec.name()), " has no planes"));
  }
  uint32_t planes = 0;
  if (!absl::SimpleAtoi(Absl(digits), &planes) || planes < 1 ||
      planes > codec.planes_max()) {
    return absl::InvalidArgumentError(
        absl::StrCat("\"", Absl(text.substr(0, 100)), "\": planes are 1 to ",
                     int{codec.planes_max()}));
  }
  return static_cast<uint8_t>(planes);
}

}  // namespace

std::unique_ptr<RecordCoder> NewRecordCoder(ChooseCoding choose,
                                            CodecLookup lookup,
                                            FindProfile profiles) {
  return std::make_unique<CodecRecordCoder>(std::move(choose), lookup,
                                            std::move(profiles));
}

Status CheckProfileFits(const CodingSpec& spec, const Profile& profile,
                        const SpaceDescriptor& descriptor, GroupIndex group,
                        CodecLookup lookup) {
  const Codec* codec = lookup(spec.codec);
  if (codec == nullptr || Raw(group) >= descriptor.groups.size()) {
    return absl::InvalidArgumentError("no such codec or group");
  }
  const GroupDescriptor& about = descriptor.groups[Raw(group)];
  CodedLayer layer;
  layer.space = &descriptor;
  layer.group = group;
  layer.shape.layer_count = about.layer_count;
  layer.shape.head_count = about.kv_head_count;
  layer.shape.interleave_count = std::max<uint16_t>(about.interleave_count, 1);
  layer.token_count = descriptor.chunk_tokens;
  layer.profile = &profile;
  for (; layer.layer < about.layer_count; ++layer.layer) {
    LARDER_RETURN_IF_ERROR(codec->Supports(layer));
    LARDER_RETURN_IF_ERROR(codec->FitsProfile(layer, spec.quality));
  }
  return absl::OkStatus();
}

CodingSpec WithoutProfile(CodingSpec spec, CodecLookup lookup) {
  spec.profile = {};
  const Codec* codec = lookup(spec.codec);
  if (codec != nullptr && codec->uses_profiles()) {
    spec.quality = std::min(spec.quality, codec->worst_without_profile());
  }
  return spec;
}

Status CheckWithoutProfile(const CodingSpec& spec, CodecLookup lookup) {
  const CodingSpec best = WithoutProfile(spec, lookup);
  if (best.quality == spec.quality) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      FormatCoding(spec, lookup),
      " without a profile makes KV that is of no use; make a profile of the "
      "model (`larder calibrate`), add it (`larder profile add`) and name it "
      "beside the codec, or take ",
      FormatCoding(best, lookup), " or finer"));
}

Status CheckCodedSegments(const RecordView& record) {
  for (size_t i = 0; i < record.segment_count(); ++i) {
    const SegmentEntry segment = record.segment(i);
    if (segment.k_stripes != 1 || segment.v_stripes != 0 ||
        segment.v_bytes != 0) {
      return absl::DataLossError("a coded record with more than one stripe");
    }
  }
  return absl::OkStatus();
}

CodedLayer CodedLayerOf(const SpaceDescriptor& space, const RecordMeta& meta,
                        uint32_t layer) {
  return {&space, meta.group,       meta.shape,
          layer,  meta.token_begin, meta.token_count};
}

StatusOr<CodingSpec> ParseCoding(std::string_view text, CodecLookup lookup) {
  const size_t slash = text.find('/');
  const std::string_view coding = text.substr(0, slash);
  const size_t colon = coding.find(':');
  const std::string_view name = coding.substr(0, colon);
  for (const Codec* codec : All(lookup)) {
    if (codec->name() != name) continue;
    CodingSpec spec{codec->id(), codec->default_quality()};
    if (colon != std::string_view::npos) {
      LARDER_ASSIGN_OR_RETURN(
          spec.quality, ParseLevel(*codec, text, coding.substr(colon + 1)));
    } else if (spec.quality == Lineage::kUnknown) {
      return absl::InvalidArgumentError(
          absl::StrCat("codec ", Absl(name), " needs a quality level, 1 ",
                       "(finest) to 199, such as ", Absl(name), ":2"));
    }
    if (slash != std::string_view::npos) {
      LARDER_ASSIGN_OR_RETURN(
          spec.planes, ParsePlanes(*codec, text, text.substr(slash + 1)));
    }
    return spec;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown codec \"", Absl(name.substr(0, 100)), "\"; there ",
                   "are ", KnownCodings(lookup)));
}

std::string FormatCoding(CodecId id, Lineage quality, CodecLookup lookup) {
  const Codec* codec = lookup(id);
  if (codec == nullptr) return absl::StrCat("codec ", int{Raw(id)});
  std::string text(codec->name());
  // Of a copy the lineage may be worse than any codec's: its ancestors'.
  const bool level = codec->default_quality() == Lineage::kUnknown &&
                     quality != Lineage::kExact &&
                     quality < Lineage::kApproximate;
  if (level) absl::StrAppend(&text, ":", int{Raw(quality)});
  return text;
}

std::string FormatCoding(const CodingSpec& spec, CodecLookup lookup) {
  std::string text = FormatCoding(spec.codec, spec.quality, lookup);
  if (spec.planes > 1) absl::StrAppend(&text, "/", int{spec.planes});
  return text;
}

std::string KnownCodings(CodecLookup lookup) {
  std::string text;
  for (const Codec* codec : All(lookup)) {
    absl::StrAppend(
        &text, text.empty() ? "" : ", ", Absl(codec->name()),
        codec->default_quality() == Lineage::kUnknown ? ":LEVEL" : "",
        codec->planes_max() > 1 ? "[/PLANES]" : "");
  }
  return text;
}

}  // namespace larder
