#ifndef LARDER_KERNELS_KVC1_TRELLIS_INTERNAL_H_
#define LARDER_KERNELS_KVC1_TRELLIS_INTERNAL_H_

// The search of a trellis, one round at a time, for every level that has
// vectors: its own copy, compiled with its flags. What it does is said in
// kvc1.h.

#include "kernels/kvc1_types.h"

namespace larder::kernels::internal {
namespace {

typedef int16_t Numbers __attribute__((vector_size(2 * kLanes)));
typedef uint16_t Counts __attribute__((vector_size(2 * kLanes)));

// More than what any three channels cost, so that the search begins in state 0.
// Sums are modulo 2^16: those of two states never differ by half of that.
constexpr uint16_t kTrellisNever = 8192;

inline void SearchTrellisRound(const Prediction& prediction,
                               int16_t* positions) {
  Counts reached[kTileChannelsMax];
  Counts sums[8];
  for (int state = 0; state < 8; ++state) {
    sums[state] = Counts{} + (state == 0 ? uint16_t{0} : kTrellisNever);
  }
  for (size_t i = 0; i < prediction.channels; ++i) {
    Numbers position;
    __builtin_memcpy(&position, positions + prediction.order[i] * kLanes,
                     sizeof position);
    Counts costs[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const int16_t offset = static_cast<int16_t>(32 - kTrellisParts * j);
      const Numbers distance =
          ((position + offset) & int16_t{63}) - int16_t{32};
      costs[j] = reinterpret_cast<Counts>(distance * distance);
    }
    Counts next[8];
    Counts from = {};
#pragma GCC unroll 8
    for (int state = 0; state < 8; ++state) {
      const int s = state >> 2, a = (state ^ state >> 2) & 1;
      const int j = s + (state & 2);
      const Counts zero = sums[s + 2 * a] + costs[j];
      const Counts one = sums[s + 2 * a + 4] + costs[j ^ 2];
      const auto less = reinterpret_cast<Numbers>(one - zero) < int16_t{0};
      next[state] = less ? one : zero;
      from |= reinterpret_cast<Counts>(less) &
              static_cast<uint16_t>(uint32_t{1} << state);
    }
    reached[i] = from;
#pragma GCC unroll 8
    for (int state = 0; state < 8; ++state) sums[state] = next[state];
  }
  Counts state = {};
  Counts least = sums[0];
  for (uint16_t other = 1; other < 8; ++other) {
    const auto less =
        reinterpret_cast<Numbers>(sums[other] - least) < int16_t{0};
    least = less ? sums[other] : least;
    state = less ? Counts{} + other : state;
  }
  for (size_t i = prediction.channels; i-- > 0;) {
    int16_t* const at = positions + prediction.order[i] * kLanes;
    Numbers position;
    __builtin_memcpy(&position, at, sizeof position);
    const Counts b = (reached[i] >> state) & uint16_t{1};
    const Counts s = state >> uint16_t{2};
    const Counts a = (state ^ s) & uint16_t{1};
    const auto j =
        reinterpret_cast<Numbers>(s + ((state & uint16_t{2}) ^ (b + b)));
    const Numbers quads =
        (position - j * int16_t{kTrellisParts} + int16_t{32}) >> int16_t{6};
    const Numbers number = j + quads * int16_t{4};
    __builtin_memcpy(at, &number, sizeof number);
    state = s + a + a + b * uint16_t{4};
  }
}

}  // namespace
}  // namespace larder::kernels::internal

#endif  // LARDER_KERNELS_KVC1_TRELLIS_INTERNAL_H_
