#ifndef LARDER_CODEC_KVC1_STATES_H_
#define LARDER_CODEC_KVC1_STATES_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "kernels/kvc1.h"
#include "store/units.h"

namespace larder::kvc1 {

// Coder states as a tile stores them. They are below 2^28: the low 16 bits of
// all lanes, then the high 12 bits of two lanes in three bytes.
inline constexpr size_t kStateBytes =
    kernels::kLanes * 2 + kernels::kLanes / 2 * 3;

// REQUIRES: kLanes states, room for kStateBytes.
inline void PackStates(const uint32_t* states, std::byte* packed) {
  for (size_t lane = 0; lane < kernels::kLanes; ++lane) {
    const auto low = static_cast<uint16_t>(states[lane]);
    std::memcpy(packed + 2 * lane, &low, 2);
  }
  std::byte* high = packed + 2 * kernels::kLanes;
  for (size_t lane = 0; lane < kernels::kLanes; lane += 2, high += 3) {
    const uint32_t pair = states[lane] >> 16 | states[lane + 1] >> 16 << 12;
    std::memcpy(high, &pair, 3);
  }
}

// REQUIRES: kStateBytes readable bytes, of any content.
inline void ReadStates(const std::byte* packed,
                       uint32_t (&states)[kernels::kLanes]) {
  const std::byte* high = packed + 2 * kernels::kLanes;
  for (size_t lane = 0; lane < kernels::kLanes; lane += 2, high += 3) {
    uint32_t pair = 0;
    std::memcpy(&pair, high, 3);
    uint16_t low[2];
    std::memcpy(low, packed + 2 * lane, 4);
    states[lane] = (pair & 0xfff) << 16 | low[0];
    states[lane + 1] = pair >> 12 << 16 | low[1];
  }
}

// The states in which a decoder ends are the encoder's to choose: their low 12
// bits can hold bytes, those of two lanes three.
inline constexpr size_t kSeedBytes = kernels::kLanes / 2 * 3;

// REQUIRES: at most kSeedBytes; the rest is zeros.
inline void SeedStates(ByteSpan bytes,
                       std::array<uint32_t, kernels::kLanes>& states) {
  for (size_t i = 0; i < bytes.size(); ++i) {
    const size_t bit = 8 * i;
    const uint32_t value = static_cast<uint32_t>(bytes[i]) << bit % 12;
    states[bit / 12] |= value & 0xfff;
    if (value > 0xfff) states[bit / 12 + 1] |= value >> 12;
  }
}

// The reverse. False if a state is not one of those.
inline bool ReadSeeds(const uint32_t (&states)[kernels::kLanes],
                      std::vector<std::byte>& out) {
  for (size_t lane = 0; lane < kernels::kLanes; lane += 2) {
    if (states[lane] >> 12 != 1 || states[lane + 1] >> 12 != 1) return false;
    const uint32_t pair = (states[lane] & 0xfff) | (states[lane + 1] & 0xfff)
                                                       << 12;
    for (int i = 0; i < 3; ++i) {
      out.push_back(static_cast<std::byte>(pair >> 8 * i));
    }
  }
  return true;
}

}  // namespace larder::kvc1

#endif  // LARDER_CODEC_KVC1_STATES_H_
