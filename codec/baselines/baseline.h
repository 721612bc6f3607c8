#ifndef LARDER_CODEC_BASELINES_BASELINE_H_
#define LARDER_CODEC_BASELINES_BASELINE_H_

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "store/status.h"
#include "store/units.h"

namespace larder::baselines {

// What Larder's codecs are measured against: codecs of other systems and
// papers, written anew from their descriptions (README.md). They are not meant
// to be fast, nor to be served: no program but the quality benchmark links
// them.

// One layer of a run of tokens.
struct BlockShape {
  uint32_t layer = 0;
  uint32_t layer_count = 1;
  uint32_t tokens = 0;
  uint32_t heads = 0;
  uint32_t dim = 0;

  size_t row() const { return size_t{heads} * dim; }
  size_t elements() const { return tokens * row(); }  // of K, and of V
};

// binary16 values, [token][head][dim], K after RoPE.
struct Block {
  BlockShape shape;
  std::span<const uint16_t> keys;
  std::span<const uint16_t> values;
  // For codecs that look at attention, else empty: what each token gets of it
  // on average, and the largest |q| that each channel of K meets.
  std::span<const float> mass;
  std::span<const float> query_peak;
};

// Immutable after Train, and then thread-safe. Deterministic: no operation
// depends on the CPU or on the order of threads.
class Baseline {
 public:
  // What one object holds of a layer.
  enum class Unit { kChunk, kPrefix };

  virtual ~Baseline() = default;

  // The curve, and the point on it.
  virtual std::string_view name() const = 0;
  virtual std::string parameters() const = 0;
  virtual Unit unit() const { return Unit::kChunk; }
  virtual bool needs_attention() const { return false; }
  // Whether Train must be called, with every layer, before anything else.
  virtual bool needs_training() const { return false; }
  virtual Status Train(std::span<const Block> blocks);
  // What Train learned, as it would be stored once for a model.
  virtual uint64_t ProfileBytes() const { return 0; }

  // InvalidArgument: sizes that are not the shape's, values that are not
  // finite, attention that is needed and missing.
  StatusOr<std::vector<std::byte>> Encode(const Block& block) const;

  // The shape is known from elsewhere; all else is in `encoded`, untrusted.
  // DataLoss if it is cut off, too long, or contradicts itself.
  Status Decode(const BlockShape& shape, ByteSpan encoded,
                std::span<uint16_t> keys, std::span<uint16_t> values) const;

 protected:
  // Of what the public ones have checked.
  virtual StatusOr<std::vector<std::byte>> DoEncode(
      const Block& block) const = 0;
  virtual Status DoDecode(const BlockShape& shape, ByteSpan encoded,
                          std::span<uint16_t> keys,
                          std::span<uint16_t> values) const = 0;
};

using Curve = std::vector<std::unique_ptr<Baseline>>;

// Names of curves, in the order of README.md.
std::vector<std::string_view> CurveNames();
// Every point of a curve, lowest rate first. NotFound for another name.
StatusOr<Curve> MakeCurve(std::string_view name);

// The single codecs, for tests and for other sweeps.

// One scale for 32 values of a token: Q4_0 and its like, 2 <= bits <= 8.
std::unique_ptr<Baseline> MakeAbsmax(uint32_t bits, bool hadamard);

struct KiviOptions {
  uint32_t bits = 2;
  uint32_t group = 32;
  uint32_t window = 0;  // last tokens that stay as they are
};
std::unique_ptr<Baseline> MakeKivi(const KiviOptions& options);

// Quantization bins of CacheGen's released code: of K in layers 0-9, 10-19 and
// later, and of V in layers 0-1 and later.
struct CacheGenBins {
  uint32_t keys[3];
  uint32_t values[2];
};
inline constexpr CacheGenBins kCacheGenLevels[] = {{{16, 16, 12}, {16, 12}},
                                                   {{32, 16, 16}, {32, 16}},
                                                   {{32, 32, 32}, {32, 32}}};
std::unique_ptr<Baseline> MakeCacheGenReleased(std::string parameters,
                                               const CacheGenBins& bins);
// The same with tables that were trained and are no part of the object, and one
// stream for a layer's K and one for its V.
std::unique_ptr<Baseline> MakeCacheGenStatic(std::string parameters,
                                             const CacheGenBins& bins);
// `scale` multiplies every bin of the deltas.
std::unique_ptr<Baseline> MakeCacheGenPaper(float scale);

// `salient` of the tokens (a share) with `high` bits, the others with `low`.
struct MixedOptions {
  float salient = 0.5f;
  uint32_t high = 4;
  uint32_t low = 2;
};
std::unique_ptr<Baseline> MakeZipCache(const MixedOptions& options);
std::unique_ptr<Baseline> MakeMikv(const MixedOptions& options);

struct GearOptions {
  uint32_t bits = 4;
  uint32_t rank = 4;
  float outliers = 0.02f;  // share of values kept as they are
};
std::unique_ptr<Baseline> MakeGear(const GearOptions& options);

// Lossless. `planes`: all first bytes of the values, then all second ones.
std::unique_ptr<Baseline> MakeZstd(int level, bool planes);

}  // namespace larder::baselines

#endif  // LARDER_CODEC_BASELINES_BASELINE_H_
