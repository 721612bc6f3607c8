#ifndef LARDER_KERNELS_KVC1_LOOPS_INTERNAL_H_
#define LARDER_KERNELS_KVC1_LOOPS_INTERNAL_H_

// Plain loops over lanes that compilers turn into vectors by themselves: the
// definition, and every level's implementation, compiled with its flags. What
// they do is said in kvc1.h.

#if defined(__AVX2__)
#include <immintrin.h>
#endif

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

// --- Nested numbers of a trellis ---------------------------------------------

inline int16_t HoldWithin(int16_t value, int16_t least, int16_t most) {
  return value < least ? least : value > most ? most : value;
}

// Quotients of 16 bits in operations of 16 bits, which stay whole vectors.
constexpr uint16_t HighHalf(uint16_t a, uint16_t b) {
  return static_cast<uint16_t>(uint32_t{a} * b >> 16);
}
constexpr uint16_t Sixth(uint16_t x) {
  return static_cast<uint16_t>(HighHalf(x, 43691) >> 2);
}
constexpr uint16_t ThirtySixth(uint16_t x) {
  return static_cast<uint16_t>(HighHalf(x, 58255) >> 5);
}
constexpr bool QuotientsAreExact() {
  for (uint32_t i = 0; i <= 65535; ++i) {
    const auto x = static_cast<uint16_t>(i);
    if (Sixth(x) != x / 6 || ThirtySixth(x) != x / 36) return false;
  }
  return true;
}
static_assert(QuotientsAreExact());

// floor((q + 3) / 6), the divisor's multiple being there to stay positive.
inline int16_t CellOf(int16_t q) {
  const auto x = static_cast<uint16_t>(q + 3 + 6 * 5460);
  return static_cast<int16_t>(Sixth(x) - 5460);
}

inline int TripleOf(int cell) {
  return static_cast<int>(static_cast<uint32_t>(cell + 1 + 3 * 2000) / 3) -
         2000;
}

// What is guessed of 32 lanes in half numbers, modulo 2^16.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
inline void HalfGuess(const uint16_t* parents, const int16_t* factors,
                      size_t count, const int16_t* round, int16_t* guess) {
  __m512i low = _mm512_setzero_si512(), high = low;
  const auto add = [&](__m512i a, __m512i b, int both)
      __attribute__((always_inline)) {
    const __m512i weights = _mm512_set1_epi32(both);
    low = _mm512_dpwssd_epi32(low, _mm512_unpacklo_epi16(a, b), weights);
    high = _mm512_dpwssd_epi32(high, _mm512_unpackhi_epi16(a, b), weights);
  };
  const auto load = [round](size_t channel) __attribute__((always_inline)) {
    return _mm512_loadu_si512(round + channel * kLanes);
  };
  size_t p = 0;
  for (; p + 2 <= count; p += 2) {
    int both;
    __builtin_memcpy(&both, factors + p, sizeof both);
    add(load(parents[p]), load(parents[p + 1]), both);
  }
  if (p < count) {
    add(load(parents[p]), _mm512_setzero_si512(),
        static_cast<uint16_t>(factors[p]));
  }
  const __m512i mask = _mm512_set1_epi32(0xffff);
  _mm512_storeu_si512(
      guess,
      _mm512_packus_epi32(_mm512_and_si512(_mm512_srli_epi32(low, 11), mask),
                          _mm512_and_si512(_mm512_srli_epi32(high, 11), mask)));
}
#elif defined(__AVX2__)
inline void HalfGuess(const uint16_t* parents, const int16_t* factors,
                      size_t count, const int16_t* round, int16_t* guess) {
  for (size_t half = 0; half < kLanes; half += 16) {
    __m256i low = _mm256_setzero_si256(), high = low;
    const auto add = [&](__m256i a, __m256i b, int both)
        __attribute__((always_inline)) {
      const __m256i weights = _mm256_set1_epi32(both);
      low = _mm256_add_epi32(
          low, _mm256_madd_epi16(_mm256_unpacklo_epi16(a, b), weights));
      high = _mm256_add_epi32(
          high, _mm256_madd_epi16(_mm256_unpackhi_epi16(a, b), weights));
    };
    const auto load =
        [ round, half ](size_t channel) __attribute__((always_inline)) {
      return _mm256_loadu_si256(
          reinterpret_cast<const __m256i*>(round + channel * kLanes + half));
    };
    size_t p = 0;
    for (; p + 2 <= count; p += 2) {
      int both;
      __builtin_memcpy(&both, factors + p, sizeof both);
      add(load(parents[p]), load(parents[p + 1]), both);
    }
    if (p < count) {
      add(load(parents[p]), _mm256_setzero_si256(),
          static_cast<uint16_t>(factors[p]));
    }
    const __m256i mask = _mm256_set1_epi32(0xffff);
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(guess + half),
        _mm256_packus_epi32(
            _mm256_and_si256(_mm256_srli_epi32(low, 11), mask),
            _mm256_and_si256(_mm256_srli_epi32(high, 11), mask)));
  }
}
#else
inline void HalfGuess(const uint16_t* parents, const int16_t* factors,
                      size_t count, const int16_t* round, int16_t* guess) {
  uint32_t sums[kLanes] = {};
  for (size_t p = 0; p < count; ++p) {
    const int16_t* const parent = round + size_t{parents[p]} * kLanes;
    for (size_t lane = 0; lane < kLanes; ++lane) {
      sums[lane] += static_cast<uint32_t>(factors[p] * parent[lane]);
    }
  }
  for (size_t lane = 0; lane < kLanes; ++lane) {
    guess[lane] = static_cast<int16_t>(static_cast<int32_t>(sums[lane]) >> 11);
  }
}
#endif

// One channel after the other of a round, in a prediction's order.
struct NestedWalk {
  size_t place = 0;       // in the order
  size_t at = 0;          // of its parents
  int16_t guess[kLanes];  // in half numbers
  int16_t s[kLanes], a[kLanes], b[kLanes];

  void Begin() {
    place = at = 0;
    for (size_t lane = 0; lane < kLanes; ++lane)
      s[lane] = a[lane] = b[lane] = 0;
  }

  // Returns where the channel is in the round.
  size_t Guess(const Prediction& prediction, const int16_t* round) {
    const size_t count = prediction.parent_counts[place];
    HalfGuess(prediction.parents + at, prediction.factors + at, count, round,
              guess);
    at += count;
    return size_t{prediction.order[place++]} * kLanes;
  }

  // The triple guessed, and where in it; triples and their differences are told
  // from each other by the same sum.
  static int16_t GuessedTriple(int16_t guess, bool* upper) {
    const auto x = static_cast<uint16_t>(guess + 32779);
    const uint16_t n = ThirtySixth(x);
    *upper = static_cast<uint16_t>(x - 36 * n) >= 18;
    return static_cast<int16_t>(n - 910);
  }

  // From differences to triples or back.
  void Triples(int16_t* numbers) const {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      bool upper;
      const int16_t n = GuessedTriple(guess[lane], &upper);
      const int16_t k = numbers[lane];
      numbers[lane] =
          upper ? static_cast<int16_t>(n + k) : static_cast<int16_t>(n - k);
    }
  }
  void Differences(const int16_t* triples, int16_t* differences) const {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      bool upper;
      const int16_t n = GuessedTriple(guess[lane], &upper);
      const int16_t t = triples[lane];
      differences[lane] =
          upper ? static_cast<int16_t>(t - n) : static_cast<int16_t>(n - t);
    }
  }

  void CellContext(const int16_t* triples, int8_t* context) const {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const auto d = static_cast<int16_t>(guess[lane] + 1 - 36 * triples[lane]);
      const auto past = static_cast<int16_t>(HoldWithin(d, -24, 23) + 24);
      context[lane] =
          static_cast<int8_t>(static_cast<int16_t>(past * 171) >> 9);  // / 3
    }
  }
  void NumberContext(const int16_t* cells, int8_t* context) const {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const auto d =
          static_cast<int16_t>(guess[lane] - 12 * cells[lane] + 2 * s[lane]);
      context[lane] = static_cast<int8_t>(HoldWithin(d, -8, 7) + 8);
    }
  }

  void Estimates(const int16_t* cells, int16_t* estimates) const {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const auto middle = static_cast<int16_t>(6 * cells[lane]);
      const auto number =
          static_cast<int16_t>(static_cast<int16_t>(guess[lane] + 1) >> 1);
      estimates[lane] = static_cast<int16_t>(
          HoldWithin(number, static_cast<int16_t>(middle - 2),
                     static_cast<int16_t>(middle + 1)));
    }
  }

  void Pass(const int16_t* numbers) {
    for (size_t lane = 0; lane < kLanes; ++lane) {
      const auto next = static_cast<int16_t>(s[lane] ^ a[lane]);
      a[lane] = static_cast<int16_t>(b[lane] ^ (numbers[lane] >> 1 & 1));
      b[lane] = s[lane];
      s[lane] = next;
    }
  }
};

// For each round: differences of triples, the cells' symbols and contexts.
// `estimates` has room for a round.
inline void SplitCells(const Prediction& prediction, const int16_t* q,
                       size_t rounds, size_t stride, int16_t* estimates,
                       int16_t* differences, size_t out_stride,
                       uint8_t* symbols, int8_t* context) {
  NestedWalk walk;
  for (size_t r = 0; r < rounds; ++r, q += stride, differences += out_stride) {
    walk.Begin();
    for (size_t i = 0; i < prediction.channels; ++i) {
      const size_t first = walk.Guess(prediction, estimates);
      int16_t cells[kLanes], triples[kLanes];
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const int16_t cell = CellOf(q[first + lane]);
        const int triple = TripleOf(cell);
        cells[lane] = static_cast<int16_t>(cell);
        triples[lane] = static_cast<int16_t>(triple);
        symbols[lane] = static_cast<uint8_t>(cell - 3 * triple + 1);
      }
      walk.Differences(triples, differences + first);
      walk.CellContext(triples, context);
      walk.Estimates(cells, estimates + first);
      symbols += kLanes;
      context += kLanes;
    }
  }
}

// The numbers' symbols and contexts. Whether a number is odd says s.
inline void SplitNumbers(const Prediction& prediction, const int16_t* q,
                         size_t rounds, size_t stride, uint8_t* symbols,
                         int8_t* context) {
  NestedWalk walk;
  for (size_t r = 0; r < rounds; ++r, q += stride) {
    walk.Begin();
    for (size_t i = 0; i < prediction.channels; ++i) {
      const size_t first = walk.Guess(prediction, q);
      int16_t cells[kLanes];
      for (size_t lane = 0; lane < kLanes; ++lane) {
        const int number = q[first + lane];
        const int cell = CellOf(q[first + lane]);
        cells[lane] = static_cast<int16_t>(cell);
        walk.s[lane] = static_cast<int16_t>(number & 1);
        symbols[lane] =
            static_cast<uint8_t>((number - 6 * cell + walk.s[lane]) / 2 + 1);
      }
      walk.NumberContext(cells, context);
      symbols += kLanes;
      context += kLanes;
    }
  }
}

// What happens before and after each step of a stream: of most, nothing.
template <typename Stream>
struct AroundSteps {
  void Begin(const Stream*) {}
  void Before(int8_t*) {}
  void After(const uint8_t*) {}
};

template <>
struct AroundSteps<NestedDecodeStream> {
  const NestedDecodeStream* stream;
  int16_t* round;
  size_t first;
  int16_t cells[kLanes];  // or triples
  NestedWalk walk;

  void Begin(const NestedDecodeStream* s) {
    stream = s;
    round = s->numbers;
    walk.Begin();
  }

  void Before(int8_t* context) {
    first = walk.Guess(*stream->prediction, round);
    if (stream->nested == Nested::kCells) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        cells[lane] = round[first + lane];
      }
      walk.Triples(cells);
      walk.CellContext(cells, context);
    } else {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        cells[lane] = CellOf(round[first + lane]);
      }
      walk.NumberContext(cells, context);
    }
  }

  void After(const uint8_t* symbols) {
    int16_t* const numbers = round + first;
    if (stream->nested == Nested::kCells) {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        cells[lane] = static_cast<int16_t>(3 * cells[lane] + symbols[lane] - 1);
      }
      walk.Estimates(cells, numbers);
    } else {
      for (size_t lane = 0; lane < kLanes; ++lane) {
        numbers[lane] = static_cast<int16_t>(6 * cells[lane] - walk.s[lane] +
                                             2 * symbols[lane] - 2);
      }
      walk.Pass(numbers);
    }
    if (walk.place == stream->channels) {
      round += stream->stride;
      walk.Begin();
    }
  }
};

}  // namespace
}  // namespace larder::kernels::internal

#endif  // LARDER_KERNELS_KVC1_LOOPS_INTERNAL_H_
