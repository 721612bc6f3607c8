#include "tools/quality/subject.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <utility>

#include "absl/strings/str_join.h"

#include "codec/baselines/half.h"
#include "store/units.h"
#include "tools/quality/metrics.h"
#include "tools/quality/record_subject.h"

namespace larder::quality {
namespace {

using baselines::Baseline;

// MiKV and ZipCache look at the queries that come last; the longer the window,
// the better they know.
constexpr uint32_t kObservedQueries = 128;

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
        if (whole || CountsChunk(prefix, begin)) sum += rate;
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

class CodecSubject final : public RecordSubject {
 public:
  CodecSubject(const Codec& codec, Lineage quality, SpaceDescriptor space)
      : RecordSubject(codec, std::move(space)), quality_(quality) {}

  std::string name() const override { return std::string(codec().name()); }
  std::string parameters() const override {
    return quality_ == Lineage::kExact
               ? "exact"
               : absl::StrCat("level ", static_cast<int>(Raw(quality_)));
  }

 private:
  StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                                MutableByteSpan encoded) const override {
    return codec().Encode(layer, plain, quality_, encoded);
  }

  const Lineage quality_;
};

// Of the same KV as an engine that computes in bfloat16 would hold it: nothing
// that is judged changes, what it costs is the figure.
class LosslessBf16 final : public RecordSubject {
 public:
  explicit LosslessBf16(SpaceDescriptor space)
      : RecordSubject(LosslessCodec(), std::move(space)) {}

  std::string name() const override { return kLosslessBf16; }
  std::string parameters() const override { return "exact"; }

  StatusOr<Rate> Apply(KvPrefix& prefix) const override {
    KvPrefix rounded = prefix;
    for (KvLayer& layer : rounded.layers) {
      for (HalfRows* rows : {&layer.keys, &layer.values}) {
        for (uint16_t& value : *rows) value = Bf16(value);
      }
    }
    KvPrefix decoded = rounded;
    LARDER_ASSIGN_OR_RETURN(const Rate rate, RecordSubject::Apply(decoded));
    for (size_t i = 0; i < rounded.layers.size(); ++i) {
      if (decoded.layers[i].keys != rounded.layers[i].keys ||
          decoded.layers[i].values != rounded.layers[i].values) {
        return absl::InternalError("lossless changed a bfloat16");
      }
    }
    return rate;
  }

 private:
  // To the nearest, ties to even. REQUIRES: finite, as binary16 of a cache is.
  static uint16_t Bf16(uint16_t half) {
    const auto bits = std::bit_cast<uint32_t>(baselines::HalfToFloat(half));
    return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  }

  StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                                MutableByteSpan encoded) const override {
    return codec().Encode(layer, plain, Lineage::kExact, encoded);
  }
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

uint64_t ElementsPerToken(const ModelShape& shape) {
  return uint64_t{2} * shape.row() * shape.layers;
}

bool CountsChunk(const KvPrefix& prefix, uint32_t begin) {
  return prefix.tokens - begin >= kChunkTokens || prefix.tokens < kChunkTokens;
}

Status QualitySubject::Calibrate(std::span<const Capture>) {
  return absl::OkStatus();
}

std::string ProfileIdOf(const QualitySubject& subject) {
  const Profile* const profile = subject.profile();
  return profile == nullptr ? "" : ToHex(profile->id());
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
  if (name == kLosslessBf16) {
    SpaceDescriptor bf16 = space;
    bf16.cache_dtype = "bf16";
    subjects.push_back(std::make_unique<LosslessBf16>(std::move(bf16)));
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
  names.emplace_back(kLosslessBf16);
  for (const std::string_view name : baselines::CurveNames()) {
    names.emplace_back(name);
  }
  return names;
}

}  // namespace larder::quality
