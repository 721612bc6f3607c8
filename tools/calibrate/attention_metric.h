#ifndef LARDER_TOOLS_CALIBRATE_ATTENTION_METRIC_H_
#define LARDER_TOOLS_CALIBRATE_ATTENTION_METRIC_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <vector>

#include "codec/kvc1/rope.h"
#include "store/status.h"
#include "tools/quality/kv.h"
#include "tools/quality/measurements.h"

namespace larder::calibrate {

// The rotation of positions begin..begin+rows-1 that a shape speaks of.
std::shared_ptr<const kvc1::Rotation> RotationOf(
    const quality::ModelShape& shape, uint32_t begin, uint32_t rows);

// Turns one head of one row back by the angles of its position.
void Unrotate(const quality::ModelShape& shape, const kvc1::Rotation& rotation,
              uint32_t row, float* head);

// One layer of the attention output's projection: [output][query head * dim].
struct OutputProjection {
  uint32_t outputs = 0;
  std::vector<float> weights;
};

// How errors of a prefix's keys and values move what attention adds to the
// residual stream, to second order, from captures with K, V and Q. With
// p = the attention of query i to key j in head h, o its output, W_h the
// projection of the head:
//   values: sum over i, j of p_h p_h' W_h^T W_h', over pairs of query heads
//   keys:   sum over i, j of p^2 |W_h (v_j - o)|^2 q q^T, where q is turned
//           back by the key's position (keys are before rotation)
// averaged over those j in the first half of a text and i in the second which
// are looked at. What comes after attention is not known here: sensitivities of
// heads are measured on the model.
// Gives one layer's matrices, for keys and for values, block by block.
struct LayerMetrics {
  std::vector<std::vector<float>> keys, values;
};
LayerMetrics AttentionMetrics(std::span<const quality::Capture> captures,
                              uint32_t layer,
                              const OutputProjection& projection,
                              uint32_t block_heads);

}  // namespace larder::calibrate

#endif  // LARDER_TOOLS_CALIBRATE_ATTENTION_METRIC_H_
