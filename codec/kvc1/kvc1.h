#ifndef LARDER_CODEC_KVC1_KVC1_H_
#define LARDER_CODEC_KVC1_KVC1_H_

#include <cstdint>
#include <optional>

#include "codec/codec.h"
#include "codec/kvc1/layer_format.h"
#include "codec/profile.h"
#include "store/status.h"
#include "store/types.h"
#include "store/units.h"

namespace larder::kvc1 {

// How a layer is to be encoded, where the contract's `quality` does not say it
// all.
struct EncodeOptions {
  // 0: lossless. 1..kMaxLevel: finest first. What a level costs is in the
  // profile (Profile::Contents::divergence); without a profile each level has
  // steps sqrt(3) times as large as the one before, and nobody has said what
  // that costs.
  int level = 0;
  // 1..3: how many nested planes, each three times as fine as the one before.
  int planes = 1;
  // Instead of a level: every number within this distance of what was given
  // (or of its channel's largest magnitude in the tile times `relative_error`),
  // and half a unit in the last place of the element. Needs no profile.
  std::optional<float> absolute_error;
  std::optional<float> relative_error;
  // Rows at the beginning of a sequence that are kept as they are: attention
  // sinks, whose every error is felt by all tokens after them.
  uint32_t exact_rows = 1;
  // Use what the profile has beside steps and tables: transforms first, then
  // predictions along a trellis, if there is one plane, then predictions.
  bool transform = true;
  bool prediction = true;
  bool trellis = true;
};

inline constexpr int kMaxLevel = 9;

// Levels are lineages; a plane that is not read costs two levels.
constexpr Lineage LineageOf(int level, int missing_planes) {
  return static_cast<Lineage>(level == 0 ? 0 : level + 2 * missing_planes);
}
// Of what was coded within a bound of errors and no level.
inline constexpr Lineage kLineageUnjudged{199};
// The coarsest level that is at least as good. 0 for kExact.
int LevelOf(Lineage quality);

// Keys and values of every bit; what the codec `lossless` takes for those that
// are numbers it knows.
const Codec& LosslessTiles();

// As Codec::Encode of kvc1, with all options.
StatusOr<EncodedLayer> Encode(const CodedLayer& layer, ByteSpan plain,
                              const EncodeOptions& options,
                              MutableByteSpan encoded);

// What the front of an encoded layer says; for people and for planning.
struct Description {
  int level = 0, planes = 1;
  bool unrotated = false;
  ProfileId profile;  // zero: none
  float max_error[2] = {0, 0};
  uint64_t plane_bytes[3] = {0, 0, 0};  // the index counts with plane 0
  uint32_t tiles = 0, tiles_by_mode[kTileModesEnd] = {};
  uint64_t escapes = 0;
};
StatusOr<Description> Describe(const CodedLayer& layer, ByteSpan front,
                               uint64_t encoded_bytes);

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_KVC1_H_
