#ifndef LARDER_KERNELS_CUDA_KVC1_DECODE_CUH_
#define LARDER_KERNELS_CUDA_KVC1_DECODE_CUH_

#include "kernels/cuda/device.h"
#include "kernels/cuda/elements.cuh"
#include "kernels/cuda/kvc1_decode_types.h"
#include "kernels/cuda/pages.cuh"

namespace larder::kernels::cuda {
namespace {

// The words of a stream, of which 64 are in registers: a lane has the words
// `lane` and 32 + `lane` behind `base`. The next 32 are asked for as soon as
// the first 32 are used up, which is long before they are needed.
class Words {
 public:
  __device__ __forceinline__ Words(const void* words, uint32_t count,
                                   uint32_t lane)
      : words_(static_cast<const unsigned char*>(words)),
        count_(count),
        lane_(lane),
        near_(WordAt(lane)),
        far_(WordAt(kWarp + lane)) {}

  // Gives each lane that needs one its word, lower lanes first; false in all
  // lanes if there are not as many.
  __device__ __forceinline__ bool Take(bool needed, uint32_t* word) {
    const uint32_t votes = __ballot_sync(kAllLanes, needed);
#ifdef LARDER_INJECT_WORD_RANK
    const uint32_t before = votes & ((2u << lane_) - 1);
#else
    const uint32_t before = votes & ((1u << lane_) - 1);
#endif
    const auto at = static_cast<int>(offset_) + __popc(before);
#ifdef LARDER_INJECT_SHUFFLE_IN_BRANCH
    if (needed) *word = __shfl_sync(kAllLanes, near_, at & 31);
#endif
    const uint32_t near = __shfl_sync(kAllLanes, near_, at & 31);
    const uint32_t far = __shfl_sync(kAllLanes, far_, at & 31);
    *word = at < 32 ? near : far;
    offset_ += static_cast<uint32_t>(__popc(votes));
    if (base_ + offset_ > count_) return false;
    if (offset_ >= kWarp) {
      offset_ -= kWarp;
      base_ += kWarp;
      near_ = far_;
      far_ = WordAt(base_ + kWarp + lane_);
    }
    return true;
  }

  __device__ __forceinline__ uint32_t used() const {
    return base_ + offset_;
  }

 private:
  __device__ __forceinline__ uint32_t WordAt(uint32_t i) const {
    if (i >= count_) return 0;
    const unsigned char* const at = words_ + size_t{2} * i;
    if (reinterpret_cast<uintptr_t>(words_) % 2 == 0) {
      return __ldg(reinterpret_cast<const uint16_t*>(at));
    }
    return __ldg(at) | uint32_t{__ldg(at + 1)} << 8;
  }

  const unsigned char* words_;
  uint32_t count_;
  uint32_t lane_;
  uint32_t base_ = 0, offset_ = 0;
  uint32_t near_, far_;
};

// A table as a warp has it: lane s the slots of symbol s, from the low to
// before the high half.
__device__ __forceinline__ uint32_t TableOfLane(const SymbolTable& table,
                                                uint32_t lane) {
  const uint32_t start = __ldg(table.start + lane);
  const uint32_t end =
      lane < 31 ? __ldg(table.start + lane + 1) : uint32_t{kProbabilityOne};
  return start | end << 16;
}

// The symbol of a slot, by five questions; `slots` becomes its lane's word.
__device__ __forceinline__ uint32_t SymbolAt(uint32_t table, uint32_t slot,
                                             uint32_t* slots) {
  uint32_t symbol = 0;
  *slots = __shfl_sync(kAllLanes, table, 0);
#pragma unroll
  for (uint32_t half = 16; half != 0; half /= 2) {
    const uint32_t there =
        __shfl_sync(kAllLanes, table, static_cast<int>(symbol + half));
    if ((there & 0xffff) <= slot) {
      symbol += half;
      *slots = there;
    }
  }
  return symbol;
}

// From slot to the state before, but for the word.
__device__ __forceinline__ uint32_t Advance(uint32_t state, uint32_t slot,
                                            uint32_t start, uint32_t end) {
  return (end - start) * (state >> 12) + slot - start;
}

__device__ __forceinline__ bool Renormalise(Words* words, uint32_t* state) {
  uint32_t word = 0;
  const bool needed = *state < kStateMin;
  if (!words->Take(needed, &word)) return false;
  if (needed) *state = *state << 16 | word;
  return true;
}

// One step of the first plane; false in all lanes if the words are at an end.
__device__ __forceinline__ bool DecodeSymbol(uint32_t table, Words* words,
                                             uint32_t* state,
                                             uint32_t* symbol) {
  const uint32_t slot = *state & (kProbabilityOne - 1);
  uint32_t slots;
  *symbol = SymbolAt(table, slot, &slots);
  *state = Advance(*state, slot, slots & 0xffff, slots >> 16);
  return Renormalise(words, state);
}

// One step of the second plane. Lanes 0..15 have the table's first[], the
// others its second[].
__device__ __forceinline__ bool DecodeRefinement(uint32_t table,
                                                 uint32_t context, Words* words,
                                                 uint32_t* state,
                                                 uint32_t* symbol) {
  const uint32_t slot = *state & (kProbabilityOne - 1);
  const uint32_t first =
      __shfl_sync(kAllLanes, table, static_cast<int>(context));
  const uint32_t second =
      __shfl_sync(kAllLanes, table, static_cast<int>(16 + context));
  *symbol = uint32_t{slot >= first} + uint32_t{slot >= second};
  const uint32_t start = *symbol == 0 ? 0 : *symbol == 1 ? first : second;
  const uint32_t end = *symbol == 0   ? first
                       : *symbol == 1 ? second
                                      : uint32_t{kProbabilityOne};
  *state = Advance(*state, slot, start, end);
  return Renormalise(words, state);
}

// Numbers of a round from differences: a lane has a token of its own.
__device__ __forceinline__ void UnpredictRound(const Kvc1Tile& tile,
                                               uint32_t lane, int16_t* steps) {
  int s = 0, a = 0, b = 0;
  uint32_t at = 0;
  for (uint32_t i = 0; i < tile.coefficients; ++i) {
    uint32_t sum = tile.trellis != 0 ? 0 : 2048;
    for (uint32_t parents = __ldg(tile.parent_counts + i); parents != 0;
         --parents, ++at) {
      sum += static_cast<uint32_t>(
          __ldg(tile.factors + at) *
          steps[__ldg(tile.parents + at) * kKvc1StepStride + lane]);
    }
    const int guess = static_cast<int16_t>(static_cast<int32_t>(sum) >> 12);
    int16_t& number = steps[__ldg(tile.order + i) * kKvc1StepStride + lane];
    if (tile.trellis == 0) {
      number = static_cast<int16_t>(number + guess);
      continue;
    }
    number = static_cast<int16_t>((guess & 1) == s ? guess + 2 * number
                                                   : guess + 1 - 2 * number);
    const int next = s ^ a;
    a = b ^ (number >> 1 & 1);
    b = s;
    s = next;
  }
}

// The integer transform of a round: a lane has a token of its own. Four
// channels share each number that is read.
__device__ __forceinline__ void TransformRound(const Kvc1Tile& tile,
                                               uint32_t lane,
                                               const int16_t* steps,
                                               int32_t* values) {
  const uint32_t n = tile.coefficients;
  for (uint32_t c = 0; c < tile.channels; c += 4) {
    uint32_t sums[4] = {0, 0, 0, 0};
    for (uint32_t k = 0; k < n; ++k) {
      const int q = steps[k * kKvc1StepStride + lane];
#pragma unroll
      for (uint32_t j = 0; j < 4; ++j) {
        if (c + j < tile.channels) {
          sums[j] += static_cast<uint32_t>(
              __ldg(tile.klt + size_t{c + j} * n + k) * q);
        }
      }
    }
#pragma unroll
    for (uint32_t j = 0; j < 4; ++j) {
      if (c + j < tile.channels) {
        values[(c + j) * kKvc1ValueStride + lane] =
            static_cast<int32_t>(sums[j]);
      }
    }
  }
}

// Where the numbers of a round are.
struct Round {
  const int16_t* steps;
  const int32_t* values;  // null: no transform
};

// Channel c of the round's token `t` before rotation.
__device__ __forceinline__ float Scaled(const Kvc1Tile& tile,
                                        const Round& round, uint32_t c,
                                        uint32_t t) {
  const int value = round.values != nullptr
                        ? round.values[c * kKvc1ValueStride + t]
                        : round.steps[c * kKvc1StepStride + t];
  const float y = __fmul_rn(static_cast<float>(value), __ldg(tile.scale + c));
  return tile.mean != nullptr ? __fadd_rn(y, __ldg(tile.mean + c)) : y;
}

// Dim d of the head whose first channel is `first`, rotated as the token is.
__device__ __forceinline__ float Rotated(const Kvc1Decode& p,
                                         const Kvc1Tile& tile,
                                         const Round& round, uint32_t first,
                                         uint32_t d, uint32_t t,
                                         uint64_t token) {
  const float y = Scaled(tile, round, first + d, t);
  if (d >= p.rotary_dim) return y;
  const uint32_t half = p.rotary_dim / 2;
  const bool adjacent = p.pairs == RotaryPairs::kAdjacent;
  const uint32_t pair = adjacent ? d / 2 : d < half ? d : d - half;
  const bool is_a = adjacent ? d % 2 == 0 : d < half;
  const uint32_t other = adjacent ? d ^ 1 : is_a ? d + half : d - half;
  const float z = Scaled(tile, round, first + other, t);
  const float cos = __ldg(p.cos + token * half + pair);
  const float sin = __ldg(p.sin + token * half + pair);
  return is_a ? __fsub_rn(__fmul_rn(y, cos), __fmul_rn(z, sin))
              : __fadd_rn(__fmul_rn(z, sin), __fmul_rn(y, cos));
}

__device__ __forceinline__ void StoreValues(Element element, unsigned char* row,
                                            uint32_t d, uint32_t count,
                                            const float* values) {
  const uint32_t bytes = element == Element::kF32 ? 4 : 2;
  unsigned char* const at = row + size_t{d} * bytes;
  if (count == 8 && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
    if (element == Element::kF16) return Store8<Element::kF16>(at, values);
    if (element == Element::kBf16) return Store8<Element::kBf16>(at, values);
    return Store8<Element::kF32>(at, values);
  }
  for (uint32_t i = 0; i < count; ++i) {
    if (element == Element::kF16) {
      StoreElement<Element::kF16>(at, i, values[i]);
    } else if (element == Element::kBf16) {
      StoreElement<Element::kBf16>(at, i, values[i]);
    } else {
      StoreElement<Element::kF32>(at, i, values[i]);
    }
  }
}

// The rows of a round: a lane has eight dims of a token at a time, lanes next
// to each other the same token.
template <Kvc1Content kContent>
__device__ __forceinline__ void StoreRound(const Kvc1Decode& p,
                                           const Kvc1Tile& tile,
                                           const Round& round, uint32_t lane,
                                           uint32_t first_token) {
  const uint32_t pieces = (p.head_dim + 7) / 8;
  const uint32_t heads = tile.channels / p.head_dim;
  const uint32_t left = tile.tokens - first_token;
  const uint32_t tokens = left < kWarp ? left : kWarp;
  for (uint32_t i = lane; i < tokens * heads * pieces; i += kWarp) {
    const uint32_t row = i / pieces;
    const uint32_t d = (i - row * pieces) * 8;
    const uint32_t t = row / heads;
    const uint32_t head = row - t * heads;
    const uint64_t token = uint64_t{tile.first_token} + first_token + t;
    const Place place = PlaceOf(p.places, token);
    if (place.skipped) continue;
    auto* const to = reinterpret_cast<unsigned char*>(
        RowAt(p.rows, place, tile.first_head + head));
    const uint32_t first = head * p.head_dim;
    const uint32_t count = p.head_dim - d < 8 ? p.head_dim - d : 8;
    if constexpr (kContent == Kvc1Content::kValues) {
      float values[8];
      for (uint32_t j = 0; j < count; ++j) {
        values[j] = Rotated(p, tile, round, first, d + j, t, token);
      }
      StoreValues(p.element, to, d, count, values);
    } else {
      uint32_t words[4] = {0, 0, 0, 0};
      for (uint32_t j = 0; j < count; ++j) {
        const auto half = static_cast<uint16_t>(
            round.steps[(first + d + j) * kKvc1StepStride + t]);
        words[j / 2] |= uint32_t{half} << j % 2 * 16;
      }
      unsigned char* const at = to + size_t{d} * 2;
      if (count == 8 && reinterpret_cast<uintptr_t>(at) % 16 == 0) {
        StoreStream16(at, make_uint4(words[0], words[1], words[2], words[3]));
        continue;
      }
      for (uint32_t j = 0; j < 2 * count; ++j) {
        at[j] = static_cast<unsigned char>(words[j / 4] >> j % 4 * 8);
      }
    }
  }
}

// Escapes in decode order.
template <typename T>
class Escapes {
 public:
  __device__ __forceinline__ Escapes(const void* list, uint32_t count)
      : list_(static_cast<const T*>(list)), count_(count) {}

  // To be called by all lanes.
  __device__ __forceinline__ T Next(bool escaped, uint32_t lane) {
    const uint32_t votes = __ballot_sync(kAllLanes, escaped);
    T value = 0;
    if (escaped) {
      const uint32_t at =
          used_ + static_cast<uint32_t>(__popc(votes & ((1u << lane) - 1)));
#ifndef LARDER_INJECT_ESCAPE_BOUND
      if (at < count_)
#endif
        value = __ldg(list_ + at);
    }
    used_ += static_cast<uint32_t>(__popc(votes));
    return value;
  }
  __device__ __forceinline__ bool AtEnd() const {
    return used_ == count_;
  }

 private:
  const T* list_;
  uint32_t count_;
  uint32_t used_ = 0;
};

// Decodes a tile; false in all lanes if it cannot be.
template <Kvc1Content kContent>
__device__ __forceinline__ bool DecodeTile(const Kvc1Decode& p,
                                           const Kvc1Tile& tile, uint32_t lane,
                                           int16_t* steps, int32_t* values,
                                           uint32_t* state,
                                           uint32_t* words_used,
                                           uint32_t* refine_words_used) {
  if (__any_sync(kAllLanes, *state < kStateMin || *state >= kStateEnd)) {
    return false;
  }
  constexpr bool kValues = kContent == Kvc1Content::kValues;
  const uint32_t n = tile.coefficients;
  const uint32_t rounds = (tile.tokens + kWarp - 1) / kWarp;
  const bool refined = kValues && tile.refine_tables != nullptr;
  Escapes<int16_t> escapes(tile.escapes, tile.escape_count);
  Escapes<uint8_t> exponents(tile.escapes, tile.escape_count);

  // A round that is complete leaves for its rows.
  const auto finish = [&](uint32_t r) {
    if constexpr (kValues) {
      if (tile.order != nullptr) UnpredictRound(tile, lane, steps);
      if (tile.klt != nullptr) TransformRound(tile, lane, steps, values);
    }
#ifndef LARDER_INJECT_NO_SYNCWARP_BEFORE_STORE
    __syncwarp();
#endif
    StoreRound<kContent>(p, tile,
                         {steps, tile.klt != nullptr ? values : nullptr}, lane,
                         r * kWarp);
#ifndef LARDER_INJECT_NO_SYNCWARP_AFTER_STORE
    __syncwarp();
#endif
  };

  Words words(tile.words, tile.word_count, lane);
  for (uint32_t r = 0; r < rounds; ++r) {
    int32_t next = __ldg(tile.table_of);
    uint32_t next_table = next < 0 ? 0 : TableOfLane(tile.tables[next], lane);
    for (uint32_t c = 0; c < n; ++c) {
      const int32_t index = next;
      const uint32_t table = next_table;
      if (c + 1 < n) {
        next = __ldg(tile.table_of + c + 1);
        if (next >= 0) next_table = TableOfLane(tile.tables[next], lane);
      }
      uint32_t symbol = kValues ? kZeroSymbol : 0;
      if (index >= 0 && !DecodeSymbol(table, &words, state, &symbol)) {
        return false;
      }
      const size_t step = size_t{r} * n + c;
      int16_t number;
      if constexpr (kValues) {
        const bool escaped = symbol == kEscapeSymbol;
        const int16_t escape = escapes.Next(escaped, lane);
        number =
            escaped
                ? escape
                : static_cast<int16_t>(static_cast<int>(symbol) - kDirectMax);
      } else if constexpr (kContent == Kvc1Content::kLosslessF16) {
        const uint32_t* const bits = tile.bits + step * 3;
        number = static_cast<int16_t>((__ldg(bits + 2) >> lane & 1) << 15 |
                                      symbol << 10 |
                                      (__ldg(bits + 1) >> lane & 1) << 9 |
                                      (__ldg(bits) >> lane & 1) << 8 |
                                      __ldg(tile.bytes + step * kWarp + lane));
      } else {
        const bool escaped = symbol == kEscapeSymbol;
        const uint32_t listed = exponents.Next(escaped, lane);
        const uint32_t exponent =
            escaped ? listed : (symbol + __ldg(tile.exponent_offset + c)) & 255;
        const uint32_t raw = __ldg(tile.bytes + step * kWarp + lane);
        number = static_cast<int16_t>((raw & 0x80) << 8 | exponent << 7 |
                                      (raw & 0x7f));
      }
      if (refined) {
        tile.scratch[step * kWarp + lane] = number;
      } else {
        steps[c * kKvc1StepStride + lane] = number;
      }
    }
    if (!refined) finish(r);
  }
  *words_used = words.used();
  if (kValues && !escapes.AtEnd()) return false;
  if (kContent == Kvc1Content::kLosslessBf16 && !exponents.AtEnd()) {
    return false;
  }
  if (!refined) return true;

  Words refine_words(tile.refine_words, tile.refine_word_count, lane);
  for (uint32_t r = 0; r < rounds; ++r) {
    for (uint32_t c = 0; c < n; ++c) {
      // Each lane reads what it wrote.
      const int base = tile.scratch[(size_t{r} * n + c) * kWarp + lane];
      const int32_t index = __ldg(tile.refine_table_of + c);
      uint32_t symbol = kZeroRefinement;
      if (index >= 0) {
        const uint32_t table = __ldg(
            reinterpret_cast<const uint16_t*>(tile.refine_tables + index) +
            lane);
        const int magnitude = base < 0 ? -base : base;
        const uint32_t context =
            static_cast<uint32_t>(magnitude < 15 ? magnitude : 15);
        if (!DecodeRefinement(table, context, &refine_words, state, &symbol)) {
          return false;
        }
      }
      const int r_value = static_cast<int>(symbol) - 1;
      steps[c * kKvc1StepStride + lane] =
          static_cast<int16_t>(3 * base + (base < 0 ? -r_value : r_value));
    }
    finish(r);
  }
  *refine_words_used = refine_words.used();
  return true;
}

// Block x is a warp and has tile x.
template <Kvc1Content kContent>
__device__ __forceinline__ void DecodeTiles(const Kvc1Decode& p) {
  LARDER_DYNAMIC_SHARED(int16_t, steps);
  int32_t* const values = reinterpret_cast<int32_t*>(
      reinterpret_cast<unsigned char*>(steps) +
      (p.coefficients_max * kKvc1StepStride * 2 + 15) / 16 * 16);
  const Kvc1Tile& tile = p.tiles[blockIdx.x];
  const uint32_t lane = threadIdx.x;
  uint32_t state = tile.states[lane];
  uint32_t words = 0, refine_words = 0;
  const bool ok = DecodeTile<kContent>(p, tile, lane, steps, values, &state,
                                       &words, &refine_words);
  Kvc1TileResult& result = p.results[blockIdx.x];
  if (lane == 0) {
    result.ok = ok ? 1 : 0;
    result.words_used = ok ? words : 0;
    result.refine_words_used = ok ? refine_words : 0;
  }
  result.states[lane] = ok ? state : tile.states[lane];
}

}  // namespace
}  // namespace larder::kernels::cuda

#endif  // LARDER_KERNELS_CUDA_KVC1_DECODE_CUH_
