#ifndef LARDER_TOOLS_QUALITY_MEASUREMENTS_H_
#define LARDER_TOOLS_QUALITY_MEASUREMENTS_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "store/status.h"
#include "tools/quality/kv.h"

namespace larder::quality {

// What errors of keys or values of one layer do to a model. Channels count over
// all heads; keys are before rotation.
struct TensorMeasurements {
  // For each block of heads (as KVC1 cuts tiles) a symmetric matrix, row by
  // row: how much worse attention's output is for an error of the channels, up
  // to a factor of each head's. [block][channel of it][channel of it]
  std::vector<std::vector<float>> metric;
  // The noise that sensitivities were measured with has this deviation at a
  // relative variance of 1.
  std::vector<float> noise;
  // For each KV head: how much mean KL divergence (nats) grows with the
  // relative variance of noise in that head of every token but the first.
  std::vector<float> sensitivity;
};

// What `larder_quality sensitivity` finds out about a model (FORMAT.md).
struct Measurements {
  ModelShape shape;
  uint32_t block_heads = 0;    // of a block
  uint32_t texts = 0;          // that sensitivities are means of
  uint32_t prefix_tokens = 0;  // of each
  std::vector<TensorMeasurements> keys, values;  // one for each layer
};

// Heads and channels of a block; the last may be smaller.
uint32_t BlockCount(const Measurements& measurements);
uint32_t BlockChannels(const Measurements& measurements, uint32_t block);

// REQUIRES: everything is of the sizes that the shape says.
std::string EncodeMeasurements(const Measurements& measurements);
// InvalidArgument for what is no such file; DataLoss for one that is damaged.
StatusOr<Measurements> DecodeMeasurements(std::string_view bytes);

Status WriteMeasurements(const Measurements& measurements,
                         const std::string& path);
StatusOr<Measurements> ReadMeasurements(const std::string& path);

}  // namespace larder::quality

#endif  // LARDER_TOOLS_QUALITY_MEASUREMENTS_H_
