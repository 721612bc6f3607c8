#ifndef LARDER_CODEC_KVC1_LAYER_READER_H_
#define LARDER_CODEC_KVC1_LAYER_READER_H_

#include <cstdint>
#include <memory>

#include "codec/codec.h"
#include "codec/kvc1/layer_context.h"
#include "codec/kvc1/layer_format.h"
#include "codec/kvc1/rope.h"
#include "codec/kvc1/steps.h"
#include "store/status.h"
#include "store/units.h"

namespace larder::kvc1 {

// An encoded layer, untrusted, taken apart: what those who decode it here and
// on a device have in common.
class LayerReader {
 public:
  LayerReader(const CodedLayer& layer, Element element)
      : context_(layer, element) {}

  // DataLoss; FailedPrecondition for a profile or rotation that is not there.
  // `encoded` outlives the reader.
  Status Open(ByteSpan encoded);

  const LayerContext& context() const { return context_; }
  const LayerIndex& index() const { return index_; }
  // Where keys were coded as before rotation: how to turn them; else null.
  const std::shared_ptr<const Rope>& rope() const { return rope_; }
  void Rotate() {
    if (rope_ != nullptr) context_.UseRotation(rope_);
  }

  // As many planes as are wanted (0: all) and there.
  int PlanesOf(uint8_t wanted) const;
  // A tile's bytes of a plane, checked.
  StatusOr<ByteSpan> Plane(uint32_t i, int plane) const;
  // Tile `i`, which is one of steps: how, and what is entropy-coded, which
  // points to `queued`.
  Status ReadSteps(uint32_t i, const TileGrid::Tile& tile, int planes,
                   Queued& queued, StepsDecoder::Input& input) const;

 private:
  LayerContext context_;
  LayerIndex index_;
  ByteSpan encoded_;
  std::shared_ptr<const Rope> rope_;
};

constexpr bool IsSteps(TileMode mode) {
  return mode >= TileMode::kSteps && !IsFixed(mode);
}

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_LAYER_READER_H_
