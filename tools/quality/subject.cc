#include "tools/quality/subject.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_join.h"

#include "codec/baselines/half.h"
#include "store/record.h"
#include "store/units.h"
#include "tools/quality/metrics.h"

namespace larder::quality {
namespace {

using baselines::Baseline;

// MiKV and ZipCache look at the queries that come last; the longer the window,
// the better they know.
constexpr uint32_t kObservedQueries = 128;

uint64_t ElementsPerToken(const ModelShape& shape) {
  return uint64_t{2} * shape.row() * shape.layers;
}

// Is the chunk of tokens from `begin` one that counts?
bool Counts(const KvPrefix& prefix, uint32_t begin) {
  return prefix.tokens - begin >= kChunkTokens || prefix.tokens < kChunkTokens;
}

class Identity final : public QualitySubject {
 public:
  std::string name() const override { return "identity"; }
  std::string parameters() const override { return ""; }
  StatusOr<Rate> Apply(KvPrefix& prefix) const override {
    const uint64_t elements = prefix.tokens * ElementsPerToken(prefix.shape);
    return Rate{16 * elements, elements};
  }
};

class BaselineSubject final : public QualitySubject {
 public:
  explicit BaselineSubject(std::unique_ptr<Baseline> baseline)
      : baseline_(std::move(baseline)) {}

  std::string name() const override { return std::string(baseline_->name()); }
  std::string parameters() const override { return baseline_->parameters(); }
  bool needs_calibration() const override {
    return baseline_->needs_training();
  }
  bool needs_queries() const override { return baseline_->needs_attention(); }
  uint64_t profile_bytes() const override { return baseline_->ProfileBytes(); }

  Status Calibrate(std::span<const Capture> captures) override {
    std::vector<baselines::Block> blocks;
    for (const Capture& capture : captures) {
      for (uint32_t layer = 0; layer < capture.shape.layers; ++layer) {
        blocks.push_back(
            {.shape = ShapeOf(capture.shape, layer, capture.token_count()),
             .keys = capture.layers[layer].keys,
             .values = capture.layers[layer].values});
      }
    }
    return baseline_->Train(blocks);
  }

  StatusOr<Rate> Apply(KvPrefix& prefix) const override {
    const bool whole = baseline_->unit() == Baseline::Unit::kPrefix;
    const uint32_t step = whole ? prefix.tokens : kChunkTokens;
    Rate sum;
    for (uint32_t layer = 0; layer < prefix.shape.layers; ++layer) {
      for (uint32_t begin = 0; begin < prefix.tokens; begin += step) {
        const uint32_t tokens = std::min(step, prefix.tokens - begin);
        LARDER_ASSIGN_OR_RETURN(const Rate rate,
                                ApplyTo(prefix, layer, begin, tokens));
        if (whole || Counts(prefix, begin)) sum += rate;
      }
    }
    return sum;
  }

 private:
  static baselines::BlockShape ShapeOf(const ModelShape& shape, uint32_t layer,
                                       uint32_t tokens) {
    return {.layer = layer,
            .layer_count = shape.layers,
            .tokens = tokens,
            .heads = shape.kv_heads,
            .dim = shape.head_dim};
  }

  StatusOr<Rate> ApplyTo(KvPrefix& prefix, uint32_t layer, uint32_t begin,
                         uint32_t tokens) const {
    const size_t row = prefix.shape.row();
    const std::span<uint16_t> keys =
        std::span(prefix.layers[layer].keys).subspan(begin * row, tokens * row);
    const std::span<uint16_t> values = std::span(prefix.layers[layer].values)
                                           .subspan(begin * row, tokens * row);
    baselines::Block block{.shape = ShapeOf(prefix.shape, layer, tokens),
                           .keys = keys,
                           .values = values};
    std::vector<float> mass, peak;
    if (baseline_->needs_attention()) {
      if (prefix.queries.size() != prefix.shape.layers) {
        return absl::InvalidArgumentError("a prefix without queries");
      }
      mass = AttentionMass(prefix, layer, kObservedQueries);
      mass = std::vector(mass.begin() + begin, mass.begin() + begin + tokens);
      peak = QueryPeak(prefix, layer);
      block.mass = mass;
      block.query_peak = peak;
    }
    LARDER_ASSIGN_OR_RETURN(const std::vector<std::byte> encoded,
                            baseline_->Encode(block));
    LARDER_RETURN_IF_ERROR(
        baseline_->Decode(block.shape, encoded, keys, values));
    return Rate{8 * encoded.size(), 2 * block.shape.elements()};
  }

  // Of the queries that are observed, over the heads that share a K head.
  static std::vector<float> QueryPeak(const KvPrefix& prefix, uint32_t layer) {
    const ModelShape& shape = prefix.shape;
    const uint32_t group = shape.query_heads / shape.kv_heads;
    std::vector<float> peak(shape.row());
    for (uint32_t t = prefix.tokens - std::min(prefix.tokens, kObservedQueries);
         t < prefix.tokens; ++t) {
      for (uint32_t c = 0; c < shape.query_row(); ++c) {
        const uint32_t head = c / shape.head_dim / group;
        float& to = peak[head * shape.head_dim + c % shape.head_dim];
        to = std::max(
            to, std::abs(baselines::HalfToFloat(
                    prefix.queries[layer][size_t{t} * shape.query_row() + c])));
      }
    }
    return peak;
  }

  const std::unique_ptr<Baseline> baseline_;
};

class CodecSubject final : public QualitySubject {
 public:
  CodecSubject(const Codec& codec, Lineage quality, SpaceDescriptor space)
      : codec_(codec), quality_(quality), space_(std::move(space)) {}

  std::string name() const override { return std::string(codec_.name()); }
  std::string parameters() const override {
    return quality_ == Lineage::kExact
               ? "exact"
               : absl::StrCat("level ", static_cast<int>(Raw(quality_)));
  }

  StatusOr<Rate> Apply(KvPrefix& prefix) const override {
    Rate sum;
    for (uint32_t begin = 0; begin < prefix.tokens; begin += kChunkTokens) {
      const uint32_t tokens = std::min(kChunkTokens, prefix.tokens - begin);
      std::vector<uint64_t> bytes(prefix.shape.layers);
      for (uint32_t layer = 0; layer < prefix.shape.layers; ++layer) {
        LARDER_ASSIGN_OR_RETURN(bytes[layer],
                                ApplyTo(prefix, layer, begin, tokens));
      }
      if (!Counts(prefix, begin)) continue;
      // A record of one stripe per layer has tables no larger than raw's.
      LARDER_ASSIGN_OR_RETURN(const RecordLayout layout,
                              LayoutRecord(space_.groups[0], Part(), tokens));
      uint64_t record = layout.payload_offset;
      for (const uint64_t layer : bytes) {
        record = RoundUp(record, kSegmentAlign) + layer;
      }
      sum += Rate{8 * record, tokens * ElementsPerToken(prefix.shape)};
    }
    return sum;
  }

 private:
  PartShape Part() const {
    return {.layer_begin = 0,
            .layer_count = space_.groups[0].layer_count,
            .head_begin = 0,
            .head_count = space_.groups[0].kv_head_count};
  }

  StatusOr<uint64_t> ApplyTo(KvPrefix& prefix, uint32_t index, uint32_t begin,
                             uint32_t tokens) const {
    const CodedLayer layer{.space = &space_,
                           .group = GroupIndex{0},
                           .shape = Part(),
                           .layer = index,
                           .token_begin = begin,
                           .token_count = tokens};
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
                            codec_.Encode(layer, plain, quality_, encoded));
    LARDER_RETURN_IF_ERROR(
        codec_.Decode(layer, {}, ByteSpan(encoded).first(result.bytes), plain));
    std::memcpy(keys, plain.data(), half);
    std::memcpy(values, plain.data() + half, half);
    return result.bytes;
  }

  const Codec& codec_;
  const Lineage quality_;
  const SpaceDescriptor space_;
};

const Codec* CodecOf(const std::string& name) {
  for (int id = 0; id < 256; ++id) {
    const Codec* codec = FindCodec(static_cast<CodecId>(id));
    if (codec != nullptr && codec->name() == name) return codec;
  }
  return nullptr;
}

// Does it make use of not having to be exact? Asked with one layer of ones.
bool IsLossy(const Codec& codec, const SpaceDescriptor& space) {
  const CodedLayer layer{.space = &space,
                         .group = GroupIndex{0},
                         .shape = {.layer_count = space.groups[0].layer_count,
                                   .head_count = space.groups[0].kv_head_count},
                         .layer = 0,
                         .token_begin = 0,
                         .token_count = kChunkTokens};
  if (!ValidateCoded(layer, {}).ok() || !codec.Supports(layer).ok()) {
    return false;
  }
  std::vector<std::byte> plain(PlainBytes(layer), std::byte{0x3c});
  for (size_t i = 0; i < plain.size(); i += 3) plain[i] = std::byte{0x17};
  std::vector<std::byte> encoded(codec.EncodedBytesMax(layer));
  const StatusOr<EncodedLayer> result =
      codec.Encode(layer, plain, Lineage::kLossyFinest, encoded);
  return result.ok() && result->quality != Lineage::kExact;
}

}  // namespace

Status QualitySubject::Calibrate(std::span<const Capture>) {
  return absl::OkStatus();
}

std::unique_ptr<QualitySubject> MakeIdentity() {
  return std::make_unique<Identity>();
}

std::unique_ptr<QualitySubject> MakeBaselineSubject(
    std::unique_ptr<Baseline> baseline) {
  return std::make_unique<BaselineSubject>(std::move(baseline));
}

std::unique_ptr<QualitySubject> MakeCodecSubject(const Codec& codec,
                                                 Lineage quality,
                                                 SpaceDescriptor space) {
  return std::make_unique<CodecSubject>(codec, quality, std::move(space));
}

SpaceDescriptor MakeSpace(const ModelShape& shape,
                          const Sha256Digest& weights) {
  SpaceDescriptor space;
  space.model_name = shape.model;
  space.weights = weights;
  space.cache_dtype = "f16";
  space.kv_scales = "none";
  // As the adapter of llama.cpp writes it, which codecs understand.
  space.rope = absl::StrCat(
      "type=", shape.rope_adjacent ? 0 : 2,
      ";scaling=-1;base=0;scale=0;dimension_count=", shape.rope_dim,
      ";freq_base=", shape.rope_base, ";beyond=0");
  space.engine_layout = "larder_quality";
  space.hash_scheme = "larder";
  space.block_tokens = kChunkTokens;
  space.chunk_tokens = kChunkTokens;
  GroupDescriptor& group = space.groups.emplace_back();
  group.layout = SegmentLayout::kTokenMajor;
  group.layer_count = static_cast<uint16_t>(shape.layers);
  group.kv_head_count = static_cast<uint16_t>(shape.kv_heads);
  group.k_head_bytes = shape.head_dim * 2;
  group.v_head_bytes = shape.head_dim * 2;
  group.layer_digest = absl::StrCat("0-", shape.layers - 1);
  return space;
}

StatusOr<Subjects> MakeSubjects(const std::string& name,
                                std::span<const uint8_t> levels,
                                const SpaceDescriptor& space) {
  Subjects subjects;
  if (name == "identity") {
    subjects.push_back(MakeIdentity());
    return subjects;
  }
  if (const Codec* codec = CodecOf(name)) {
    LARDER_RETURN_IF_ERROR(Validate(space));
    const Lineage only = codec->default_quality();
    if (only != Lineage::kUnknown) {
      subjects.push_back(MakeCodecSubject(*codec, only, space));
    } else if (IsLossy(*codec, space)) {
      for (const uint8_t level : levels) {
        subjects.push_back(
            MakeCodecSubject(*codec, static_cast<Lineage>(level), space));
      }
    } else {
      subjects.push_back(MakeCodecSubject(*codec, Lineage::kExact, space));
    }
    return subjects;
  }
  StatusOr<baselines::Curve> curve = baselines::MakeCurve(name);
  if (!curve.ok()) {
    return absl::NotFoundError(
        absl::StrCat("no codec is called ", name, "; there are ",
                     absl::StrJoin(SubjectNames(), ", ")));
  }
  for (std::unique_ptr<Baseline>& baseline : *curve) {
    subjects.push_back(MakeBaselineSubject(std::move(baseline)));
  }
  return subjects;
}

std::vector<std::string> SubjectNames() {
  std::vector<std::string> names = {"identity"};
  for (int id = 0; id < 256; ++id) {
    if (const Codec* codec = FindCodec(static_cast<CodecId>(id))) {
      names.emplace_back(codec->name());
    }
  }
  for (const std::string_view name : baselines::CurveNames()) {
    names.emplace_back(name);
  }
  return names;
}

}  // namespace larder::quality
