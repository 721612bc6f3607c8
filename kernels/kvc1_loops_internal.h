#ifndef LARDER_KERNELS_KVC1_LOOPS_INTERNAL_H_
#define LARDER_KERNELS_KVC1_LOOPS_INTERNAL_H_

// Plain loops over lanes that compilers turn into vectors by themselves: the
// definition, and every level's implementation, compiled with its flags. What
// they do is said in kvc1.h.

#include "kernels/kvc1_types.h"

namespace larder::kernels::internal {
namespace {

inline uint16_t MagnitudeOf(int value) {
  return static_cast<uint16_t>(value < 0 ? -value : value);
}

inline int LargestMagnitude(const int16_t* q, size_t steps) {
  uint16_t most[kLanes] = {};
  for (size_t step = 0; step < steps; ++step, q += kLanes) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const uint16_t magnitude = MagnitudeOf(q[lane]);
      most[lane] = magnitude > most[lane] ? magnitude : most[lane];
    }
  }
  int largest = 0;
  for (const int value : most) largest = value > largest ? value : largest;
  return largest;
}

// Four rounds of squares fit 32 bits: |q| is at most 32767.
constexpr size_t kSummedRounds = 4;

inline void ChannelSums(const int16_t* q, size_t channels, size_t rounds,
                        int64_t* sum, int64_t* squares) {
  for (size_t c = 0; c < channels; ++c) {
    int64_t all = 0;
    uint64_t all_squares = 0;
    for (size_t first = 0; first < rounds; first += kSummedRounds) {
      int32_t sums[kLanes] = {};
      uint32_t square_sums[kLanes] = {};
      for (size_t r = first; r < rounds && r < first + kSummedRounds; ++r) {
        const int16_t* lanes = q + (r * channels + c) * kLanes;
        for (size_t lane = 0; lane < kLanes; ++lane) {
          const int32_t value = lanes[lane];
          sums[lane] += value;
          square_sums[lane] += static_cast<uint32_t>(value * value);
        }
      }
      for (size_t lane = 0; lane < kLanes; ++lane) {
        all += sums[lane];
        all_squares += square_sums[lane];
      }
    }
    sum[c] = all;
    squares[c] = static_cast<int64_t>(all_squares);
  }
}

inline void ChannelDeviations(const int16_t* q, size_t channels, size_t rounds,
                              const int32_t* centre, int64_t* deviation) {
  for (size_t c = 0; c < channels; ++c) {
    int64_t all = 0;
    const int32_t middle = centre[c];
    for (size_t r = 0; r < rounds; ++r) {
      const int16_t* lanes = q + (r * channels + c) * kLanes;
      int32_t sum = 0;
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const int32_t off = lanes[lane] - middle;
        sum += off < 0 ? -off : off;
      }
      all += sum;
    }
    deviation[c] = all;
  }
}

template <typename Function>
inline void ForEachHead(const ConstTileRows& rows, const Function& function) {
  for (size_t token = 0; token < rows.tokens; ++token) {
    for (size_t head = 0; head < rows.heads; ++head) {
      function(rows.data + static_cast<ptrdiff_t>(token) * rows.token_stride +
                   static_cast<ptrdiff_t>(head) * rows.head_stride,
               head * rows.head_dim);
    }
  }
}

inline void FieldSums(const ConstTileRows& rows, int shift, int mask,
                      uint32_t* sum) {
  for (size_t c = 0; c < rows.heads * rows.head_dim; ++c) sum[c] = 0;
  const size_t dims = rows.head_dim;
  const auto bits = static_cast<uint32_t>(mask);
  ForEachHead(rows, [&](const std::byte* from, size_t channel) {
    uint32_t* __restrict sums = sum + channel;
    for (size_t d = 0; d < dims; ++d) {
      uint16_t half;
      __builtin_memcpy(&half, from + 2 * d, sizeof half);
      sums[d] += (uint32_t{half} >> shift) & bits;
    }
  });
}

inline void FieldCounts(const ConstTileRows& rows, int shift, int16_t* counts) {
  for (size_t i = 0; i < rows.heads * rows.head_dim * 32; ++i) counts[i] = 0;
  const size_t dims = rows.head_dim;
  ForEachHead(rows, [&](const std::byte* from, size_t channel) {
    int16_t* of = counts + channel * 32;
    for (size_t d = 0; d < dims; ++d, of += 32) {
      uint16_t half;
      __builtin_memcpy(&half, from + 2 * d, sizeof half);
      ++of[half >> shift & 31];
    }
  });
}

inline uint16_t LargestBits(const ConstTileRows& rows) {
  uint16_t largest = 0;
  const size_t dims = rows.head_dim;
  ForEachHead(rows, [&](const std::byte* from, size_t) {
    uint16_t most = 0;
    for (size_t d = 0; d < dims; ++d) {
      uint16_t half;
      __builtin_memcpy(&half, from + 2 * d, sizeof half);
      half = half & 0x7fff;
      most = half > most ? half : most;
    }
    largest = most > largest ? most : largest;
  });
  return largest;
}

inline void SplitWide(const uint16_t* wide, size_t count, int16_t* round,
                      int16_t* low) {
  for (size_t i = 0; i < count; ++i, low += kLanes) {
    int16_t* __restrict high = round + wide[i] * kLanes;
    int16_t* __restrict rest = low;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const int q = high[lane];
      const int h = (q + 8) >> 4;
      high[lane] = static_cast<int16_t>(h);
      rest[lane] = static_cast<int16_t>(q - 16 * h);
    }
  }
}

inline void JoinWide(const uint16_t* wide, size_t count, int16_t* round,
                     const int16_t* low) {
  for (size_t i = 0; i < count; ++i, low += kLanes) {
    int16_t* __restrict high = round + wide[i] * kLanes;
    const int16_t* __restrict rest = low;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      high[lane] = static_cast<int16_t>(16 * high[lane] + rest[lane]);
    }
  }
}

}  // namespace
}  // namespace larder::kernels::internal

#endif  // LARDER_KERNELS_KVC1_LOOPS_INTERNAL_H_
