// The entropy coder with AVX2. Compiled with its own flags (CMakeLists.txt) and
// run only where the CPU has it.

#include "kernels/kvc1_internal.h"

#if defined(__AVX2__)

#include <immintrin.h>

#include "kernels/kvc1_streams_internal.h"

namespace larder::kernels::internal {
namespace {

#define LARDER_INLINE inline __attribute__((always_inline))

LARDER_INLINE __m256i Set(int value) {
  return _mm256_set1_epi16(static_cast<short>(value));
}

// 32 lanes of u16.
struct Lanes16 {
  __m256i half[2];
};

// The slots of one symbol per lane.
struct Intervals {
  Lanes16 start, width;
};

// Shuffles of 8 words by a mask of them.
struct WordShuffles {
  alignas(16) uint8_t bytes[256][16];
};

// The words in sequence go to the lanes of the mask.
constexpr WordShuffles MakeExpansions() {
  WordShuffles shuffles = {};
  for (int mask = 0; mask < 256; ++mask) {
    int word = 0;
    for (int lane = 0; lane < 8; ++lane) {
      const bool set = (mask >> lane & 1) != 0;
      shuffles.bytes[mask][2 * lane] =
          static_cast<uint8_t>(set ? 2 * word : 0x80);
      shuffles.bytes[mask][2 * lane + 1] =
          static_cast<uint8_t>(set ? 2 * word + 1 : 0x80);
      word += set ? 1 : 0;
    }
  }
  return shuffles;
}

// The lanes of the mask go to the last words, in sequence.
constexpr WordShuffles MakeCompressions() {
  WordShuffles shuffles = {};
  for (int mask = 0; mask < 256; ++mask) {
    int word = 8;
    for (int lane = 7; lane >= 0; --lane) {
      if ((mask >> lane & 1) == 0) continue;
      --word;
      shuffles.bytes[mask][2 * word] = static_cast<uint8_t>(2 * lane);
      shuffles.bytes[mask][2 * word + 1] = static_cast<uint8_t>(2 * lane + 1);
    }
  }
  return shuffles;
}

constexpr WordShuffles kExpansions = MakeExpansions();
constexpr WordShuffles kCompressions = MakeCompressions();

LARDER_INLINE __m128i ShuffleOf(const WordShuffles& shuffles, uint32_t mask) {
  return _mm_load_si128(reinterpret_cast<const __m128i*>(shuffles.bytes[mask]));
}

LARDER_INLINE __m256i LoadTwice(const void* from) {
  return _mm256_broadcastsi128_si256(
      _mm_loadu_si128(static_cast<const __m128i*>(from)));
}

LARDER_INLINE __m256i Load(const void* from) {
  return _mm256_loadu_si256(static_cast<const __m256i*>(from));
}

LARDER_INLINE void StoreSymbols(uint8_t* to, __m256i a, __m256i b) {
  _mm256_storeu_si256(
      reinterpret_cast<__m256i*>(to),
      _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xd8));
}

// Of a table of up to 32 entries of u16, the low and the high bytes, each as
// two tables of 16 for VPSHUFB.
struct ByteTables {
  __m256i low[2], high[2];
};

LARDER_INLINE ByteTables SplitBytes(__m256i first, __m256i second) {
  const __m256i low = _mm256_packus_epi16(_mm256_and_si256(first, Set(255)),
                                          _mm256_and_si256(second, Set(255)));
  const __m256i high = _mm256_packus_epi16(_mm256_srli_epi16(first, 8),
                                           _mm256_srli_epi16(second, 8));
  return {{_mm256_permute4x64_epi64(low, 0x88),
           _mm256_permute4x64_epi64(low, 0xdd)},
          {_mm256_permute4x64_epi64(high, 0x88),
           _mm256_permute4x64_epi64(high, 0xdd)}};
}

// Bytes so ordered that unpacking them gives lanes in order.
LARDER_INLINE __m256i LoadForUnpacking(const void* from) {
  return _mm256_permute4x64_epi64(Load(from), 0xd8);
}

LARDER_INLINE Lanes16 Unpack(__m256i low, __m256i high) {
  return {{_mm256_unpacklo_epi8(low, high), _mm256_unpackhi_epi8(low, high)}};
}

// --- Refinement planes: thresholds by context --------------------------------

struct RefineThresholds {
  Lanes16 first, second;
};

LARDER_INLINE RefineThresholds ThresholdsOf(const RefineTable& table,
                                            const int8_t* context) {
  const ByteTables tables = SplitBytes(Load(table.first), Load(table.second));
  const __m256i at = _mm256_min_epu8(_mm256_abs_epi8(LoadForUnpacking(context)),
                                     _mm256_set1_epi8(15));
  return {Unpack(_mm256_shuffle_epi8(tables.low[0], at),
                 _mm256_shuffle_epi8(tables.high[0], at)),
          Unpack(_mm256_shuffle_epi8(tables.low[1], at),
                 _mm256_shuffle_epi8(tables.high[1], at))};
}

// `not_first`, `not_second`: all ones where the symbol is below 1, below 2.
LARDER_INLINE void IntervalsOf(const RefineThresholds& thresholds, int half,
                               __m256i not_first, __m256i not_second,
                               Intervals* intervals) {
  const __m256i first = thresholds.first.half[half];
  const __m256i second = thresholds.second.half[half];
  const __m256i start =
      _mm256_max_epi16(_mm256_andnot_si256(not_first, first),
                       _mm256_andnot_si256(not_second, second));
  const __m256i end = _mm256_blendv_epi8(
      _mm256_blendv_epi8(Set(kProbabilityOne), second, not_second), first,
      not_first);
  intervals->start.half[half] = start;
  intervals->width.half[half] = _mm256_sub_epi16(end, start);
}

// --- Decoding ----------------------------------------------------------------

// 32 states x in halves: `high` is x >> 12, which fits as x < 2^28, and the low
// 12 bits of `low` are those of x.
struct SplitState {
  Lanes16 high, low;
};

SplitState LoadSplit(const uint32_t* states) {
  alignas(32) uint16_t high[kLanes];
  alignas(32) uint16_t low[kLanes];
  for (size_t lane = 0; lane < kLanes; ++lane) {
    high[lane] = static_cast<uint16_t>(states[lane] >> 12);
    low[lane] = static_cast<uint16_t>(states[lane]);
  }
  return {{{Load(high), Load(high + 16)}}, {{Load(low), Load(low + 16)}}};
}

void StoreSplit(const SplitState& state, uint32_t* states) {
  alignas(32) uint16_t high[kLanes];
  alignas(32) uint16_t low[kLanes];
  memcpy(high, &state.high, sizeof high);
  memcpy(low, &state.low, sizeof low);
  for (size_t lane = 0; lane < kLanes; ++lane) {
    states[lane] = uint32_t{high[lane]} << 12 | (low[lane] & 4095u);
  }
}

LARDER_INLINE __m256i SlotOf(const SplitState& state, int half) {
  return _mm256_and_si256(state.low.half[half], Set(4095));
}

// high:low << 4, the upper half.
LARDER_INLINE __m256i ShiftIn(__m256i high, __m256i low) {
  return _mm256_or_si256(_mm256_slli_epi16(high, 4),
                         _mm256_srli_epi16(low, 12));
}

// x = width * (x >> 12) + slot - start, and a word for each lane that is now
// below 2^12. Returns how many bytes of words that took.
LARDER_INLINE size_t Advance(SplitState* state, const Intervals& intervals,
                             const std::byte* words) {
  __m256i low[2], shifted[2], small[2];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m256i width = intervals.width.half[h];
    const __m256i bias =
        _mm256_sub_epi16(SlotOf(*state, h), intervals.start.half[h]);
    const __m256i product_low = _mm256_mullo_epi16(width, state->high.half[h]);
    const __m256i product_high = _mm256_mulhi_epu16(width, state->high.half[h]);
    low[h] = _mm256_add_epi16(product_low, bias);
    const __m256i no_carry =
        _mm256_cmpeq_epi16(_mm256_max_epu16(low[h], bias), low[h]);
    const __m256i high =
        _mm256_add_epi16(_mm256_add_epi16(product_high, Set(1)), no_carry);
    shifted[h] = ShiftIn(high, low[h]);
    small[h] = _mm256_cmpeq_epi16(shifted[h], _mm256_setzero_si256());
  }
  const auto mask = static_cast<uint32_t>(_mm256_movemask_epi8(
      _mm256_permute4x64_epi64(_mm256_packs_epi16(small[0], small[1]), 0xd8)));
  size_t taken = 0;
  const auto take = [&](int quarter) __attribute__((always_inline)) {
    const uint32_t lanes = mask >> 8 * quarter & 255;
    const __m128i expanded = _mm_shuffle_epi8(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(words + taken)),
        ShuffleOf(kExpansions, lanes));
    taken += 2 * static_cast<size_t>(_mm_popcnt_u32(lanes));
    return expanded;
  };
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m128i first = take(2 * h);
    const __m128i second = take(2 * h + 1);
    const __m256i taken_words =
        _mm256_inserti128_si256(_mm256_castsi128_si256(first), second, 1);
    // Of a small x, low is all there is; x << 16 | word.
    state->low.half[h] = _mm256_blendv_epi8(low[h], taken_words, small[h]);
    state->high.half[h] = _mm256_or_si256(
        shifted[h], _mm256_and_si256(small[h], ShiftIn(low[h], taken_words)));
  }
  return taken;
}

struct BaseDecoder {
  using State = SplitState;
  static State Load(const uint32_t* states) { return LoadSplit(states); }
  static void Store(const State& state, uint32_t* states) {
    StoreSplit(state, states);
  }

  static LARDER_INLINE size_t Step(State* state, const SymbolTable& table,
                                   const int8_t*, const std::byte* words,
                                   uint8_t* symbols) {
    // starts[j] has start[4 * b + j] for b = 0..7, in both lanes of 128 bits;
    // starts[4] is where the next block starts.
    const __m256i by_four = _mm256_setr_epi8(
        0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15,  //
        0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15);
    __m256i part[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      part[i] = _mm256_shuffle_epi8(LoadTwice(table.start + 8 * i), by_four);
    }
    const __m256i low01 = _mm256_unpacklo_epi32(part[0], part[1]);
    const __m256i high01 = _mm256_unpackhi_epi32(part[0], part[1]);
    const __m256i low23 = _mm256_unpacklo_epi32(part[2], part[3]);
    const __m256i high23 = _mm256_unpackhi_epi32(part[2], part[3]);
    __m256i starts[5] = {_mm256_unpacklo_epi64(low01, low23),
                         _mm256_unpackhi_epi64(low01, low23),
                         _mm256_unpacklo_epi64(high01, high23),
                         _mm256_unpackhi_epi64(high01, high23),
                         {}};
    starts[4] = _mm256_alignr_epi8(Set(kProbabilityOne), starts[0], 2);

    Intervals intervals;
    __m256i symbol[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256i slot = SlotOf(*state, h);
      // Minus the number of blocks that start behind the slot.
      __m256i behind = _mm256_setzero_si256();
#pragma GCC unroll 7
      for (int block = 1; block < 8; ++block) {
        behind = _mm256_add_epi16(
            behind, _mm256_cmpgt_epi16(Set(table.start[4 * block]), slot));
      }
      // Bytes 2b and 2b + 1, where b is the block.
      const __m256i pair = _mm256_add_epi16(
          _mm256_mullo_epi16(behind, Set(0x0202)), Set(0x0100 + 7 * 0x0202));
      __m256i t[5];
#pragma GCC unroll 5
      for (int j = 0; j < 5; ++j) t[j] = _mm256_shuffle_epi8(starts[j], pair);
      __m256i start = t[0];
      __m256i end = t[4];
      __m256i count = _mm256_add_epi16(_mm256_slli_epi16(behind, 2), Set(31));
      __m256i later[4];
#pragma GCC unroll 3
      for (int j = 1; j < 4; ++j) {
        later[j] = _mm256_cmpgt_epi16(t[j], slot);
        start = _mm256_max_epi16(start, _mm256_andnot_si256(later[j], t[j]));
        count = _mm256_add_epi16(count, later[j]);
      }
#pragma GCC unroll 3
      for (int j = 3; j > 0; --j) {
        end = _mm256_blendv_epi8(end, t[j], later[j]);
      }
      symbol[h] = count;
      intervals.start.half[h] = start;
      intervals.width.half[h] = _mm256_sub_epi16(end, start);
    }
    StoreSymbols(symbols, symbol[0], symbol[1]);
    return Advance(state, intervals, words);
  }
};

struct RefineDecoder {
  using State = SplitState;
  static State Load(const uint32_t* states) { return LoadSplit(states); }
  static void Store(const State& state, uint32_t* states) {
    StoreSplit(state, states);
  }

  static LARDER_INLINE size_t Step(State* state, const RefineTable& table,
                                   const int8_t* context,
                                   const std::byte* words, uint8_t* symbols) {
    const RefineThresholds thresholds = ThresholdsOf(table, context);
    Intervals intervals;
    __m256i symbol[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m256i slot = SlotOf(*state, h);
      const __m256i not_first =
          _mm256_cmpgt_epi16(thresholds.first.half[h], slot);
      const __m256i not_second =
          _mm256_cmpgt_epi16(thresholds.second.half[h], slot);
      symbol[h] =
          _mm256_add_epi16(Set(2), _mm256_add_epi16(not_first, not_second));
      IntervalsOf(thresholds, h, not_first, not_second, &intervals);
    }
    StoreSymbols(symbols, symbol[0], symbol[1]);
    return Advance(state, intervals, words);
  }
};

// --- Encoding ----------------------------------------------------------------

struct WideState {
  __m256i x[4];
};

WideState LoadWide(const uint32_t* states) {
  return {
      {Load(states), Load(states + 8), Load(states + 16), Load(states + 24)}};
}

void StoreWide(const WideState& state, uint32_t* states) {
  memcpy(states, &state, sizeof state);
}

// x = x / width * 4096 + x % width + start. The quotient, below 2^16, is taken
// from a reciprocal that is too small by a part in 2^20, give or take 2^-22:
// it comes out right or too small by one, which the remainder tells.
LARDER_INLINE __m256i Divide(__m256i x, __m256i width, __m256i start) {
  const __m256 divisor = _mm256_cvtepi32_ps(width);
  const __m256 guess = _mm256_rcp_ps(divisor);
  const __m256 reciprocal =
      _mm256_mul_ps(guess, _mm256_sub_ps(_mm256_set1_ps(2.f - 0x1p-20f),
                                         _mm256_mul_ps(divisor, guess)));
  const __m256i quotient =
      _mm256_cvttps_epi32(_mm256_mul_ps(_mm256_cvtepi32_ps(x), reciprocal));
  const __m256i remainder =
      _mm256_sub_epi32(x, _mm256_mullo_epi32(quotient, width));
  const __m256i right = _mm256_cmpgt_epi32(width, remainder);
  const __m256i result = _mm256_add_epi32(_mm256_slli_epi32(quotient, 12),
                                          _mm256_add_epi32(remainder, start));
  return _mm256_add_epi32(
      result,
      _mm256_andnot_si256(
          right, _mm256_sub_epi32(_mm256_set1_epi32(kProbabilityOne), width)));
}

LARDER_INLINE __m256i Widened(const Lanes16& lanes, int quarter) {
  const __m256i half = lanes.half[quarter / 2];
  return _mm256_cvtepu16_epi32(quarter % 2 == 0
                                   ? _mm256_castsi256_si128(half)
                                   : _mm256_extracti128_si256(half, 1));
}

// Returns where the words now begin. Writes 16 bytes for the up to 8 words of
// each quarter: there is room for 8.
LARDER_INLINE std::byte* Push(WideState* state, const Intervals& intervals,
                              std::byte* begin) {
#pragma GCC unroll 4
  for (int quarter = 3; quarter >= 0; --quarter) {
    const __m256i x = state->x[quarter];
    const __m256i width = Widened(intervals.width, quarter);
    const __m256i upper = _mm256_srli_epi32(x, 16);
    const __m256i not_large = _mm256_cmpgt_epi32(width, upper);
    const uint32_t large = ~static_cast<uint32_t>(_mm256_movemask_ps(
                               _mm256_castsi256_ps(not_large))) &
                           255;
    const __m256i low = _mm256_blend_epi16(x, _mm256_setzero_si256(), 0xaa);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(low),
                                           _mm256_extracti128_si256(low, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(begin - 16),
                     _mm_shuffle_epi8(words, ShuffleOf(kCompressions, large)));
    begin -= 2 * static_cast<size_t>(_mm_popcnt_u32(large));
    state->x[quarter] = Divide(_mm256_blendv_epi8(upper, x, not_large), width,
                               Widened(intervals.start, quarter));
  }
  return begin;
}

struct BaseEncoder {
  using State = WideState;
  static State Load(const uint32_t* states) { return LoadWide(states); }
  static void Store(const State& state, uint32_t* states) {
    StoreWide(state, states);
  }

  // 32 lookups of u16 by bytes.
  static LARDER_INLINE Lanes16 LookUp(__m256i first, __m256i second,
                                      __m256i at_first, __m256i at_second) {
    const ByteTables tables = SplitBytes(first, second);
    return Unpack(
        _mm256_or_si256(_mm256_shuffle_epi8(tables.low[0], at_first),
                        _mm256_shuffle_epi8(tables.low[1], at_second)),
        _mm256_or_si256(_mm256_shuffle_epi8(tables.high[0], at_first),
                        _mm256_shuffle_epi8(tables.high[1], at_second)));
  }

  static LARDER_INLINE std::byte* Step(State* state, const SymbolTable& table,
                                       const int8_t*, const uint8_t* symbols,
                                       std::byte* begin) {
    const __m256i first = internal::Load(table.start);
    const __m256i second = internal::Load(table.start + 16);
    const __m256i first_ends = internal::Load(table.start + 1);
    const __m256i second_ends = _mm256_alignr_epi8(
        _mm256_permute2x128_si256(second, Set(kProbabilityOne), 0x21), second,
        2);
    // Where VPSHUFB must give 0, bit 7 is set.
    const __m256i symbol = LoadForUnpacking(symbols);
    const __m256i at_first = _mm256_adds_epu8(symbol, _mm256_set1_epi8(0x70));
    const __m256i at_second = _mm256_sub_epi8(symbol, _mm256_set1_epi8(16));
    return Push(
        state,
        {LookUp(first, second, at_first, at_second),
         LookUp(_mm256_sub_epi16(first_ends, first),
                _mm256_sub_epi16(second_ends, second), at_first, at_second)},
        begin);
  }
};

struct RefineEncoder {
  using State = WideState;
  static State Load(const uint32_t* states) { return LoadWide(states); }
  static void Store(const State& state, uint32_t* states) {
    StoreWide(state, states);
  }

  static LARDER_INLINE std::byte* Step(State* state, const RefineTable& table,
                                       const int8_t* context,
                                       const uint8_t* symbols,
                                       std::byte* begin) {
    const RefineThresholds thresholds = ThresholdsOf(table, context);
    const Lanes16 symbol =
        Unpack(LoadForUnpacking(symbols), _mm256_setzero_si256());
    Intervals intervals;
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      IntervalsOf(thresholds, h, _mm256_cmpgt_epi16(Set(1), symbol.half[h]),
                  _mm256_cmpgt_epi16(Set(2), symbol.half[h]), &intervals);
    }
    return Push(state, intervals, begin);
  }
};

}  // namespace

namespace avx2 {

void Decode(DecodeStream* streams, size_t count) {
  DecodeStreams<BaseDecoder>(streams, count);
}

void DecodeRefine(RefineDecodeStream* streams, size_t count) {
  DecodeStreams<RefineDecoder>(streams, count);
}

void DecodeNested(NestedDecodeStream* streams, size_t count) {
  DecodeStreams<RefineDecoder>(streams, count);
}

void Encode(EncodeStream* streams, size_t count) {
  EncodeStreams<BaseEncoder>(streams, count);
}

void EncodeRefine(RefineEncodeStream* streams, size_t count) {
  EncodeStreams<RefineEncoder>(streams, count);
}

}  // namespace avx2
}  // namespace larder::kernels::internal

#endif
