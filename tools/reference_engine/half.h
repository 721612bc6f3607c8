#ifndef LARDER_TOOLS_REFERENCE_ENGINE_HALF_H_
#define LARDER_TOOLS_REFERENCE_ENGINE_HALF_H_

#include <bit>
#include <cstdint>

namespace larder::reference {

// IEEE 754 binary16, to nearest, ties to even; infinities and NaN (as one quiet
// NaN) included.

inline float FromF16(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16;
  const uint32_t rest = half & 0x7fffu;
  if (rest >= 0x7c00u) {  // infinity, NaN
    return std::bit_cast<float>(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  }
  // 2^112 moves the exponent over, of subnormal numbers too.
  const float magnitude = std::bit_cast<float>(rest << 13) *
                          std::bit_cast<float>(uint32_t{239} << 23);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

inline uint16_t ToF16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return sign | 0x7e00u;
  // From half of the step above the largest on: infinity.
  if (rest >= 0x477ff000u) return sign | 0x7c00u;
  if (rest < 0x38800000u) {
    // Subnormal: adding 0.5 leaves the number in steps of 2^-24, rounded.
    const float moved = std::bit_cast<float>(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (std::bit_cast<uint32_t>(moved) -
                                         std::bit_cast<uint32_t>(0.5f)));
  }
  const uint32_t odd = rest >> 13 & 1;
  return static_cast<uint16_t>(sign |
                               (rest - 0x38000000u + 0xfffu + odd) >> 13);
}

}  // namespace larder::reference

#endif  // LARDER_TOOLS_REFERENCE_ENGINE_HALF_H_
