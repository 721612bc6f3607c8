#ifndef LARDER_CODEC_BASELINES_AFFINE_H_
#define LARDER_CODEC_BASELINES_AFFINE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <span>
#include <vector>

#include "codec/baselines/bytes.h"

namespace larder::baselines {

// Asymmetric quantization of a group: 2^bits levels evenly from the smallest
// value to the largest, both stored as binary16 (start and step).
struct Affine {
  float start = 0;
  float step = 0;

  static Affine Of(std::span<const float> values, uint32_t bits, Writer& out) {
    if (values.empty()) return {};
    const auto [low, high] = std::minmax_element(values.begin(), values.end());
    const auto levels = static_cast<float>((1u << bits) - 1);
    Affine affine;
    affine.start = out.Half(*low);
    affine.step = out.Half((*high - affine.start) / levels);
    return affine;
  }
  static Affine Read(Reader& in) {
    Affine affine;
    affine.start = in.Half();
    affine.step = in.Half();
    return affine;
  }

  uint32_t Level(float value, uint32_t bits) const {
    if (!(step > 0)) return 0;
    const float level = std::nearbyint((value - start) / step);
    return static_cast<uint32_t>(
        std::clamp(level, 0.0f, static_cast<float>((1u << bits) - 1)));
  }
  float Value(uint32_t level) const {
    return start + static_cast<float>(level) * step;
  }
};

inline std::vector<float> AsFloats(std::span<const uint16_t> halfs) {
  std::vector<float> floats(halfs.size());
  std::transform(halfs.begin(), halfs.end(), floats.begin(), HalfToFloat);
  return floats;
}

}  // namespace larder::baselines

#endif  // LARDER_CODEC_BASELINES_AFFINE_H_
