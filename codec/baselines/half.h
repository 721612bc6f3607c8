#ifndef LARDER_CODEC_BASELINES_HALF_H_
#define LARDER_CODEC_BASELINES_HALF_H_

#include <bit>
#include <cstdint>

namespace larder::baselines {

// IEEE binary16, without instructions that only some CPUs have, so that every
// machine gives the same bits.
inline float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000) << 16;
  const uint32_t rest = static_cast<uint32_t>(half & 0x7fff) << 13;
  if (rest >= 0x7c00u << 13) {  // infinite or not a number
    return std::bit_cast<float>(sign | rest | 0x7f800000u);
  }
  // 2^112 moves the exponent from a bias of 15 to one of 127, subnormals too.
  const float scaled =
      std::bit_cast<float>(rest) * std::bit_cast<float>(0x77800000u);
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

// To the nearest, ties to even.
inline uint16_t FloatToHalf(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const uint32_t rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return sign | 0x7e00;
  if (rest >= 0x477ff000u) return sign | 0x7c00;
  if (rest < 0x38800000u) {  // subnormal: adding 0.5 rounds at the last place
    const float moved = std::bit_cast<float>(rest) + 0.5f;
    return sign |
           static_cast<uint16_t>(std::bit_cast<uint32_t>(moved) - 0x3f000000u);
  }
  const uint32_t odd = (rest >> 13) & 1;
  return sign |
         static_cast<uint16_t>((rest + 0xfffu + odd - (112u << 23)) >> 13);
}

}  // namespace larder::baselines

#endif  // LARDER_CODEC_BASELINES_HALF_H_
