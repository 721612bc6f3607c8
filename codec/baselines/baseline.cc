#include "codec/baselines/baseline.h"

#include <algorithm>
#include <utility>

namespace larder::baselines {
namespace {

bool AllFinite(std::span<const uint16_t> halfs) {
  return std::all_of(halfs.begin(), halfs.end(),
                     [](uint16_t half) { return (half & 0x7c00) != 0x7c00; });
}

Curve Released(bool trained) {
  const auto make = [&](std::string parameters, const CacheGenBins& bins) {
    return trained ? MakeCacheGenStatic(std::move(parameters), bins)
                   : MakeCacheGenReleased(std::move(parameters), bins);
  };
  Curve curve;
  // The three levels that were released, and others around them: of its CUDA
  // coder's limit of 48 table entries nothing is left here.
  curve.push_back(make("8 bins", {{8, 8, 8}, {8, 8}}));
  curve.push_back(make("L1", kCacheGenLevels[0]));
  curve.push_back(make("L2", kCacheGenLevels[1]));
  curve.push_back(make("L3", kCacheGenLevels[2]));
  for (const uint32_t bins : {64u, 128u, 254u}) {
    curve.push_back(
        make(absl::StrCat(bins, " bins"), {{bins, bins, bins}, {bins, bins}}));
  }
  return curve;
}

Curve MakeOf(std::string_view name) {
  Curve curve;
  if (name == "absmax") {
    for (const uint32_t bits : {4u, 5u, 6u, 8u}) {
      curve.push_back(MakeAbsmax(bits, false));
    }
  } else if (name == "hadamard") {
    for (const uint32_t bits : {3u, 4u, 5u, 6u, 8u}) {
      curve.push_back(MakeAbsmax(bits, true));
    }
  } else if (name == "kivi") {
    for (const uint32_t bits : {2u, 3u, 4u, 5u}) {
      curve.push_back(MakeKivi({.bits = bits}));
    }
  } else if (name == "kivi-w128") {
    for (const uint32_t bits : {2u, 3u, 4u}) {
      curve.push_back(MakeKivi({.bits = bits, .window = 128}));
    }
  } else if (name == "cachegen-released") {
    curve = Released(false);
  } else if (name == "cachegen-static") {
    curve = Released(true);
  } else if (name == "cachegen-paper") {
    for (const float scale : {1.0f, 0.7f, 0.5f, 0.35f, 0.25f, 0.12f}) {
      curve.push_back(MakeCacheGenPaper(scale));
    }
  } else if (name == "zipcache") {
    for (const MixedOptions& options :
         std::initializer_list<MixedOptions>{{0.2f, 4, 2},
                                             {0.6f, 4, 2},
                                             {0.9f, 4, 2},
                                             {0.4f, 6, 4},
                                             {0.4f, 8, 6}}) {
      curve.push_back(MakeZipCache(options));
    }
  } else if (name == "mikv") {
    for (const MixedOptions& options :
         std::initializer_list<MixedOptions>{{0.2f, 8, 2},
                                             {0.2f, 8, 3},
                                             {0.2f, 8, 4},
                                             {0.2f, 8, 5},
                                             {0.5f, 8, 6}}) {
      curve.push_back(MakeMikv(options));
    }
  } else if (name == "gear") {
    for (const uint32_t bits : {2u, 3u, 4u, 5u}) {
      curve.push_back(MakeGear({.bits = bits}));
    }
  } else if (name == "zstd") {
    curve.push_back(MakeZstd(3, true));
    curve.push_back(MakeZstd(3, false));
  }
  return curve;
}

}  // namespace

Status Baseline::Train(std::span<const Block>) {
  return absl::OkStatus();
}

StatusOr<std::vector<std::byte>> Baseline::Encode(const Block& block) const {
  const BlockShape& shape = block.shape;
  if (shape.elements() == 0 || shape.layer >= shape.layer_count ||
      block.keys.size() != shape.elements() ||
      block.values.size() != shape.elements()) {
    return absl::InvalidArgumentError("a block that is not of its shape");
  }
  if (!AllFinite(block.keys) || !AllFinite(block.values)) {
    return absl::InvalidArgumentError("values that are not finite");
  }
  if (needs_attention() && (block.mass.size() != shape.tokens ||
                            block.query_peak.size() != shape.row())) {
    return absl::InvalidArgumentError(
        absl::StrCat(std::string(name()), " needs to know the attention"));
  }
  return DoEncode(block);
}

Status Baseline::Decode(const BlockShape& shape, ByteSpan encoded,
                        std::span<uint16_t> keys,
                        std::span<uint16_t> values) const {
  if (shape.elements() == 0 || shape.layer >= shape.layer_count ||
      keys.size() != shape.elements() || values.size() != shape.elements()) {
    return absl::InvalidArgumentError("a block that is not of its shape");
  }
  return DoDecode(shape, encoded, keys, values);
}

std::vector<std::string_view> CurveNames() {
  return {"absmax",
          "hadamard",
          "kivi",
          "kivi-w128",
          "zipcache",
          "mikv",
          "gear",
          "cachegen-paper",
          "cachegen-released",
          "cachegen-static",
          "zstd"};
}

StatusOr<Curve> MakeCurve(std::string_view name) {
  Curve curve = MakeOf(name);
  if (curve.empty()) {
    return absl::NotFoundError(
        absl::StrCat("no baseline is called ", std::string(name)));
  }
  return curve;
}

}  // namespace larder::baselines
