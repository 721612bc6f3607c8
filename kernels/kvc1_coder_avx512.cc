// The entropy coder with AVX-512, as of Ice Lake (VBMI, VBMI2). Compiled with
// its own flags (CMakeLists.txt) and run only where the CPU has it.

#include "kernels/kvc1_internal.h"

#if defined(__AVX512VBMI2__)

#include <immintrin.h>

#include "kernels/kvc1_streams_internal.h"

namespace larder::kernels::internal {
namespace {

#define LARDER_INLINE inline __attribute__((always_inline))

// Bytes 2i and 2i + 1 of a table of u16 in lane i of u16: i * 0x0202 + 0x0100.
// VPERMB with these is one micro-operation on Intel, VPERMW is two.
constexpr short kPairStep = 0x0202;
constexpr short kPairZero = 0x0100;

alignas(64) constexpr uint8_t kEvenBytes[64] = {
    0,  2,  4,  6,  8,  10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30,
    32, 34, 36, 38, 40, 42, 44, 46, 48, 50, 52, 54, 56, 58, 60, 62};
alignas(64) constexpr uint8_t kTwice[64] = {
    0,  0,  1,  1,  2,  2,  3,  3,  4,  4,  5,  5,  6,  6,  7,  7,
    8,  8,  9,  9,  10, 10, 11, 11, 12, 12, 13, 13, 14, 14, 15, 15,
    16, 16, 17, 17, 18, 18, 19, 19, 20, 20, 21, 21, 22, 22, 23, 23,
    24, 24, 25, 25, 26, 26, 27, 27, 28, 28, 29, 29, 30, 30, 31, 31};

LARDER_INLINE __m512i Set(int value) {
  return _mm512_set1_epi16(static_cast<short>(value));
}

// The widths of the symbols of a table.
LARDER_INLINE __m512i Widths(const SymbolTable& table, __m512i starts) {
  const __m512i ends = _mm512_mask_loadu_epi16(Set(kProbabilityOne), 0x7fffffff,
                                               table.start + 1);
  return _mm512_sub_epi16(ends, starts);
}

// Per lane of u16 the lookup of a byte pair for a value per lane of bytes.
LARDER_INLINE __m512i PairsOf(__m256i values) {
  const __m512i twice = _mm512_permutexvar_epi8(_mm512_load_si512(kTwice),
                                                _mm512_castsi256_si512(values));
  return _mm512_or_si512(_mm512_add_epi8(twice, twice), Set(kPairZero));
}

// The slots of one symbol per lane.
struct Intervals {
  __m512i start, width;
};

struct RefineThresholds {
  __m512i first, second;
};

LARDER_INLINE RefineThresholds ThresholdsOf(const RefineTable& table,
                                            const int8_t* context) {
  const __m512i entries = _mm512_loadu_si512(&table);
  const __m256i values =
      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(context));
  const __m512i pairs =
      PairsOf(_mm256_min_epu8(_mm256_abs_epi8(values), _mm256_set1_epi8(15)));
  return {
      _mm512_permutexvar_epi8(pairs, entries),
      _mm512_permutexvar_epi8(_mm512_add_epi8(pairs, Set(0x2020)), entries)};
}

// `past_first`, `past_second`: the symbol is at least 1, at least 2.
LARDER_INLINE Intervals IntervalsOf(const RefineThresholds& thresholds,
                                    __mmask32 past_first,
                                    __mmask32 past_second) {
  __m512i start = _mm512_maskz_mov_epi16(past_first, thresholds.first);
  start = _mm512_mask_mov_epi16(start, past_second, thresholds.second);
  __m512i end =
      _mm512_mask_mov_epi16(thresholds.first, past_first, thresholds.second);
  end = _mm512_mask_mov_epi16(end, past_second, Set(kProbabilityOne));
  return {start, _mm512_sub_epi16(end, start)};
}

// --- Decoding ----------------------------------------------------------------

// 32 states x in halves: `high` is x >> 12, which fits as x < 2^28, and the low
// 12 bits of `low` are those of x.
struct SplitState {
  __m512i high, low;
};

SplitState LoadSplit(const uint32_t* states) {
  alignas(64) uint16_t high[kLanes];
  alignas(64) uint16_t low[kLanes];
  for (size_t lane = 0; lane < kLanes; ++lane) {
    high[lane] = static_cast<uint16_t>(states[lane] >> 12);
    low[lane] = static_cast<uint16_t>(states[lane]);
  }
  return {_mm512_load_si512(high), _mm512_load_si512(low)};
}

void StoreSplit(const SplitState& state, uint32_t* states) {
  alignas(64) uint16_t high[kLanes];
  alignas(64) uint16_t low[kLanes];
  _mm512_store_si512(high, state.high);
  _mm512_store_si512(low, state.low);
  for (size_t lane = 0; lane < kLanes; ++lane) {
    states[lane] = uint32_t{high[lane]} << 12 | (low[lane] & 4095u);
  }
}

// x = width * (x >> 12) + slot - start, and a word for each lane that is now
// below 2^12. Returns how many bytes of words that took.
LARDER_INLINE size_t Advance(SplitState* state, __m512i slot,
                             const Intervals& interval,
                             const std::byte* words) {
  const __m512i bias = _mm512_sub_epi16(slot, interval.start);
  const __m512i product_low = _mm512_mullo_epi16(interval.width, state->high);
  const __m512i product_high = _mm512_mulhi_epu16(interval.width, state->high);
  const __m512i low = _mm512_add_epi16(product_low, bias);
  const __mmask32 carry = _mm512_cmplt_epu16_mask(low, bias);
  const __m512i high =
      _mm512_mask_add_epi16(product_high, carry, product_high, Set(1));
  const __m512i shifted = _mm512_shldi_epi16(high, low, 4);
  const __mmask32 small = _mm512_testn_epi16_mask(shifted, shifted);
  state->low = _mm512_mask_expand_epi16(low, small, _mm512_loadu_si512(words));
  // Of a small x, low is all there is; x << 16 | word.
  state->high = _mm512_mask_mov_epi16(shifted, small,
                                      _mm512_shldi_epi16(low, state->low, 4));
  return 2 * static_cast<size_t>(_mm_popcnt_u32(small));
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
    const __m512i starts = _mm512_loadu_si512(&table);
    const __m512i widths = Widths(table, starts);
    const __m512i slot = _mm512_and_si512(state->low, Set(4095));
    // The last symbol that does not start behind the slot, bit by bit.
    __m512i pair = Set(kPairZero);
#pragma GCC unroll 5
    for (int bit = 16; bit != 0; bit /= 2) {
      const __m512i other = _mm512_add_epi16(pair, Set(bit * kPairStep));
      const __m512i start = _mm512_permutexvar_epi8(other, starts);
      pair = _mm512_mask_mov_epi16(pair, _mm512_cmple_epi16_mask(start, slot),
                                   other);
    }
    const __m512i bytes =
        _mm512_permutexvar_epi8(_mm512_load_si512(kEvenBytes), pair);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(symbols),
                        _mm256_srli_epi16(_mm512_castsi512_si256(bytes), 1));
    return Advance(state, slot,
                   {_mm512_permutexvar_epi8(pair, starts),
                    _mm512_permutexvar_epi8(pair, widths)},
                   words);
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
    const __m512i slot = _mm512_and_si512(state->low, Set(4095));
    const __mmask32 past_first =
        _mm512_cmple_epi16_mask(thresholds.first, slot);
    const __mmask32 past_second =
        _mm512_cmple_epi16_mask(thresholds.second, slot);
    _mm256_storeu_si256(
        reinterpret_cast<__m256i*>(symbols),
        _mm256_mask_set1_epi8(_mm256_maskz_set1_epi8(past_first, 1),
                              past_second, 2));
    return Advance(state, slot,
                   IntervalsOf(thresholds, past_first, past_second), words);
  }
};

// --- Encoding ----------------------------------------------------------------

struct WideState {
  __m512i x[2];
};

WideState LoadWide(const uint32_t* states) {
  return {{_mm512_loadu_si512(states), _mm512_loadu_si512(states + 16)}};
}

void StoreWide(const WideState& state, uint32_t* states) {
  _mm512_storeu_si512(states, state.x[0]);
  _mm512_storeu_si512(states + 16, state.x[1]);
}

// x = x / width * 4096 + x % width + start. The quotient, below 2^16, is taken
// from a reciprocal that is too small by a part in 2^20, give or take 2^-22:
// it comes out right or too small by one, which the remainder tells.
LARDER_INLINE __m512i Divide(__m512i x, __m512i width, __m512i start) {
  const __m512 divisor = _mm512_cvtepi32_ps(width);
  const __m512 guess = _mm512_rcp14_ps(divisor);
  const __m512 reciprocal =
      _mm512_mul_ps(guess, _mm512_sub_ps(_mm512_set1_ps(2.f - 0x1p-20f),
                                         _mm512_mul_ps(divisor, guess)));
  const __m512i quotient =
      _mm512_cvttps_epi32(_mm512_mul_ps(_mm512_cvtepi32_ps(x), reciprocal));
  const __m512i remainder =
      _mm512_sub_epi32(x, _mm512_mullo_epi32(quotient, width));
  const __mmask16 too_small = _mm512_cmpge_epi32_mask(remainder, width);
  const __m512i result = _mm512_add_epi32(_mm512_slli_epi32(quotient, 12),
                                          _mm512_add_epi32(remainder, start));
  return _mm512_mask_add_epi32(
      result, too_small, result,
      _mm512_sub_epi32(_mm512_set1_epi32(kProbabilityOne), width));
}

LARDER_INLINE __m512i Widened(__m512i u16, int half) {
  return _mm512_cvtepu16_epi32(half == 0 ? _mm512_castsi512_si256(u16)
                                         : _mm512_extracti64x4_epi64(u16, 1));
}

// Returns where the words now begin.
LARDER_INLINE std::byte* Push(WideState* state, const Intervals& interval,
                              std::byte* begin) {
  __m512i width[2];
  __mmask16 large[2];
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    width[half] = Widened(interval.width, half);
    large[half] = _mm512_cmpge_epu32_mask(_mm512_srli_epi32(state->x[half], 16),
                                          width[half]);
  }
  const __mmask32 all = _mm512_kunpackw(large[1], large[0]);
  const __m512i low = _mm512_inserti64x4(
      _mm512_castsi256_si512(_mm512_cvtepi32_epi16(state->x[0])),
      _mm512_cvtepi32_epi16(state->x[1]), 1);
  const auto count = static_cast<uint32_t>(_mm_popcnt_u32(all));
  begin -= 2 * size_t{count};
  _mm512_mask_storeu_epi16(begin, _bzhi_u32(~uint32_t{0}, count),
                           _mm512_maskz_compress_epi16(all, low));
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const __m512i x =
        _mm512_mask_srli_epi32(state->x[half], large[half], state->x[half], 16);
    state->x[half] = Divide(x, width[half], Widened(interval.start, half));
  }
  return begin;
}

struct BaseEncoder {
  using State = WideState;
  static State Load(const uint32_t* states) { return LoadWide(states); }
  static void Store(const State& state, uint32_t* states) {
    StoreWide(state, states);
  }

  static LARDER_INLINE std::byte* Step(State* state, const SymbolTable& table,
                                       const int8_t*, const uint8_t* symbols,
                                       std::byte* begin) {
    const __m512i starts = _mm512_loadu_si512(&table);
    const __m512i widths = Widths(table, starts);
    const __m512i pairs =
        PairsOf(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(symbols)));
    return Push(state,
                {_mm512_permutexvar_epi8(pairs, starts),
                 _mm512_permutexvar_epi8(pairs, widths)},
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
    const __m256i symbol =
        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(symbols));
    const __mmask32 past_first =
        _mm256_cmpge_epu8_mask(symbol, _mm256_set1_epi8(1));
    const __mmask32 past_second =
        _mm256_cmpge_epu8_mask(symbol, _mm256_set1_epi8(2));
    return Push(
        state,
        IntervalsOf(ThresholdsOf(table, context), past_first, past_second),
        begin);
  }
};

}  // namespace

namespace avx512 {

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

}  // namespace avx512
}  // namespace larder::kernels::internal

#endif
